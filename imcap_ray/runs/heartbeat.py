"""How a run shows from time to time that it is alive: in a file, so that a reader needs no Ray."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Final

HEARTBEAT_SECONDS: Final = 30
"""How often a run writes its heartbeat: a small file, which an object store does not notice."""

SILENT_SECONDS: Final = 4 * HEARTBEAT_SECONDS
"""Age of a heartbeat at which its run counts as dead."""


@contextmanager
def repeating(function: Callable[[], None], *, seconds: float) -> Iterator[None]:
    """Call a function at this interval, in a thread, while the block runs, and once more when it ends."""
    finished = threading.Event()

    def repeat() -> None:
        while not finished.wait(seconds):
            function()
        function()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


@dataclass(slots=True, kw_only=True)
class CaptioningHeartbeat:
    """What a captioning run writes to its heartbeat file."""

    started: str
    num_images: int = 0
    """Images that were captioned."""
    waiting: str = ""
    """Why the run waits; "" if it does not."""
    _last_num_images: int = 0
    _last_image: str = ""

    def content(self, images_per_second: float | None) -> dict[str, Any]:
        """The content of the file at this moment."""
        time = now()
        if self.num_images != self._last_num_images:
            self._last_num_images, self._last_image = self.num_images, time
        return {
            "time": time,
            "started": self.started,
            "images_per_second": None if self.waiting else images_per_second,
            "last_image": self._last_image,
            "waiting": self.waiting,
        }


def now() -> str:
    """The time in ISO format, in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
