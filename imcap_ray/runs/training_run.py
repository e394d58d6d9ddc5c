"""The work folder of a training: the names of its files, and the metrics of its epochs for people and tools.

    MODEL/_training/settings.json   what must not change between a training and its resumption
                    owner           the run that may write here
                    metrics.jsonl   a line for each epoch that is done
                    validation.json the images that every epoch is scored on
                    stopped.json    why the workers have stopped, if trying again would not help
                    heartbeat       written anew every half minute while the training lives
                    tensorboard/    the same as event files
                    mlflow.json     which run of MLflow has them too, if any
                    ray/            what Ray Train keeps: the checkpoints, which are what counts

Knows neither Ray nor torch.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, Final

from imcap_ray import storage
from imcap_ray.errors import ImcapError

WORK_FOLDER: Final = "_training"

SETTINGS_FILE: Final = "settings.json"

METRICS_FILE: Final = "metrics.jsonl"

HEARTBEAT_FILE: Final = "heartbeat"

VALIDATION_FILE: Final = "validation.json"

STOPPED_FILE: Final = "stopped.json"

VALIDATION_ADVICE: Final = (
    "the scores of all epochs must be of the same images: bring these back, or train into another folder"
)


def write_heartbeat(work: str) -> None:
    """Give a sign of life: the time of the file. What goes wrong with that is no reason to stop."""
    with contextlib.suppress(OSError, ImcapError):
        storage.write_bytes(storage.join(work, HEARTBEAT_FILE), b"alive\n")


def write_metrics(work: str, history: Sequence[Mapping[str, Any]]) -> None:
    """Replace the metrics of the epochs done."""
    lines = "".join(json.dumps(row) + os.linesep for row in history)
    storage.write_bytes(storage.join(work, METRICS_FILE), lines.encode())


def read_metrics(work: str) -> list[dict[str, Any]]:
    """Metrics of the epochs done, up to the first line that is damaged; empty where there are none."""
    place = storage.join(work, METRICS_FILE)
    if not storage.exists(place):
        return []
    rows = []
    for line in storage.read_bytes(place).decode(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict):
            break
        rows.append(row)
    return rows


def write_validation_ids(work: str, image_ids: Sequence[str]) -> None:
    """Record the images that every epoch is scored on."""
    storage.write_bytes(storage.join(work, VALIDATION_FILE), json.dumps(list(image_ids)).encode())


def read_validation_ids(work: str) -> list[str] | None:
    """The images that every epoch is scored on; None for a training of an earlier version, which recorded none.

    Raises:
        ImcapError: the record is damaged.
    """
    location = storage.join(work, VALIDATION_FILE)
    if not storage.exists(location):
        return None
    try:
        image_ids = json.loads(storage.read_bytes(location))
        if not isinstance(image_ids, list) or not all(isinstance(image_id, str) for image_id in image_ids):
            raise ValueError("expected a list of names")
    except ValueError as error:
        raise ImcapError(f"{location} is damaged ({error}): bring the file back, or remove it") from error
    return image_ids


def write_stop(work: str, reason: str) -> None:
    """Record why the workers have stopped."""
    storage.write_bytes(storage.join(work, STOPPED_FILE), json.dumps({"reason": reason}).encode())


def take_stop(work: str) -> str | None:
    """Why the workers have stopped, if they have; the record is removed."""
    location = storage.join(work, STOPPED_FILE)
    if not storage.exists(location):
        return None
    try:
        reason = str(json.loads(storage.read_bytes(location))["reason"])
    except (ValueError, KeyError, TypeError):
        reason = None
    storage.remove(location)
    return reason


# In the training's work folder.
CAPTIONS_FILE: Final = "captions.parquet"

VOCABULARY_FILE: Final = "vocabulary.json"

RUN_FOLDER: Final = "ray"
"""What Ray Train keeps: the checkpoints."""

# In a checkpoint.
WEIGHTS_FILE: Final = "model.safetensors"
"""Of what is kept: `decoder.NAME`, and `encoder.NAME` when the CNN has been trained as well."""

STATE_FILE: Final = "training_state.pt"
