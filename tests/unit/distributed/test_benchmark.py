"""Rates of a run, the limit of a machine, and images for benchmarks."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from imcap_ray.data.synthetic_images import write_photographs, write_table
from imcap_ray.distributed.benchmark import Comparison, Limit, Rate, RunSpeed, measure_run, some_files, steady_rate
from imcap_ray.errors import ImcapError, InputError
from imcap_ray.models.captioner_spec import CaptionerSpec
from tests.small_data import jpeg, write_model_folder

pytestmark = pytest.mark.unit


def make_limit(*, on_gpu: bool) -> Limit:
    return Limit(decode=Rate((300.0,)), model=Rate((90.0, 100.0, 130.0)), model_batch_size=16, on_gpu=on_gpu)


def test_on_shared_cores_the_limit_is_the_sum_of_both_times() -> None:
    assert make_limit(on_gpu=False).images_per_second == pytest.approx(1 / (1 / 300 + 1 / 100))


def test_on_separate_processors_the_limit_is_the_slower_stage() -> None:
    assert make_limit(on_gpu=True).images_per_second == 100


def test_the_steady_rate_excludes_the_start_and_the_end() -> None:
    timeline = [(10 + done / 50, done) for done in range(0, 1000, 25)]  # 50 a second after ten seconds
    timeline += [(60.0, 1000)]  # the last ones come late
    assert steady_rate(timeline) == pytest.approx(50)


@pytest.mark.parametrize(
    "timeline", [[], [(3.0, 100)], [(3.0, 50), (4.0, 100)], [(s, 32) for s in range(9)] + [(9, 64)]]
)
def test_a_short_run_has_no_steady_rate(timeline: list[tuple[float, int]]) -> None:
    assert steady_rate(timeline) is None


def test_the_table_shows_the_share_of_the_limit_that_was_reached() -> None:
    run = RunSpeed(
        num_images=1000,
        seconds=20.0,
        first_seconds=8.0,
        steady=60.0,
        cpu_seconds={},
        peak_bytes={},
        spilled_bytes=0,
        bound="model-bound",
    )
    comparison = Comparison(limit=make_limit(on_gpu=False), run=run)
    assert comparison.share_of_limit == pytest.approx(0.8)
    text = "\n".join(comparison.lines())
    assert "0.80 of the limit" in text and "1,000 images in 20 s" in text and text.endswith("model-bound")
    assert comparison.to_dict()["run"]["images_per_second"] == 50


def test_a_run_too_short_for_a_steady_rate_is_reported_as_such() -> None:
    run = RunSpeed(
        num_images=64,
        seconds=9.0,
        first_seconds=8.0,
        steady=None,
        cpu_seconds={},
        peak_bytes={},
        spilled_bytes=0,
        bound="model-bound",
    )
    comparison = Comparison(limit=make_limit(on_gpu=True), run=run)
    assert comparison.to_dict()["share_of_limit"] is None
    assert "too short" in "\n".join(comparison.lines())


def test_generated_photographs_are_distinct_jpegs_of_the_given_size(tmp_path: Path) -> None:
    write_photographs(str(tmp_path / "files"), 20, (50, 40))
    files = sorted((tmp_path / "files").rglob("*.jpg"))
    assert len({hashlib.sha256(file.read_bytes()).digest() for file in files}) == 20
    with Image.open(files[0]) as image:
        assert (image.format, image.size) == ("JPEG", (50, 40))
        pixels = np.asarray(image, dtype=float)
    # As in a photograph, neighbours are alike.
    assert np.abs(np.diff(pixels, axis=1)).mean() < 0.7 * pixels.std()  # 1.1 in white noise


def test_a_table_of_generated_photographs_contains_the_same_bytes(tmp_path: Path) -> None:
    write_photographs(str(tmp_path / "files"), 5, (20, 20))
    write_table(str(tmp_path / "files"), str(tmp_path / "table.parquet"), rows_per_group=2)
    rows = pq.read_table(tmp_path / "table.parquet").to_pylist()
    assert [row["image"] for row in rows] == [file.read_bytes() for file in sorted((tmp_path / "files").rglob("*.jpg"))]


def test_a_sample_of_files_is_evenly_spaced_and_skips_corrupt_ones(tmp_path: Path) -> None:
    small, large = tmp_path / "files" / "a", tmp_path / "files" / "b"
    write_photographs(str(small), 4, (20, 20))
    write_photographs(str(large), 4, (90, 90))
    next(large.rglob("*.jpg")).write_bytes(b"no image")
    write_table(str(tmp_path / "files"), str(tmp_path / "table.parquet"))
    for source in ("files", "table.parquet"):
        sizes = [Image.open(io.BytesIO(data)).size for data in some_files(str(tmp_path / source), 8)]
        assert sorted(sizes) == [(20, 20)] * 4 + [(90, 90)] * 3
        assert {Image.open(io.BytesIO(data)).size for data in some_files(str(tmp_path / source), 4)} == set(sizes)


def test_a_folder_without_a_readable_image_cannot_be_benchmarked(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        some_files(str(tmp_path), 3)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(InputError, match="none of 1 of its 1 images can be read"):
        some_files(str(tmp_path), 3)


def test_a_measured_run_has_the_precision_of_its_captioner(tmp_path):
    model, images = tmp_path / "model", tmp_path / "images"
    write_model_folder(model)
    images.mkdir()
    (images / "1.jpg").write_bytes(jpeg(1))
    spec = CaptionerSpec(models=(str(model),), precision="int8")
    with pytest.raises(ImcapError, match="int8"):
        measure_run(str(images), str(tmp_path / "captions"), spec=spec)
