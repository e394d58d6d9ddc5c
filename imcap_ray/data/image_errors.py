"""A failure to read or decode an image -> its `ImageError`."""

from __future__ import annotations

import errno
import re
from typing import Final

from imcap_ray.data.image_formats import SHORTEST_HEADER, ends_early, identify, identify_unreadable, is_installed
from imcap_ray.errors import ImageError

MAX_FILE_BYTES: Final = 2**30
"""Largest file that is read: larger than the largest picture that is decoded would be without compression."""

_MEANS_TRUNCATED: Final = re.compile(r"truncated|end of file|EOF|not enough|not large enough", re.IGNORECASE)

_MEANS_UNSUPPORTED: Final = re.compile(r"unsupported|not supported|not available", re.IGNORECASE)


def image_error_from_os_error(error: OSError, path: object) -> ImageError:
    """Why the file or URI `path` could not be read."""
    if isinstance(error, FileNotFoundError):
        return ImageError("missing", f"no such file: {path}")
    if isinstance(error, PermissionError):
        return ImageError("permission_denied", f"not allowed to read {path}")
    if error.errno == errno.EFBIG:
        return ImageError("too_large", f"expected at most {MAX_FILE_BYTES:,} bytes: {path}")
    if error.errno == errno.ENOMEM:
        return ImageError("out_of_memory", f"not enough memory to read {path}")
    return ImageError("read_error", f"cannot read {path}: {error.strerror or plain_message(error)}")


def unsupported_error(description: str, hint: str = "") -> ImageError:
    """The error for an image of a format that is not read."""
    return ImageError(
        "unsupported_format", f"{description} is not read here; expected JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF{hint}"
    )


def refuse_unreadable(data: bytes) -> None:
    """Raise ImageError if the data are of a format that is never read."""
    if unreadable := identify_unreadable(data):
        raise unsupported_error(unreadable.unreadable)


def unidentified_image_error(data: bytes) -> ImageError:
    """Why data that no reader recognises cannot be captioned."""
    known = identify(data)
    if known is None:
        return ImageError("not_an_image", f"expected an image, got data that begin with {_beginning(data)}")
    if known.package and not is_installed(known):
        return unsupported_error(known.unreadable, f"; the package {known.package} adds it")
    if ends_early(data) or len(data) < SHORTEST_HEADER:
        return ImageError("truncated", f"the {known.name} data end early, after {len(data):,} bytes")
    if known.has_variants:
        return ImageError("unsupported_format", f"this variant of {known.name} is not read here, or it is damaged")
    return ImageError("not_an_image", f"begins like a {known.name} image, but its header is invalid")


def damaged_image_error(data: bytes, error: Exception) -> ImageError:
    """Why data whose reader raised `error` cannot be captioned."""
    text = plain_message(error)
    known = identify(data)
    name = known.name if known else "image"
    if "MAX_TEXT_CHUNK" in text or "MAX_TEXT_MEMORY" in text:
        return ImageError("too_large", "the texts stored next to the picture are too large when unpacked")
    if "out of memory" in text.lower():
        return ImageError("out_of_memory", "not enough memory to decode the image")
    if ends_early(data) or isinstance(error, EOFError) or _MEANS_TRUNCATED.search(text):
        return ImageError("truncated", f"the {name} data end early, after {len(data):,} bytes: {text}")
    if isinstance(error, NotImplementedError) or _MEANS_UNSUPPORTED.search(text):
        return ImageError("unsupported_format", f"this variant of {name} is not read here: {text}")
    return ImageError("not_an_image", f"the {name} data are damaged: {text}")


def _beginning(data: bytes) -> str:
    head = data[:24]
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head):
        return f"the text {' '.join(head.decode('ascii').split())!r}"
    return f"the bytes {head[:12].hex(' ')}"


def plain_message(error: BaseException) -> str:
    """The error's text on one short line, without the addresses and objects that differ from run to run."""
    text = re.sub(r"<[^<>]*>|\b0x[0-9a-fA-F]+", "", str(error))
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return " ".join(text.split())[:160] or type(error).__name__
