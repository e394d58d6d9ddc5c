"""Cached features contain each image once, even if files are corrupted or lost."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from imcap_ray.config import EncoderConfig, PreprocessingConfig
from imcap_ray.data.datasets import DATASET_SCHEMA, CaptionedImages
from imcap_ray.distributed.cluster.connection import ClusterResources
from imcap_ray.distributed.features import FeatureCache, FeatureEncoding, Views, cache_features
from imcap_ray.models.encoders import Encoder, build_encoder, resolve_preprocessing
from imcap_ray.runs.feature_folder import FeatureFolder
from imcap_ray.runs.progress_reporter import ProgressReporter
from tests import small_data

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

NUM_IMAGES = 160


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    folder = tmp_path_factory.mktemp("images")
    rows = []
    for number in range(NUM_IMAGES):
        place = folder / f"{number:03}.jpg"
        place.write_bytes(small_data.jpeg(number))
        rows.append({"image_id": place.name, "image_path": str(place), "captions": ["a dog"], "split": "train"})
    table = pa.Table.from_pylist(rows, schema=DATASET_SCHEMA)
    return CaptionedImages(str(folder), "", table).manifest(table)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    config = EncoderConfig(name="timm:test_efficientnet")
    torch.manual_seed(0)
    return build_encoder(config, resolve_preprocessing(config, PreprocessingConfig(image_size=32)), load_weights=False)


class RecordingReporter(ProgressReporter):
    """Records how many images were reported as encoded."""

    def __init__(self) -> None:
        super().__init__(None)
        self.encoded: list[int] = []

    def report_images(self, done: int, total: int, task: str = "") -> None:
        self.encoded.append(done)


def features_by_image(cache: FeatureCache) -> dict[str, bytes]:
    rows = [row for file in cache.files() for row in pq.read_table(file).to_pylist()]
    assert len(rows) == len({row["image_id"] for row in rows}) == NUM_IMAGES
    return {row["image_id"]: row["features"] for row in rows}


def test_only_corrupt_files_are_recomputed(
    local_ray: ClusterResources, manifest: pa.Table, encoder: Encoder, tmp_path: Path
) -> None:
    folder = tmp_path / "features"
    reporter = RecordingReporter()
    encoded = reporter.encoded

    def cache() -> FeatureCache:
        encoding = FeatureEncoding(encoder=encoder, views=Views(), num_actors=1, gpus_per_actor=0.0)
        return cache_features(manifest, FeatureFolder(str(folder)), encoding, reporter=reporter)

    first = features_by_image(cache())
    changed, deleted, *_ = sorted(folder.glob("*.parquet"))
    in_others = NUM_IMAGES - sum(pq.read_metadata(file).num_rows for file in (changed, deleted))

    content = bytearray(changed.read_bytes())
    content[len(content) // 3] ^= 1  # in a column of data: the file can be read as before
    changed.write_bytes(content)
    deleted.unlink()
    encoded.clear()
    repaired = cache()

    assert features_by_image(repaired) == first
    assert max(encoded) == NUM_IMAGES - in_others
    assert repaired.notes == [
        f"{changed} is not what was written: its images are encoded again",
        f"{deleted} is missing: its images are encoded again",
    ]

    # Without the seal nothing is known of the files but what they say themselves.
    shutil.rmtree(folder / "_imcap")
    encoded.clear()
    assert features_by_image(cache()) == first
    assert not encoded

    shutil.rmtree(folder / "_imcap")
    cut = min(folder.glob("*.parquet"))
    in_cut = pq.read_metadata(cut).num_rows
    os.truncate(cut, cut.stat().st_size // 2)
    assert features_by_image(cache()) == first
    assert max(encoded) == in_cut
