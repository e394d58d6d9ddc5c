"""A captions table -> the rows to export, and the number of those that are left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from imcap_ray.data.schemas import CAPTIONS_SCHEMA, DUPLICATE, EXISTING, OK, CaptionRow
from imcap_ray.errors import InputError, translate_errors
from imcap_ray.runs.captions_table import open_captions, read_removed_ids

COLUMNS: Final = tuple(name for name in CAPTIONS_SCHEMA.names if not name.startswith("error_"))
"""Columns in JSON and CSV. Exported rows have no error."""

NAMED_IMAGES: Final = 20
"""Number of missing images that the summary names; all of them are counted."""

# Reasons why images cannot be read, by their error's code; other codes use the error's message.
REASONS_LEFT_OUT: Final = {"missing": "missing", "permission_denied": "may not be read"}

BATCH_ROWS: Final = 8192

READ_THREADS: Final = 16

ROWS_PER_REPORT: Final = 256


@dataclass(slots=True)
class ExportSummary:
    """The result of an export. The sum of its counts is the number of rows in the captions table."""

    output: str
    format: str
    num_exported: int = 0
    num_kept: int = 0
    """Rows whose sidecar existed and was not changed."""
    left_out_by_status: dict[str, int] = field(default_factory=dict)
    """Rows without a caption, by status: `failed`, or a `duplicate` that is not resolved yet."""
    left_out_by_confidence: int = 0
    left_out_by_familiarity: int = 0
    left_out_not_in_input: int = 0
    """Rows of images that were no longer in the input of the last run."""
    left_out_without_image: int = 0
    """Rows whose image is missing, may not be read, or has changed since it was captioned."""
    images_without: list[str] = field(default_factory=list)
    """The first of these, each with the reason."""
    num_renamed: int = 0
    """Sidecars with a longer name, because the usual one would be that of several images."""
    renamed: list[str] = field(default_factory=list)
    """The first of these names."""

    def describe(self) -> str:
        """One line for people."""
        captions = f"{self.num_exported:,} caption{'s' * (self.num_exported != 1)}"
        kept = f", {self.num_kept:,} existing ones kept" if self.num_kept else ""
        kept += f", {self.num_renamed:,} with a longer name" if self.num_renamed else ""
        return f"{self.output}: {captions} as {self.format}{kept}; left out: {self.describe_left_out() or 'none'}"

    def describe_left_out(self) -> str:
        """The number of rows for each reason; "" if none is left out."""
        reasons = [f"{count:,} {status}" for status, count in sorted(self.left_out_by_status.items())]
        if self.left_out_by_confidence:
            reasons.append(f"{self.left_out_by_confidence:,} below --min-confidence")
        if self.left_out_by_familiarity:
            reasons.append(f"{self.left_out_by_familiarity:,} below --min-familiarity")
        if self.left_out_not_in_input:
            reasons.append(f"{self.left_out_not_in_input:,} no longer in the input")
        if self.left_out_without_image:
            reasons.append(f"{self.left_out_without_image:,} without an image")
        return ", ".join(reasons)


@dataclass(slots=True)
class LeftOut:
    """Numbers of rows that are not exported."""

    by_status: Counter[str] = field(default_factory=Counter)
    below: Counter[str] = field(default_factory=Counter)
    """By the column whose value is too low."""
    removed: int = 0


class CaptionsTable:
    """The rows of a captions table that are to be exported, and the number of the others.

    Args:
        minima: the lowest values of columns in rows to be exported; None: any.

    Raises:
        InputError: it is not a captions table, or it is damaged; on opening or while it is read.
    """

    def __init__(self, location: str, minima: Mapping[str, float | None]) -> None:
        self.location = location
        self._minima = {name: pa.scalar(value, pa.float32()) for name, value in minima.items() if value is not None}
        self._dataset: pads.Dataset = open_captions(location)
        self._removed_ids = read_removed_ids(location)
        missing = [name for name in COLUMNS if name not in self._dataset.schema.names]
        if missing:
            raise InputError(
                f"{location} was not written by `imcap caption`: it lacks the columns {', '.join(missing)}"
            )
        with self._translate_errors():
            self._dataset.schema.empty_table().select(COLUMNS).cast(select_schema(COLUMNS))

    def rows(self) -> Iterator[CaptionRow]:
        """The rows to be exported, with `COLUMNS`; NaN and infinity, which JSON does not have, are None."""
        for batch, _ in self.batches(COLUMNS):
            for name in ("confidence", "familiarity", "logprob"):
                # Converted to text in between, so that 0.3 in 32 bits is 0.3 in JSON, not 0.30000001192092896.
                values = batch[name].cast(pa.string()).cast(pa.float64())
                values = pc.if_else(pc.is_finite(values), values, None)
                batch = batch.set_column(batch.schema.get_field_index(name), name, values)
            yield from batch.select(COLUMNS).to_pylist()

    def batches(self, columns: Iterable[str]) -> Iterator[tuple[pa.Table, LeftOut]]:
        """At least these columns of the rows to be exported, some thousand rows at a time; the number of the others."""
        wanted = dict.fromkeys([*columns, "image_id", "status", "caption", "caption_source", *self._minima])
        for batch in self._read(list(wanted)):
            is_removed = pc.is_in(batch["image_id"], value_set=self._removed_ids)
            left_out = LeftOut(removed=pc.sum(is_removed).as_py() or 0)
            batch = batch.filter(pc.invert(is_removed))
            is_captioned = pc.and_(
                pc.is_in(batch["status"], value_set=pa.array([OK, DUPLICATE])),
                pc.not_equal(pc.utf8_trim_whitespace(batch["caption"]), ""),
            )
            for status in batch["status"].filter(pc.invert(is_captioned)).value_counts().to_pylist():
                left_out.by_status[status["values"] or "without a status"] += status["counts"]
            batch = batch.filter(is_captioned)
            for name, minimum in self._minima.items():
                is_enough = pc.fill_null(pc.greater_equal(batch[name], minimum), False)
                is_enough = pc.or_(is_enough, pc.equal(batch["caption_source"], EXISTING))  # its value is unknown
                left_out.below[name] = pc.sum(pc.invert(is_enough)).as_py() or 0
                batch = batch.filter(is_enough)
            if pc.any(pc.equal(batch["image_id"], "")).as_py():
                raise InputError(f"{self.location}: a row with a caption has no image_id")
            yield batch, left_out

    def _read(self, columns: list[str]) -> Iterator[pa.Table]:
        with self._translate_errors():
            batches = self._dataset.to_batches(
                columns=columns, batch_size=BATCH_ROWS, batch_readahead=4, fragment_readahead=1
            )
        while True:
            with self._translate_errors():
                batch = next(batches, None)
                if batch is None:
                    return
                table = pa.Table.from_batches([batch]).cast(select_schema(columns))
                for number, column in enumerate(table.schema):
                    if pa.types.is_string(column.type):
                        table = table.set_column(number, column, pc.fill_null(table[column.name], ""))
                table.validate(full=True)  # Parquet's readers do not check that text is UTF-8
            yield table

    def _translate_errors(self) -> AbstractContextManager[None]:
        message = f"{self.location} cannot be read as a captions table"
        return translate_errors(pa.ArrowException, to=InputError, message=message)


def select_schema(columns: Iterable[str]) -> pa.Schema:
    """`CAPTIONS_SCHEMA` with these columns only."""
    return pa.schema([CAPTIONS_SCHEMA.field(name) for name in columns])


def file_name_of(row: CaptionRow) -> str:
    """Path of the image below the folder that was captioned, if its id is that; otherwise its full path."""
    image_id, image_path = row["image_id"], row["image_path"]
    is_below = f"/{image_path}".endswith(f"/{image_id}")
    return image_id if is_below or not image_path else image_path
