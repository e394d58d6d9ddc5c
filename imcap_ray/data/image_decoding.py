"""Image bytes -> upright uint8 RGB pixels, usually of one square size, or an ImageError that says why not.

Knows nothing of files, models or Ray; the formats are those of `image_formats.FORMATS`. Colour profiles (ICC) are
ignored, as in most training pipelines: the stored numbers are taken for sRGB. A photograph in another colour space
looks a little pale, and is captioned.

What an error code means here, beyond its name:

    truncated           the data end before the picture does; it may be complete at its source
    not_an_image        not image data at all, or an image so damaged that it does not decode
    unsupported_format  an image, but of a format or variant that is not read here
    too_large           more pixels, scans, metadata or decoding time than is allowed
    internal            an error that this module did not expect, so most likely a bug in it
"""

from __future__ import annotations

import hashlib
import io
import re
import struct
import sys
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import ExifTags, Image, ImageFile, PngImagePlugin, UnidentifiedImageError

from imcap_ray.data.image_errors import (
    damaged_image_error,
    plain_message,
    refuse_unreadable,
    unidentified_image_error,
    unsupported_error,
)
from imcap_ray.data.image_formats import JPEG_SEGMENT, end_of_jpeg, ends_early, readers
from imcap_ray.errors import ImageError

MAX_PIXELS: Final = 178_956_970
"""Maximum number of pixels of a picture: Pillow's own limit, 512 MiB of three bytes each."""

MAX_JPEG_SCANS: Final = 100
"""Maximum number of scans of a JPEG. Every scan passes over the entire picture again, so that thousands of them, in
less than a megabyte, take minutes. GDAL and libtiff stop at 100 by default (GDAL_JPEG_MAX_ALLOWED_SCAN_NUMBER,
LIBTIFF_JPEG_MAX_ALLOWED_SCAN_NUMBER); encoders write 10 to 20."""

_MAX_HEADER_READS: Final = 20_000
"""Maximum number of pieces in which Pillow may read the data before the picture: metadata of a few megabytes have a few
thousand.
Pillow joins the pieces of a JPEG's EXIF data one by one, which takes minutes for 48 MB of small ones."""

# PhotometricInterpretation of a TIFF whose numbers grow from white to black.
_WHITE_IS_ZERO: Final = 0

# Exceptions that Pillow's readers raise on damaged data; any other is unexpected, and becomes `internal`.
_DAMAGE: Final = (
    *(OSError, SyntaxError, ValueError, LookupError, TypeError, ArithmeticError, EOFError, RuntimeError),
    *(AttributeError, AssertionError, struct.error, zlib.error),
)

# Two warnings of the JPEG library: pixels are missing; N bytes were left over before the end marker.
_MEANS_JPEG_ENDS_EARLY: Final = re.compile(r"premature end of data segment|found marker 0xd9 instead of RST")

_NUM_UNUSED_BYTES: Final = re.compile(r"(\d+) extraneous bytes before marker 0xd9")

# Markers at which a scan, or the picture, ends.
_JPEG_MARKER: Final = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")

# How simplejpeg names the pixels of a JPEG that Pillow opens in this mode.
_JPEG_COLOURS: Final = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}

_MAX_PNG_TEXT_BYTES: Final = 16 * 2**20
"""Maximum size of a text or colour profile of a PNG, unpacked; Pillow's own limit, 1 MiB, refuses valid files."""

_MAX_PPM_COMMENTS: Final = 10_000
"""Maximum number of comments of a text PPM: for each, Pillow copies a megabyte."""

_MAX_TILES: Final = 200_000
"""Maximum number of strips or tiles of a TIFF; each takes Pillow some microseconds, however few pixels it has."""

_MAX_PNG_PROFILES: Final = 10
"""Maximum number of colour profiles of a PNG, which should have one. Each unpacks to a thousand times its size."""

_TRANSPOSES: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, slots=True, eq=False)
class DecodedImage:
    """An upright picture, resized to a square, and facts about its file."""

    pixels: npt.NDArray[np.uint8]
    """(3, image_size, image_size), C-contiguous, red green blue; after `decode_prepared` of any shape."""
    width: int
    """Width of the full picture, upright."""
    height: int
    """Height of the full picture, upright."""
    format: str
    """Pillow's name in lower case: jpeg, png, webp, ..."""
    sha256: str
    """Hex digest of the bytes."""


class Preparation(Protocol):
    """How a captioner wants its images: the bytes of any image -> pixels of one shape. Travels to other processes."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the pixels of every image."""

    def __call__(self, data: bytes) -> DecodedImage:
        """Decode the bytes. Raises ImageError, and nothing else."""


@dataclass(frozen=True, slots=True)
class SquarePixels:
    """The preparation of the models of this package: the whole picture, resized to a square."""

    image_size: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the pixels of every image."""
        return (3, self.image_size, self.image_size)

    def __call__(self, data: bytes) -> DecodedImage:
        """Decode the bytes. Raises ImageError, and nothing else."""
        return decode_image(data, image_size=self.image_size)


def decode_image(data: bytes, *, image_size: int, max_pixels: int = MAX_PIXELS) -> DecodedImage:
    """The complete picture, upright and resized to image_size x image_size, whatever its proportions.

    A picture that has this size already comes back unchanged. Transparency becomes white, an animation gives its first
    frame. A JPEG much larger than needed is decoded at an eighth, quarter or half of its size, but at no less than
    twice image_size. Above Pillow's own limit, `PIL.Image.MAX_IMAGE_PIXELS`, `max_pixels` has no effect: that limit
    belongs to the entire process and is not changed here.

    Raises ImageError, and nothing else, when the data give no picture.
    """
    finish = partial(_upright_square, image_size=image_size)
    return _decode_intact(data, finish, draft_size=2 * image_size, max_pixels=max_pixels)


def decode_prepared(data: bytes, *, prepare: Callable[[Image.Image], npt.NDArray[np.uint8]]) -> DecodedImage:
    """Like `decode_image`, with the pixels that `prepare` makes of the upright RGB picture in its full size.

    Raises ImageError, and nothing else, when the data give no picture or `prepare` raises.
    """
    return _decode_intact(data, lambda rgb, orientation: prepare(_upright(rgb, orientation)))


_Finish: TypeAlias = Callable[[Image.Image, int], npt.NDArray[np.uint8]]
"""A picture in RGB, and its EXIF orientation -> its pixels."""


def _decode_intact(
    data: bytes, finish: _Finish, *, draft_size: int | None = None, max_pixels: int = MAX_PIXELS
) -> DecodedImage:
    """Decode; if the data are damaged in their metadata only, without these."""
    if not data:
        raise ImageError("empty_file", "expected an image, got zero bytes")
    with _decoding():
        try:
            return _decode(data, finish, draft_size=draft_size, max_pixels=max_pixels)
        except ImageError as error:
            if error.code != "not_an_image" or (intact := _without_damaged_metadata(data)) == data:
                raise
        decoded = _decode(intact, finish, draft_size=draft_size, max_pixels=max_pixels)
        return replace(decoded, sha256=hashlib.sha256(data).hexdigest())


def decode_picture(picture: Image.Image, *, image_size: int) -> npt.NDArray[np.uint8]:
    """The pixels of an image that Pillow has opened or made, as `decode_image` gives those of its file.

    They differ by rounding if the file is a JPEG that `decode_image` decodes at a fraction of its size.

    Raises ImageError, and nothing else, when it has no picture.
    """
    with _decoding():
        try:
            if 0 in picture.size:
                raise ValueError(f"its size is {picture.width} x {picture.height}")
            rgb = _to_rgb(_load(picture))
            return _upright_square(rgb, _orientation(picture), image_size=image_size)
        except _DAMAGE as error:
            raise ImageError("not_an_image", f"the image has no picture: {plain_message(error)}") from error


@contextmanager
def _decoding() -> Iterator[None]:
    """Set what decoding needs in Pillow; turn every exception into an ImageError."""
    # Another library may have set this for the entire process; half a picture would then pass for a complete one.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    PngImagePlugin.MAX_TEXT_CHUNK = _MAX_PNG_TEXT_BYTES  # all together stay below its MAX_TEXT_MEMORY, 64 MiB
    try:
        with _warnings_ignored_in_this_thread():
            yield
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError("out_of_memory", "not enough memory to decode the image") from error
    except Exception as error:
        raise ImageError("internal", f"unexpected {type(error).__name__}: {plain_message(error)}") from error


def _decode(data: bytes, finish: _Finish, *, draft_size: int | None, max_pixels: int) -> DecodedImage:
    refuse_unreadable(data)
    _check_parts(data)
    try:
        image = _open(data)
        with image:
            width, height = image.size
            _check_size(width, height, max_pixels=max_pixels)
            _refuse_preview(image)
            if len(image.tile) > _MAX_TILES:
                raise ImageError("too_large", f"the picture is stored in more than {_MAX_TILES:,} parts")
            # Twice: 4000 x 3000 to 288 x 288 takes 18 ms instead of 107, and 93 % of 1,000 captions stay the same (94 %
            # at 224 x 224, where the following was measured). The rest is rounding: at half the size it is 93 %,
            # and 93 % when the photograph is saved at quality 95 instead of 90. At an eighth of the size it would take
            # 13 ms, for 85 %. CIDEr-D differs by less than 0.001.
            reduced = draft_size is not None and image.draft(None, (draft_size, draft_size)) is not None
            picture = _load_jpeg(image, data, (width, height)) if image.format in ("JPEG", "MPO") else _load(image)
            if not reduced:  # an ICO or a TIFF may know its true size only now
                width, height = image.size
            orientation = _orientation(image)
            image_format = (image.format or "unknown").lower()
            if _is_zero_filled(data):
                raise ImageError("truncated", "the picture data end early and are filled up with zeros")
            rgb = _to_rgb(picture)
    except Image.DecompressionBombError as error:
        raise ImageError("too_large", plain_message(error).partition(", could be")[0]) from error
    except UnidentifiedImageError as error:
        raise unidentified_image_error(data) from error
    except _DAMAGE as error:
        raise damaged_image_error(data, error) from error

    if orientation >= 5:
        width, height = height, width
    return DecodedImage(
        pixels=finish(rgb, orientation),
        width=width,
        height=height,
        format=image_format,
        sha256=hashlib.sha256(data).hexdigest(),
    )


def _upright_square(rgb: Image.Image, orientation: int, *, image_size: int) -> npt.NDArray[np.uint8]:
    """The pixels (3, image_size, image_size) of a picture."""
    rgb = rgb.resize((image_size, image_size), Image.Resampling.BICUBIC)
    rgb = _upright(rgb, orientation)  # after resizing, when it costs nothing
    return np.ascontiguousarray(np.asarray(rgb).transpose(2, 0, 1))


def _upright(rgb: Image.Image, orientation: int) -> Image.Image:
    return rgb.transpose(_TRANSPOSES[orientation]) if orientation in _TRANSPOSES else rgb


def _open(data: bytes) -> ImageFile.ImageFile:
    file = _CountedFile(data)
    image = Image.open(file, formats=readers(data))
    file.reads_left = sys.maxsize
    return image


class _CountedFile(io.BytesIO):
    """A file in memory that raises ImageError when it is read in too many pieces."""

    reads_left = _MAX_HEADER_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads_left -= 1
        if self.reads_left < 0:
            raise ImageError("too_large", f"its metadata have more than {_MAX_HEADER_READS:,} parts")
        return super().read(size)


def _without_damaged_metadata(data: bytes) -> bytes:
    """A PNG without its ancillary chunks, such as texts, whose checksum is wrong; other data are returned unchanged.

    The picture is in critical chunks, which begin with a capital letter. libpng leaves out damaged ancillary chunks
    too, while Pillow refuses the file.
    """
    if not data.startswith(b"\x89PNG"):
        return data
    kept, position = [data[:8]], 8
    for _ in range(_MAX_HEADER_READS):
        content = position + 4
        end = content + 4 + int.from_bytes(data[position:content], "big")
        is_correct = zlib.crc32(data[content:end]) == int.from_bytes(data[end : end + 4], "big")
        if is_correct or not data[content : content + 1].islower():
            kept.append(data[position : end + 4])
        position = end + 4
        if position >= len(data):
            break
    return b"".join([*kept, data[position:]])


def _check_parts(data: bytes) -> None:
    """Raise ImageError for too many parts of a kind that takes much time and little space."""
    if data.startswith(b"\xff\xd8"):
        _check_scans(data)
    elif data.startswith(b"\x89PNG"):
        if data.count(b"iCCP") > _MAX_PNG_PROFILES:
            raise ImageError("too_large", f"the png has more than {_MAX_PNG_PROFILES} colour profiles")
    elif data.startswith((b"P1", b"P2", b"P3")) and data.count(b"#") > _MAX_PPM_COMMENTS:
        raise ImageError("too_large", f"the ppm has more than {_MAX_PPM_COMMENTS:,} comments")


def _check_scans(data: bytes) -> None:
    """Raise ImageError for a JPEG with too many scans. This takes 0.4 % of the time of decoding, or less."""
    if _is_read_in_one_scan(data):
        return
    # At even and at odd positions, six times as fast as bytes.count. Thumbnails, videos behind the picture and chance
    # add to the number, so that a large number proves nothing.
    pairs = [np.frombuffer(data, "<u2", (len(data) - start) // 2, start) for start in (0, 1)]
    if sum(np.count_nonzero(numbers == 0xDAFF) for numbers in pairs) <= MAX_JPEG_SCANS:
        return
    num_scans, position = 0, 2
    while (marker := _JPEG_MARKER.search(data, position)) and marker[0] != b"\xff\xd9":
        num_scans += marker[0] == b"\xff\xda"
        if num_scans > MAX_JPEG_SCANS:
            raise ImageError("too_large", f"expected at most {MAX_JPEG_SCANS} scans, the jpeg has more")
        position = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")


def _check_size(width: int, height: int, *, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageError(
            "too_large",
            f"expected at most {max_pixels:,} pixels, got {width} x {height} = {width * height:,}",
        )


def _refuse_preview(image: ImageFile.ImageFile) -> None:
    """Raise ImageError for a camera raw file: a TIFF whose first picture is a thumbnail by its NewSubfileType."""
    kind = _tiff_tag(image, ExifTags.Base.NewSubfileType)
    if isinstance(kind, int) and kind & 1:
        raise unsupported_error("a camera raw file (TIFF with a preview first)")


def _load(image: Image.Image) -> Image.Image:
    image.load()
    return image


def _load_jpeg(image: ImageFile.ImageFile, data: bytes, full_size: tuple[int, int]) -> Image.Image:
    """The picture at the size that `draft` has chosen, with Pillow's pixels; ImageError where the data end early.

    Pillow fills missing pixels with grey where an end marker follows, and drops the warning about it. simplejpeg has
    the same decoder and raises an error; all pixels of 7,000 photographs are equal, and the time is the same within
    5 %. Pillow decodes the files that simplejpeg refuses for another reason.

    These still pass as complete when an end marker follows: a progressive JPEG cut between two scans, or cut where few
    bits were missing and filled up with zeros; any file that is filled up with other bytes; a file with another fault
    before the cut, because only the first fault is reported; and a file that simplejpeg does not read, with an unusual
    chroma subsampling.
    """
    width, height = image.size
    is_reduced = image.size != full_size
    pixels = np.empty((height, width, len(image.getbands())), np.uint8)
    try:
        decoded = simplejpeg.decode_jpeg(
            data,
            _JPEG_COLOURS[image.mode],
            min_width=width if is_reduced else 0,  # the smallest size that is not smaller
            min_height=height if is_reduced else 0,
            buffer=pixels,  # no more memory than the size that was checked
            strict=True,
        )
    except ValueError as error:
        warning = str(error)
        if _MEANS_JPEG_ENDS_EARLY.search(warning) or _has_zero_filled_pixels(data, warning):
            raise ImageError(
                "truncated", f"the jpeg picture ends before its end marker: {plain_message(error)}"
            ) from error
        return _load(image)
    if decoded.shape != pixels.shape:
        return _load(image)
    stored_as = "CMYK;I" if image.mode == "CMYK" else image.mode  # all CMYK JPEGs are taken for inverted, as in Pillow
    return Image.frombuffer(image.mode, image.size, pixels, "raw", stored_as, 0, 1)


def _has_zero_filled_pixels(data: bytes, warning: str) -> bool:
    """Whether zeros precede a JPEG's end marker, and more of them than the warning calls unneeded."""
    unused = _NUM_UNUSED_BYTES.search(warning)
    if not unused:
        return False
    end = end_of_jpeg(data)
    num_zeros = end - len(data[:end].rstrip(b"\0"))
    return num_zeros > int(unused[1]) + 16  # a decoder reads up to 8 bytes ahead of what it needs


def _is_zero_filled(data: bytes) -> bool:
    """Whether a JPEG has zeros where its end was, after a broken download: a decoder makes grey pixels of zeros."""
    return data.startswith(b"\xff\xd8") and data.endswith(bytes(64)) and ends_early(data)


def _orientation(image: Image.Image) -> int:
    """Orientation as in EXIF, 1 to 8; 1, upright, when the EXIF data are damaged, because the pixels may be fine."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except _DAMAGE:
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_to_8_bits(image)).convert("RGB")
    if image.has_transparency_data:
        if image.mode in ("La", "PA"):
            image = image.convert("LA" if image.mode == "La" else "RGBA")
        image = image.convert("RGBA")
        on_white = Image.new("RGB", image.size, "white")
        on_white.paste(image.convert("RGB"), mask=image.getchannel("A"))
        return on_white
    try:
        return image if image.mode == "RGB" else image.convert("RGB")
    except ValueError as error:  # LAB, for one
        raise unsupported_error(f"an image of {image.mode} pixels") from error


def _to_8_bits(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Grey pixels of more than 8 bits, scaled to 8 bits by the range they are stored in.

    The range is 16 bits, or the number of bits in a TIFF's header, or 8 bits in wider numbers, or 0 to 1 for floats.
    Sensors write 10 or 12 bits into 16, where all pixels would be almost black: up to 4,095, the range ends at the
    lightest pixel. Where the values fit none of these, it is that from the darkest to the lightest pixel. A TIFF may
    count from white to black.
    """
    values = np.nan_to_num(np.asarray(image).astype(np.float32), posinf=0.0, neginf=0.0)
    darkest, lightest = float(values.min()), float(values.max())
    if image.mode.startswith("I;16") and _tiff_tag(image, ExifTags.Base.BitsPerSample) == 12:
        darkest, lightest = 0.0, 4095.0
    elif image.mode == "F" and darkest >= 0 and lightest <= 1:
        darkest, lightest = 0.0, 1.0
    elif darkest >= 0 and lightest <= 255:
        darkest, lightest = 0.0, 255.0
    elif darkest >= 0 and lightest <= 4095:
        darkest = 0.0
    elif darkest >= 0 and lightest <= 65535:
        darkest, lightest = 0.0, 65535.0
    scaled = (values - darkest) * (255.0 / max(lightest - darkest, 1e-30))
    pixels: npt.NDArray[np.uint8] = np.rint(scaled).clip(0, 255).astype(np.uint8)
    # Pillow inverts pixels of at most 8 bits itself.
    return 255 - pixels if _tiff_tag(image, ExifTags.Base.PhotometricInterpretation) == _WHITE_IS_ZERO else pixels


def _tiff_tag(image: Image.Image, tag: int) -> object:
    """The tag's value, or the first of its values; None if there is none, and for other formats."""
    tags = getattr(image, "tag_v2", None) if image.format == "TIFF" else None
    value = tags.get(tag) if tags else None
    return value[0] if isinstance(value, tuple) and value else value


def _is_read_in_one_scan(jpeg: bytes) -> bool:
    """Whether the first scan of a JPEG that is not progressive has all colours: decoders then read no other scan.

    False if that scan is not among the first `_MAX_HEADER_READS` segments.
    """
    num_colours, position = 0, 2
    for _ in range(_MAX_HEADER_READS):
        segment = JPEG_SEGMENT.search(jpeg, position)
        if not segment:
            return False
        start = segment.end()
        if segment[0] in (b"\xff\xc0", b"\xff\xc1", b"\xff\xc9"):  # sequential: baseline, extended, arithmetic
            num_colours = int.from_bytes(jpeg[start + 7 : start + 8], "big")
        elif segment[0] == b"\xff\xda":
            return num_colours > 0 and jpeg[start + 2 : start + 3] == bytes([num_colours])
        position = start + int.from_bytes(jpeg[start : start + 2], "big")
        if segment[0] == b"\xff\xc2":
            return False
    return False


# --- warnings ---
class _AnyTextWhileDecoding:
    """Pattern of a warnings filter that matches any text, but only in threads that are decoding."""

    def __init__(self) -> None:
        self.thread = threading.local()

    def match(self, text: str) -> bool:
        return getattr(self.thread, "is_decoding", False)


_any_text_while_decoding: Final = _AnyTextWhileDecoding()

_FILTER: Final[Any] = ("ignore", _any_text_while_decoding, Warning, None, 0)

_filter_lock: Final = threading.Lock()


@contextmanager
def _warnings_ignored_in_this_thread() -> Iterator[None]:
    """Ignore Pillow's warnings of damaged EXIF data and the like, which fill the log, or raise if warnings are errors.

    `warnings.catch_warnings` replaces the filters of all threads, and threads that overlap leave the wrong filters. So
    one filter stays first in the list and asks in which thread it is: other threads warn as usual.
    """
    filters: Any = warnings.filters
    if not filters or filters[0] is not _FILTER:
        with _filter_lock:
            filters[:] = [_FILTER, *(other for other in filters if other is not _FILTER)]
    _any_text_while_decoding.thread.is_decoding = True
    try:
        yield
    finally:
        _any_text_while_decoding.thread.is_decoding = False
