"""Numbers -> the coordinates that a report draws them with, on a plane of 360 x 120, maps 360 x 240. Knows no HTML."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from imcap_ray.scoring.evaluation_report import HALF, CoveragePoint
from imcap_ray.text.tokenizers import split_words

WIDTH: Final = 360

HEIGHT: Final = 120

MAP_HEIGHT: Final = 240

_HIGHEST_POINT: Final = 100  # of a curve, which leaves room for its label

_LONGEST_BAR_WORDS: Final = 30

_NUM_SCORE_BARS: Final = 20

_FINEST_SCORE_BAR: Final = 0.1

_ALMOST_ZERO_SCORE: Final = 0.05

_PALEST_CELL: Final = 0.15


class Bar(NamedTuple):
    """A bar of a histogram."""

    name: str
    """The full name, for a tooltip."""
    label: str
    """The name below the bar. A label that differs from the name belongs to the bar's left edge."""
    is_labelled: bool
    num_images: int
    x: float
    width: float
    height: float


class LengthHistogram(NamedTuple):
    """Images by number of words in their caption."""

    bars: Sequence[Bar]
    shortest: int
    longest: int
    median: int


class ScoreHistogram(NamedTuple):
    """Images by the score of their caption."""

    bars: Sequence[Bar]
    median: float
    share_of_zero: float
    """Share of the images whose score is almost zero."""


class CurvePoint(NamedTuple):
    """The most confident captions, and their scores."""

    share: str
    min_confidence: str
    cider_d: str
    bleu_4: str
    is_labelled: bool
    x: float
    y: float


class ConfidenceCurve(NamedTuple):
    """CIDEr-D of the most confident captions by their share."""

    points: Sequence[CurvePoint]
    half: CurvePoint


class EpochPoint(NamedTuple):
    """A number of one epoch."""

    epoch: int
    value: str
    is_labelled: bool
    x: float
    y: float


class EpochLine(NamedTuple):
    """The epochs of a phase."""

    phase: str
    points: Sequence[EpochPoint]


class EpochChart(NamedTuple):
    """A number of a training by epoch."""

    lines: Sequence[EpochLine]
    first: int
    last: int


class Cell(NamedTuple):
    """The images of a cell of a map."""

    familiarity: str
    confidence: str
    is_unfamiliar: bool
    num_images: int
    x: float
    y: float
    width: float
    height: float
    opacity: float


def histogram_of_lengths(captions: Counter[str]) -> LengthHistogram | None:
    """One bar for each number of words, or of characters in scripts without spaces; the last bar collects the longest.

    None without captions.
    """
    lengths: Counter[int] = Counter()
    for caption, count in captions.items():
        lengths[len(split_words(caption))] += count
    if not lengths:
        return None
    shortest, longest = min(lengths), max(lengths)
    first, last = min(shortest, _LONGEST_BAR_WORDS), min(max(longest, shortest + 9), _LONGEST_BAR_WORDS)
    by_bar: Counter[int] = Counter()
    for length, count in lengths.items():
        by_bar[min(length, last)] += count
    shown = range(first, last + 1)
    names = [f"{length}+" if length == last < longest else str(length) for length in shown]
    labelled = [n in (first, last) or (n % 5 == 0 and first + 2 <= n <= last - 2) for n in shown]
    bars = _bars([by_bar[length] for length in shown], names, names, labelled)
    return LengthHistogram(bars=bars, shortest=shortest, longest=longest, median=_median(lengths))


def histogram_of_scores(scores: Iterable[float]) -> ScoreHistogram | None:
    """Bars of equal width from 0 on; the last one collects the highest scores. None without scores."""
    values = sorted(scores)
    if not values:
        return None
    nearly_all = values[min(len(values) - 1, int(0.98 * len(values)))]
    width = _FINEST_SCORE_BAR * max(1, math.ceil(nearly_all / _NUM_SCORE_BARS / _FINEST_SCORE_BAR))
    counts = Counter(min(int(value / width + 1e-9), _NUM_SCORE_BARS - 1) for value in values)
    edges = [f"{number * width:.1f}" for number in range(_NUM_SCORE_BARS + 1)]
    names = [f"{edges[n]} to {edges[n + 1]}" for n in range(_NUM_SCORE_BARS - 1)] + [f"{edges[-2]} and more"]
    labelled = [n % 5 == 0 for n in range(_NUM_SCORE_BARS)]
    return ScoreHistogram(
        bars=_bars([counts[n] for n in range(_NUM_SCORE_BARS)], names, edges, labelled),
        median=values[(len(values) - 1) // 2],
        share_of_zero=sum(value < _ALMOST_ZERO_SCORE for value in values) / len(values),
    )


def curve_of_confidence(points: Sequence[CoveragePoint]) -> ConfidenceCurve | None:
    """The points from all captions on the left to the most confident tenth on the right. None without points."""
    if not points:
        return None
    highest = max(point.cider_d for point in points) or 1.0
    drawn = [
        CurvePoint(
            share=f"{point.share:.0%}",
            min_confidence=f"{point.min_confidence:.3f}",
            cider_d=f"{point.cider_d:.3f}",
            bleu_4=f"{100 * point.bleu_4:.1f}",
            is_labelled=point.share in (1.0, HALF) or point is points[-1],
            x=WIDTH * (1 - point.share),
            y=HEIGHT - _HIGHEST_POINT * point.cider_d / highest,
        )
        for point in points
    ]
    return ConfidenceCurve(points=drawn, half=next(point for point in drawn if point.share == f"{HALF:.0%}"))


def map_of_familiarity(counts: npt.NDArray[np.int64]) -> Sequence[Cell]:
    """The cells that have images, from counts by familiarity (left to right) and confidence (bottom to top).

    The opacity is logarithmic, because a cell may have one image or millions. The first column is unfamiliar.
    """
    num_columns, num_rows = counts.shape
    width, height = WIDTH / num_columns, MAP_HEIGHT / num_rows
    return [
        Cell(
            familiarity=f"{column / num_columns:.2f} to {(column + 1) / num_columns:.2f}",
            confidence=f"{row / num_rows:.2f} to {(row + 1) / num_rows:.2f}",
            is_unfamiliar=column == 0,
            num_images=int(counts[column, row]),
            x=column * width,
            y=MAP_HEIGHT - (row + 1) * height,
            width=width,
            height=height,
            opacity=_PALEST_CELL + (1 - _PALEST_CELL) * math.log1p(counts[column, row]) / math.log1p(counts.max()),
        )
        for column, row in np.argwhere(counts).tolist()
    ]


def curve_of_epochs(history: Sequence[Mapping[str, Any]], name: str) -> EpochChart | None:
    """A number of a training by epoch, one line for each phase. None if fewer than two epochs have the number.

    Losses of different phases measure different things, so each phase has its own scale, and its first and last epoch
    are labelled. Scores share one scale, and the highest is labelled, of equal ones the last, whose epoch is kept.
    """
    rows = [(number, row) for number, row in enumerate(history, start=1) if _is_number(row.get(name))]
    if len(rows) < 2:
        return None
    phases: dict[str, list[tuple[int, float]]] = {}
    for number, row in rows:
        phases.setdefault(str(row.get("phase", "training")).replace("_", " "), []).append((number, row[name]))
    first, last = rows[0][0], rows[-1][0]
    is_loss = name.endswith("loss")
    all_values = [value for points in phases.values() for _, value in points]
    lines = []
    for phase, points in phases.items():
        own = [value for _, value in points]
        scale = own if is_loss else all_values
        low, high = min(scale), max(scale)
        span = high - low or 1.0
        highest = {max(position for position, value in enumerate(own) if value == high)} if high in own else set()
        labelled = {0, len(own) - 1} if is_loss else highest
        drawn = [
            EpochPoint(
                epoch=number,
                value=f"{value:.3f}",
                is_labelled=position in labelled,
                x=WIDTH * (number - first) / (last - first),
                y=HEIGHT - 10 - (_HIGHEST_POINT - 15) * (value - low) / span,
            )
            for position, (number, value) in enumerate(points)
        ]
        lines.append(EpochLine(phase=phase, points=drawn))
    return EpochChart(lines=lines, first=first, last=last)


def _bars(
    counts: Sequence[int], names: Sequence[str], labels: Sequence[str], labelled: Sequence[bool]
) -> Sequence[Bar]:
    width, tallest = WIDTH / len(counts), max(counts)
    return [
        Bar(
            name=names[number],
            label=labels[number],
            is_labelled=labelled[number],
            num_images=count,
            x=number * width,
            width=width,
            height=HEIGHT * count / tallest,
        )
        for number, count in enumerate(counts)
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _median(counts: Counter[int]) -> int:
    """The middle value, the lower of two; without writing out 100 million of them."""
    seen = 0
    for value in sorted(counts):
        seen += counts[value]
        if 2 * seen >= counts.total():
            return value
    raise ValueError("expected at least one value for a median, got none")
