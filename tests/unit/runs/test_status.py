"""Progress of a run, determined only from its files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from click.testing import CliRunner

from imcap_ray import storage
from imcap_ray.cli.main import main
from imcap_ray.data.parquet_files import write_table
from imcap_ray.data.schemas import CAPTIONS_SCHEMA, MANIFEST_SCHEMA
from imcap_ray.errors import ImcapError, InputError
from imcap_ray.runs.captions_folder import CaptionsFolder
from imcap_ray.runs.lease import Lease
from imcap_ray.runs.status import CaptioningStatus, TrainingStatus, read_status
from imcap_ray.runs.training_run import METRICS_FILE, RUNNING, WORK_FOLDER, recorded_end, write_state

PART = "0123456789abcdef" * 2


def ago(seconds: float) -> str:
    return (datetime.now(timezone.utc) - timedelta(seconds=seconds)).isoformat(timespec="seconds")


def write_captions(
    location: Path, *, num_images: int, ok: int, missing: int = 0, is_noted: bool = True, **run: Any
) -> CaptionsFolder:
    """Write a captioning output of `num_images` images, some of which have rows in one part."""
    folder = CaptionsFolder(str(location))
    rows = [
        {name: "" for name in CAPTIONS_SCHEMA.names if pa.types.is_string(CAPTIONS_SCHEMA.field(name).type)}
        | {"image_id": str(number)}
        | {"status": "ok" if number < ok else "failed", "error_code": "" if number < ok else "missing"}
        for number in range(ok + missing)
    ]
    manifest = [{"manifest_id": number, "image_id": str(number)} for number in range(num_images)]
    write_table(storage.join(folder.manifest, "part-0.parquet"), pa.Table.from_pylist(manifest, schema=MANIFEST_SCHEMA))
    if rows:
        write_table(str(location / f"{PART}_000000.parquet"), pa.Table.from_pylist(rows, schema=CAPTIONS_SCHEMA))
        if is_noted:
            ids = pa.table({"manifest_id": pa.array(range(len(rows)), pa.int64())})
            write_table(storage.join(folder.done, f"{PART}_000000"), ids)
    folder.write_run({"input": "/in", "model": "mine", "state": "running", "started": ago(3600)} | run)
    return folder


def captioning(location: Path) -> CaptioningStatus:
    status = read_status(str(location))
    assert isinstance(status, CaptioningStatus)
    return status


def training(location: Path) -> TrainingStatus:
    status = read_status(str(location))
    assert isinstance(status, TrainingStatus)
    return status


def test_a_run_with_a_heartbeat_is_running_and_its_end_is_estimated(tmp_path: Path) -> None:
    folder = write_captions(tmp_path, num_images=10, ok=5, missing=1, started=(started := ago(3600)))
    before = time.monotonic()
    folder.write_heartbeat({"time": ago(10), "started": started, "images_per_second": 2.0})

    status = captioning(tmp_path)

    elapsed = time.monotonic() - before
    assert (status.state, status.num_done, status.num_images) == ("running", 6, 10)
    assert (status.counts, status.error_counts) == ({"ok": 5, "failed": 1}, {"missing": 1})
    assert (status.images_per_second, status.seconds_left) == (2.0, 2.0)
    assert 9 < (status.last_sign_seconds or 0) < 12 + elapsed  # times in files are whole seconds


@pytest.mark.parametrize(
    ("heartbeat", "waiting"),
    [
        ({"waiting": "waiting: the cluster has 0 of 4 CPUs free"}, "waiting: the cluster has 0 of 4 CPUs free"),
        ({"waiting": ""}, "no image was captioned in the last "),
    ],
)
def test_a_stalled_run_has_no_estimated_time_left(tmp_path: Path, heartbeat: dict[str, str], waiting: str) -> None:
    folder = write_captions(tmp_path, num_images=10, ok=5, started=(started := ago(3600)))
    last = {"time": ago(1), "started": started, "images_per_second": 2.0, "last_image": ago(100)}
    folder.write_heartbeat(last | heartbeat)

    status = captioning(tmp_path)
    result = CliRunner().invoke(main, ["status", str(tmp_path)])

    assert (status.state, status.images_per_second, status.seconds_left) == ("running", None, None)
    assert status.waiting.startswith(waiting)
    if not heartbeat["waiting"]:
        assert int(status.waiting.removeprefix(waiting).split()[0]) >= 100  # seconds
    assert waiting in result.stdout and " left" not in result.stdout


def test_a_run_that_finishes_after_its_last_caption_is_not_waiting(tmp_path: Path) -> None:
    folder = write_captions(tmp_path, num_images=5, ok=5, started=(started := ago(3600)))
    folder.write_heartbeat({"time": ago(1), "started": started, "last_image": ago(100)})

    assert captioning(tmp_path).waiting == ""


def test_a_run_without_a_heartbeat_is_silent(tmp_path: Path) -> None:
    folder = write_captions(tmp_path, num_images=10, ok=5, started=(started := ago(3600)))
    folder.write_heartbeat({"time": ago(600), "started": started, "images_per_second": 2.0})

    status = captioning(tmp_path)

    assert (status.state, status.images_per_second, status.seconds_left) == ("silent", None, None)


def test_a_new_run_is_running_before_its_first_heartbeat(tmp_path: Path) -> None:
    write_captions(tmp_path, num_images=0, ok=0, started=ago(5))

    assert captioning(tmp_path).state == "running"


@pytest.mark.parametrize("state", ["complete", "failed", "interrupted"])
def test_the_end_state_of_a_run_takes_precedence_over_a_recent_heartbeat(tmp_path: Path, state: str) -> None:
    folder = write_captions(tmp_path, num_images=5, ok=5, state=state, started=(started := ago(60)))
    folder.write_heartbeat({"time": ago(1), "started": started, "images_per_second": 2.0})

    assert captioning(tmp_path).state == state


def test_a_resumed_run_is_running_while_run_json_still_describes_the_previous_one(tmp_path: Path) -> None:
    folder = write_captions(tmp_path, num_images=10, ok=5, state="failed", started=ago(3600))
    folder.write_heartbeat({"time": ago(1), "started": ago(2), "images_per_second": None})

    assert captioning(tmp_path).state == "running"


def test_a_part_that_is_not_recorded_as_done_does_not_count(tmp_path: Path) -> None:
    write_captions(tmp_path, num_images=10, ok=5, is_noted=False)

    assert captioning(tmp_path).num_done == 0


def test_an_overwriting_run_is_reported_by_its_new_rows(tmp_path: Path) -> None:
    old = write_captions(tmp_path, num_images=3, ok=3, state="complete")
    write_captions(Path(old.next().location), num_images=10, ok=4, started=ago(1))

    status = captioning(tmp_path)

    assert (status.is_replacing, status.state, status.num_done, status.num_images) == (True, "running", 4, 10)


# ---- trainings


def write_training(location: Path, *cider_d: float, phase: str = "cross_entropy", seconds: float = 60.0) -> None:
    work = location / WORK_FOLDER
    work.mkdir()
    recipe = {"training": {"epochs": 4}, "finetune": {"epochs": 1, "repetitions": 2}, "encoder": {"name": "vgg16"}}
    (work / "settings.json").write_text(json.dumps({"recipe": recipe}))
    rows = [
        {"epoch": number, "phase": phase, "cider_d": score, "seconds": seconds}
        for number, score in enumerate(cider_d, start=1)
    ]
    (work / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_training_reports_its_epochs_its_best_score_and_its_phase(tmp_path: Path) -> None:
    write_training(tmp_path, 0.3, 0.5, 0.4)

    status = training(tmp_path)

    assert (status.state, status.phase) == ("running", "cross_entropy")
    assert (status.num_epochs_done, status.num_epochs) == (3, 6)
    assert (status.best_epoch, status.best_cider_d, status.seconds_left) == (2, 0.5, 180.0)


def test_a_half_written_line_is_not_an_epoch(tmp_path: Path) -> None:
    write_training(tmp_path, 0.3)
    with (tmp_path / WORK_FOLDER / METRICS_FILE).open("a") as file:
        file.write('{"epoch": 2, "pha')

    assert training(tmp_path).num_epochs_done == 1


def test_a_training_is_reported_before_its_first_epoch_and_after_its_last(tmp_path: Path) -> None:
    write_training(tmp_path)
    assert training(tmp_path).state == "starting"
    (tmp_path / "config.json").touch()
    assert training(tmp_path).state == "complete"


def test_a_training_is_running_as_long_as_it_has_a_heartbeat(tmp_path: Path) -> None:
    write_training(tmp_path, 0.3)
    work = tmp_path / WORK_FOLDER
    long_ago = time.time() - 3 * 3600
    for path in work.iterdir():
        os.utime(path, (long_ago, long_ago))
    assert training(tmp_path).state == "silent"

    write_state(Lease.acquire(str(work)), RUNNING)

    assert training(tmp_path).state == "running"


@pytest.mark.parametrize(("error", "state"), [(KeyboardInterrupt(), "interrupted"), (ImcapError("out"), "failed")])
def test_an_interrupted_or_failed_training_is_reported_at_once(
    tmp_path: Path, error: BaseException, state: str
) -> None:
    write_training(tmp_path, 0.3)

    with pytest.raises(type(error)), recorded_end(Lease.acquire(str(tmp_path / WORK_FOLDER))):
        raise error

    assert training(tmp_path).state == state
    assert CliRunner().invoke(main, ["status", str(tmp_path)]).output.count("the same command resumes") == 1


def test_a_finished_training_that_runs_again_is_running(tmp_path: Path) -> None:
    write_training(tmp_path, 0.3)
    (tmp_path / "config.json").touch()

    with recorded_end(Lease.acquire(str(tmp_path / WORK_FOLDER))):
        assert training(tmp_path).state == "running"

    assert training(tmp_path).state == "complete"


# ---- the command


@pytest.mark.parametrize("place", ["nowhere", "empty"])
def test_a_folder_without_a_run_is_exit_code_2(tmp_path: Path, place: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError):
        read_status(str(tmp_path / place))

    result = CliRunner().invoke(main, ["status", str(tmp_path / place)])

    assert (result.exit_code, result.stdout) == (2, "")
    [line] = result.stderr.splitlines()
    assert line.startswith(f"imcap: {tmp_path / place} ")


def test_the_command_starts_no_ray_and_imports_no_torch(tmp_path: Path) -> None:
    folder = write_captions(tmp_path, num_images=10, ok=5, missing=1, started=(started := ago(3600)))
    folder.write_heartbeat({"time": ago(1), "started": started, "images_per_second": 2.0})
    program = (
        "import sys\n"
        "from imcap_ray.cli.main import main\n"
        f"main(['status', {str(tmp_path)!r}], standalone_mode=False)\n"
        "print([name for name in ('torch', 'ray', 'PIL') if name in sys.modules])"
    )

    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=50)

    lines = run.stdout.splitlines()
    assert lines[0] == f"{tmp_path}: running"
    assert lines[1] == "6 of 10 images (60%), 2.0 images/s, 2 s left"
    assert lines[2] == "5 ok, 1 failed (1 missing)"
    assert lines[3].startswith("last heartbeat ")
    assert lines[-1] == "[]"


def test_json_is_one_object(tmp_path: Path) -> None:
    write_captions(tmp_path, num_images=10, ok=5)

    result = CliRunner().invoke(main, ["status", str(tmp_path), "--json"])

    assert json.loads(result.stdout)["num_done"] == 5
