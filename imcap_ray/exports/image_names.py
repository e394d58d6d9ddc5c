"""Ids and exported names of all images -> two images with the same one. On disk, because there may be many images."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import duckdb
import pyarrow as pa

from imcap_ray.errors import ImcapError, translate_errors

_QUERY_MEMORY: Final = "1GB"

_SCHEMA: Final = pa.schema([("image_id", pa.string()), ("name", pa.string())])


class ImageNames:
    """A temporary table of image ids and exported names."""

    def __init__(self) -> None:
        self._resources = ExitStack()
        self._database: duckdb.DuckDBPyConnection | None = None

    def __enter__(self) -> ImageNames:
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def add(self, image_ids: list[str], names: list[str]) -> None:
        """Add images with their names."""
        if self._database is None:
            folder = self._resources.enter_context(TemporaryDirectory())
            self._database = self._resources.enter_context(duckdb.connect(str(Path(folder, "names"))))
            self._execute(f"SET memory_limit = '{_QUERY_MEMORY}'; SET preserve_insertion_order = false")
            self._execute("CREATE TABLE names (image_id VARCHAR, name VARCHAR)")
        self._database.register("batch", pa.table({"image_id": image_ids, "name": names}, _SCHEMA))
        self._execute("INSERT INTO names SELECT image_id, name FROM batch")

    def first_shared(self, column: str) -> tuple[str, str] | None:
        """The ids of two images that have the same `image_id` or `name`; None if there are none."""
        pairs = self._execute(
            f"SELECT min(image_id), max(image_id) FROM names GROUP BY {column} HAVING count(*) > 1 ORDER BY 1 LIMIT 1"
        )
        return pairs[0] if pairs else None

    def are_distinct(self) -> bool:
        """Whether all images have a name, and different ones."""
        return self._execute("SELECT count(*) FROM names WHERE name = ''") == [(0,)] and not self.first_shared("name")

    def _execute(self, statement: str) -> list[Any]:
        if self._database is None:  # no image was added
            return []
        with translate_errors(duckdb.Error, to=ImcapError, message="a query over all image names failed"):
            return self._database.execute(statement).fetchall()
