"""Rows of captions with their images -> Hugging Face's Parquet and WebDataset's tars."""

from __future__ import annotations

import io
import json
import posixpath
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import BinaryIO, Final, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from imcap_ray import storage
from imcap_ray.data.image_formats import file_extension
from imcap_ray.data.image_reading import location_of
from imcap_ray.data.schemas import CaptionRow
from imcap_ray.errors import ImageError
from imcap_ray.exports.captions_rows import (
    BATCH_ROWS,
    COLUMNS,
    NAMED_IMAGES,
    REASONS_LEFT_OUT,
    ExportSummary,
    select_schema,
)
from imcap_ray.exports.image_names import NAME_BYTES, shorten_name
from imcap_ray.exports.sidecar import without_extension
from imcap_ray.exports.text import to_json_line
from imcap_ray.runs.captioned_images import CaptionedImageSource

Format = Literal["coco", "jsonl", "csv", "sidecar", "hf", "webdataset"]

SHARD_IMAGES: Final = 10_000

SHARD_BYTES: Final = 10**9
"""Maximum size of the images in a file, unless it holds only one."""

NAMED_UNREAD: Final = 3
"""Number of images that the error names, of those that a store failed to deliver."""

SHARD_FILE_NAMES: Final = {"hf": "captions-{:05d}.parquet", "webdataset": "captions-{:05d}.tar"}

_ROW_GROUP_IMAGES: Final = 100  # as Hugging Face writes images, because reading one image reads its row group

_ROW_GROUP_BYTES: Final = 32 * 2**20

_EXTENSION_BYTES: Final = 10
"""Maximum length of the extension of a tar's member, without the dot."""


@dataclass(slots=True)
class Unread:
    """Images that a store failed to deliver. The export fails at its end if there are any."""

    number: int = 0
    first: list[str] = field(default_factory=list)
    """Some of them, each with the reason."""

    def describe(self) -> str:
        """The first names, and the number of the others."""
        more = self.number - len(self.first)
        return ", ".join(self.first) + (f" and {more:,} more" if more else "")


def load_row_images(
    rows: Iterator[CaptionRow], images: CaptionedImageSource, summary: ExportSummary, unread: Unread
) -> Iterator[tuple[CaptionRow, bytes]]:
    """The rows with the bytes of their images; rows whose image is missing or has changed are counted in `summary`.

    Raises:
        ImcapError: the store, or the disk of the run's input, is no longer available.
    """
    while chunk := list(islice(rows, BATCH_ROWS)):
        positions = images.find(chunk)
        for row, position, data in zip(chunk, positions, images.load(chunk, positions), strict=True):
            if isinstance(data, ImageError):
                reason = REASONS_LEFT_OUT.get(data.code, data.message)
                if data.code in ("missing", "read_error"):
                    images.require_reachable(location_of(position), data)
                    if data.code == "read_error" and storage.is_uri(location_of(position)):
                        unread.number += 1
                        if len(unread.first) < NAMED_UNREAD:
                            unread.first.append(f"{row['image_id']} ({reason})")
                summary.left_out_without_image += 1
                if len(summary.images_without) < NAMED_IMAGES:
                    summary.images_without.append(f"{row['image_id']} ({reason})")
            else:
                yield row, data
        images.require_still_reachable()


AddImage = Callable[[CaptionRow, bytes], None]


def write_shards(
    images: Iterator[tuple[CaptionRow, bytes]],
    output: str,
    *,
    file_name: str,
    shard_images: int,
    open_shard: Callable[[BinaryIO], AbstractContextManager[AddImage]],
) -> int:
    """Write files of at most `shard_images` images; the number of images.

    The files of an earlier export are removed once there is a first image.

    Args:
        file_name: a format string for the file's number.
    """
    total = 0
    following = next(images, None)
    if following and storage.is_folder(output):
        for earlier in list(storage.list_files(output)):
            storage.remove(earlier.location)
    number = 0
    while following:
        path = storage.join(output, file_name.format(number))
        with storage.replacing(path) as file, open_shard(file) as add:
            num_images = num_bytes = 0
            rest, following = chain([following], images), None
            for row, data in rest:
                if num_images == shard_images or (num_images and num_bytes + len(data) > SHARD_BYTES):
                    following = row, data
                    break
                add(row, data)
                num_images += 1
                num_bytes += len(data)
        number += 1
        total += num_images
    return total


def webdataset_key(image_id: str, *, keep_extension: bool) -> str:
    """The key of an image: its id without the extension, escaped for webdataset; different ids have different keys.

    Characters that would end the key early (a dot in the name), hide it (`__name__`) or point elsewhere (`../`, `//`)
    are written with `%`, as in a URI, and `urllib.parse.unquote` restores them. A name that is too long for a file or
    folder ends with `%-` and a hash; its complete id is in the sample's JSON.

    Args:
        keep_extension: whether the extension is needed to distinguish `a.jpg` from `a.png`.
    """
    path = image_id if keep_extension else without_extension(image_id)
    path = re.sub("[%\x00-\x1f\x7f]", _percent, path)
    path = re.sub("(?:^|(?<=/))/|/$", _percent, path)
    folder, slash, name = path.rpartition("/")
    folder = re.sub(r"(?:^|(?<=/))\.+(?=/|$)", _percent, folder)
    path = re.sub("^_(?=_)", _percent, folder + slash + name.replace(".", "%2E"))
    folder, slash, name = path.rpartition("/")
    folders = "/".join(shorten_name(step) for step in folder.split("/"))  # stays unique: `%-` is in no other key
    return folders + slash + shorten_name(name, NAME_BYTES - _EXTENSION_BYTES - 1)


def _percent(match: re.Match[str]) -> str:
    return "".join(f"%{ord(letter):02X}" for letter in match[0])


def _extension_of(row: CaptionRow) -> str:
    name = row["format"] if row["format"] not in ("", "unknown") else posixpath.splitext(row["image_id"])[1][1:]
    name = file_extension(name.lower())
    return name if re.fullmatch(f"[a-z0-9]{{1,{_EXTENSION_BYTES}}}", name) else "bin"


@contextmanager
def tar_shard(file: BinaryIO, *, key_of: Callable[[str], str]) -> Iterator[AddImage]:
    """A function that adds an image and its caption to a WebDataset tar."""
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:

        def add(row: CaptionRow, data: bytes) -> None:
            key = key_of(row["image_id"])
            for extension, content in (
                (_extension_of(row), data),
                ("txt", row["caption"].encode()),
                ("json", to_json_line(row)),
            ):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))

        yield add


def _hf_feature(column: pa.Field) -> Mapping[str, object]:
    """Hugging Face's name of a column's type."""
    if pa.types.is_list(column.type):
        return {"_type": "Sequence", "feature": {"_type": "Value", "dtype": "string"}}
    return {"_type": "Value", "dtype": "float32" if pa.types.is_float32(column.type) else str(column.type)}


# Images are in the table, as the Hub itself stores them: the folder can be moved and streamed, any names are possible,
# and images without captions do no harm, as they would with `imagefolder`.
_HF_FEATURES: Final[Mapping[str, Mapping[str, object]]] = {
    "image": {"_type": "Image"},
    **{column.name: _hf_feature(column) for column in select_schema(COLUMNS)},
}

_HF_SCHEMA: Final = pa.schema(
    [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), *select_schema(COLUMNS)],
    metadata={"huggingface": json.dumps({"info": {"features": _HF_FEATURES}})},
)


@contextmanager
def parquet_shard(file: BinaryIO) -> Iterator[AddImage]:
    """A function that adds an image and its caption to a Parquet file as Hugging Face's datasets reads it."""
    waiting: list[Mapping[str, object]] = []
    num_bytes = 0
    # Images are neither repeated nor compressible.
    with pq.ParquetWriter(file, _HF_SCHEMA, use_dictionary=["status", "format"]) as writer:

        def write() -> None:
            nonlocal num_bytes
            writer.write_table(pa.Table.from_pylist(waiting, _HF_SCHEMA))
            waiting.clear()
            num_bytes = 0

        def add(row: CaptionRow, data: bytes) -> None:
            nonlocal num_bytes
            if len(waiting) == _ROW_GROUP_IMAGES or num_bytes + len(data) > _ROW_GROUP_BYTES:
                write()
            waiting.append({"image": {"bytes": data, "path": row["image_id"]}, **row})
            num_bytes += len(data)

        yield add
        write()
