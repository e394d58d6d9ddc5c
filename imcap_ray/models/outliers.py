"""The images of a data set that are unlike the others, and splits that are unlike the training images.

An image is measured as for `familiarity`, but against other images of its own data set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt

from imcap_ray.data.dataset_check import Finding, map_images
from imcap_ray.data.datasets import TRAIN, CaptionedImages
from imcap_ray.data.datasets.dataset import DatasetRow
from imcap_ray.data.image_decoding import decode_image
from imcap_ray.data.schemas import UNFAMILIAR
from imcap_ray.errors import ImageError
from imcap_ray.models.familiarity import MIN_IMAGES, Familiarity, Floats
from imcap_ray.models.torch_captioner import TorchCaptioner

NUM_EXAMPLES: Final = 20
"""Images that a finding names."""

MAX_UNFAMILIAR: Final = 0.2
"""Share of a split's images that may be unlike the training images without a warning; 0.05 are by chance."""

_NUM_FOLDS: Final = 4

_FENCE: Final = 1.5
"""In interquartile ranges beyond the third quartile, as in a box plot (Tukey, Exploratory Data Analysis, 1977)."""

_MAX_FITTED: Final = 4096
"""Images of which the subspace is made: with more, it hardly changes."""

_BATCH_SIZE: Final = 32

Key = TypeVar("Key")


def check_outliers(
    dataset: CaptionedImages,
    captioner: TorchCaptioner,
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Finding]:
    """Find images that are unlike the others of a data set, and splits that are unlike its training images.

    Images that cannot be read are passed over, because `check_dataset` reports them.

    Args:
        captioner: its CNN computes the features, in 10 to 20 ms for each image.
        on_progress: called with the number of images done and the number of all images.
    """
    rows, features = _encode_images(dataset, captioner, on_progress)
    names = [rows[number]["image_id"] for number in find_outliers(features)]
    one, many = "image is unlike the others", "images are unlike the others, the most unusual first"
    findings = []
    if names:
        text = one if len(names) == 1 else many
        findings.append(Finding(code="outliers", count=len(names), text=text, examples=names[:NUM_EXAMPLES]))
    splits = np.array([row["split"] for row in rows], dtype=object)
    for split in dataset.count_splits():
        familiarity = compare_with(features[splits == TRAIN], features[splits == split])
        if split != TRAIN and share_unfamiliar(familiarity) > MAX_UNFAMILIAR:
            text = f"of {len(familiarity):,} {split} images are unlike the training images: scores will be low"
            count = int(np.sum(familiarity < UNFAMILIAR))
            findings.append(Finding(code="unlike_train", count=count, text=text))
    return findings


def find_outliers(features: Floats) -> npt.NDArray[np.intp]:
    """Numbers of the images that are unlike the others by their features (N, F), the most unusual first.

    The residual of each image is that outside the subspace of images in other folds, so that no image explains itself.
    Outliers are those beyond the fence of a box plot of the residuals' logarithms. None are found in few images.
    """
    folds = np.arange(len(features)) % _NUM_FOLDS
    residuals = np.zeros(len(features), np.float32)
    for fold in range(_NUM_FOLDS):
        learned = Familiarity.fit(_some(features[folds != fold]), features[folds == fold])
        if learned is None:
            return np.zeros(0, np.intp)
        residuals[folds == fold] = learned.residuals_of(features[folds == fold])
    lower, upper = np.quantile(residuals, [0.25, 0.75])
    is_outlier = residuals > upper * (upper / max(lower, np.finfo(np.float32).tiny)) ** _FENCE
    order = np.argsort(-residuals, kind="stable")
    outliers: npt.NDArray[np.intp] = order[is_outlier[order]]
    return outliers


def compare_with(training: Floats, others: Floats) -> Floats:
    """Familiarity of other images (M, F) by training images (N, F), half of which calibrate it.

    NaN if there are too few training images, or so few others that a share of them says nothing.
    """
    learned = Familiarity.fit(_some(training[::2]), _some(training[1::2])) if len(others) >= MIN_IMAGES else None
    return np.full(len(others), np.nan, np.float32) if learned is None else learned.of(others)


def share_unfamiliar(familiarity: Floats) -> float:
    """Share of the images that are unfamiliar; 0 if their familiarity is unknown."""
    return float(np.mean(familiarity < UNFAMILIAR)) if len(familiarity) else 0.0


def _some(features: Floats) -> Floats:
    return features[:: -(-len(features) // _MAX_FITTED) or 1]


def _encode_images(
    dataset: CaptionedImages, captioner: TorchCaptioner, on_progress: Callable[[int, int], None]
) -> tuple[list[DatasetRow], Floats]:
    """The rows of the readable images, and the mean over all regions of their features (N, F)."""

    def read(row: DatasetRow, data: bytes | ImageError) -> tuple[DatasetRow, npt.NDArray[np.uint8]] | None:
        try:
            if isinstance(data, ImageError):
                raise data
            return row, decode_image(data, image_size=captioner.image_size).pixels
        except ImageError:
            return None

    existing: list[DatasetRow] = [row for row in dataset.table.to_pylist() if row["image_path"]]
    return pool_features(captioner, filter(None, map_images(dataset, existing, read, on_progress)))


def pool_features(
    captioner: TorchCaptioner, images: Iterable[tuple[Key, npt.NDArray[np.uint8]]]
) -> tuple[list[Key], Floats]:
    """The keys of images, and the mean over all regions of their features (N, F).

    Args:
        images: keys and pixels (3, S, S). Only a batch is in memory at a time.
    """
    keys, pooled, rest = list[Key](), list[Floats](), iter(images)
    while batch := list(islice(rest, _BATCH_SIZE)):
        keys += [key for key, _ in batch]
        pooled.append(captioner.encode(np.stack([pixels for _, pixels in batch])).mean(1).numpy())
    return keys, np.concatenate(pooled) if pooled else np.zeros((0, 1), np.float32)
