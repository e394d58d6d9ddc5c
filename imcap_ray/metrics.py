"""Captions and references to scores, with the protocol that gives the scores a meaning. No image, no model.

BLEU is the corpus's, from nltk's n-gram counts; ROUGE-L and CIDEr-D are defined as in coco-caption.
Two lines stand beside every evaluation: the best caption for all images, and people against each other.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from imcap_ray.errors import DatasetError
from imcap_ray.escaping import markdown, printable
from imcap_ray.tokenization import tokenize

Tokens: TypeAlias = Sequence[str]
Ngram: TypeAlias = tuple[str, ...]

MAX_ORDER: Final = 4  # of n-grams, in BLEU and in CIDEr-D
ROUGE_BETA: Final = 1.2  # above 1 recall counts for more than precision
CIDER_SIGMA: Final = 6.0  # tokens: the width of CIDEr-D's penalty on a difference in length

DEFINITIONS: Final = (
    "corpus BLEU, closest reference length, no smoothing; ROUGE-L with beta 1.2, best precision and best "
    "recall over the references; CIDEr-D, n = 1 to 4, sigma 6, document frequencies from these references"
)

# Of 1,500 Flickr8k captions the best by `score_constant` was the first by centrality, and the next three
# were among its first seven.
NUM_FLOOR_CANDIDATES: Final = 50
NUM_RESAMPLES: Final = 1000
SHARES: Final = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
HALF: Final = 0.5
SEED: Final = "seed"  # a tokenizer, and the protocol that counts its markers
SEED_NOTE: Final = (
    "words of one letter are dropped and markers of start and end counted, as Keras tutorials do: compare with scores "
    "of that kind alone"
)
RESAMPLING_SEED: Final = 0

_SCORE_NAMES: Final = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d")
# Columns of the table of one row an image, from which every corpus score follows by summing rows:
# matched n-grams by order, n-grams of the hypothesis by order, its length, the closest reference length,
# ROUGE-L, CIDEr-D.
_MATCHES: Final = slice(0, MAX_ORDER)
_TOTALS: Final = slice(MAX_ORDER, 2 * MAX_ORDER)
_HYPOTHESIS_LENGTH: Final = 2 * MAX_ORDER
_REFERENCE_LENGTH: Final = 2 * MAX_ORDER + 1
_MEANS: Final = slice(2 * MAX_ORDER + 2, None)


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of one caption per image against the references."""

    bleu_1: float
    """0 to 1, as all BLEUs and ROUGE-L."""
    bleu_2: float
    bleu_3: float
    bleu_4: float
    rouge_l: float
    cider_d: float
    """0 to 10 as in coco-caption; on Flickr8k a constant caption has 0.1 and people have 0.8."""
    num_images: int
    length_ratio: float
    """Tokens of the captions over tokens of the references closest in length; below 1 BLEU is penalised."""
    num_distinct_captions: int

    def to_dict(self) -> dict[str, float | int]:
        """Names to values."""
        return asdict(self)


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
    image_scores: Mapping[str, Sequence[str | float]] = field(default_factory=dict)
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
        bounds = [[_cell(name, bound) for bound in self.intervals[name]] for name in _SCORE_NAMES]
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
            bounds = [[_cell(name, bound, signed=True) for bound in other.intervals[name]] for name in _SCORE_NAMES]
            table += [
                [markdown(printable(other.name)), *_cells(other.scores)],
                ["difference", *(_cell(name, other.differences[name], signed=True) for name in _SCORE_NAMES), ""],
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
    reference_tokens = _tokenize_references(references, tokenizer)
    hypotheses = _tokenize_captions(captions, reference_tokens, tokenizer)
    cider_d = CiderD(list(reference_tokens.values()))
    rows = _image_rows(hypotheses, list(reference_tokens.values()), cider_d)
    floor_caption, floor = _floor(_texts_by_tokens(references, reference_tokens), reference_tokens, cider_d)
    counts = [len(image_references) for image_references in reference_tokens.values()]
    return EvaluationReport(
        protocol=Protocol(
            tokenizer=tokenizer,
            references_per_image=(min(counts), max(counts)),
            num_images=len(counts),
            split=split,
            notes=notes,
            nltk_version=version("nltk"),
        ),
        scores=_summary(rows, hypotheses),
        intervals=_intervals(rows),
        floor_caption=floor_caption,
        floor=floor,
        human=_human(reference_tokens) if max(counts) > 1 else None,
        confidence_curve=_confidence_curve(rows, [confidences[id_] for id_ in references]) if confidences else (),
        comparison=_compare(rows, against, reference_tokens, tokenizer, cider_d) if against else None,
        image_scores=_image_scores(list(references), rows),
    )


def confidence_curve(
    captions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    confidences: Mapping[str, float],
    *,
    tokenizer: str = "ptb",
) -> list[ConfidencePoint]:
    """Scores of the most confident captions: of all of them, of nine tenths, and so on."""
    reference_tokens = _tokenize_references(references, tokenizer)
    hypotheses = _tokenize_captions(captions, reference_tokens, tokenizer)
    image_references = list(reference_tokens.values())
    rows = _image_rows(hypotheses, image_references, CiderD(image_references))
    return _confidence_curve(rows, [confidences[image_id] for image_id in references])


def describe_point(point: ConfidencePoint) -> str:
    """One line."""
    return (
        f"the {point.share:.0%} most confident captions (confidence {point.min_confidence:.3f} and more): "
        f"CIDEr-D {point.cider_d:.3f}, BLEU-4 {100 * point.bleu_4:.1f}"
    )


def score(captions: Mapping[str, str], references: Mapping[str, Sequence[str]], *, tokenizer: str = "ptb") -> Scores:
    """Scores of the captions (image_id to text). An empty caption counts as such and is not left out.

    Raises `DatasetError` when the image_ids are not those of the references, or an image has no reference.
    """
    reference_tokens = _tokenize_references(references, tokenizer)
    hypotheses = _tokenize_captions(captions, reference_tokens, tokenizer)
    return _score_tokens(hypotheses, list(reference_tokens.values()))


def constant_caption_floor(
    references: Mapping[str, Sequence[str]],
    *,
    candidates: Sequence[str] | None = None,
    tokenizer: str = "ptb",
) -> tuple[str, Scores]:
    """The candidate with the highest CIDEr-D when it is given to every image, and its scores.

    The candidates are the references themselves unless given. A model that does not beat this has not looked
    at the images.
    """
    reference_tokens = _tokenize_references(references, tokenizer)
    if candidates is None:
        texts = _texts_by_tokens(references, reference_tokens)
    else:
        texts = {tuple(scored_tokens(candidate, tokenizer)): candidate for candidate in candidates}
    return _floor(texts, reference_tokens, CiderD(list(reference_tokens.values())))


def human_agreement(references: Mapping[str, Sequence[str]], tokenizer: str = "ptb") -> Scores:
    """Each annotator's references scored against the others' of the same image; the mean over annotators.

    The n-th references are taken for those of the n-th annotator. Images with one reference are left out;
    `DatasetError` is raised when no image has two.
    """
    return _human(_tokenize_references(references, tokenizer))


def corpus_bleu(
    hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]
) -> tuple[float, float, float, float]:
    """BLEU-1 to BLEU-4 of the corpus, 0 to 1, unsmoothed.

    As nltk's `corpus_bleu`, but a hypothesis of fewer than n tokens has no n-grams, as in coco-caption:
    nltk counts it as one n-gram missed.
    """
    counts = [_bleu_counts(*pair) for pair in zip(hypotheses, references, strict=True)]
    bleu_1, bleu_2, bleu_3, bleu_4 = _bleu(np.sum(counts, axis=0)).tolist()
    return bleu_1, bleu_2, bleu_3, bleu_4


def rouge_l(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> tuple[float, list[float]]:
    """Mean and per-image ROUGE-L, 0 to 1; the best precision and the best recall may be of two references."""
    per_image = [_image_rouge_l(*pair) for pair in zip(hypotheses, references, strict=True)]
    return float(np.mean(per_image)), per_image


@dataclass(frozen=True, slots=True)
class DocumentFrequencies:
    """In the references of how many images an n-gram occurs."""

    counts: Mapping[Ngram, int]
    num_images: int

    @classmethod
    def of(cls, references: Iterable[Sequence[Tokens]]) -> DocumentFrequencies:
        """Counted over the references, one sequence of references per image."""
        counts: Counter[Ngram] = Counter()
        num_images = 0
        for image_references in references:
            counts.update({ngram for reference in image_references for ngram in _ngram_counts(reference)})
            num_images += 1
        return cls(counts, num_images)


@dataclass(frozen=True, slots=True)
class _CiderVector:
    weights: dict[Ngram, float]
    norms: tuple[float, ...]  # of the weights of each order
    num_bigrams: int  # what coco-caption takes for the length


class CiderD:
    """CIDEr-D against fixed references: 0 to 10, equal to pycocoevalcap's `Cider`.

    The document frequencies are those of the references, or of another corpus when given: the reward in
    training takes the whole training split's. One image alone has no frequencies to speak of and scores 0.
    """

    def __init__(
        self,
        references: Sequence[Sequence[Tokens]],
        document_frequencies: DocumentFrequencies | None = None,
    ) -> None:
        frequencies = document_frequencies or DocumentFrequencies.of(references)
        self._rarest = math.log(frequencies.num_images)
        self._inverse_frequencies = {
            ngram: self._rarest - math.log(count) for ngram, count in frequencies.counts.items()
        }
        self._references = [[self._vector(reference) for reference in image] for image in references]

    def score(self, index: int, hypothesis: Tokens) -> float:
        """CIDEr-D of the hypothesis for the image at this index of the references."""
        return self._similarity(self._vector(hypothesis), self._references[index])

    def score_all(self, hypotheses: Sequence[Tokens]) -> tuple[float, list[float]]:
        """Mean and per-image CIDEr-D of one hypothesis per image, in the order of the references."""
        per_image = [
            self._similarity(self._vector(hypothesis), image_references)
            for hypothesis, image_references in zip(hypotheses, self._references, strict=True)
        ]
        return float(np.mean(per_image)), per_image

    def score_constant(self, hypothesis: Tokens) -> float:
        """Mean CIDEr-D when every image has the same hypothesis."""
        vector = self._vector(hypothesis)
        return float(np.mean([self._similarity(vector, image) for image in self._references]))

    def most_central(self, hypotheses: Iterable[Tokens], num_hypotheses: int) -> list[Tokens]:
        """The hypotheses that are closest to the mean of all references, best first.

        This orders them nearly as `score_constant` does, at a thousandth of its cost: only the clipping and
        the penalty on length are lost.
        """
        centroid: defaultdict[Ngram, float] = defaultdict(float)
        for image_references in self._references:
            for reference in image_references:
                for ngram, weight in reference.weights.items():
                    norm = reference.norms[len(ngram) - 1]
                    if norm:
                        centroid[ngram] += weight / norm / len(image_references)

        def centrality(hypothesis: Tokens) -> float:
            vector = self._vector(hypothesis)
            return sum(
                weight * centroid.get(ngram, 0.0) / vector.norms[len(ngram) - 1]
                for ngram, weight in vector.weights.items()
                if weight
            )

        return sorted(hypotheses, key=centrality, reverse=True)[:num_hypotheses]

    def _vector(self, tokens: Tokens) -> _CiderVector:
        weights = {
            ngram: count * self._inverse_frequencies.get(ngram, self._rarest)
            for ngram, count in _ngram_counts(tokens).items()
        }
        squares = [0.0] * MAX_ORDER
        for ngram, weight in weights.items():
            squares[len(ngram) - 1] += weight * weight
        return _CiderVector(weights, tuple(map(math.sqrt, squares)), max(0, len(tokens) - 1))

    @staticmethod
    def _similarity(hypothesis: _CiderVector, references: Sequence[_CiderVector]) -> float:
        total = 0.0
        for reference in references:
            products = [0.0] * MAX_ORDER
            for ngram, weight in hypothesis.weights.items():
                reference_weight = reference.weights.get(ngram)
                if reference_weight is not None:
                    # Clipped: a word said twice as often as in the reference gains nothing.
                    products[len(ngram) - 1] += min(weight, reference_weight) * reference_weight
            cosines = (
                product / (hypothesis_norm * reference_norm)
                for product, hypothesis_norm, reference_norm in zip(
                    products, hypothesis.norms, reference.norms, strict=True
                )
                if product
            )
            difference = hypothesis.num_bigrams - reference.num_bigrams
            total += sum(cosines) * math.exp(-(difference**2) / (2 * CIDER_SIGMA**2))
        return 10 * total / MAX_ORDER / len(references)


def scored_tokens(text: str, tokenizer: str) -> list[str]:
    """The tokens of a text that are scored. By the seed's protocol its markers of start and end are among them."""
    tokens = tokenize(text, tokenizer)
    return ["startseq", *tokens, "endseq"] if tokenizer == SEED else tokens


def _tokenize_references(references: Mapping[str, Sequence[str]], tokenizer: str) -> dict[str, list[list[str]]]:
    if not references:
        raise DatasetError("no references: there is nothing to score against")
    without = [image_id for image_id, texts in references.items() if not texts]
    if without:
        raise DatasetError(f"{len(without)} images have no reference, for example {without[0]!r}")
    return {image_id: [scored_tokens(text, tokenizer) for text in texts] for image_id, texts in references.items()}


def _tokenize_captions(
    captions: Mapping[str, str], references: Mapping[str, object], tokenizer: str
) -> list[list[str]]:
    """Hypotheses in the order of the references."""
    uncaptioned = references.keys() - captions.keys()
    unknown = captions.keys() - references.keys()
    if uncaptioned or unknown:
        examples = [
            f"{len(image_ids)} {what}, for example {min(image_ids)!r}"
            for what, image_ids in (
                ("images with references have no caption", uncaptioned),
                ("captions have no references", unknown),
            )
            if image_ids
        ]
        raise DatasetError(
            f"captions and references must be of the same images, got {len(captions)} captions and "
            f"{len(references)} images with references: {'; '.join(examples)}"
        )
    return [scored_tokens(captions[image_id], tokenizer) for image_id in references]


def _texts_by_tokens(
    references: Mapping[str, Sequence[str]], reference_tokens: Mapping[str, Sequence[Tokens]]
) -> dict[Ngram, str]:
    return {
        tuple(tokens): text
        for image_id, texts in references.items()
        for text, tokens in zip(texts, reference_tokens[image_id], strict=True)
    }


def _score_tokens(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> Scores:
    return _summary(_image_rows(hypotheses, references, CiderD(references)), hypotheses)


def _floor(
    texts: Mapping[Ngram, str], references: Mapping[str, Sequence[Tokens]], cider_d: CiderD
) -> tuple[str, Scores]:
    central = cider_d.most_central(texts, NUM_FLOOR_CANDIDATES)
    best = max(central, key=cider_d.score_constant)
    hypotheses = [best] * len(references)
    return texts[tuple(best)], _summary(_image_rows(hypotheses, list(references.values()), cider_d), hypotheses)


def _human(references: Mapping[str, Sequence[Tokens]]) -> Scores:
    images = [image_references for image_references in references.values() if len(image_references) > 1]
    if not images:
        raise DatasetError("human agreement needs images with two references or more, there are none")
    annotators = []
    for annotator in range(max(map(len, images))):
        annotated = [image for image in images if len(image) > annotator]
        others = [[*image[:annotator], *image[annotator + 1 :]] for image in annotated]
        annotators.append(_score_tokens([image[annotator] for image in annotated], others).to_dict())
    means = {name: float(np.mean([scores[name] for scores in annotators])) for name in annotators[0]}
    return Scores(
        **{name: means[name] for name in (*_SCORE_NAMES, "length_ratio")},
        num_images=len(images),
        num_distinct_captions=round(means["num_distinct_captions"]),
    )


def _image_rows(
    hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]], cider_d: CiderD
) -> NDArray[np.float64]:
    """One row an image; see `_MATCHES` and what follows it for the columns."""
    bleu_counts = [_bleu_counts(*pair) for pair in zip(hypotheses, references, strict=True)]
    return np.column_stack([bleu_counts, rouge_l(hypotheses, references)[1], cider_d.score_all(hypotheses)[1]])


def _summary(rows: NDArray[np.float64], hypotheses: Sequence[Tokens]) -> Scores:
    sums = rows.sum(axis=0)
    return Scores(
        **dict(zip(_SCORE_NAMES, _corpus_scores(sums, len(rows)).tolist(), strict=True)),
        num_images=len(rows),
        length_ratio=float(sums[_HYPOTHESIS_LENGTH] / max(1.0, sums[_REFERENCE_LENGTH])),
        num_distinct_captions=len(set(map(tuple, hypotheses))),
    )


def _image_scores(image_ids: Sequence[str], rows: NDArray[np.float64]) -> dict[str, Sequence[str | float]]:
    """The columns of `EvaluationReport.image_scores`."""
    rouge_l_of_image, cider_d_of_image = rows[:, _MEANS].T
    columns: dict[str, NDArray[Any]] = {"cider_d": cider_d_of_image, "rouge_l": rouge_l_of_image}
    counts = rows[:, : _MEANS.start].astype(int)
    for name, part in (("matched", counts[:, _MATCHES]), ("num", counts[:, _TOTALS])):
        columns |= {f"{name}_{order}": part[:, order - 1] for order in range(1, MAX_ORDER + 1)}
    columns["reference_length"] = counts[:, _REFERENCE_LENGTH]
    return {"image_id": image_ids, **{name: column.tolist() for name, column in columns.items()}}


def _compare(
    rows: NDArray[np.float64],
    against: tuple[str, Mapping[str, str]],
    references: Mapping[str, Sequence[Tokens]],
    tokenizer: str,
    cider_d: CiderD,
) -> Comparison:
    name, captions = against
    hypotheses = _tokenize_captions(captions, references, tokenizer)
    others = _image_rows(hypotheses, list(references.values()), cider_d)
    differences = _corpus_scores(rows.sum(axis=0), len(rows)) - _corpus_scores(others.sum(axis=0), len(rows))
    return Comparison(
        name=name,
        scores=_summary(others, hypotheses),
        differences=dict(zip(_SCORE_NAMES, differences.tolist(), strict=True)),
        intervals=_interval_of_each(_resampled(rows) - _resampled(others)),
    )


def _intervals(rows: NDArray[np.float64]) -> dict[str, tuple[float, float]]:
    return _interval_of_each(_resampled(rows))


def _resampled(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Corpus scores of images drawn with replacement, a row a draw; the same images at every call."""
    generator = np.random.default_rng(RESAMPLING_SEED)
    num_images = len(rows)
    draws = (generator.integers(num_images, size=num_images) for _ in range(NUM_RESAMPLES))
    return np.stack([_corpus_scores(rows[drawn].sum(axis=0), num_images) for drawn in draws])


def _interval_of_each(resamples: NDArray[np.float64]) -> dict[str, tuple[float, float]]:
    lows, highs = np.quantile(resamples, [0.025, 0.975], axis=0).tolist()
    return {name: (low, high) for name, low, high in zip(_SCORE_NAMES, lows, highs, strict=True)}


def _confidence_curve(rows: NDArray[np.float64], confidences: Sequence[float]) -> list[ConfidencePoint]:
    known = np.nan_to_num(np.asarray(confidences, dtype=float), nan=0.0)  # a failed image has none
    order = np.argsort(-known, kind="stable")
    curve = []
    for share in SHARES:
        kept = order[: max(1, round(share * len(rows)))]
        scores = _corpus_scores(rows[kept].sum(axis=0), len(kept))
        curve.append(ConfidencePoint(share, float(known[kept[-1]]), float(scores[3]), float(scores[5])))
    return curve


def _corpus_scores(sums: NDArray[np.float64], num_images: int) -> NDArray[np.float64]:
    """In the order of `_SCORE_NAMES`."""
    return np.concatenate([_bleu(sums), sums[_MEANS] / num_images])


def _bleu(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Brevity penalty times the geometric mean of the precisions of orders 1 to n, for n = 1 to 4."""
    with np.errstate(divide="ignore"):  # log 0 is -inf, whose exp is the 0 that is meant
        log_precisions = np.log(sums[_MATCHES] / np.maximum(1, sums[_TOTALS]))
    log_brevity = min(0.0, 1 - sums[_REFERENCE_LENGTH] / max(1, sums[_HYPOTHESIS_LENGTH]))
    bleu: NDArray[np.float64] = np.exp(log_brevity + np.cumsum(log_precisions) / np.arange(1, MAX_ORDER + 1))
    return bleu


def _bleu_counts(hypothesis: Tokens, references: Sequence[Tokens]) -> list[int]:
    """The columns of a row that BLEU needs."""
    from nltk.translate.bleu_score import closest_ref_length, modified_precision  # a second and a half

    orders = range(1, MAX_ORDER + 1)
    matches = [modified_precision(references, hypothesis, order).numerator for order in orders]
    totals = [max(0, len(hypothesis) - order + 1) for order in orders]
    return [*matches, *totals, len(hypothesis), closest_ref_length(references, len(hypothesis))]


def _image_rouge_l(hypothesis: Tokens, references: Sequence[Tokens]) -> float:
    common = [_longest_common_subsequence(hypothesis, reference) for reference in references]
    precision = max(common) / max(1, len(hypothesis))
    recall = max(length / max(1, len(reference)) for length, reference in zip(common, references, strict=True))
    if not precision:
        return 0.0
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


def _longest_common_subsequence(one: Tokens, other: Tokens) -> int:
    lengths = [0] * (len(other) + 1)  # of the tokens of `one` so far and of each beginning of `other`
    for token in one:
        diagonal = 0
        for position, other_token in enumerate(other, start=1):
            above = lengths[position]
            lengths[position] = diagonal + 1 if token == other_token else max(above, lengths[position - 1])
            diagonal = above
    return lengths[-1]


def _ngram_counts(tokens: Tokens) -> Counter[Ngram]:
    return Counter(
        tuple(tokens[start : start + order])
        for order in range(1, MAX_ORDER + 1)
        for start in range(len(tokens) - order + 1)
    )


def _cells(scores: Scores) -> list[str]:
    values = scores.to_dict()
    return [*(_cell(name, values[name]) for name in _SCORE_NAMES), f"{scores.length_ratio:.2f}"]


def _cell(name: str, value: float, *, signed: bool = False) -> str:
    sign = "+" if signed else "-"
    return f"{value:{sign}.3f}" if name == "cider_d" else f"{100 * value:{sign}.1f}"
