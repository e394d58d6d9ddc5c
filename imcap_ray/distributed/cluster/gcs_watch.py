"""The address of Ray's head service (GCS) -> the end of this process, with one line, when it has stopped answering.

Ray's client waits for the GCS for a minute and then aborts the process without a message, so that nothing is written
about how the run ended.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

PATIENCE_SECONDS: Final = 40.0
"""For the GCS of a cluster, which may be started again: less than the minute after which Ray aborts."""

PRIVATE_PATIENCE_SECONDS: Final = 4.0
"""For the GCS of a private Ray, which nobody starts again."""

RECONNECT_VARIABLE: Final = "RAY_gcs_rpc_server_reconnect_timeout_s"
"""Ray's setting for that minute."""

PROBE_SECONDS: Final = 1.0
PROBE_TIMEOUT_SECONDS: Final = 2.0

exit_code = 1
"""Of a process that ends because its GCS is lost; the command line changes it when the user has interrupted the run."""

_callbacks: list[Callable[[], None]] = []


@contextmanager
def when_lost(callback: Callable[[], None]) -> Iterator[None]:
    """While the block runs, call this before the process ends because the GCS is lost."""
    _callbacks.append(callback)
    try:
        yield
    finally:
        _callbacks.remove(callback)


class GcsWatch:
    """A thread that connects to the GCS once a second.

    Args:
        address: HOST:PORT.
        is_connected: whether this process still uses that Ray.
        clean_up: called before the process ends, after the callbacks of `when_lost`.
    """

    def __init__(
        self, address: str, *, is_own: bool, is_connected: Callable[[], bool], clean_up: Callable[[], None]
    ) -> None:
        self._address = address
        self._patience = PRIVATE_PATIENCE_SECONDS if is_own else patience_seconds()
        self._is_connected = is_connected
        self._clean_up = clean_up
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, name="imcap-gcs-watch", daemon=True).start()

    def stop(self) -> None:
        """Watch no longer: Ray is about to be shut down."""
        self._stopped.set()

    def _watch(self) -> None:
        last_answer = time.monotonic()
        while not self._stopped.wait(PROBE_SECONDS) and self._is_connected():
            if answers(self._address):
                last_answer = time.monotonic()
            elif time.monotonic() - last_answer >= self._patience and not self._stopped.is_set():
                self._end()

    def _end(self) -> None:
        for callback in [*_callbacks]:
            with contextlib.suppress(Exception):  # none of them may keep the process from ending
                callback()
        what = "interrupted" if exit_code != 1 else f"Ray's head at {self._address} has stopped answering"
        with contextlib.suppress(OSError):
            print(f"imcap: {what}; what is written is kept, the same command resumes", file=sys.stderr, flush=True)
        with contextlib.suppress(Exception):
            self._clean_up()  # last: Ray ends this process with 1 and without a word when its raylet ends
        os._exit(exit_code)


def answers(address: str) -> bool:
    """Whether something accepts connections at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_TIMEOUT_SECONDS).close()
    except OSError:
        return False
    return True


def patience_seconds() -> float:
    """How long a cluster's GCS may be silent: two thirds of what Ray's client allows it, if the user has set that."""
    try:
        return float(os.environ[RECONNECT_VARIABLE]) * 2 / 3
    except (KeyError, ValueError):
        return PATIENCE_SECONDS
