"""Parquet tables of images -> the bytes or paths of their rows."""

from __future__ import annotations

import base64
import binascii
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Final, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imcap_ray import storage
from imcap_ray.data.columns import ImageColumn, ImageColumns, field_type, is_string, read_image_column
from imcap_ray.data.image_formats import has_image_signature
from imcap_ray.data.parquet_files import open_parquet
from imcap_ray.errors import InputError, translate_errors

_READ_BYTES: Final = 2**20
"""Read at once of a column, which would otherwise be read to the end of the row group."""

_MAX_PATH_CHARACTERS: Final = 4096
"""Longer texts in a column of paths are not paths: no system has longer ones."""

_SHOWN_CHARACTERS: Final = 60
"""Of such a text, instead of the path."""

TEXTS_PER_READ: Final = 64
"""Rows read at once of a column of text, which may be images in base64."""

_BEGINNING_CHARACTERS: Final = 256
"""Of a text, enough for the header of a data URI and the signature of an image."""

_BASE64: Final = re.compile(r"[A-Za-z0-9+/_\s-]{64,}=*\s*")
"""Text of base64, with or without line breaks. Paths with an extension do not match."""

_URL_SAFE: Final = str.maketrans("-_", "+/")

_PICKLES: Final = "arrow_pickled_object"
"""Part of the name of Ray's type for columns of pickled objects."""

ID_COLUMNS: Final = ("image_id", "__key__", "key", "id")


def find_id_column(schema: pa.Schema, *, in_any_case: bool = True) -> str | None:
    """The column of a Parquet table with a usual name for ids of images, see `can_be_id`; None if it has none.

    Args:
        in_any_case: whether `ID` counts, too, if no column has exactly a usual name.
    """
    names = [name for name, kind in zip(schema.names, schema.types, strict=True) if can_be_id(kind)]
    exact = (usual for usual in ID_COLUMNS if usual in names)
    others = (name for usual in ID_COLUMNS for name in names if in_any_case and name.strip().lower() == usual)
    return next(chain(exact, others), None)


def read_table_images(
    table_path: str, positions: Iterable[tuple[int, int]], *, image_columns: Sequence[str] = ()
) -> Iterator[tuple[tuple[int, int], bytes | None]]:
    """The bytes in some rows of a table, sorted by position (row group, row); None for a row without bytes.

    Positions that the table does not have are left out. A row group is read from its start up to the last of these
    rows, because a table cannot be entered in the middle of a row group; one page is in memory at a time. No other file
    is opened: if a struct of bytes and path has only a path, `build_manifest` lists that file.
    """
    rows_of: dict[int, set[int]] = defaultdict(set)
    for row_group, row in positions:
        rows_of[row_group].add(row)
    with open_parquet(table_path, buffer_bytes=_READ_BYTES) as table:
        refuse_pickles(table.schema_arrow, table_path)
        column = read_image_column(table.schema_arrow, table_path, image_columns)
        for row_group in sorted(rows_of):
            if not 0 <= row_group < table.num_row_groups:
                continue
            rows, start = rows_of[row_group], 0
            for batch in table.iter_batches(batch_size=16, row_groups=[row_group], columns=[column.data]):
                for number, value in enumerate(leaf_of(batch.column(0), "bytes"), start):
                    if number in rows:
                        image = value.as_py()
                        yield (row_group, number), image_in_text(image) if isinstance(image, str) else image
                start += len(batch)
                if start > max(rows):
                    break


def leaf_of(values: pa.Array | pa.ChunkedArray, name: str) -> pa.Array | pa.ChunkedArray:
    """A field of structs; values that are not structs are returned unchanged."""
    return pc.struct_field(values, name) if pa.types.is_struct(values.type) else values


def refuse_pickles(schema: pa.Schema, location: str) -> None:
    """Raise InputError if a table has a column of pickled Python objects, as Ray Data can write them.

    Turning such a value into a Python object runs the code in it. Ray's own reader refuses them, pyarrow's does not.
    """
    for column in schema:
        if _PICKLES in pa.schema([column]).to_string(truncate_metadata=False):
            raise InputError(
                f"{location}: the column {column.name} holds pickled Python objects, which run code when they are "
                "read: remove it from the table"
            )


@contextmanager
def open_table(table_path: str) -> Iterator[pq.ParquetFile]:
    """An open Parquet table; InputError if it cannot be read or holds pickled objects."""
    message = f"{table_path} is not readable Parquet"
    with (
        translate_errors(pa.ArrowException, OSError, to=InputError, message=message),
        open_parquet(table_path) as table,
    ):
        refuse_pickles(table.schema_arrow, table_path)
        yield table


class RowGroup(NamedTuple):
    """A row group of a table of images."""

    number: int
    num_rows: int
    paths: list[str | None] | None
    """Locations of the images; None for a row with bytes or base64, or for a row group with bytes in all rows."""


class TablePaths:
    """Locations of the images that tables only name, which must be in `folder`."""

    def __init__(self, folder: str, allow_outside_paths: bool, columns: ImageColumns) -> None:
        self._folder = folder
        self._allow_outside_paths = allow_outside_paths
        self._columns = columns

    def check(self, tables: list[str], limit: int | None) -> None:
        """Raise InputError for the first path that points out of the folder, in the first `limit` rows."""
        num_rows = 0
        for table_path in tables:
            for group in self.row_groups(table_path):
                num_rows += group.num_rows
                if limit is not None and num_rows >= limit:
                    return

    def row_groups(self, table_path: str, column: ImageColumn | None = None) -> Iterator[RowGroup]:
        """The row groups of a table.

        The bytes of structs are not read if the table's statistics show that all rows of a group have bytes, or none.
        """
        with open_table(table_path) as table:
            column = column or self._columns.get(table, table_path)
            first_row = 0
            for row_group in range(table.num_row_groups):
                num_rows = table.metadata.row_group(row_group).num_rows
                paths = _read_paths(table, row_group, column)
                if column.kind == "path" and paths is not None:
                    self._columns.have_base64 |= None in paths
                image_paths: list[str | None] | None = None
                if paths is not None:
                    image_paths = [
                        None if path is None else self._locate(path, table_path, first_row + row)
                        for row, path in enumerate(paths)
                    ]
                yield RowGroup(row_group, num_rows, image_paths)
                first_row += num_rows

    def _locate(self, path: str, table_path: str, row: int) -> str:
        if not can_be_path(path):
            path = f"{path[:_SHOWN_CHARACTERS]}... ({len(path):,} characters)"
        return storage.locate(
            path,
            base=storage.parent(table_path),
            folders=[self._folder],
            source=f"{table_path}, row {row}",
            allow_outside=self._allow_outside_paths,
        )


def _read_paths(table: pq.ParquetFile, row_group: int, column: ImageColumn) -> list[str | None] | None:
    """The path in each row of a row group that has no bytes or base64, None in the other rows; None if all rows have
    bytes."""
    if column.kind == "path":
        batches = table.iter_batches(batch_size=TEXTS_PER_READ, row_groups=[row_group], columns=[column.name])
        texts = (text or "" for batch in batches for text in valid_text_array(batch.column(0)).to_pylist())
        return [None if is_image_text(text) else text for text in texts]
    if column.kind == "bytes" or not is_string(field_type(table.schema_arrow.field(column.name).type, "path")):
        return None
    num_rows, num_missing = table.metadata.row_group(row_group).num_rows, _num_nulls(table, row_group, column.data)
    if num_missing == 0:
        return None
    paths = _texts(leaf_of(table.read_row_group(row_group, columns=[f"{column.name}.path"]).column(0), "path"))
    if num_missing != num_rows:
        batches = table.iter_batches(batch_size=16, row_groups=[row_group], columns=[column.data])
        has_bytes = [valid for batch in batches for valid in leaf_of(batch.column(0), "bytes").is_valid().to_pylist()]
        paths = [None if valid else path for valid, path in zip(has_bytes, paths, strict=True)]
    return [path or None for path in paths]


def _num_nulls(table: pq.ParquetFile, row_group: int, column_path: str) -> int | None:
    """The number of rows without a value in this column; None if the table does not record it."""
    metadata = table.metadata.row_group(row_group)
    for number in range(metadata.num_columns):
        column = metadata.column(number)
        if column.path_in_schema == column_path and column.statistics and column.statistics.has_null_count:
            return int(column.statistics.null_count)
    return None


def can_be_id(kind: pa.DataType) -> bool:
    """Whether values of this type can be ids of images; lists and structs cannot."""
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    return not pa.types.is_nested(kind)


def valid_text_array(values: pa.Array) -> pa.Array:
    """Strings as `pa.string`, with bytes that are not UTF-8 as `\\xff`, because Parquet's readers do not check them."""
    values = values.cast(pa.string())
    try:
        values.validate(full=True)
    except pa.ArrowInvalid:
        texts = values.cast(pa.binary()).to_pylist()
        values = pa.array([text and storage.escape(text) for text in texts], pa.string())
    return values


def _texts(values: pa.ChunkedArray) -> list[str | None]:
    return [text for chunk in values.chunks for text in valid_text_array(chunk).to_pylist()]


def can_be_path(text: str) -> bool:
    """Whether a text may be a path; data URIs, base64 of images and texts of thousands of characters are not."""
    return len(text) <= _MAX_PATH_CHARACTERS and text[:5].lower() != "data:" and not is_image_text(text)


def is_image_text(text: str) -> bool:
    """Whether a text is an image: base64 that begins like one, or a data URI of base64."""
    if text[:5].lower() == "data:":
        return text[:_BEGINNING_CHARACTERS].partition(",")[0].lower().endswith(";base64")
    if not _BASE64.fullmatch(text, 0, _MAX_PATH_CHARACTERS):
        return False
    letters = "".join(text[:_BEGINNING_CHARACTERS].split())
    beginning = image_in_text(letters[: len(letters) // 4 * 4])
    return beginning is not None and has_image_signature(beginning)


def image_in_text(text: str) -> bytes | None:
    """The bytes that a text contains as base64; None if it does not."""
    text = text.partition(",")[2] if text[:5].lower() == "data:" else text
    try:
        return base64.b64decode(text.translate(_URL_SAFE) + "==")
    except (binascii.Error, ValueError):
        return None
