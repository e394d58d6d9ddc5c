"""Parquet -> captioned images."""

from __future__ import annotations

from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from imcap_ray import storage
from imcap_ray.datasets.table import CaptionedImages, Collector, Source
from imcap_ray.errors import DatasetError
from imcap_ray.manifest import refuse_pickles

ROWS_AT_A_TIME: Final = 10_000


def read_parquet(source: Source) -> CaptionedImages | None:
    """Columns `captions` (list of strings) or `caption`; `image_id` and `image_path`, either is enough; `split`.

    An image may have several rows. Rows without an image or a caption are counted and left out.
    """
    paths = [source.location] if source.is_file else storage.list_parquet(source.location)
    paths = [path for path in paths if path.endswith(".parquet")]
    if not paths:
        return None
    found_columns: dict[str, None] = {}
    table = pa.concat_tables([_read_table(path, found_columns) for path in paths], promote_options="default")
    names = table.column_names
    captions_column = "captions" if "captions" in names else "caption"
    if captions_column not in names or not {"image_id", "image_path"} & set(names):
        raise DatasetError(
            f"{source.location}: expected the columns image_id or image_path, and captions or caption; "
            f"got {', '.join(found_columns)}"
        )
    collector = Collector(source, "Parquet")
    batches = table.to_batches(max_chunksize=ROWS_AT_A_TIME)
    for number, row in enumerate(row for batch in batches for row in batch.to_pylist()):
        image_id = row.get("image_id") or row.get("image_path")
        found = row[captions_column]
        found = [found] if isinstance(found, str) else found or []
        found = [caption for caption in found if caption and caption.strip()]
        if not image_id or not found:
            collector.odd("row has no image or no caption", "rows have no image or no caption", f"row {number}")
            continue
        path = _beside(source.base, row.get("image_path") or "")
        collector.add(image_id, found, where=f"row {number}", path=path, split=row.get("split") or "")
    return collector.to_dataset()


def _read_table(path: str, found_columns: dict[str, None]) -> pa.Table:
    """The columns of a table that are looked for, as text; the names of all are added to `found_columns`."""
    filesystem, inner = storage.resolve(path)
    try:
        schema = pq.read_schema(inner, filesystem=filesystem)
        refuse_pickles(schema, path)
        found_columns.update(dict.fromkeys(schema.names))
        wanted = ("image_id", "image_path", "split", "captions", "caption")
        table = pq.read_table(inner, filesystem=filesystem, columns=[n for n in wanted if n in schema.names])
        return table.cast(pa.schema([(f.name, _text_type(f.type)) for f in table.schema]))
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{path} is not readable Parquet of captions: {error}") from error


def _text_type(stored: pa.DataType) -> pa.DataType:
    is_list = pa.types.is_list(stored) or pa.types.is_large_list(stored)
    return pa.list_(pa.string()) if is_list else pa.string()


def _beside(base: str, path: str) -> str:
    return path if not path or storage.is_uri(path) or path.startswith("/") else storage.join(base, path)
