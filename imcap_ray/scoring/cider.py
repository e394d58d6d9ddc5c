"""CIDEr-D of single captions (Vedantam et al. 2015), as the reward of self-critical training."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from imcap_ray.scoring.ngram_statistics import CIDER_SIGMA, MAX_ORDER

Tokens: TypeAlias = Sequence[str]

Ngram: TypeAlias = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DocumentFrequencies:
    """The number of images whose references contain an n-gram."""

    counts: Mapping[Ngram, int]
    num_images: int

    @classmethod
    def of(cls, references: Iterable[Sequence[Tokens]]) -> DocumentFrequencies:
        """Count over references, given as one sequence of references per image."""
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
    num_bigrams: int  # coco-caption uses this as the length


class CiderD:
    """CIDEr-D of one caption at a time against fixed references: 0 to 10, equal to `cider_d`.

    The document frequencies are those of the references unless others are given: the reward in training uses those of
    the complete training split. A single image has no meaningful frequencies and scores 0.
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
                    # Clipped: repeating a word more often than the reference does gains nothing.
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


def _ngram_counts(tokens: Tokens) -> Counter[Ngram]:
    return Counter(
        tuple(tokens[start : start + order])
        for order in range(1, MAX_ORDER + 1)
        for start in range(len(tokens) - order + 1)
    )
