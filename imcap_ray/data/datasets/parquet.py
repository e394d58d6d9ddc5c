"""Parquet -> captioned images, those that lie in it too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from imcap_ray import storage
from imcap_ray.data.columns import ImageColumn, ImageColumns, require_column
from imcap_ray.data.datasets.dataset import (
    CaptionedImages,
    Collector,
    PackedImage,
    Source,
    describe_tables,
    split_in_name,
    split_in_path,
)
from imcap_ray.data.datasets.fields import CAPTION_FIELDS, SPLIT_FIELD, captions_in, has_caption_field, is_caption_field
from imcap_ray.data.parquet_images import refuse_pickles
from imcap_ray.data.table_listing import IdColumns, describe_unused_ids, id_texts, list_table_images
from imcap_ray.errors import DatasetError, InputError
from imcap_ray.storage import ListedFile

ROWS_AT_A_TIME: Final = 10_000


def read_parquet(source: Source) -> CaptionedImages | None:
    """Captions in columns of any of their usual names; the images, as `imcap caption` finds them, are bytes, paths or
    Hugging Face's structs of both, or ids where a table has none; `split`, else the splits of the files' names or
    folders: `data/train-00000-of-00002.parquet`.

    An image may have several rows. Rows without an image or a caption are counted and left out.
    """
    names = source.files_ending("parquet")
    if not names:
        return None
    # Before anything is read: a table that is rewritten meanwhile must not count as the version that was read.
    locations = {name: storage.join(source.base, name) for name in names}
    versions = describe_tables(locations.values())
    tables = {
        name: ListedFile(location, name, versions[location].size, versions[location].modified_ns)
        for name, location in locations.items()
    }
    schemas = {name: _read_schema(table.location) for name, table in tables.items()}
    usual = [] if source.is_deep else source.usual_files_ending("parquet")
    without = [name for name in names if name not in usual and not _has_captions(schemas[name], source.columns.caption)]
    for name in without:  # a table in another folder may be anything
        del tables[name], schemas[name]
    if not tables:
        return None
    columns = {column: None for schema in schemas.values() for column in schema.names}
    image_columns, id_columns = ImageColumns(source.columns.image), IdColumns(source.columns.id)
    collector = Collector(source, "Parquet")
    for name in without:
        collector.odd("table in a folder below has no captions", "tables in folders below have no captions", name)
    unused_ids = {name: unused for name, schema in schemas.items() if (unused := describe_unused_ids(schema))}
    if source.columns.id is None:
        for name, unused in unused_ids.items():
            collector.odd(
                "table has an id column of an unsupported type, which is ignored",
                "tables have an id column of an unsupported type, which is ignored",
                f"{name}, {unused}",
            )
    packed: dict[str, PackedImage] = {}
    try:
        found_columns = [_find_image_column(image_columns, table.location) for table in tables.values()]
        has_images = None not in found_columns
        has_ids = all([id_columns.find(schema, tables[name].location) for name, schema in schemas.items()])
        captions = {name: _caption_columns(source.columns.caption, schema, name) for name, schema in schemas.items()}
        has_captions = source.columns.caption is not None or has_caption_field(columns)
        if not has_captions or not (has_images or has_ids):
            first = next(iter(unused_ids.values()), "")
            raise DatasetError(
                f"{source.location}: expected a column of images (image with bytes, image_path, ...) or image_id, and "
                f"one of captions (captions, caption, text, ...); got {', '.join(columns)}"
                + (f"; ids must be text, numbers or bytes, which {first} is not" if first else "")
            )
        if any(column and column.kind != "path" for column in found_columns):
            collector.format = "Parquet with images"
        entries = (
            list_table_images([*tables.values()], base=source.base, columns=image_columns, id_columns=id_columns)
            if has_images
            else None
        )
        rows = (
            pair
            for name, schema in schemas.items()
            for pair in _read_rows(tables[name], schema, captions[name], id_columns.find(schema, name))
        )
        for number, (name, row) in enumerate(rows):
            entry = next(entries) if entries else row
            image_id = entry["image_id"] or entry["image_path"]
            found = [caption for caption in captions_in(row) if caption.strip()]
            if image_id and not found and entries:
                collector.without_captions.add(image_id)
            if not image_id or not found:
                collector.odd("row has no image or no caption", "rows have no image or no caption", f"row {number}")
                continue
            path = entry["image_path"]
            if entry["table_path"] and image_id not in collector.captions:
                path = storage.join(entry["table_path"], str(number))
                packed[path] = PackedImage(entry["table_path"], entry["row_group"], entry["row"])
            split = row.get(SPLIT_FIELD) or split_in_path(name) or split_in_name(name.rpartition("/")[2][:-8])
            collector.add(image_id, found, where=f"row {number}", path=path, split=split)
    except DatasetError:
        raise
    except InputError as error:
        raise DatasetError(str(error)) from error
    dataset = collector.to_dataset(packed=packed, tables={table.location: table for table in tables.values()})
    caption_names = {name: None for of_table in captions.values() for name in of_table.values()}
    notes = [f"captions from column {', '.join(caption_names)}"]
    if has_images:
        notes.insert(0, f"images from column {', '.join(map(str, image_columns.chosen))}")
    if id_columns.chosen:
        notes.append(f"ids from column {', '.join(id_columns.chosen)}")
    return replace(
        dataset,
        columns=source.columns,
        image_columns=tuple(image_columns.names) if has_images else (),
        columns_note=", ".join(notes),
    )


def _find_image_column(columns: ImageColumns, location: str) -> ImageColumn | None:
    filesystem, inner = storage.resolve(location)
    try:
        with filesystem.open_input_file(inner) as stream, pq.ParquetFile(stream) as table:
            return columns.find(table, location)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(location, error) from error


def _has_captions(schema: pa.Schema, caption_column: str | None) -> bool:
    return caption_column in schema.names if caption_column else has_caption_field(schema.names)


def _caption_columns(name: str | None, schema: pa.Schema, location: str) -> dict[str, str]:
    """The columns of captions, by the names of `records`: the one that the user names, else those with usual names."""
    if name is None:
        fields = [field for field in schema if is_caption_field(field.name) and _is_text(field.type)]
        return {field.name.strip().lower(): field.name for field in fields}
    require_column(schema, name, location, option="--caption-column")
    if not _is_text(schema.field(name).type):
        kind = schema.field(name).type
        raise DatasetError(f"--caption-column {name}: expected text or lists of text, got {kind} in {location}")
    return {CAPTION_FIELDS[0]: name}


def _read_schema(path: str) -> pa.Schema:
    filesystem, inner = storage.resolve(path)
    try:
        schema = pq.read_schema(inner, filesystem=filesystem)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error
    refuse_pickles(schema, path)
    return schema


def _read_rows(
    table: ListedFile, schema: pa.Schema, captions: Mapping[str, str], id_column: str | None
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The captions, split and id in each row of a table, by the columns' names in small letters, and the table's name.
    The id and what else a manifest's row has are those of an image that is nowhere.

    Args:
        captions: the table's columns of captions, by these names.
    """
    nowhere = {"image_id": None, "image_path": "", "table_path": ""}
    splits = [field.name for field in schema if field.name.strip().lower() == SPLIT_FIELD and _is_text(field.type)]
    wanted = {**captions, **dict.fromkeys([SPLIT_FIELD] if splits else [], "".join(splits[-1:]))}
    filesystem, inner = storage.resolve(table.location)
    try:
        with filesystem.open_input_file(inner) as stream, pq.ParquetFile(stream) as file:
            columns = [*wanted.values(), *filter(None, [id_column])]
            for batch in file.iter_batches(batch_size=ROWS_AT_A_TIME, columns=columns):
                rows = pa.Table.from_batches([batch]).select([*wanted.values()])
                rows.validate(full=True)  # Parquet's readers do not ask whether text is UTF-8
                ids = id_texts(batch[id_column]).to_pylist() if id_column else [None] * len(rows)
                texts = rows.rename_columns([*wanted]).to_pylist()
                for image_id, row in zip(ids, texts, strict=True):
                    yield table.name, {**nowhere, **row, "image_id": image_id}
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(table.location, error) from error


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _unreadable(path: str, error: Exception) -> DatasetError:
    return DatasetError(f"{path} is not readable Parquet of captions: {error}")
