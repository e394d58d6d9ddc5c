"""Parquet -> captioned images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from imcap_ray import storage
from imcap_ray.datasets.table import CaptionedImages, Collector, Source
from imcap_ray.errors import DatasetError
from imcap_ray.manifest import refuse_pickles

ROWS_AT_A_TIME: Final = 10_000
_WANTED: Final = ("image_id", "image_path", "split", "captions", "caption")


def read_parquet(source: Source) -> CaptionedImages | None:
    """Columns `captions` (list of strings) or `caption`; `image_id` and `image_path`, either is enough; `split`.

    An image may have several rows. Rows without an image or a caption are counted and left out.
    """
    paths = [source.location] if source.is_file else storage.list_parquet(source.location)
    paths = [path for path in paths if path.endswith(".parquet")]
    if not paths:
        return None
    columns = {path: _columns(path) for path in paths}
    names = list(dict.fromkeys(name for of_file in columns.values() for name in of_file))
    captions_column = "captions" if "captions" in names else "caption"
    if captions_column not in names or not {"image_id", "image_path"} & set(names):
        raise DatasetError(
            f"{source.location}: expected the columns image_id or image_path, and captions or caption; "
            f"got {', '.join(names)}"
        )
    collector = Collector(source, "Parquet")
    rows = (row for path, of_file in columns.items() for row in _rows(path, of_file))
    for number, row in enumerate(rows):
        image_id = row.get("image_id") or row.get("image_path")
        found = row.get(captions_column)
        found = [found] if isinstance(found, str) else found or []
        found = [caption for caption in found if caption and caption.strip()]
        if not image_id or not found:
            collector.odd("row has no image or no caption", "rows have no image or no caption", f"row {number}")
            continue
        path = _beside(source.base, row.get("image_path") or "")
        collector.add(image_id, found, where=f"row {number}", path=path, split=row.get("split") or "")
    return collector.to_dataset()


def _columns(path: str) -> list[str]:
    filesystem, inner = storage.resolve(path)
    try:
        schema = pq.read_schema(inner, filesystem=filesystem)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error
    refuse_pickles(schema, path)
    return list(schema.names)


def _rows(path: str, names: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The columns of a file that are looked for, as text, row by row."""
    filesystem, inner = storage.resolve(path)
    columns = [name for name in names if name in _WANTED]
    try:
        with filesystem.open_input_file(inner) as stream, pq.ParquetFile(stream) as file:
            for batch in file.iter_batches(batch_size=ROWS_AT_A_TIME, columns=columns):
                table = pa.Table.from_batches([batch])
                table.validate(full=True)  # Parquet's readers do not ask whether text is UTF-8
                yield from table.cast(pa.schema([(f.name, _text_type(f.type)) for f in table.schema])).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: Exception) -> DatasetError:
    return DatasetError(f"{path} is not readable Parquet of captions: {error}")


def _text_type(stored: pa.DataType) -> pa.DataType:
    is_list = pa.types.is_list(stored) or pa.types.is_large_list(stored)
    return pa.list_(pa.string()) if is_list else pa.string()


def _beside(base: str, path: str) -> str:
    return path if not path or storage.is_uri(path) or path.startswith("/") else storage.join(base, path)
