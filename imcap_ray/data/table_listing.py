"""Parquet tables -> entries of a manifest: for each row its id and the position of its image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from imcap_ray import storage
from imcap_ray.data.columns import ImageColumns, columns_named, find_column, is_binary, is_string
from imcap_ray.data.known_images import KnownImages
from imcap_ray.data.parquet_images import (
    ID_COLUMNS,
    TEXTS_PER_READ,
    TablePaths,
    can_be_id,
    can_be_path,
    find_id_column,
    leaf_of,
    open_table,
    valid_text_array,
)
from imcap_ray.data.schemas import ManifestEntry
from imcap_ray.errors import InputChangedError, InputError
from imcap_ray.storage import ListedFile

IDS_FROM_TABLE: Final = "table"

IDS_FROM_POSITION: Final = "position"

_IDS_PER_READ: Final = 4096

_UUID_BYTES: Final = 16


class IdColumns:
    """Chooses the column of ids of each table.

    Args:
        name: the column that the user names.
        known: images of a manifest, whose ids must stay the same.
    """

    def __init__(self, name: str | None = None, *, known: KnownImages | None = None) -> None:
        self.chosen: dict[str, None] = {}
        self._name = name
        self._known = known if known and known.id_source is not None else None
        self.in_any_case = self._known is None or self._known.has_ids_in_any_case
        """Whether a usual name in another case counts; it does not for the ids of manifests that ignored it."""
        if self._known and name and self._known.id_source == IDS_FROM_POSITION:
            raise InputError(
                f"--id-column {name}: the ids of the images listed so far are table names and row numbers: omit the "
                "option, choose another OUTPUT, or give --overwrite to start again"
            )

    def find(self, schema: pa.Schema, location: str) -> str | None:
        """The column; None if the table has none.

        Raises:
            InputError: the ids came from another column so far, or the column that the user names cannot hold ids.
        """
        usual = find_id_column(schema, in_any_case=self.in_any_case)
        name = usual
        if self._name is not None:
            name = find_column(schema, self._name, location, option="--id-column")
            kind = schema.field(name).type
            if not can_be_id(kind):
                raise InputError(f"--id-column {name}: expected text, numbers or bytes, got {kind} in {location}")
        if self._known:
            before = self._known.id_column
            before = next(iter(columns_named(schema, before)), before) if before else usual
            if before != name:
                raise InputError(
                    f"{location}: the ids of the images listed so far came from {_column_or_none(before)}, and would "
                    f"now come from {_column_or_none(name)}: give --id-column as before, choose another OUTPUT, or "
                    "give --overwrite to start again"
                )
        if name is not None:
            self.chosen[name] = None
        return name


def _column_or_none(name: str | None) -> str:
    return f"column {name}" if name else "no column"


def list_table_images(
    tables: list[ListedFile], *, base: str, columns: ImageColumns, id_columns: IdColumns
) -> Iterator[ManifestEntry]:
    """Entries of a manifest for the rows of Parquet tables, with the same ids as in `build_manifest`. Rows may share an
    id or a path, for instance if each caption has a row. The id of a row without one is None.

    Args:
        base: the folder of the data. The caller checks whether a path points out of it.

    Raises:
        InputError: a table is not readable or has no column of images, or a path holds a secret.
    """
    ids = _natural_ids(tables, columns, id_columns)
    if ids is not None and "name" in ids.kinds and not ids.are_distinct():  # names next to bytes may be arbitrary
        ids = None
    return table_entries(tables, TablePaths(base, True, columns), ids)


def manifest_entry(
    image_id: str, image_path: str, file: ListedFile, *, table_path: str = "", row_group: int = -1, row: int = -1
) -> ManifestEntry:
    """The entry of an image: of a file, or of a row of the table or tar `file`."""
    return {
        "image_id": image_id,
        "image_path": image_path,
        "table_path": table_path,
        "row_group": row_group,
        "row": row,
        "size": file.size,
        "modified_ns": file.modified_ns,
    }


def choose_ids(
    location: str, tables: list[ListedFile], source: str | None, columns: ImageColumns, id_columns: IdColumns
) -> _NaturalIds | None:
    """The ids of the tables' rows; None if ids are table names and row numbers.

    Args:
        source: the source of ids of the images that are listed already, which stays the same because otherwise all of
            them would count as new; None if none is listed.
    """
    if source == IDS_FROM_POSITION:
        return None
    ids = _natural_ids(tables, columns, id_columns)
    if ids is None or ids.are_distinct():
        return ids
    counts = pc.value_counts(ids.values.drop_null())
    repeated = next((entry["values"].as_py() for entry in counts if entry["counts"].as_py() > 1), None)
    if source is None and (repeated is None or "id" not in ids.kinds):
        return None  # a name next to bytes may be the same for all images
    problem = "some rows have none" if repeated is None else f"{repeated!r} occurs more than once"
    if "id" in ids.kinds:
        raise InputError(f"{location}: image ids must be unique, but {problem}; --id-column names the column of ids")
    raise InputError(
        f"{location}: paths have been the ids of its images so far, and new tables make them ambiguous ({problem}): "
        "choose another OUTPUT, or give --overwrite to start again"
    )


@dataclass(frozen=True, slots=True)
class _NaturalIds:
    """Ids that the rows of Parquet tables contain, null for a row without one."""

    values: pa.ChunkedArray
    """Of all tables, one after the other."""
    num_rows: Mapping[str, int]
    """By table."""
    kinds: frozenset[str]
    """Sources of ids: `id`, a column of ids; `path`, that of an image's file; `name`, next to an image's bytes."""

    def are_distinct(self) -> bool:
        """Whether each row has an id, and a different one."""
        return not self.values.null_count and pc.count_distinct(self.values).as_py() == len(self.values)

    def by_table(self) -> dict[str, pa.ChunkedArray]:
        """The ids of each table."""
        ends = np.cumsum([*self.num_rows.values()])
        return {
            table: self.values.slice(end - count, count)
            for (table, count), end in zip(self.num_rows.items(), ends, strict=True)
        }


def table_entries(tables: list[ListedFile], paths: TablePaths, ids: _NaturalIds | None) -> Iterator[ManifestEntry]:
    """Entries of a manifest for the rows of Parquet tables.

    Raises:
        InputChangedError: a table has more or fewer rows than ids, because it has been rewritten since.
    """
    ids_of = ids.by_table() if ids is not None else {}
    for table in tables:
        natural = iter(ids_of[table.location].to_pylist()) if ids is not None else None
        first_row = 0
        for group in paths.row_groups(table.location):
            if ids is not None and first_row + group.num_rows > ids.num_rows[table.location]:
                raise _rewritten(table)
            for row in range(group.num_rows):
                image_id = next(natural) if natural is not None else f"{table.name}#{first_row + row}"
                path = group.paths[row] if group.paths is not None else None
                if path is None:
                    yield manifest_entry(
                        image_id, "", table, table_path=table.location, row_group=group.number, row=row
                    )
                else:
                    yield manifest_entry(image_id, path, _named_file(path))
            first_row += group.num_rows
        if ids is not None and first_row != ids.num_rows[table.location]:
            raise _rewritten(table)


def _rewritten(table: ListedFile) -> InputChangedError:
    return InputChangedError(f"{table.location} was rewritten while it was listed: run the same command again")


def _named_file(location: str) -> ListedFile:
    """A file that a table names, with size and time if it is on a local disk."""
    if not storage.is_uri(location):
        with suppress(OSError, ValueError):  # the error is reported when the image is read
            return storage.describe_file(location)
    return ListedFile(location, location, -1, 0)


def _natural_ids(tables: list[ListedFile], columns: ImageColumns, id_columns: IdColumns) -> _NaturalIds | None:
    """The ids that the tables contain; None if one of the tables has none."""
    chunks: list[pa.Array] = []
    num_rows, kinds = {}, set()
    for listed in tables:
        with open_table(listed.location) as table:
            schema = table.schema_arrow
            column = columns.get(table, listed.location)
            id_column = id_columns.find(schema, listed.location)
            if id_column is not None:
                kind = "id"
            elif column.kind == "path":
                id_column, kind = column.name, "path"
            elif column.kind == "struct" and schema.field(column.name).type.get_field_index("path") >= 0:
                id_column, kind = f"{column.name}.path", "name"
            else:
                return None
            kinds.add(kind)
            num_rows[listed.location] = 0
            batch_size = TEXTS_PER_READ if kind == "path" else _IDS_PER_READ
            for batch in table.iter_batches(batch_size=batch_size, columns=[id_column]):
                ids = id_texts(leaf_of(batch.column(0), "path"))
                if kind != "id":
                    ids = _without_contents(ids, listed.name, num_rows[listed.location])
                chunks.append(ids)
                num_rows[listed.location] += len(ids)
    return _NaturalIds(pa.chunked_array(chunks, pa.string()), num_rows, frozenset(kinds))


def id_texts(values: pa.Array) -> pa.Array:
    """Ids of any type that `can_be_id` accepts, as strings. Numbers, times and the like are as Arrow writes them; bytes
    are text if they are printable UTF-8, otherwise hexadecimal, as those of UUIDs are. Null stays null."""
    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    kind = values.type
    if kind == pa.binary(_UUID_BYTES):
        return pa.array([value and value.hex() for value in values.to_pylist()], pa.string())
    if is_binary(kind):
        return pa.array([value and _text_or_hex(value) for value in values.to_pylist()], pa.string())
    return valid_text_array(values) if is_string(kind) else values.cast(pa.string())


def describe_unused_ids(schema: pa.Schema) -> str:
    """Columns that are named like ids and cannot hold ids, with their types; "" if the table has a column of ids."""
    if find_id_column(schema) is not None:
        return ""
    return ", ".join(f"{field.name} ({field.type})" for field in schema if field.name.strip().lower() in ID_COLUMNS)


def _text_or_hex(value: bytes) -> str:
    with suppress(UnicodeDecodeError):
        text = value.decode()
        if text.isprintable():
            return text
    return value.hex()


def _without_contents(paths: pa.Array, table_name: str, first_row: int) -> pa.Array:
    """Paths as ids, with table name and row number instead of a text that is content, such as a data URI."""
    if not any(path is not None and not can_be_path(path) for path in paths.to_pylist()):
        return paths
    return pa.array(
        [
            path if path is None or can_be_path(path) else f"{table_name}#{row}"
            for row, path in enumerate(paths.to_pylist(), first_row)
        ],
        pa.string(),
    )
