"""A manifest on disk -> which images it lists already, and which of them have changed or moved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imcap_ray import storage
from imcap_ray.data.parquet_files import read_table
from imcap_ray.data.schemas import MANIFEST_SCHEMA

ID_SOURCE_KEY: Final = b"imcap_ray.id_source"
"""In the metadata of a manifest of Parquet tables: whether the images' ids are `_TABLE`, those that the tables have for
them, or `_POSITION`, the table's name and the row's number."""

IMAGE_COLUMNS_KEY: Final = b"imcap_ray.image_columns"
"""In the metadata of a manifest: a JSON list of the columns that the tables' images are read from, see
`ImageColumns.names`. Earlier versions wrote none."""

ID_COLUMN_KEY: Final = b"imcap_ray.id_column"
"""In the metadata of a manifest: the column that the user named for the ids; absent if none was named."""


def parse_image_columns(metadata: Mapping[bytes, bytes] | None) -> list[str]:
    """The image columns that a manifest part records in its metadata."""
    return [str(name) for name in json.loads((metadata or {}).get(IMAGE_COLUMNS_KEY, b"[]"))]


class KnownImages:
    """The images that a manifest lists already, looked up without holding them all.

    A listing comes in the order in which the manifest was written, so that one part after the other is needed; which
    part may hold an id is told by the least and the greatest id in each.
    """

    def __init__(self, folder: str) -> None:
        self.num_images = 0
        self.id_source: str | None = None
        """`_TABLE` or `_POSITION` where these are rows of Parquet tables."""
        self.id_column: str | None = None
        """The column of ids that the user named."""
        self.image_columns: list[str] = []
        """See `ImageColumns.names`."""
        self._parts: list[tuple[str, tuple[str, str] | None]] = []
        for part in storage.list_parquet(folder):
            filesystem, path = storage.resolve(part)
            metadata = pq.read_metadata(path, filesystem=filesystem)
            self.num_images += metadata.num_rows
            self.id_source = ((metadata.metadata or {}).get(ID_SOURCE_KEY) or b"").decode() or self.id_source
            self.id_column = ((metadata.metadata or {}).get(ID_COLUMN_KEY) or b"").decode() or self.id_column
            self.image_columns = list(dict.fromkeys([*self.image_columns, *parse_image_columns(metadata.metadata)]))
            self._parts.append((part, range_of(metadata, "image_id")))

    @property
    def is_by_type(self) -> bool:
        """Whether these are rows of tables, listed by a version that did not note the columns of images."""
        return self.id_source is not None and not self.image_columns

    def find(self, rows: pa.Table) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """For rows of a listing their `manifest_id`, -1 where they are new; whether they have changed since; whether
        they have not, but are in another place."""
        ids = np.full(rows.num_rows, -1, np.int64)
        is_changed, is_moved = np.zeros(rows.num_rows, bool), np.zeros(rows.num_rows, bool)
        least, greatest = pc.min_max(rows["image_id"]).as_py().values()
        for part, known_range in self._parts:
            if (ids >= 0).all():
                break
            if known_range and (known_range[1] < least or known_range[0] > greatest):
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


def range_of(metadata: pq.FileMetaData, name: str) -> tuple[Any, Any] | None:
    """The least and the greatest value of a column of a manifest; None if the file does not have them: Parquet keeps
    none of text longer than 4 KB."""
    column = MANIFEST_SCHEMA.get_field_index(name)
    ranges = [metadata.row_group(number).column(column).statistics for number in range(metadata.num_row_groups)]
    if not ranges or any(one is None or not one.has_min_max for one in ranges):
        return None
    return min(one.min for one in ranges), max(one.max for one in ranges)


def _differ(one: pa.Table, other: pa.Table, *columns: str) -> npt.NDArray[np.bool_]:
    """In which rows two tables differ in any of these columns."""
    differ = np.zeros(one.num_rows, bool)
    for name in columns:
        differ |= pc.not_equal(one[name], other[name]).to_numpy()
    return differ
