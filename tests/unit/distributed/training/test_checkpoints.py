from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Sequence
from itertools import repeat
from pathlib import Path

import pytest

from imcap_ray import storage
from imcap_ray.distributed.training.checkpoints import checkpoint_name, choose_best, newest_checkpoint, recover
from imcap_ray.errors import ImcapError
from imcap_ray.reports.charts import curve_of_epochs
from imcap_ray.runs.checksums import CHECKSUM_FILE, write_checksums
from imcap_ray.runs.status import TrainingStatus, read_status
from imcap_ray.runs.training_run import RUN_FOLDER, WORK_FOLDER, write_metrics

STATE = "state.bin"
SNAPSHOT = "checkpoint_manager_snapshot.json"

Damage = Callable[[str], None]


@pytest.fixture(params=["path", "uri"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "ray") if request.param == "path" else f"memory://{uuid.uuid4().hex}/ray"


def write_checkpoint(run: str, scores: list[float], phases: Sequence[str] = ()) -> str:
    """Write the checkpoint after as many epochs as there are scores, without a decoder."""
    folder = storage.join(run, checkpoint_name(len(scores)))
    history = [
        {"epoch": number, "phase": phase, "cider_d": score, "seconds": 1.0}
        for number, (score, phase) in enumerate(zip(scores, phases or repeat("cross_entropy"), strict=False), start=1)
    ]
    storage.write_bytes(storage.join(folder, STATE), bytes(range(256)) * len(scores))
    storage.write_bytes(storage.join(folder, "history.json"), json.dumps(history).encode())
    write_checksums(folder, [STATE, "history.json"])
    return folder


def write_epochs(run: str, *scores: float, phases: Sequence[str] = ()) -> list[str]:
    return [write_checkpoint(run, list(scores[: epoch + 1]), phases) for epoch in range(len(scores))]


@pytest.mark.parametrize("scores", [(0.5, 0.5, 0.4), (0.0, 0.0), (0.1, 0.5, 0.5)])
def test_status_report_and_training_agree_on_the_best_of_epochs_with_equal_scores(
    tmp_path: Path, scores: tuple[float, ...]
) -> None:
    work = tmp_path / "model" / WORK_FOLDER
    write_epochs(str(work / RUN_FOLDER), *scores)
    (work / "settings.json").write_text(json.dumps({"recipe": {"training": {"epochs": 4}}}))
    best, newest = choose_best(str(work / RUN_FOLDER), report=print)
    write_metrics(str(work), newest.history)

    status = read_status(str(tmp_path / "model"))
    chart = curve_of_epochs(newest.history, "cider_d")

    assert isinstance(status, TrainingStatus) and chart
    assert status.best_epoch == best.epoch
    assert [point.epoch for line in chart.lines for point in line.points if point.is_labelled] == [best.epoch]


def truncate(location: str) -> None:
    data = storage.read_bytes(location)
    storage.write_bytes(location, data[: len(data) // 2])


def corrupt(location: str) -> None:
    data = bytearray(storage.read_bytes(location))
    data[len(data) // 2] ^= 1
    storage.write_bytes(location, bytes(data))


def recovered(run: str, *, finished_epochs: int) -> tuple[int, list[str]]:
    lines: list[str] = []
    newest = recover(run, finished_epochs=finished_epochs, report=lines.append)
    return (newest.epoch if newest else 0), lines


@pytest.mark.parametrize("name", [STATE, "history.json", CHECKSUM_FILE])
@pytest.mark.parametrize("damage", [truncate, corrupt, storage.remove])
def test_a_corrupt_checkpoint_is_named_and_the_one_before_it_is_the_newest(run: str, name: str, damage: Damage) -> None:
    folders = write_epochs(run, 0.1, 0.2, 0.3)
    damage(storage.join(folders[2], name))

    newest = newest_checkpoint(run)
    epoch, lines = recovered(run, finished_epochs=3)

    assert newest is not None
    assert newest.epoch == epoch == 2
    assert [row["cider_d"] for row in newest.history] == [0.1, 0.2]
    assert len(lines) == 1
    assert f"{folders[2]}: {name} is" in lines[0]
    assert not storage.exists(folders[2])


@pytest.mark.parametrize(
    ("checksummed", "lost"), [([], STATE), ([], "history.json"), ([STATE], "history.json")], ids=["1", "2", "3"]
)
def test_a_checkpoint_whose_checksums_do_not_include_the_lost_file_is_ignored(
    run: str, checksummed: list[str], lost: str
) -> None:
    folders = write_epochs(run, 0.1, 0.2)
    write_checksums(folders[1], checksummed)
    storage.remove(storage.join(folders[1], lost))

    epoch, lines = recovered(run, finished_epochs=2)

    assert (epoch, len(lines)) == (1, 1)


@pytest.mark.parametrize("content", [b"[]", b"{}", b"7", b"[{", b"\xff"])
def test_a_checkpoint_without_an_epoch_in_its_history_is_ignored(run: str, content: bytes) -> None:
    folders = write_epochs(run, 0.1, 0.2)
    storage.write_bytes(storage.join(folders[1], "history.json"), content)
    write_checksums(folders[1], [STATE, "history.json"])

    assert recovered(run, finished_epochs=2)[0] == 1


def test_a_snapshot_of_ray_is_removed_regardless_of_its_content(run: str) -> None:
    write_epochs(run, 0.1, 0.2)
    storage.write_bytes(storage.join(run, SNAPSHOT), b'{"checkpoint_results": [{"che')

    assert recovered(run, finished_epochs=2) == (2, [])
    assert not storage.exists(storage.join(run, SNAPSHOT))


def test_the_best_two_and_the_newest_are_kept(run: str) -> None:
    folders = write_epochs(run, 0.1, 0.5, 0.4, 0.2, 0.3)

    recovered(run, finished_epochs=5)

    assert [storage.exists(folder) for folder in folders] == [False, True, True, False, True]


def test_the_best_of_a_phase_is_found_and_kept_until_the_phase_after_it_has_begun(run: str) -> None:
    phases = (*2 * ["finetune"], *3 * ["finetune_2"])
    folders = write_epochs(run, 0.5, 0.6, 0.2, 0.3, 0.1, phases=phases)

    recovered(run, finished_epochs=5)

    best, newest = choose_best(run, phase="finetune_2", report=lambda line: None)
    assert (best.epoch, newest.epoch) == (4, 5)
    assert [storage.exists(folder) for folder in folders] == [True, True, False, True, True]
    write_checkpoint(run, [0.5, 0.6, 0.2, 0.3, 0.1, 0.2], (*phases, "self_critical"))
    recovered(run, finished_epochs=6)
    assert [storage.exists(folder) for folder in folders] == [True, True, False, False, False]


def test_the_best_survives_a_corrupt_newest(run: str) -> None:
    folders = write_epochs(run, 0.1, 0.5, 0.4, 0.3)
    truncate(storage.join(folders[3], STATE))
    lines: list[str] = []

    best, newest = choose_best(run, report=lines.append)

    assert (best.epoch, newest.epoch, lines) == (2, 3, [])


def test_a_lost_best_is_reported_and_replaced_by_the_next_best(run: str) -> None:
    folders = write_epochs(run, 0.1, 0.5, 0.4, 0.3)
    truncate(storage.join(folders[1], STATE))
    lines: list[str] = []

    best, newest = choose_best(run, report=lines.append)

    assert (best.epoch, newest.epoch) == (3, 4)
    assert len(lines) == 1
    assert "2 with CIDEr-D 0.500" in lines[0] and "epoch 3 with 0.400" in lines[0]


def test_the_later_of_two_equally_good_epochs_is_the_best(run: str) -> None:
    write_epochs(run, 0.2, 0.5, 0.5, 0.1)

    best, _ = choose_best(run, report=lambda line: None)

    assert best.epoch == 3


def test_a_training_that_ends_without_a_complete_checkpoint_reports_the_reason(run: str) -> None:
    [folder] = write_epochs(run, 0.1)
    storage.remove(storage.join(folder, STATE))

    with pytest.raises(ImcapError, match=f"no complete checkpoint: checkpoint {folder}: {STATE} is missing"):
        choose_best(run, report=lambda line: None)


def test_a_training_without_any_complete_checkpoint_stops_with_the_reason_and_a_remedy(run: str) -> None:
    folders = write_epochs(run, 0.1, 0.2)
    for folder in folders:
        truncate(storage.join(folder, STATE))

    with pytest.raises(ImcapError, match=f"2 epochs .* checkpoint {folders[1]}: {STATE} .* remove {run} to train"):
        recovered(run, finished_epochs=2)

    assert all(storage.exists(folder) for folder in folders)


def test_a_truncated_first_checkpoint_does_not_stop_the_training(run: str) -> None:
    storage.remove(storage.join(write_checkpoint(run, [0.1]), CHECKSUM_FILE))

    epoch, lines = recovered(run, finished_epochs=0)

    assert epoch == 0
    assert len(lines) == 1


def test_lost_epochs_are_reported_if_all_checkpoints_are_missing(run: str) -> None:
    epoch, lines = recovered(run, finished_epochs=7)

    assert epoch == 0
    assert len(lines) == 1 and run in lines[0]
    assert recovered(run, finished_epochs=0) == (0, [])


def test_a_file_that_cannot_be_read_does_not_count_as_corrupt(tmp_path: Path) -> None:
    folder = Path(write_checkpoint(str(tmp_path), [0.1]))
    (folder / STATE).unlink()
    (folder / STATE).mkdir()

    with pytest.raises(ImcapError, match=f"cannot read {folder / STATE}: "):
        newest_checkpoint(str(tmp_path))
