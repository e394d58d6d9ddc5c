"""Captions, scores and photographs -> one HTML file that opens from disk and loads nothing else.

Does not know where photographs are stored (`load_images` does), nor how scores are computed.
"""

from __future__ import annotations

import base64
import hashlib
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
import pyarrow as pa
from markupsafe import Markup

from imcap_ray import storage
from imcap_ray.data.schemas import CAPTIONS_SCHEMA, DUPLICATE, FAILED, OK, UNFAMILIAR
from imcap_ray.errors import ConfigError, InputError
from imcap_ray.reports.cards import LoadImages, make_attention_examples, make_cards
from imcap_ray.reports.charts import (
    curve_of_confidence,
    curve_of_epochs,
    histogram_of_lengths,
    histogram_of_scores,
    map_of_familiarity,
)
from imcap_ray.reports.comparison import Comparison
from imcap_ray.reports.model_section import ModelOfRun
from imcap_ray.reports.summary import ByImage, choose_cards, fill_null_texts, summarize, unambiguous_names
from imcap_ray.scoring.evaluation_report import EvaluationReport
from imcap_ray.scoring.metrics import SCORE_FORMATS, Scores

if TYPE_CHECKING:
    import pyarrow.dataset as ds


@dataclass(frozen=True, slots=True, kw_only=True)
class HumanCaptions:
    """Human captions of the images, scores of the generated captions against them, and other generated captions.

    Values are looked up by image_id, or by the file name if exactly one captioned image and one of theirs has it.
    """

    references: Mapping[str, Sequence[str]] = field(default_factory=dict)
    image_scores: Mapping[str, float] = field(default_factory=dict)
    """CIDEr-D by image_id."""
    evaluation: EvaluationReport | None = None
    score_note: str = ""
    """Why there are no scores."""
    comparison: Comparison | None = None
    """With the captions of another captioner."""


class ScoreCell(NamedTuple):
    """A score, and its interval if it has one."""

    value: str
    low: str = ""
    high: str = ""


class ScoreRow(NamedTuple):
    """A line of the table of scores."""

    name: str
    cells: Sequence[ScoreCell]


def write_report(
    captions: pa.Table | ds.Dataset,
    path: str | Path,
    *,
    load_images: LoadImages,
    human: HumanCaptions | None = None,
    model: ModelOfRun | None = None,
    run: Mapping[str, Any] | None = None,
    num_attended: int = 0,
    max_images: int = 1000,
) -> None:
    """Write the report of `captions`, which has the columns of `CAPTIONS_SCHEMA`, to `path`.

    A pyarrow dataset is read batch by batch. An earlier report at `path`, which may be a URI, is replaced only when the
    new one is complete.

    Args:
        load_images: yields the bytes for rows of `captions`, in their order; an `ImageError` if there are none, or if
            they are not those that were captioned (code `changed`): the card then says so. Never called for failed
            rows.
        human: shown next to the generated captions.
        model: the model that made the captions.
        run: the contents of `run.json`. `model` and `images_per_second` are shown in the header, everything at the end.
        num_attended: number of images for which the model shows where it looks, from the least to the most confident.
        max_images: beyond it the gallery is a sample, see `choose_cards`. Counts, tables and histograms always cover
            all images.

    Raises:
        InputError: `captions` lacks columns.
        ConfigError: `max_images` is negative.
    """
    if max_images < 0:
        raise ConfigError(f"max_images must be at least 0, got {max_images}")
    _require_columns(captions)
    human, model, run = _by_image(human or HumanCaptions(), captions), model or ModelOfRun(), run or {}
    references, image_scores, evaluation = human.references, human.image_scores, human.evaluation
    comparison = human.comparison
    summary = summarize(captions, image_scores, references, comparison.differences if comparison else {})
    positions = choose_cards(summary, max_images=max_images)
    rows = fill_null_texts(captions.take(pa.array(positions, pa.int64()))).to_pylist()
    rows.sort(key=lambda row: row["image_id"])
    examples, note = make_attention_examples(rows, num_attended, load_images=load_images, attend=model.attend)
    page = _template().stream(
        summary=summary,
        model_name=run.get("model"),
        images_per_second=run.get("images_per_second"),
        run=_flatten(run),
        score_labels=[label for label, _, _ in SCORE_FORMATS.values()],
        score_rows=_score_rows(evaluation) if evaluation else [],
        protocol=_protocol(evaluation) if evaluation else [],
        confidence=curve_of_confidence(evaluation.confidence_curve if evaluation else ()),
        lengths=histogram_of_lengths(summary.captions),
        image_scores=histogram_of_scores(image_scores.values()),
        familiarity_cells=map_of_familiarity(summary.familiarity_map),
        losses=curve_of_epochs(model.history, "train_loss"),
        validation=curve_of_epochs(model.history, "cider_d"),
        examples=examples,
        attention_note=model.note or note,
        score_note=human.score_note,
        num_cards=len(rows),
        num_failed_cards=sum(row["status"] == FAILED for row in rows),
        statuses_shown=[s for s in (OK, DUPLICATE, FAILED) if any(row["status"] == s for row in rows)],
        has_references=bool(references),
        has_scores=bool(image_scores),
        has_familiarity=summary.num_with_familiarity > 0,
        unfamiliar=UNFAMILIAR,
        comparison=comparison,
        cards=make_cards(
            rows,
            load_images=load_images,
            references=references,
            image_scores=image_scores,
            comparison=comparison,
        ),
    )
    page.enable_buffering()
    with storage.replacing(storage.absolute(str(path))) as file:
        for chunk in page:
            # Bytes, not text: the hashes in the page's policy would not match if a system changed the line ends.
            file.write(chunk.encode("utf-8", errors="replace"))


def _require_columns(captions: pa.Table | ds.Dataset) -> None:
    missing = [name for name in CAPTIONS_SCHEMA.names if name not in captions.schema.names]
    if missing:
        raise InputError(f"this is not a captions table: it lacks the columns {', '.join(missing)}")


def _by_image(human: HumanCaptions, captions: pa.Table | ds.Dataset) -> HumanCaptions:
    """The same captions and scores, which are then also found by unambiguous file names."""
    if not (human.references or human.image_scores):
        return human
    names = unambiguous_names(captions, human.references.keys() | human.image_scores.keys())
    return replace(human, references=ByImage(human.references, names), image_scores=ByImage(human.image_scores, names))


def _score_rows(evaluation: EvaluationReport) -> Iterator[ScoreRow]:
    own = []
    for name in SCORE_FORMATS:
        low, high = evaluation.intervals.get(name, (None, None))
        own.append(ScoreCell(_score(name, evaluation.scores), _format_score(name, low), _format_score(name, high)))
    yield ScoreRow("this model", own)
    yield ScoreRow("constant-caption baseline", [ScoreCell(_score(name, evaluation.floor)) for name in SCORE_FORMATS])
    if evaluation.human:
        yield ScoreRow("human agreement", [ScoreCell(_score(name, evaluation.human)) for name in SCORE_FORMATS])


def _score(name: str, scores: Scores) -> str:
    return _format_score(name, getattr(scores, name))


def _format_score(name: str, value: float | None) -> str:
    _, factor, form = SCORE_FORMATS[name]
    return "" if value is None else format(factor * value, form)


def _protocol(evaluation: EvaluationReport) -> list[tuple[str, str]]:
    """How the scores were computed, in (name, text) pairs."""
    fewest, most = evaluation.protocol.references_per_image
    values = asdict(evaluation.protocol) | {
        "references_per_image": most if fewest == most else f"{fewest} to {most}",
        "constant caption": evaluation.floor_caption,
    }
    return [(name.replace("_", " "), str(value)) for name, value in values.items() if value]


def _number(value: Any) -> str:
    """A number as people write it: 12,345; 0.254; 17.3."""
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
    environment.filters["direction"] = _direction
    return environment.get_template("report.html")


def _direction(text: str) -> Markup:
    """The attribute `dir` of an element with this text, if it begins in a script that is written from right to left.

    `dir=auto` would not do: it does not look into `bdi` elements.
    """
    strong = (kind for kind in map(unicodedata.bidirectional, text) if kind in ("L", "R", "AL"))
    return Markup("") if next(strong, "L") == "L" else Markup(' dir="rtl"')


def _csp_hash(source: str) -> str:
    """The hash by which a Content-Security-Policy allows an inline script or style."""
    digest = hashlib.sha256(source.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
