"""The tables: the Arrow schemas of a row in (the manifest) and a row out (the captions), an input -> its manifest."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from imcap_ray import archives, storage
from imcap_ray.errors import InputError
from imcap_ray.storage import ListedFile

SCHEMA_VERSION: Final = "2"

MANIFEST_SCHEMA: Final = pa.schema(
    [
        # Position of the image in the manifest: 0, 1, 2, ... Ray's progress is kept by this number,
        # for eight bytes an image are affordable at 100 million images and strings are not.
        ("manifest_id", pa.int64()),
        ("image_id", pa.string()),
        ("image_path", pa.string()),  # "" when the bytes are in a table or a tar
        ("table_path", pa.string()),  # of the table or tar; "" when the image is a file of its own
        ("row_group", pa.int32()),  # of the table; the block of a tar, see `archives`; -1 for a file
        ("row", pa.int32()),  # within `row_group`; 0 in a tar; -1 for a file
        # Of the file, the table or the tar: by these a changed image under an old name is known. -1 and 0 for what a
        # table names in a store, which would have to be asked for each image.
        ("size", pa.int64()),
        ("modified_ns", pa.int64()),
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

COMPLETE: Final = "complete"
REPLACING: Final = "replacing"
"""States of a run in run.json: all rows are there; rows of `--overwrite` are being put in the place of the old."""

NEXT_FOLDER: Final = "next"
"""Below the run's own folder: what `--overwrite` makes, until it takes the place of the old."""

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

_ID_SOURCE: Final = b"imcap_ray.id_source"
"""In the metadata of a manifest of Parquet tables: whether the images' ids are `_TABLE`, those that the tables have for
them, or `_POSITION`, the table's name and the row's number."""
_TABLE: Final = "table"
_POSITION: Final = "position"

_READ_BYTES: Final = 2**20
"""Of a column that are asked for at once; else it would be read up to the end of the row group."""

_PICKLES: Final = "arrow_pickled_object"
"""In the name of Ray's type for columns of pickled objects."""

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

    @property
    def data(self) -> str:
        """The column, or the field of it, that holds the bytes."""
        return f"{self.name}.bytes" if self.kind == "struct" else self.name


@dataclass(frozen=True, slots=True)
class InputSummary:
    """What a manifest was made of, in words for the user."""

    num_images: int
    num_ignored: int
    """Files whose names are not those of images."""
    description: str
    changed: pa.Table = field(default_factory=MANIFEST_SCHEMA.empty_table, compare=False)
    """Rows of `MANIFEST_SCHEMA` as they are now, for images whose file has changed since the manifest was written."""


def find_image_column(schema: pa.Schema, location: str) -> ImageColumn:
    """The column that holds the images of a Parquet table; InputError naming the columns when there is none."""
    structs = [f.name for f in schema if pa.types.is_struct(f.type) and _is_binary(_field_type(f.type, "bytes"))]
    binaries = [f.name for f in schema if _is_binary(f.type)]
    strings = [f.name for f in schema if _is_string(f.type)]
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


def find_id_column(schema: pa.Schema) -> str | None:
    """The column of a Parquet table that holds the ids of its images, if it has one."""
    return next((name for name in _ID_COLUMNS if name in schema.names), None)


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_string(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _field_type(struct: pa.StructType, name: str) -> pa.DataType:
    return struct.field(name).type if struct.get_field_index(name) >= 0 else pa.null()


def build_manifest(
    location: str,
    folder: str,
    *,
    recursive: bool = True,
    limit: int | None = None,
    allow_outside_paths: bool = False,
    output: str | None = None,
    check: Callable[[], None] = lambda: None,
) -> InputSummary:
    """Write the manifest of the images at `location` (folder, image, Parquet or tars) to Parquet files in `folder`.

    Images that a manifest already in `folder` lists keep their `manifest_id`; new ones are added behind them. Those
    that are in another place now, in a table that was renamed for instance, get that place. Changed ones are reported
    and left as they stand, until `update_manifest` is called.

    Args:
        allow_outside_paths: whether paths in a table may lead out of `location`, or of a single table's folder.
        output: where the captions go, which must not be taken for tables of images.
        check: called before anything is written; raises if nothing may be any more.

    Raises:
        InputError: nothing there, nothing readable, no image among it, a path that leads where it may not, or ids that
            new tables have made ambiguous.
    """
    location = storage.absolute(location)
    if not storage.exists(location):
        raise InputError(f"no such input: {location}")
    tables, ignored = _list_tables(location, recursive)
    known, metadata = _KnownImages(folder), {}
    if tables:
        if output and storage.is_folder(location) and storage.is_inside(location, output):
            raise InputError(f"OUTPUT {output} lies among the tables of INPUT {location}: choose a place beside it")
        if is_tar(tables[0].location):
            entries: Iterable[dict[str, Any]] = _tar_entries(tables)
            description = f"WebDataset, {len(tables)} tar{'s' * (len(tables) != 1)}"
        else:
            places = _Places(location if storage.is_folder(location) else storage.parent(location), allow_outside_paths)
            places.check([table.location for table in tables], limit)
            ids = _choose_ids(location, tables, known.id_source)
            metadata = {_ID_SOURCE: _POSITION if ids is None else _TABLE}
            entries = _table_entries(tables, places, ids)
            description = f"Parquet, {len(tables)} file{'s' * (len(tables) != 1)}"
    else:
        counter = _IgnoredFiles()
        entries = _file_entries(location, recursive, counter)
        description = "folder" if storage.is_folder(location) else "image"
    next_id, num_images, changed = known.num_images, 0, []
    entries = islice(entries, limit)
    while chunk := list(islice(entries, ROWS_PER_PART)):
        num_images += len(chunk)
        rows = pa.Table.from_pylist(chunk, schema=MANIFEST_SCHEMA.remove(0))
        ids, is_changed, is_moved = known.find(rows)
        if is_changed.any():
            changed.append(_with_ids(rows.filter(is_changed), ids[is_changed]))
        if is_moved.any():
            check()
            update_manifest(folder, _with_ids(rows.filter(is_moved), ids[is_moved]))
        rows = rows.filter(ids < 0)
        if rows.num_rows:
            check()
            part = storage.join(folder, manifest_part(next_id))
            new = _with_ids(rows, np.arange(next_id, next_id + rows.num_rows))
            write_table(part, new.replace_schema_metadata(metadata))
            next_id += rows.num_rows
    if not tables:
        ignored = counter.number
    if not num_images:
        seen = f"{ignored:,} other file{'s' * (ignored != 1)}" if ignored else "nothing"
        raise InputError(f"no images in {location}: found {seen} there; images are known by names like .jpg or .png")
    return InputSummary(
        num_images=num_images,
        num_ignored=ignored,
        description=description,
        changed=pa.concat_tables(changed) if changed else MANIFEST_SCHEMA.empty_table(),
    )


def manifest_part(first_id: int) -> str:
    """The name of the manifest's file whose first image has this number."""
    return f"part-{first_id:012d}.parquet"


def list_table_images(location: str, tables: list[ListedFile], *, base: str) -> Iterator[dict[str, Any]]:
    """What a manifest says of each row of Parquet tables, the ids being those that `build_manifest` gives them; but
    rows may share an id or a path, as where each caption has a row. Null is the id of a row without one.

    Args:
        base: the folder of the data; whether a path leads out of it is for the caller to ask.

    Raises:
        InputError: a table is not readable or has no column of images, or a path holds a secret.
    """
    ids, kinds = _natural_ids([table.location for table in tables])
    if ids is not None and "name" in kinds and not _are_distinct(ids):  # a name beside bytes says nothing
        ids = None
    return _table_entries(tables, _Places(base, allow_outside_paths=True), ids)


def update_manifest(folder: str, changed: pa.Table) -> None:
    """Put rows of `MANIFEST_SCHEMA` in the place of those with their ids."""
    changed = changed.sort_by("manifest_id")
    changed_ids = changed["manifest_id"].to_numpy()
    for part in storage.list_parquet(folder):
        ids = read_table(part, ["manifest_id"])["manifest_id"].to_numpy()  # a run of numbers
        first, end = np.searchsorted(changed_ids, [ids[0], ids[-1] + 1])
        if first < end:
            new, rows = changed.slice(first, end - first), read_table(part)
            old = rows.filter(pc.invert(pc.is_in(rows["manifest_id"], value_set=new["manifest_id"])))
            joined = pa.concat_tables([old.replace_schema_metadata(), new]).sort_by("manifest_id")
            write_table(part, joined.replace_schema_metadata(rows.schema.metadata))


def read_table(location: str, columns: list[str] | None = None) -> pa.Table:
    """A Parquet file as a whole."""
    filesystem, path = storage.resolve(location)
    with filesystem.open_input_file(path) as stream:
        return pq.read_table(stream, columns=columns)


def write_table(location: str, table: pa.Table) -> None:
    """Write a Parquet file that readers see whole or not at all."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    storage.write_bytes(location, sink.getvalue().to_pybytes())


def read_table_images(table_path: str, *, row_group: int, rows: set[int]) -> Iterator[tuple[int, bytes | None]]:
    """The bytes of some rows of a row group, with their numbers; None where the table holds none.

    Read are the pages up to the last of these rows, for a table cannot be entered in the middle of a row group; a page
    is in memory at a time. No other file is opened: where a struct of bytes and path has only a path, `build_manifest`
    has made a row of that file.
    """
    filesystem, path = storage.resolve(table_path)
    with filesystem.open_input_file(path) as stream, pq.ParquetFile(stream, buffer_size=_READ_BYTES) as table:
        refuse_pickles(table.schema_arrow, table_path)
        column = find_image_column(table.schema_arrow, table_path)
        start = 0
        for batch in table.iter_batches(batch_size=16, row_groups=[row_group], columns=[column.data]):
            for number, value in enumerate(_leaf(batch.column(0), "bytes"), start):
                if number in rows:
                    yield number, value.as_py()
            start += len(batch)
            if start > max(rows):
                return


def is_tar(table_path: str) -> bool:
    """Whether what a manifest calls a table is a tar."""
    return _extension(table_path) == "tar"


def largest_row_group(manifest: str) -> int:
    """Rows of the largest row group that the rows of a manifest lie in, or fewer where it is not listed to its end; 0
    for images that are files."""
    largest = 0
    for part in storage.list_parquet(manifest):
        filesystem, path = storage.resolve(part)
        with filesystem.open_input_file(path) as stream:
            metadata = pq.read_metadata(stream)
        column = metadata.schema.names.index("row")
        for number in range(metadata.num_row_groups):
            largest = max(largest, metadata.row_group(number).column(column).statistics.max + 1)
    return largest


def _leaf(values: pa.Array | pa.ChunkedArray, name: str) -> pa.Array | pa.ChunkedArray:
    """A field of structs; values that are no structs as they are."""
    return pc.struct_field(values, name) if pa.types.is_struct(values.type) else values


def refuse_pickles(schema: pa.Schema, location: str) -> None:
    """Raise InputError if a table has a column of pickled Python objects, as Ray Data can write them.

    Whoever turns such a value into a Python object runs the code in it. Ray's own reader refuses them, pyarrow's
    does not.
    """
    for column in schema:
        if _PICKLES in pa.schema([column]).to_string(truncate_metadata=False):
            raise InputError(
                f"{location}: the column {column.name} holds pickled Python objects, which run code when they are "
                "read: leave it out of the table"
            )


class _IgnoredFiles:
    def __init__(self) -> None:
        self.number = 0


def _extension(name: str) -> str:
    return name.rpartition(".")[2].lower() if "." in name else ""


def _is_image(name: str) -> bool:
    return _extension(name) in IMAGE_EXTENSIONS and not name.rpartition("/")[2].startswith(".")


def _list_tables(location: str, recursive: bool) -> tuple[list[ListedFile], int]:
    """The tars or else the Parquet files of an input, and the number of files beside them; none when it is a folder of
    images. The tables beside tars tell about their images, as img2dataset writes them."""
    if storage.is_file(location):
        return ([storage.describe_file(location)] if _extension(location) in ("parquet", "tar") else []), 0
    found: dict[str, list[ListedFile]] = {"tar": [], "parquet": []}
    num_files = 0
    for file in storage.list_files(location, recursive=recursive):
        if _is_image(file.name):
            return [], 0  # images are what an input is for: a table among them is not one
        num_files += 1
        if _extension(file.name) in found and not file.name.rpartition("/")[2].startswith(("_", ".")):
            found[_extension(file.name)].append(file)
    tables = found["tar"] or found["parquet"]
    return tables, num_files - len(tables)


def _file_entries(location: str, recursive: bool, ignored: _IgnoredFiles) -> Iterator[dict[str, Any]]:
    found = (
        [storage.describe_file(location)]
        if storage.is_file(location)
        else storage.list_files(location, recursive=recursive)
    )
    for file in found:
        if _is_image(file.name):
            yield _entry(file.name, file.location, file)
        else:
            ignored.number += 1


def _entry(
    image_id: str, image_path: str, file: ListedFile, *, table_path: str = "", row_group: int = -1, row: int = -1
) -> dict[str, Any]:
    return {
        "image_id": image_id,
        "image_path": image_path,
        "table_path": table_path,
        "row_group": row_group,
        "row": row,
        "size": file.size,
        "modified_ns": file.modified_ns,
    }


def _choose_ids(location: str, tables: list[ListedFile], source: str | None) -> pa.ChunkedArray | None:
    """The ids of the tables' rows, None where these are known by table and number.

    Args:
        source: where the images that are known already have theirs from; None where none is known. It stays, or all of
            them would be others.
    """
    if source == _POSITION:
        return None
    ids, kinds = _natural_ids([table.location for table in tables])
    if ids is None or _are_distinct(ids):
        return ids
    counts = pc.value_counts(ids.drop_null())
    repeated = next((entry["values"].as_py() for entry in counts if entry["counts"].as_py() > 1), None)
    if source is None and (repeated is None or "id" not in kinds):
        return None  # a name beside bytes may be the same for all images
    problem = "some rows have none" if repeated is None else f"{repeated!r} stands there more than once"
    if "id" in kinds:
        raise InputError(f"{location}: image ids must be unique, but {problem}")
    raise InputError(
        f"{location}: its images were known by their paths so far, which new tables have made ambiguous ({problem}): "
        "choose another OUTPUT, or give --overwrite to start anew"
    )


def _are_distinct(ids: pa.ChunkedArray) -> bool:
    return not ids.null_count and pc.count_distinct(ids).as_py() == len(ids)


def _table_entries(tables: list[ListedFile], places: _Places, ids: pa.ChunkedArray | None) -> Iterator[dict[str, Any]]:
    natural = iter(ids.to_pylist()) if ids is not None else None
    for table in tables:
        first_row = 0
        for row_group, num_rows, image_paths in places.row_groups(table.location):
            for row in range(num_rows):
                image_id = next(natural) if natural is not None else f"{table.name}#{first_row + row}"
                image_path = image_paths[row] if image_paths is not None else None
                if image_path is None:
                    yield _entry(image_id, "", table, table_path=table.location, row_group=row_group, row=row)
                else:
                    yield _entry(image_id, image_path, _named_file(image_path))
            first_row += num_rows


def _named_file(location: str) -> ListedFile:
    """A file that a table names, as a listing of its folder shows it."""
    if not storage.is_uri(location):
        with suppress(OSError, ValueError):  # its row will say what is wrong with the path
            return storage.describe_file(location)
    return ListedFile(location, location, -1, 0)


def _tar_entries(tars: list[ListedFile]) -> Iterator[dict[str, Any]]:
    ids = archives.ImageIds()
    for tar in sorted(tars, key=lambda one: one.name):
        try:
            with archives.open_tar(tar.location) as opened:
                for member in archives.list_files(opened):
                    if _is_image(member.name):
                        block = archives.block_of(member)
                        yield _entry(
                            ids.choose(tar.name, member), "", tar, table_path=tar.location, row_group=block, row=0
                        )
        except archives.DAMAGED as error:
            raise InputError(
                f"{tar.location} is damaged, ends early or is no uncompressed tar: {error}; take it away, or bring it "
                "again"
            ) from error


@contextmanager
def _open_table(table_path: str) -> Iterator[pq.ParquetFile]:
    filesystem, path = storage.resolve(table_path)
    try:
        with filesystem.open_input_file(path) as stream, pq.ParquetFile(stream) as table:
            refuse_pickles(table.schema_arrow, table_path)
            yield table
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{table_path} is not readable Parquet: {error}") from error


class _Places:
    """Where the images are that tables only name, in the folder that their paths must not leave."""

    def __init__(self, folder: str, allow_outside_paths: bool) -> None:
        self._folder = folder
        self._allow_outside_paths = allow_outside_paths

    def check(self, tables: list[str], limit: int | None) -> None:
        """InputError for the first path in so many rows that leads where it may not."""
        num_rows = 0
        for table_path in tables:
            for _, count, _ in self.row_groups(table_path):
                num_rows += count
                if limit is not None and num_rows >= limit:
                    return

    def row_groups(self, table_path: str) -> Iterator[tuple[int, int, list[str | None] | None]]:
        """Number and rows of each row group, and where its images are: None for one, or all, with bytes in the table.

        Of a struct's bytes nothing is read where the table's statistics say that there are bytes in all its rows, or
        in none.
        """
        with _open_table(table_path) as table:
            column = find_image_column(table.schema_arrow, table_path)
            first_row = 0
            for row_group in range(table.num_row_groups):
                num_rows = table.metadata.row_group(row_group).num_rows
                paths = _read_paths(table, row_group, column)
                image_paths: list[str | None] | None = None
                if paths is not None:
                    image_paths = [
                        None if path is None else self._place(path, table_path, first_row + row)
                        for row, path in enumerate(paths)
                    ]
                yield row_group, num_rows, image_paths
                first_row += num_rows

    def _place(self, path: str, table_path: str, row: int) -> str:
        return storage.place(
            path,
            base=storage.parent(table_path),
            folders=[self._folder],
            source=f"{table_path}, row {row}",
            allow_outside=self._allow_outside_paths,
        )


def _read_paths(table: pq.ParquetFile, row_group: int, column: ImageColumn) -> list[str | None] | None:
    """The path in each row of a row group that has no bytes, None in the others; None if there is no such row."""
    if column.kind == "path":
        paths = table.read_row_group(row_group, columns=[column.name]).column(0).to_pylist()
        return [path or "" for path in paths]
    if column.kind == "bytes" or not _is_string(_field_type(table.schema_arrow.field(column.name).type, "path")):
        return None
    num_rows, num_missing = table.metadata.row_group(row_group).num_rows, _num_nulls(table, row_group, column.data)
    if num_missing == 0:
        return None
    paths = _leaf(table.read_row_group(row_group, columns=[f"{column.name}.path"]).column(0), "path").to_pylist()
    if num_missing != num_rows:
        batches = table.iter_batches(batch_size=16, row_groups=[row_group], columns=[column.data])
        has_bytes = [found for batch in batches for found in _leaf(batch.column(0), "bytes").is_valid().to_pylist()]
        paths = [None if found else path for found, path in zip(has_bytes, paths, strict=True)]
    return [path or None for path in paths]


def _num_nulls(table: pq.ParquetFile, row_group: int, column_path: str) -> int | None:
    """How many rows have no value in this column, if the table says it."""
    metadata = table.metadata.row_group(row_group)
    for number in range(metadata.num_columns):
        column = metadata.column(number)
        if column.path_in_schema == column_path and column.statistics and column.statistics.has_null_count:
            return int(column.statistics.null_count)
    return None


def _natural_ids(tables: list[str]) -> tuple[pa.ChunkedArray | None, set[str]]:
    """The ids the tables have of their own, None when they have none; and what they are: "id", of a column of ids;
    "path" of an image's file; "name" beside its bytes."""
    chunks: list[pa.Array] = []
    kinds = set()
    for table_path in tables:
        with _open_table(table_path) as table:
            schema = table.schema_arrow
            column = find_image_column(schema, table_path)
            id_column = find_id_column(schema)
            if id_column is not None:
                kinds.add("id")
            elif column.kind == "path":
                id_column = column.name
                kinds.add("path")
            elif column.kind == "struct" and schema.field(column.name).type.get_field_index("path") >= 0:
                id_column = f"{column.name}.path"
                kinds.add("name")
            else:
                return None, set()
            values = table.read(columns=[id_column]).column(0)
        if pa.types.is_struct(values.type):
            values = pc.struct_field(values, "path")
        chunks.extend(values.cast(pa.string()).chunks)
    return pa.chunked_array(chunks, pa.string()), kinds


class _KnownImages:
    """The images that a manifest lists already, looked up without holding them all.

    A listing comes in the order in which the manifest was written, so that one part after the other is needed; which
    part may hold an id is told by the least and the greatest id in each.
    """

    def __init__(self, folder: str) -> None:
        self.num_images = 0
        self.id_source: str | None = None
        """`_TABLE` or `_POSITION` where these are rows of Parquet tables."""
        self._parts: list[tuple[str, str, str]] = []
        for part in storage.list_parquet(folder):
            filesystem, path = storage.resolve(part)
            metadata = pq.read_metadata(path, filesystem=filesystem)
            self.num_images += metadata.num_rows
            self.id_source = ((metadata.metadata or {}).get(_ID_SOURCE) or b"").decode() or self.id_source
            column = MANIFEST_SCHEMA.get_field_index("image_id")
            ranges = [metadata.row_group(number).column(column).statistics for number in range(metadata.num_row_groups)]
            self._parts.append((part, min(one.min for one in ranges), max(one.max for one in ranges)))

    def find(self, rows: pa.Table) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """For rows of a listing their `manifest_id`, -1 where they are new; whether they have changed since; whether
        they have not, but are in another place."""
        ids = np.full(rows.num_rows, -1, np.int64)
        is_changed, is_moved = np.zeros(rows.num_rows, bool), np.zeros(rows.num_rows, bool)
        least, greatest = pc.min_max(rows["image_id"]).as_py().values()
        for part, first, last in self._parts:
            if (ids >= 0).all():
                break
            if last < least or first > greatest:
                continue
            part_rows = read_table(part)
            found = pc.index_in(rows["image_id"], value_set=part_rows["image_id"]).to_numpy(zero_copy_only=False)
            here = np.flatnonzero(~np.isnan(found))
            there = found[here].astype(np.int64)
            ids[here] = part_rows["manifest_id"].to_numpy()[there]
            before, now = part_rows.take(there), rows.take(here)
            is_changed[here] = _differ(before, now, "size", "modified_ns")
            is_moved[here] = ~is_changed[here] & _differ(before, now, "image_path", "table_path", "row_group", "row")
        return ids, is_changed, is_moved


def _differ(one: pa.Table, other: pa.Table, *columns: str) -> npt.NDArray[np.bool_]:
    """In which rows two tables differ in any of these columns."""
    differ = np.zeros(one.num_rows, bool)
    for name in columns:
        differ |= pc.not_equal(one[name], other[name]).to_numpy()
    return differ


def _with_ids(rows: pa.Table, ids: npt.NDArray[np.int64]) -> pa.Table:
    return rows.add_column(0, MANIFEST_SCHEMA.field(0), pa.array(ids, pa.int64())).cast(MANIFEST_SCHEMA)


def is_part(path: str) -> bool:
    """Whether a run wrote this file into its output, by Ray's names; others there are somebody else's."""
    return re.fullmatch(r"[0-9a-f]{32}_[0-9]{6,}\.parquet", path.rpartition("/")[2]) is not None


def open_captions(location: str) -> pads.Dataset:
    """The captions of a folder or a Parquet file, to be read a piece at a time.

    Where a run has written into the folder, what else lies there is left out.

    Raises:
        InputError: nothing there, no captions table, or rows of two runs because one is replacing those of the other.
    """
    location = storage.absolute(location)
    if not storage.exists(location):
        raise InputError(f"no such captions: {location}")
    filesystem = storage.resolve(location)[0]
    try:
        files = [location] if storage.is_file(location) else storage.list_parquet(location)
        files = [path for path in files if is_part(path)] or files
        captions = pads.dataset([storage.resolve(path)[1] for path in files], filesystem=filesystem, format="parquet")
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{location} is not readable Parquet: {error}") from error
    refuse_replacement(location)  # after the files were listed: a replacement that began since removes some of them
    refuse_pickles(captions.schema, location)
    missing = {"image_id", "caption"} - set(captions.schema.names)
    if missing:
        found = ", ".join(captions.schema.names) or "no Parquet file"
        raise InputError(f"{location} is no captions table: expected the columns image_id and caption, got {found}")
    return captions


def refuse_replacement(captions: str) -> None:
    """Raise InputError if a run is replacing the rows of this folder by new ones, or was when it was killed.

    Earlier versions did not write the state `replacing`; what they left is known by a complete run in `next`.
    """
    run = read_run(captions)
    if run is None:
        return
    new = read_run(storage.join(folder_of(captions), "_imcap", NEXT_FOLDER)) or {}
    if run.get("state") == REPLACING or new.get("state") == COMPLETE:
        raise InputError(
            f"{folder_of(captions)} may hold rows of two runs, because `imcap caption --overwrite` is replacing the "
            "old rows by the new ones: wait until it has finished; if it was killed, the same command finishes it"
        )


def folder_of(captions: str) -> str:
    """The folder of a captions table that is a folder or a Parquet file."""
    location = storage.absolute(captions)
    return storage.parent(location) if storage.is_file(location) else location


def read_run(captions: str) -> dict[str, Any] | None:
    """What `_imcap/run.json` of a captions folder, or of the folder of a captions file, says; None where there is none.

    Raises:
        InputError: it is damaged.
    """
    location = storage.join(folder_of(captions), "_imcap", "run.json")
    if not storage.exists(location):
        return None
    try:
        run = json.loads(storage.read_bytes(location))
    except ValueError as error:
        raise InputError(f"{location} is damaged: {error}") from error
    return run if isinstance(run, dict) else {}


def image_placer(
    captions: str, *, folders: Sequence[str] = (), allow_outside_paths: bool = False
) -> Callable[[Mapping[str, Any], str], str]:
    """A function that says where the file is that the row of a captions table, or of its run's manifest, names.

    It must be in the input that `run.json` names, below the captions or in one of `folders`; a row that names another
    file is an InputError, unless `allow_outside_paths`. This guards against a table that is not ours among those of a
    run, not against a run that was made up.
    """
    base = folder_of(captions)
    places = [str((read_run(captions) or {}).get("input", "")), base, *folders]
    inside = [storage.parent(place) if place.endswith((".parquet", ".tar")) else place for place in places if place]

    def place(row: Mapping[str, Any], path: str) -> str:
        source = f"{captions}, image {row['image_id']!r}"
        return storage.place(path, base=base, folders=inside, source=source, allow_outside=allow_outside_paths)

    return place
