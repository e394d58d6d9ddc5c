from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imcap_ray.config import Recipe, ResourcesConfig, TrainingRunConfig
from imcap_ray.distributed.cluster.connection import ClusterResources
from imcap_ray.distributed.features import FEATURES_SCHEMA, FeatureCache
from imcap_ray.distributed.training.trainer import _Training
from imcap_ray.distributed.training.training_plan import load_data, prepare_training
from imcap_ray.models.familiarity import Familiarity
from imcap_ray.runs.progress_reporter import ProgressReporter
from tests import small_data

CLUSTER = ClusterResources(is_local=True, cpus=2, gpus=0, nodes=1, physical_cores=2)


def write_cache(folder: Path, image_ids: list[str], features: np.ndarray) -> FeatureCache:
    """Write a feature cache with one view of each image and one region."""
    rows = [
        {"image_id": image_id, "features": image.astype(np.float16).tobytes(), "error_code": ""}
        for image_id, image in zip(image_ids, features, strict=True)
    ]
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows, FEATURES_SCHEMA), folder / "part.parquet")
    return FeatureCache(str(folder), (1, 1, features.shape[1]), len(image_ids), [], parts=["part.parquet"])


@pytest.mark.parametrize("is_familiar", [True, False])
def test_a_training_reports_if_most_images_are_unfamiliar_to_the_model_that_it_starts_from(
    tmp_path: Path, is_familiar: bool
) -> None:
    kind = 0 if is_familiar else 1
    familiarity = Familiarity.fit(
        small_data.features_of(60, seed=1, kind=kind), small_data.features_of(60, seed=2, kind=kind)
    )
    start = str(small_data.write_model_folder(tmp_path / "start", familiarity=familiarity))
    data = small_data.write_flickr8k(tmp_path / "flickr8k", num_train=40, num_validation=20)
    config = TrainingRunConfig(data=str(data), model=str(tmp_path / "model"), recipe=Recipe(), start_from=(start,))
    prepared = prepare_training(config, ResourcesConfig(), data=load_data(config), cluster=CLUSTER)
    caches = {}
    for split in ("train", "validation"):
        image_ids = prepared.data.split(split)["image_id"].to_pylist()
        caches[split] = write_cache(tmp_path / split, image_ids, small_data.features_of(len(image_ids), seed=3, kind=0))
    lines: list[str] = []

    _Training.begin(prepared, CLUSTER, ProgressReporter(lines.append)).write_inputs(caches)

    advice = [line for line in lines if "--start-from" in line]
    expected = (
        f"100% of the training images are unlike those that {start} was trained on: "
        "training without --start-from may give a better model"
    )
    assert advice == ([] if is_familiar else [expected])
