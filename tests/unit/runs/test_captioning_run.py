"""Files of a captioning run, without Ray: the test writes the rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from imcap_ray import storage
from imcap_ray.config import CaptioningConfig, SearchConfig
from imcap_ray.data.parquet_files import read_table, write_table
from imcap_ray.data.schemas import CAPTIONS_SCHEMA
from imcap_ray.errors import FailureBudgetError, ImcapError, InputError, OutputError
from imcap_ray.runs.captioning_run import CaptioningRun, CaptioningSummary, run_identity
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
    entries = [row for part in storage.list_parquet(run.folder.manifest) for row in read_table(part).to_pylist()]
    done = set(run.folder.done_ids().tolist())
    left = [entry for entry in entries if entry["manifest_id"] not in done]
    name = f"{RUN}_{len(run.folder.parts()):06}.parquet"
    rows = [row(entry["image_id"], **settings) for entry in left]
    write_table(storage.join(run.folder.location, name), pa.Table.from_pylist(rows, schema=CAPTIONS_SCHEMA))
    ids = pa.table({"manifest_id": pa.array([entry["manifest_id"] for entry in left], pa.int64())})
    write_table(storage.join(run.folder.done, name), ids)


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
    again = caption(config)
    assert (again.num_new, again.images_per_second) == (0, summary.images_per_second)


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
