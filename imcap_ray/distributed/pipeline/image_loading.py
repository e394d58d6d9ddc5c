"""Rows of a manifest -> loaded images: read, decoded, and checked for repetition, by tasks of Ray Data."""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray

from imcap_ray.data.image_decoding import DecodedImage, Preparation
from imcap_ray.data.image_reading import read_rows
from imcap_ray.data.schemas import ManifestRow
from imcap_ray.distributed.pipeline.crash_isolation import Isolated, process_ends_after
from imcap_ray.distributed.pipeline.progress import WorkReport
from imcap_ray.errors import ImageError

IMAGES_PER_BLOCK = 64
"""Images of a decode task; 9.6 MB of pixels at 224 x 224."""

DECODE_MEMORY = 4 * 2**30
"""Bytes for decoding images that may have killed a process before; the largest images take about 2 GiB."""

DECODE_SECONDS = 300.0
"""Maximum time of decoding one image. After that its process ends, and the image becomes a failed row."""

DECODE_SECONDS_VARIABLE = "IMCAP_DECODE_SECONDS"
"""Environment variable for another limit; the processes that decode need it."""


def loaded_schema(shape: Sequence[int]) -> pa.Schema:
    """Columns of loaded images. Pixels have a fixed size, so that a block has the same size even if images failed."""
    return pa.schema(
        [
            ("manifest_id", pa.int64()),
            ("image_id", pa.string()),
            ("image_path", pa.string()),
            ("pixels", pa.binary(math.prod(shape))),  # uint8 of this shape; null if there is an error
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("format", pa.string()),
            ("sha256", pa.string()),
            ("error_code", pa.string()),  # "" if there are pixels, or is_repeated
            ("error_message", pa.string()),
            ("is_repeated", pa.bool_()),  # an image of the same bytes was read before; then there are no pixels
            ("origin", pa.string()),  # see `origin_of`
        ]
    )


class LoadedImage(NamedTuple):
    """A row of `loaded_schema`."""

    manifest_id: int
    image_id: str
    image_path: str
    origin: str
    pixels: bytes | None = None
    width: int = 0
    height: int = 0
    format: str = ""
    sha256: str = ""
    error_code: str = ""
    error_message: str = ""
    is_repeated: bool = False

    @classmethod
    def of(cls, row: ManifestRow) -> LoadedImage:
        """An image of a manifest that has nothing but its names."""
        return cls(row["manifest_id"], row["image_id"], row["image_path"], origin_of(row))

    @classmethod
    def failed(cls, row: ManifestRow, error: ImageError) -> LoadedImage:
        """An image of a manifest that cannot be read or decoded."""
        return cls.of(row)._replace(error_code=error.code, error_message=error.message)


def loaded_table(images: Iterable[LoadedImage], shape: Sequence[int]) -> pa.Table:
    """Loaded images as a table of `loaded_schema`."""
    return pa.Table.from_pylist([image._asdict() for image in images], schema=loaded_schema(shape))


def origin_of(row: Mapping[str, object]) -> str:
    """A short digest of an image's id, its location, and the size and time of its file, table or tar, from the row of a
    manifest. If it changes, cached data of the image are out of date."""
    names = ("image_id", "image_path", "table_path", "row_group", "row", "size", "modified_ns")
    return hashlib.blake2b(json.dumps([row[name] for name in names]).encode(), digest_size=12).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadImages:
    """Manifest rows -> rows of `loaded_schema`: read and decoded, or with an error."""

    preparation: Preparation
    root: str
    """Where the images are. If it is missing too, a missing image is not that image's own fault."""
    index: Any = None
    """An `ImageIndex`, if repeated images need no pixels."""
    image_columns: tuple[str, ...] = ()
    """The columns that the manifest records, see `manifest.read_image_columns`."""
    failures: Any = None
    """A `FailureLog` for the images that cannot be read."""
    counter: Any = None
    """A `ProgressCounter`, which knows whether a task is a retry; None outside Ray."""

    def __call__(self, rows: pa.Table) -> Iterator[pa.Table]:
        """The rows, `IMAGES_PER_BLOCK` at a time.

        Raises:
            ImcapError: the input can no longer be read.
        """
        if self.counter is None:
            yield from self._blocks(rows, is_retry=False)
            return
        part = str(rows["manifest_id"][0]) if rows.num_rows else ""
        report = WorkReport(self.counter, is_actor=False, part=part)
        is_retry = report.begins_again()
        try:
            for block in self._blocks(rows, is_retry=is_retry):
                yield block
                report.continues()
        finally:
            report.ends()

    def _blocks(self, rows: pa.Table, *, is_retry: bool) -> Iterator[pa.Table]:
        # In the order in which they are read, because a repeated task has to return the same blocks as the first.
        rows = rows.sort_by([(name, "ascending") for name in ("table_path", "row_group", "row", "manifest_id")])
        for loaded in self._load_isolated(rows) if is_retry else self._load(rows):
            if self.failures:
                _report_failures(loaded, self.failures)
            yield _without_repeated(loaded, self.index) if self.index else loaded

    def _load(self, rows: pa.Table) -> Iterator[pa.Table]:
        seconds = _decode_seconds()
        images = read_rows(rows.to_pylist(), self.root, image_columns=self.image_columns)
        loaded = (_load_image(row, data, self.preparation, seconds=seconds) for row, data in images)
        while block := list(islice(loaded, IMAGES_PER_BLOCK)):
            yield loaded_table(block, self.preparation.shape)

    def _load_isolated(self, rows: pa.Table) -> Iterator[pa.Table]:
        seconds = _decode_seconds()
        isolated = Isolated(
            lambda: lambda rows: pa.concat_tables(self._load(rows)),
            memory_limit=DECODE_MEMORY,
            time_limit=seconds,
            timeout=ImageError("too_large", f"decoding took longer than {seconds:g} s"),
        )
        for start in range(0, rows.num_rows, IMAGES_PER_BLOCK):
            block = rows.slice(start, IMAGES_PER_BLOCK)
            parts = [self._failed(row, done) if isinstance(done, ImageError) else done for row, done in isolated(block)]
            yield pa.concat_tables(parts)

    def _failed(self, rows: pa.Table, error: ImageError) -> pa.Table:
        return loaded_table([LoadedImage.failed(row, error) for row in rows.to_pylist()], self.preparation.shape)


def _decode_seconds() -> float:
    try:
        seconds = float(os.environ[DECODE_SECONDS_VARIABLE])
    except (KeyError, ValueError):
        return DECODE_SECONDS
    return seconds if 0 < seconds < threading.TIMEOUT_MAX else DECODE_SECONDS


def _load_image(row: ManifestRow, data: bytes | ImageError, preparation: Preparation, *, seconds: float) -> LoadedImage:
    try:
        if isinstance(data, ImageError):
            raise data
        with process_ends_after(seconds):  # reading does not count, because a slow store is not the image's fault
            image: DecodedImage = preparation(data)
    except ImageError as error:
        return LoadedImage.failed(row, error)
    return LoadedImage.of(row)._replace(
        pixels=image.pixels.tobytes(),
        width=image.width,
        height=image.height,
        format=image.format,
        sha256=image.sha256,
    )


def _report_failures(loaded: pa.Table, log: Any) -> None:
    failed = loaded.select(["image_id", "error_code", "error_message"])
    failed = failed.filter(pa.compute.not_equal(failed["error_code"], ""))
    if failed.num_rows:
        log.add.remote({row["image_id"]: f"{row['error_message']} ({row['error_code']})" for row in failed.to_pylist()})


def _without_repeated(loaded: pa.Table, index: Any) -> pa.Table:
    """The same rows, without the pixels of images whose bytes were read before."""
    has_pixels = pa.compute.equal(loaded["error_code"], "")
    known = loaded.select(["manifest_id", "sha256"]).filter(has_pixels)  # in this order: a filter copies the columns
    answers = ray.get(index.are_repeated.remote(*known.to_pydict().values())) if known.num_rows else []
    if not any(answers):
        return loaded
    repeated = pa.array([id_ for id_, answer in zip(known["manifest_id"].to_pylist(), answers, strict=True) if answer])
    is_repeated = pa.compute.is_in(loaded["manifest_id"], value_set=repeated.cast(pa.int64()))
    pixels = pa.compute.if_else(is_repeated, pa.scalar(None, loaded.schema.field("pixels").type), loaded["pixels"])
    for name, column in {"pixels": pixels, "is_repeated": is_repeated}.items():
        loaded = loaded.set_column(loaded.schema.get_field_index(name), loaded.schema.field(name), column)
    return loaded


def stack_pixels(rows: pa.Table, shape: Sequence[int]) -> npt.NDArray[np.uint8]:
    """The pixels (B, *shape) of the rows that have pixels, in the order of the rows."""
    column = rows["pixels"].drop_null().combine_chunks()
    flat = np.frombuffer(column.buffers()[1], np.uint8) if len(column) else np.empty(0, np.uint8)
    size = math.prod(shape)
    start = column.offset * size
    return flat[start : start + len(column) * size].reshape(len(column), *shape)
