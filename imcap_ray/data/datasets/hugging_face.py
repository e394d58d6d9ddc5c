"""Hugging Face's imagefolder -> captioned images: `metadata.jsonl` or `metadata.csv` in the images' folder or above."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Final

from imcap_ray import storage
from imcap_ray.data.columns import ColumnOptions
from imcap_ray.data.datasets.dataset import (
    SPLIT_NAMES,
    CaptionedImages,
    Collector,
    DatasetFormat,
    Source,
    split_in_path,
)
from imcap_ray.data.datasets.fields import Record, add_record, fields_of_columns, has_caption_field
from imcap_ray.data.field_names import CAPTION_NAMES
from imcap_ray.errors import DatasetError, translate_errors
from imcap_ray.text.encodings import split_lines

_METADATA: Final[tuple[str, ...]] = ("metadata.jsonl", "metadata.csv")


def read_hugging_face(source: Source) -> CaptionedImages | None:
    """Read metadata files. Folders named after splits are the splits."""
    files = _metadata_files(source)
    if not files:
        return None
    collector = Collector(source, "Hugging Face's imagefolder")
    fields: dict[str, None] = {}
    for name in files:
        locate = partial(_locate, source.base, f"{storage.parent(name)}/" if "/" in name else "")
        for number, record in _records(collector, name):
            where = f"{name} line {number}"
            if record is None:
                collector.add_problem("line is not a JSON object", "lines are not JSON objects", where)
                continue
            fields.update(dict.fromkeys(map(str, record)))
            add_record(collector, record, where=where, locate=locate)
    are_tables = all(name.endswith(".csv") for name in files)
    if fields and not has_caption_field(fields):
        names = f"{CAPTION_NAMES}, or one given with --caption-column," if are_tables else "text, caption or captions"
        raise DatasetError(
            f"{source.location}: {files[0]} has no captions: expected a column {names} next to file_name, got "
            f"{', '.join(fields)}"
        )
    dataset = collector.to_dataset()
    return replace(dataset, columns=replace(source.columns, id=None)) if are_tables else dataset


def _metadata_files(source: Source) -> list[str]:
    if source.is_file:
        return [name for name in source.files if name.endswith((".jsonl", "metadata.csv"))]
    files = [name for name in _METADATA if name in source.files][:1]
    for folder in SPLIT_NAMES:
        in_folder = [name for name in _METADATA if storage.is_file(storage.join(source.base, folder, name))]
        files += [f"{folder}/{name}" for name in in_folder[:1]]
    return files


def _locate(base: str, folder: str, image: str) -> tuple[str, str, str]:
    """Id, location and split of an image that a file in `folder` names."""
    if storage.is_uri(image) or image.startswith("/"):
        return image, image, split_in_path(folder)
    image_id = folder + image.removeprefix("./")
    return image_id, storage.join(base, image_id), split_in_path(image_id)


def _records(collector: Collector, name: str) -> Iterator[tuple[int, Record | None]]:
    """The records with their line numbers; None for a line that is not a JSON object."""
    text = collector.read_text(name)
    location = storage.join(collector.source.base, name)
    with translate_errors(csv.Error, to=DatasetError, message=f"{location} is not valid CSV"):
        yield from _rows(text, collector.source.columns) if name.endswith(".csv") else _objects(text)


def _rows(text: str, columns: ColumnOptions) -> Iterator[tuple[int, Record | None]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    reader.fieldnames = fields_of_columns(reader.fieldnames or [], columns)
    for number, row in enumerate(reader, 2):
        yield number, {key: value for key, value in row.items() if key}


def _objects(text: str) -> Iterator[tuple[int, Record | None]]:
    for number, line in enumerate(split_lines(text), 1):
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            yield number, record if isinstance(record, dict) else None


FORMAT: Final = DatasetFormat(description="Hugging Face's metadata.jsonl or metadata.csv", read=read_hugging_face)
