"""Parquet -> captioned images, those that lie in it too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from imcap_ray import storage
from imcap_ray.datasets.records import SPLIT_FIELD, captions_in, has_caption_field, is_caption_field
from imcap_ray.datasets.table import CaptionedImages, Collector, PackedImage, Source, split_in_name, split_in_path
from imcap_ray.errors import DatasetError, InputError
from imcap_ray.manifest import (
    describe_unused_ids,
    find_id_column,
    find_image_column,
    id_texts,
    list_table_images,
    refuse_pickles,
)
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
    tables = {name: ListedFile(storage.join(source.base, name), name, -1, 0) for name in names}
    schemas = {name: _read_schema(table.location) for name, table in tables.items()}
    columns = {column: None for schema in schemas.values() for column in schema.names}
    kinds = [_image_kind(schema) for schema in schemas.values()]
    has_images = None not in kinds
    unused_ids = {name: unused for name, schema in schemas.items() if (unused := describe_unused_ids(schema))}
    if not has_caption_field(columns) or not (has_images or all(map(find_id_column, schemas.values()))):
        first = next(iter(unused_ids.values()), "")
        raise DatasetError(
            f"{source.location}: expected a column of images (image with bytes, image_path, ...) or image_id, and one "
            f"of captions (captions, caption, text, ...); got {', '.join(columns)}"
            + (f"; ids must be text, numbers or bytes, which {first} is not" if first else "")
        )
    collector = Collector(source, "Parquet" if set(kinds) <= {"path", None} else "Parquet with images")
    for name, unused in unused_ids.items():
        collector.odd(
            "table has ids that are neither text nor numbers nor bytes, not used",
            "tables have ids that are neither text nor numbers nor bytes, not used",
            f"{name}, {unused}",
        )
    packed: dict[str, PackedImage] = {}
    try:
        entries = list_table_images(source.location, [*tables.values()], base=source.base) if has_images else None
        rows = (pair for name, schema in schemas.items() for pair in _read_rows(tables[name], schema))
        for number, (name, row) in enumerate(rows):
            entry = next(entries) if entries else row
            image_id = entry["image_id"] or entry["image_path"]
            found = [caption for caption in captions_in(row) if caption.strip()]
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
    return collector.to_dataset(packed=packed)


def _read_schema(path: str) -> pa.Schema:
    filesystem, inner = storage.resolve(path)
    try:
        schema = pq.read_schema(inner, filesystem=filesystem)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error
    refuse_pickles(schema, path)
    return schema


def _image_kind(schema: pa.Schema) -> str | None:
    try:
        return find_image_column(schema, "").kind
    except InputError:
        return None


def _read_rows(table: ListedFile, schema: pa.Schema) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The captions, split and id in each row of a table, by the columns' names in small letters, and the table's name.
    The id and what else a manifest's row has are those of an image that is nowhere."""
    id_column = find_id_column(schema)
    nowhere = {"image_id": None, "image_path": "", "table_path": ""}
    wanted = {
        field.name.strip().lower(): field.name
        for field in schema
        if (is_caption_field(field.name) or field.name.lower() == SPLIT_FIELD) and _is_text(field.type)
    }
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
