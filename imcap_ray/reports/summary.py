"""A captions table -> counts over all of its images, and the rows that a report shows as cards.

A pyarrow dataset is read batch by batch. Only its distinct captions and ten bytes per image are kept.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from imcap_ray.data.schemas import FAILED, OK, UNFAMILIAR

if TYPE_CHECKING:
    import pyarrow.dataset as ds

# If more than a fifth of the images have one caption, the model has probably stopped looking at them.
COLLAPSE_SHARE: Final = 0.2

COLLAPSE_MIN_IMAGES: Final = 20

_FREQUENT_CAPTIONS: Final = 10

_MAP_CELLS: Final = round(1 / UNFAMILIAR)
"""Columns, and rows, of the map of confidence against familiarity; the unfamiliar images are its first column."""

_MESSAGE_LENGTH: Final = 400

_FAILED_SHARE: Final = 0.25
"""Share of the cards that failed images may always take. They take more if the others leave room."""

_WORST_SHARE: Final = 0.5
"""Share of the photographs in a sample that are chosen for low scores, confidences and familiarity."""

Floats = np.ndarray[Any, np.dtype[np.float32]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]
Counts = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(kw_only=True, slots=True)
class Summary:
    """Counts over all images, however many of them a page shows."""

    statuses: Counter[str] = field(default_factory=Counter)
    captions: Counter[str] = field(default_factory=Counter)
    """Captions of the images whose status is ok."""
    error_codes: Counter[str] = field(default_factory=Counter)
    error_messages: dict[str, str] = field(default_factory=dict)
    """The first message of each code."""
    failed: Flags = field(default_factory=lambda: np.zeros(0, dtype=bool))
    """By row."""
    unfamiliar: Flags = field(default_factory=lambda: np.zeros(0, dtype=bool))
    """By row: captioned images that are unlike what the model has learned from."""
    num_with_familiarity: int = 0
    """Captioned images whose familiarity is known."""
    familiarity_map: Counts = field(default_factory=lambda: np.zeros((_MAP_CELLS, _MAP_CELLS), dtype=np.int64))
    """Captioned images by familiarity (first axis) and confidence, both from 0 to 1 in cells of equal size."""
    confidences: Floats = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    """By row; NaN for rows without one."""
    scores: Floats = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    """By row; NaN for rows without one."""
    differences: Floats = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    """From the captions of another captioner, by row; NaN for rows without them."""
    num_without_references: int = 0
    """Counted only if there are references."""

    @property
    def num_images(self) -> int:
        """Number of rows."""
        return self.statuses.total()

    @property
    def num_unfamiliar(self) -> int:
        """Number of captioned images that are unlike what the model has learned from."""
        return int(np.count_nonzero(self.unfamiliar))

    @property
    def frequent(self) -> list[tuple[str, int]]:
        """Captions given more than once, most frequent first."""
        return [(c, n) for c, n in self.captions.most_common(_FREQUENT_CAPTIONS) if n > 1]

    @property
    def collapse(self) -> tuple[str, float] | None:
        """The caption that too many images have, and their share."""
        num_ok = self.captions.total()
        if num_ok < COLLAPSE_MIN_IMAGES:
            return None
        caption, count = self.captions.most_common(1)[0]
        return (caption, count / num_ok) if count / num_ok > COLLAPSE_SHARE else None


def summarize(
    captions: pa.Table | ds.Dataset,
    image_scores: Mapping[str, float],
    references: Mapping[str, Sequence[str]],
    differences: Mapping[str, float],
) -> Summary:
    """Count statuses, captions, errors and familiarity; collect confidence, score and difference of each row."""
    summary = Summary()
    failed, unfamiliar = [summary.failed], [summary.unfamiliar]
    confidences, scores, differing = [summary.confidences], [summary.scores], [summary.differences]
    numbers = ["confidence", "familiarity"]
    for batch in _batches(captions, ["image_id", "status", "caption", *numbers, "error_code", "error_message"]):
        batch = fill_null_texts(batch)
        status = batch["status"]
        summary.statuses.update(_value_counts(status))
        summary.captions.update(_value_counts(batch["caption"].filter(pc.equal(status, OK))))
        is_failed = pc.equal(status, FAILED)
        failed.append(is_failed.to_numpy(zero_copy_only=False))
        confidences.append(_floats(batch["confidence"].to_pylist()))
        familiarity = np.where(failed[-1], np.float32(math.nan), _floats(batch["familiarity"].to_pylist()))
        unfamiliar.append(familiarity < UNFAMILIAR)
        summary.num_with_familiarity += int(np.count_nonzero(~np.isnan(familiarity)))
        summary.familiarity_map += _count_cells(familiarity, confidences[-1])
        image_ids = batch["image_id"].to_pylist() if image_scores or references or differences else []
        for columns, values in ((scores, image_scores), (differing, differences)):
            columns.append(_floats(map(values.get, image_ids) if values else [None] * len(batch)))
        if references:
            summary.num_without_references += sum(image_id not in references for image_id in image_ids)
        failures = batch.filter(is_failed)
        for code, message in zip(failures["error_code"], failures["error_message"], strict=True):
            summary.error_codes[code.as_py()] += 1
            summary.error_messages.setdefault(code.as_py(), clip_message(message.as_py()))
    summary.failed, summary.unfamiliar = np.concatenate(failed), np.concatenate(unfamiliar)
    summary.confidences, summary.scores = np.concatenate(confidences), np.concatenate(scores)
    summary.differences = np.concatenate(differing)
    return summary


def choose_cards(summary: Summary, *, max_images: int) -> list[int]:
    """Positions of the rows that become cards: all, or a sample of `max_images`.

    A sample has the lowest scores, the largest differences, the least confident, some of the unfamiliar images, as many
    failures as fit, and an even selection of the rest.
    """
    failures, others = np.flatnonzero(summary.failed), np.flatnonzero(~summary.failed)
    num_failed = min(len(failures), max(int(max_images * _FAILED_SHARE), max_images - len(others)))
    num_others = min(len(others), max_images - num_failed)
    worst: set[int] = set()
    if num_others < len(others):
        criteria = (summary.scores, -summary.differences, summary.confidences)
        usable = [values for values in criteria if not np.isnan(values[others]).all()]
        unfamiliar = np.flatnonzero(summary.unfamiliar)
        num_reasons = len(usable) + (len(unfamiliar) > 0)
        num_worst = int(num_others * _WORST_SHARE / max(1, num_reasons))
        for values in usable:
            lowest = others[np.argsort(values[others], kind="stable")]  # NaN comes last
            worst.update(lowest[:num_worst].tolist())
        worst.update(_evenly(unfamiliar, min(num_worst, len(unfamiliar))))
    rest = np.array([position for position in others if position not in worst], dtype=np.intp)
    return [*_evenly(failures, num_failed), *sorted(worst), *_evenly(rest, num_others - len(worst))]


Value = TypeVar("Value")


class ByImage(Mapping[str, Value]):
    """Values by image_id, or by file name if exactly one captioned image and one of the values' images has that name.

    The captions may be of a folder above that of the references, so their ids may have folders before the name.
    """

    def __init__(self, values: Mapping[str, Value], names: Set[str]) -> None:
        self._values = values
        self._names = names

    def __getitem__(self, image_id: str) -> Value:
        if image_id in self._values:
            return self._values[image_id]
        name = file_name(image_id)
        if name not in self._names:
            raise KeyError(image_id)
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def unambiguous_names(captions: pa.Table | ds.Dataset, image_ids: Set[str]) -> Set[str]:
    """Those of the ids that are file names, if no other id and only one captioned image has the name."""
    counts = Counter(map(file_name, image_ids))
    names = {image_id for image_id in image_ids if counts.get(image_id) == 1}
    captioned = Counter[str]()
    for batch in _batches(captions, ["image_id"]):
        file_names = map(file_name, fill_null_texts(batch)["image_id"].to_pylist())
        captioned.update(name for name in file_names if name in names)
    return {name for name in names if captioned[name] == 1}


def fill_null_texts(rows: Any) -> Any:
    """The rows with "" for null texts, which a table that a user has joined may have."""
    for number, column in enumerate(rows.schema):
        if pa.types.is_string(column.type):
            rows = rows.set_column(number, column.name, pc.fill_null(rows.column(number), ""))
    return rows


def clip_message(message: str) -> str:
    """The message, shortened if it is very long."""
    return message if len(message) <= _MESSAGE_LENGTH else message[: _MESSAGE_LENGTH - 1] + "…"


def known(value: float | None) -> float | None:
    """The value, or None if it is NaN."""
    return None if value is None or math.isnan(value) else value


def _batches(captions: pa.Table | ds.Dataset, columns: list[str]) -> Iterator[pa.RecordBatch]:
    if isinstance(captions, pa.Table):
        yield from captions.select(columns).to_batches()
    else:
        yield from captions.to_batches(columns=columns)


def file_name(image_id: str) -> str:
    """The image_id without folders."""
    return image_id.rpartition("/")[2]


def _floats(values: Iterable[float | None]) -> Floats:
    return np.array([math.nan if value is None else value for value in values], dtype=np.float32)


def _count_cells(familiarity: Floats, confidences: Floats) -> Counts:
    """See `Summary.familiarity_map`; NaN is in no cell."""
    cells, _, _ = np.histogram2d(familiarity, confidences, bins=_MAP_CELLS, range=[(0, 1), (0, 1)])
    return cells.astype(np.int64)


def _value_counts(values: pa.Array) -> dict[str, int]:
    return {pair["values"]: pair["counts"] for pair in pc.value_counts(values).to_pylist()}


def _evenly(positions: np.ndarray[Any, np.dtype[np.intp]], count: int) -> list[int]:
    return [int(positions[i * len(positions) // count]) for i in range(count)]
