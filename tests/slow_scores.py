"""Reference implementation of `imcap_ray.scoring`: scores by definition, one n-gram at a time, BLEU by nltk."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from nltk.translate.bleu_score import closest_ref_length, modified_precision

NAMES = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d")
ORDERS = range(1, 5)

Tokens = Sequence[str]


def scores(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> dict[str, float]:
    """Compute the scores of a corpus."""
    return corpus_scores(image_rows(hypotheses, references))


def image_rows(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> np.ndarray[Any, Any]:
    """Matched n-grams by order, all n-grams by order, length, closest length, ROUGE-L and CIDEr-D of each image."""
    inverse_frequencies = inverse_document_frequencies(references)
    rows = []
    for hypothesis, image in zip(hypotheses, references, strict=True):
        matches = [modified_precision(image, hypothesis, order).numerator for order in ORDERS]
        totals = [max(0, len(hypothesis) - order + 1) for order in ORDERS]
        lengths = [len(hypothesis), closest_ref_length(image, len(hypothesis))]
        rows.append(
            [*matches, *totals, *lengths, rouge_l(hypothesis, image), cider_d(hypothesis, image, inverse_frequencies)]
        )
    return np.array(rows, dtype=float)


def corpus_scores(rows: np.ndarray[Any, Any]) -> dict[str, float]:
    """Compute the scores of the corpus from the rows of its images."""
    sums = rows.sum(axis=0)
    with np.errstate(divide="ignore"):
        logs = np.log(sums[:4] / np.maximum(1, sums[4:8]))
    brevity = min(0.0, 1 - sums[9] / max(1, sums[8]))
    bleu = np.exp(brevity + np.cumsum(logs) / np.arange(1, 5))
    return dict(zip(NAMES, [*bleu.tolist(), *(sums[10:] / len(rows)).tolist()], strict=True))


def intervals(rows: np.ndarray[Any, Any], other: np.ndarray[Any, Any] | None = None) -> dict[str, tuple[float, float]]:
    """Compute 95 % bootstrap intervals, of the difference if other rows are given."""
    generator = np.random.default_rng(0)
    samples = []
    for _ in range(1000):
        drawn = generator.integers(len(rows), size=len(rows))
        values = np.array(list(corpus_scores(rows[drawn]).values()))
        samples.append(values if other is None else values - np.array(list(corpus_scores(other[drawn]).values())))
    return dict(zip(NAMES, zip(*np.quantile(samples, [0.025, 0.975], axis=0).tolist(), strict=True), strict=True))


def floor(references: Sequence[Sequence[Tokens]], num_candidates: int = 50) -> tuple[tuple[str, ...], dict[str, float]]:
    """Find the best caption for all images among the references closest to the mean of all, and its scores."""
    inverse_frequencies = inverse_document_frequencies(references)
    centroid: defaultdict[tuple[str, ...], float] = defaultdict(float)
    for image in references:
        for reference in image:
            for ngram, weight in directions(reference, inverse_frequencies).items():
                centroid[ngram] += weight / len(image)

    def centrality(tokens: Tokens) -> float:
        return sum(weight * centroid[ngram] for ngram, weight in directions(tokens, inverse_frequencies).items())

    different = dict.fromkeys(tuple(reference) for image in references for reference in image)
    central = sorted(different, key=centrality, reverse=True)[:num_candidates]
    best = max(central, key=lambda one: np.mean([cider_d(one, image, inverse_frequencies) for image in references]))
    return best, scores([best] * len(references), references)


def human(references: Sequence[Sequence[Tokens]]) -> dict[str, float]:
    """Score each annotator's references against the others; return the mean, weighted by number of images."""
    images = [image for image in references if len(image) > 1]
    by_annotator, weights = [], []
    for annotator in range(max(map(len, images))):
        annotated = [image for image in images if len(image) > annotator]
        others = [[*image[:annotator], *image[annotator + 1 :]] for image in annotated]
        by_annotator.append(scores([image[annotator] for image in annotated], others))
        weights.append(len(annotated))
    return {
        name: sum(w * one[name] for w, one in zip(weights, by_annotator, strict=True)) / sum(weights) for name in NAMES
    }


def rouge_l(hypothesis: Tokens, references: Sequence[Tokens]) -> float:
    """ROUGE-L of an image."""
    common = [longest_common_subsequence(hypothesis, reference) for reference in references]
    precision = max(common) / max(1, len(hypothesis))
    recall = max(length / max(1, len(reference)) for length, reference in zip(common, references, strict=True))
    return (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision) if precision else 0.0


def longest_common_subsequence(one: Tokens, other: Tokens) -> int:
    """Length of the longest common subsequence."""
    lengths = np.zeros((len(one) + 1, len(other) + 1), dtype=int)
    for i, token in enumerate(one, start=1):
        for j, other_token in enumerate(other, start=1):
            lengths[i, j] = (
                lengths[i - 1, j - 1] + 1 if token == other_token else max(lengths[i - 1, j], lengths[i, j - 1])
            )
    return int(lengths[-1, -1])


def cider_d(hypothesis: Tokens, references: Sequence[Tokens], inverse_frequencies: Mapping[Any, float]) -> float:
    """CIDEr-D of an image."""
    total = 0.0
    for reference in references:
        penalty = math.exp(-((max(0, len(hypothesis) - 1) - max(0, len(reference) - 1)) ** 2) / (2 * 6.0**2))
        for order in ORDERS:
            ours, theirs = (weights(tokens, order, inverse_frequencies) for tokens in (hypothesis, reference))
            product = sum(min(weight, theirs[ngram]) * theirs[ngram] for ngram, weight in ours.items())
            if product:
                total += product / (norm(ours) * norm(theirs)) * penalty
    return 10 * total / len(ORDERS) / len(references)


def directions(tokens: Tokens, inverse_frequencies: Mapping[Any, float]) -> dict[tuple[str, ...], float]:
    """Weights of the n-grams of all orders, normalised for each order."""
    of_orders = [weights(tokens, order, inverse_frequencies) for order in ORDERS]
    return {ngram: weight / norm(one) for one in of_orders for ngram, weight in one.items() if weight}


def weights(tokens: Tokens, order: int, inverse_frequencies: Mapping[Any, float]) -> Counter[tuple[str, ...]]:
    """Counts times inverse document frequencies."""
    counts = Counter(ngrams(tokens, order))
    return Counter({ngram: count * inverse_frequencies[ngram] for ngram, count in counts.items()})


def norm(of: Mapping[Any, float]) -> float:
    """Euclidean norm."""
    return math.sqrt(sum(weight * weight for weight in of.values()))


def inverse_document_frequencies(references: Sequence[Sequence[Tokens]]) -> defaultdict[Any, float]:
    """Inverse document frequency of each n-gram."""
    counts: Counter[tuple[str, ...]] = Counter()
    for image in references:
        counts.update({ngram for reference in image for order in ORDERS for ngram in ngrams(reference, order)})
    rarest = math.log(len(references))
    return defaultdict(lambda: rarest, {ngram: rarest - math.log(count) for ngram, count in counts.items()})


def ngrams(tokens: Tokens, order: int) -> list[tuple[str, ...]]:
    """N-grams in text order."""
    return [tuple(tokens[start : start + order]) for start in range(len(tokens) - order + 1)]
