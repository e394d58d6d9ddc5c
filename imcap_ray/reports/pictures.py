"""Bytes of an image, and attention weights over it -> data URIs that a page can show."""

from __future__ import annotations

import base64
import math
from io import BytesIO
from typing import Any, Final, NamedTuple

import numpy as np
from PIL import Image

from imcap_ray.data.image_decoding import decode_image

# (longest side in pixels, JPEG quality), tried in turn until a thumbnail fits. A thousand of THUMBNAIL_BYTES
# are 16 MB in base64, which leaves 4 MB of the 20 for the text of the page.
_THUMBNAIL_TRIES: Final = ((256, 82), (256, 65), (256, 45), (192, 45), (128, 40), (64, 40))

THUMBNAIL_BYTES: Final = 12_000

_HEAT_PIXELS_PER_REGION: Final = 8

_HEAT_COLOUR: Final = (8, 10, 24)

_MOST_HEAT_ALPHA: Final = 205


class Thumbnail(NamedTuple):
    """A small upright JPEG as a data URI."""

    uri: str
    width: int
    height: int


def thumbnail_of(data: bytes) -> Thumbnail:
    """Make a thumbnail. Raises ImageError for bytes that are not a readable image."""
    largest = _THUMBNAIL_TRIES[0][0]
    decoded = decode_image(data, image_size=largest)
    square = Image.fromarray(decoded.pixels.transpose(1, 2, 0))
    encoded = b""
    for side, quality in _THUMBNAIL_TRIES:
        scale = min(1, side / max(decoded.width, decoded.height))
        picture = square.resize((math.ceil(decoded.width * scale), math.ceil(decoded.height * scale)))
        buffer = BytesIO()
        picture.save(buffer, "JPEG", quality=quality, optimize=True)
        encoded = buffer.getvalue()
        if len(encoded) <= THUMBNAIL_BYTES:
            break
    return Thumbnail(_data_uri("image/jpeg", encoded), *picture.size)


def heat_map_of(weights: np.ndarray[Any, Any]) -> str:
    """Data URI of a PNG that darkens an image where the weights (rows, columns) are low."""
    rows, columns = weights.shape
    size = (columns * _HEAT_PIXELS_PER_REGION, rows * _HEAT_PIXELS_PER_REGION)
    span = weights.max() - weights.min() or 1.0
    light = np.asarray(Image.fromarray(((weights - weights.min()) / span).astype(np.float32)).resize(size))
    pixels = np.empty((*light.shape, 4), dtype=np.uint8)
    pixels[..., :3] = _HEAT_COLOUR
    pixels[..., 3] = _MOST_HEAT_ALPHA * (1 - light.clip(0, 1))
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return _data_uri("image/png", buffer.getvalue())


def _data_uri(media_type: str, data: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode('ascii')}"
