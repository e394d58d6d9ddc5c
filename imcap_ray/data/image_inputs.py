"""An image in any form that the library accepts -> uint8 pixels of one square size, or an ImageError."""

from __future__ import annotations

import io
import os
from contextlib import suppress
from typing import BinaryIO, Final, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from imcap_ray import storage
from imcap_ray.data.image_decoding import decode_image, decode_picture
from imcap_ray.data.image_errors import MAX_FILE_BYTES, image_error_from_os_error
from imcap_ray.errors import ImageError

ImageInput: TypeAlias = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Image.Image | npt.NDArray[np.uint8]
)
"""A path or URI, a file's bytes, an open binary file, a PIL image, or a uint8 array (H, W, 3)."""


_READ_BYTES: Final = 2**20

_PATHS_AND_BYTES: Final = (str, os.PathLike, bytes, bytearray, memoryview)


def is_image_input(value: object) -> bool:
    """Whether a value is a single image, although some kinds of them can be iterated."""
    if isinstance(value, np.ndarray):
        return value.ndim < 4
    return isinstance(value, (*_PATHS_AND_BYTES, Image.Image)) or hasattr(value, "read")


def read_image_input(image: ImageInput, *, image_size: int) -> npt.NDArray[np.uint8]:
    """Read and decode an image: pixels (3, image_size, image_size).

    An open file is read from its beginning if it can be rewound.

    Raises:
        ImageError: the image cannot be read or decoded.
        TypeError: it is not an `ImageInput`.
    """
    if isinstance(image, Image.Image):
        return decode_picture(image, image_size=image_size)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise TypeError(f"expected an array of uint8 (H, W, 3), got one of {image.dtype} {image.shape}")
        return decode_picture(Image.fromarray(image), image_size=image_size)
    return decode_image(read_image_bytes(image), image_size=image_size).pixels


def read_image_bytes(image: str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO) -> bytes:
    """Read the bytes of an image's file; ImageError if that fails, TypeError if it is no path, bytes or open file."""
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, str | os.PathLike):
        location = os.fsdecode(image)
        try:
            return storage.read_bytes(location, max_bytes=MAX_FILE_BYTES)
        except OSError as error:
            raise image_error_from_os_error(error, location) from error
    if not hasattr(image, "read"):
        raise TypeError(
            "expected a path, a URI, a file's bytes, an open binary file, a PIL image or a uint8 array (H, W, 3), got "
            f"{type(image).__name__}"
        )
    return _read_open_file(image)


def _read_open_file(file: BinaryIO) -> bytes:
    name, data = getattr(file, "name", type(file).__name__), bytearray()
    try:
        with suppress(AttributeError, io.UnsupportedOperation):
            file.seek(0)
        while chunk := file.read(_READ_BYTES):
            if not isinstance(chunk, bytes):
                raise TypeError(f"expected a file that is open in binary mode, got {name} in text mode")
            data += chunk
            if len(data) > MAX_FILE_BYTES:
                raise ImageError("too_large", f"expected at most {MAX_FILE_BYTES:,} bytes: {name}")
    except OSError as error:
        raise image_error_from_os_error(error, name) from error
    return bytes(data)
