"""The tables: the Arrow schemas of a row in (the manifest) and a row out (the captions), an input -> its manifest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from imcap_ray import storage
from imcap_ray.errors import InputError

SCHEMA_VERSION: Final = "1"

MANIFEST_SCHEMA: Final = pa.schema(
    [
        # Position of the image in the manifest: 0, 1, 2, ... Ray's progress is kept by this number,
        # for eight bytes an image are affordable at 100 million images and strings are not.
        ("manifest_id", pa.int64()),
        ("image_id", pa.string()),
        ("image_path", pa.string()),  # "" when the bytes are in a table
        ("table_path", pa.string()),  # "" when the image is a file of its own
        ("row_group", pa.int32()),  # of `table_path`; -1 for a file
        ("row", pa.int32()),  # within `row_group`; -1 for a file
    ]
)

CAPTIONS_SCHEMA: Final = pa.schema(
    [
        ("image_id", pa.string()),
        ("image_path", pa.string()),
        ("caption", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("confidence", pa.float32()),
        ("logprob", pa.float32()),
        ("num_tokens", pa.int16()),
        ("status", pa.string()),
        ("error_code", pa.string()),
        ("error_message", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("format", pa.string()),
        ("sha256", pa.string()),
        ("duplicate_of", pa.string()),
    ]
)

OK: Final = "ok"
FAILED: Final = "failed"
DUPLICATE: Final = "duplicate"

IMAGE_EXTENSIONS: Final = frozenset(
    [
        "avif",
        "bmp",
        "dib",
        "gif",
        "heic",
        "heif",
        "ico",
        "j2k",
        "jfif",
        "jp2",
        "jpe",
        "jpeg",
        "jpg",
        "pbm",
        "pcx",
        "pgm",
        "png",
        "pnm",
        "ppm",
        "psd",
        "qoi",
        "svg",
        "tga",
        "tif",
        "tiff",
        "webp",
    ]
)
"""File names that are taken for images in a folder; what a file really holds is found by decoding it."""

ROWS_PER_PART: Final = 100_000

_ID_COLUMNS: Final = ("image_id", "__key__", "key", "id")
_BYTES_COLUMNS: Final = (
    "image",
    "image_bytes",
    "img",
    "jpg",
    "jpeg",
    "png",
    "webp",
    "bytes",
    "content",
    "data",
)
_PATH_COLUMNS: Final = (
    "image_path",
    "path",
    "file_path",
    "filepath",
    "file_name",
    "filename",
    "image",
    "file",
    "uri",
)


@dataclass(frozen=True, slots=True)
class ImageColumn:
    """Where a Parquet table keeps its images."""

    name: str
    kind: str
    """`bytes`; `path`; `struct`: Hugging Face's struct of bytes and path."""


@dataclass(frozen=True, slots=True)
class InputSummary:
    """What a manifest was made of, in words for the user."""

    num_images: int
    num_ignored: int
    """Files whose names are not those of images."""
    description: str


def find_image_column(schema: pa.Schema, location: str) -> ImageColumn:
    """The column that holds the images of a Parquet table; InputError naming the columns when there is none."""
    structs = [f.name for f in schema if pa.types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
    binaries = [f.name for f in schema if pa.types.is_binary(f.type) or pa.types.is_large_binary(f.type)]
    strings = [f.name for f in schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
    for kind, found, known in (
        ("struct", structs, _BYTES_COLUMNS),
        ("bytes", binaries, _BYTES_COLUMNS),
        ("path", strings, _PATH_COLUMNS),
    ):
        named = [name for name in known if name in found]
        if named or (len(found) == 1 and kind != "path"):
            return ImageColumn(name=(named or found)[0], kind=kind)
    columns = ", ".join(f"{f.name} ({f.type})" for f in schema)
    raise InputError(
        f"{location} has no column of images: expected bytes ({', '.join(_BYTES_COLUMNS)}), paths "
        f"({', '.join(_PATH_COLUMNS)}) or a struct of bytes and path; got {columns}"
    )


def build_manifest(location: str, folder: str, *, recursive: bool = True, limit: int | None = None) -> InputSummary:
    """Write the manifest of the images at `location` (a folder, an image or Parquet) to Parquet files in `folder`.

    Images that a manifest already in `folder` lists keep their `manifest_id`; new ones are added behind them.

    Raises:
        InputError: nothing there, nothing readable, or no image among it.
    """
    location = storage.absolute(location)
    if not storage.exists(location):
        raise InputError(f"no such input: {location}")
    tables, ignored = _list_tables(location, recursive)
    if tables:
        entries: Iterable[dict[str, Any]] = _table_entries(location, tables)
        description = f"Parquet, {len(tables)} file{'s' * (len(tables) != 1)}"
    else:
        counter = _IgnoredFiles()
        entries = _file_entries(location, recursive, counter)
        description = "folder" if storage.is_folder(location) else "image"
    known, next_id = _read_known_ids(folder)
    num_images = 0
    entries = islice(entries, limit)
    while chunk := list(islice(entries, ROWS_PER_PART)):
        num_images += len(chunk)
        rows = pa.Table.from_pylist(chunk, schema=MANIFEST_SCHEMA.remove(0))
        if known is not None:
            rows = rows.filter(pc.invert(pc.is_in(rows["image_id"], value_set=known)))
        if rows.num_rows:
            ids = pa.array(range(next_id, next_id + rows.num_rows), pa.int64())
            rows = rows.add_column(0, MANIFEST_SCHEMA.field(0), ids).cast(MANIFEST_SCHEMA)
            storage.make_folder(folder)
            sink = pa.BufferOutputStream()
            pq.write_table(rows, sink, compression="zstd")
            storage.write_bytes(storage.join(folder, f"part-{next_id:012d}.parquet"), sink.getvalue().to_pybytes())
            next_id += rows.num_rows
    if not tables:
        ignored = counter.number
    if not num_images:
        seen = f"{ignored:,} other file{'s' * (ignored != 1)}" if ignored else "nothing"
        raise InputError(f"no images in {location}: found {seen} there; images are known by names like .jpg or .png")
    return InputSummary(num_images=num_images, num_ignored=ignored, description=description)


def read_table_images(table_path: str, *, row_group: int, rows: set[int]) -> Iterator[tuple[int, bytes | None]]:
    """The bytes of some rows of a row group, with their numbers; None where the table holds none.

    A few images are in memory at a time, however large the row group is.
    """
    filesystem, path = storage.resolve(table_path)
    with filesystem.open_input_file(path) as stream, pq.ParquetFile(stream) as table:
        column = find_image_column(table.schema_arrow, table_path)
        number = 0
        for batch in table.iter_batches(batch_size=16, row_groups=[row_group], columns=[column.name]):
            for value in batch.column(0):
                if number in rows:
                    yield number, _bytes_of(value.as_py(), table_path)
                number += 1


def _bytes_of(value: Any, table_path: str) -> bytes | None:
    if not isinstance(value, dict):
        return value  # type: ignore[no-any-return]
    if value.get("bytes") is None and value.get("path"):
        return storage.read_bytes(_beside(table_path, value["path"]))
    return value.get("bytes")


def _beside(table_path: str, path: str) -> str:
    """A path from a table: relative ones start at the table's folder."""
    if storage.is_uri(path) or path.startswith("/"):
        return path
    return storage.join(storage.parent(table_path), path)


class _IgnoredFiles:
    def __init__(self) -> None:
        self.number = 0


def _extension(name: str) -> str:
    return name.rpartition(".")[2].lower() if "." in name else ""


def _is_image(name: str) -> bool:
    return _extension(name) in IMAGE_EXTENSIONS and not name.rpartition("/")[2].startswith(".")


def _list_tables(location: str, recursive: bool) -> tuple[list[str], int]:
    """The Parquet files of an input, and the number of files beside them; none when it is a folder of images."""
    if storage.is_file(location):
        return ([location] if _extension(location) == "parquet" else []), 0
    tables: list[str] = []
    others = 0
    for path, name in storage.list_files(location, recursive=recursive):
        if _is_image(name):
            return [], 0  # images are what an input is for: a table among them is not one
        if _extension(name) == "parquet" and not name.rpartition("/")[2].startswith(("_", ".")):
            tables.append(path)
        else:
            others += 1
    return tables, others


def _file_entries(location: str, recursive: bool, ignored: _IgnoredFiles) -> Iterator[dict[str, Any]]:
    found = (
        [(location, location.rpartition("/")[2])]
        if storage.is_file(location)
        else storage.list_files(location, recursive=recursive)
    )
    for path, name in found:
        if _is_image(name):
            yield _entry(name, path)
        else:
            ignored.number += 1


def _entry(image_id: str, image_path: str, table_path: str = "", row_group: int = -1, row: int = -1) -> dict[str, Any]:
    return {
        "image_id": image_id,
        "image_path": image_path,
        "table_path": table_path,
        "row_group": row_group,
        "row": row,
    }


def _table_entries(location: str, tables: list[str]) -> Iterator[dict[str, Any]]:
    ids, is_explicit = _natural_ids(tables)
    distinct = pc.count_distinct(ids, mode="all").as_py() if ids is not None else -1
    if ids is not None and distinct != len(ids) and is_explicit:
        counts = pc.value_counts(ids)
        repeated = next(entry["values"].as_py() for entry in counts if entry["counts"].as_py() > 1)
        raise InputError(f"{location}: image ids must be unique, but {repeated!r} stands there more than once")
    natural = iter(ids.to_pylist()) if ids is not None and distinct == len(ids) and not ids.null_count else None
    for table_path in tables:
        name = table_path.rpartition("/")[2] if table_path == location else table_path[len(location) + 1 :]
        first_row = 0
        for row_group, num_rows, paths in _row_groups(table_path):
            for row in range(num_rows):
                image_id = next(natural) if natural else f"{name}#{first_row + row}"
                if paths is None:
                    yield _entry(image_id, "", table_path, row_group, row)
                else:
                    yield _entry(image_id, _beside(table_path, paths[row] or ""))
            first_row += num_rows


@contextmanager
def _open_table(table_path: str) -> Iterator[pq.ParquetFile]:
    filesystem, path = storage.resolve(table_path)
    try:
        with filesystem.open_input_file(path) as stream, pq.ParquetFile(stream) as table:
            yield table
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{table_path} is not readable Parquet: {error}") from error


def _row_groups(table_path: str) -> Iterator[tuple[int, int, list[str | None] | None]]:
    """Number, rows and, where the images are paths, the paths of each row group."""
    with _open_table(table_path) as table:
        column = find_image_column(table.schema_arrow, table_path)
        for row_group in range(table.num_row_groups):
            num_rows = table.metadata.row_group(row_group).num_rows
            paths = None
            if column.kind == "path":
                paths = table.read_row_group(row_group, columns=[column.name]).column(0).to_pylist()
            yield row_group, num_rows, paths


def _natural_ids(tables: list[str]) -> tuple[pa.ChunkedArray | None, bool]:
    """The ids the tables have of their own, and whether from an id column (or from paths); None when they have none."""
    chunks: list[pa.Array] = []
    is_explicit = False
    for table_path in tables:
        with _open_table(table_path) as table:
            schema = table.schema_arrow
            column = find_image_column(schema, table_path)
            id_column = next((name for name in _ID_COLUMNS if name in schema.names), None)
            is_explicit = is_explicit or id_column is not None
            if id_column is None and column.kind == "struct":
                id_column = f"{column.name}.path"
                if schema.field(column.name).type.get_field_index("path") < 0:
                    return None, False
            elif id_column is None and column.kind == "path":
                id_column = column.name
            elif id_column is None:
                return None, False
            values = table.read(columns=[id_column]).column(0)
        if pa.types.is_struct(values.type):
            values = pc.struct_field(values, "path")
        chunks.extend(values.cast(pa.string()).chunks)
    return pa.chunked_array(chunks, pa.string()), is_explicit


def _read_known_ids(folder: str) -> tuple[pa.ChunkedArray | None, int]:
    """The image ids of the manifest in `folder`, and the first number that is free there."""
    if not storage.is_folder(folder):
        return None, 0
    paths = [path for path, name in storage.list_files(folder) if name.endswith(".parquet")]
    if not paths:
        return None, 0
    filesystem = storage.resolve(folder)[0]
    ids = [pq.read_table(storage.resolve(path)[1], filesystem=filesystem, columns=["image_id"])[0] for path in paths]
    known = pa.chunked_array([chunk for column in ids for chunk in column.chunks], pa.string())
    return known, len(known)


def open_captions(location: str) -> pads.Dataset:
    """The captions of a folder or a Parquet file, to be read a piece at a time.

    Raises:
        InputError: nothing there, or no captions table.
    """
    location = storage.absolute(location)
    if not storage.exists(location):
        raise InputError(f"no such captions: {location}")
    if storage.is_file(location):
        files = [location]
    else:
        files = [path for path, name in storage.list_files(location, recursive=False) if name.endswith(".parquet")]
    filesystem = storage.resolve(location)[0]
    try:
        captions = pads.dataset([storage.resolve(path)[1] for path in files], filesystem=filesystem, format="parquet")
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{location} is not readable Parquet: {error}") from error
    missing = {"image_id", "caption"} - set(captions.schema.names)
    if missing:
        found = ", ".join(captions.schema.names) or "no Parquet file"
        raise InputError(f"{location} is no captions table: expected the columns image_id and caption, got {found}")
    return captions


def count_rows(location: str) -> tuple[dict[str, int], dict[str, int]]:
    """Rows by status, and failed rows by error code."""
    counts: dict[str, int] = {}
    errors: dict[str, int] = {}
    for batch in open_captions(location).to_batches(columns=["status", "error_code"]):
        for status, code in zip(batch["status"].to_pylist(), batch["error_code"].to_pylist(), strict=True):
            counts[status] = counts.get(status, 0) + 1
            if code:
                errors[code] = errors.get(code, 0) + 1
    return counts, errors
