"""Reports of the tasks and actors of a run -> its progress.

Imports little, because its process starts at the same time as all others.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any, Final

import ray
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

WORK_SECONDS: Final = 300
"""A working process that has reported nothing for longer than this counts as dead."""


@dataclass
class Progress:
    """The progress of a run, summed over its tasks and actors."""

    counts: dict[str, int] = field(default_factory=dict)
    """Images by status."""
    busy_seconds: float = 0.0
    """Time the actors spent on batches."""
    waiting_seconds: float = 0.0
    """Time the actors spent between two batches."""
    batch_size: int = 0
    """The smallest number of images that an actor could compute together; 0 if none has reported it."""
    num_reports: int = 0
    """Number of reports by tasks and actors."""
    num_working: int = 0
    """Tasks and actors that are working."""
    num_actors: int = 0
    """Actors that have started so far."""

    @property
    def num_images(self) -> int:
        """Images done."""
        return sum(self.counts.values())


@ray.remote(num_cpus=0, max_restarts=-1)
class ProgressCounter:
    """Sums what tasks and actors report, and knows which tasks have begun and not ended.

    If it is lost, progress starts again at zero, and an image that kills its process may do so once more.
    """

    def __init__(self) -> None:
        self._progress = Progress()
        self._working: dict[str, float] = {}
        self._actors: set[str] = set()

    def report_work(self, worker: str, is_working: bool, is_actor: bool) -> None:
        """Record that a task or an actor begins or continues to work, or ends."""
        self._progress.num_reports += 1
        if is_actor:
            self._actors.add(worker)
        if is_working:
            self._working[worker] = time.monotonic()
        else:
            self._working.pop(worker, None)

    def start_task(self, task_id: str) -> bool:
        """Record that a task begins to work; whether it has begun before and never ended: its process has died."""
        has_begun = task_id in self._working
        self.report_work(task_id, is_working=True, is_actor=False)
        return has_begun

    def add_batch(self, counts: dict[str, int], busy_seconds: float, waiting_seconds: float) -> None:
        """Add a batch of an actor."""
        for status, count in counts.items():
            self._progress.counts[status] = self._progress.counts.get(status, 0) + count
        self._progress.busy_seconds += busy_seconds
        self._progress.waiting_seconds += waiting_seconds

    def report_batch_size(self, batch_size: int) -> None:
        """Record how many images an actor computes together from now on."""
        self._progress.batch_size = min(self._progress.batch_size or batch_size, batch_size)

    def get(self) -> Progress:
        """The sums so far."""
        oldest = time.monotonic() - WORK_SECONDS
        return replace(
            self._progress,
            num_working=sum(moment > oldest for moment in self._working.values()),
            num_actors=len(self._actors),
        )


def start_counter() -> Any:
    """A `ProgressCounter` on this node, so that the loss of any other node does not matter."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return ProgressCounter.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]


class WorkReport:
    """Reports to the counter whether the task or actor of this process is working."""

    def __init__(self, counter: Any, *, is_actor: bool, part: str = "") -> None:
        """`part` names the part of a task's work, so that the end of one part is not taken for the end of another."""
        context = ray.get_runtime_context()
        self._counter = counter
        self._worker = f"{(context.get_actor_id() if is_actor else context.get_task_id()) or ''}{part}"
        self._is_actor = is_actor

    def begins_again(self) -> bool:
        """Report that a task has begun; whether an earlier process has died while it worked on it.

        True too if the counter has just died, because work in isolation is slower but always right.
        """
        try:
            return bool(ray.get(self._counter.start_task.remote(self._worker)))
        except RayActorError:
            return True

    def continues(self) -> None:
        """Report that it has begun or continues."""
        self._counter.report_work.remote(self._worker, True, self._is_actor)

    def ends(self) -> None:
        """Report that it is done or has failed."""
        self._counter.report_work.remote(self._worker, False, self._is_actor)
