"""Parquet tables -> captioned images, whose bytes may be in the tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Final, NamedTuple

import pyarrow as pa

from imcap_ray import storage
from imcap_ray.data.columns import ColumnOptions, ImageColumn, ImageColumns, columns_named, find_column, is_string
from imcap_ray.data.datasets.dataset import (
    CaptionedImages,
    Collector,
    DatasetFormat,
    PackedImage,
    Source,
    describe_tables,
    split_in_name,
    split_in_path,
)
from imcap_ray.data.datasets.fields import (
    Record,
    captions_in,
    has_caption_field,
    is_caption_field,
)
from imcap_ray.data.field_names import CAPTION_FIELDS, SPLIT_FIELD
from imcap_ray.data.parquet_files import open_parquet, read_schema
from imcap_ray.data.parquet_images import refuse_pickles
from imcap_ray.data.schemas import ManifestEntry
from imcap_ray.data.table_listing import IdColumns, describe_unused_ids, id_texts, list_table_images
from imcap_ray.errors import DatasetError, InputError, translate_errors
from imcap_ray.storage import ListedFile

ROWS_PER_READ: Final = 10_000


class _Table(NamedTuple):
    """A Parquet table with captions."""

    file: ListedFile
    schema: pa.Schema


class _Row(NamedTuple):
    """Captions and split of a row, by lower-case field names, and the row's id."""

    table: str
    image_id: str | None
    fields: Record


@dataclass(frozen=True, slots=True)
class _Columns:
    """Columns of the tables of a data set."""

    images: ImageColumns
    ids: IdColumns
    captions: Mapping[str, Mapping[str, str]]
    """By table, the columns of captions by their field's name."""
    has_images: bool
    """Whether all tables have a column of images."""
    has_bytes: bool

    def describe(self) -> str:
        """For people, the columns that the data are read from."""
        captions = dict.fromkeys(name for of_table in self.captions.values() for name in of_table.values())
        notes = [f"captions from column {', '.join(captions)}"]
        if self.has_images:
            notes.insert(0, f"images from column {self.images.describe()}")
        if self.ids.chosen:
            notes.append(f"ids from column {', '.join(self.ids.chosen)}")
        return ", ".join(notes)


def read_parquet(source: Source) -> CaptionedImages | None:
    """Read captions from columns with any of the usual names. Images are found as by `imcap caption`: bytes, paths, or
    Hugging Face's structs of both; if a table has none, an id is enough. Splits come from a column `split`, otherwise
    from the names of files and folders: `data/train-00000-of-00002.parquet`.

    An image may have several rows. Rows without an image or a caption are counted and left out.
    """
    names = source.files_of_kind("parquet")
    if not names:
        return None
    # Before anything is read, so that a table that is rewritten meanwhile does not count as the version that was read.
    locations = {name: storage.join(source.base, name) for name in names}
    versions = describe_tables(locations.values())
    tables = {
        name: _Table(
            ListedFile(location, name, versions[location].size, versions[location].modified_ns),
            _read_schema(location),
        )
        for name, location in locations.items()
    }
    usual = [] if source.is_deep else source.usual_files_of_kind("parquet")
    collector = Collector(source, "Parquet")
    for name in names:  # a table in another folder may be anything
        if name not in usual and not _has_captions(tables[name].schema, source.columns.caption):
            del tables[name]
            collector.add_problem(
                "table in a folder below has no captions", "tables in folders below have no captions", name
            )
    if not tables:
        return None
    try:
        columns = _choose_columns(collector, tables, source.columns)
        if columns.has_bytes:
            collector.format = "Parquet with images"
        packed = _add_rows(collector, tables, columns)
    except DatasetError:
        raise
    except InputError as error:
        raise DatasetError(str(error)) from error
    dataset = collector.to_dataset(packed=packed, tables={table.file.location: table.file for table in tables.values()})
    return replace(
        dataset,
        columns=source.columns,
        image_columns=tuple(columns.images.names) if columns.has_images else (),
        columns_note=columns.describe(),
    )


def _choose_columns(collector: Collector, tables: Mapping[str, _Table], options: ColumnOptions) -> _Columns:
    """The columns of all tables.

    Raises:
        InputError: there are no captions, or neither images nor ids; or a column that the user names is unsuitable.
    """
    unused_ids = {name: unused for name, table in tables.items() if (unused := describe_unused_ids(table.schema))}
    for name, unused in unused_ids.items() if options.id is None else ():
        collector.add_problem(
            "table has an id column of an unsupported type, which is ignored",
            "tables have an id column of an unsupported type, which is ignored",
            f"{name}, {unused}",
        )
    images, ids = ImageColumns(options.image), IdColumns(options.id)
    image_columns = [_find_image_column(images, table.file.location) for table in tables.values()]
    has_ids = all([ids.find(table.schema, table.file.location) for table in tables.values()])
    captions = {name: _caption_columns(options.caption, table.schema, name) for name, table in tables.items()}
    all_names = dict.fromkeys(column for table in tables.values() for column in table.schema.names)
    has_captions = options.caption is not None or has_caption_field(all_names)
    if not has_captions or not (None not in image_columns or has_ids):
        first = next(iter(unused_ids.values()), "")
        raise DatasetError(
            f"{collector.source.location}: expected a column of images (image with bytes, image_path, ...) or "
            f"image_id, and one of captions (captions, caption, text, ...); got {', '.join(all_names)}"
            + (f"; ids must be text, numbers or bytes, which {first} is not" if first else "")
        )
    return _Columns(
        images,
        ids,
        captions,
        has_images=None not in image_columns,
        has_bytes=any(column and column.kind != "path" for column in image_columns),
    )


def _add_rows(collector: Collector, tables: Mapping[str, _Table], columns: _Columns) -> dict[str, PackedImage]:
    """Add the rows of all tables; the positions of the images whose bytes are in them."""
    packed: dict[str, PackedImage] = {}
    rows = (
        row
        for name, table in tables.items()
        for row in _read_rows(table, columns.captions[name], columns.ids.find(table.schema, name))
    )
    pairs: Iterable[tuple[_Row, ManifestEntry | None]] = ((row, None) for row in rows)
    if columns.has_images:
        entries = list_table_images(
            [table.file for table in tables.values()],
            base=collector.source.base,
            columns=columns.images,
            id_columns=columns.ids,
        )
        pairs = _pair(rows, entries, collector.source.location)
    for number, (row, entry) in enumerate(pairs):
        image_id = (entry["image_id"] or entry["image_path"]) if entry else row.image_id
        captions = [caption for caption in captions_in(row.fields) if caption.strip()]
        if image_id and not captions and entry:
            collector.without_captions.add(image_id)
        if not image_id or not captions:
            collector.add_problem("row has no image or no caption", "rows have no image or no caption", f"row {number}")
            continue
        path = entry["image_path"] if entry else ""
        if entry and entry["table_path"] and image_id not in collector.captions:
            path = storage.join(entry["table_path"], str(number))
            packed[path] = PackedImage(entry["table_path"], entry["row_group"], entry["row"])
        file_name = row.table.rpartition("/")[2].removesuffix(".parquet")
        split = row.fields.get(SPLIT_FIELD) or split_in_path(row.table) or split_in_name(file_name)
        collector.add(image_id, captions, where=f"row {number}", path=path, split=str(split))
    return packed


def _pair(
    rows: Iterator[_Row], entries: Iterator[ManifestEntry], location: str
) -> Iterator[tuple[_Row, ManifestEntry]]:
    """Each row with the entry of its image.

    Raises:
        DatasetError: there are more of one than of the other, because a table was rewritten between the two readings.
    """
    for row, entry in zip_longest(rows, entries):
        if row is None or entry is None:
            raise DatasetError(f"{location} was rewritten while it was read: run the same command again")
        yield row, entry


def _find_image_column(columns: ImageColumns, location: str) -> ImageColumn | None:
    with _translate_errors(location), open_parquet(location) as table:
        return columns.find(table, location)


def _has_captions(schema: pa.Schema, caption_column: str | None) -> bool:
    return bool(columns_named(schema, caption_column)) if caption_column else has_caption_field(schema.names)


def _caption_columns(name: str | None, schema: pa.Schema, location: str) -> dict[str, str]:
    """The columns of captions, by field names of `fields`: the one that the user names, or those with usual names."""
    if name is None:
        fields = [field for field in schema if is_caption_field(field.name) and _is_text(field.type)]
        return {field.name.strip().lower(): field.name for field in fields}
    name = find_column(schema, name, location, option="--caption-column")
    if not _is_text(schema.field(name).type):
        kind = schema.field(name).type
        raise DatasetError(f"--caption-column {name}: expected text or lists of text, got {kind} in {location}")
    return {CAPTION_FIELDS[0]: name}


def _read_schema(location: str) -> pa.Schema:
    with _translate_errors(location):
        schema = read_schema(location)
    refuse_pickles(schema, location)
    return schema


def _read_rows(table: _Table, captions: Mapping[str, str], id_column: str | None) -> Iterator[_Row]:
    """The rows of a table.

    Args:
        captions: the table's columns of captions, by their field's name.
    """
    splits = [field.name for field in table.schema if field.name.strip().lower() == SPLIT_FIELD]
    splits = [name for name in splits if _is_text(table.schema.field(name).type)]
    wanted = {**captions, **({SPLIT_FIELD: splits[-1]} if splits else {})}
    with _translate_errors(table.file.location), open_parquet(table.file.location) as file:
        columns = [*wanted.values(), *filter(None, [id_column])]
        for batch in file.iter_batches(batch_size=ROWS_PER_READ, columns=columns):
            rows = pa.Table.from_batches([batch]).select([*wanted.values()])
            rows.validate(full=True)  # Parquet's readers do not check that text is UTF-8
            ids = id_texts(batch[id_column]).to_pylist() if id_column else [None] * len(rows)
            for image_id, fields in zip(ids, rows.rename_columns([*wanted]).to_pylist(), strict=True):
                yield _Row(table.file.name, image_id, fields)


def _is_text(kind: pa.DataType) -> bool:
    return is_string(kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind)


def _translate_errors(location: str) -> AbstractContextManager[None]:
    message = f"{location} is not readable Parquet of captions"
    return translate_errors(pa.ArrowException, OSError, to=DatasetError, message=message)


FORMAT: Final = DatasetFormat(
    description="Parquet with images, their paths or ids, and captions",
    read=read_parquet,
    is_packed=True,
    covers_folder=True,
)
