"""Captions and references -> scores, with the protocol and the baselines that give them a meaning.

BLEU is computed over the corpus, as in nltk; ROUGE-L and CIDEr-D are defined as in coco-caption. Every evaluation has
two baselines: the best constant caption, and the agreement of the human references with each other. Knows nothing of
images or models.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from itertools import islice
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from imcap_ray.scoring.metrics import (
    SCORE_NAMES,
    SEED,
    Scores,
    collect_mappings,
    collect_texts,
    corpus_scores,
    require_same_images,
    summarize_rows,
)
from imcap_ray.scoring.ngram_statistics import MATCHES, MAX_ORDER, MEANS, REFERENCE_LENGTH, TOTALS, Corpus, Frequencies
from imcap_ray.text.escaping import markdown, printable
from imcap_ray.text.tokenizers import tokenizer_package

DEFINITIONS: Final = (
    "corpus BLEU, closest reference length, no smoothing; ROUGE-L with beta 1.2, best precision and best "
    "recall over the references; CIDEr-D, n = 1 to 4, sigma 6, document frequencies from these references"
)

# Among 1,500 captions of Flickr8k the one with the best score was the first by centrality, and the next three were
# among the first seven.
NUM_CONSTANT_CANDIDATES: Final = 50

NUM_RESAMPLES: Final = 1000

SHARES: Final = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)

HALF: Final = 0.5

SEED_NOTE: Final = (
    "words of one letter are dropped, and markers of start and end are counted, as in Keras tutorials: compare them "
    "only with scores computed the same way"
)

RESAMPLING_SEED: Final = 0


@dataclass(frozen=True, slots=True)
class Protocol:
    """How scores were computed. Scores with different protocols cannot be compared."""

    tokenizer: str
    references_per_image: tuple[int, int]
    """The smallest and the largest number."""
    num_images: int
    split: str
    notes: str
    """Other facts that the scores depend on, such as the beam size."""
    nltk_version: str
    definitions: str = DEFINITIONS
    tokenizer_package: str = ""
    """Package that segments the words, and its version; "" if it is nltk or ours."""


@dataclass(frozen=True, slots=True)
class CoveragePoint:
    """Scores of the most confident captions only, of the most familiar, or of those that are high in both."""

    share: float
    """Share of the images that are kept; 1 is all."""
    min_confidence: float
    """The lowest confidence among those that are kept; 0 if they are not chosen by confidence."""
    bleu_4: float
    cider_d: float
    """Computed with the document frequencies of all images."""
    min_familiarity: float = 0.0
    """The lowest familiarity among those that are kept; 0 if they are not chosen by familiarity."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Scores of other captions of the same images, and the significance of the difference (Koehn 2004, W04-3250)."""

    name: str
    """Name of the other captions."""
    scores: Scores
    differences: Mapping[str, float]
    """This model's scores minus the other's."""
    intervals: Mapping[str, tuple[float, float]]
    """95 % bootstrap interval of each difference, with both models resampled on the same images. An interval that does
    not contain 0 is a difference that the choice of images does not explain."""


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """Scores, their protocol and two baselines."""

    protocol: Protocol
    scores: Scores
    intervals: Mapping[str, tuple[float, float]]
    """95 % bootstrap interval over the images, by name of the score."""
    floor_caption: str
    """The best constant caption: the reference that scores best if every image has it as its caption."""
    floor: Scores
    """Scores of the best constant caption, which is chosen on the same references."""
    human: Scores | None
    """Human agreement: each reference scored against the others; None if no image has two."""
    confidence_curve: Sequence[CoveragePoint] = ()
    """From all captions to the most confident tenth; empty if confidences are unknown."""
    familiarity_curve: Sequence[CoveragePoint] = ()
    """From all captions to the most familiar tenth; empty if familiarities are unknown."""
    confidence_and_familiarity_curve: Sequence[CoveragePoint] = ()
    """From all captions to the tenth above a threshold of each, see `rank`; empty if one of them is unknown."""
    comparison: Comparison | None = None
    image_scores: Mapping[str, Sequence[str] | NDArray[Any]] = field(default_factory=dict)
    """Columns with a value for each image: image_id, cider_d, rouge_l, and the counts that corpus BLEU sums up.

    Corpus BLEU is not a mean over images. matched_n is the number of the caption's n-grams that its references contain,
    num_n the number of all its n-grams (num_1 is its length), reference_length the length of the closest reference."""

    def to_json(self) -> str:
        """The report as a JSON object, without the scores of each image."""
        values = asdict(replace(self, image_scores={}))
        del values["image_scores"]
        return json.dumps(values, indent=2, ensure_ascii=False)

    def to_markdown(self) -> str:
        """The report as a table, with BLEU and ROUGE-L in percent, the protocol below it, and a table of the curves."""
        lines = [*_markdown_table(self._table()), "", *(f"- {markdown(line)}" for line in self._footer())]
        if curves := self._curves():
            points = zip(*curves.values(), strict=True)
            rows = [[f"{of[0].share:.0%}", *(_cell("cider_d", point.cider_d) for point in of)] for of in points]
            header = ["captions kept", *(f"CIDEr-D of the {ranking}" for ranking in curves)]
            lines += ["", *_markdown_table([header, *rows])]
        return "\n".join(lines) + "\n"

    def to_text(self) -> str:
        """The same table and protocol, for a terminal."""
        table = self._table()
        widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in table]
        return "\n".join([*lines, "", *map(printable, self._footer())]) + "\n"

    def _table(self) -> list[list[str]]:
        bounds = [[_cell(name, bound) for bound in self.intervals[name]] for name in SCORE_NAMES]
        table = [
            ["", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr-D", "length ratio"],
            ["this model", *_cells(self.scores)],
            ["95 % interval", *(f"{low} to {high}" for low, high in bounds), ""],
            ["best constant caption", *_cells(self.floor)],
        ]
        if self.human is not None:
            table.append(["human, leave one out", *_cells(self.human)])
        if self.comparison is not None:
            other = self.comparison
            bounds = [[_cell(name, bound, signed=True) for bound in other.intervals[name]] for name in SCORE_NAMES]
            table += [
                [markdown(printable(other.name)), *_cells(other.scores)],
                ["difference", *(_cell(name, other.differences[name], signed=True) for name in SCORE_NAMES), ""],
                ["95 % interval", *(f"{low} to {high}" for low, high in bounds), ""],
            ]
        return table

    def _curves(self) -> dict[str, Sequence[CoveragePoint]]:
        """The curves that are known, by what comes first in them."""
        curves = {
            "most confident": self.confidence_curve,
            "most familiar": self.familiarity_curve,
            "most confident and familiar": self.confidence_and_familiarity_curve,
        }
        return {ranking: curve for ranking, curve in curves.items() if curve}

    def _footer(self) -> list[str]:
        protocol = self.protocol
        fewest, most = protocol.references_per_image
        references = str(most) if fewest == most else f"{fewest} to {most}"
        lines = [
            f"{protocol.num_images} images" + (f" ({protocol.split})" if protocol.split else ""),
            f"{references} references per image",
            f"{self.scores.num_distinct_captions} distinct captions",
            f"tokenizer {protocol.tokenizer} ({protocol.tokenizer_package or f'nltk {protocol.nltk_version}'})",
            protocol.definitions,
            f'best constant caption "{self.floor_caption}"',
            *(_describe_half(ranking, curve) for ranking, curve in self._curves().items()),
        ]
        lines += [SEED_NOTE] if protocol.tokenizer == SEED else []
        return [*lines, protocol.notes] if protocol.notes else lines


def evaluate(
    captions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    *,
    split: str = "",
    tokenizer: str = "ptb",
    notes: str = "",
    against: tuple[str, Mapping[str, str]] | None = None,
) -> EvaluationReport:
    """Score captions (image_id to text) and compute the baselines; see `score`.

    Args:
        against: name and captions of another model, to be compared image by image.
    """
    require_same_images(captions, references)
    if against:
        require_same_images(against[1], references)
    return evaluate_texts(
        (captions[image_id] for image_id in references),
        references.values(),
        image_ids=list(references),
        split=split,
        tokenizer=tokenizer,
        notes=notes,
        against=(against[0], (against[1][image_id] for image_id in references)) if against else None,
    )


def evaluate_texts(
    captions: Iterable[str],
    references: Iterable[Sequence[str]],
    *,
    image_ids: Sequence[str],
    split: str = "",
    tokenizer: str = "ptb",
    notes: str = "",
    rankings: Mapping[str, NDArray[np.float64]] | None = None,
    against: tuple[str, Iterable[str]] | None = None,
) -> EvaluationReport:
    """As `evaluate`, for captions and references that are read one after the other, in the same order of images.

    Texts are not kept, only integers.

    Args:
        references: iterated twice. Every image has at least one.
        rankings: "confidence" and "familiarity" of the captions; NaN where unknown.
    """
    groups = [captions] if against is None else [captions, against[1]]
    corpus, (hypotheses, *others) = collect_texts(references, groups, tokenizer)
    inverse_frequencies = corpus.inverse_frequencies()
    rows = corpus.rows(hypotheses, inverse_frequencies)
    tables = [rows, *(corpus.rows(numbers, inverse_frequencies) for numbers in others)]
    resamples = _resample(tables)
    comparison = None
    if against is not None:
        comparison = _compare(against[0], tables, resamples, summarize_rows(tables[1], corpus, others[0]))
    best_constant, constant_scores = _find_best_constant(corpus, inverse_frequencies)
    del inverse_frequencies  # free the memory: human agreement needs other ones
    return EvaluationReport(
        protocol=Protocol(
            tokenizer=tokenizer,
            references_per_image=(int(corpus.num_references.min()), int(corpus.num_references.max())),
            num_images=corpus.num_images,
            split=split,
            notes=notes,
            nltk_version=version("nltk"),
            tokenizer_package=tokenizer_package(tokenizer),
        ),
        scores=summarize_rows(rows, corpus, hypotheses),
        intervals=_compute_intervals(resamples[0]),
        floor_caption=_find_text(references, corpus, best_constant),
        floor=constant_scores,
        human=_score_human_agreement(corpus) if corpus.num_references.max() > 1 else None,
        comparison=comparison,
        image_scores=_image_scores(image_ids, rows),
        **_coverage_curves(rows, rankings or {}),
    )


def confidence_curve(
    captions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    confidences: Mapping[str, float],
    *,
    tokenizer: str = "ptb",
) -> list[CoveragePoint]:
    """Scores of all captions, of the most confident nine tenths, and so on."""
    corpus, hypotheses = collect_mappings(captions, references, tokenizer)
    rows = corpus.rows(hypotheses, corpus.inverse_frequencies())
    return _coverage_curve(rows, {"confidence": np.array([confidences[image_id] for image_id in references])})


def rank(*values: NDArray[np.float64]) -> NDArray[np.intp]:
    """Positions of the captions, those with the highest value first. NaN is lowest; equal values keep their order.

    With several values, a caption is ranked by the lowest of its percentile ranks. So the first N captions are those
    that have at least a certain confidence and at least a certain familiarity.
    """
    percentiles = [np.searchsorted(np.sort(known), known) for known in map(_zero_if_unknown, values)]
    return np.argsort(-np.min(percentiles, axis=0), kind="stable")


def _compare(
    name: str, tables: Sequence[NDArray[np.float64]], resamples: Sequence[NDArray[np.float64]], scores: Scores
) -> Comparison:
    """Compare two tables of rows; `scores` are those of the second."""
    first, second = (corpus_scores(table.sum(axis=0), len(table)) for table in tables)
    return Comparison(
        name=name,
        scores=scores,
        differences=dict(zip(SCORE_NAMES, (first - second).tolist(), strict=True)),
        intervals=_compute_intervals(resamples[0] - resamples[1]),
    )


def _find_text(references: Iterable[Sequence[str]], corpus: Corpus, sentence: int) -> str:
    """The text of a reference, given its number in the corpus."""
    image = int(np.searchsorted(corpus.first_reference, sentence, side="right")) - 1
    return next(islice(references, image, None))[sentence - int(corpus.first_reference[image])]


def _find_best_constant(corpus: Corpus, inverse_frequencies: Frequencies) -> tuple[int, Scores]:
    """Find the reference (a sentence's number) that scores best if all images have it as caption, and its scores."""
    candidates = np.arange(corpus.first_reference[-1])
    centralities = corpus.centralities(candidates, inverse_frequencies)
    central: dict[bytes, int] = {}
    for candidate in candidates[np.argsort(-centralities, kind="stable")].tolist():
        central.setdefault(corpus.tokens_of(candidate), candidate)
        if len(central) == NUM_CONSTANT_CANDIDATES:
            break
    chosen = np.array(list(central.values()))
    best = int(chosen[np.argmax(corpus.score_constants(chosen, inverse_frequencies))])
    hypotheses = np.full(corpus.num_images, best)
    return best, summarize_rows(corpus.rows(hypotheses, inverse_frequencies), corpus, [best])


def _score_human_agreement(corpus: Corpus) -> Scores:
    """Score each annotator's references against the others' of the same image, and average over annotators.

    The n-th reference of every image is taken as the n-th annotator's. Annotators are weighted by their number of
    images, because a few images of COCO have a sixth and a seventh reference. Images with one reference are left out.
    """
    annotators, num_images = [], []
    for annotator in range(int(corpus.num_references.max())):
        is_annotated = corpus.has_other_than(annotator)
        hypotheses = corpus.first_reference[:-1] + annotator * is_annotated
        rows = corpus.rows(hypotheses, corpus.inverse_frequencies(without=annotator), without=annotator)
        annotators.append(summarize_rows(rows[is_annotated], corpus, hypotheses[is_annotated]).to_dict())
        num_images.append(int(is_annotated.sum()))
    means = {
        name: float(np.average([scores[name] for scores in annotators], weights=num_images)) for name in annotators[0]
    }
    return Scores(
        **{name: means[name] for name in (*SCORE_NAMES, "length_ratio")},
        num_images=int((corpus.num_references > 1).sum()),
        num_distinct_captions=round(means["num_distinct_captions"]),
    )


def _image_scores(image_ids: Sequence[str], rows: NDArray[np.float64]) -> dict[str, Sequence[str] | NDArray[Any]]:
    """Build the columns of `EvaluationReport.image_scores`."""
    rouge_l_of_image, cider_d_of_image = rows[:, MEANS].T
    columns: dict[str, NDArray[Any]] = {"cider_d": cider_d_of_image, "rouge_l": rouge_l_of_image}
    counts = rows[:, : MEANS.start].astype(int)
    for name, part in (("matched", counts[:, MATCHES]), ("num", counts[:, TOTALS])):
        columns |= {f"{name}_{order}": part[:, order - 1] for order in range(1, MAX_ORDER + 1)}
    columns["reference_length"] = counts[:, REFERENCE_LENGTH]
    return {"image_id": image_ids, **columns}


def _resample(tables: Sequence[NDArray[np.float64]]) -> list[NDArray[np.float64]]:
    """For each table of rows, the corpus scores of images drawn with replacement, one row per draw.

    All tables, and all calls, draw the same images.
    """
    generator = np.random.default_rng(RESAMPLING_SEED)
    num_images = len(tables[0])
    rows = np.hstack(tables)
    results = np.empty((len(tables), NUM_RESAMPLES, len(SCORE_NAMES)))
    for draw in range(NUM_RESAMPLES):
        times_drawn = np.bincount(generator.integers(num_images, size=num_images), minlength=num_images)
        for table, sums in enumerate(np.split(times_drawn.astype(float) @ rows, len(tables))):
            results[table, draw] = corpus_scores(sums, num_images)
    return list(results)


def _compute_intervals(resamples: NDArray[np.float64]) -> dict[str, tuple[float, float]]:
    lows, highs = np.quantile(resamples, [0.025, 0.975], axis=0).tolist()
    return {name: (low, high) for name, low, high in zip(SCORE_NAMES, lows, highs, strict=True)}


def _coverage_curves(
    rows: NDArray[np.float64], values: Mapping[str, NDArray[np.float64]]
) -> dict[str, list[CoveragePoint]]:
    """The curves of `EvaluationReport`: one for each of the values that are known, and one for both."""
    known = {name: column for name, column in values.items() if not np.isnan(column).all()}
    curves = {f"{name}_curve": _coverage_curve(rows, {name: column}) for name, column in known.items()}
    if len(known) > 1:
        curves["_and_".join(known) + "_curve"] = _coverage_curve(rows, known)
    return curves


def _coverage_curve(rows: NDArray[np.float64], values: Mapping[str, NDArray[np.float64]]) -> list[CoveragePoint]:
    """Scores of all captions, of the nine tenths that are ranked highest by the values, and so on."""
    order = rank(*values.values())
    lowest = {"min_confidence": 0.0, "min_familiarity": 0.0}
    curve = []
    for share in SHARES:
        kept = order[: max(1, round(share * len(rows)))]
        lowest |= {f"min_{name}": float(_zero_if_unknown(column[kept]).min()) for name, column in values.items()}
        scores = corpus_scores(rows[kept].sum(axis=0), len(kept))
        curve.append(CoveragePoint(share=share, bleu_4=float(scores[3]), cider_d=float(scores[5]), **lowest))
    return curve


def _zero_if_unknown(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.nan_to_num(values, nan=0.0)  # a failed image has neither confidence nor familiarity


def _describe_half(ranking: str, curve: Sequence[CoveragePoint]) -> str:
    point = next(point for point in curve if point.share == HALF)
    lowest = {"confidence": point.min_confidence, "familiarity": point.min_familiarity}
    thresholds = " and ".join(f"{name} {value:.3f}" for name, value in lowest.items() if value)
    condition = f" ({thresholds} and more)" if thresholds else ""
    scores = f"CIDEr-D {point.cider_d:.3f}, BLEU-4 {100 * point.bleu_4:.1f}"
    return f"the {HALF:.0%} {ranking} captions{condition}: {scores}"


def _markdown_table(table: Sequence[Sequence[str]]) -> list[str]:
    header, *rows = table
    rule = ["---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in [header, rule, *rows]]


def _cells(scores: Scores) -> list[str]:
    values = scores.to_dict()
    return [*(_cell(name, values[name]) for name in SCORE_NAMES), f"{scores.length_ratio:.2f}"]


def _cell(name: str, value: float, *, signed: bool = False) -> str:
    sign = "+" if signed else "-"
    return f"{value:{sign}.3f}" if name == "cider_d" else f"{100 * value:{sign}.1f}"
