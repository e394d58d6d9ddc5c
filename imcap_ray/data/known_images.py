"""A manifest on disk -> the images that it lists, and which of them have changed or moved since."""

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
from imcap_ray.data.parquet_files import read_metadata, read_table
from imcap_ray.data.schemas import MANIFEST_SCHEMA

ID_SOURCE_KEY: Final = b"imcap_ray.id_source"
"""Key in the metadata of a manifest of Parquet tables: the source of the ids, `IDS_FROM_TABLE` or `IDS_FROM_POSITION`
of `table_listing`."""

IMAGE_COLUMNS_KEY: Final = b"imcap_ray.image_columns"
"""Key in the metadata of a manifest: a JSON list of the columns that images are read from, see `ImageColumns.names`.
Earlier versions did not write it."""

ID_COLUMN_KEY: Final = b"imcap_ray.id_column"
"""Key in the metadata of a manifest: the column of ids that the user named, if any."""

ID_CASE_KEY: Final = b"imcap_ray.id_case"
"""Key in the metadata of a manifest: `any` if a column of ids was recognised by its name in any case. Earlier versions
recognised only lower case."""


def parse_image_columns(metadata: Mapping[bytes, bytes] | None) -> list[str]:
    """The image columns that a manifest part records in its metadata."""
    return [str(name) for name in json.loads((metadata or {}).get(IMAGE_COLUMNS_KEY, b"[]"))]


class KnownImages:
    """The images that a manifest lists, looked up without holding all of them in memory.

    A new listing has the same order as the manifest, so that its parts are needed one after the other. The smallest and
    the largest id of a part show whether it may list an image.
    """

    def __init__(self, folder: str) -> None:
        self.next_id = 0
        """The first number that no image has. The numbers below have gaps where images were removed."""
        self.id_source: str | None = None
        """See `ID_SOURCE_KEY`; None if there are no Parquet tables."""
        self.id_column: str | None = None
        """The column of ids that the user named."""
        self.has_ids_in_any_case = False
        """See `ID_CASE_KEY`."""
        self.image_columns: list[str] = []
        """See `ImageColumns.names`."""
        self._parts: list[tuple[str, tuple[str, str] | None]] = []
        for part in storage.list_work_tables(folder):
            metadata = read_metadata(part)
            if numbers := range_of(metadata, "manifest_id"):
                self.next_id = max(self.next_id, numbers[1] + 1)
            elif metadata.num_rows:  # written without statistics
                last = pc.max(read_table(part, ["manifest_id"])["manifest_id"]).as_py()
                self.next_id = max(self.next_id, last + 1)
            self.id_source = ((metadata.metadata or {}).get(ID_SOURCE_KEY) or b"").decode() or self.id_source
            self.id_column = ((metadata.metadata or {}).get(ID_COLUMN_KEY) or b"").decode() or self.id_column
            self.has_ids_in_any_case |= ID_CASE_KEY in (metadata.metadata or {})
            self.image_columns = list(dict.fromkeys([*self.image_columns, *parse_image_columns(metadata.metadata)]))
            self._parts.append((part, range_of(metadata, "image_id")))

    def ids(self) -> npt.NDArray[np.int64]:
        """The numbers of all images, sorted."""
        numbers = [read_table(part, ["manifest_id"])["manifest_id"].to_numpy() for part, _ in self._parts]
        return np.sort(np.concatenate(numbers)) if numbers else np.empty(0, np.int64)

    @property
    def is_by_type(self) -> bool:
        """Whether tables were listed by a version that did not record their columns of images."""
        return self.id_source is not None and not self.image_columns

    def find(self, rows: pa.Table) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """The `manifest_id` of each row of a new listing, -1 for a new image; whether its file has changed; whether the
        image has moved without a change."""
        ids = np.full(rows.num_rows, -1, np.int64)
        is_changed, is_moved = np.zeros(rows.num_rows, bool), np.zeros(rows.num_rows, bool)
        smallest, largest = pc.min_max(rows["image_id"]).as_py().values()
        for part, known_range in self._parts:
            if (ids >= 0).all():
                break
            if known_range and (known_range[1] < smallest or known_range[0] > largest):
                continue
            part_rows = read_table(part)
            matches = pc.index_in(rows["image_id"], value_set=part_rows["image_id"]).to_numpy(zero_copy_only=False)
            known = np.flatnonzero(~np.isnan(matches))
            positions = matches[known].astype(np.int64)
            ids[known] = part_rows["manifest_id"].to_numpy()[positions]
            before, now = part_rows.take(positions), rows.take(known)
            is_changed[known] = _differ(before, now, "size", "modified_ns")
            is_moved[known] = ~is_changed[known] & _differ(before, now, "image_path", "table_path", "row_group", "row")
        return ids, is_changed, is_moved


def range_of(metadata: pq.FileMetaData, name: str) -> tuple[Any, Any] | None:
    """The smallest and the largest value in a column of a manifest; None if the file does not record them, as for text
    of more than 4 KB."""
    column = MANIFEST_SCHEMA.get_field_index(name)
    groups = [metadata.row_group(number).column(column).statistics for number in range(metadata.num_row_groups)]
    if not groups or any(group is None or not group.has_min_max for group in groups):
        return None
    return min(group.min for group in groups), max(group.max for group in groups)


def _differ(left: pa.Table, right: pa.Table, *columns: str) -> npt.NDArray[np.bool_]:
    """The rows in which two tables differ in any of these columns."""
    differ = np.zeros(left.num_rows, bool)
    for name in columns:
        differ |= pc.not_equal(left[name], right[name]).to_numpy()
    return differ
