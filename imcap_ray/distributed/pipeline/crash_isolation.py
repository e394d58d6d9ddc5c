"""Rows, one of which kills the process that works on it -> what comes of the others, and the one to blame.

Ray tries work again for ever when its process dies, which is right for a node that vanished and wrong for an image
whose decoder crashes. So work that comes a second time is handed to a process of its own, first as a whole, and if
that dies too, row by row. A decoder that does not return is made to die by `process_ends_after`, in C code as well.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

import pyarrow as pa
import ray
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from imcap_ray.errors import ImageError, ImcapError

Work = Callable[[pa.Table], pa.Table]

DEATHS_TO_BLAME: Final = 2
"""Processes that must die of a row that they alone work on: one death may be somebody else's doing."""

NODE_OUT_OF_MEMORY: Final = "NODE_OUT_OF_MEMORY"
"""How Ray calls the death of an actor that it has killed for want of memory, in the error's text alone."""

STARTS: Final = 5
"""Attempts to start a process for isolated work before the run is given up."""


def is_restarted_actor() -> bool:
    """Whether this process replaces an actor that has died. (For tasks see `ProgressCounter.start_task`.)"""
    context = ray.get_runtime_context()
    return bool(context.get_actor_id() and context.was_current_actor_reconstructed)


@contextlib.contextmanager
def process_ends_after(seconds: float) -> Iterator[None]:
    """End this process by SIGALRM if the block takes longer than this.

    The kernel does it, whatever the process is doing. A thread of Python would wait for the lock that a decoder may
    hold. It costs two system calls. No other timer of this kind (ITIMER_REAL) may be in use.
    """
    if _note_fd is not None:
        os.pwrite(_note_fd, _NOTE.pack(time.monotonic()), 0)  # before the timer runs, so that no limit seems kept
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if _note_fd is not None:
            os.pwrite(_note_fd, _NOTE.pack(0.0), 0)


_NOTE: Final = struct.Struct("d")
"""Since when a process has been in `process_ends_after`, by the clock that all processes of a machine share; 0 if it is
not. Ray does not report the signal that a process died of."""

_note_fd: int | None = None
"""Where this process keeps its note."""


def keep_note(path: str) -> None:
    """Keep a note in this file, from now on, which outlives this process."""
    global _note_fd
    _note_fd = os.open(path, os.O_RDWR)


def took_longer(note: BinaryIO, seconds: float) -> bool:
    """Whether the process that kept this note, and has just died, was in `process_ends_after` for this long."""
    (since,) = _NOTE.unpack(os.pread(note.fileno(), _NOTE.size, 0))
    return bool(since) and time.monotonic() - since >= seconds


class Isolated:
    """Work in a process of its own on this node, which may die without harm.

    Args:
        make: makes the work, in that process.
        memory_limit: bytes that the process may take; None: no limit. An image that needs more raises MemoryError
            there, before the node runs out of memory and kills what has nothing to do with it.
        time_limit: seconds after which the work ends its process by `process_ends_after`, if it does; None: never.
    """

    def __init__(
        self, make: Callable[[], Work], *, memory_limit: int | None = None, time_limit: float | None = None
    ) -> None:
        self._note: Any = tempfile.NamedTemporaryFile(prefix="imcap-isolated-") if time_limit else None  # noqa: SIM115
        self._arguments = (make, memory_limit, _visible_gpus(), self._note.name if self._note else None)
        self._time_limit = time_limit
        self._process: Any = None

    def __call__(self, rows: pa.Table) -> Iterator[tuple[pa.Table, pa.Table | ImageError]]:
        """Pairs of rows and what came of them, or, for one row that kills, why there is nothing."""
        done = self._try(rows)
        if not isinstance(done, ImageError):
            yield rows, done
            return
        for number in range(rows.num_rows):
            row = rows.slice(number, 1)
            for _ in range(DEATHS_TO_BLAME):
                done = self._try(row)
                if not isinstance(done, ImageError) or done.code == "too_large":  # time that it took by itself
                    break
            yield row, done

    def _try(self, rows: pa.Table) -> pa.Table | ImageError:
        if self._process is None:
            self._process = self._start()
        try:
            return ray.get(self._process.work.remote(rows))
        except (RayActorError, OutOfMemoryError) as error:
            self._process = None
            is_memory = isinstance(error, OutOfMemoryError) or NODE_OUT_OF_MEMORY in str(error)
            if self._time_limit and not is_memory and took_longer(self._note, self._time_limit):
                return ImageError("too_large", f"decoding took longer than {self._time_limit:g} s")
            code, reason = ("out_of_memory", "took too much memory") if is_memory else ("internal", "died")
            return ImageError(code, f"the process that worked on it alone {reason}, {DEATHS_TO_BLAME} times")

    def _start(self) -> Any:
        if self._note:  # of the process before
            os.pwrite(self._note.fileno(), _NOTE.pack(0.0), 0)
        for _ in range(STARTS):
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            process = _Process.options(scheduling_strategy=here).remote(*self._arguments)  # type: ignore[attr-defined]
            try:
                ray.get(process.start.remote())
            except ActorDiedError:
                continue  # whoever killed it, it was not an image: it has seen none
            return process
        raise ImcapError(f"a process for isolated work died {STARTS} times while it started")


@ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0)
class _Process:
    def __init__(
        self, make: Callable[[], Work], memory_limit: int | None, environment: Mapping[str, str], note: str | None
    ) -> None:
        os.environ.update(environment)
        if note:
            keep_note(note)
        self._make, self._memory_limit = make, memory_limit

    def start(self) -> None:
        self._work = self._make()
        if self._memory_limit and sys.platform == "linux":
            used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
            _, hard = resource.getrlimit(resource.RLIMIT_DATA)
            resource.setrlimit(resource.RLIMIT_DATA, (used + self._memory_limit, hard))

    def work(self, rows: pa.Table) -> pa.Table:
        return self._work(rows)


def _visible_gpus() -> dict[str, str]:
    """This process's GPUs, or its having none, are the isolated one's too, which asks Ray for none of its own."""
    return {name: os.environ[name] for name in ("CUDA_VISIBLE_DEVICES",) if name in os.environ}
