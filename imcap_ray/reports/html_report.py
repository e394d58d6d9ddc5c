"""Scores, captions and thumbnails -> one HTML file that opens from disk and loads nothing else.

Knows neither where photographs lie (it is handed `load_images`) nor how scores are computed.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from imcap_ray import storage
from imcap_ray.data.image_decoding import decode_image
from imcap_ray.data.schemas import CAPTIONS_SCHEMA, DUPLICATE, FAILED, OK
from imcap_ray.errors import ConfigError, ImageError, ImcapError, InputError
from imcap_ray.reports.charts import curve_of_confidence, curve_of_epochs, histogram_of_lengths, histogram_of_scores

if TYPE_CHECKING:
    import pyarrow.dataset as ds

# One caption under more than a fifth of the images is the sign of a model that no longer looks at them.
COLLAPSE_SHARE: Final = 0.2

COLLAPSE_MIN_IMAGES: Final = 20

# (longest side in pixels, JPEG quality), tried in turn until a thumbnail fits. A thousand of THUMBNAIL_BYTES
# are 16 MB in base64, which leaves 4 MB of the 20 for the text of the page.
_THUMBNAIL_TRIES: Final = ((256, 82), (256, 65), (256, 45), (192, 45), (128, 40), (64, 40))

THUMBNAIL_BYTES: Final = 12_000

CHANGED: Final = "changed since it was captioned"
"""In the place of the thumbnail of an image whose bytes are not those that were captioned."""

# Of the cards, failed images may always take a quarter; more where the others leave room.
_FAILED_SHARE: Final = 0.25

_WORST_SHARE: Final = 0.5
"""Of the photographs in a sample, those that are chosen for their low scores and confidences."""

_FREQUENT_CAPTIONS: Final = 10

_MESSAGE_LENGTH: Final = 400

_THUMBNAILS_AT_A_TIME: Final = 64

_MOST_WORDS_ATTENDED: Final = 40

_HEAT_PIXELS_A_REGION: Final = 8

_HEAT_COLOUR: Final = (8, 10, 24)

_MOST_HEAT_ALPHA: Final = 205

# Name in metrics.Scores: label, factor and format, as `imcap evaluate` prints them.
_SCORES: Final = {
    "bleu_1": ("BLEU-1", 100, ".1f"),
    "bleu_2": ("BLEU-2", 100, ".1f"),
    "bleu_3": ("BLEU-3", 100, ".1f"),
    "bleu_4": ("BLEU-4", 100, ".1f"),
    "rouge_l": ("ROUGE-L", 100, ".1f"),
    "cider_d": ("CIDEr-D", 1, ".3f"),
    "length_ratio": ("length ratio", 1, ".2f"),
}

_EVALUATED: Final = (
    ("scores", "this model"),
    ("floor", "best constant caption"),
    ("human", "human, leave one out"),
)

Row = dict[str, Any]

LoadImages = Callable[[Sequence[Row]], Iterator[bytes | ImageError]]

Attend = Callable[[bytes, str], Sequence[tuple[str, np.ndarray[Any, Any]]]]
"""An image and its caption -> for each word the weights (rows, columns) over the image."""


def write_report(
    captions: pa.Table | ds.Dataset,
    path: str | Path,
    *,
    load_images: LoadImages,
    references: Mapping[str, Sequence[str]] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    image_scores: Mapping[str, float] | None = None,
    history: Sequence[Mapping[str, Any]] = (),
    run: Mapping[str, Any] | None = None,
    attend: Attend | None = None,
    num_attended: int = 0,
    attention_note: str = "",
    score_note: str = "",
    title: str = "Image captions",
    max_images: int = 1000,
) -> None:
    """Write the report of `captions`, which has the columns of `CAPTIONS_SCHEMA`, to `path`.

    A pyarrow dataset is read batch by batch: what is kept of it is its distinct captions and nine bytes per
    image. An earlier report at `path`, which may be a URI, stands until the new one is whole.

    References and scores are found by image_id, or by the file name where one captioned image and one of theirs has it.

    Args:
        load_images: the files' bytes for rows of `captions`, in their order; an `ImageError` where there are none, or
            other ones than were captioned (code `changed`): the card then says so. Never called for failed rows.
        references: human captions by image_id, shown next to the caption.
        evaluation: an `EvaluationReport` as a dict. Further lines of its table may stand under "rows", as
            `{"name": ..., "bleu_1": ..., "cider_d": ...}`, with what scores there are.
        image_scores: CIDEr-D by image_id, to sort the cards by.
        history: a line for each epoch of the model's training: `phase`, `train_loss`, `cider_d`.
        attend: where the model looked; asked for `num_attended` images from the least to the most confident.
        attention_note: why there is no `attend`, where that needs saying.
        score_note: the same of the evaluation.
        run: what `run.json` holds. `model` (a name, or a mapping with `name` and `fingerprint`) and
            `images_per_second` stand in the header, all of it under "Provenance".
        max_images: beyond it the gallery is a sample: the lowest scores, the least confident, every failure that fits,
            and of the rest an even share. Counts, tables and histograms are always of all images.

    Raises:
        InputError: `captions` lacks columns.
        ConfigError: `max_images` is negative.
    """
    if max_images < 0:
        raise ConfigError(f"max_images must be at least 0, got {max_images}")
    missing = [name for name in CAPTIONS_SCHEMA.names if name not in captions.schema.names]
    if missing:
        raise InputError(f"this is not a captions table: it lacks the columns {', '.join(missing)}")

    references, image_scores = references or {}, image_scores or {}
    if references or image_scores:
        names = _names_of_one_image(captions, references.keys() | image_scores.keys())
        references, image_scores = _ByImage(references, names), _ByImage(image_scores, names)
    summary = _summarise(captions, image_scores, references)
    shown = _positions_shown(summary, max_images=max_images)
    rows = sorted(_filled(captions.take(pa.array(shown, pa.int64()))).to_pylist(), key=lambda row: row["image_id"])
    attended, note = _attended(rows, num_attended, load_images=load_images, attend=attend)
    page = _template().stream(
        title=title,
        summary=summary,
        model=_model_line(run or {}),
        run=_flatten(run or {}),
        scores=_score_table(evaluation or {}),
        protocol=_protocol(evaluation or {}),
        curve=curve_of_confidence((evaluation or {}).get("confidence_curve", ())),
        lengths=histogram_of_lengths(summary.captions),
        image_scores=histogram_of_scores(image_scores.values()),
        losses=curve_of_epochs(history, "train_loss"),
        validation=curve_of_epochs(history, "cider_d"),
        attended=attended,
        attention_note=attention_note or note,
        score_note=score_note,
        num_cards=len(rows),
        num_failed_cards=sum(row["status"] == FAILED for row in rows),
        statuses_shown=[s for s in (OK, DUPLICATE, FAILED) if any(row["status"] == s for row in rows)],
        has_references=bool(references),
        has_scores=bool(image_scores),
        cards=_cards(rows, load_images=load_images, references=references, image_scores=image_scores),
    )
    page.enable_buffering()
    _replace(storage.absolute(str(path)), page)


@dataclass(kw_only=True, slots=True)
class _Summary:
    """What a page says of all images, however many of them it shows."""

    statuses: Counter[str] = field(default_factory=Counter)
    captions: Counter[str] = field(default_factory=Counter)  # of the images that are ok
    error_codes: Counter[str] = field(default_factory=Counter)
    error_messages: dict[str, str] = field(default_factory=dict)  # the first one by code
    failed: np.ndarray[Any, np.dtype[np.bool_]] = field(default_factory=lambda: np.zeros(0, dtype=bool))
    confidences: np.ndarray[Any, np.dtype[np.float32]] = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    scores: np.ndarray[Any, np.dtype[np.float32]] = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    """Like the confidences NaN where there is none."""
    num_without_references: int = 0
    """Only counted where there are references."""

    @property
    def num_images(self) -> int:
        return self.statuses.total()

    @property
    def frequent(self) -> list[tuple[str, int]]:
        """The captions given more than once, most frequent first."""
        return [(c, n) for c, n in self.captions.most_common(_FREQUENT_CAPTIONS) if n > 1]

    @property
    def collapse(self) -> tuple[str, float] | None:
        """The caption that stands under too many images, and its share of them."""
        num_ok = self.captions.total()
        if num_ok < COLLAPSE_MIN_IMAGES:
            return None
        caption, count = self.captions.most_common(1)[0]
        return (caption, count / num_ok) if count / num_ok > COLLAPSE_SHARE else None


def _batches(captions: pa.Table | ds.Dataset, columns: list[str]) -> Iterator[pa.RecordBatch]:
    if isinstance(captions, pa.Table):
        yield from captions.select(columns).to_batches()
    else:
        yield from captions.to_batches(columns=columns)


def _summarise(
    captions: pa.Table | ds.Dataset, image_scores: Mapping[str, float], references: Mapping[str, Sequence[str]]
) -> _Summary:
    columns = ["image_id", "status", "caption", "confidence", "error_code", "error_message"]
    batches = _batches(captions, columns)
    summary = _Summary()
    failed, confidences, scores = [summary.failed], [summary.confidences], [summary.scores]
    for batch in batches:
        batch = _filled(batch)
        status = batch["status"]
        summary.statuses.update(_value_counts(status))
        summary.captions.update(_value_counts(batch["caption"].filter(pc.equal(status, OK))))
        is_failed = pc.equal(status, FAILED)
        failed.append(is_failed.to_numpy(zero_copy_only=False))
        confidences.append(_numbers(batch["confidence"].to_pylist()))
        image_ids = batch["image_id"].to_pylist() if image_scores or references else []
        of_images = map(image_scores.get, image_ids)
        scores.append(_numbers(of_images if image_scores else [None] * len(batch)))
        if references:
            summary.num_without_references += sum(image_id not in references for image_id in image_ids)
        failures = batch.filter(is_failed)
        for code, message in zip(failures["error_code"], failures["error_message"], strict=True):
            summary.error_codes[code.as_py()] += 1
            summary.error_messages.setdefault(code.as_py(), _clip(message.as_py()))
    summary.failed = np.concatenate(failed)
    summary.confidences, summary.scores = np.concatenate(confidences), np.concatenate(scores)
    return summary


def _filled(rows: Any) -> Any:
    """The rows with "" where a text is null, as in tables that somebody has joined."""
    for number, column in enumerate(rows.schema):
        if pa.types.is_string(column.type):
            rows = rows.set_column(number, column.name, pc.fill_null(rows.column(number), ""))
    return rows


def _numbers(values: Iterable[float | None]) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.array([math.nan if value is None else value for value in values], dtype=np.float32)


def _value_counts(values: pa.Array) -> dict[str, int]:
    return {pair["values"]: pair["counts"] for pair in pc.value_counts(values).to_pylist()}


def _positions_shown(summary: _Summary, *, max_images: int) -> list[int]:
    """Rows that get a card: all, or `max_images`, as `write_report` chooses them."""
    failures, others = np.flatnonzero(summary.failed), np.flatnonzero(~summary.failed)
    num_failed = min(len(failures), max(int(max_images * _FAILED_SHARE), max_images - len(others)))
    num_others = min(len(others), max_images - num_failed)
    worst: set[int] = set()
    if num_others < len(others):
        known = [values for values in (summary.scores, summary.confidences) if not np.isnan(values[others]).all()]
        for values in known:
            lowest = others[np.argsort(values[others], kind="stable")]  # NaN comes last
            worst.update(lowest[: int(num_others * _WORST_SHARE / len(known))].tolist())
    rest = np.array([position for position in others if position not in worst], dtype=np.intp)
    return [*_evenly(failures, num_failed), *sorted(worst), *_evenly(rest, num_others - len(worst))]


def _evenly(positions: np.ndarray[Any, np.dtype[np.intp]], count: int) -> list[int]:
    return [int(positions[i * len(positions) // count]) for i in range(count)]


def _cards(
    rows: Sequence[Row],
    *,
    load_images: LoadImages,
    references: Mapping[str, Sequence[str]],
    image_scores: Mapping[str, float],
) -> Iterator[Row]:
    """The rows, each with what only its card needs: thumbnail, references, the other captions."""

    images = load_images([row for row in rows if row["status"] != FAILED])
    for row, thumbnail, reason in _with_thumbnails(rows, images):
        yield {
            **row,
            "thumbnail": thumbnail,
            "no_thumbnail": reason,
            "duplicate_of": row["duplicate_of"] if reason != CHANGED else "",  # it is not the same file any more
            "confidence": _confidence(row),
            "error_message": _clip(row["error_message"]),
            "other_captions": [c for c in row["captions"] or () if c != row["caption"]],
            "references": references.get(row["image_id"], ()),
            "score": image_scores.get(row["image_id"]),
        }


def _with_thumbnails(
    rows: Sequence[Row], images: Iterator[bytes | ImageError]
) -> Iterator[tuple[Row, str | None, str]]:
    """The rows with the data URIs of their thumbnails, or why there is none, where there is an image for each that has
    not failed."""
    left = iter(rows)
    with ThreadPoolExecutor() as threads:  # Pillow works without the interpreter's lock
        while chunk := list(islice(left, _THUMBNAILS_AT_A_TIME)):
            data = [None if row["status"] == FAILED else next(images) for row in chunk]
            for row, (thumbnail, reason) in zip(chunk, threads.map(_thumbnail_of, data), strict=True):
                yield row, thumbnail, reason


def _thumbnail_of(data: bytes | ImageError | None) -> tuple[str | None, str]:
    if data is None:
        return None, ""
    try:
        if isinstance(data, ImageError):
            raise data
        return _thumbnail(data).uri, ""
    except ImageError as error:
        return None, CHANGED if error.code == "changed" else "no picture"


Value = TypeVar("Value")


class _ByImage(Mapping[str, Value]):
    """What there is of captioned images, by their id, or by their file name where only one image has it: captions may
    be of a folder above that of the references."""

    def __init__(self, values: Mapping[str, Value], names: Set[str]) -> None:
        self._values = values
        self._names = names

    def __getitem__(self, image_id: str) -> Value:
        if image_id in self._values:
            return self._values[image_id]
        name = image_id.rpartition("/")[2]
        if name not in self._names:
            raise KeyError(image_id)
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def _names_of_one_image(captions: pa.Table | ds.Dataset, image_ids: Iterable[str]) -> Set[str]:
    """Those of the ids that are file names which no other of them, and only one captioned image, has."""
    known = Counter(image_id.rpartition("/")[2] for image_id in image_ids)
    names = {image_id for image_id in image_ids if known.get(image_id) == 1}
    captioned = Counter[str]()
    for batch in _batches(captions, ["image_id"]):
        captioned.update(
            name
            for name in (image_id.rpartition("/")[2] for image_id in _filled(batch)["image_id"].to_pylist())
            if name in names
        )
    return {name for name in names if captioned[name] == 1}


def _attended(
    rows: Sequence[Row], count: int, *, load_images: LoadImages, attend: Attend | None
) -> tuple[list[Row], str]:
    """A few images with where the model looked at each word, and why there are none where there could be some."""
    candidates = [row for row in rows if row["status"] == OK and row["caption"]]
    candidates.sort(key=lambda row: -1.0 if _confidence(row) is None else row["confidence"])
    if attend is None or not count or not candidates:
        return [], ""
    places = np.unique(np.linspace(0, len(candidates) - 1, count).round().astype(int))
    found, reason = [], "none of their photographs is available in the version that was captioned"
    chosen = [candidates[place] for place in places]
    for row, data in zip(chosen, load_images(chosen), strict=True):
        if isinstance(data, ImageError):
            continue
        try:
            words = attend(data, row["caption"])[:_MOST_WORDS_ATTENDED]
            thumbnail = _thumbnail(data)
        except ImageError:
            continue
        except ImcapError as error:
            reason = str(error)
            break
        heats = [{"word": word, "heat": _heat(weights)} for word, weights in words]
        found.append({**row, "confidence": _confidence(row), "thumbnail": thumbnail, "words": heats})
    return found, "" if found else reason


def _heat(weights: np.ndarray[Any, Any]) -> str:
    """A PNG data URI that darkens the image where the weights are low."""
    rows, columns = weights.shape
    size = (columns * _HEAT_PIXELS_A_REGION, rows * _HEAT_PIXELS_A_REGION)
    span = weights.max() - weights.min() or 1.0
    light = np.asarray(Image.fromarray(((weights - weights.min()) / span).astype(np.float32)).resize(size))
    pixels = np.empty((*light.shape, 4), dtype=np.uint8)
    pixels[..., :3] = _HEAT_COLOUR
    pixels[..., 3] = _MOST_HEAT_ALPHA * (1 - light.clip(0, 1))
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _confidence(row: Row) -> float | None:
    confidence: float | None = row["confidence"]
    return None if confidence is None or math.isnan(confidence) else confidence


class _Thumbnail(NamedTuple):
    uri: str
    width: int
    height: int


def _thumbnail(data: bytes) -> _Thumbnail:
    """A JPEG data URI, upright and small, with its size; an `ImageError` for bytes that are no picture (any more)."""
    largest = _THUMBNAIL_TRIES[0][0]
    decoded = decode_image(data, image_size=largest)
    square = Image.fromarray(decoded.pixels.transpose(1, 2, 0))
    encoded = b""
    for side, quality in _THUMBNAIL_TRIES:
        scale = min(1, side / max(decoded.width, decoded.height))
        picture = square.resize((math.ceil(decoded.width * scale), math.ceil(decoded.height * scale)))
        buffer = BytesIO()
        picture.save(buffer, "JPEG", quality=quality, optimize=True)
        encoded = buffer.getvalue()
        if len(encoded) <= THUMBNAIL_BYTES:
            break
    return _Thumbnail("data:image/jpeg;base64," + base64.b64encode(encoded).decode("ascii"), *picture.size)


def _model_line(run: Mapping[str, Any]) -> dict[str, Any]:
    """The header's share of `run`: model name, fingerprint, images per second; None where it is silent."""
    model = run.get("model")
    details = model if isinstance(model, Mapping) else {"name": model}
    return {
        "name": details.get("name"),
        "fingerprint": details.get("fingerprint") or run.get("model_fingerprint"),
        "images_per_second": run.get("images_per_second"),
    }


def _score_table(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Labels of the scores that any line has, and the lines: a name and cells of value, low and high."""
    lines = [{"name": name, **evaluation[key]} for key, name in _EVALUATED if evaluation.get(key)]
    lines += evaluation.get("rows", ())
    names = [name for name in _SCORES if any(name in line for line in lines)]
    rows = [{"name": line["name"], "cells": [{"value": _score(name, line)} for name in names]} for line in lines]
    if evaluation.get("scores"):
        for name, cell in zip(names, rows[0]["cells"], strict=True):
            if name in evaluation.get("intervals", {}):
                low, high = evaluation["intervals"][name]
                cell |= {"low": _score(name, {name: low}), "high": _score(name, {name: high})}
    return {"labels": [_SCORES[name][0] for name in names], "rows": rows}


def _score(name: str, scores: Mapping[str, float]) -> str:
    if scores.get(name) is None:
        return "–"
    _, factor, form = _SCORES[name]
    return format(factor * scores[name], form)


def _protocol(evaluation: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the scores depend on, in (name, text) pairs."""
    protocol = dict(evaluation.get("protocol", {}))
    if "references_per_image" in protocol:
        fewest, most = protocol["references_per_image"]
        protocol["references_per_image"] = most if fewest == most else f"{fewest} to {most}"
    pairs = _flatten({**protocol, "best_constant_caption": evaluation.get("floor_caption", "")})
    return [(name.replace("_", " "), text) for name, text in pairs if text]


def _number(value: Any) -> str:
    """A number as people read it: 12,345; 0.254; 17.3."""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested mappings as (dotted name, text) pairs."""
    pairs: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            pairs += _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            pairs.append((f"{prefix}{key}", ", ".join(map(str, value))))
        else:
            pairs.append((f"{prefix}{key}", str(value)))
    return pairs


def _clip(message: str) -> str:
    return message if len(message) <= _MESSAGE_LENGTH else message[: _MESSAGE_LENGTH - 1] + "…"


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("imcap_ray.reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    environment.filters["csp_hash"] = _csp_hash
    return environment.get_template("report.html")


def _csp_hash(source: str) -> str:
    """How a Content-Security-Policy names the one inline script, or style, that it lets through."""
    digest = hashlib.sha256(source.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def _replace(location: str, chunks: Iterable[str]) -> None:
    """Write a file (path or URI) whole or not at all; an earlier report stands until then."""
    with storage.replacing(location) as file:
        for chunk in chunks:
            # No line end of the system's own: the policy's hashes hold only for those they were computed with.
            file.write(chunk.encode("utf-8", errors="replace"))
