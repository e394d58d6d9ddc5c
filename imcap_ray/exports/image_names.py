"""Ids and exported names of all images -> those with the same one. On disk, because there may be many images."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import duckdb
import pyarrow as pa

from imcap_ray.data.tar_images import IdSet
from imcap_ray.errors import ImcapError, translate_errors

NAME_BYTES: Final = 255
"""Maximum length of a file name on usual file systems."""

_DIGEST_LETTERS: Final = 24

_QUERY_MEMORY: Final = "1GB"

_BATCH_ROWS: Final = 8192

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

    def rename_shared(self, name_of: Callable[[str], str]) -> IdSet:
        """Replace names that several images have by `name_of` their ids, which must be distinct; these ids."""
        if self._database is None:
            return IdSet(())
        reader = self._resources.enter_context(self._database.cursor())
        shared = "SELECT name FROM names GROUP BY name HAVING count(*) > 1"

        def rename() -> Iterator[str]:
            assert self._database
            reader.execute(f"SELECT image_id FROM names WHERE name IN ({shared})")
            while rows := reader.fetchmany(_BATCH_ROWS):
                image_ids = [image_id for (image_id,) in rows]
                names = [name_of(image_id) for image_id in image_ids]
                self._database.register("batch", pa.table({"image_id": image_ids, "name": names}, _SCHEMA))
                self._database.execute(
                    "UPDATE names SET name = batch.name FROM batch WHERE names.image_id = batch.image_id"
                )
                yield from image_ids

        with translate_errors(duckdb.Error, to=ImcapError, message="a query over all image names failed"):
            return IdSet(rename())

    def are_distinct(self) -> bool:
        """Whether all images have a name, and different ones."""
        return self._execute("SELECT count(*) FROM names WHERE name = ''") == [(0,)] and not self.first_shared("name")

    def _execute(self, statement: str) -> list[Any]:
        if self._database is None:  # no image was added
            return []
        with translate_errors(duckdb.Error, to=ImcapError, message="a query over all image names failed"):
            return self._database.execute(statement).fetchall()


def shorten_name(name: str, max_bytes: int = NAME_BYTES) -> str:
    """The name; a longer one becomes its beginning and `%-` with a hash."""
    if len(name.encode("utf-8", "surrogatepass")) <= max_bytes:
        return name
    ending = f"%-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:_DIGEST_LETTERS]}"
    beginning = name.encode("utf-8", "surrogatepass")[: max_bytes - len(ending)].decode("utf-8", "ignore")
    return re.sub("%[0-9A-F]?$", "", beginning) + ending  # not half of an escape
