"""Captions and references to scores, with the protocol that gives the scores a meaning. No image, no model.

BLEU is the corpus's, as nltk has it; ROUGE-L and CIDEr-D are defined as in coco-caption. Two lines stand beside every
evaluation: the best caption for all images, and people against each other.
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

DEFINITIONS: Final = (
    "corpus BLEU, closest reference length, no smoothing; ROUGE-L with beta 1.2, best precision and best "
    "recall over the references; CIDEr-D, n = 1 to 4, sigma 6, document frequencies from these references"
)

# Of 1,500 Flickr8k captions the one with the best score was the first by centrality, and the next three
# were among its first seven.
NUM_FLOOR_CANDIDATES: Final = 50

NUM_RESAMPLES: Final = 1000

SHARES: Final = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)

HALF: Final = 0.5

SEED_NOTE: Final = (
    "words of one letter are dropped and markers of start and end counted, as Keras tutorials do: compare with scores "
    "of that kind alone"
)

RESAMPLING_SEED: Final = 0


@dataclass(frozen=True, slots=True)
class Protocol:
    """How scores were computed: scores with different protocols cannot be compared."""

    tokenizer: str
    references_per_image: tuple[int, int]
    """Least and most."""
    num_images: int
    split: str
    notes: str
    """What the scores depend on and metrics cannot know, such as the beam."""
    nltk_version: str
    definitions: str = DEFINITIONS


@dataclass(frozen=True, slots=True)
class ConfidencePoint:
    """The scores of the most confident captions alone."""

    share: float
    """Of the images, how many are kept; 1 is all."""
    min_confidence: float
    """The least confidence among those that are kept."""
    bleu_4: float
    cider_d: float
    """With the document frequencies of all images."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Scores of other captions of the same images, and how sure a difference is (Koehn 2004, W04-3250)."""

    name: str
    """Of the other captions."""
    scores: Scores
    differences: Mapping[str, float]
    """This model's scores minus the other's."""
    intervals: Mapping[str, tuple[float, float]]
    """95 % bootstrap interval of a difference, both drawn on the same images; without 0 in it, the difference is more
    than the choice of images."""


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """Scores, their protocol, and the two lines that give them meaning."""

    protocol: Protocol
    scores: Scores
    intervals: Mapping[str, tuple[float, float]]
    """95 % bootstrap interval over the images, by name of the score."""
    floor_caption: str
    """The caption that scores best when it is given to every image; chosen on these very references."""
    floor: Scores
    human: Scores | None
    """Each reference scored against the others; None where no image has two."""
    confidence_curve: Sequence[ConfidencePoint] = ()
    """From all captions to the most confident tenth; empty where confidences are not known."""
    comparison: Comparison | None = None
    image_scores: Mapping[str, Sequence[str] | NDArray[Any]] = field(default_factory=dict)
    """Columns with a value for each image: image_id, cider_d, rouge_l, and what the corpus's BLEU is the sums of.

    There is no BLEU of one image that BLEU would be the mean of: matched_n and num_n are the n-grams of the caption
    that its references have and all of its n-grams, num_1 its length, reference_length the closest one's."""

    def to_json(self) -> str:
        """A json object, without the scores of each image."""
        values = asdict(replace(self, image_scores={}))
        del values["image_scores"]
        return json.dumps(values, indent=2, ensure_ascii=False)

    def to_markdown(self) -> str:
        """A table, BLEU and ROUGE-L in percent, and the protocol below it."""
        header, *rows = self._table()
        rule = ["---", *["---:"] * (len(header) - 1)]
        lines = [f"| {' | '.join(cells)} |" for cells in [header, rule, *rows]]
        return "\n".join([*lines, "", *(f"- {markdown(line)}" for line in self._footer())]) + "\n"

    def to_text(self) -> str:
        """The same table and protocol for a terminal."""
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

    def _footer(self) -> list[str]:
        protocol = self.protocol
        fewest, most = protocol.references_per_image
        references = str(most) if fewest == most else f"{fewest} to {most}"
        lines = [
            f"{protocol.num_images} images" + (f" ({protocol.split})" if protocol.split else ""),
            f"{references} references per image",
            f"{self.scores.num_distinct_captions} distinct captions",
            f"tokenizer {protocol.tokenizer} (nltk {protocol.nltk_version})",
            protocol.definitions,
            f'best constant caption "{self.floor_caption}"',
            *map(describe_point, (point for point in self.confidence_curve if point.share == HALF)),
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
    confidences: Mapping[str, float] | None = None,
    against: tuple[str, Mapping[str, str]] | None = None,
) -> EvaluationReport:
    """Scores of the captions (image_id to text) with all that is needed to read them; see `score`.

    Args:
        confidences: of the captions, by image_id.
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
        confidences=[confidences[image_id] for image_id in references] if confidences else None,
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
    confidences: Sequence[float] | NDArray[Any] | None = None,
    against: tuple[str, Iterable[str]] | None = None,
) -> EvaluationReport:
    """As `evaluate`, of captions and references that come one after the other, in one order of the images.

    No text is kept, only integers; `jobs/benchmarks/scoring.py` measures the memory and the time of any size.

    Args:
        references: gone through twice. Every image has one or more.
    """
    groups = [captions] if against is None else [captions, against[1]]
    corpus, (hypotheses, *others) = collect_texts(references, groups, tokenizer)
    inverse_frequencies = corpus.inverse_frequencies()
    rows = corpus.rows(hypotheses, inverse_frequencies)
    scores = summarize_rows(rows, corpus, hypotheses)
    tables = [rows] if against is None else [rows, corpus.rows(others[0], inverse_frequencies)]
    resamples = _resampled(tables)
    comparison = None
    if against is not None:
        differences = corpus_scores(rows.sum(axis=0), len(rows)) - corpus_scores(tables[1].sum(axis=0), len(rows))
        comparison = Comparison(
            name=against[0],
            scores=summarize_rows(tables[1], corpus, others[0]),
            differences=dict(zip(SCORE_NAMES, differences.tolist(), strict=True)),
            intervals=_interval_of_each(resamples[0] - resamples[1]),
        )
    best, floor = _floor(corpus, np.arange(corpus.first_reference[-1]), inverse_frequencies)
    del inverse_frequencies  # people have others
    counts = corpus.num_references
    return EvaluationReport(
        protocol=Protocol(
            tokenizer=tokenizer,
            references_per_image=(int(counts.min()), int(counts.max())),
            num_images=corpus.num_images,
            split=split,
            notes=notes,
            nltk_version=version("nltk"),
        ),
        scores=scores,
        intervals=_interval_of_each(resamples[0]),
        floor_caption=_reference_text(references, corpus, best),
        floor=floor,
        human=_human(corpus) if counts.max() > 1 else None,
        confidence_curve=() if confidences is None else _confidence_curve(rows, confidences),
        comparison=comparison,
        image_scores=_image_scores(image_ids, rows),
    )


def confidence_curve(
    captions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    confidences: Mapping[str, float],
    *,
    tokenizer: str = "ptb",
) -> list[ConfidencePoint]:
    """Scores of the most confident captions: of all of them, of nine tenths, and so on."""
    corpus, hypotheses = collect_mappings(captions, references, tokenizer)
    rows = corpus.rows(hypotheses, corpus.inverse_frequencies())
    return _confidence_curve(rows, [confidences[image_id] for image_id in references])


def describe_point(point: ConfidencePoint) -> str:
    """One line."""
    return (
        f"the {point.share:.0%} most confident captions (confidence {point.min_confidence:.3f} and more): "
        f"CIDEr-D {point.cider_d:.3f}, BLEU-4 {100 * point.bleu_4:.1f}"
    )


def _reference_text(references: Iterable[Sequence[str]], corpus: Corpus, sentence: int) -> str:
    """The text of a reference, by its number in the corpus."""
    image = int(np.searchsorted(corpus.first_reference, sentence, side="right")) - 1
    return next(islice(references, image, None))[sentence - int(corpus.first_reference[image])]


def _floor(corpus: Corpus, candidates: NDArray[np.int64], inverse_frequencies: Frequencies) -> tuple[int, Scores]:
    """The candidate (a sentence's number) that scores best when all images have it, and its scores."""
    centralities = corpus.centralities(candidates, inverse_frequencies)
    central: dict[bytes, int] = {}
    for candidate in candidates[np.argsort(-centralities, kind="stable")].tolist():
        central.setdefault(corpus.tokens_of(candidate), candidate)
        if len(central) == NUM_FLOOR_CANDIDATES:
            break
    chosen = np.array(list(central.values()))
    best = int(chosen[np.argmax(corpus.score_constants(chosen, inverse_frequencies))])
    hypotheses = np.full(corpus.num_images, best)
    return best, summarize_rows(corpus.rows(hypotheses, inverse_frequencies), corpus, [best])


def _human(corpus: Corpus) -> Scores:
    """Each annotator's references scored against the others' of the same image; the mean over annotators.

    The n-th references are taken for those of the n-th annotator, who counts by the images that have one: in COCO a few
    have a sixth and a seventh. Images with one reference are left out.
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
    """The columns of `EvaluationReport.image_scores`."""
    rouge_l_of_image, cider_d_of_image = rows[:, MEANS].T
    columns: dict[str, NDArray[Any]] = {"cider_d": cider_d_of_image, "rouge_l": rouge_l_of_image}
    counts = rows[:, : MEANS.start].astype(int)
    for name, part in (("matched", counts[:, MATCHES]), ("num", counts[:, TOTALS])):
        columns |= {f"{name}_{order}": part[:, order - 1] for order in range(1, MAX_ORDER + 1)}
    columns["reference_length"] = counts[:, REFERENCE_LENGTH]
    return {"image_id": image_ids, **columns}


def _resampled(tables: Sequence[NDArray[np.float64]]) -> list[NDArray[np.float64]]:
    """For each table of rows the corpus scores of images drawn with replacement, a row a draw.

    The same images for all tables, and at every call.
    """
    generator = np.random.default_rng(RESAMPLING_SEED)
    num_images = len(tables[0])
    rows = np.hstack(tables)
    found = np.empty((len(tables), NUM_RESAMPLES, len(SCORE_NAMES)))
    for draw in range(NUM_RESAMPLES):
        times_drawn = np.bincount(generator.integers(num_images, size=num_images), minlength=num_images)
        for table, sums in enumerate(np.split(times_drawn.astype(float) @ rows, len(tables))):
            found[table, draw] = corpus_scores(sums, num_images)
    return list(found)


def _interval_of_each(resamples: NDArray[np.float64]) -> dict[str, tuple[float, float]]:
    lows, highs = np.quantile(resamples, [0.025, 0.975], axis=0).tolist()
    return {name: (low, high) for name, low, high in zip(SCORE_NAMES, lows, highs, strict=True)}


def _confidence_curve(rows: NDArray[np.float64], confidences: Sequence[float] | NDArray[Any]) -> list[ConfidencePoint]:
    known = np.nan_to_num(np.asarray(confidences, dtype=float), nan=0.0)  # a failed image has none
    order = np.argsort(-known, kind="stable")
    curve = []
    for share in SHARES:
        kept = order[: max(1, round(share * len(rows)))]
        scores = corpus_scores(rows[kept].sum(axis=0), len(kept))
        curve.append(ConfidencePoint(share, float(known[kept[-1]]), float(scores[3]), float(scores[5])))
    return curve


def _cells(scores: Scores) -> list[str]:
    values = scores.to_dict()
    return [*(_cell(name, values[name]) for name in SCORE_NAMES), f"{scores.length_ratio:.2f}"]


def _cell(name: str, value: float, *, signed: bool = False) -> str:
    sign = "+" if signed else "-"
    return f"{value:{sign}.3f}" if name == "cider_d" else f"{100 * value:{sign}.1f}"
