"""Signs of life of a run, and what the cluster has free -> whether the run waits for CPUs or GPUs that are in use.

On a cluster that several jobs share, actors can hold every CPU. Then no task that decodes can start, and each pool
waits for images that will not come. Ray Data has no notion of other jobs and notices after half an hour.
"""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import ray

from imcap_ray.errors import FullClusterError

POLL_SECONDS: Final = 2.0

REPORT_SECONDS: Final = 20
"""How long a run waits before it reports that it does."""

RELEASE_SECONDS: Final = 40
"""How long a run that has actors waits before it releases them, so that two runs do not wait for each other."""

RELEASE_PENDING_SECONDS: Final = 300
"""The same for a run whose actors have not started: it holds little, and a busy machine may just be slow."""

ROOM_FOR_TASKS: Final = 1
"""Free CPUs that reading, decoding and writing need: Ray Data's tasks ask for one."""

MAX_RESTART_DELAY_SECONDS: Final = 20.0
"""Runs that have released their actors start again at different moments: actors take seconds to acquire their CPUs."""


class _Released(BaseException):  # noqa: N818  # not an error, and no `except Exception` may swallow it
    """Raised in the main thread to end a pipeline that holds CPUs and cannot use them."""


@dataclass(frozen=True)
class FreeResources:
    """What a cluster has, and what of it no task or actor holds at the moment."""

    cpus: float
    free_cpus: float
    gpus: float
    free_gpus: float

    @classmethod
    def read(cls) -> FreeResources:
        """Those of the connected Ray."""
        total = ray.cluster_resources()  # type: ignore[no-untyped-call]
        free = ray.available_resources()  # type: ignore[no-untyped-call]
        return cls(
            cpus=total.get("CPU", 0.0),
            free_cpus=free.get("CPU", 0.0),
            gpus=total.get("GPU", 0.0),
            free_gpus=free.get("GPU", 0.0),
        )

    def lacks(self, *, cpus: float, gpus: float) -> str:
        """The sentence that reports that fewer than these are free; "" if there are enough."""
        if self.free_cpus < cpus:
            return f"the cluster has {self.free_cpus:g} of {self.cpus:g} CPUs free"
        if self.free_gpus < gpus:
            return f"the cluster has {self.free_gpus:g} of {self.gpus:g} GPUs free"
        return ""


class RoomWatch:
    """Measures for how long a run has been idle because the cluster is full.

    A full cluster alone proves nothing: the tasks of a healthy run fill it too. Only while none of the run's processes
    works, and none has reported anything new, is the run waiting.
    """

    def __init__(self) -> None:
        self._num_reports = -1
        self._since: float | None = None
        self.reason = ""
        """What is lacking, while the run waits."""

    def look(self, now: float, *, num_reports: int, num_working: int, read_lack: Callable[[], str]) -> float:
        """Seconds for which the run has waited; 0 if it does not wait.

        Args:
            now: seconds of any clock.
            num_reports: everything that tasks and actors have reported so far.
            num_working: processes that have begun something and not ended it.
            read_lack: asks the cluster what it lacks, "" for nothing; called only if no process works.
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
    """A block that another thread can end, for the reason that it gives: then the block raises FullClusterError.

    Only the main thread can be interrupted. In any other the function that is yielded does nothing.
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
    """Wait until this much is free, after a random delay; what is free then.

    Args:
        check: called every few seconds; raises if the run may not continue.
        on_waiting: called with one line if there is something to wait for.
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
