"""A headless Chromium, controlled over its debugging protocol, to check how a page looks and behaves.

Debian: apt-get install chromium. The environment variable CHROMIUM names another browser.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
SECONDS_TO_START = 60


def find_chromium() -> str | None:
    """Path of the browser; None if there is none."""
    if "CHROMIUM" in os.environ:
        path = shutil.which(os.environ["CHROMIUM"])
        assert path is not None, f"CHROMIUM names no program: {os.environ['CHROMIUM']}"
        return path
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One tab. Each call is a method of the Chrome DevTools Protocol."""

    def __init__(self, address: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._address = address
        self._number = 0
        self.events: list[dict[str, Any]] = []
        """Events from the browser: console messages, violations of the page's policy, requests."""
        self._loop.run_until_complete(self._connect())

    async def _connect(self) -> None:
        self._session = aiohttp.ClientSession()
        self._socket = await self._session.ws_connect(self._address, max_msg_size=0)

    def close(self) -> None:
        """Close the connection."""
        self._loop.run_until_complete(self._session.close())
        self._loop.close()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method and return its result."""
        return self._loop.run_until_complete(asyncio.wait_for(self._call(method, parameters), timeout=120))

    async def _call(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            message = json.loads((await self._socket.receive()).data)
            if message.get("id") != self._number:
                self.events.append(message)
                continue
            assert "error" not in message, message
            result: dict[str, Any] = message["result"]
            return result

    def open(self, path: Path, *, width: int = 1280, height: int = 900, scheme: str = "light", **metrics: Any) -> None:
        """Show a file in a window of this size, in a light or dark colour scheme."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            **{"mobile": False, **metrics},
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call(
            "Page.navigate", url="about:blank"
        )  # otherwise the previous page, if it is the same file, would be mistaken for it
        while self.evaluate("location.protocol") != "about:":
            time.sleep(0.1)
        self.call("Page.navigate", url=path.absolute().as_uri())
        while self.evaluate("document.readyState + location.protocol") != "completefile:":
            time.sleep(0.1)

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str, *, text: str = "") -> None:
        """Press and release a key."""
        codes = {"Tab": 9, "Enter": 13, "ArrowDown": 40}
        common = {"key": key, "code": key, "windowsVirtualKeyCode": codes.get(key, 0)}
        self.call("Input.dispatchKeyEvent", type="keyDown", **common, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """Save the visible part, or the complete page, as PNG."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))


@contextmanager
def browser() -> Iterator[Page]:
    """Open a page in a new browser and close it at the end."""
    chromium = find_chromium()
    assert chromium is not None
    with tempfile.TemporaryDirectory(prefix="imcap-chromium-", ignore_cleanup_errors=True) as profile:
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"]
        command = [chromium, *flags, f"--user-data-dir={profile}", "--remote-debugging-port=0", "about:blank"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            page = Page(_address_of_tab(Path(profile, "DevToolsActivePort")))
            try:
                yield page
            finally:
                page.close()
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _address_of_tab(port_file: Path) -> str:
    end = time.monotonic() + SECONDS_TO_START
    while not (port_file.exists() and port_file.read_text()):
        assert time.monotonic() < end, "the browser does not start"
        time.sleep(0.1)
    port = port_file.read_text().split()[0]

    async def ask() -> str:
        async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            return next(tab["webSocketDebuggerUrl"] for tab in await answer.json() if tab["type"] == "page")

    return asyncio.run(ask())
