"""The table of image formats: name, signatures, file extensions, reader, and what cannot be read.

A format is added with one `ImageFormat` in `FORMATS`. Knows neither pixels nor files.
"""

from __future__ import annotations

import importlib
import mimetypes
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

# Markers of a JPEG that a length follows: all but fill bytes, restart markers, and those of start and end.
JPEG_SEGMENT: Final = re.compile(rb"\xff[^\x00\x01\xd0-\xd9\xff]")

SHORTEST_HEADER: Final = 32
"""In bytes. Shorter data that begin like an image are the beginning of one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFormat:
    """One image format, or one kind of file that people take for an image."""

    name: str
    """Name in the column `format` and in messages: Pillow's name in lower case."""
    reader: str = ""
    """Pillow's name of the reader; "" if there is none."""
    unreadable: str = ""
    """Description for the error message of a format that is not read, or not without `package`; "" if it is read."""
    package: str = ""
    """Optional package that adds the reader to Pillow with `register_<name>_opener`."""
    signatures: tuple[tuple[int, bytes], ...] = ()
    """Offsets and the bytes there; one of them is enough."""
    trailer: bytes = b""
    """Last bytes of the file, for a format without a signature; without them the reader is not tried."""
    matches_text: Callable[[bytes], bool] | None = None
    """Recognises a text format, which has no signature."""
    extensions: tuple[str, ...] = ()
    """Extensions by which files of a folder or tar are recognised as images; the first one is used for exports. Without
    any, files of this format are documents or data rather than images, and are not listed."""
    other_names: tuple[str, ...] = ()
    """Pillow's names of variants that have the same file extension."""
    has_variants: bool = False
    """Whether the format has many variants. A header that Pillow refuses then more likely means an unsupported variant
    than a damaged file."""
    ends_early: Callable[[bytes], bool] | None = None
    """Whether the end marker is missing, or the declared length exceeds the data. Called only for data that did not
    decode without complaint, because GIFs without an end marker often have all their pixels."""


def _jpeg_ends_early(data: bytes) -> bool:
    return end_of_jpeg(data) < 0


def end_of_jpeg(data: bytes) -> int:
    """Position of the first picture's end marker, or -1. Thumbnails in the header, and data that follow the picture,
    have end markers of their own."""
    position = 2
    while segment := JPEG_SEGMENT.search(data, position):
        if segment[0] == b"\xff\xda":  # pixels, in which every ff is followed by 0 or by a restart marker
            return data.find(b"\xff\xd9", segment.end())
        position = segment.end() + int.from_bytes(data[segment.end() : segment.end() + 2], "big")
    is_complete = b"\xff\xda" in data and data.endswith(b"\xff\xd9")  # but with a wrong length in its header
    return len(data) - 2 if is_complete else -1


def _tiff_ends_early(data: bytes) -> bool:
    order: Literal["little", "big"] = "little" if data.startswith(b"I") else "big"
    start = int.from_bytes(data[4:8], order)
    num_entries = int.from_bytes(data[start : start + 2], order)
    return start + 2 + 12 * num_entries + 4 > len(data)  # two bytes of count, the entries, the next directory


def _ico_ends_early(data: bytes) -> bool:
    num_icons = int.from_bytes(data[4:6], "little")
    if 6 + 16 * num_icons > len(data):
        return True
    return any(size + start > len(data) for size, start in struct.iter_unpack("<8xII", data[6 : 6 + 16 * num_icons]))


def _boxes_end_early(data: bytes) -> bool:
    position = 0
    while position + 8 <= len(data):
        size = int.from_bytes(data[position : position + 4], "big")
        if size < 8:  # 0: to the end of the file, 1: a box beyond 4 GB
            return False
        position += size
    return position != len(data) or b"mdat" not in data


def _jpeg2000_ends_early(data: bytes) -> bool:
    # Searched from the start of the picture, because a colour profile may precede it.
    return data.find(b"\xff\xd9", data.find(b"\xff\x4f\xff\x51")) < 0


def _is_svg(data: bytes) -> bool:
    beginning = data[:4096].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return beginning.startswith((b"<svg", b"<!doctype svg")) or (
        beginning.startswith((b"<?xml", b"<!--")) and b"<svg" in beginning
    )


FORMATS: Final[tuple[ImageFormat, ...]] = (
    # Formats that are read; Pillow tries their readers in this order. Pillow reads more. Left out are readers that run
    # a program (EPS runs Ghostscript), that only recognise a file without reading it (HDF5, GRIB, MPEG), or that lack
    # a signature and take noise for pixels.
    ImageFormat(
        name="jpeg",
        reader="JPEG",
        signatures=((0, b"\xff\xd8\xff"),),
        extensions=("jpg", "jpeg", "jpe", "jfif", "jif", "mpo"),
        other_names=("mpo",),
        ends_early=_jpeg_ends_early,
    ),
    ImageFormat(
        name="png",
        reader="PNG",
        signatures=((0, b"\x89PNG"),),
        extensions=("png", "apng"),
        ends_early=lambda data: b"IEND" not in data,
    ),
    ImageFormat(
        name="webp",
        reader="WEBP",
        signatures=((8, b"WEBP"),),
        extensions=("webp",),
        ends_early=lambda data: 8 + int.from_bytes(data[4:8], "little") > len(data),
    ),
    ImageFormat(
        name="gif",
        reader="GIF",
        signatures=((0, b"GIF8"),),
        extensions=("gif",),
        ends_early=lambda data: not data.rstrip(b"\0").endswith(b";"),
    ),
    ImageFormat(
        name="bmp",
        reader="BMP",
        signatures=((0, b"BM"),),
        extensions=("bmp", "dib"),
        has_variants=True,
        ends_early=lambda data: int.from_bytes(data[2:6], "little") > len(data),
    ),
    ImageFormat(
        name="tiff",
        reader="TIFF",
        signatures=((0, b"II*\0"), (0, b"MM\0*"), (0, b"II+\0"), (0, b"MM\0+")),
        extensions=("tif", "tiff"),
        has_variants=True,
        ends_early=_tiff_ends_early,
    ),
    ImageFormat(
        name="avif",
        reader="AVIF",
        signatures=((4, b"ftypavif"), (4, b"ftypavis")),
        extensions=("avif", "avifs"),
        has_variants=True,
        ends_early=_boxes_end_early,
    ),
    ImageFormat(
        name="jpeg2000",
        reader="JPEG2000",
        signatures=((0, b"\0\0\0\x0cjP  "), (0, b"\xff\x4f\xff\x51")),
        extensions=("jp2", "j2k", "jpf", "jpx", "j2c", "jpc"),
        has_variants=True,
        ends_early=_jpeg2000_ends_early,
    ),
    ImageFormat(
        name="ico", reader="ICO", signatures=((0, b"\0\0\1\0"),), extensions=("ico",), ends_early=_ico_ends_early
    ),
    ImageFormat(name="ppm", reader="PPM", extensions=("ppm", "pgm", "pbm", "pnm", "pfm")),
    ImageFormat(name="psd", reader="PSD", signatures=((0, b"8BPS\0\1"),), extensions=("psd",), has_variants=True),
    ImageFormat(name="qoi", reader="QOI", signatures=((0, b"qoif"),), extensions=("qoi",)),
    ImageFormat(
        name="icns",
        reader="ICNS",
        signatures=((0, b"icns"),),
        extensions=("icns",),
        ends_early=lambda data: int.from_bytes(data[4:8], "big") > len(data),
    ),
    ImageFormat(name="cur", reader="CUR", extensions=("cur",)),
    ImageFormat(name="dds", reader="DDS", signatures=((0, b"DDS "),), extensions=("dds",), has_variants=True),
    ImageFormat(name="pcx", reader="PCX", extensions=("pcx",)),
    ImageFormat(name="sgi", reader="SGI", extensions=("sgi",)),
    ImageFormat(name="sun", reader="SUN", extensions=("ras",)),
    ImageFormat(name="xbm", reader="XBM", extensions=("xbm",)),
    ImageFormat(name="xpm", reader="XPM", extensions=("xpm",)),
    ImageFormat(
        name="heif",
        reader="HEIF",
        unreadable="a HEIC image",
        package="pillow_heif",
        signatures=((4, b"ftyphe"), (4, b"ftypmif1"), (4, b"ftypmsf1")),
        extensions=("heif", "heic", "hif", "heifs", "heics"),
        has_variants=True,
        ends_early=_boxes_end_early,
    ),
    ImageFormat(name="tga", reader="TGA", trailer=b"TRUEVISION-XFILE.\0", extensions=("tga",)),
    # Formats that are not read, because Pillow has no reader for them or reads only a preview of them.
    ImageFormat(name="pdf", unreadable="a PDF document", signatures=((0, b"%PDF"),)),
    ImageFormat(name="eps", unreadable="a PostScript drawing", signatures=((0, b"%!PS"), (0, b"\xc5\xd0\xd3\xc6"))),
    ImageFormat(
        name="cr2",
        unreadable="a Canon camera raw file",
        signatures=((8, b"CR\x02"), (4, b"ftypcrx "), (6, b"HEAPCCDR")),
        extensions=("cr2", "cr3", "crw"),
    ),
    ImageFormat(
        name="raf",
        unreadable="a Fujifilm camera raw file",
        signatures=((0, b"FUJIFILMCCD-RAW"),),
        extensions=("raf",),
    ),
    ImageFormat(
        name="orf",
        unreadable="an Olympus camera raw file",
        signatures=((0, b"IIRO"), (0, b"IIRS"), (0, b"MMOR")),
        extensions=("orf",),
    ),
    ImageFormat(name="rw2", unreadable="a Panasonic camera raw file", signatures=((0, b"IIU\0"),), extensions=("rw2",)),
    ImageFormat(name="x3f", unreadable="a Sigma camera raw file", signatures=((0, b"FOVb"),), extensions=("x3f",)),
    ImageFormat(name="mrw", unreadable="a Minolta camera raw file", signatures=((0, b"\0MRM"),), extensions=("mrw",)),
    # Other camera raw files are TIFFs, recognised by the preview that is their first picture.
    ImageFormat(
        name="raw",
        unreadable="a camera raw file",
        extensions=(
            *("dng", "nef", "nrw", "arw", "srf", "sr2", "pef", "srw", "rwl", "3fr", "fff", "iiq", "mef", "mos", "erf"),
            *("kdc", "dcr", "gpr"),
        ),
    ),
    ImageFormat(
        name="jxl",
        unreadable="a JPEG XL image",
        signatures=((0, b"\xff\x0a"), (0, b"\0\0\0\x0cJXL ")),
        extensions=("jxl",),
    ),
    ImageFormat(
        name="jxr", unreadable="a JPEG XR image", signatures=((0, b"II\xbc"),), extensions=("jxr", "wdp", "hdp")
    ),
    ImageFormat(
        name="psb", unreadable="a large Photoshop document (PSB)", signatures=((0, b"8BPS\0\2"),), extensions=("psb",)
    ),
    ImageFormat(name="xcf", unreadable="a GIMP document", signatures=((0, b"gimp xcf"),), extensions=("xcf",)),
    ImageFormat(name="exr", unreadable="an OpenEXR image", signatures=((0, b"v/1\1"),), extensions=("exr",)),
    # The first bytes decide on .hdr, which is also the extension of other data's headers.
    ImageFormat(name="hdr", unreadable="a Radiance image", signatures=((0, b"#?RADIANCE"),), extensions=("rgbe",)),
    ImageFormat(name="djvu", unreadable="a DjVu document", signatures=((0, b"AT&TFORM"),)),
    ImageFormat(name="fits", unreadable="a FITS image", signatures=((0, b"SIMPLE  ="),)),
    ImageFormat(name="hdf5", unreadable="an HDF5 file", signatures=((0, b"\x89HDF"),)),
    ImageFormat(name="wmf", unreadable="a Windows metafile", signatures=((0, b"\xd7\xcd\xc6\x9a"), (40, b" EMF"))),
    ImageFormat(name="svg", unreadable="an SVG drawing", matches_text=_is_svg, extensions=("svg",)),
)

IMAGE_EXTENSIONS: Final = frozenset(extension for one in FORMATS for extension in one.extensions)
"""Files with these extensions are listed as images; what a file really holds shows when it is decoded."""

_UNREADABLE_EXTENSIONS: Final = IMAGE_EXTENSIONS.difference(*(one.extensions for one in FORMATS if one.reader))

# Extensions of files that are not images. The machine's own list of types is left out, because machines differ.
_OTHER_EXTENSIONS: Final = frozenset(
    extension[1:]
    for extension, kind in mimetypes.MimeTypes().types_map[True].items()
    if not kind.startswith("image/") and kind != "application/octet-stream"
) | {
    *("caption", "md", "log", "yaml", "yml", "toml", "jsonl", "ndjson", "xmp", "aae", "ipynb", "db"),
    *("parquet", "parq", "pq", "arrow", "npy", "npz", "pkl", "pt", "pth", "safetensors"),
    *("gz", "tgz", "bz2", "xz", "zst", "7z", "rar", "mkv", "m4v", "mts", "m2ts", "m4a", "flac", "ogg"),
}

_NAS_THUMBNAILS: Final = "@eaDir"
"""Name of the folders in which a Synology NAS keeps thumbnails."""

_BY_NAME: Final = {name: one for one in FORMATS for name in (one.name, *one.other_names)}

# Flat, because every image is compared with all signatures.
_SIGNATURES: Final = tuple((*mark, one) for one in FORMATS if one.reader for mark in one.signatures)

_UNREADABLE_SIGNATURES: Final = tuple((*mark, one) for one in FORMATS if not one.reader for mark in one.signatures)

_CONDITIONAL: Final = tuple(one for one in FORMATS if one.reader and (one.package or one.trailer))

_UNCONDITIONAL: Final = tuple(one.reader for one in FORMATS if one.reader and one not in _CONDITIONAL)

_UNREADABLE_TEXTS: Final = tuple((one.matches_text, one) for one in FORMATS if not one.reader and one.matches_text)


def extension_of(path: str) -> str:
    """The part of a file's name behind its last dot, in lower case; "" without a dot."""
    name = path.rpartition("/")[2]
    return name.rpartition(".")[2].lower() if "." in name else ""


def is_image_name(path: str) -> bool:
    """Whether a file is listed as an image, by its name. Hidden files are not."""
    return extension_of(path) in IMAGE_EXTENSIONS and not path.rpartition("/")[2].startswith(".")


def may_be_image(path: str) -> bool:
    """Whether only its content tells if a file is an image, because its extension is missing or unknown."""
    extension = extension_of(path)
    is_known = extension in IMAGE_EXTENSIONS or extension in _OTHER_EXTENSIONS
    return not is_known and not path.rpartition("/")[2].startswith(".")


def is_hidden_folder(name: str) -> bool:
    """Whether the folders of this name are left out of listings, like hidden files."""
    return name == _NAS_THUMBNAILS or (name.startswith(".") and name not in (".", ".."))


def is_in_hidden_folder(name: str) -> bool:
    """Whether a file is in a hidden folder, by its name relative to the listed folder or in a tar."""
    return any(map(is_hidden_folder, name.split("/")[:-1]))


def readable_names(names: list[str]) -> list[str]:
    """The names of images that share a caption, without camera raw files next to their JPEG and other formats that are
    not read; all names if there are only such."""
    return [name for name in names if extension_of(name) not in _UNREADABLE_EXTENSIONS] or names


def file_extension(format_name: str) -> str:
    """The extension of files of a format, without the dot; the name itself for formats without a usual extension."""
    known = _BY_NAME.get(format_name)
    return known.extensions[0] if known and known.extensions else format_name


def identify(data: bytes) -> ImageFormat | None:
    """The format that is read, perhaps with an optional package, and whose signature the data have."""
    return next((one for offset, magic, one in _SIGNATURES if data.startswith(magic, offset)), None)


def identify_unreadable(data: bytes) -> ImageFormat | None:
    """The format that is never read and whose signature the data have."""
    for offset, magic, one in _UNREADABLE_SIGNATURES:
        if data.startswith(magic, offset):
            return one
    return next((one for matches, one in _UNREADABLE_TEXTS if matches(data)), None)


def has_image_signature(data: bytes) -> bool:
    """Whether data begin like an image of a format that is read."""
    return len(data) >= SHORTEST_HEADER and identify(data) is not None


def begins_like_image(data: bytes) -> bool:
    """Whether data begin like an image of any format, read or not, rather than like a document."""
    if data.startswith(b"BM") and data[6:10] != bytes(4):  # a text; a bitmap has zeros there
        return False
    known = identify(data) or identify_unreadable(data)
    return len(data) >= SHORTEST_HEADER and known is not None and bool(known.extensions)


def ends_early(data: bytes) -> bool:
    """Whether the data end before the picture does, see `ImageFormat.ends_early`."""
    known = identify(data)
    return known is not None and known.ends_early is not None and known.ends_early(data)


def readers(data: bytes) -> list[str]:
    """Pillow's names of the readers that may open the data."""
    return [*_UNCONDITIONAL, *(one.reader for one in _CONDITIONAL if _may_read(one, data))]


def _may_read(image_format: ImageFormat, data: bytes) -> bool:
    if image_format.trailer:
        return data.endswith(image_format.trailer)
    return identify(data) is image_format and is_installed(image_format)


def is_installed(image_format: ImageFormat) -> bool:
    """Whether the format's optional package is installed; registers it with Pillow."""
    try:
        package = importlib.import_module(image_format.package)
        getattr(package, f"register_{image_format.name}_opener")()
    except ImportError:  # registering imports the package's compiled part
        return False
    return True
