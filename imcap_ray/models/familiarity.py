"""How much an image resembles the images that a model was trained on.

A captioner that has only seen people and dogs describes a cup of coffee as a dog, at a confidence that looks normal.
What betrays such an image is the part of its features that lies outside the principal subspace of the training images'
features: the residual of ViM (Wang et al., "ViM: Out-Of-Distribution with Virtual-logit Matching", CVPR 2022). The
familiarity is its conformal p-value (Bates et al., "Testing for outliers with conformal p-values", Annals of Statistics
2023): the share of validation images, on which the model was not trained, with a residual at least as large. So about
5 % of images that resemble the training images fall below 0.05.

Knows nothing of torch. B images, F channels, K directions, V validation images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from imcap_ray.errors import ModelError
from imcap_ray.models.model_files import FAMILIARITY_FILE

"""File of a model folder."""

MAX_DIRECTIONS: Final = 64
"""With more, fewer unfamiliar images are recognised, see jobs/RESULTS.md. They take 0.5 MB for 4,096 channels."""

MIN_IMAGES: Final = 20
"""With fewer validation images no image could fall below 0.05, and fewer training images span no subspace."""

Floats: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Familiarity:
    """The familiarity of images, by their features' mean over all regions."""

    mean: Floats
    """(F): mean of the training images' features."""
    directions: Floats
    """(K, F): orthonormal principal directions of the training images' features."""
    residuals: Floats
    """(V): residuals of the validation images, ascending."""

    @classmethod
    def fit(
        cls, training: npt.ArrayLike, validation: npt.ArrayLike, *, max_directions: int = MAX_DIRECTIONS
    ) -> Familiarity | None:
        """Learn from features (N, F) of training images and (V, F) of validation images; None if they are too few."""
        train, val = np.asarray(training, np.float32), np.asarray(validation, np.float32)
        if min(len(train), len(val)) < MIN_IMAGES:
            return None
        # At most half of the dimensions that the images span: in all of them every training image would be familiar.
        num_directions = min(max_directions, min(train.shape) // 2)
        mean = _as_stored(train.mean(0))
        directions = _as_stored(np.linalg.svd(train - mean, full_matrices=False)[2][:num_directions])
        learned = cls(mean, directions, np.zeros(0, np.float32))
        return cls(mean, directions, np.sort(learned.residuals_of(val)))

    def calibrate(self, validation: npt.ArrayLike) -> Familiarity:
        """The same directions, with the residuals of features (V, F) that a rounded copy of the CNN computes."""
        return replace(self, residuals=np.sort(self.residuals_of(np.asarray(validation, np.float32))))

    def of(self, features: npt.ArrayLike) -> Floats:
        """Familiarity, 0..1, of images with these features (B, F): the share of validation images that are no closer to
        the training images, so that 0.5 is the median. NaN for features that are not finite."""
        residuals = self.residuals_of(np.asarray(features, np.float32))
        num_farther = len(self.residuals) - np.searchsorted(self.residuals, residuals)
        shares = ((1 + num_farther) / (1 + len(self.residuals))).astype(np.float32)
        return np.where(np.isnan(residuals), np.float32(math.nan), shares)

    def residuals_of(self, features: Floats) -> Floats:
        """How far features (B, F) are from those of the training images; NaN where they are not finite."""
        # Row by row, because the rounding of a matrix product depends on the other rows.
        return np.array([self._residual(row) for row in features], np.float32)

    def _residual(self, features: Floats) -> float:
        """Length of the part of a vector (F) that the directions do not explain, relative to the vector's; or NaN."""
        if not np.isfinite(features).all():
            return math.nan
        centred = features - self.mean
        outside = centred - (self.directions @ centred) @ self.directions
        length = float(np.linalg.norm(features))
        return float(np.linalg.norm(outside)) / length if length else math.inf

    def to_bytes(self) -> bytes:
        """The content of a model folder's file."""
        return safetensors.numpy.save(
            {
                "mean": self.mean.astype(np.float16),
                "directions": self.directions.astype(np.float16),
                "residuals": self.residuals,
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Familiarity:
        """Read what `to_bytes` wrote; ModelError if it is corrupt."""
        try:
            tensors = safetensors.numpy.load(data)
            mean, directions, residuals = (
                tensors[name].astype(np.float32) for name in ("mean", "directions", "residuals")
            )
            is_valid = mean.ndim == residuals.ndim == 1 and directions.ndim == 2 and mean.shape == directions.shape[1:]
            is_valid &= all(np.isfinite(array).all() for array in (mean, directions, residuals))
        except (safetensors.SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise ModelError(f"{FAMILIARITY_FILE} is corrupt: {' '.join(str(error).split())[:300]}") from error
        if not is_valid or not residuals.size:
            raise ModelError(f"{FAMILIARITY_FILE} is corrupt: its arrays do not fit together, or are not finite")
        return cls(mean, directions, np.sort(residuals))


def _as_stored(values: Floats) -> Floats:
    """The values with the precision of the file, so that a loaded model gives the same familiarity."""
    return values.astype(np.float16).astype(np.float32)


def mean_familiarity(members: Sequence[Familiarity], features: npt.ArrayLike) -> Floats:
    """The mean familiarity of several models, whose channels follow each other in `features` (B, sum of F)."""
    ends = np.cumsum([len(member.mean) for member in members])
    parts = np.split(np.asarray(features, np.float32), ends[:-1], axis=1)
    each = [member.of(part) for member, part in zip(members, parts, strict=True)]
    mean: Floats = np.mean(each, axis=0, dtype=np.float32)
    return mean
