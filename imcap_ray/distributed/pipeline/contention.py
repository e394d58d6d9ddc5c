"""Activity of a run, and free resources of the cluster -> whether the run waits for CPUs or GPUs that are in use.

On a cluster that several jobs share, actors can hold every CPU. Then no decode task can start, and each pool waits for
images that will never come. Ray Data does not consider other jobs and notices only after half an hour.
"""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from imcap_ray.distributed.cluster.free_resources import FreeResources
from imcap_ray.errors import FullClusterError

POLL_SECONDS: Final = 2.0

REPORT_SECONDS: Final = 20
"""How long a run waits before it reports it."""

RELEASE_SECONDS: Final = 40
"""How long a run with actors waits before it releases them, so that two runs do not wait for each other."""

RELEASE_PENDING_SECONDS: Final = 300
"""The same for a run whose actors have not started: it holds little, and a busy machine may only be slow."""

ROOM_FOR_TASKS: Final = 1
"""Free CPUs that reading, decoding and writing need: Ray Data's tasks require one."""

MAX_RESTART_DELAY_SECONDS: Final = 20.0
"""Longest random delay of a run that has released its actors, because actors take seconds to acquire their CPUs."""


class _Released(BaseException):  # noqa: N818  # not an error, and no `except Exception` may swallow it
    """Raised in the main thread to end a pipeline that holds CPUs which it cannot use."""


class RoomWatch:
    """Measures for how long a run has been idle because the cluster is full.

    A full cluster alone proves nothing, because the tasks of a healthy run fill it too. The run is waiting only while
    none of its processes works and none has reported anything new.
    """

    def __init__(self) -> None:
        self._num_reports = -1
        self._since: float | None = None
        self.reason = ""
        """Why the run waits; "" if it does not."""

    def update(self, now: float, *, num_reports: int, num_working: int, read_lack: Callable[[], str]) -> float:
        """The seconds for which the run has waited; 0 if it does not wait.

        Args:
            now: seconds of any clock.
            num_reports: number of reports by tasks and actors so far.
            num_working: number of processes that are working.
            read_lack: returns what the cluster lacks, or ""; called only if no process works.
        """
        is_idle = num_reports == self._num_reports and not num_working
        self._num_reports = num_reports
        self.reason = read_lack() if is_idle else ""
        if not self.reason:
            self._since = None
            return 0.0
        if self._since is None:
            self._since = now
        return now - self._since


@contextmanager
def releasable() -> Iterator[Callable[[str], None]]:
    """A block that another thread can end by calling the yielded function with a reason: it raises FullClusterError.

    Only the main thread can be interrupted. In other threads the yielded function does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda reason: None
        return
    reasons: list[str] = []
    main_thread = threading.get_ident()

    def interrupt(number: int, frame: object) -> None:
        if len(reasons) == 1:  # a second time would interrupt the clean-up of the first
            raise _Released

    def release(reason: str) -> None:
        reasons.append(reason)
        signal.pthread_kill(main_thread, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        yield release
    except _Released:
        raise FullClusterError(f"nothing can be decoded: {reasons[0]}") from None
    finally:
        signal.signal(signal.SIGUSR1, before)


def wait_for_room(
    *, cpus: float, gpus: float, check: Callable[[], None], on_waiting: Callable[[str], None]
) -> FreeResources:
    """Wait for a random delay, and then until this much is free. Returns the free resources.

    Args:
        check: called every few seconds; raises if the run must not continue.
        on_waiting: called once with a line if the run has to wait.
    """
    time.sleep(random.uniform(0, MAX_RESTART_DELAY_SECONDS))
    has_reported = False
    while True:
        free = FreeResources.read()
        reason = free.lacks(cpus=cpus, gpus=gpus)
        if not reason:
            return free
        if not has_reported:
            on_waiting(f"waiting: {reason}")
            has_reported = True
        time.sleep(POLL_SECONDS)
        check()
