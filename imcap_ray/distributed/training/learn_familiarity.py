"""The features of a trained model's CNN -> how familiar images are to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from imcap_ray import storage
from imcap_ray.data.datasets import TRAIN, VALIDATION
from imcap_ray.data.parquet_files import open_parquet
from imcap_ray.distributed.cluster.connection import ClusterResources
from imcap_ray.distributed.features import FeatureCache, Views, cache_features
from imcap_ray.distributed.training.training_inputs import feature_encoding, readable_images
from imcap_ray.distributed.training.training_plan import PreparedTraining
from imcap_ray.models.encoders import Encoder
from imcap_ray.models.familiarity import MIN_IMAGES, Familiarity, Floats
from imcap_ray.models.outliers import MAX_UNFAMILIAR, compare_with, find_outliers, share_unfamiliar
from imcap_ray.runs.feature_folder import FeatureFolder
from imcap_ray.runs.progress_reporter import ProgressReporter

_MOST: Final = 0.5
"""Share of the training images; if more are unfamiliar to the model that a training starts from, it says so."""

MAX_IMAGES = 4096
"""Images of a split whose features are used: with more, the subspace hardly changes."""


def learn_familiarity(
    prepared: PreparedTraining,
    caches: dict[str, FeatureCache],
    encoder: Encoder,
    *,
    cluster: ClusterResources,
    reporter: ProgressReporter,
    check: Callable[[], None],
) -> Familiarity | None:
    """Learn from the training images, and calibrate on the validation images; None if they are too few.

    Args:
        encoder: the trained model's.
        check: raises if this training may not write any more.
    """
    images = {split: readable_images(prepared.data, split, caches[split]) for split in (TRAIN, VALIDATION)}
    if min(rows.num_rows for rows in images.values()) < MIN_IMAGES:
        return None
    images = {split: _choose(rows) for split, rows in images.items()}
    if encoder is not prepared.encoder or not caches[VALIDATION].shape[0]:
        folder = storage.join(prepared.work, "familiarity")
        storage.remove(folder)  # left by a training that was killed, perhaps with other weights
        caches = {
            split: cache_features(
                prepared.data.manifest(rows),
                FeatureFolder(storage.join(folder, split)),
                feature_encoding(prepared, encoder, Views(), cluster, is_pooled=True),
                reporter=reporter,
                task=f"familiarity, {split} split",
                check=check,
            )
            for split, rows in images.items()
        }
    features = {split: _pool_features(caches[split], rows["image_id"]) for split, rows in images.items()}
    storage.remove(storage.join(prepared.work, "familiarity"))
    return Familiarity.fit(features[TRAIN], features[VALIDATION])


def describe_images(prepared: PreparedTraining, caches: dict[str, FeatureCache]) -> Iterator[str]:
    """Lines about images that are unlike others: the validation images, outliers, all of them for the start model.

    Nothing if the features of the images are not cached.
    """
    if not caches[TRAIN].shape[0]:
        return
    images = {split: _choose(readable_images(prepared.data, split, caches[split])) for split in (TRAIN, VALIDATION)}
    features = {split: _pool_features(caches[split], images[split]["image_id"]) for split in images}
    if num_outliers := len(find_outliers(features[TRAIN])):
        yield (
            f"{num_outliers:,} of {len(features[TRAIN]):,} training images are unlike the others: "
            "`imcap check DATA --outliers` names them"
        )
    share = share_unfamiliar(compare_with(features[TRAIN], features[VALIDATION]))
    if share > MAX_UNFAMILIAR:
        yield f"{share:.0%} of the validation images are unlike the training images: scores will be low"
    start_model = prepared.start_model
    if start_model is not None and start_model.familiarity is not None:
        share = share_unfamiliar(start_model.familiarity.of(features[TRAIN]))
        if share >= _MOST:
            yield (
                f"{share:.0%} of the training images are unlike those that {start_model.location} was trained on: "
                "training without --start-from may give a better model"
            )


def _choose(images: pa.Table) -> pa.Table:
    """At most `MAX_IMAGES` of the images, evenly spread."""
    num_chosen = min(MAX_IMAGES, images.num_rows)
    return images.take(pa.array(np.arange(num_chosen) * images.num_rows // num_chosen))


def _pool_features(cache: FeatureCache, image_ids: pa.ChunkedArray) -> Floats:
    """The mean (N, F) over all regions of the original view of each of these images, in the order of their names."""
    pooled = {}
    for file in cache.files():
        with open_parquet(file) as part:
            for batch in part.iter_batches(batch_size=64, columns=["image_id", "features", "error_code"]):
                is_wanted = pc.and_(pc.is_in(batch["image_id"], image_ids), pc.equal(batch["error_code"], ""))
                for row in batch.filter(is_wanted).to_pylist():
                    features = np.frombuffer(row["features"], np.float16).reshape(cache.shape)
                    pooled[row["image_id"]] = features[0].mean(0, dtype=np.float32)
    if not pooled:
        return np.zeros((0, cache.shape[-1]), np.float32)
    return np.stack([pooled[image_id] for image_id in sorted(pooled)])
