"""Files of a captioning run, without Ray: the test writes the rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from imcap_ray import storage
from imcap_ray.config import CaptioningConfig, SearchConfig
from imcap_ray.data.parquet_files import read_table, write_table
from imcap_ray.data.schemas import CAPTIONS_SCHEMA
from imcap_ray.errors import ConfigError, FailureBudgetError, ImcapError, InputError, OutputError
from imcap_ray.runs.captioning_run import CaptioningRun, CaptioningSummary, run_identity
from imcap_ray.runs.captions_table import open_captions, read_removed_ids
from imcap_ray.runs.lease import Lease
from imcap_ray.runs.progress_reporter import ProgressReporter
from tests.small_data import jpeg
from tests.unit.runs.test_captions_folder import RUN, row


class Clock:
    def __init__(self) -> None:
        self.now = 5000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def config(tmp_path: Path) -> CaptioningConfig:
    for number in range(4):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{number}.jpg").write_bytes(jpeg(number))
    return CaptioningConfig(input=str(tmp_path / "in"), output=str(tmp_path / "out"))


def open_run(config: CaptioningConfig, *, fingerprint: str = "a", reporter: ProgressReporter | None = None) -> Any:
    identity = run_identity(config.input, fingerprint=fingerprint, search=SearchConfig())
    return CaptioningRun.open(config, identity, reporter=reporter or ProgressReporter(None))


def write_rows(run: CaptioningRun, **settings: Any) -> None:
    """Caption the pending images."""
    entries = [row for part in storage.list_work_tables(run.folder.manifest) for row in read_table(part).to_pylist()]
    done = set(run.folder.done_ids().tolist())
    left = [entry for entry in entries if entry["manifest_id"] not in done]
    name = f"{RUN}_{len(run.folder.parts()):06}.parquet"
    rows = [row(entry["image_id"], **settings) for entry in left]
    write_table(storage.join(run.folder.location, name), pa.Table.from_pylist(rows, schema=CAPTIONS_SCHEMA))
    ids = pa.table({"manifest_id": pa.array([entry["manifest_id"] for entry in left], pa.int64())})
    write_table(storage.join(run.folder.done, name.removesuffix(".parquet")), ids)


def caption(config: CaptioningConfig, **settings: Any) -> CaptioningSummary:
    with open_run(config, **settings) as run:
        run.list_images()
        while run.num_pending:
            write_rows(run)
            run.resolve_duplicates()
        return run.finish("by nothing")


def record(config: CaptioningConfig) -> dict[str, Any]:
    run: dict[str, Any] = json.loads((Path(config.output) / "_imcap" / "run.json").read_text())
    return run


def test_a_run_lists_captions_and_ends_complete(config: CaptioningConfig) -> None:
    summary = caption(config)

    assert (summary.num_images, summary.num_new, summary.counts) == (4, 4, {"ok": 4})
    assert (record(config)["state"], record(config)["num_images"]) == ("complete", 4)
    assert caption(config).num_new == 0


def test_the_speed_leaves_out_the_start_and_a_short_run_keeps_that_of_the_last_long_one(
    config: CaptioningConfig,
) -> None:
    def caption_in(seconds: int, *, num_images: int) -> CaptioningSummary:
        clock = Clock()
        with open_run(config, reporter=ProgressReporter(None, clock=clock)) as run:
            run.list_images()
            clock.now += 60  # Ray starts
            for second in range(seconds):
                clock.now += 1
                run.report_progress(num_images * (second + 1) // seconds)
            write_rows(run)
            run.resolve_duplicates()
            return run.finish("by nothing")

    short = caption_in(5, num_images=4)
    assert (short.images_per_second, record(config)["images_per_second"]) == (None, None)
    for number in range(200):
        (Path(config.input) / f"more{number}.jpg").write_bytes(jpeg(number % 7) + bytes([number]))
    long = caption_in(20, num_images=200)
    assert long.images_per_second == pytest.approx(10)
    (Path(config.input) / "last.jpg").write_bytes(jpeg(9))

    assert caption_in(5, num_images=1).images_per_second is None
    assert record(config)["images_per_second"] == pytest.approx(10)


def test_images_that_are_new_or_have_changed_are_pending_again(config: CaptioningConfig) -> None:
    caption(config)
    (Path(config.input) / "0.jpg").write_bytes(jpeg(7) + b" ")
    (Path(config.input) / "new.jpg").write_bytes(jpeg(8))

    with open_run(config) as run:
        run.list_images()

        assert (run.num_images, run.num_done, run.num_pending, run.num_new) == (5, 3, 2, 2)


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (ImcapError("planted"), "failed"),
        (OSError("the disk is full"), "failed"),
        (KeyboardInterrupt(), "interrupted"),
        (RuntimeError("a bug"), "interrupted"),
    ],
)
def test_how_a_run_ended_is_recorded(config: CaptioningConfig, error: BaseException, state: str) -> None:
    with pytest.raises(type(error)), open_run(config) as run:
        run.list_images()
        assert record(config)["state"] == "running"
        raise error

    assert record(config)["state"] == state


def test_an_input_without_images_creates_no_output(config: CaptioningConfig, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    empty = CaptioningConfig(input=str(tmp_path / "empty"), output=config.output)

    with pytest.raises(InputError, match="no images"):
        caption(empty)

    assert not Path(config.output).exists()


def test_another_model_is_refused_and_overwriting_replaces_the_rows_at_the_end(config: CaptioningConfig) -> None:
    caption(config)
    with pytest.raises(OutputError, match="another model"):
        caption(config, fingerprint="b")

    overwriting = CaptioningConfig(input=config.input, output=config.output, overwrite=True)
    with open_run(overwriting, fingerprint="b") as run:
        run.list_images()
        assert record(config)["model_fingerprint"] == "a"
        write_rows(run)
        run.resolve_duplicates()
        run.finish("by nothing")

    assert (record(config)["model_fingerprint"], record(config)["state"]) == ("b", "complete")


def test_a_run_that_lost_its_lease_writes_no_more(config: CaptioningConfig) -> None:
    with pytest.raises(ImcapError, match="another run"), open_run(config) as run:
        run.list_images()
        Lease.acquire(run.folder.work)
        before = record(config)
        run.resolve_duplicates()

    assert record(config) == before


def test_the_heartbeat_has_the_speed_and_wait_reason_and_stops_with_the_lease(
    config: CaptioningConfig,
) -> None:
    clock = Clock()
    with pytest.raises(ImcapError), open_run(config, reporter=ProgressReporter(None, clock=clock)) as run:
        started = run.folder.read_heartbeat()
        assert (started["images_per_second"], started["last_image"], started["waiting"]) == (None, "", "")
        for second in range(20):
            clock.now += 1
            run.report_progress(5 * second)
        run.report_waiting("")
        working = run.folder.read_heartbeat()
        run.report_waiting("waiting: no CPU")
        waiting = run.folder.read_heartbeat()
        Lease.acquire(run.folder.work)
        run.report_waiting("")
        last = run.folder.read_heartbeat()
        run.lease.require()

    assert working["images_per_second"] == pytest.approx(5.0)
    assert working["last_image"]
    assert (waiting["images_per_second"], waiting["waiting"]) == (None, "waiting: no CPU")
    assert last == waiting


def test_more_failures_than_the_budget_are_an_error(config: CaptioningConfig) -> None:
    with open_run(config) as run:
        run.list_images()
        write_rows(run, status="failed")
        run.resolve_duplicates()
        summary = run.finish("by nothing")

    summary.require_few_failures(1.0)
    with pytest.raises(FailureBudgetError, match="4 of 4 images failed.*4 internal"):
        summary.require_few_failures(0.9)


def test_images_of_unsupported_formats_count_as_failures(config: CaptioningConfig) -> None:
    summary = replace(caption(config), counts={"ok": 2, "failed": 2}, error_counts={"unsupported_format": 2})

    summary.require_few_failures(0.5)
    with pytest.raises(FailureBudgetError, match="2 of 4 images failed.* 2 unsupported_format"):
        summary.require_few_failures(0.4)


def test_files_that_are_not_images_are_reported_by_their_extensions(config: CaptioningConfig) -> None:
    for name in ("notes.txt", "more.TXT", "film.mov"):
        Path(config.input, name).write_text("no image")

    assert caption(config).ignored == {".txt": 2, ".mov": 1}
    assert record(config)["ignored"] == {".txt": 2, ".mov": 1}


# ---- images that the input no longer has


def image_ids(config: CaptioningConfig) -> dict[str, str]:
    """Return the images that have a row, and of which one each is a duplicate."""
    rows = open_captions(config.output).to_table(["image_id", "duplicate_of"]).to_pylist()
    assert len({row["image_id"] for row in rows}) == len(rows)
    return {row["image_id"]: row["duplicate_of"] for row in rows}


def test_rows_of_images_that_left_the_input_are_kept_and_reported(config: CaptioningConfig) -> None:
    lines: list[str] = []
    caption(config)
    for name in "13":
        (Path(config.input) / f"{name}.jpg").rename(Path(config.output).parent / f"{name}.jpg")

    summary = caption(config, reporter=ProgressReporter(lines.append))

    kept = f"2 images are no longer in {config.input}: the rows are kept and left out of exports; --prune removes them"
    assert kept in lines
    assert (summary.num_images, summary.num_not_in_input) == (4, 2)
    assert read_removed_ids(config.output).to_pylist() == ["1.jpg", "3.jpg"]

    (Path(config.output).parent / "1.jpg").rename(Path(config.input) / "1.jpg")
    assert caption(config).num_not_in_input == 1
    assert read_removed_ids(config.output).to_pylist() == ["3.jpg"]

    caption(replace(config, overwrite=True))
    assert set(image_ids(config)) == {"0.jpg", "1.jpg", "2.jpg"}
    assert read_removed_ids(config.output).to_pylist() == []


def test_prune_removes_the_rows_of_images_that_left_the_input(config: CaptioningConfig) -> None:
    lines: list[str] = []
    caption(config)
    for name in "13":
        (Path(config.input) / f"{name}.jpg").unlink()
    caption(config)
    (Path(config.input) / "4.jpg").write_bytes(jpeg(4))

    summary = caption(replace(config, prune=True), reporter=ProgressReporter(lines.append))

    assert f"2 images are no longer in {config.input}: their rows are removed" in lines
    assert (summary.num_images, summary.num_new, summary.num_not_in_input) == (3, 1, 0)
    assert set(image_ids(config)) == {"0.jpg", "2.jpg", "4.jpg"}
    assert read_removed_ids(config.output).to_pylist() == []
    (Path(config.input) / "1.jpg").write_bytes(jpeg(1))  # its number must not be one that another image has
    (Path(config.input) / "2.jpg").write_bytes(jpeg(9) + b" ")
    assert caption(config).num_new == 2
    assert set(image_ids(config)) == {"0.jpg", "1.jpg", "2.jpg", "4.jpg"}


def test_duplicates_of_a_pruned_image_get_another_original(config: CaptioningConfig) -> None:
    with open_run(config) as run:
        run.list_images()
        write_rows(run, content="x")
        run.resolve_duplicates()
        run.finish("by nothing")
    assert image_ids(config) == {"0.jpg": "", "1.jpg": "0.jpg", "2.jpg": "0.jpg", "3.jpg": "0.jpg"}
    (Path(config.input) / "0.jpg").unlink()

    caption(replace(config, prune=True))

    assert image_ids(config) == {"1.jpg": "", "2.jpg": "1.jpg", "3.jpg": "1.jpg"}


@pytest.mark.parametrize("step", range(4))
def test_a_kill_while_rows_are_pruned_is_undone_by_the_same_command(
    config: CaptioningConfig, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    caption(config)
    (Path(config.input) / "1.jpg").unlink()
    (Path(config.input) / "new.jpg").write_bytes(jpeg(7))
    caption(config)
    calls = iter(range(100))

    def killed(location: str, table: pa.Table) -> None:
        if next(calls) == step:
            raise KeyboardInterrupt
        write_table(location, table)

    monkeypatch.setattr("imcap_ray.runs.captions_folder.write_table", killed)
    with pytest.raises(KeyboardInterrupt):
        caption(replace(config, prune=True))
    monkeypatch.undo()

    caption(replace(config, prune=True))
    assert set(image_ids(config)) == {"0.jpg", "2.jpg", "3.jpg", "new.jpg"}


def test_a_limit_removes_no_image_from_the_input(config: CaptioningConfig) -> None:
    caption(config)

    assert caption(replace(config, limit=2)).num_not_in_input == 0
    assert caption(replace(config, limit=9)).num_not_in_input == 0
    with pytest.raises(ConfigError, match="--prune cannot be given with --limit, which leaves images out"):
        replace(config, limit=2, prune=True)
