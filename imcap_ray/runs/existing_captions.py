"""Captions that images have already -> rows of a run. Knows neither Ray nor torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import duckdb
import pyarrow as pa

from imcap_ray.data.datasets import load_dataset
from imcap_ray.data.datasets.dataset import NUM_EXAMPLES, examples
from imcap_ray.data.schemas import EXISTING, MANIFEST_SCHEMA, OK
from imcap_ray.errors import InputError

ROWS_PER_PART: Final = 100_000

_NAN: Final = float("nan")

_CONSTANTS: Final = {
    **{"confidence": _NAN, "familiarity": _NAN, "logprob": _NAN, "num_tokens": 0},
    **{"status": OK, "caption_source": EXISTING, "error_code": "", "error_message": ""},
    # Unknown, because the image is not read.
    **{"width": 0, "height": 0, "format": "", "sha256": "", "duplicate_of": ""},
}
"""The other columns of an image whose caption exists."""


@dataclass(frozen=True, slots=True)
class ExistingCaptions:
    """The captions of a data set, by image."""

    location: str
    table: pa.Table
    """Columns image_id, image_path and captions."""
    fingerprint: str
    """A digest of the ids and captions."""

    @classmethod
    def read(cls, location: str) -> ExistingCaptions:
        """Read captions in any of the formats of `load_dataset`, or an earlier captions folder.

        Raises:
            DatasetError: there are none, or they are in no known format.
        """
        dataset = load_dataset(location, allow_outside_paths=True, count_missing_files=False, refuse_leaks=False)
        table = pa.concat_tables([dataset.table, dataset.left_out]).sort_by("image_id")
        digest = hashlib.sha256()
        for batch in table.select(["image_id", "captions"]).to_batches(ROWS_PER_PART):
            for row in batch.to_pylist():
                digest.update(json.dumps(list(row.values())).encode())
        return cls(dataset.location, table.select(["image_id", "image_path", "captions"]), digest.hexdigest())

    def match(self, database: duckdb.DuckDBPyConnection) -> int:
        """Find the images of the table `manifest` that have captions here; returns how many.

        Makes the tables `existing` and `matches` (image_id of both). An image matches by its path, otherwise by its id.
        If none does, images match by their file names.

        Raises:
            InputError: several captioned images match one image, or the reverse by a file name.
        """
        database.register("existing", self.table)
        database.execute(
            "CREATE TEMP TABLE matches AS SELECT manifest.image_id, existing.image_id AS existing_id "
            "FROM manifest JOIN existing USING (image_path) WHERE image_path <> ''"
        )
        database.execute(
            "INSERT INTO matches SELECT image_id, image_id FROM manifest JOIN existing USING (image_id) "
            "WHERE image_id NOT IN (SELECT existing_id FROM matches)"
        )
        if not (count := self._count_matches(database, "DISTINCT image_id")):
            database.execute(
                "INSERT INTO matches SELECT manifest.image_id, existing.image_id FROM manifest JOIN existing ON "
                f"{_file_name('manifest')} = {_file_name('existing')}"
            )
            self._refuse_ambiguous(database, "existing_id")
            count = self._count_matches(database, "DISTINCT image_id")
        self._refuse_ambiguous(database, "image_id")
        return count

    def describe(self, database: duckdb.DuckDBPyConnection, count: int) -> str:
        """One line on the images that `match` has found, and on those that are not in the input."""
        num_unused = self.table.num_rows - self._count_matches(database, "DISTINCT existing_id")
        images = "1 image of the input has" if count == 1 else f"{count:,} images of the input have"
        line = f"{self.location}: {images} a caption there, which is kept"
        if not num_unused:
            return line
        unused = database.execute(
            "SELECT image_id FROM existing ANTI JOIN matches ON existing_id = existing.image_id "
            f"ORDER BY image_id LIMIT {NUM_EXAMPLES}"
        ).fetchall()
        names = examples((name for (name,) in unused), num_unused)
        others = "other image with captions there is" if num_unused == 1 else "other images with captions there are"
        return f"{line}; {num_unused:,} {others} not among those of this run: {names}"

    def rows(self, database: duckdb.DuckDBPyConnection, schema: pa.Schema) -> Iterator[pa.Table]:
        """The rows, with manifest_id, of images that `match` has found and that have none in the table `captions`."""
        reader = database.sql(
            "SELECT manifest_id, manifest.image_id, manifest.image_path, existing.captions "
            "FROM matches JOIN manifest ON manifest.image_id = matches.image_id "
            "JOIN existing ON existing.image_id = existing_id "
            "WHERE matches.image_id NOT IN (SELECT image_id FROM captions)"
        ).to_arrow_reader(ROWS_PER_PART)
        numbered = schema.insert(0, MANIFEST_SCHEMA.field("manifest_id"))
        for batch in reader:
            if batch.num_rows:
                columns = {name: pa.repeat(value, batch.num_rows) for name, value in _CONSTANTS.items()}
                columns |= {name: batch[name] for name in batch.schema.names}
                columns["caption"] = pa.compute.list_element(batch["captions"], 0)
                yield pa.table({field.name: columns[field.name].cast(field.type) for field in numbered}, numbered)

    def _refuse_ambiguous(self, database: duckdb.DuckDBPyConnection, column: str) -> None:
        other = "image_id" if column == "existing_id" else "existing_id"
        row = database.execute(
            f"SELECT {column}, min({other}), max({other}) FROM matches GROUP BY 1 "
            f"HAVING count(DISTINCT {other}) > 1 ORDER BY 1 LIMIT 1"
        ).fetchone()
        if row:
            where, others = (self.location, "the input") if column == "existing_id" else ("the input", self.location)
            raise InputError(
                f"{row[0]!r} of {where} may be {row[1]!r} or {row[2]!r} of {others}: name the images of "
                f"{self.location} by their ids, which are paths relative to INPUT"
            )

    def _count_matches(self, database: duckdb.DuckDBPyConnection, what: str) -> int:
        return int(database.execute(f"SELECT count({what}) FROM matches").fetchall()[0][0])


def _file_name(table: str) -> str:
    return f"regexp_extract({table}.image_id, '[^/]*$')"
