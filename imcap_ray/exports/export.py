"""A captions table -> what other tools read: COCO, JSON Lines, CSV, text beside images, Hugging Face, WebDataset.

Knows neither where images lie (it is handed their source) nor how they were captioned. Rows pass through a batch at a
time, and what has to be known of all of them is kept on disk: memory does not grow with their number.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import duckdb
import pyarrow as pa

from imcap_ray import storage
from imcap_ray.errors import ImcapError, InputError, OutputError
from imcap_ray.exports.captions_rows import ROWS_PER_REPORT, CaptionsTable, ExportSummary, Row
from imcap_ray.exports.coco import coco_number, coco_results_name, write_coco
from imcap_ray.exports.shards import (
    SHARD_FILE_NAMES,
    SHARD_IMAGES,
    Format,
    Unread,
    load_row_images,
    parquet_shard,
    tar_shard,
    webdataset_key,
    write_shards,
)
from imcap_ray.exports.sidecar import Existing, sidecar_name, write_sidecars
from imcap_ray.exports.text import write_csv, write_jsonl
from imcap_ray.runs.captioned_images import CaptionedImageSource

_ONE_FILE: Final = ("coco", "jsonl", "csv")

# By this an earlier export is known, with what a process that was killed has left of a shard.
_SHARD_NAMES: Final = {
    "hf": re.compile(r"\.?captions-\d{5,}\.parquet(\.[0-9a-f]{8})?"),
    "webdataset": re.compile(r"\.?captions-\d{5,}\.tar(\.[0-9a-f]{8})?"),
}

_QUERY_MEMORY: Final = "1GB"

ReportProgress = Callable[[int, int], None]


def export_captions(
    captions: str,
    output: str,
    *,
    format: Format,
    images: CaptionedImageSource,
    min_confidence: float | None = None,
    existing: Existing = "skip",
    shard_images: int = SHARD_IMAGES,
    overwrite: bool = False,
    on_progress: ReportProgress = lambda done, total: None,
) -> ExportSummary:
    """Write the captions of a captions table (folder or Parquet file) to `output`, for the tools of `format`.

    `output` is a file for coco, jsonl and csv, which appears when it is whole; a folder for the others, whose files
    appear one by one, each whole.

    Args:
        images: of the captions, for hf and webdataset. Its InputErrors come before anything is written.
        min_confidence: rows with less, or with none, are left out.
        existing: for sidecar.
        shard_images: in one file of hf and webdataset, at most.
        overwrite: whether an export that is there may be replaced; of sidecars `existing` says it.
        on_progress: called now and then with the number of rows done and of all that are to be exported.

    Raises:
        InputError: no captions table, nothing in it to export, ids or names that stand for two images, an id that
            leads out of `output`. Nothing is written then.
        OutputError: `output` exists, or is no place for an export.
        ImcapError: none of the images can be read, or a store failed to deliver some of them: what it delivered is
            written.
    """
    captions, output = storage.absolute(captions), storage.absolute(output)
    table = CaptionsTable(captions, min_confidence)
    _check_output(output, format=format, captions=captions, overwrite=overwrite)
    with _Names() as names:
        summary = ExportSummary(output, format)
        total = _survey(table, names, summary, images)
        rows = _reporting(table.rows(), total, on_progress)
        if format in _ONE_FILE:
            summary.num_exported = total
            if format == "jsonl":
                write_jsonl(rows, output)
            elif format == "csv":
                write_csv(rows, output)
            else:
                write_coco(rows, output, keep_numbers=names.are_all_of_coco())
        elif format == "sidecar":
            summary.num_exported = write_sidecars(rows, output, existing=existing)
            summary.num_kept = total - summary.num_exported
        else:
            key = partial(webdataset_key, keep_extension=names.first_shared("name") is not None)
            unread = Unread()
            summary.num_exported = write_shards(
                load_row_images(rows, images, summary, unread),
                output,
                format=format,
                shard_images=shard_images,
                open_shard=partial(tar_shard, key_of=key) if format == "webdataset" else parquet_shard,
            )
            if not summary.num_exported:
                raise ImcapError(
                    f"none of the {total:,} images can be read, the first is {summary.images_without[0]}: is the "
                    "disk or the share there?"
                )
            if unread.number:
                raise ImcapError(
                    f"{unread.number:,} of {total:,} images are not in {output} because they could not be read: "
                    f"{unread.describe()}; {summary.num_exported:,} images were exported, the same command with "
                    "--overwrite tries again"
                )
    return summary


class _Names:
    """Image ids and what their images are called in an export: a table on disk, for there may be too many of them."""

    def __init__(self) -> None:
        self._resources = ExitStack()
        self._database: duckdb.DuckDBPyConnection | None = None

    def __enter__(self) -> _Names:
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def add(self, image_ids: list[str], names: list[str]) -> None:
        if self._database is None:
            folder = self._resources.enter_context(TemporaryDirectory())
            self._database = self._resources.enter_context(duckdb.connect(str(Path(folder, "names"))))
            self._execute(f"SET memory_limit = '{_QUERY_MEMORY}'; SET preserve_insertion_order = false")
            self._execute("CREATE TABLE names (image_id VARCHAR, name VARCHAR)")
        self._database.register("batch", pa.table({"image_id": image_ids, "name": names}, _NAMES_SCHEMA))
        self._execute("INSERT INTO names SELECT image_id, name FROM batch")

    def first_shared(self, column: str) -> tuple[str, str] | None:
        """The ids of two images that have the same `image_id` or `name`; None when each has its own."""
        found = self._execute(
            f"SELECT min(image_id), max(image_id) FROM names GROUP BY {column} HAVING count(*) > 1 ORDER BY 1 LIMIT 1"
        )
        return found[0] if found else None

    def are_all_of_coco(self) -> bool:
        """Whether each image has a name, and its own."""
        return self._execute("SELECT count(*) FROM names WHERE name = ''") == [(0,)] and not self.first_shared("name")

    def _execute(self, statement: str) -> list[Any]:
        if self._database is None:  # no names are needed
            return []
        try:
            return self._database.execute(statement).fetchall()
        except duckdb.Error as error:
            raise ImcapError(f"a question over all names failed: {error}") from error


_NAMES_SCHEMA: Final = pa.schema([("image_id", pa.string()), ("name", pa.string())])


def _survey(table: CaptionsTable, names: _Names, summary: ExportSummary, images: CaptionedImageSource) -> int:
    """Look at all rows before anything is written: how many are to be exported. InputError when they cannot be."""
    total = 0
    by_status = Counter[str]()
    for batch, left_out in table.batches(["image_path"]):
        total += batch.num_rows
        by_status.update(left_out.by_status)
        summary.left_out_by_confidence += left_out.by_confidence
        if summary.format in SHARD_FILE_NAMES:
            _check_images(batch, summary.format, images)
        image_ids = batch["image_id"].to_pylist()
        name_of = _NAMERS.get(summary.format, str)
        names.add(image_ids, [name_of(image_id) for image_id in image_ids])
    summary.left_out_by_status = dict(by_status)
    if not total:
        raise InputError(f"{table.location} has no caption to export: {summary.describe_left_out() or 'it is empty'}")
    shared = names.first_shared("image_id")
    if shared:
        raise InputError(
            f"{table.location}: image ids must be unique, but {shared[0]!r} occurs more than once; if a part was "
            "copied there, the same `imcap caption` command removes the copy"
        )
    shared = names.first_shared("name") if summary.format == "sidecar" else None
    if shared:
        raise InputError(
            f"the images {shared[0]!r} and {shared[1]!r} would have the same sidecar, {sidecar_name(shared[0])!r}: "
            "rename one of them, or export jsonl, csv, coco or webdataset"
        )
    return total


def _check_images(batch: pa.Table, format: str, images: CaptionedImageSource) -> None:
    rows = batch.select(["image_id", "image_path"]).to_pylist()
    for row, place in zip(rows, images.find(rows), strict=True):
        if place is None:
            raise InputError(
                f"{format} needs the images, but the bytes of image {row['image_id']!r} were in a table which the "
                "captions do not name (their folder's _imcap/manifest does): export jsonl, csv, coco or sidecar"
            )


def _check_output(output: str, *, format: str, captions: str, overwrite: bool) -> None:
    """OutputError when `output` may not be written: it must neither be lost nor be taken for captions."""
    if storage.is_inside(captions, output):
        raise OutputError(f"OUT {output} lies in CAPTIONS {captions}: choose a place beside it")
    if format in _ONE_FILE:
        if storage.is_folder(output):
            raise OutputError(f"OUT {output} is a folder: {format} is one file, name it")
        for path in [output, coco_results_name(output)] if format == "coco" else [output]:
            if storage.exists(path) and not overwrite:
                raise OutputError(f"{path} exists: choose another OUT, or give --overwrite to replace it")
        return
    if storage.is_file(output):
        raise OutputError(f"OUT {output} is a file: {format} needs a folder")
    if format == "sidecar":
        if overwrite:
            raise InputError("for sidecars it is --existing that says what happens to those that are there")
    elif storage.is_folder(output):
        for file in storage.list_files(output):
            if not _SHARD_NAMES[format].fullmatch(file.name):
                raise OutputError(
                    f"{output} holds files that no export to {format} has written ({file.name}): choose an empty folder"
                )
            if not overwrite:
                raise OutputError(f"{output} is not empty: choose another OUT, or give --overwrite to replace it")


def _reporting(rows: Iterator[Row], total: int, on_progress: ReportProgress) -> Iterator[Row]:
    for number, row in enumerate(rows):
        if number % ROWS_PER_REPORT == 0:
            on_progress(number, total)
        yield row


_NAMERS: Final[dict[str, Callable[[str], str]]] = {
    "coco": coco_number,
    "sidecar": sidecar_name,
    "webdataset": partial(webdataset_key, keep_extension=False),
}
"""What an image is called in an export, if not by its id."""
