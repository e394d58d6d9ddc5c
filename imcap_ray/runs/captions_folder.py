"""The files of a captioning run: which run made them, which images are done, and how rows are changed or deleted.

    OUTPUT/*.parquet          the parts: rows of `CAPTIONS_SCHEMA`
    OUTPUT/_imcap/run.json    settings, versions, counts, state: running, failed, interrupted, complete; replacing while
                              the rows of next/ replace the old ones
                  heartbeat   when the run was last alive, and how fast it was
                  manifest/   every image of the input with its number
                  done/       for each part, under its name without `.parquet`, the numbers of its images: Ray Data's
                              checkpoint
                  owner       the run that holds the lease
                  removed     ids of images with rows that INPUT no longer has, in Parquet; missing if there are none
                  forget      images that are being deleted from parts and from done/; missing otherwise
                  next/       the new rows of `--overwrite`, until they replace all this

What is not for users has names without an extension, because many readers take every `.parquet` file below a folder, or
the files with the commonest extension. Earlier versions named tables `.parquet`, and `recover` renames them.

A part counts if its file in done/ exists. Everything here can be repeated after a crash at any line: `recover` finishes
or undoes what is half done. Of Ray, this module knows only how it names parts and the files in done/.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any, Final

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from imcap_ray import storage
from imcap_ray.config import FLOAT32
from imcap_ray.data.manifest import manifest_part, update_manifest
from imcap_ray.data.parquet_files import read_table, write_table
from imcap_ray.data.schemas import (
    CAPTIONS_SCHEMA,
    CAPTIONS_SCHEMAS,
    DUPLICATE,
    EXISTING,
    FAILED,
    MANIFEST_SCHEMA,
    OK,
    UNFAMILIAR,
)
from imcap_ray.errors import ImcapError, OutputError, translate_errors
from imcap_ray.runs.captions_table import COMPLETE, NEXT_FOLDER, REMOVED_FILE, REPLACING, is_part, parse_run_file
from imcap_ray.runs.lease import Lease, has_foreign_files
from imcap_ray.text.escaping import short_value

RUN_FILE: Final = "run.json"

HEARTBEAT_FILE: Final = "heartbeat"
_EARLIER_HEARTBEAT_FILE: Final = "heartbeat.json"

WORK_FOLDER: Final = "_imcap"

_FIRST_FILES: Final = tuple(f"{WORK_FOLDER}/{name}" for name in ("owner", HEARTBEAT_FILE, _EARLIER_HEARTBEAT_FILE))

_ANSWER: Final = (
    *("caption", "captions", "confidence", "familiarity", "logprob", "num_tokens"),
    *("error_code", "error_message", "caption_source"),
)

_PENDING: Final = ".pending"
"""Ray's extension for a file in done/ whose part is not complete yet."""

_EXTENSION: Final = ".parquet"

IDENTITY: Final = {
    "input": "input",
    "precision": "precision",
    "model_fingerprint": "model",
    "search": "search settings",
    "existing_captions": "set of existing captions",
    "schema_version": "version of the schema",
}
"""Entries of run.json that must not change between a run and its resumption, and their names in messages."""

NO_CAPTIONS: Final = "none"
"""`existing_captions` of a run that captions all images."""

READ_AHEAD: Final = 16
"""Parts that are read at once: a store takes a tenth of a second for each, and there are thousands."""

QUERY_MEMORY: Final = "1GB"
"""Memory of a query over all rows; beyond that, DuckDB works on disk."""


class CaptionsFolder:
    """The output of a captioning run, at a path or URI.

    Args:
        moving_to: the folder whose rows these replace. Parts of this one may have been moved there already.
    """

    def __init__(self, location: str, *, moving_to: str | None = None) -> None:
        self.location = location
        self._moving_to = moving_to
        self.work = storage.join(location, WORK_FOLDER)
        self.manifest = storage.join(self.work, "manifest")
        self.done = storage.join(self.work, "done")
        self._journal = storage.join(self.work, "forget")
        self._removed = storage.join(self.work, REMOVED_FILE)

    # --- which run made it ---

    def read_run(self) -> dict[str, Any] | None:
        """The content of run.json, for a run that writes to this folder; None if there is none.

        Raises:
            OutputError: it is corrupt.
        """
        location = storage.join(self.work, RUN_FILE)
        try:
            return parse_run_file(location)
        except ValueError as error:
            raise OutputError(f"{location} is damaged: {error}; choose another OUTPUT, or remove this one") from error

    def write_run(self, run: Mapping[str, Any]) -> None:
        """Replace run.json."""
        storage.write_bytes(storage.join(self.work, RUN_FILE), json.dumps(run, indent=2).encode())

    def read_heartbeat(self) -> dict[str, Any]:
        """The last heartbeat: its `time`, when its run `started`, `images_per_second`; empty if there is none."""
        path = storage.join(self.work, HEARTBEAT_FILE)
        if not storage.exists(path):
            path = storage.join(self.work, _EARLIER_HEARTBEAT_FILE)
        try:
            heartbeat = json.loads(storage.read_bytes(path)) if storage.exists(path) else {}
        except (ValueError, FileNotFoundError):
            return {}
        return heartbeat if isinstance(heartbeat, dict) else {}

    def write_heartbeat(self, heartbeat: Mapping[str, Any]) -> None:
        """Replace the heartbeat file."""
        storage.write_bytes(storage.join(self.work, HEARTBEAT_FILE), json.dumps(heartbeat).encode())

    def require_identity(self, identity: Mapping[str, Any]) -> None:
        """Raise OutputError if something else made this folder; `identity` has the keys of `IDENTITY`."""
        run = self.read_run()
        if run is None:
            if storage.is_file(self.location) or (
                storage.is_folder(self.location) and has_foreign_files(self.location, _FIRST_FILES)
            ):
                raise OutputError(f"{self.location} exists and is no captions folder of imcap: choose another OUTPUT")
            return
        for key, name in IDENTITY.items():
            if not _agree(key, run, identity):
                raise OutputError(
                    f"{self.location} was made with another {name} ({short_value(_recorded(key, run))}, now "
                    f"{short_value(identity[key])}): choose another OUTPUT, or give --overwrite to start again"
                )

    def is_of(self, identity: Mapping[str, Any]) -> bool:
        """Whether a run with this identity made this folder."""
        run = self.read_run()
        return run is not None and all(_agree(key, run, identity) for key in IDENTITY)

    def discard(self) -> None:
        """Remove everything that a run wrote before it could begin."""
        storage.remove(self.work)
        if storage.is_folder(self.location) and not any(True for _ in storage.list_files(self.location)):
            storage.remove(self.location)

    # --- what is done ---

    def parts(self) -> list[str]:
        """The Parquet files of captions that are recorded as done."""
        recorded = {_name(path) for path in self._done_files()}
        parts = self._own_parts()
        if self._moving_to:
            names = {_name(path) for path in parts}  # a store moves a part by copying it and removing the original
            parts += [path for path in CaptionsFolder(self._moving_to)._own_parts() if _name(path) not in names]
        return [path for path in parts if _name(path) in recorded]

    def _own_parts(self) -> list[str]:
        return [path for path in storage.list_work_tables(self.location) if is_part(path)]

    @property
    def part_extension(self) -> str:
        """Extension of new parts: none for those of `next`, which are not for readers yet."""
        return "" if self._moving_to else _EXTENSION

    def read_parts(self, columns: list[str], where: pc.Expression | None = None) -> Iterator[pa.RecordBatch]:
        """These columns of the rows that are recorded as done, in batches, in any order."""
        parts = _dataset(self.parts(), CAPTIONS_SCHEMA)
        yield from parts.to_batches(columns=columns, filter=where, fragment_readahead=READ_AHEAD)

    def done_ids(self) -> npt.NDArray[np.int64]:
        """Manifest ids of the images whose rows are written, sorted; at most 16 bytes of memory for each."""
        records = _dataset(self._done_files(), pa.schema([MANIFEST_SCHEMA.field("manifest_id")]))
        ids = records.to_table(columns=["manifest_id"], fragment_readahead=READ_AHEAD)["manifest_id"].to_numpy()
        return np.sort(ids)

    def count_manifest(self) -> int:
        """Number of images of the input."""
        return sum(_num_rows(path) for path in storage.list_work_tables(self.manifest))

    def count_rows(self) -> tuple[dict[str, int], dict[str, int]]:
        """Number of rows that are recorded as done by status, and of failed ones by error code, the highest first."""
        with self.database() as database:
            rows = database.execute(
                "SELECT status, error_code, count(*) FROM captions GROUP BY ALL ORDER BY 3 DESC, 1, 2"
            ).fetchall()
        counts: dict[str, int] = {}
        for status, _, number in rows:
            counts[status] = counts.get(status, 0) + number
        return counts, {code: number for _, code, number in rows if code}

    def count_existing(self) -> int:
        """Number of rows whose caption the run did not make."""
        if "caption_source" not in _dataset(self.parts(), CAPTIONS_SCHEMA).schema.names:  # of an earlier version
            return 0
        with self.database() as database:
            [(count,)] = database.execute(
                f"SELECT count(*) FROM captions WHERE caption_source = '{EXISTING}'"
            ).fetchall()
        return int(count)

    def count_unfamiliar(self) -> int | None:
        """Number of images that are unlike what the model has learned from; None if no row has a familiarity."""
        if "familiarity" not in _dataset(self.parts(), CAPTIONS_SCHEMA).schema.names:  # of an earlier version
            return None
        with self.database() as database:
            known, unfamiliar = database.execute(
                "SELECT count(*) FILTER (WHERE NOT isnan(familiarity)), "
                f"count(*) FILTER (WHERE familiarity < {UNFAMILIAR}) FROM captions"
            ).fetchall()[0]
        return unfamiliar if known else None

    def verify_row_counts(self) -> None:
        """Raise ImcapError unless every image of the manifest is exactly one row."""
        with self.database() as database:
            lost, repeated = database.execute(
                "SELECT count(*) FILTER (WHERE n = 0), count(*) FILTER (WHERE n > 1) FROM ("
                "  SELECT sum(is_row) AS n FROM ("
                "    SELECT image_id, 0 AS is_row FROM manifest UNION ALL SELECT image_id, 1 FROM captions"
                "  ) GROUP BY image_id)"
            ).fetchall()[0]
            [(unknown,)] = database.execute(
                "SELECT count(*) FROM captions ANTI JOIN manifest USING (image_id)"
            ).fetchall()
        ids = self.done_ids()
        num_images, num_done = self.count_manifest(), len(ids) - np.count_nonzero(ids[1:] == ids[:-1])
        if lost or repeated or unknown or num_done != num_images:
            raise ImcapError(
                f"the row counts of {self.location} are inconsistent: of {num_images:,} images {num_done:,} are "
                f"recorded as done, {lost:,} have no row, {repeated:,} have several, {unknown:,} rows have no image"
            )

    # --- after a crash ---

    def recover(self) -> int:
        """Finish or undo what a dead run was doing, so that everything here is complete.

        Copies of parts, as synchronisation tools make them, are removed. Returns how many parts were removed for this
        reason.
        """
        self.finish_replacement()
        for folder in (self.location, self.work, self.manifest, self.done):
            storage.remove_temporary(folder)
        self._remove_extensions()
        if storage.is_folder(self.done):
            for file in list(storage.list_files(self.done, recursive=False)):
                if file.name.endswith(_PENDING):
                    storage.remove(file.location)
        parts = {_name(path): path for path in self._own_parts()}
        records = {_name(path): path for path in self._done_files()}
        for name in parts.keys() | records.keys():
            pair = [path for path in (parts.get(name), records.get(name)) if path]
            # A part was written and not recorded, or recorded and not written by a process that outlived its run, or a
            # power cut has left one of the two empty.
            if len(pair) < 2 or not all(_is_complete(path) for path in pair):
                for path in pair:
                    storage.remove(path)
        if storage.exists(self._journal):
            self._delete_journaled_rows()
        self._remove_copied_manifests()
        return self._remove_copied_parts()

    def _remove_copied_parts(self) -> int:
        """Leave each image in at most one part. Returns how many parts were removed.

        Of parts with the same rows, the first by name stays. If parts with different rows share images, one of them is
        older than the other, and it is unknown which: all their rows are deleted, to be captioned again.
        """
        ids = self.done_ids()
        repeated = ids[1:][ids[1:] == ids[:-1]]
        if not repeated.size:
            return 0
        parts, num_parts = {_name(path): path for path in self._own_parts()}, 0
        kept: dict[bytes, str] = {}
        sharing: dict[str, npt.NDArray[np.int64]] = {}
        for record in sorted(self._done_files()):
            part_ids = read_table(record)["manifest_id"].to_numpy()
            if not contains_any(repeated, part_ids):
                continue
            digest = _digest_rows(parts[_name(record)])
            if digest in kept:
                storage.remove(parts[_name(record)])
                storage.remove(record)
                num_parts += 1
            else:
                kept[digest] = record
                sharing[record] = part_ids
        if sharing:
            unique_ids, counts = np.unique(np.concatenate(list(sharing.values())), return_counts=True)
            shared = unique_ids[counts > 1]
            mixed = [part_ids for part_ids in sharing.values() if contains_any(shared, part_ids)]
            if mixed:
                num_parts += len(mixed)
                self._delete_rows(self._manifest_rows(np.unique(np.concatenate(mixed))))
        return num_parts

    def _manifest_rows(self, ids: npt.NDArray[np.int64]) -> pa.Table:
        """The manifest_id and image_id of these images."""
        manifest = _dataset(storage.list_work_tables(self.manifest), MANIFEST_SCHEMA)
        return manifest.to_table(
            columns=["manifest_id", "image_id"], filter=pc.field("manifest_id").isin(pa.array(ids))
        )

    def _remove_copied_manifests(self) -> None:
        """Remove copies of manifest files: those under a name that `build_manifest` does not give, whose original
        exists."""
        paths = storage.list_work_tables(self.manifest)
        names = {_name(path) for path in paths}
        for path in paths:
            if not re.fullmatch(r"part-\d{12}", _name(path)):
                first = pc.min(read_table(path, ["manifest_id"])["manifest_id"]).as_py()
                if first is not None and manifest_part(first) in names:
                    storage.remove(path)

    # --- rows are added, deleted and changed ---

    def add_part(self, rows: pa.Table) -> None:
        """Write rows that no pipeline makes, with their manifest_id, as a part of its own."""
        name = f"{uuid.uuid4().hex}_{0:06}"
        write_table(storage.join(self.location, name + self.part_extension), rows.drop_columns("manifest_id"))
        write_table(storage.join(self.done, name), rows.select(["manifest_id"]).replace_schema_metadata())

    def delete_failed_rows(self) -> int:
        """Delete the rows of failed images, so that they are captioned again. Returns how many."""
        with self.database() as database:
            ids = _query(
                database,
                f"SELECT manifest_id, image_id FROM captions JOIN manifest USING (image_id) WHERE status = '{FAILED}'",
            )
        return self._delete_rows(ids)

    def delete_changed_rows(self, changed: pa.Table) -> int:
        """Delete the rows of images whose files have changed, given by their new manifest rows. Returns how many."""
        count = self._delete_rows(changed.select(["manifest_id", "image_id"]))
        update_manifest(self.manifest, changed)
        return count

    def record_removed(self, ids: npt.NDArray[np.int64]) -> None:
        """Record which images the input no longer has, given by their numbers, so that exports leave them out."""
        if ids.size:
            write_table(self._removed, self._manifest_rows(ids).select(["image_id"]))
        else:
            storage.remove(self._removed)

    def prune(self, ids: npt.NDArray[np.int64]) -> None:
        """Remove images, given by their numbers, from the manifest, and their rows."""
        self._delete_rows(self._manifest_rows(ids))
        for part in storage.list_work_tables(self.manifest):
            _delete_values(part, "manifest_id", pa.chunked_array([ids]))
        storage.remove(self._removed)

    def resolve_duplicates(self) -> int:
        """Give images of the same bytes the same caption. Returns how many rows were deleted because none has one.

        A run captions the first of them that it reads, and writes the others as duplicates of "" for the time being.
        Here they get the caption of their twin. All name the one that is first in the manifest as their original,
        because that must not depend on which process was faster. If none of them was captioned, their rows are deleted,
        so that the images are captioned.
        """
        with self.database() as database:
            database.execute(
                "CREATE TEMP TABLE twins AS SELECT sha256, image_id, manifest_id, status, duplicate_of "
                "FROM captions JOIN manifest USING (image_id) WHERE sha256 <> '' AND "
                f"(status = '{DUPLICATE}' OR sha256 IN (SELECT sha256 FROM captions GROUP BY ALL HAVING count(*) > 1))"
            )
            database.execute(
                "CREATE TEMP TABLE groups AS SELECT sha256, captioned IS NULL AS has_failed, original, "
                "coalesce(captioned, failed) AS source "
                "FROM (SELECT sha256, arg_min(image_id, manifest_id) AS original, "
                f"arg_min(image_id, manifest_id) FILTER (status = '{OK}' OR duplicate_of <> '') AS captioned, "
                f"arg_min(image_id, manifest_id) FILTER (status = '{FAILED}') AS failed FROM twins GROUP BY sha256)"
            )
            database.execute(
                "CREATE TEMP TABLE wanted AS SELECT image_id, source, "
                f"CASE WHEN has_failed THEN '{FAILED}' WHEN image_id = original THEN '{OK}' ELSE '{DUPLICATE}' END "
                "AS status, "
                "CASE WHEN has_failed OR image_id = original THEN '' ELSE original END AS duplicate_of "
                "FROM twins JOIN groups USING (sha256) WHERE source IS NOT NULL"
            )
            database.execute(
                "CREATE TEMP TABLE changes AS SELECT wanted.* FROM wanted JOIN twins USING (image_id) "
                "WHERE wanted.status <> twins.status OR wanted.duplicate_of <> twins.duplicate_of"
            )
            orphans = _query(
                database, "SELECT manifest_id, image_id FROM twins JOIN groups USING (sha256) WHERE source IS NULL"
            )
            if database.execute("SELECT count(*) FROM changes").fetchall() != [(0,)]:
                names = {name for name, *_ in database.execute("DESCRIBE captions").fetchall()}
                answer = [name for name in _ANSWER if name in names]  # earlier versions have fewer columns
                database.execute(
                    f"CREATE TEMP TABLE sources AS SELECT image_id, {', '.join(answer)} FROM captions "
                    "WHERE image_id IN (SELECT source FROM changes)"
                )
                for path in self.parts():
                    _apply_changes(path, database, answer)
        return self._delete_rows(orphans)

    def _delete_rows(self, ids: pa.Table) -> int:
        """Delete rows, given by the columns manifest_id and image_id. Returns how many."""
        if ids.num_rows:
            write_table(self._journal, ids)
            self._delete_journaled_rows()
        return int(ids.num_rows)

    def _delete_journaled_rows(self) -> None:
        """Delete the rows in the journal from the parts, then from done/. In the other order, a crash in between would
        leave images that are captioned twice."""
        journal = read_table(self._journal).sort_by("manifest_id")
        deleted_ids = journal["manifest_id"].to_numpy()
        parts = {_name(path): path for path in self.parts()}
        records = {}
        for path in self._done_files():
            ids = read_table(path)["manifest_id"].to_numpy()
            positions = np.minimum(np.searchsorted(deleted_ids, ids), max(0, len(deleted_ids) - 1))
            rows = journal.take(positions[deleted_ids[positions] == ids])
            if rows.num_rows:  # most parts have none
                records[path] = rows["manifest_id"]
                if part := parts.get(_name(path)):
                    _delete_values(part, "image_id", rows["image_id"])
        for path, ids in records.items():
            _delete_values(path, "manifest_id", ids)
        storage.remove(self._journal)

    # --- new rows replace the old ones ---

    def next(self) -> CaptionsFolder:
        """The folder in which `--overwrite` makes the new rows; readers of the old ones do not see them."""
        return CaptionsFolder(storage.join(self.work, NEXT_FOLDER), moving_to=self.location)

    def is_being_replaced(self) -> bool:
        """Whether the rows of `next` are complete, so that some of them may have replaced old ones."""
        return self.next()._is_complete()

    def finish_replacement(self) -> bool:
        """Finish replacing the old rows if a dead run had begun to. Returns whether it had."""
        is_pending = self.is_being_replaced()
        if is_pending:
            self.replace_by_next()
        return is_pending

    def replace_by_next(self) -> None:
        """Replace the old rows by the complete new ones: first the new parts appear, then the old ones are removed.

        From before the first step until after the last, run.json has the state `replacing` and `open_captions` refuses
        the folder, because it may hold rows of both.

        Raises:
            ImcapError: another run has begun to do the same.
        """
        new = self.next()
        # No run that wrote to the old folder may write to the new one. And if two processes are replacing, the first
        # has to stop before the second is done, because it would then take all parts for old ones.
        require_lease = Lease.acquire(self.work).require
        run, kept = new.read_run() or {}, {_name(path) for path in new._done_files()}
        require_lease()
        self.write_run(run | {"output": self.location, "state": REPLACING})
        for path in new._own_parts():
            require_lease()
            storage.move(path, storage.join(self.location, _name(path) + _EXTENSION))
        for path in self._own_parts():
            if _name(path) not in kept:
                require_lease()
                storage.remove(path)
        # No new file is removed on the way, because a step that stalls may end after a second process has finished.
        self._remove_extensions()
        for folder, source in ((self.manifest, new.manifest), (self.done, new.done)):
            sources = storage.list_work_tables(source)
            for path in sources:
                require_lease()
                storage.write_bytes(storage.join(folder, _name(path)), storage.read_bytes(path))
            for name in {_name(path) for path in storage.list_work_tables(folder)} - {_name(path) for path in sources}:
                require_lease()
                storage.remove(storage.join(folder, name))
        require_lease()
        if storage.exists(new._removed):
            storage.write_bytes(self._removed, storage.read_bytes(new._removed))
        else:
            storage.remove(self._removed)
        self.write_run(run | {"output": self.location})
        storage.remove(storage.join(new.work, RUN_FILE))  # from here on there is nothing left to replace
        storage.remove(new.location)

    def _is_complete(self) -> bool:
        run = self.read_run()
        return run is not None and run.get("state") == COMPLETE

    def _done_files(self) -> list[str]:
        return storage.list_work_tables(self.done)

    def _remove_extensions(self) -> None:
        """Rename the tables of earlier versions, whose extension was `.parquet`."""
        for path in [
            self._journal + _EXTENSION,
            *storage.list_parquet(self.manifest),
            *storage.list_parquet(self.done),
        ]:
            if storage.exists(path):
                storage.move(path, path.removesuffix(_EXTENSION))
        heartbeat = storage.join(self.work, _EARLIER_HEARTBEAT_FILE)
        if storage.exists(heartbeat):
            storage.remove(heartbeat)

    @contextmanager
    def database(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """A database with the tables `captions` and `manifest`, in bounded memory."""
        with open_database() as database:
            database.register("captions", _dataset(self.parts(), CAPTIONS_SCHEMA))
            database.register("manifest", open_manifests([self.manifest]))
            yield database


def open_manifests(folders: Sequence[str]) -> pads.Dataset:
    """The rows of all these manifests."""
    return pads.dataset([_dataset(storage.list_work_tables(folder), MANIFEST_SCHEMA) for folder in folders])


@contextmanager
def open_database() -> Iterator[duckdb.DuckDBPyConnection]:
    """An empty database in bounded memory; errors of queries are ImcapErrors."""
    with (
        TemporaryDirectory() as folder,
        translate_errors(duckdb.Error, to=ImcapError, message="a query over all rows failed"),
        duckdb.connect() as database,
    ):
        database.execute(f"SET memory_limit = '{QUERY_MEMORY}'; SET preserve_insertion_order = false")
        database.execute("SET temp_directory = ?", [folder])
        yield database


def _agree(key: str, run: Mapping[str, Any], identity: Mapping[str, Any]) -> bool:
    """Whether a run matches this entry of the identity. An earlier schema matches too: the run continues with it."""
    recorded = _recorded(key, run)
    return bool(recorded == identity[key]) or (key == "schema_version" and recorded in CAPTIONS_SCHEMAS)


def _recorded(key: str, run: Mapping[str, Any]) -> Any:
    """An entry of run.json, or what it was in versions that did not record it."""
    return run.get(key, {"precision": FLOAT32, "existing_captions": NO_CAPTIONS}.get(key))


def _dataset(files: list[str], schema: pa.Schema) -> pads.Dataset:
    if not files:
        return pads.dataset(schema.empty_table())
    return pads.dataset(
        [storage.resolve(path)[1] for path in files], filesystem=storage.resolve(files[0])[0], format="parquet"
    )


def _query(database: duckdb.DuckDBPyConnection, sql: str) -> Any:
    return database.sql(sql).to_arrow_table()


def _apply_changes(path: str, database: duckdb.DuckDBPyConnection, answer: Sequence[str]) -> None:
    """Rewrite a part if some of its rows are in the table `changes`, with these columns of the table `sources`."""
    part = read_table(path)
    database.register("part", part.select(["image_id"]).append_column("position", pa.array(range(part.num_rows))))
    changes = _query(
        database,
        f"SELECT position, status, duplicate_of, {', '.join(f'sources.{name}' for name in answer)} "
        "FROM part JOIN changes USING (image_id) JOIN sources ON sources.image_id = source",
    )
    if not changes.num_rows:
        return
    changed = part.take(changes["position"])
    for number, field in enumerate(part.schema):
        if field.name in changes.column_names:
            changed = changed.set_column(number, field, changes[field.name].cast(field.type))
    is_changed = pc.is_in(pa.array(range(part.num_rows)), value_set=changes["position"])
    write_table(path, pa.concat_tables([part.filter(pc.invert(is_changed)), changed]))


def _delete_values(path: str, column: str, values: pa.ChunkedArray) -> None:
    """Rewrite a Parquet file without the rows that have one of these values; remove it if none is left."""
    table = read_table(path)
    kept = table.filter(pc.invert(pc.is_in(table[column], value_set=values)))
    if not kept.num_rows:
        storage.remove(path)
    elif kept.num_rows < table.num_rows:
        write_table(path, kept)


def _digest_rows(part: str) -> bytes:
    """A digest of the rows of a part: their images, the hashes of the bytes, and whether they failed.

    The captions are left out, because a copy may be older than the captions of its duplicates, which then get them
    again.
    """
    rows = read_table(part, ["image_id", "sha256", "status"]).sort_by("image_id").combine_chunks()
    is_failed = pc.equal(rows["status"], FAILED).to_pylist()
    text = json.dumps([rows["image_id"].to_pylist(), rows["sha256"].to_pylist(), is_failed])
    return hashlib.sha256(text.encode()).digest()


def contains_any(sorted_ids: npt.NDArray[np.int64], ids: npt.NDArray[np.int64]) -> bool:
    """Whether any of these ids is among the sorted ones. `np.isin` would sort them again for each part."""
    if not sorted_ids.size:
        return False
    positions = np.searchsorted(sorted_ids, ids)
    return bool((sorted_ids[np.minimum(positions, sorted_ids.size - 1)] == ids).any())


def _is_complete(path: str) -> bool:
    """Whether a Parquet file is complete. Objects in a store always are."""
    try:
        return storage.is_uri(path) or pq.read_metadata(path).num_rows > 0
    except (pa.ArrowInvalid, FileNotFoundError):
        return False


def _num_rows(path: str) -> int:
    filesystem, inner = storage.resolve(path)
    return int(pq.read_metadata(inner, filesystem=filesystem).num_rows)


def _name(path: str) -> str:
    """The name that a part and its file in done/ have in common."""
    return path.rpartition("/")[2].removesuffix(_EXTENSION)
