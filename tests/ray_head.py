"""A real Ray head in a separate process, as started by `ray start --head`, with token authentication or without."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tests.hang_guard import HANG_SECONDS

TOKEN = "0123456789abcdef" * 4


@contextlib.contextmanager
def running_head(*, num_cpus: int, needs_token: bool = True) -> Iterator[tuple[Path, str, str]]:
    """Run a head; yield its folder, which is removed with it, the URL of the dashboard, and HOST:PORT."""
    # Ray puts Unix sockets below its temporary folder, and their paths are limited to 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="ims", dir="/tmp"))
    (folder / "user" / ".ray").mkdir(parents=True)
    (folder / "user" / ".ray" / "auth_token").write_text(TOKEN)
    port, dashboard_port, agent_port, client_port = free_ports(4)
    programs = Path(sys.executable).parent
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(folder / "user"), "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    environment["RAY_AUTH_MODE"] = "token" if needs_token else "disabled"
    command = [str(programs / "ray"), "start", "--head", "--block", "--disable-usage-stats", f"--num-cpus={num_cpus}"]
    command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--temp-dir={folder / 'ray'}"]
    command += [f"--port={port}", f"--dashboard-port={dashboard_port}", f"--ray-client-server-port={client_port}"]
    command += [f"--dashboard-agent-listen-port={agent_port}", "--min-worker-port=0", "--max-worker-port=0"]
    dashboard = f"http://127.0.0.1:{dashboard_port}"
    with open(folder / "head.log", "w+") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder / "user")
        try:
            deadline = time.monotonic() + HANG_SECONDS
            while not _answers(f"{dashboard}/api/version"):
                log.seek(0)
                assert process.poll() is None and time.monotonic() < deadline, log.read()
                time.sleep(0.5)
            yield folder, dashboard, f"127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=HANG_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as listeners:
        sockets = [listeners.enter_context(socket.socket()) for _ in range(count)]
        for listener in sockets:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in sockets]


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError as error:
        error.close()
        return error.code == 401
    except OSError:
        return False
    return True
