"""A model folder and the images that it was trained on -> a folder with the model in int8 as well."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from imcap_ray.data.datasets import TRAIN, VALIDATION, CaptionedImages
from imcap_ray.data.image_decoding import decode_image
from imcap_ray.data.image_reading import read_rows, root_of
from imcap_ray.data.manifest import image_columns_of
from imcap_ray.errors import DatasetError, ImageError
from imcap_ray.models.familiarity import MIN_IMAGES, Familiarity
from imcap_ray.models.int8_captioner import Int8Networks
from imcap_ray.models.model_folder import QuantizedModel, read_model_folder, refuse_existing, save_with_int8
from imcap_ray.models.quantization import import_nncf, quantize_networks
from imcap_ray.models.torch_captioner import load_decoder, load_encoder

MAX_TRAINING_IMAGES: Final = 320
"""Photographs that decide the ranges of the model's values."""

MAX_VALIDATION_IMAGES: Final = 1000
"""Photographs by whose features familiarity is calibrated again."""

Pixels = npt.NDArray[np.uint8]


def quantize_model(
    model: str | None, dataset: CaptionedImages, output: str, *, encoder_weights: str | None = None
) -> int:
    """Write a copy of a model folder that captions in int8 by default; returns the number of training images used.

    Raises:
        ConfigError: OpenVINO or NNCF is not installed.
        ModelError: the model cannot be loaded.
        DatasetError: too few training images can be read.
        OutputError: something exists at `output`.
    """
    import_nncf()
    refuse_existing(output)
    folder = read_model_folder(model)
    encoder = load_encoder(folder, encoder_weights)
    photographs = list(_read_photographs(dataset, dataset.split(TRAIN), MAX_TRAINING_IMAGES, encoder.image_size))
    if len(photographs) < MIN_IMAGES:
        raise DatasetError(
            f"{dataset.location}: expected at least {MIN_IMAGES} training images to quantise with, "
            f"{len(photographs)} can be read"
        )
    decoder = load_decoder(folder, num_channels=encoder.num_channels)
    image, step = quantize_networks(
        encoder, decoder, photographs, search=folder.search, vocabulary_size=folder.vocabulary_size
    )
    networks = Int8Networks(image, step, vocabulary_size=folder.vocabulary_size)
    familiarity = folder.familiarity and _calibrate(folder.familiarity, networks, dataset)
    save_with_int8(folder, QuantizedModel(image, step, familiarity), output)
    return len(photographs)


def _calibrate(familiarity: Familiarity, networks: Int8Networks, dataset: CaptionedImages) -> Familiarity | None:
    """Calibrate on the validation images, by their features in int8; None if they are too few."""
    if dataset.count_splits().get(VALIDATION, 0) < MIN_IMAGES:
        return None
    rows = dataset.split(VALIDATION)
    photographs = _read_photographs(dataset, rows, MAX_VALIDATION_IMAGES, networks.image_size)
    features = [networks.encode(pixels[None])[0][0] for pixels in photographs]
    return familiarity.calibrate(np.stack(features)) if len(features) >= MIN_IMAGES else None


def _read_photographs(dataset: CaptionedImages, rows: pa.Table, max_images: int, image_size: int) -> Iterator[Pixels]:
    """Pixels (3, S, S) of at most `max_images` images, evenly spread. Images that cannot be read are left out."""
    num_chosen = min(max_images, rows.num_rows)
    manifest = dataset.manifest(rows.take(pa.array(np.arange(num_chosen) * rows.num_rows // num_chosen)))
    images = read_rows(manifest.to_pylist(), root_of(manifest), image_columns=image_columns_of(manifest))
    for _, data in images:
        if not isinstance(data, ImageError):
            try:
                pixels = decode_image(data, image_size=image_size).pixels
            except ImageError:
                continue
            yield pixels
