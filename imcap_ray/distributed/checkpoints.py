"""The folder of a training's checkpoints -> the newest and the best that are whole. Knows nothing of decoders.

A checkpoint is a folder `epoch_0007`, sealed before Ray Train copies it: what a kill, a full disk or a person has made
of it shows when it is needed. Ray's own book of checkpoints, its snapshot, is not written atomically, and one that is
damaged or names a folder that is gone stops Ray Train; so it serves within one call, and the folders are what lasts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

from imcap_ray import storage
from imcap_ray.errors import ImcapError
from imcap_ray.runs.checksums import find_corrupt_files
from imcap_ray.training.phases import SCORE

HISTORY_FILE: Final = "history.json"

NUM_BEST_TO_KEEP: Final = 2
"""And the newest: so there is another one to go back to, and another good model, when either is damaged."""


@dataclass(frozen=True, slots=True)
class EpochCheckpoint:
    """A checkpoint that is whole."""

    location: str
    history: list[dict[str, Any]]
    """Metrics of each epoch so far; the last are its own."""

    @property
    def epoch(self) -> int:
        """The epoch after which it was written, from 1."""
        return len(self.history)

    @property
    def phase(self) -> str:
        """The phase of this epoch."""
        return str(self.history[-1]["phase"])

    @property
    def rank(self) -> tuple[float, int]:
        """The better, the larger; of equals the later."""
        return self.history[-1][SCORE], self.epoch


class DamagedCheckpointError(ImcapError):
    """A checkpoint is not what was written; says which file of it."""


def checkpoint_name(epoch: int) -> str:
    """Name of the folder in the run's folder. An epoch that is done again is written over itself."""
    return f"epoch_{epoch:04}"


def newest_checkpoint(run: str) -> EpochCheckpoint | None:
    """The newest that is whole; None where there is none."""
    for location in reversed(_locations(run)):
        try:
            return _load(location)
        except DamagedCheckpointError:
            continue
    return None


def choose_best(
    run: str, *, phase: str | None = None, echo: Callable[[str], None]
) -> tuple[EpochCheckpoint, EpochCheckpoint]:
    """The one with the best score of those that are whole, and the newest; says when a better one is lost.

    Args:
        phase: of its epochs alone.

    Raises:
        ImcapError: not one is whole.
    """
    good, damaged = _survey(run)
    good = [checkpoint for checkpoint in good if phase in (None, checkpoint.phase)]
    if not good:
        raise ImcapError(f"the training left no whole checkpoint: {damaged[-1] if damaged else f'{run} has none'}")
    best, newest = max(good, key=lambda checkpoint: checkpoint.rank), good[-1]
    epochs = [metrics for metrics in newest.history if phase in (None, metrics["phase"])]
    lost = max(epochs, key=lambda metrics: metrics[SCORE])
    if lost[SCORE] > best.history[-1][SCORE]:
        echo(
            f"the best epoch, {lost['epoch']} with CIDEr-D {lost[SCORE]:.3f}, is lost with its checkpoint: "
            f"epoch {best.epoch} with {best.history[-1][SCORE]:.3f} is the best that is left"
        )
    return best, newest


def recover(run: str, *, finished_epochs: int, echo: Callable[[str], None]) -> EpochCheckpoint | None:
    """Make the run's folder one that Ray Train can go on in, and return the newest whole checkpoint.

    Says what is damaged. Removes the checkpoints that are not needed any more, and Ray's snapshot.

    Args:
        finished_epochs: how many are known to be done.

    Raises:
        ImcapError: epochs are done, checkpoints are there, and not one is whole.
    """
    good, damaged = _survey(run)
    if damaged and not good and finished_epochs:
        raise ImcapError(
            f"{finished_epochs} epochs are done, but no checkpoint is whole: {damaged[-1]}: "
            f"put a whole one back, or remove {run} to train from the first epoch"
        )
    for error in damaged:
        echo(f"left out: {error}")
    if finished_epochs and not good:
        echo(f"no checkpoint is left in {run}: training starts again from the first epoch")
    keep = {checkpoint.location for checkpoint in _worth_keeping(good)}
    for location in _locations(run):
        if location not in keep:
            storage.remove(location)
    storage.remove(storage.join(run, CHECKPOINT_MANAGER_SNAPSHOT_FILENAME))
    return good[-1] if good else None


def _worth_keeping(good: Sequence[EpochCheckpoint]) -> Iterator[EpochCheckpoint]:
    """What Ray keeps of checkpoints in their order: the best ones and the newest; and the best of that one's phase."""
    yield from good[-1:]
    yield from sorted((one for one in good if one.phase == good[-1].phase), key=lambda one: one.rank)[-1:]
    yield from sorted(good, key=lambda checkpoint: checkpoint.rank)[-NUM_BEST_TO_KEEP:]


def _survey(run: str) -> tuple[list[EpochCheckpoint], list[DamagedCheckpointError]]:
    """The whole ones and what is wrong with the others, each in the order of epochs."""
    good, damaged = [], []
    for location in _locations(run):
        try:
            good.append(_load(location))
        except DamagedCheckpointError as error:
            damaged.append(error)
    return good, damaged


def _locations(run: str) -> list[str]:
    """The folders of checkpoints, in the order of their epochs."""
    if not storage.is_folder(run):
        return []
    names = {file.name.partition("/")[0] for file in storage.list_files(run) if "/" in file.name}
    epochs = sorted(int(found[1]) for name in names if (found := re.fullmatch(r"epoch_(\d+)", name)))
    return [storage.join(run, checkpoint_name(epoch)) for epoch in epochs]


def _load(location: str) -> EpochCheckpoint:
    for name, what in find_corrupt_files(location).items():
        raise DamagedCheckpointError(f"checkpoint {location}: {name} {what}")
    place = storage.join(location, HISTORY_FILE)
    try:
        history = json.loads(storage.read_bytes(place))
    except (FileNotFoundError, ValueError) as error:  # a seal that is not ours need not name it
        raise DamagedCheckpointError(f"checkpoint {location}: {HISTORY_FILE} is missing or damaged") from error
    except OSError as error:
        raise ImcapError(f"cannot read {place}: {error}") from error
    if not (isinstance(history, list) and history):
        raise DamagedCheckpointError(f"checkpoint {location}: {HISTORY_FILE} names no epoch")
    return EpochCheckpoint(location, history)
