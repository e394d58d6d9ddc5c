"""Schema and first values of Parquet tables -> the column of their images. Knows neither rows nor manifests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from itertools import islice
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from imcap_ray.data.image_formats import has_image_signature
from imcap_ray.data.parquet_files import open_parquet
from imcap_ray.errors import InputError

BYTES_COLUMNS: Final = (
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

PATH_COLUMNS: Final = (
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

_NUM_SAMPLES: Final = 8
"""Number of values by which a column of images is recognised."""

_ROWS_SEARCHED: Final = 1024
"""Rows of a row group in which these values are searched."""

_ROW_GROUPS_SEARCHED: Final = 4

_READ_BYTES: Final = 2**20

_MAX_HASH_BYTES: Final = 64
"""As many as SHA-512 has."""

_KINDS: Final = {"bytes": "bytes", "path": "paths", "struct": "bytes or paths"}


@dataclass(frozen=True, slots=True)
class ImageColumn:
    """The column of images of a Parquet table."""

    name: str
    kind: str
    """`bytes`, `path`, or `struct` for Hugging Face's struct of bytes and path."""

    @property
    def data(self) -> str:
        """The column, or the field of it, that holds the bytes."""
        return f"{self.name}.bytes" if self.kind == "struct" else self.name

    def __str__(self) -> str:
        return f"{self.name} ({_KINDS[self.kind]})"


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnOptions:
    """Columns of tables that the user names; None: the column is recognised by its name."""

    image: str | None = None
    caption: str | None = None
    id: str | None = None

    def given(self) -> list[str]:
        """The options that the user gave, as typed."""
        values = {"--image-column": self.image, "--caption-column": self.caption, "--id-column": self.id}
        return [f"{option} {value}" for option, value in values.items() if value is not None]


BY_NAME: Final = ColumnOptions()
"""All columns are recognised by their names."""


class ImageColumns:
    """Chooses the column of images of each table of an input, once for all tables with the same schema.

    Args:
        name: the column that the user names.
        known: the columns that earlier rows of the same manifest were read from, see `names`.
        is_by_type: whether these rows were chosen by the rule of `find_image_column_by_type`.
    """

    def __init__(self, name: str | None = None, *, known: Sequence[str] = (), is_by_type: bool = False) -> None:
        self.names: list[str] = list(known)
        """The columns chosen so far. The first of them that a table has is the column of its images, so that other
        processes choose the same, see `read_image_column`."""
        self.chosen: dict[ImageColumn, None] = {}
        """The columns chosen by this object, in order."""
        self.have_base64 = False
        """Whether a column of text has images in base64, see `parquet_images.is_image_text`."""
        self._name = name
        self._known = tuple(known)
        self._is_by_type = is_by_type
        self._by_schema: dict[tuple[tuple[str, pa.DataType], ...], ImageColumn | None] = {}
        self._tables: dict[tuple[str, frozenset[str]], None] = {}
        """For each kind of table the chosen column and the names of all columns."""

    def describe(self) -> str:
        """The chosen columns, for people."""
        names = (
            f"{column.name} (base64)" if self.have_base64 and column.kind == "path" else str(column)
            for column in self.chosen
        )
        return ", ".join(names)

    def get(self, table: pq.ParquetFile, location: str) -> ImageColumn:
        """The column of images of a table. As `find`, but a table without images is an InputError."""
        column = self.find(table, location)
        if column is None:
            raise _no_images(table.schema_arrow, location)
        return column

    def find(self, table: pq.ParquetFile, location: str) -> ImageColumn | None:
        """The column of images of a table; None if it has none.

        A usual name decides. Otherwise a column of bytes, or of structs with bytes, is chosen if it is the only one
        whose first values are images.

        Raises:
            InputError: several columns may be meant, the column that the user names does not exist, or the rows that
                are listed already were read from another column.
        """
        column = self.peek(table, location)
        if column is not None:
            self._note(table.schema_arrow, column, location)
        return column

    def peek(self, table: pq.ParquetFile, location: str) -> ImageColumn | None:
        """As `find`, for a table whose images may not be used: it does not influence the choice for other tables."""
        schema = table.schema_arrow
        key = tuple(zip(schema.names, schema.types, strict=True))
        if key in self._by_schema:
            return self._by_schema[key]
        column, is_certain = self._choose(schema, location)
        if is_certain:
            self._by_schema[key] = column
        return column

    def _choose(self, schema: pa.Schema, location: str) -> tuple[ImageColumn | None, bool]:
        """The column, and whether it is the same for all tables with this schema."""
        if self._name is not None:
            return _named_column(schema, self._name, location), True
        by_name = next(_columns_by_name(schema), None)
        if by_name is not None:
            return by_name, True
        others = list(_other_columns(schema))
        holds_images = {column: holds_image_bytes(location, column) for column in others}
        candidates = [column for column in others if holds_images[column]]
        if len(candidates) > 1:
            raise InputError(
                f"{location} has several columns of images, {' and '.join(map(str, candidates))}: give --image-column "
                "to choose one"
            )
        if candidates:
            return candidates[0], True
        if len(others) == 1 and holds_images[others[0]] is None:  # it has no value, so nothing is read from it
            return others[0], False
        return None, True

    def _note(self, schema: pa.Schema, column: ImageColumn, location: str) -> None:
        kind = column.name, frozenset(schema.names)
        if kind in self._tables and column in self.chosen:
            return
        if self._is_by_type:
            expected = find_image_column_by_type(schema, location).name
        else:
            expected = next((name for name in self._known if name in schema.names), column.name)
        if expected != column.name:
            raise InputError(
                f"{location}: the images listed so far were read from column {expected}, and would now be read from "
                f"{column.name}: give --image-column {expected}, choose another OUTPUT, or give --overwrite to "
                "start again"
            )
        self._tables[kind] = None
        self.chosen[column] = None
        if not self._is_by_type:
            self.names = [*self._known, *self._order_new_names(column.name, location)]

    def _order_new_names(self, chosen: str, location: str) -> list[str]:
        """The chosen names that were not known, in an order in which the first one that a table has is its own.

        Whether such an order exists does not depend on the order of the tables.
        """
        before: dict[str, set[str]] = {name: set() for name, _ in self._tables if name not in self._known}
        for name, names in self._tables:
            if name in before:
                for other in names & (before.keys() - {name}):
                    before[other].add(name)
        try:
            return [*TopologicalSorter(before).static_order()]
        except CycleError as error:
            cycle = error.args[1]  # each name comes before the next; the new table added the chosen one to the cycle
            raise InputError(
                f"{location} has images in column {chosen}, and other tables in {cycle[cycle.index(chosen) + 1]}, "
                "which is also a column of this table: give --image-column to choose one"
            ) from None


def read_image_column(schema: pa.Schema, location: str, names: Sequence[str]) -> ImageColumn:
    """The column of images of a table in a manifest.

    Args:
        names: `ImageColumns.names`; none for a manifest of a version that did not record them.

    Raises:
        pa.ArrowInvalid: the table no longer has this column.
        InputError: the table has no column of images, without names.
    """
    if not names:
        return find_image_column_by_type(schema, location)
    name = next((name for name in names if name in schema.names), None)
    column = _column(schema, name) if name else None
    if column is None:
        raise pa.ArrowInvalid(f"{location} no longer has an image column ({' or '.join(names)})")
    return column


def find_image_column_by_type(schema: pa.Schema, location: str) -> ImageColumn:
    """The column of images by the rule of earlier versions, which considered types before names.

    Raises:
        InputError: there is none.
    """
    structs = [f.name for f in schema if pa.types.is_struct(f.type) and _can_be_image(field_type(f.type, "bytes"))]
    binaries = [f.name for f in schema if _can_be_image(f.type)]
    strings = [f.name for f in schema if is_string(f.type)]
    for kind, columns, usual in (
        ("struct", structs, BYTES_COLUMNS),
        ("bytes", binaries, BYTES_COLUMNS),
        ("path", strings, PATH_COLUMNS),
    ):
        named = [name for name in usual if name in columns]
        if named or (len(columns) == 1 and kind != "path"):
            return ImageColumn(name=(named or columns)[0], kind=kind)
    raise _no_images(schema, location)


def holds_image_bytes(location: str, column: ImageColumn) -> bool | None:
    """Whether most of the first values of a column of bytes are images; None if there are no values."""
    values = list(islice(_first_values(location, column), _NUM_SAMPLES))
    return sum(map(has_image_signature, values)) * 2 >= len(values) if values else None


def _first_values(location: str, column: ImageColumn) -> Iterator[bytes]:
    with open_parquet(location, buffer_bytes=_READ_BYTES) as table:
        for row_group in range(min(table.num_row_groups, _ROW_GROUPS_SEARCHED)):
            batches = table.iter_batches(batch_size=_NUM_SAMPLES, row_groups=[row_group], columns=[column.data])
            for batch in islice(batches, _ROWS_SEARCHED // _NUM_SAMPLES):
                values = batch.column(0)
                if pa.types.is_struct(values.type):
                    values = values.field("bytes")
                yield from values.drop_null().to_pylist()


def _columns_by_name(schema: pa.Schema) -> Iterator[ImageColumn]:
    """Columns with a usual name in any case, the most likely first: structs, then bytes, then paths."""
    for kind, usual in (("struct", BYTES_COLUMNS), ("bytes", BYTES_COLUMNS), ("path", PATH_COLUMNS)):
        columns = [column for name in schema.names if (column := _column(schema, name)) and column.kind == kind]
        for name in usual:
            yield from (column for column in columns if column.name == name)
        for name in usual:
            yield from (column for column in columns if column.name.strip().lower() == name != column.name)


def _other_columns(schema: pa.Schema) -> Iterator[ImageColumn]:
    """Columns that hold bytes."""
    for name in schema.names:
        column = _column(schema, name)
        if column and column.kind != "path":
            yield column


def _column(schema: pa.Schema, name: str) -> ImageColumn | None:
    """The column of this name, if its type can hold images."""
    number = schema.get_field_index(name)  # -1 if there are several of this name
    kind = schema.field(number).type if number >= 0 else pa.null()
    if pa.types.is_struct(kind) and _can_be_image(field_type(kind, "bytes")):
        return ImageColumn(name, "struct")
    if _can_be_image(kind):
        return ImageColumn(name, "bytes")
    return ImageColumn(name, "path") if is_string(kind) else None


def _named_column(schema: pa.Schema, name: str, location: str) -> ImageColumn:
    name = find_column(schema, name, location, option="--image-column")
    column = _column(schema, name)
    if column is None:
        raise InputError(
            f"--image-column {name}: expected bytes, paths, or a struct of bytes and path, got "
            f"{schema.field(name).type} in {location}"
        )
    return column


def find_column(schema: pa.Schema, name: str, location: str, *, option: str) -> str:
    """The column of the name that the user gives with `option`; InputError unless there is exactly one."""
    matches = columns_named(schema, name)
    if len(matches) != 1:
        problem = "several columns of this name" if matches else "no such column"
        raise InputError(f"{option} {name}: {location} has {problem}; its columns are {_describe(schema)}")
    return matches[0]


def columns_named(schema: pa.Schema, name: str) -> list[str]:
    """The columns of this name; if there is none, those of this name in another case."""
    return [column for column in schema.names if column == name] or [
        column for column in schema.names if column.strip().lower() == name.strip().lower()
    ]


def _no_images(schema: pa.Schema, location: str) -> InputError:
    others = [column.name for column in _other_columns(schema) if column.name not in BYTES_COLUMNS]
    no_images = f"; the values of {' and '.join(others)} are not images" if others else ""
    return InputError(
        f"{location} has no column of images: expected bytes ({', '.join(BYTES_COLUMNS)}), paths "
        f"({', '.join(PATH_COLUMNS)}) or a struct of bytes and path, or a column given with --image-column; got "
        f"{_describe(schema)}{no_images}"
    )


def _describe(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)


def is_binary(kind: pa.DataType) -> bool:
    """Whether a column of this plain type holds bytes."""
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def is_string(kind: pa.DataType) -> bool:
    """Whether a column of this plain type holds text."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _can_be_image(kind: pa.DataType) -> bool:
    """Whether bytes of this type can be images; short ones of a fixed length are hashes or ids."""
    return is_binary(kind) and not (pa.types.is_fixed_size_binary(kind) and kind.byte_width <= _MAX_HASH_BYTES)


def field_type(struct: Any, name: str) -> pa.DataType:
    """The type of a struct's field; null if it has no such field."""
    return struct.field(name).type if struct.get_field_index(name) >= 0 else pa.null()
