"""Rows with their images -> Hugging Face's Parquet and WebDataset's tars."""

from __future__ import annotations

import hashlib
import io
import json
import posixpath
import re
import tarfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, BinaryIO, Final, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from imcap_ray import storage
from imcap_ray.data.image_formats import file_extension
from imcap_ray.data.image_reading import location_of
from imcap_ray.errors import ImageError
from imcap_ray.exports.captions_rows import (
    BATCH_ROWS,
    COLUMNS,
    NAMED_IMAGES,
    REASONS_LEFT_OUT,
    ExportSummary,
    Row,
    select_schema,
)
from imcap_ray.exports.sidecar import without_extension
from imcap_ray.exports.text import to_json_line
from imcap_ray.runs.captioned_images import CaptionedImageSource

Format = Literal["coco", "jsonl", "csv", "sidecar", "hf", "webdataset"]

SHARD_IMAGES: Final = 10_000

SHARD_BYTES: Final = 10**9
"""A file of images that has reached this size is full, however few they are."""

NAMED_UNREAD: Final = 3
"""How many of the images that a store failed to deliver the error names."""

SHARD_FILE_NAMES: Final = {"hf": "captions-{:05d}.parquet", "webdataset": "captions-{:05d}.tar"}

_ROW_GROUP_IMAGES: Final = 100  # as Hugging Face writes images: a reader that wants one reads no more than these

_ROW_GROUP_BYTES: Final = 32 * 2**20

_NAME_BYTES: Final = 255
"""Longest name of a file or folder on the usual file systems, to which a tar is extracted."""

_EXTENSION_BYTES: Final = 10
"""Longest extension of a member of a tar, without its dot."""

_DIGEST_LETTERS: Final = 24


# --- images with their captions
@dataclass(slots=True)
class Unread:
    """Images that a store failed to deliver. An export without them fails at its end."""

    number: int = 0
    first: list[str] = field(default_factory=list)
    """Some of them, each with the reason."""

    def describe(self) -> str:
        """The first names, and how many more there are."""
        more = self.number - len(self.first)
        return ", ".join(self.first) + (f" and {more:,} more" if more else "")


def load_row_images(
    rows: Iterator[Row], images: CaptionedImageSource, summary: ExportSummary, unread: Unread
) -> Iterator[tuple[Row, bytes]]:
    """The rows with the bytes of their images; those whose image is not there as it was are counted in `summary`.

    Raises:
        ImcapError: the store, or the disk of the run's input, is gone.
    """
    while chunk := list(islice(rows, BATCH_ROWS)):
        places = images.find(chunk)
        for row, place, data in zip(chunk, places, images.load(chunk, places), strict=True):
            if isinstance(data, ImageError):
                reason = REASONS_LEFT_OUT.get(data.code, data.message)
                if data.code in ("missing", "read_error"):
                    images.require_reachable(location_of(place), data)
                    if data.code == "read_error" and storage.is_uri(location_of(place)):
                        unread.number += 1
                        if len(unread.first) < NAMED_UNREAD:
                            unread.first.append(f"{row['image_id']} ({reason})")
                summary.left_out_without_image += 1
                if len(summary.images_without) < NAMED_IMAGES:
                    summary.images_without.append(f"{row['image_id']} ({reason})")
            else:
                yield row, data
        images.require_still_reachable()


AddImage = Callable[[Row, bytes], None]


def write_shards(
    images: Iterator[tuple[Row, bytes]],
    output: str,
    *,
    format: str,
    shard_images: int,
    open_shard: Callable[[BinaryIO], AbstractContextManager[AddImage]],
) -> int:
    """Files of so many images; how many images. The files of an earlier export go when there is a first image."""
    total = 0
    following = next(images, None)
    if following and storage.is_folder(output):
        for earlier in list(storage.list_files(output)):
            storage.remove(earlier.location)
    number = 0
    while following:
        path = storage.join(output, SHARD_FILE_NAMES[format].format(number))
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
    """What webdataset knows an image by: its id without the extension, as that library can bear it; one for each id.

    What would end the key early (a dot in the name), hide it (`__name__`) or lead elsewhere (`../`, `//`) is written
    with `%`, as in a URI: `urllib.parse.unquote` gives the name back. A name too long to be a file's or a folder's ends
    with `%-` and a hash; its whole id is in the sample's JSON.

    Args:
        keep_extension: whether `a.jpg` and `a.png` are both there and are to be told apart.
    """
    path = image_id if keep_extension else without_extension(image_id)
    path = re.sub("[%\x00-\x1f\x7f]", _percent, path)
    path = re.sub("(?:^|(?<=/))/|/$", _percent, path)
    folder, slash, name = path.rpartition("/")
    folder = re.sub(r"(?:^|(?<=/))\.+(?=/|$)", _percent, folder)
    path = re.sub("^_(?=_)", _percent, folder + slash + name.replace(".", "%2E"))
    folder, slash, name = path.rpartition("/")
    folders = "/".join(_shortened(step, _NAME_BYTES) for step in folder.split("/"))
    return folders + slash + _shortened(name, _NAME_BYTES - _EXTENSION_BYTES - 1)


def _shortened(name: str, max_bytes: int) -> str:
    """The name, or if it is longer its beginning and a hash. No other name becomes the same: `%-` is in no key else."""
    if len(name.encode("utf-8", "surrogatepass")) <= max_bytes:
        return name
    ending = f"%-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:_DIGEST_LETTERS]}"
    beginning = name.encode("utf-8", "surrogatepass")[: max_bytes - len(ending)].decode("utf-8", "ignore")
    return re.sub("%[0-9A-F]?$", "", beginning) + ending  # not half of an escape


def _percent(found: re.Match[str]) -> str:
    return "".join(f"%{ord(letter):02X}" for letter in found[0])


def _extension_of(row: Row) -> str:
    name = row["format"] if row["format"] not in ("", "unknown") else posixpath.splitext(row["image_id"])[1][1:]
    name = file_extension(name.lower())
    return name if re.fullmatch(f"[a-z0-9]{{1,{_EXTENSION_BYTES}}}", name) else "bin"


@contextmanager
def tar_shard(file: BinaryIO, *, key_of: Callable[[str], str]) -> Iterator[AddImage]:
    """A function that adds an image and its caption to a WebDataset tar."""
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:

        def add(row: Row, data: bytes) -> None:
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


def _hf_feature(column: pa.Field) -> dict[str, Any]:
    """Hugging Face's name of a column's type."""
    if pa.types.is_list(column.type):
        return {"_type": "Sequence", "feature": {"_type": "Value", "dtype": "string"}}
    return {"_type": "Value", "dtype": "float32" if pa.types.is_float32(column.type) else str(column.type)}


# The images stand in the table, as the Hub itself keeps them: the folder can be moved and streamed, names may be
# anything, and images that were not captioned are not in the way, as they are for `imagefolder`.
_HF_FEATURES: Final = {"image": {"_type": "Image"}} | {
    column.name: _hf_feature(column) for column in select_schema(COLUMNS)
}

_HF_SCHEMA: Final = pa.schema(
    [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), *select_schema(COLUMNS)],
    metadata={"huggingface": json.dumps({"info": {"features": _HF_FEATURES}})},
)


@contextmanager
def parquet_shard(file: BinaryIO) -> Iterator[AddImage]:
    """A function that adds an image and its caption to a Parquet file as Hugging Face's datasets reads it."""
    waiting: list[Row] = []
    num_bytes = 0
    # Images do not repeat, and are compressed already.
    with pq.ParquetWriter(file, _HF_SCHEMA, use_dictionary=["status", "format"]) as writer:

        def write() -> None:
            nonlocal num_bytes
            writer.write_table(pa.Table.from_pylist(waiting, _HF_SCHEMA))
            waiting.clear()
            num_bytes = 0

        def add(row: Row, data: bytes) -> None:
            nonlocal num_bytes
            if len(waiting) == _ROW_GROUP_IMAGES or num_bytes + len(data) > _ROW_GROUP_BYTES:
                write()
            waiting.append({"image": {"bytes": data, "path": row["image_id"]}, **row})
            num_bytes += len(data)

        yield add
        write()
