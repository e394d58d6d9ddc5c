"""A training's data set -> cached features, tables of readable images, and the datasets that its workers read."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import pyarrow as pa
import ray

from imcap_ray import storage
from imcap_ray.data.datasets import TRAIN, VALIDATION, CaptionedImages
from imcap_ray.data.image_decoding import SquarePixels
from imcap_ray.data.image_reading import root_of
from imcap_ray.data.manifest import read_image_columns
from imcap_ray.data.parquet_files import write_table
from imcap_ray.distributed.cluster.connection import ClusterResources
from imcap_ray.distributed.features import FeatureCache, FeatureEncoding, Views, cache_features, cache_key
from imcap_ray.distributed.pipeline.failure_log import describe_failures
from imcap_ray.distributed.pipeline.image_loading import LoadImages
from imcap_ray.distributed.pipeline.image_pipeline import default_num_actors, read_images
from imcap_ray.distributed.training.training_plan import PreparedTraining
from imcap_ray.errors import ImcapError
from imcap_ray.models.encoders import Encoder
from imcap_ray.runs.feature_folder import FeatureFolder
from imcap_ray.runs.progress_reporter import ProgressReporter
from imcap_ray.runs.training_run import VALIDATION_ADVICE, History, read_validation_ids, write_validation_ids

MAX_GPUS_PER_ENCODER = 1.0
"""A CNN runs on one GPU, however many a worker has."""


@dataclass(frozen=True, slots=True)
class ReadableImages:
    """A table of the images of a split that can be read."""

    folder: str
    """Folder of the manifest."""
    root: str
    num_images: int


Inputs: TypeAlias = FeatureCache | ReadableImages
"""What a phase reads of a split: features, or photographs."""


def views_of(prepared: PreparedTraining, split: str) -> Views:
    """The views of an image whose features are cached."""
    settings = prepared.recipe.training
    if not settings.epochs:  # the other phases read photographs
        return Views(original=False)
    if split != TRAIN:
        return Views()
    return Views(flip=settings.flip, crops=settings.crops, min_crop_area=settings.min_crop_area)


def feature_folder(prepared: PreparedTraining, split: str) -> FeatureFolder:
    """This training's use of the folder for the features of a split. Every CNN and set of images has its own folder."""
    data, model = prepared.data, prepared.model
    key = cache_key(
        data.split(split)["image_id"],
        location=data.location,
        encoder=prepared.recipe.encoder,
        weights=prepared.encoder.weights,
        preprocessing=prepared.recipe.preprocessing,
        views=views_of(prepared, split),
        image_columns=data.image_columns,
    )
    training = model if storage.is_uri(model) else f"{socket.gethostname()}:{model}"
    return FeatureFolder(storage.join(prepared.features, key), training)


def cache_split(
    prepared: PreparedTraining,
    split: str,
    folder: FeatureFolder,
    *,
    cluster: ClusterResources,
    reporter: ProgressReporter,
    check: Callable[[], None],
) -> FeatureCache:
    """Compute the features of a split that are not cached yet, and find out which images cannot be read.

    Args:
        folder: see `feature_folder`.
        check: raises if this training may not write any more.
    """
    cache = cache_features(
        prepared.data.manifest(prepared.data.split(split)),
        folder,
        feature_encoding(prepared, prepared.encoder, views_of(prepared, split), cluster),
        reporter=reporter,
        task=f"{split} split",
        check=check,
    )
    for note in cache.notes:
        reporter.report(f"{split} images: {note}")
    return cache


def feature_encoding(
    prepared: PreparedTraining, encoder: Encoder, views: Views, cluster: ClusterResources, *, is_pooled: bool = False
) -> FeatureEncoding:
    """How a training computes features with a CNN, and on what."""
    gpus = min(MAX_GPUS_PER_ENCODER, prepared.workers.gpus)
    return FeatureEncoding(
        encoder=encoder,
        views=views,
        is_pooled=is_pooled,
        num_actors=default_num_actors(cluster, gpus),
        gpus_per_actor=gpus,
        can_grow=not cluster.is_local,
        can_release=cluster.max_cpus <= cluster.cpus,
    )


def report_unreadable(caches: Mapping[str, FeatureCache], reporter: ProgressReporter) -> None:
    """Report how many images of each split cannot be read."""
    for split, cache in caches.items():
        if failures := cache.failures:
            first = failures[0]
            reporter.report(
                f"left out {len(failures):,} {split} images that cannot be read; the first is {first['image_id']}: "
                f"{first['error_message']}"
            )


def readable_images(data: CaptionedImages, split: str, cache: FeatureCache) -> pa.Table:
    """The rows of a split whose images can be read."""
    rows = data.split(split)
    unreadable = pa.array([failure["image_id"] for failure in cache.failures], pa.string())
    return rows.filter(pa.compute.invert(pa.compute.is_in(rows["image_id"], unreadable)))


def fix_validation(
    data: CaptionedImages, cache: FeatureCache, work: str, history: History, *, report: Callable[[str], None]
) -> None:
    """Record the images that all epochs are scored on: the validation images that can be read at the start.

    Raises:
        ImcapError: epochs have finished, and some of their validation images can no longer be read.
    """
    failed = {row["image_id"]: f"{row['error_message']} ({row['error_code']})" for row in cache.failures}
    readable = [image_id for image_id in data.split(VALIDATION)["image_id"].to_pylist() if image_id not in failed]
    recorded = read_validation_ids(work) if history else None
    if recorded is None:
        before = history[-1].get("num_images", len(readable)) if history else len(readable)
        if before != len(readable):  # an earlier version recorded only their number
            raise ImcapError(
                f"{len(readable):,} validation images can be read, but the epochs so far were scored on {before:,}: "
                "bring the images back, or train into another folder"
            )
        write_validation_ids(work, readable)
        return
    if missing := [(image_id, failed[image_id]) for image_id in recorded if image_id in failed]:
        raise ImcapError(f"{describe_failures(len(missing), 'validation', missing)}: {VALIDATION_ADVICE}")
    if num_new := len(readable) - len(recorded):
        images = "image has become readable; it is" if num_new == 1 else "images have become readable; they are"
        report(f"{num_new:,} validation {images} not scored, so that all epochs use the same images")


def write_readable_images(
    data: CaptionedImages, caches: Mapping[str, FeatureCache], folder: str
) -> dict[str, ReadableImages]:
    """Write a manifest of the readable images of each split."""
    images = {}
    for split, cache in caches.items():
        rows = data.manifest(readable_images(data, split, cache))
        manifest = storage.join(folder, split)
        write_table(storage.join(manifest, "part-0.parquet"), rows)
        images[split] = ReadableImages(manifest, root_of(rows), rows.num_rows)
    return images


def read_inputs(inputs: Inputs, encoder: Encoder, *, failures: Any, counter: Any) -> ray.data.Dataset:
    """The dataset of a split.

    Args:
        failures: a `FailureLog` for photographs that cannot be read, which are left out; None: they are rows with an
            error and without pixels.
        counter: a `ProgressCounter`, which finds photographs that kill their process.
    """
    if isinstance(inputs, FeatureCache):
        return _read_features(inputs)
    load = LoadImages(
        preparation=SquarePixels(encoder.image_size),
        root=inputs.root,
        image_columns=tuple(read_image_columns(inputs.folder)),
        failures=failures,
        counter=counter,
    )
    # Ray Data decodes them wherever there are CPUs, so that a worker with a GPU does not have to.
    images = read_images(inputs.folder, load, num_images=inputs.num_images)
    if failures is None:
        return images.select_columns(["image_id", "pixels", "error_code", "error_message"])
    return images.filter(expr=ray.data.expressions.col("error_code") == "").select_columns(["image_id", "pixels"])


def _read_features(cache: FeatureCache) -> ray.data.Dataset:
    return (
        ray.data.read_parquet(
            [storage.resolve(file)[1] for file in cache.files()], filesystem=storage.resolve(cache.folder)[0]
        )
        .select_columns(["image_id", "features", "error_code"])
        # Before Ray splits the rows, because workers with unequal numbers of batches would wait for each other.
        .filter(expr=ray.data.expressions.col("error_code") == "")
    )


def input_shape(inputs: Inputs, encoder: Encoder) -> tuple[int, ...]:
    """Shape of what a worker reads of an image."""
    return inputs.shape if isinstance(inputs, FeatureCache) else (3, encoder.image_size, encoder.image_size)


def count_inputs(inputs: Inputs) -> int:
    """Number of images that can be read."""
    return inputs.num_images - (len(inputs.failures) if isinstance(inputs, FeatureCache) else 0)
