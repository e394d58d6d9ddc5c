"""A training's checkpoints: which are complete, which is the newest, and which is the best. Knows nothing of decoders.

A checkpoint is a folder such as `epoch_0007`. It gets checksums before Ray Train copies it, so that a kill, a full disk
or a change by a person is noticed when it is read. Ray's own record of checkpoints, its snapshot, is not written
atomically, and a snapshot that is corrupt or names a missing folder stops Ray Train. It is therefore used within one
call only; what lasts are the folders.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from imcap_ray import storage
from imcap_ray.distributed.ray_internals import train_snapshot_file
from imcap_ray.errors import ImcapError
from imcap_ray.runs.checksums import find_corrupt_files
from imcap_ray.runs.training_run import EpochMetrics, epoch_rank
from imcap_ray.training.phases import SCORE

HISTORY_FILE: Final = "history.json"

NUM_BEST_TO_KEEP: Final = 2
"""Checkpoints that are kept besides the newest, so that there is another good one if one of them is corrupt."""


@dataclass(frozen=True, slots=True)
class EpochCheckpoint:
    """A complete checkpoint."""

    location: str
    history: list[EpochMetrics]
    """Metrics of all epochs so far; the last ones are this epoch's."""

    @property
    def epoch(self) -> int:
        """Number of the epoch after which it was written, from 1."""
        return len(self.history)

    @property
    def phase(self) -> str:
        """The phase of this epoch."""
        return str(self.history[-1]["phase"])

    @property
    def rank(self) -> tuple[float, int]:
        """Sort key, see `epoch_rank`."""
        return epoch_rank(self.history[-1])


class CorruptCheckpointError(ImcapError):
    """A file of a checkpoint is missing or not what was written."""


def checkpoint_name(epoch: int) -> str:
    """Name of an epoch's checkpoint. An epoch that is repeated replaces its checkpoint."""
    return f"epoch_{epoch:04}"


def newest_checkpoint(run: str) -> EpochCheckpoint | None:
    """The newest complete checkpoint; None if there is none."""
    for location in reversed(_locations(run)):
        try:
            return _load(location)
        except CorruptCheckpointError:
            continue
    return None


def choose_best(
    run: str, *, phase: str | None = None, report: Callable[[str], None]
) -> tuple[EpochCheckpoint, EpochCheckpoint]:
    """The complete checkpoint with the best score, and the newest one. Report if a better one is lost.

    Args:
        phase: consider only epochs of this phase.

    Raises:
        ImcapError: no checkpoint is complete.
    """
    complete, corrupt = _read_all(run)
    complete = [checkpoint for checkpoint in complete if phase in (None, checkpoint.phase)]
    if not complete:
        raise ImcapError(f"the training left no complete checkpoint: {corrupt[-1] if corrupt else f'{run} has none'}")
    best, newest = max(complete, key=lambda checkpoint: checkpoint.rank), complete[-1]
    epochs = [metrics for metrics in newest.history if phase in (None, metrics["phase"])]
    best_epoch = max(epochs, key=epoch_rank)
    if best_epoch[SCORE] > best.history[-1][SCORE]:
        report(
            f"the checkpoint of the best epoch, {best_epoch['epoch']} with CIDEr-D {best_epoch[SCORE]:.3f}, is lost: "
            f"epoch {best.epoch} with {best.history[-1][SCORE]:.3f} is used instead"
        )
    return best, newest


def recover(run: str, *, finished_epochs: int, report: Callable[[str], None]) -> EpochCheckpoint | None:
    """Clean up the folder of checkpoints so that Ray Train can resume from it, and return the newest complete one.

    Checkpoints that are not needed any more are removed, and so is Ray's snapshot. Corrupt ones are reported.

    Args:
        finished_epochs: number of epochs that are known to be finished.

    Raises:
        ImcapError: epochs are finished and checkpoints exist, but none is complete.
    """
    complete, corrupt = _read_all(run)
    if corrupt and not complete and finished_epochs:
        raise ImcapError(
            f"{finished_epochs} epochs are finished, but no checkpoint is complete: {corrupt[-1]}: "
            f"restore a checkpoint, or remove {run} to train from the first epoch"
        )
    for error in corrupt:
        report(f"ignored: {error}")
    if finished_epochs and not complete:
        report(f"no checkpoint is left in {run}: training starts again from the first epoch")
    keep = {checkpoint.location for checkpoint in _worth_keeping(complete)}
    for location in _locations(run):
        if location not in keep:
            storage.remove(location)
    storage.remove(storage.join(run, train_snapshot_file()))
    return complete[-1] if complete else None


def _worth_keeping(checkpoints: Sequence[EpochCheckpoint]) -> Iterator[EpochCheckpoint]:
    """The newest and the best checkpoints, as Ray keeps them, and the best of the newest one's phase."""
    yield from checkpoints[-1:]
    of_phase = [checkpoint for checkpoint in checkpoints if checkpoint.phase == checkpoints[-1].phase]
    yield from sorted(of_phase, key=lambda checkpoint: checkpoint.rank)[-1:]
    yield from sorted(checkpoints, key=lambda checkpoint: checkpoint.rank)[-NUM_BEST_TO_KEEP:]


def _read_all(run: str) -> tuple[list[EpochCheckpoint], list[CorruptCheckpointError]]:
    """The complete checkpoints and the errors of the corrupt ones, each in the order of epochs."""
    complete, corrupt = [], []
    for location in _locations(run):
        try:
            complete.append(_load(location))
        except CorruptCheckpointError as error:
            corrupt.append(error)
    return complete, corrupt


def _locations(run: str) -> list[str]:
    """The checkpoints' folders, in the order of epochs."""
    if not storage.is_folder(run):
        return []
    names = {file.name.partition("/")[0] for file in storage.list_files(run) if "/" in file.name}
    epochs = sorted(int(match[1]) for name in names if (match := re.fullmatch(r"epoch_(\d+)", name)))
    return [storage.join(run, checkpoint_name(epoch)) for epoch in epochs]


def _load(location: str) -> EpochCheckpoint:
    for name, problem in find_corrupt_files(location).items():
        raise CorruptCheckpointError(f"checkpoint {location}: {name} {problem}")
    history_file = storage.join(location, HISTORY_FILE)
    try:
        history = json.loads(storage.read_bytes(history_file))
    except (FileNotFoundError, ValueError) as error:  # checksums that we did not write need not include it
        raise CorruptCheckpointError(f"checkpoint {location}: {HISTORY_FILE} is missing or corrupt") from error
    except OSError as error:
        raise ImcapError(f"cannot read {history_file}: {error}") from error
    if not (isinstance(history, list) and history):
        raise CorruptCheckpointError(f"checkpoint {location}: {HISTORY_FILE} contains no epoch")
    return EpochCheckpoint(location, history)
