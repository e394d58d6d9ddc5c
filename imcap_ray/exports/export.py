"""A captions table -> what other tools read: COCO, JSON Lines, CSV, text next to images, Hugging Face, WebDataset.

Knows neither where images are, because it is given their source, nor how they were captioned. Rows are processed in
batches, and facts about all rows are kept on disk: memory does not grow with their number.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

import pyarrow as pa

from imcap_ray import storage
from imcap_ray.data.schemas import CaptionRow
from imcap_ray.errors import ImcapError, InputError, OutputError
from imcap_ray.exports.captions_rows import ROWS_PER_REPORT, CaptionsTable, ExportSummary
from imcap_ray.exports.coco import coco_number, coco_results_name, write_coco
from imcap_ray.exports.image_names import ImageNames
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
from imcap_ray.exports.sidecar import Existing, SidecarNames, portable_sidecar_name, write_sidecars
from imcap_ray.exports.text import write_csv, write_jsonl
from imcap_ray.runs.captioned_images import CaptionedImageSource

_SINGLE_FILE: Final = ("coco", "jsonl", "csv")

# Names of the files of an earlier export, including those that a killed process left of a shard.
_SHARD_NAMES: Final = {
    "hf": re.compile(r"\.?captions-\d{5,}\.parquet(\.[0-9a-f]{8})?"),
    "webdataset": re.compile(r"\.?captions-\d{5,}\.tar(\.[0-9a-f]{8})?"),
}

ReportProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """What is exported, and in which format."""

    format: Format
    min_confidence: float | None = None
    """Rows with less confidence, or with none, are left out."""
    min_familiarity: float | None = None
    """Rows with less familiarity, or with none, are left out."""
    existing: Existing = "skip"
    """What to do with sidecars that exist."""
    shard_images: int = SHARD_IMAGES
    """Maximum number of images in a file of hf and webdataset."""
    overwrite: bool = False
    """Whether an existing export may be replaced; not for sidecars, which have `existing`."""


def export_captions(
    captions: str,
    output: str,
    options: ExportOptions,
    *,
    images: CaptionedImageSource,
    on_progress: ReportProgress = lambda done, total: None,
) -> ExportSummary:
    """Write the captions of a captions table (folder or Parquet file) to `output`.

    `output` is a file for coco, jsonl and csv, and a folder for the other formats. Each file appears when it is
    complete.

    Args:
        images: images of the captions, for hf and webdataset. Its InputErrors are raised before anything is written.
        on_progress: called now and then with the number of rows done and the number of all rows to be exported.

    Raises:
        InputError: no captions table, nothing in it to export, an id that two rows share, or one that points out of
            `output`. Nothing is written then.
        OutputError: `output` exists, or is not suitable for an export.
        ImcapError: none of the images can be read, or a store failed to deliver some of them: the others are written.
    """
    captions, output = storage.absolute(captions), storage.absolute(output)
    table = CaptionsTable(captions, {"confidence": options.min_confidence, "familiarity": options.min_familiarity})
    _check_output(output, captions, options)
    summary = ExportSummary(output, options.format)
    with ImageNames() as names:
        total = _check_rows(table, names, summary, images)
        rows = _with_progress(table.rows(), total, on_progress)
        if options.format == "sidecar":
            write_sidecars(rows, summary, SidecarNames(names), existing=options.existing)
        elif options.format in SHARD_FILE_NAMES:
            _export_shards(rows, names, summary, images=images, shard_images=options.shard_images, total=total)
        else:
            summary.num_exported = total
            if options.format == "jsonl":
                write_jsonl(rows, output)
            elif options.format == "csv":
                write_csv(rows, output)
            else:
                write_coco(rows, output, keep_numbers=names.are_distinct())
    return summary


def _export_shards(
    rows: Iterator[CaptionRow],
    names: ImageNames,
    summary: ExportSummary,
    *,
    images: CaptionedImageSource,
    shard_images: int,
    total: int,
) -> None:
    key = partial(webdataset_key, keep_extension=names.first_shared("name") is not None)
    unread = Unread()
    summary.num_exported = write_shards(
        load_row_images(rows, images, summary, unread),
        summary.output,
        file_name=SHARD_FILE_NAMES[summary.format],
        shard_images=shard_images,
        open_shard=partial(tar_shard, key_of=key) if summary.format == "webdataset" else parquet_shard,
    )
    if not summary.num_exported:
        raise ImcapError(
            f"none of the {total:,} images can be read, the first is {summary.images_without[0]}: is the disk or the "
            "share available?"
        )
    if unread.number:
        raise ImcapError(
            f"{unread.number:,} of {total:,} images are not in {summary.output} because they could not be read: "
            f"{unread.describe()}; {summary.num_exported:,} images were exported, the same command with --overwrite "
            "tries again"
        )


def _check_rows(table: CaptionsTable, names: ImageNames, summary: ExportSummary, images: CaptionedImageSource) -> int:
    """Check all rows before anything is written, and count those that are left out.

    Returns:
        The number of rows to be exported.

    Raises:
        InputError: see `export_captions`.
    """
    total = 0
    by_status = Counter[str]()
    for batch, left_out in table.batches(["image_path"]):
        total += batch.num_rows
        by_status.update(left_out.by_status)
        summary.left_out_by_confidence += left_out.below["confidence"]
        summary.left_out_by_familiarity += left_out.below["familiarity"]
        summary.left_out_not_in_input += left_out.removed
        if summary.format in SHARD_FILE_NAMES:
            _require_images(batch, summary.format, images)
        image_ids = batch["image_id"].to_pylist()
        name_of = _NAMES.get(summary.format, str)
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
    return total


def _require_images(batch: pa.Table, format: str, images: CaptionedImageSource) -> None:
    rows = batch.select(["image_id", "image_path"]).to_pylist()
    for row, position in zip(rows, images.find(rows), strict=True):
        if position is None:
            raise InputError(
                f"{format} needs the images, but image {row['image_id']!r} was in a table that neither the captions "
                "nor _imcap/manifest in their folder name: export jsonl, csv, coco or sidecar"
            )


def _check_output(output: str, captions: str, options: ExportOptions) -> None:
    """Raise OutputError if `output` may not be written, because data would be lost or be taken for captions."""
    format, overwrite = options.format, options.overwrite
    if storage.is_inside(captions, output):
        raise OutputError(f"OUT {output} is inside CAPTIONS {captions}: choose a location outside it")
    if format in _SINGLE_FILE:
        if storage.is_folder(output):
            raise OutputError(f"OUT {output} is a folder: {format} needs the name of a file")
        for path in [output, coco_results_name(output)] if format == "coco" else [output]:
            if storage.exists(path) and not overwrite:
                raise OutputError(f"{path} exists: choose another OUT, or give --overwrite to replace it")
        return
    if storage.is_file(output):
        raise OutputError(f"OUT {output} is a file: {format} needs a folder")
    if format == "sidecar":
        if overwrite:
            raise InputError("--overwrite is not for sidecars: use --existing for those that exist")
    elif storage.is_folder(output):
        for file in storage.list_files(output):
            if not _SHARD_NAMES[format].fullmatch(file.name):
                raise OutputError(
                    f"{output} holds a file that no export to {format} has written ({file.name}): choose an empty "
                    "folder"
                )
            if not overwrite:
                raise OutputError(f"{output} is not empty: choose another OUT, or give --overwrite to replace it")


def _with_progress(rows: Iterator[CaptionRow], total: int, on_progress: ReportProgress) -> Iterator[CaptionRow]:
    for number, row in enumerate(rows):
        if number % ROWS_PER_REPORT == 0:
            on_progress(number, total)
        yield row


_NAMES: Final[dict[str, Callable[[str], str]]] = {
    "coco": coco_number,
    "sidecar": portable_sidecar_name,
    "webdataset": partial(webdataset_key, keep_extension=False),
}
"""Functions from an image's id to its name in an export, if that is not the id."""
