"""A captions table -> what other tools read: COCO, JSON Lines, CSV, text beside images, Hugging Face, WebDataset.

Knows neither where images lie (it is handed their source) nor how they were captioned. Rows pass through a batch at a
time, and what has to be known of all of them is kept on disk: memory does not grow with their number.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import posixpath
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any, BinaryIO, Final, Literal

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from imcap_ray import __version__, storage
from imcap_ray.data.image_reading import location_of
from imcap_ray.data.schemas import CAPTIONS_SCHEMA, DUPLICATE, IMAGE_EXTENSIONS, OK
from imcap_ray.errors import ImageError, ImcapError, InputError, OutputError
from imcap_ray.runs.captioned_images import CaptionedImageSource
from imcap_ray.runs.captions_table import open_captions

Format = Literal["coco", "jsonl", "csv", "sidecar", "hf", "webdataset"]
Existing = Literal["skip", "overwrite", "append"]
"""What happens to a sidecar that is there already."""

SHARD_IMAGES: Final = 10_000
SHARD_BYTES: Final = 10**9
"""A file of images that has reached this size is full, however few they are."""

COLUMNS: Final = tuple(name for name in CAPTIONS_SCHEMA.names if not name.startswith("error_"))
"""Of a row in JSON and CSV. An exported row has no error."""

NAMED_UNREAD: Final = 3
"""How many of the images that a store failed to deliver the error names."""

NAMED_IMAGES: Final = 20
"""How many of the images that are gone the summary names; all of them are counted."""

_ONE_FILE: Final = ("coco", "jsonl", "csv")
_SHARDS: Final = {"hf": "captions-{:05d}.parquet", "webdataset": "captions-{:05d}.tar"}
# By this an earlier export is known, with what a process that was killed has left of a shard.
_SHARD_NAMES: Final = {
    "hf": re.compile(r"\.?captions-\d{5,}\.parquet(\.[0-9a-f]{8})?"),
    "webdataset": re.compile(r"\.?captions-\d{5,}\.tar(\.[0-9a-f]{8})?"),
}

# Of images that cannot be read, by their error's code; else its message.
_REASONS: Final = {"missing": "gone", "permission_denied": "may not be read"}

_BATCH_ROWS: Final = 8192
_THREADS: Final = 16
_ROWS_PER_REPORT: Final = 256
_ROW_GROUP_IMAGES: Final = 100  # as Hugging Face writes images: a reader that wants one reads no more than these
_ROW_GROUP_BYTES: Final = 32 * 2**20
_QUERY_MEMORY: Final = "1GB"

# The files of COCO itself: COCO_val2014_000000391895.jpg, 000000391895.jpg.
_COCO_NAME: Final = re.compile(r"(?:.*/)?(?:COCO_[a-z]+\d{4}_)?(\d{12})(?:\.jpg)?", re.DOTALL)

_NAME_BYTES: Final = 255
"""Longest name of a file or folder on the usual file systems, to which a tar is extracted."""
_EXTENSION_BYTES: Final = 10
"""Longest extension of a member of a tar, without its dot."""
_DIGEST_LETTERS: Final = 24

# A spreadsheet takes a cell that begins with one of these for a formula (owasp.org, "CSV Injection").
# Where a cell begins, or does for a spreadsheet whose separator is another than the comma.
_FORMULA: Final = re.compile("(?:^|(?<=[;\t\r\n]))(?='*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20])")

# What Pillow calls a format, and what its files are called, where that is not the same.
_EXTENSIONS: Final = {"jpeg": "jpg", "mpo": "jpg", "jpeg2000": "jp2", "tiff": "tif"}

Row = dict[str, Any]
ReportProgress = Callable[[int, int], None]


@dataclass(slots=True)
class ExportSummary:
    """What became of the rows of a captions table. The counts add up to all of them."""

    output: str
    format: str
    num_exported: int = 0
    num_kept: int = 0
    """Rows whose sidecar was there already and is left as it is."""
    left_out_by_status: dict[str, int] = field(default_factory=dict)
    """Rows without a caption, by status: `failed`, or a `duplicate` that a run has not come to yet."""
    left_out_by_confidence: int = 0
    left_out_without_image: int = 0
    """Rows whose image is gone, may not be read, or has other bytes than those that were captioned."""
    images_without: list[str] = field(default_factory=list)
    """The first of these, each with the reason."""

    def describe(self) -> str:
        """One line for people."""
        captions = f"{self.num_exported:,} caption{'s' * (self.num_exported != 1)}"
        kept = f", {self.num_kept:,} left as they were" if self.num_kept else ""
        return f"{self.output}: {captions} as {self.format}{kept}; left out: {self.describe_left_out() or 'none'}"

    def describe_left_out(self) -> str:
        """How many rows for which reason; "" when there are none."""
        reasons = [f"{count:,} {status}" for status, count in sorted(self.left_out_by_status.items())]
        if self.left_out_by_confidence:
            reasons.append(f"{self.left_out_by_confidence:,} below the confidence asked for")
        if self.left_out_without_image:
            reasons.append(f"{self.left_out_without_image:,} without their image")
        return ", ".join(reasons)


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
    table = _CaptionsTable(captions, min_confidence)
    _check_output(output, format=format, captions=captions, overwrite=overwrite)
    with _Names() as names:
        summary = ExportSummary(output, format)
        total = _survey(table, names, summary, images)
        rows = _reporting(table.rows(), total, on_progress)
        if format in _ONE_FILE:
            summary.num_exported = total
            if format == "jsonl":
                _write_jsonl(rows, output)
            elif format == "csv":
                _write_csv(rows, output)
            else:
                _write_coco(rows, output, keep_numbers=names.are_all_of_coco())
        elif format == "sidecar":
            summary.num_exported = _write_sidecars(rows, output, existing=existing)
            summary.num_kept = total - summary.num_exported
        else:
            key = partial(webdataset_key, keep_extension=names.first_shared("name") is not None)
            unread = _Unread()
            summary.num_exported = _write_shards(
                _with_images(rows, images, summary, unread),
                output,
                format=format,
                shard_images=shard_images,
                open_shard=partial(_tar_shard, key_of=key) if format == "webdataset" else _parquet_shard,
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


# --- which rows, and whether they can be exported


@dataclass(slots=True)
class _LeftOut:
    """Rows that are not exported."""

    by_status: Counter[str] = field(default_factory=Counter)
    by_confidence: int = 0


class _CaptionsTable:
    """The rows of a captions table that are to be exported; what the others were, by the way.

    Raises:
        InputError: on opening, or while it is read: no captions table, or a damaged one.
    """

    def __init__(self, location: str, min_confidence: float | None) -> None:
        self.location = location
        self._min_confidence = None if min_confidence is None else pa.scalar(min_confidence, pa.float32())
        self._dataset: pads.Dataset = open_captions(location)
        missing = [name for name in COLUMNS if name not in self._dataset.schema.names]
        if missing:
            raise InputError(
                f"{location} is not what `imcap caption` writes: it lacks the columns {', '.join(missing)}"
            )
        with self._told_as_ours():
            self._dataset.schema.empty_table().select(COLUMNS).cast(_schema(COLUMNS))

    def rows(self) -> Iterator[Row]:
        """The rows to be exported, with `COLUMNS`; numbers that JSON does not know are None."""
        for batch, _ in self.batches(COLUMNS):
            for name in ("confidence", "logprob"):
                # By way of the text: 0.3 in 32 bits is to be 0.3 in JSON, not 0.30000001192092896.
                values = batch[name].cast(pa.string()).cast(pa.float64())
                values = pc.if_else(pc.is_finite(values), values, None)
                batch = batch.set_column(batch.schema.get_field_index(name), name, values)
            yield from batch.select(COLUMNS).to_pylist()

    def batches(self, columns: Iterable[str]) -> Iterator[tuple[pa.Table, _LeftOut]]:
        """At least these columns of the rows to be exported, some thousand rows at a time; what the others were."""
        wanted = dict.fromkeys([*columns, "image_id", "status", "caption", "confidence"])
        for batch in self._read(list(wanted)):
            left_out = _LeftOut()
            is_captioned = pc.and_(
                pc.is_in(batch["status"], value_set=pa.array([OK, DUPLICATE])),
                pc.not_equal(pc.utf8_trim_whitespace(batch["caption"]), ""),
            )
            for status in batch["status"].filter(pc.invert(is_captioned)).value_counts().to_pylist():
                left_out.by_status[status["values"] or "without a status"] += status["counts"]
            batch = batch.filter(is_captioned)
            if self._min_confidence is not None:
                is_confident = pc.fill_null(pc.greater_equal(batch["confidence"], self._min_confidence), False)
                left_out.by_confidence = pc.sum(pc.invert(is_confident)).as_py() or 0
                batch = batch.filter(is_confident)
            if pc.any(pc.equal(batch["image_id"], "")).as_py():
                raise InputError(f"{self.location}: a row with a caption has no image_id")
            yield batch, left_out

    def _read(self, columns: list[str]) -> Iterator[pa.Table]:
        with self._told_as_ours():
            batches = self._dataset.to_batches(
                columns=columns, batch_size=_BATCH_ROWS, batch_readahead=4, fragment_readahead=1
            )
        while True:
            with self._told_as_ours():
                batch = next(batches, None)
                if batch is None:
                    return
                table = pa.Table.from_batches([batch]).cast(_schema(columns))
                for number, column in enumerate(table.schema):
                    if pa.types.is_string(column.type):
                        table = table.set_column(number, column, pc.fill_null(table[column.name], ""))
                table.validate(full=True)  # Parquet's readers do not ask whether text is UTF-8
            yield table

    @contextmanager
    def _told_as_ours(self) -> Iterator[None]:
        try:
            yield
        except pa.ArrowException as error:
            raise InputError(f"{self.location} cannot be read as a captions table: {error}") from error


def _schema(columns: Iterable[str]) -> pa.Schema:
    return pa.schema([CAPTIONS_SCHEMA.field(name) for name in columns])


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


def _survey(table: _CaptionsTable, names: _Names, summary: ExportSummary, images: CaptionedImageSource) -> int:
    """Look at all rows before anything is written: how many are to be exported. InputError when they cannot be."""
    total = 0
    by_status = Counter[str]()
    for batch, left_out in table.batches(["image_path"]):
        total += batch.num_rows
        by_status.update(left_out.by_status)
        summary.left_out_by_confidence += left_out.by_confidence
        if summary.format in _SHARDS:
            _check_images(batch, summary.format, images)
        if name_of := _NAMERS.get(summary.format):
            image_ids = batch["image_id"].to_pylist()
            names.add(image_ids, [name_of(image_id) for image_id in image_ids])
    summary.left_out_by_status = dict(by_status)
    if not total:
        raise InputError(f"{table.location} has no caption to export: {summary.describe_left_out() or 'it is empty'}")
    shared = names.first_shared("image_id")
    if shared:
        raise InputError(
            f"{table.location}: image ids must be unique, but {shared[0]!r} is there more than once; if a part was "
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
        if number % _ROWS_PER_REPORT == 0:
            on_progress(number, total)
        yield row


# --- one file of text


def _json(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode()


def _write_jsonl(rows: Iterator[Row], output: str) -> None:
    with storage.replacing(output) as file:
        for row in rows:
            file.write(_json(row) + b"\n")


def _write_csv(rows: Iterator[Row], output: str) -> None:
    with storage.replacing(output) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        writer = csv.DictWriter(text, COLUMNS)
        writer.writeheader()
        for row in rows:
            row["captions"] = json.dumps(row["captions"], ensure_ascii=False)
            writer.writerow({name: guard_cell(cell) if isinstance(cell, str) else cell for name, cell in row.items()})
        text.detach()


def guard_cell(text: str) -> str:
    """The text with an apostrophe before whatever a spreadsheet would run as a formula: at its beginning, and after
    semicolons, tabs and line ends, at which some split a file whose cells are separated by commas.

    Text that has apostrophes before a formula already gets one more: who takes one away from each such place has the
    text again.
    """
    return _FORMULA.sub("'", text)


def coco_results_name(output: str) -> str:
    """The file of results beside the file of annotations."""
    stem, extension = posixpath.splitext(output)
    return f"{stem}_results{extension}" if extension == ".json" else f"{output}_results.json"


def _write_coco(rows: Iterator[Row], output: str, *, keep_numbers: bool) -> None:
    """The annotations that pycocotools' `COCO(file)` reads, and the results that its `loadRes` reads beside them.

    Args:
        keep_numbers: whether the names have COCO's numbers; else images are numbered from 1.
    """
    about = {"description": f"captions exported by imcap_ray {__version__}"}
    with (
        storage.replacing(output) as dataset,
        storage.replacing(coco_results_name(output)) as results,
        TemporaryFile() as annotations,
    ):
        # No categories: with them pycocotools asks each annotation for its own.
        dataset.write(b'{"info": ' + _json(about) + b', "licenses": [], "images": [')
        results.write(b"[")
        for number, row in enumerate(rows, start=1):
            coco_id = int(_coco_number(row["image_id"])) if keep_numbers else number
            image = {"id": coco_id, "file_name": _file_name(row), "width": row["width"], "height": row["height"]}
            answer = {"image_id": coco_id, "caption": row["caption"]}
            comma = b",\n" if number > 1 else b"\n"
            dataset.write(comma + _json(image))
            annotations.write(comma + _json({"id": number, **answer, "confidence": row["confidence"]}))
            results.write(comma + _json(answer))
        dataset.write(b'\n], "annotations": [')
        annotations.seek(0)
        shutil.copyfileobj(annotations, dataset)
        dataset.write(b"\n]}\n")
        results.write(b"\n]\n")


def _coco_number(image_id: str) -> str:
    """The number of an image of COCO; "" for other images."""
    found = _COCO_NAME.fullmatch(image_id)
    return found[1] if found else ""


def _file_name(row: Row) -> str:
    """The image below the folder that was captioned; its full path where its id is not that."""
    image_id, image_path = row["image_id"], row["image_path"]
    is_below = f"/{image_path}".endswith(f"/{image_id}")
    return str(image_id if is_below or not image_path else image_path)


# --- a file of text for each image


def sidecar_name(image_id: str) -> str:
    """The path of an image's sidecar below the output.

    Raises:
        InputError: the id leads out of there, or is no path.
    """
    if any(step in ("", ".", "..") for step in image_id.split("/")) or "\0" in image_id:
        raise InputError(
            f"the image id {image_id!r} is no path below OUT, where its sidecar would be: export jsonl, csv, coco, hf "
            "or webdataset"
        )
    return f"{_without_extension(image_id)}.txt"


def _without_extension(image_id: str) -> str:
    stem, extension = posixpath.splitext(image_id)
    return stem if extension[1:].lower() in IMAGE_EXTENSIONS else image_id


def _write_sidecars(rows: Iterator[Row], output: str, *, existing: Existing) -> int:
    """How many were written or added to."""
    number = 0

    def write(row: Row) -> bool:
        path = storage.join(output, sidecar_name(row["image_id"]))
        return _write_sidecar(path, " ".join(row["caption"].splitlines()), existing=existing)

    with ThreadPoolExecutor(_THREADS) as threads:  # a disk, or a store, is waited for
        while chunk := list(islice(rows, _ROWS_PER_REPORT)):
            number += sum(threads.map(write, chunk))
    return number


def _write_sidecar(path: str, caption: str, *, existing: Existing) -> bool:
    line = caption.encode() + b"\n"
    if existing != "overwrite" and (storage.exists(path) or os.path.islink(path)):
        if existing == "skip" or not storage.exists(path):  # a link to a share that is not there now
            return False
        content = storage.read_bytes(path)
        try:
            lines = content.decode("utf-8-sig").splitlines()
        except UnicodeDecodeError:  # what is in another encoding cannot be added to
            return False
        if caption in lines or b"\0" in content:  # UTF-16, whether it says so or not
            return False
        line = content + (b"\n" if content and not content.endswith(b"\n") else b"") + line
    storage.write_bytes(path, line)
    return True


# --- images with their captions


@dataclass(slots=True)
class _Unread:
    """Images that a store failed to deliver. An export without them fails at its end."""

    number: int = 0
    first: list[str] = field(default_factory=list)
    """Some of them, each with the reason."""

    def describe(self) -> str:
        more = self.number - len(self.first)
        return ", ".join(self.first) + (f" and {more:,} more" if more else "")


def _with_images(
    rows: Iterator[Row], images: CaptionedImageSource, summary: ExportSummary, unread: _Unread
) -> Iterator[tuple[Row, bytes]]:
    """The rows with the bytes of their images; those whose image is not there as it was are counted in `summary`.

    Raises:
        ImcapError: the store, or the disk of the run's input, is gone.
    """
    while chunk := list(islice(rows, _BATCH_ROWS)):
        places = images.find(chunk)
        for row, place, data in zip(chunk, places, images.load(chunk, places), strict=True):
            if isinstance(data, ImageError):
                reason = _REASONS.get(data.code, data.message)
                if data.code in ("missing", "read_error"):
                    images.require_reachable(location_of(place), data)
                    if data.code == "read_error" and storage.is_uri(location_of(place)):
                        unread.number += 1
                        if len(unread.first) < NAMED_UNREAD:
                            unread.first.append(f"{row['image_id']} ({reason})")
                summary.left_out_without_image += 1
                if len(summary.images_without) < NAMED_IMAGES:
                    summary.images_without.append(f"{row['image_id']} ({reason})")
            else:
                yield row, data
        images.require_still_reachable()


AddImage = Callable[[Row, bytes], None]


def _write_shards(
    images: Iterator[tuple[Row, bytes]],
    output: str,
    *,
    format: str,
    shard_images: int,
    open_shard: Callable[[BinaryIO], AbstractContextManager[AddImage]],
) -> int:
    """Files of so many images; how many images. The files of an earlier export go when there is a first image."""
    total = 0
    following = next(images, None)
    if following and storage.is_folder(output):
        for earlier in list(storage.list_files(output)):
            storage.remove(earlier.location)
    number = 0
    while following:
        path = storage.join(output, _SHARDS[format].format(number))
        with storage.replacing(path) as file, open_shard(file) as add:
            num_images = num_bytes = 0
            rest, following = chain([following], images), None
            for row, data in rest:
                if num_images == shard_images or (num_images and num_bytes + len(data) > SHARD_BYTES):
                    following = row, data
                    break
                add(row, data)
                num_images += 1
                num_bytes += len(data)
        number += 1
        total += num_images
    return total


def webdataset_key(image_id: str, *, keep_extension: bool) -> str:
    """What webdataset knows an image by: its id without the extension, as that library can bear it; one for each id.

    What would end the key early (a dot in the name), hide it (`__name__`) or lead elsewhere (`../`, `//`) is written
    with `%`, as in a URI: `urllib.parse.unquote` gives the name back. A name too long to be a file's or a folder's ends
    with `%-` and a hash; its whole id is in the sample's JSON.

    Args:
        keep_extension: whether `a.jpg` and `a.png` are both there and are to be told apart.
    """
    path = image_id if keep_extension else _without_extension(image_id)
    path = re.sub("[%\x00-\x1f\x7f]", _percent, path)
    path = re.sub("(?:^|(?<=/))/|/$", _percent, path)
    folder, slash, name = path.rpartition("/")
    folder = re.sub(r"(?:^|(?<=/))\.+(?=/|$)", _percent, folder)
    path = re.sub("^_(?=_)", _percent, folder + slash + name.replace(".", "%2E"))
    folder, slash, name = path.rpartition("/")
    folders = "/".join(_shortened(step, _NAME_BYTES) for step in folder.split("/"))
    return folders + slash + _shortened(name, _NAME_BYTES - _EXTENSION_BYTES - 1)


def _shortened(name: str, max_bytes: int) -> str:
    """The name, or if it is longer its beginning and a hash. No other name becomes the same: `%-` is in no key else."""
    if len(name.encode("utf-8", "surrogatepass")) <= max_bytes:
        return name
    ending = f"%-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:_DIGEST_LETTERS]}"
    beginning = name.encode("utf-8", "surrogatepass")[: max_bytes - len(ending)].decode("utf-8", "ignore")
    return re.sub("%[0-9A-F]?$", "", beginning) + ending  # not half of an escape


def _percent(found: re.Match[str]) -> str:
    return "".join(f"%{ord(letter):02X}" for letter in found[0])


def _extension_of(row: Row) -> str:
    name = row["format"] if row["format"] not in ("", "unknown") else posixpath.splitext(row["image_id"])[1][1:]
    name = _EXTENSIONS.get(name.lower(), name.lower())
    return name if re.fullmatch(f"[a-z0-9]{{1,{_EXTENSION_BYTES}}}", name) else "bin"


@contextmanager
def _tar_shard(file: BinaryIO, *, key_of: Callable[[str], str]) -> Iterator[AddImage]:
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:

        def add(row: Row, data: bytes) -> None:
            key = key_of(row["image_id"])
            for extension, content in (
                (_extension_of(row), data),
                ("txt", row["caption"].encode()),
                ("json", _json(row)),
            ):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))

        yield add


def _hf_feature(column: pa.Field) -> dict[str, Any]:
    """Hugging Face's name of a column's type."""
    if pa.types.is_list(column.type):
        return {"_type": "Sequence", "feature": {"_type": "Value", "dtype": "string"}}
    return {"_type": "Value", "dtype": "float32" if pa.types.is_float32(column.type) else str(column.type)}


# The images stand in the table, as the Hub itself keeps them: the folder can be moved and streamed, names may be
# anything, and images that were not captioned are not in the way, as they are for `imagefolder`.
_HF_FEATURES: Final = {"image": {"_type": "Image"}} | {column.name: _hf_feature(column) for column in _schema(COLUMNS)}
_HF_SCHEMA: Final = pa.schema(
    [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), *_schema(COLUMNS)],
    metadata={"huggingface": json.dumps({"info": {"features": _HF_FEATURES}})},
)


@contextmanager
def _parquet_shard(file: BinaryIO) -> Iterator[AddImage]:
    waiting: list[Row] = []
    num_bytes = 0
    # Images do not repeat, and are compressed already.
    with pq.ParquetWriter(file, _HF_SCHEMA, use_dictionary=["status", "format"]) as writer:

        def write() -> None:
            nonlocal num_bytes
            writer.write_table(pa.Table.from_pylist(waiting, _HF_SCHEMA))
            waiting.clear()
            num_bytes = 0

        def add(row: Row, data: bytes) -> None:
            nonlocal num_bytes
            if len(waiting) == _ROW_GROUP_IMAGES or num_bytes + len(data) > _ROW_GROUP_BYTES:
                write()
            waiting.append({"image": {"bytes": data, "path": row["image_id"]}, **row})
            num_bytes += len(data)

        yield add
        write()


_NAMERS: Final[dict[str, Callable[[str], str]]] = {
    "coco": _coco_number,
    "sidecar": sidecar_name,
    "hf": str,
    "webdataset": partial(webdataset_key, keep_extension=False),
}
"""What an image is called in an export. Where it is called something, ids must be unique."""
