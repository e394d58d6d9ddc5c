"""Image formats -> signatures, names, and what is wrong with a file that cannot be decoded."""

from __future__ import annotations

import importlib
import re
import struct
from typing import Final, Literal

from imcap_ray.errors import ImageError

# (position, bytes, name) of kinds in _FORMATS, for files whose header is damaged or cut.
READABLE_SIGNATURES: Final = (
    (0, b"\xff\xd8\xff", "jpeg"),
    (0, b"\x89PNG", "png"),
    (0, b"GIF8", "gif"),
    (8, b"WEBP", "webp"),
    (0, b"II*\0", "tiff"),
    (0, b"MM\0*", "tiff"),
    (0, b"II+\0", "tiff"),
    (0, b"MM\0+", "tiff"),
    (4, b"ftypavif", "avif"),
    (4, b"ftypavis", "avif"),
    (4, b"ftyphe", "heif"),
    (4, b"ftypmif1", "heif"),
    (4, b"ftypmsf1", "heif"),
    (0, b"BM", "bmp"),
    (0, b"8BPS\0\1", "psd"),
    (0, b"DDS ", "dds"),
    (0, b"\0\0\0\x0cjP  ", "jpeg2000"),
    (0, b"\xff\x4f\xff\x51", "jpeg2000"),
    (0, b"\0\0\1\0", "ico"),
    (0, b"icns", "icns"),
    (0, b"qoif", "qoi"),
)

UNSUPPORTED_SIGNATURES: Final = (
    (0, b"%PDF", "a PDF document"),
    (0, b"%!PS", "a PostScript drawing"),
    (0, b"\xc5\xd0\xd3\xc6", "a PostScript drawing"),
    (8, b"CR\x02", "a Canon camera raw file"),
    (4, b"ftypcrx ", "a Canon camera raw file"),
    (0, b"FUJIFILMCCD-RAW", "a Fujifilm camera raw file"),
    (0, b"IIRO", "an Olympus camera raw file"),
    (0, b"IIRS", "an Olympus camera raw file"),
    (0, b"MMOR", "an Olympus camera raw file"),
    (0, b"IIU\0", "a Panasonic camera raw file"),
    (0, b"FOVb", "a Sigma camera raw file"),
    (0, b"\xff\x0a", "a JPEG XL image"),
    (0, b"\0\0\0\x0cJXL ", "a JPEG XL image"),
    (0, b"II\xbc", "a JPEG XR image"),
    (0, b"8BPS\0\2", "a large Photoshop document (PSB)"),
    (0, b"gimp xcf", "a GIMP document"),
    (0, b"v/1\1", "an OpenEXR image"),
    (0, b"#?RADIANCE", "a Radiance image"),
    (0, b"AT&TFORM", "a DjVu document"),
    (0, b"SIMPLE  =", "a FITS image"),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"\xd7\xcd\xc6\x9a", "a Windows metafile"),
    (40, b" EMF", "a Windows metafile"),
)

# Kinds with so many sub-kinds that a header which Pillow refuses is more likely unknown than damaged.
_MANY_KINDS: Final = ("tiff", "bmp", "psd", "dds", "avif", "heif", "jpeg2000")

# In bytes. What is shorter, and begins like an image, is the beginning of one.
_SHORTEST_HEADER: Final = 32

_SAYS_TRUNCATED: Final = re.compile(r"truncated|end of file|EOF|not enough|not large enough", re.IGNORECASE)

_SAYS_HOW_MANY_UNUSED: Final = re.compile(r"(\d+) extraneous bytes before marker 0xd9")

_SAYS_UNSUPPORTED: Final = re.compile(r"unsupported|not supported|not available", re.IGNORECASE)

# The marks in a JPEG that a length follows: all but the fill bytes, the restart marks and those of start and end.
JPEG_SEGMENT: Final = re.compile(rb"\xff[^\x00\x01\xd0-\xd9\xff]")


# --- what is wrong with data that do not decode ---
def unidentified_image_error(data: bytes) -> ImageError:
    """Why data that no decoder recognises cannot be captioned."""
    readable = format_name(data, READABLE_SIGNATURES)
    if readable == "heif" and not can_read_heif():
        return ImageError(
            "unsupported_format", f"{unsupported_message('a HEIC image')}; the package pillow_heif adds it"
        )
    if not readable:
        return ImageError("not_an_image", f"expected an image, got data that begin with {_beginning(data)}")
    if _ends_early(data) or len(data) < _SHORTEST_HEADER:
        return ImageError("truncated", f"the {readable} data end early, after {len(data):,} bytes")
    if readable in _MANY_KINDS:
        return ImageError("unsupported_format", f"this kind of {readable} is not read here, or it is damaged")
    return ImageError("not_an_image", f"begins like a {readable} image, but its header makes no sense")


def damaged_image_error(data: bytes, error: Exception) -> ImageError:
    """The error for data whose decoder raised `error`."""
    text = plain_message(error)
    name = format_name(data, READABLE_SIGNATURES) or "image"
    if "MAX_TEXT_CHUNK" in text or "MAX_TEXT_MEMORY" in text:
        return ImageError("too_large", "the texts stored beside the picture are too large when unpacked")
    if "out of memory" in text.lower():
        return ImageError("out_of_memory", "not enough memory to decode the image")
    if _ends_early(data) or isinstance(error, EOFError) or _SAYS_TRUNCATED.search(text):
        return ImageError("truncated", f"the {name} data end early, after {len(data):,} bytes: {text}")
    if isinstance(error, NotImplementedError) or _SAYS_UNSUPPORTED.search(text):
        return ImageError("unsupported_format", f"this kind of {name} is not read here: {text}")
    return ImageError("not_an_image", f"the {name} data are damaged: {text}")


def _ends_early(data: bytes) -> bool:
    """Whether the end mark of the format is missing, or its declared length reaches beyond the data.

    Asked only of data that are in doubt, for many a GIF without its end mark is complete to the last pixel.
    """
    match format_name(data, READABLE_SIGNATURES):
        case "jpeg":
            return _end_of_jpeg(data) < 0
        case "png":
            return b"IEND" not in data
        case "gif":
            return not data.rstrip(b"\0").endswith(b";")
        case "webp":
            return 8 + int.from_bytes(data[4:8], "little") > len(data)
        case "bmp":
            return int.from_bytes(data[2:6], "little") > len(data)
        case "tiff":
            return _directory_ends_early(data)
        case "avif" | "heif":
            return _boxes_end_early(data)
        case "jpeg2000":  # from the start of the picture, for before it there may be a colour profile
            return data.find(b"\xff\xd9", data.find(b"\xff\x4f\xff\x51")) < 0
        case "ico":
            return _icons_end_early(data)
        case "icns":
            return int.from_bytes(data[4:8], "big") > len(data)
        case _:
            return False


def _end_of_jpeg(data: bytes) -> int:
    """Where the first picture's end mark is, or -1. Thumbnails in its header, and what follows it, have their own."""
    position = 2
    while segment := JPEG_SEGMENT.search(data, position):
        if segment[0] == b"\xff\xda":  # pixels, in which every ff is followed by 0 or by a restart mark
            return data.find(b"\xff\xd9", segment.end())
        position = segment.end() + int.from_bytes(data[segment.end() : segment.end() + 2], "big")
    is_whole = b"\xff\xda" in data and data.endswith(b"\xff\xd9")  # but with a wrong length in its header
    return len(data) - 2 if is_whole else -1


def has_zero_filled_pixels(data: bytes, warning: str) -> bool:
    """Whether zeros stand before a JPEG's end mark, and more of them than the warning says were not needed."""
    unused = _SAYS_HOW_MANY_UNUSED.search(warning)
    if not unused:
        return False
    end = _end_of_jpeg(data)
    zeros = end - len(data[:end].rstrip(b"\0"))
    return zeros > int(unused[1]) + 16  # a decoder reads up to 8 bytes ahead of what it needs


def _icons_end_early(ico: bytes) -> bool:
    num_icons = int.from_bytes(ico[4:6], "little")
    if 6 + 16 * num_icons > len(ico):
        return True
    return any(size + start > len(ico) for size, start in struct.iter_unpack("<8xII", ico[6 : 6 + 16 * num_icons]))


def _directory_ends_early(tiff: bytes) -> bool:
    order: Literal["little", "big"] = "little" if tiff.startswith(b"I") else "big"
    start = int.from_bytes(tiff[4:8], order)
    num_entries = int.from_bytes(tiff[start : start + 2], order)
    return start + 2 + 12 * num_entries + 4 > len(tiff)  # two bytes of count, the entries, the next directory


def _boxes_end_early(data: bytes) -> bool:
    position = 0
    while position + 8 <= len(data):
        size = int.from_bytes(data[position : position + 4], "big")
        if size < 8:  # 0: to the end of the file, 1: a box beyond 4 GB
            return False
        position += size
    return position != len(data) or b"mdat" not in data


def is_zero_filled(data: bytes) -> bool:
    """A JPEG of a broken download or disk, zeros where its end was: a decoder makes grey pixels of zeros."""
    return data.startswith(b"\xff\xd8") and data.endswith(bytes(64)) and _ends_early(data)


def has_image_signature(data: bytes) -> bool:
    """Whether bytes begin like an image of a kind that is read here."""
    return len(data) >= _SHORTEST_HEADER and format_name(data, READABLE_SIGNATURES) != ""


def format_name(data: bytes, signatures: tuple[tuple[int, bytes, str], ...]) -> str:
    """The name of the first signature that the data have; "" if they have none."""
    return next((name for position, mark, name in signatures if data.startswith(mark, position)), "")


def drawing_format(data: bytes) -> str:
    """The name of a vector format (SVG, ...), or ""."""
    beginning = data[:4096].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    is_svg = beginning.startswith((b"<svg", b"<!doctype svg")) or (
        beginning.startswith((b"<?xml", b"<!--")) and b"<svg" in beginning
    )
    return "an SVG drawing" if is_svg else ""


def can_read_heif() -> bool:
    """Whether pillow_heif is installed; registers it with Pillow."""
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError:
        return False
    return True


def unsupported_message(name: str) -> str:
    """The message for an image of a format that is not read."""
    return f"{name} is not read here; expected JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF"


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
