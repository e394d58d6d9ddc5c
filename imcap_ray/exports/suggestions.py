"""A captions table -> the images whose captions by people would teach a model most, in a folder to be corrected."""

from __future__ import annotations

import csv
import heapq
import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from imcap_ray import storage
from imcap_ray.data.image_decoding import decode_image
from imcap_ray.data.schemas import OK, CaptionRow
from imcap_ray.errors import ImageError, InputError, OutputError
from imcap_ray.exports.captions_rows import CaptionsTable
from imcap_ray.exports.text import guard_cell
from imcap_ray.models.familiarity import Floats
from imcap_ray.models.outliers import pool_features
from imcap_ray.models.torch_captioner import TorchCaptioner
from imcap_ray.runs.captioned_images import CaptionedImageSource

TABLE_FILE: Final = "captions.csv"

COLUMNS: Final = ("file_name", "caption", "confidence", "familiarity", "image_id")

CANDIDATES_PER_IMAGE: Final = 5
"""For each image to be chosen, this many of the least confident images and this many of the least familiar ones are
considered."""

LONGEST_SIDE: Final = 512
"""Pixels of the images in the folder: enough for people, and for models of up to this image size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestions:
    """What `suggest_images` wrote."""

    output: str
    num_images: int
    num_candidates: int
    num_unreadable: int
    """Candidates that were left out because their image is missing, cannot be read, or has changed."""


def suggest_images(
    captions: str,
    output: str,
    *,
    count: int,
    captioner: TorchCaptioner,
    images: CaptionedImageSource,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Suggestions:
    """Choose images, and write them with their captions to a folder that `imcap train` reads.

    Candidates are the least confident and the least familiar images. Of those, the images are chosen that cover the
    others best by their features, so that they are not all alike: the greedy solution of the k-center problem (Sener
    and Savarese, "Active learning for convolutional neural networks: a core-set approach", ICLR 2018). The first one
    has the lowest confidence.

    Args:
        captioner: its CNN computes the features.
        on_progress: called with the number of candidates that are read and the number of all candidates.

    Raises:
        InputError: no captions table, or nothing in it to choose from.
        OutputError: `output` exists and is not an empty folder.
    """
    table, output = CaptionsTable(storage.absolute(captions), {}), storage.absolute(output)
    _require_empty(output)
    candidates = _find_candidates(table, CANDIDATES_PER_IMAGE * count)
    if not candidates:
        raise InputError(f"{captions} has no captioned images to choose from")
    readable, features = _encode(candidates, captioner, images, on_progress)
    if not readable:
        raise InputError(f"none of the {len(candidates):,} images to choose from in {captions} can be read")
    chosen = [readable[number] for number in choose_diverse(features, count)]
    _write(chosen, images.load(chosen), output)
    return Suggestions(
        output=output,
        num_images=len(chosen),
        num_candidates=len(candidates),
        num_unreadable=len(candidates) - len(readable),
    )


def choose_diverse(features: Floats, count: int) -> list[int]:
    """Numbers of at most `count` images that cover all others by their features (N, F); the first is number 0."""
    lengths = np.maximum(np.linalg.norm(features, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    directions: npt.NDArray[np.float32] = features / lengths
    chosen = [0]
    distances = 1 - directions @ directions[0]
    while len(chosen) < min(count, len(features)):
        distances[chosen] = -np.inf  # not twice, even if all that are left are equal
        chosen.append(int(distances.argmax()))
        distances = np.minimum(distances, 1 - directions @ directions[chosen[-1]])
    return chosen


def _require_empty(output: str) -> None:
    if storage.exists(output) and not storage.is_folder(output):
        raise OutputError(f"{output} is a file: OUT must be a new folder")
    if storage.is_folder(output) and any(True for _ in storage.list_files(output)):
        raise OutputError(f"{output} has files: OUT must be a new folder")


def _find_candidates(table: CaptionsTable, number: int) -> list[CaptionRow]:
    """The least confident images and the least familiar ones, each once, the least confident first."""
    found: dict[str, CaptionRow] = {}
    for column in ("confidence", "familiarity"):
        rows = (row for row in table.rows() if row["status"] == OK and row[column] is not None)
        found |= {row["image_id"]: row for row in heapq.nsmallest(number, rows, key=lambda row: _rank(row, column))}
    return sorted(found.values(), key=lambda row: _rank(row, "confidence"))


def _rank(row: CaptionRow, column: str) -> tuple[float, str]:
    value = row["confidence"] if column == "confidence" else row["familiarity"]
    return -math.inf if value is None else value, row["image_id"]


def _encode(
    rows: Sequence[CaptionRow],
    captioner: TorchCaptioner,
    images: CaptionedImageSource,
    on_progress: Callable[[int, int], None],
) -> tuple[list[CaptionRow], Floats]:
    """The rows whose images can be read, and the mean over all regions of their features (N, F)."""

    def read() -> Iterator[tuple[CaptionRow, npt.NDArray[np.uint8]]]:
        for number, (row, data) in enumerate(zip(rows, images.load(rows), strict=True), start=1):
            try:
                if not isinstance(data, ImageError):
                    yield row, decode_image(data, image_size=captioner.image_size).pixels
            except ImageError:
                continue
            finally:
                on_progress(number, len(rows))

    return pool_features(captioner, read())


def _write(rows: Sequence[CaptionRow], images: Iterable[bytes | ImageError], output: str) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for number, (row, data) in enumerate(zip(rows, images, strict=True), start=1):
        if isinstance(data, ImageError):  # gone since its features were computed
            continue
        name = f"{number:0{len(str(len(rows)))}}.jpg"
        storage.write_bytes(storage.join(output, name), _shrink(data))
        cells = (row["caption"], row["confidence"], row["familiarity"], row["image_id"])
        writer.writerow([name, *(guard_cell(cell) if isinstance(cell, str) else cell for cell in cells)])
    # With a byte order mark, because without one Excel does not recognise UTF-8.
    storage.write_bytes(storage.join(output, TABLE_FILE), text.getvalue().encode("utf-8-sig"))


def _shrink(data: bytes) -> bytes:
    """A JPEG of the image whose longest side has at most `LONGEST_SIDE` pixels."""
    decoded = decode_image(data, image_size=LONGEST_SIDE)
    scale = min(1, LONGEST_SIDE / max(decoded.width, decoded.height))
    size = (math.ceil(decoded.width * scale), math.ceil(decoded.height * scale))
    jpeg = BytesIO()
    Image.fromarray(decoded.pixels.transpose(1, 2, 0)).resize(size).save(jpeg, "JPEG", quality=90)
    return jpeg.getvalue()
