"""How a run shows from time to time that it is alive: in a file, so that a reader needs no Ray."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

HEARTBEAT_SECONDS: Final = 30
"""How often a run writes its heartbeat: a small file, which an object store does not notice."""

SILENT_SECONDS: Final = 4 * HEARTBEAT_SECONDS
"""Age of a heartbeat at which its run counts as dead."""


@contextmanager
def repeating(function: Callable[[], None], *, seconds: float) -> Iterator[None]:
    """Call a function every so many seconds from a thread of its own while the block runs, and once more at its end."""
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
