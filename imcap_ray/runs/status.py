"""The files of a captioning or training run -> its progress. Starts nothing, writes nothing, needs no Ray."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Final

from imcap_ray import storage
from imcap_ray.errors import ImcapError, InputError
from imcap_ray.runs.captions_folder import RUN_FILE, CaptionsFolder
from imcap_ray.runs.captions_table import COMPLETE, REPLACING, read_run_file
from imcap_ray.runs.heartbeat import HEARTBEAT_SECONDS, SILENT_SECONDS
from imcap_ray.runs.training_run import (
    FAILED,
    HEARTBEAT_FILE,
    INTERRUPTED,
    METRICS_FILE,
    RUNNING,
    SETTINGS_FILE,
    WORK_FOLDER,
    epoch_rank,
    read_metrics,
    read_state,
)

SILENT: Final = "silent"
"""Recorded as running, but without a recent heartbeat: it was killed, or its machine is lost."""

STARTING: Final = "starting"

IDLE_SECONDS: Final = 2 * HEARTBEAT_SECONDS
"""After this long without an image, the earlier speed does not predict the time left."""

_READ_ATTEMPTS: Final = 3  # a running run may remove files after they are listed and before they are read


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptioningStatus:
    """The progress of a captioning run."""

    output: str
    input: str
    model: str
    state: str
    """running, silent, interrupted, failed, complete, or replacing: the new rows of `--overwrite` are complete and are
    replacing the old ones."""
    is_replacing: bool
    """Whether these are the new rows of `--overwrite`, which readers do not see yet."""
    num_images: int
    """Images of the input, as far as it is listed."""
    num_done: int
    """Images whose rows are written."""
    counts: dict[str, int]
    """Written rows by status."""
    error_counts: dict[str, int]
    """Failed rows by error code."""
    num_unfamiliar: int | None
    """Captioned images that are unlike what the model has learned from; None if the model cannot tell."""
    num_existing: int
    """Rows whose caption existed before, see `CaptioningConfig.existing`."""
    images_per_second: float | None
    """Speed of the last two minutes while it runs; when it is complete, of the last run long enough to measure it."""
    seconds_left: float | None
    started: str
    last_sign_seconds: float | None
    """Age of the last heartbeat of a run that should be running."""
    waiting: str
    """Why a running captioning captions nothing at the moment; "" otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingStatus:
    """The progress of a training run."""

    model: str
    state: str
    """running, silent, interrupted, failed or complete; starting until the first epoch has ended."""
    phase: str
    """Phase of the newest epoch; "" before the first."""
    num_epochs: int
    """Maximum number of epochs of all phases."""
    num_epochs_done: int
    best_epoch: int | None
    best_cider_d: float | None
    seconds_left: float | None
    """Maximum time left, if the other epochs take as long as the last one."""
    last_sign_seconds: float | None
    """Age of the last heartbeat of a training that is not complete."""


def read_status(location: str) -> CaptioningStatus | TrainingStatus:
    """The progress of the captioning or training run that writes to this location.

    Raises:
        InputError: no run has written there, or its record is corrupt.
    """
    location = storage.absolute(location)
    folder = CaptionsFolder(location)
    new = folder.next()
    for candidate in (new, folder):
        if (run := read_run_file(storage.join(candidate.work, RUN_FILE))) is not None:
            return _captioning_status(location, candidate, run, is_replacing=candidate is new)
    training = storage.join(location, WORK_FOLDER)
    if storage.is_folder(training):
        return _training_status(location, training)
    raise InputError(f"{location} has neither captions nor a training of imcap")


def _captioning_status(
    output: str, folder: CaptionsFolder, run: Mapping[str, Any], *, is_replacing: bool
) -> CaptioningStatus:
    heartbeat = folder.read_heartbeat()
    state = str(run.get("state", RUNNING))
    is_of_newer_run = heartbeat.get("started", run.get("started")) != run.get("started")
    last_sign = _seconds_since(heartbeat.get("time") or run.get("started"))
    is_alive = last_sign is not None and last_sign < SILENT_SECONDS
    if state == RUNNING or (is_of_newer_run and is_alive):
        state = RUNNING if is_alive else SILENT
    if is_replacing and state == COMPLETE:
        state = REPLACING
    counts, error_counts, num_unfamiliar, num_existing = _count_rows(folder)
    num_images, num_done = folder.count_manifest(), sum(counts.values())
    waiting = _describe_waiting(heartbeat) if state == RUNNING and num_done < num_images else ""
    source = heartbeat if state == RUNNING else run if state in (COMPLETE, REPLACING) else {}
    rate = None if waiting else source.get("images_per_second")
    return CaptioningStatus(
        output=output,
        input=str(run.get("input", "")),
        model=str(run.get("model", "")),
        state=state,
        is_replacing=is_replacing,
        num_images=num_images,
        num_done=num_done,
        counts=counts,
        error_counts=error_counts,
        num_unfamiliar=num_unfamiliar,
        num_existing=num_existing,
        images_per_second=rate,
        seconds_left=(num_images - num_done) / rate if rate and state == RUNNING else None,
        started=str(heartbeat.get("started") or run.get("started", "")),
        last_sign_seconds=last_sign if state in (RUNNING, SILENT) else None,
        waiting=waiting,
    )


def _describe_waiting(heartbeat: Mapping[str, Any]) -> str:
    """Why no image is captioned at the moment; "" if one was captioned recently, or none was yet."""
    if heartbeat.get("waiting"):
        return str(heartbeat["waiting"])
    idle = _seconds_since(heartbeat.get("last_image"))
    return f"no image was captioned in the last {idle:.0f} s" if idle is not None and idle >= IDLE_SECONDS else ""


def _count_rows(folder: CaptionsFolder) -> tuple[dict[str, int], dict[str, int], int | None, int]:
    """See `CaptioningStatus`."""
    for _ in range(_READ_ATTEMPTS - 1):
        try:
            return *folder.count_rows(), folder.count_unfamiliar(), folder.count_existing()
        except (ImcapError, FileNotFoundError):
            time.sleep(1)
    return *folder.count_rows(), folder.count_unfamiliar(), folder.count_existing()


def _training_status(model: str, work: str) -> TrainingStatus:
    rows = read_metrics(work)
    num_epochs = _num_epochs(storage.join(work, SETTINGS_FILE))
    best = max(rows, key=epoch_rank, default=None)
    heartbeats = [storage.join(work, name) for name in (HEARTBEAT_FILE, METRICS_FILE, SETTINGS_FILE)]
    newest_ns = max((storage.describe_file(path).modified_ns for path in heartbeats if storage.exists(path)), default=0)
    last_sign = max(0.0, time.time() - newest_ns / 1e9) if newest_ns else None
    recorded = read_state(work)
    if recorded in (INTERRUPTED, FAILED):
        state = recorded
    elif recorded != RUNNING and storage.exists(storage.join(model, "config.json")):
        state = COMPLETE
    elif last_sign is None or last_sign >= SILENT_SECONDS:
        state = SILENT
    else:
        state = RUNNING if rows else STARTING
    return TrainingStatus(
        model=model,
        state=state,
        phase=rows[-1].get("phase", "") if rows else "",
        num_epochs=num_epochs,
        num_epochs_done=len(rows),
        best_epoch=best["epoch"] if best else None,
        best_cider_d=best["cider_d"] if best else None,
        seconds_left=(num_epochs - len(rows)) * rows[-1]["seconds"] if state == RUNNING else None,
        last_sign_seconds=last_sign if state != COMPLETE else None,
    )


def _num_epochs(settings: str) -> int:
    """Number of epochs of all phases of the recipe in settings.json."""
    try:
        recipe = json.loads(storage.read_bytes(settings))["recipe"]
    except (FileNotFoundError, ValueError, LookupError) as error:
        raise InputError(f"{settings} does not describe a training: {error}") from error
    sections = (section for section in recipe.values() if isinstance(section, dict))
    return sum(section.get("epochs", 0) * section.get("repetitions", 1) for section in sections)


def _seconds_since(moment: Any) -> float | None:
    """Seconds since a time in ISO format, by this machine's clock; None if it is not a time."""
    try:
        return max(0.0, (datetime.now(timezone.utc) - datetime.fromisoformat(moment)).total_seconds())
    except (TypeError, ValueError):
        return None
