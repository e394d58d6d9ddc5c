"""Rows, one of which kills the process that works on it -> the results of the others, and the row that kills.

Ray retries work for ever when its process dies, which is right for a node that was lost and wrong for an image whose
decoder crashes. Therefore retried work is done in a process of its own: first as a whole and, if that process dies too,
row by row. `process_ends_after` ends a process whose decoder does not return, even in C code.
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

DEATHS_TO_FAIL: Final = 2
"""Number of processes that must die on a row before it is marked failed. A single death may have another cause."""

NODE_OUT_OF_MEMORY: Final = "NODE_OUT_OF_MEMORY"
"""Ray's name, found only in the error's text, for the death of an actor that it killed to free memory."""

START_ATTEMPTS: Final = 5
"""Attempts to start a process for isolated work before the run fails."""


def is_restarted_actor() -> bool:
    """Whether this process replaces an actor that has died. (For tasks see `ProgressCounter.start_task`.)"""
    context = ray.get_runtime_context()
    return bool(context.get_actor_id() and context.was_current_actor_reconstructed)


@contextlib.contextmanager
def process_ends_after(seconds: float) -> Iterator[None]:
    """End this process by SIGALRM if the block takes longer than this.

    The kernel ends it, whatever it is doing. A Python thread would wait for the lock that a decoder may hold. The cost
    is two system calls. No other timer of this kind (ITIMER_REAL) may be in use.
    """
    if _note_fd is not None:
        os.pwrite(_note_fd, _NOTE.pack(time.monotonic()), 0)  # before the timer starts
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if _note_fd is not None:
            os.pwrite(_note_fd, _NOTE.pack(0.0), 0)


_NOTE: Final = struct.Struct("d")
"""The time at which a process entered `process_ends_after`, or 0. All processes of a machine share this clock.

It is needed because Ray does not report which signal killed a process."""

_note_fd: int | None = None
"""The open file of this process's note."""


def keep_note(path: str) -> None:
    """From now on, keep a note in this file, which outlives this process."""
    global _note_fd
    _note_fd = os.open(path, os.O_RDWR)


def took_longer(note: BinaryIO, seconds: float) -> bool:
    """Whether the process that kept this note was in `process_ends_after` for this long when it died just now."""
    (since,) = _NOTE.unpack(os.pread(note.fileno(), _NOTE.size, 0))
    return bool(since) and time.monotonic() - since >= seconds


class Isolated:
    """Work in a process of its own on this node, which may die without harm.

    Args:
        make: creates the work, in that process.
        memory_limit: bytes that the process may allocate; None means no limit. An image that needs more raises
            MemoryError there, before the node runs out of memory and kills unrelated processes.
        time_limit: seconds after which the work may end its process by `process_ends_after`; None means never.
        timeout: the error of a row that does.
    """

    def __init__(
        self,
        make: Callable[[], Work],
        *,
        memory_limit: int | None = None,
        time_limit: float | None = None,
        timeout: ImageError | None = None,
    ) -> None:
        self._note: Any = tempfile.NamedTemporaryFile(prefix="imcap-isolated-") if time_limit else None  # noqa: SIM115
        self._arguments = (make, memory_limit, _visible_gpus(), self._note.name if self._note else None)
        self._time_limit = time_limit
        self._timeout = timeout
        self._process: Any = None

    def __call__(self, rows: pa.Table) -> Iterator[tuple[pa.Table, pa.Table | ImageError]]:
        """Pairs of rows and their result, or, for a single row that kills its process, the error."""
        done = self._try(rows)
        if not isinstance(done, ImageError):
            yield rows, done
            return
        for number in range(rows.num_rows):
            row = rows.slice(number, 1)
            for _ in range(DEATHS_TO_FAIL):
                done = self._try(row)
                if not isinstance(done, ImageError) or done is self._timeout:  # the row itself took too long
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
            if self._time_limit and self._timeout and not is_memory and took_longer(self._note, self._time_limit):
                return self._timeout
            code, reason = ("out_of_memory", "took too much memory") if is_memory else ("internal", "died")
            return ImageError(code, f"the process that worked on it alone {reason}, {DEATHS_TO_FAIL} times")

    def _start(self) -> Any:
        if self._note:  # clear that of the previous process
            os.pwrite(self._note.fileno(), _NOTE.pack(0.0), 0)
        for _ in range(START_ATTEMPTS):
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            process = _Process.options(scheduling_strategy=here).remote(*self._arguments)  # type: ignore[attr-defined]
            try:
                ray.get(process.start.remote())
            except ActorDiedError:
                continue  # no image killed it, because it has seen none
            return process
        raise ImcapError(f"a process for isolated work died {START_ATTEMPTS} times while it started")


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
    """The variable with this process's GPUs. The isolated process uses the same ones and requests none from Ray."""
    return {name: os.environ[name] for name in ("CUDA_VISIBLE_DEVICES",) if name in os.environ}
