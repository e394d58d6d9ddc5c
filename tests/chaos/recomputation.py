"""Log of computed captions and list of faults -> how many captions were computed again, and whether faults explain it.

Depends on neither Ray nor processes, only on their numbers and times.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Computed:
    """One computation of a caption."""

    caption: str
    """Hash of the pixels, so it identifies the image."""
    time: float
    """On the machine's monotonic clock."""
    processes: tuple[int, ...]
    """The driver, the actor if its work is isolated, the raylet, and the process itself. If one of them is killed, the
    caption is lost unless it is recorded as done."""

    @property
    def run(self) -> int:
        """The run's driver."""
        return self.processes[0]


@dataclass(frozen=True)
class Fault:
    """A kill, or the end of a run with an error."""

    kind: str
    run: int
    """The run's driver."""
    time: float
    """Just before the kill, on the machine's monotonic clock."""
    done: frozenset[str]
    """Captions in parts that were recorded as done by then."""
    killed: int
    """The process."""

    def can_have_lost(self, computed: Computed) -> bool:
        """Whether this caption was in flight, and a process that it needed was killed.

        It may have been computed after the fault. A process outlives its driver or raylet by up to a second, because
        Ray's workers check once a second whether their raylet is alive, and until then it computes the work it has.
        """
        is_killed = self.run == computed.run and self.killed in computed.processes
        return is_killed and computed.caption not in self.done


@dataclass(frozen=True)
class Recomputation:
    """Which captions were in flight at the faults, and whether only these were computed again."""

    in_flight: int
    """Captions that the faults can have lost: computed, not recorded as done, by a process that was killed itself or
    whose driver or node was. Summed over the faults."""
    by_orphans: int
    """Those of them that were computed after the fault, by processes that were about to end."""
    copies: int
    """Copies of an image that were captioned separately after the index of known images was killed."""
    unexplained: int
    """Captions that were computed again although no fault can have lost them."""


def explain_recomputation(
    log: Sequence[Computed], faults: Sequence[Fault], runs: Sequence[int], copies: Mapping[str, int]
) -> Recomputation:
    """Check image by image that nothing is recomputed beyond the blocks in flight (law 3).

    Take two successive computations a, b of one image. The first was in vain, so a fault lost it: one that killed the
    process of a, its node or its driver, that came after a and before b, and at which the image was not yet recorded as
    done. A caption that is computed and not recorded belongs to a block in flight: its actor has not returned it yet,
    or it waits to be written, or its part is written but not recorded. So b is unexplained if there is no such fault.

    The bound on the sum follows. The faults of successive pairs of one image are different ones, because each is
    between the two computations of its pair. So a fault accounts for at most one computation of each image that was in
    flight at it, and

        computed - needed <= sum over the faults of the images in flight + copies

    What a process computes after its driver was killed counts as computed at that moment: only a driver hands out
    blocks, so it belongs to one that was in flight. A count taken at the moment of the kill would leave these out.

    Copies of an image are captioned once because an index of hashes knows the first. After its process is killed the
    index is rebuilt from what is recorded as done, so each copy of an image that was not recorded by then may be
    captioned too.

    Args:
        runs: the drivers of all runs into the output, in order.
        copies: how many images have the same pixels as another one, by caption.
    """
    order = {run: number for number, run in enumerate(runs)}

    def moment_of(computed: Computed) -> tuple[int, float]:
        ends = [fault.time for fault in faults if fault.can_have_lost(computed)]
        return order[computed.run], min([computed.time, *ends])

    in_flight = by_orphans = num_copies = unexplained = 0
    for fault in faults:
        lost = [computed for computed in log if fault.can_have_lost(computed)]
        captions = {computed.caption for computed in lost}
        in_flight += len(captions)
        by_orphans += len(captions - {computed.caption for computed in lost if computed.time <= fault.time})
    by_caption: dict[str, list[Computed]] = {}
    for computed in sorted(log, key=moment_of):
        by_caption.setdefault(computed.caption, []).append(computed)
    for caption, computations in by_caption.items():
        copies_left = copies.get(caption, 0)
        for first, second in itertools.pairwise(computations):
            before = [fault for fault in faults if (order[fault.run], fault.time) < moment_of(second)]
            if any(fault.can_have_lost(first) for fault in before):
                continue
            ends_of_index = (fault for fault in before if fault.kind == "index" and fault.run == second.run)
            if copies_left and any(caption not in fault.done for fault in ends_of_index):
                copies_left -= 1
                num_copies += 1
            else:
                unexplained += 1
    return Recomputation(in_flight=in_flight, by_orphans=by_orphans, copies=num_copies, unexplained=unexplained)
