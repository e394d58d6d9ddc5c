"""The work folder of a training: the names of its files, and each epoch's metrics for people and tools.

    MODEL/_training/settings.json   everything that must not change between a training and its resumption
                    owner           the run that may write here
                    metrics.jsonl   a line for each finished epoch
                    validation.json the images that every epoch is scored on
                    stopped.json    why the workers stopped, if another attempt would stop again
                    heartbeat       the state, rewritten every half minute while the training is alive
                    tensorboard/    the metrics as event files
                    mlflow.json     the MLflow run that has them, if any
                    ray/            Ray Train's folder with the checkpoints, from which a training resumes

Imports neither Ray nor torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final, TypedDict, cast

from imcap_ray import storage
from imcap_ray.errors import ImcapError
from imcap_ray.runs.feature_folder import FeatureFolder
from imcap_ray.runs.heartbeat import HEARTBEAT_SECONDS, repeating
from imcap_ray.runs.lease import Lease

# In MODEL.
WORK_FOLDER: Final = "_training"

# In the work folder.
SETTINGS_FILE: Final = "settings.json"

METRICS_FILE: Final = "metrics.jsonl"

HEARTBEAT_FILE: Final = "heartbeat"

# States in the heartbeat. Earlier versions wrote "alive", and nothing at the end.
RUNNING: Final = "running"

COMPLETE: Final = "complete"

INTERRUPTED: Final = "interrupted"

FAILED: Final = "failed"

VALIDATION_FILE: Final = "validation.json"

STOPPED_FILE: Final = "stopped.json"

CAPTIONS_FILE: Final = "captions.parquet"

VOCABULARY_FILE: Final = "vocabulary.json"

RUN_FOLDER: Final = "ray"
"""Ray Train's folder, with the checkpoints."""

# In a checkpoint.
WEIGHTS_FILE: Final = "model.safetensors"
"""The weights that are kept: `decoder.NAME`, and `encoder.NAME` if the CNN is trained as well."""

STATE_FILE: Final = "training_state.pt"
"""The state of the optimizer."""

VALIDATION_ADVICE: Final = (
    "all epochs must be scored on the same images: bring these back, or train into another folder"
)


class EpochMetrics(TypedDict, total=False):
    """Metrics of an epoch, as in a line of metrics.jsonl. Earlier versions wrote fewer."""

    epoch: int
    """From 1, over all phases."""
    phase: str
    num_workers: int
    train_loss: float
    """Mean cross-entropy of a token, in nats."""
    train_reward: float
    """Mean reward of a sampled caption; in self-critical phases only."""
    train_seconds: float
    bleu_1: float
    """As in `imcap_ray.scoring.metrics.Scores`, like the following."""
    bleu_2: float
    bleu_3: float
    bleu_4: float
    rouge_l: float
    cider_d: float
    num_images: int
    length_ratio: float
    num_distinct_captions: int
    half_cider_d: float
    """CIDEr-D of the more confident half of the captions."""
    half_min_confidence: float
    """The lowest confidence in that half."""
    seconds: float
    """Duration of the epoch with its validation."""


History = Sequence[EpochMetrics]
"""The metrics of all epochs so far."""


def epoch_rank(metrics: EpochMetrics) -> tuple[float, int]:
    """Sort key by which an epoch is better than another: its CIDEr-D, and for equal scores the later epoch."""
    return metrics["cider_d"], metrics["epoch"]


def write_state(lease: Lease, state: str) -> None:
    """Write the heartbeat, whose time is that of the file, unless another run has acquired the lease.

    An error is ignored: it is no reason to stop.
    """
    with suppress(OSError, ImcapError):
        lease.require()
        storage.write_bytes(storage.join(lease.work, HEARTBEAT_FILE), f"{state}\n".encode())


def read_state(work: str) -> str:
    """The state in the heartbeat; "" if there is none."""
    location = storage.join(work, HEARTBEAT_FILE)
    return storage.read_bytes(location).decode(errors="replace").strip() if storage.exists(location) else ""


@contextmanager
def recorded_end(lease: Lease) -> Iterator[None]:
    """Record that the training runs, and how the block ended."""
    write_state(lease, RUNNING)
    try:
        yield
    except BaseException as error:
        write_state(lease, FAILED if isinstance(error, Exception) else INTERRUPTED)
        raise
    write_state(lease, COMPLETE)


@contextmanager
def keep_alive(
    lease: Lease, feature_folders: Sequence[FeatureFolder], *, seconds: float = HEARTBEAT_SECONDS
) -> Iterator[None]:
    """Write heartbeats to the work folder and to the folders of features while the block runs.

    The work folder gets none once another run has acquired the lease.

    Args:
        feature_folders: may grow while the block runs.
    """

    def beat() -> None:
        for folder in tuple(feature_folders):
            folder.try_to_beat()
        write_state(lease, RUNNING)

    beat()
    with repeating(beat, seconds=seconds):
        yield


def write_metrics(work: str, history: History) -> None:
    """Replace the metrics of the finished epochs."""
    lines = "".join(json.dumps(row) + os.linesep for row in history)
    storage.write_bytes(storage.join(work, METRICS_FILE), lines.encode())


def read_metrics(work: str) -> list[EpochMetrics]:
    """Metrics of the finished epochs, up to the first corrupt line; empty if there are none."""
    location = storage.join(work, METRICS_FILE)
    if not storage.exists(location):
        return []
    rows: list[EpochMetrics] = []
    for line in storage.read_bytes(location).decode(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict):
            break
        rows.append(cast("EpochMetrics", row))
    return rows


def write_validation_ids(work: str, image_ids: Sequence[str]) -> None:
    """Record the images that every epoch is scored on."""
    storage.write_bytes(storage.join(work, VALIDATION_FILE), json.dumps(list(image_ids)).encode())


def read_validation_ids(work: str) -> list[str] | None:
    """The images that every epoch is scored on; None for a training of an earlier version, which recorded none.

    Raises:
        ImcapError: the record is corrupt.
    """
    location = storage.join(work, VALIDATION_FILE)
    if not storage.exists(location):
        return None
    try:
        image_ids = json.loads(storage.read_bytes(location))
        if not isinstance(image_ids, list) or not all(isinstance(image_id, str) for image_id in image_ids):
            raise ValueError("expected a list of names")
    except ValueError as error:
        raise ImcapError(f"{location} is corrupt ({error}): restore the file, or remove it") from error
    return image_ids


def write_stop(lease: Lease, reason: str) -> None:
    """Record why the workers stopped, unless another run has acquired the lease and would mistake it for its own."""
    if lease.is_held():
        storage.write_bytes(storage.join(lease.work, STOPPED_FILE), json.dumps({"reason": reason}).encode())


def take_stop(work: str) -> str | None:
    """Read why the workers stopped and remove the record; None if they did not."""
    location = storage.join(work, STOPPED_FILE)
    if not storage.exists(location):
        return None
    try:
        reason = str(json.loads(storage.read_bytes(location))["reason"])
    except (ValueError, KeyError, TypeError):
        reason = None
    storage.remove(location)
    return reason
