"""Captioners from outside the package in the pipeline: one row for every image, whatever they return."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.dataset as pads
import pytest
from PIL import Image

from imcap_ray.config import CaptioningConfig, ResourcesConfig
from imcap_ray.data.image_decoding import decode_prepared
from imcap_ray.distributed.captioning import caption_images
from imcap_ray.distributed.cluster.connection import ClusterResources
from imcap_ray.errors import ClusterError, ImcapError, OutputError
from imcap_ray.models.captioner_spec import CaptionerSpec
from imcap_ray.runs.captioning_run import CaptioningSummary
from imcap_ray.runs.progress_reporter import ProgressReporter
from tests.fakes import echo
from tests.plugins import Echo
from tests.small_data import jpeg

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:ray.*"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """39 photographs, and a red one."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for number in range(39):
        (folder / f"{number:02}.jpg").write_bytes(jpeg(number))
    Image.new("RGB", (40, 40), (255, 0, 0)).save(folder / "red.png")
    return folder


def run(
    cluster: ClusterResources, input: Path, output: Path, name: str, *options: tuple[str, str], **settings: Any
) -> CaptioningSummary:
    config = CaptioningConfig(
        input=str(input),
        output=str(output),
        models=(name,),
        model_options=options,
        **{"max_failure_rate": 1.0, **settings},
    )
    return caption_images(
        config,
        ResourcesConfig(num_actors=2),
        cluster=cluster,
        load_captioner=CaptionerSpec.of(config),
        reporter=ProgressReporter(None),
    )


def read(output: Path) -> dict[str, dict[str, Any]]:
    rows = pads.dataset([str(path) for path in output.glob("*.parquet")]).to_table().to_pylist()
    assert len({row["image_id"] for row in rows}) == len(rows)
    return {row["image_id"]: row for row in rows}


def test_a_captioner_gets_the_images_that_it_prepares(
    local_ray: ClusterResources, photographs: Path, tmp_path: Path
) -> None:
    summary = run(local_ray, photographs, tmp_path / "out", "tests.plugins:Echo", ("size", "48"), num_captions=2)

    assert summary.counts == {"ok": 40}
    rows = read(tmp_path / "out")
    for image_id in ("07.jpg", "red.png"):
        pixels = decode_prepared((photographs / image_id).read_bytes(), prepare=Echo("48").prepare).pixels
        assert rows[image_id]["captions"] == [f"{echo(pixels)} 0", f"{echo(pixels)} 1"]
    assert {str(row["confidence"]) for row in rows.values()} == {"nan"}
    record = json.loads((tmp_path / "out" / "_imcap" / "run.json").read_text())
    assert (record["model"], record["model_options"]) == ("tests.plugins:Echo", {"size": "48"})


@pytest.mark.parametrize("fault", ["raises", "too few", "not text"])
def test_an_image_that_a_captioner_fails_on_is_a_row_with_an_error(
    local_ray: ClusterResources, photographs: Path, tmp_path: Path, fault: str
) -> None:
    summary = run(local_ray, photographs, tmp_path / "out", "tests.plugins:Faulty", ("fault", fault))

    assert summary.counts == {"ok": 39, "failed": 1}
    assert read(tmp_path / "out")["red.png"]["error_code"] == "internal"


def test_an_image_on_which_a_captioner_never_returns_is_a_row_with_an_error(
    local_ray: ClusterResources, photographs: Path, tmp_path: Path
) -> None:
    endless = ("fault", "never returns")

    summary = run(local_ray, photographs, tmp_path / "out", "tests.plugins:Faulty", endless, batch_timeout=2.0)

    assert summary.counts == {"ok": 39, "failed": 1}
    assert summary.error_counts == {"timeout": 1}
    assert read(tmp_path / "out")["red.png"]["error_message"] == "captioning took longer than 2 s, even alone"


def test_a_run_with_other_options_is_refused_like_another_model(
    local_ray: ClusterResources, photographs: Path, tmp_path: Path
) -> None:
    run(local_ray, photographs, tmp_path / "out", "tests.plugins:Echo", ("size", "48"), limit=2)

    with pytest.raises(OutputError, match="another model"):
        run(local_ray, photographs, tmp_path / "out", "tests.plugins:Echo", ("size", "32"), limit=2)
    with pytest.raises(OutputError, match="another search settings"):
        run(local_ray, photographs, tmp_path / "out", "tests.plugins:Echo", ("size", "48"), num_captions=2)

    assert run(local_ray, photographs, tmp_path / "out", "tests.plugins:Echo", ("size", "48"), limit=3).num_new == 1


def test_a_captioner_that_cannot_load_its_weights_stops_the_run_in_one_line(
    local_ray: ClusterResources, photographs: Path, tmp_path: Path
) -> None:
    with pytest.raises(ImcapError, match=r"stopped by an error: tests.plugins:Unloadable: load.*weights.bin; what is"):
        run(local_ray, photographs, tmp_path / "out", "tests.plugins:Unloadable")


def test_a_captioner_that_needs_more_memory_than_there_is_is_refused(
    local_ray: ClusterResources, photographs: Path, tmp_path: Path
) -> None:
    with pytest.raises(ClusterError, match=r"needs 931322.6 GiB of memory in each process, this machine has"):
        run(local_ray, photographs, tmp_path / "out", "tests.plugins:TooGreedy")

    assert not (tmp_path / "out").exists()
