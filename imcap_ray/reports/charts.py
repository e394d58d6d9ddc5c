"""Numbers -> the coordinates that a report draws them with, on a plane of 360 x 120. Knows no HTML."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from imcap_ray.scoring.evaluation_report import HALF

WIDTH: Final = 360

HEIGHT: Final = 120

_HIGHEST_POINT: Final = 100  # of a curve, which leaves room for its label

_LONGEST_BAR_WORDS: Final = 30

_SCORE_BARS: Final = 20

_FINEST_SCORE_BAR: Final = 0.1

Chart = dict[str, Any]


def histogram_of_lengths(captions: Counter[str]) -> Chart | None:
    """Images by number of words in their caption: one bar for each length. None without captions."""
    lengths: Counter[int] = Counter()
    for caption, count in captions.items():
        lengths[len(caption.split())] += count
    if not lengths:
        return None
    shortest, longest = min(lengths), max(lengths)
    first, last = min(shortest, _LONGEST_BAR_WORDS), min(max(longest, shortest + 9), _LONGEST_BAR_WORDS)
    bars: Counter[int] = Counter()
    for length, count in lengths.items():
        bars[min(length, last)] += count
    names = [f"{length}+" if length == last < longest else str(length) for length in range(first, last + 1)]
    labelled = [n in (first, last) or (n % 5 == 0 and first + 2 <= n <= last - 2) for n in range(first, last + 1)]
    return {
        "bars": _bars([bars[length] for length in range(first, last + 1)], names, labelled),
        "shortest": shortest,
        "longest": longest,
        "median": _median(lengths),
    }


def histogram_of_scores(scores: Iterable[float]) -> Chart | None:
    """Images by the score of their caption: bars of one width from 0 on, the last one open. None without scores."""
    values = sorted(scores)
    if not values:
        return None
    nearly_all = values[min(len(values) - 1, int(0.98 * len(values)))]
    width = _FINEST_SCORE_BAR * max(1, math.ceil(nearly_all / _SCORE_BARS / _FINEST_SCORE_BAR))
    counts = Counter(min(int(value / width + 1e-9), _SCORE_BARS - 1) for value in values)
    edges = [f"{number * width:.1f}" for number in range(_SCORE_BARS + 1)]
    names = [f"{edges[n]} to {edges[n + 1]}" for n in range(_SCORE_BARS - 1)] + [f"{edges[-2]} and more"]
    bars = _bars([counts[n] for n in range(_SCORE_BARS)], names, [n % 5 == 0 for n in range(_SCORE_BARS)])
    for bar, edge in zip(bars, edges, strict=False):
        bar["label"] = edge
    return {
        "bars": bars,
        "median": values[(len(values) - 1) // 2],
        "share_of_zero": sum(value < 0.05 for value in values) / len(values),
    }


def curve_of_confidence(points: Sequence[Mapping[str, float]]) -> Chart | None:
    """CIDEr-D of the most confident captions by their share. None without points."""
    if not points:
        return None
    highest = max(point["cider_d"] for point in points) or 1.0
    drawn = [
        {
            "share": f"{point['share']:.0%}",
            "x": WIDTH * (1 - point["share"]),
            "y": HEIGHT - _HIGHEST_POINT * point["cider_d"] / highest,
            "min_confidence": f"{point['min_confidence']:.3f}",
            "cider_d": f"{point['cider_d']:.3f}",
            "bleu_4": f"{100 * point['bleu_4']:.1f}",
            "labelled": point["share"] in (1.0, HALF) or point is points[-1],
        }
        for point in points
    ]
    return {"points": drawn, "half": next(point for point in drawn if point["share"] == f"{HALF:.0%}")}


def curve_of_epochs(history: Sequence[Mapping[str, Any]], name: str) -> Chart | None:
    """A number of a training by epoch, a line for each phase; None where fewer than two epochs have it.

    The first, the last, the lowest and the highest are labelled. A line's height is that of its own phase where the
    phases measure different things, as losses do; all scores are drawn on one scale.
    """
    rows = [(number, row) for number, row in enumerate(history, start=1) if _is_number(row.get(name))]
    if len(rows) < 2:
        return None
    phases: dict[str, list[tuple[int, float]]] = {}
    for number, row in rows:
        phases.setdefault(str(row.get("phase", "training")).replace("_", " "), []).append((number, row[name]))
    first, last = rows[0][0], rows[-1][0]
    is_loss = name.endswith("loss")
    everything = [value for points in phases.values() for _, value in points]
    lines = []
    for phase, points in phases.items():
        values = [value for _, value in points] if is_loss else everything
        low, high = min(values), max(values)
        span = high - low or 1.0
        own = [value for _, value in points]
        notable = {0, len(own) - 1} if is_loss else {own.index(max(own))} if max(own) == high else set()
        lines.append(
            {
                "phase": phase,
                "points": [
                    {
                        "epoch": number,
                        "value": f"{value:.3f}",
                        "x": WIDTH * (number - first) / (last - first),
                        "y": HEIGHT - 10 - (_HIGHEST_POINT - 15) * (value - low) / span,
                        "labelled": place in notable,
                    }
                    for place, (number, value) in enumerate(points)
                ],
            }
        )
    return {"lines": lines, "first": first, "last": last}


def _bars(counts: Sequence[int], names: Sequence[str], labelled: Sequence[bool]) -> list[Chart]:
    width, tallest = WIDTH / len(counts), max(counts)
    return [
        {
            "name": name,
            "label": name,
            "count": count,
            "x": number * width,
            "width": width,
            "height": HEIGHT * count / tallest,
            "labelled": is_labelled,
        }
        for number, (count, name, is_labelled) in enumerate(zip(counts, names, labelled, strict=True))
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _median(counts: Counter[int]) -> int:
    """The middle value, of two the lower; without writing out 100 million of them."""
    seen = 0
    for value in sorted(counts):
        seen += counts[value]
        if 2 * seen >= counts.total():
            return value
    raise ValueError("no median of nothing")
