"""Sentences as integers -> the statistics of each image from which scores are computed. Knows nothing of texts.

I images, R references in total, S sentences (all references in the order of the images, then the sentences that are
scored against them), G distinct n-grams of one order per sentence, summed over all sentences, U distinct n-grams in
total.

Millions of sentences fit into memory, because a token, or an n-gram of a sentence, is one 32-bit integer, and all
counting is done on slices of a few thousand images.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

Floats = NDArray[np.float64]

MAX_ORDER: Final = 4  # of n-grams, in BLEU and in CIDEr-D

ROUGE_BETA: Final = 1.2  # above 1, recall has more weight than precision

CIDER_SIGMA: Final = 6.0  # width of CIDEr-D's penalty on a difference in length, in tokens

# Columns of `Corpus.rows`. Every corpus score can be computed from sums of rows. The columns are: matched n-grams by
# order, n-grams of the hypothesis by order, its length, the closest reference length, ROUGE-L, CIDEr-D.
MATCHES: Final = slice(0, MAX_ORDER)

TOTALS: Final = slice(MAX_ORDER, 2 * MAX_ORDER)

HYPOTHESIS_LENGTH: Final = 2 * MAX_ORDER

REFERENCE_LENGTH: Final = 2 * MAX_ORDER + 1

MEANS: Final = slice(2 * MAX_ORDER + 2, 2 * MAX_ORDER + 4)

NUM_COLUMNS: Final = 2 * MAX_ORDER + 4

REFERENCES_PER_SLICE: Final = 40_000

POSITIONS_PER_SLICE: Final = 4_000_000

_WORD_BITS: Final = 64


class SentenceCollector:
    """Collects sentences of tokens and numbers them."""

    def __init__(self) -> None:
        self._ids = _Numbering()
        self._tokens = array("i")
        self._lengths = array("i")

    def add(self, tokens: Sequence[str]) -> None:
        """Add a sentence."""
        self._tokens.extend(map(self._ids.__getitem__, tokens))
        self._lengths.append(len(tokens))

    def __len__(self) -> int:
        return len(self._lengths)

    def to_corpus(self, num_references: Sequence[int] | NDArray[Any]) -> Corpus:
        """Build the corpus. Its first sentences are the references.

        Args:
            num_references: for each image the number of its references, at least one.
        """
        if not len(num_references) or min(num_references) < 1:
            raise ValueError("expected at least one image, and at least one reference for each image")
        return Corpus(
            np.frombuffer(self._tokens, dtype=np.int32) if self._tokens else np.zeros(0, dtype=np.int32),
            np.frombuffer(self._lengths, dtype=np.int32),
            np.asarray(num_references, dtype=np.int64),
        )


class _Numbering(dict[str, int]):
    def __missing__(self, token: str) -> int:
        self[token] = number = len(self)
        return number


@dataclass(frozen=True, slots=True)
class _Order:
    """The distinct n-grams of one order in each sentence."""

    ids: NDArray[np.int32]  # (G,) ascending within a sentence
    starts: Integers  # (S + 1,) index of each sentence's first n-gram
    num_ids: int  # U
    repeated: Integers  # indices of the n-grams that occur more than once in their sentence
    times: Integers  # how often each of these occurs

    @classmethod
    def from_positions(cls, ids: NDArray[np.int32], starts: Integers, num_ids: int) -> _Order:
        """Count the n-grams at all positions, given sentence after sentence."""
        kept, num_kept, repeated, times = [], [np.zeros(0, dtype=np.int64)], [], []
        first, num_before = 0, 0
        while first < len(starts) - 1:
            limit = starts[first] + POSITIONS_PER_SLICE
            last = max(first + 1, int(np.searchsorted(starts, limit, side="right")) - 1)
            sentences = np.repeat(np.arange(last - first), np.diff(starts[first : last + 1]))
            keys, counts = _count_runs(np.sort(sentences * num_ids + ids[starts[first] : starts[last]]))
            sentences, distinct = np.divmod(keys, num_ids)
            kept.append(distinct.astype(np.int32))
            num_kept.append(np.bincount(sentences, minlength=last - first))
            more_than_once = np.flatnonzero(counts > 1)
            repeated.append(more_than_once + num_before)
            times.append(counts[more_than_once])
            first, num_before = last, num_before + len(keys)
        empty = [np.zeros(0, dtype=np.int64)]
        return cls(
            np.concatenate(kept) if kept else ids,
            _offsets(np.concatenate(num_kept)),
            num_ids,
            np.concatenate(repeated or empty),
            np.concatenate(times or empty),
        )

    def select(self, sentences: Integers) -> tuple[Integers, Integers, Integers]:
        """The distinct n-grams of these sentences: index of the sentence among them, n-gram, count."""
        lengths = self.starts[sentences + 1] - self.starts[sentences]
        indices = np.repeat(self.starts[sentences] - _offsets(lengths)[:-1], lengths) + np.arange(lengths.sum())
        counts = np.ones(len(indices), dtype=np.int64)
        if len(self.repeated):
            nearest = np.minimum(np.searchsorted(self.repeated, indices), len(self.repeated) - 1)
            is_repeated = self.repeated[nearest] == indices
            counts[is_repeated] = self.times[nearest[is_repeated]]
        return np.repeat(np.arange(len(sentences)), lengths), self.ids[indices].astype(np.int64), counts


@dataclass(frozen=True, slots=True)
class InverseFrequencies:
    """Maps n-grams of one order to log(number of images / number of images whose references contain the n-gram).

    An n-gram that no image contains counts as one that one image contains. Stored as counts, which take half the
    memory.
    """

    counts: NDArray[np.int32]  # (U,) number of images
    logs: Floats  # indexed by count

    def __getitem__(self, ids: Integers) -> Floats:
        return self.logs[self.counts[ids]]


Frequencies = list[InverseFrequencies]
"""By order."""


@dataclass(frozen=True, slots=True)
class _Slice:
    """Consecutive images and their references."""

    images: slice
    references: Integers  # (r,) sentences
    image_of_reference: Integers  # (r,) index within the slice
    first_reference: Integers  # (i,) index within the slice
    is_used: NDArray[np.bool_]  # (r,) False for references that are left out

    @property
    def num_images(self) -> int:
        return self.images.stop - self.images.start  # type: ignore[no-any-return]


class Corpus:
    """References of images and other sentences to be scored against them. Sentences are identified by number."""

    def __init__(self, tokens: NDArray[np.int32], lengths: NDArray[np.int32], num_references: Integers) -> None:
        self._tokens = tokens
        self._starts = _offsets(lengths)
        self.lengths = lengths
        self.num_references = num_references  # (I,)
        self.first_reference = _offsets(num_references)  # (I + 1,)

    @property
    def num_images(self) -> int:
        """Number of images."""
        return len(self.num_references)

    def tokens_of(self, sentence: int) -> bytes:
        """A key that is equal for sentences with the same tokens."""
        return self._tokens[self._starts[sentence] : self._starts[sentence + 1]].tobytes()

    def count_distinct(self, sentences: Iterable[int]) -> int:
        """Number of distinct sentences among these."""
        return len({self.tokens_of(sentence) for sentence in sentences})

    @cached_property
    def _orders(self) -> list[_Order]:
        return list(_number_ngrams(self._tokens, self.lengths))

    def inverse_frequencies(self, without: int | None = None) -> Frequencies:
        """Inverse document frequencies of the n-grams of each order.

        Args:
            without: leave out every image's reference with this number, and images that lack it or have no other.
        """
        num_images = self.num_images if without is None else int(self.has_other_than(without).sum())
        inverse_frequencies = []
        for order in self._orders:
            counts = np.zeros(order.num_ids, dtype=np.int32)
            for part in self._slices(without):
                reference, ids, _ = order.select(part.references)
                is_used = part.is_used[reference]
                images_with = _distinct(ids[is_used] * part.num_images + part.image_of_reference[reference[is_used]])
                seen_ids, num_seen = _count_runs(images_with // part.num_images)
                counts[seen_ids] += num_seen
            logs = np.log(num_images) - np.log(np.maximum(1, np.arange(counts.max(initial=0) + 1)))
            inverse_frequencies.append(InverseFrequencies(counts, logs))
        return inverse_frequencies

    def has_other_than(self, number: int) -> NDArray[np.bool_]:
        """(I,) whether the image has a reference with this number and at least one other."""
        return (self.num_references > number) & (self.num_references > 1)

    def rows(self, hypotheses: Integers, inverse_frequencies: Frequencies, without: int | None = None) -> Floats:
        """Statistics of each image's hypothesis against its references, one row per image.

        The columns are defined at the top of the module.

        Args:
            hypotheses: (I,) sentences.
            without: as in `inverse_frequencies`. The rows of images that are left out have no meaning.
        """
        if len(hypotheses) != self.num_images:
            raise ValueError(f"expected a hypothesis for each of {self.num_images} images, got {len(hypotheses)}")
        rows = np.zeros((self.num_images, NUM_COLUMNS))
        for part in self._slices(without):
            self._fill(rows[part.images], part, hypotheses[part.images], inverse_frequencies)
        return rows

    def _fill(self, rows: Floats, part: _Slice, hypotheses: Integers, inverse_frequencies: Frequencies) -> None:
        lengths, reference_lengths = self.lengths[hypotheses].astype(int), self.lengths[part.references].astype(int)
        cosines = np.zeros(len(part.references))
        for index in range(MAX_ORDER):
            matches, order_cosines = self._match(index, part, hypotheses, inverse_frequencies[index])
            rows[:, MATCHES.start + index] = matches
            rows[:, TOTALS.start + index] = np.maximum(0, lengths - index)
            cosines += order_cosines
        rows[:, HYPOTHESIS_LENGTH] = lengths
        differences = np.abs(reference_lengths - lengths[part.image_of_reference])
        closeness = differences << 32 | reference_lengths  # of two that are equally close, the shorter one
        closeness[~part.is_used] = np.iinfo(np.int64).max
        rows[:, REFERENCE_LENGTH] = np.minimum.reduceat(closeness, part.first_reference) & 0xFFFFFFFF

        common = self._longest_common_subsequences(hypotheses[part.image_of_reference], part.references) * part.is_used
        precision = np.maximum.reduceat(common, part.first_reference) / np.maximum(1, lengths)
        recall = np.maximum.reduceat(common / np.maximum(1, reference_lengths), part.first_reference)
        squared = ROUGE_BETA**2
        rows[:, MEANS.start] = _divide((1 + squared) * precision * recall, recall + squared * precision)

        # coco-caption uses the number of bigrams as the length.
        differences = np.maximum(0, lengths - 1)[part.image_of_reference] - np.maximum(0, reference_lengths - 1)
        similarities = cosines * np.exp(-(differences**2) / (2 * CIDER_SIGMA**2)) * part.is_used
        num_used = np.add.reduceat(part.is_used.astype(int), part.first_reference)
        rows[:, MEANS.start + 1] = _divide(
            10 * np.add.reduceat(similarities, part.first_reference) / MAX_ORDER, num_used.astype(float)
        )

    def _match(
        self, index: int, part: _Slice, hypotheses: Integers, inverse: InverseFrequencies
    ) -> tuple[Integers, Floats]:
        """Match n-grams of one order: each image's number of matches, and each reference's clipped cosine."""
        order = self._orders[index]
        image, ids, counts = order.select(hypotheses)
        reference, reference_ids, reference_counts = order.select(part.references)
        keys = image * order.num_ids + ids  # ascending
        reference_keys = part.image_of_reference[reference] * order.num_ids + reference_ids
        nearest = np.minimum(np.searchsorted(keys, reference_keys), max(0, len(keys) - 1))
        is_hit = (
            (keys[nearest] == reference_keys) & part.is_used[reference]
            if len(keys)
            else np.zeros(len(reference_keys), bool)
        )
        hit, hit_reference = nearest[is_hit], reference[is_hit]

        largest_counts = np.zeros(len(keys), dtype=np.int64)
        largest_counts[hit] = 1
        is_repeated = reference_counts[is_hit] > 1
        np.maximum.at(largest_counts, hit[is_repeated], reference_counts[is_hit][is_repeated])
        matches = np.bincount(image, weights=np.minimum(counts, largest_counts), minlength=part.num_images)

        num_references = len(part.references)
        weights, reference_weights = counts * inverse[ids], reference_counts * inverse[reference_ids]
        norms = np.sqrt(np.bincount(image, weights=weights**2, minlength=part.num_images))
        reference_norms = np.sqrt(np.bincount(reference, weights=reference_weights**2, minlength=num_references))
        # Clipped: repeating a word more often than the reference does gains nothing.
        clipped = np.minimum(weights[hit], reference_weights[is_hit]) * reference_weights[is_hit]
        products = np.bincount(hit_reference, weights=clipped, minlength=num_references)
        return matches, _divide(products, norms[part.image_of_reference] * reference_norms)

    def centralities(self, sentences: Integers, inverse_frequencies: Frequencies) -> Floats:
        """How close each of these sentences is to the mean of all references.

        This ranks the sentences nearly as `score_constants` does, at a fraction of its cost: only the clipping and the
        penalty on length are missing.
        """
        total = np.zeros(len(sentences))
        for order, inverse in zip(self._orders, inverse_frequencies, strict=True):
            centroid = np.zeros(order.num_ids)
            for part in self._slices():
                reference, ids, counts = order.select(part.references)
                divisors = self.num_references[part.images][part.image_of_reference]
                np.add.at(centroid, ids, _directions(reference, counts * inverse[ids]) / divisors[reference])
            for start in range(0, len(sentences), REFERENCES_PER_SLICE):
                some = sentences[start : start + REFERENCES_PER_SLICE]
                sentence, ids, counts = order.select(some)
                closeness = _directions(sentence, counts * inverse[ids]) * centroid[ids]
                total[start : start + len(some)] += np.bincount(sentence, weights=closeness, minlength=len(some))
        return total

    def score_constants(self, candidates: Integers, inverse_frequencies: Frequencies) -> Floats:
        """For each of these sentences, the mean CIDEr-D if every image has it as its caption."""
        totals = np.zeros(len(candidates))
        tables = [
            _Table.of(order, candidates, inverse)
            for order, inverse in zip(self._orders, inverse_frequencies, strict=True)
        ]
        num_bigrams = np.maximum(0, self.lengths[candidates].astype(int) - 1)
        for part in self._slices():
            num_references = len(part.references)
            cosines = np.zeros((len(candidates), num_references))
            for order, inverse, table in zip(self._orders, inverse_frequencies, tables, strict=True):
                reference, ids, counts = order.select(part.references)
                weights = counts * inverse[ids]
                norms = np.sqrt(np.bincount(reference, weights=weights**2, minlength=num_references))
                columns = np.minimum(np.searchsorted(table.ids, ids), len(table.ids) - 1)
                is_shared = table.ids[columns] == ids if len(table.ids) else np.zeros(len(ids), dtype=bool)
                reference, columns, weights = reference[is_shared], columns[is_shared], weights[is_shared]
                for number, (candidate_weights, norm) in enumerate(zip(table.weights, table.norms, strict=True)):
                    clipped = np.minimum(candidate_weights[columns], weights) * weights
                    products = np.bincount(reference, weights=clipped, minlength=num_references)
                    cosines[number] += _divide(products, norm * norms)
            lengths = np.maximum(0, self.lengths[part.references].astype(int) - 1)
            divisors = self.num_references[part.images][part.image_of_reference]
            cosines *= np.exp(-((num_bigrams[:, None] - lengths) ** 2) / (2 * CIDER_SIGMA**2)) / divisors
            totals += cosines.sum(axis=1)
        return 10 * totals / MAX_ORDER / self.num_images

    def _slices(self, without: int | None = None) -> Iterator[_Slice]:
        """Split the images into slices of a few thousand; references that are left out are marked as not used."""
        start = 0
        while start < self.num_images:
            limit = self.first_reference[start] + REFERENCES_PER_SLICE
            stop = max(start + 1, int(np.searchsorted(self.first_reference, limit, side="right")) - 1)
            first, last = self.first_reference[start], self.first_reference[stop]
            counts = self.num_references[start:stop]
            image_of_reference = np.repeat(np.arange(stop - start), counts)
            offsets = _offsets(counts)[:-1]
            is_used = np.ones(last - first, dtype=bool)
            if without is not None:
                is_used = (np.arange(last - first) - offsets[image_of_reference]) != without
                is_used &= self.has_other_than(without)[start:stop][image_of_reference]
            yield _Slice(slice(start, stop), np.arange(first, last), image_of_reference, offsets, is_used)
            start = stop

    def _longest_common_subsequences(self, first: Integers, second: Integers) -> Integers:
        """For each pair of sentences, the length of their longest common subsequence.

        All pairs step through the tokens of `second` together; the tokens of `first` are the bits of a word (Hyyrö
        2004, "Bit-parallel LCS-length computation revisited").
        """
        results = np.zeros(len(first), dtype=np.int64)
        if not len(self._tokens):
            return results
        is_long = self.lengths[first] > _WORD_BITS
        for pair in np.flatnonzero(is_long):
            results[pair] = longest_common_subsequence(*map(self._sentence, (first[pair], second[pair])))
        pairs = np.flatnonzero(~is_long)
        pairs = pairs[np.argsort(-self.lengths[second[pairs]], kind="stable")]  # the pairs that end first come last
        first, second = first[pairs], second[pairs]
        lengths, second_lengths = self.lengths[first].astype(np.int64), self.lengths[second]
        width = -(-int(lengths.max(initial=1)) // 8) * 8
        bits = np.arange(width)
        is_token = bits < lengths[:, None]
        tokens = np.where(is_token, self._tokens[np.where(is_token, self._starts[first][:, None] + bits, 0)], -1)
        words = np.full(len(pairs), ~np.uint64(0))
        for position in range(int(second_lengths.max(initial=0))):
            num_left = int(np.searchsorted(-second_lengths, -position, side="left"))
            token = self._tokens[self._starts[second[:num_left]] + position]
            mask = np.zeros((num_left, 8), dtype=np.uint8)
            mask[:, : width // 8] = np.packbits(tokens[:num_left] == token[:, None], axis=1, bitorder="little")
            word = words[:num_left]
            matches = word & mask.view("<u8")[:, 0].astype(np.uint64)
            words[:num_left] = (word + matches) | (word - matches)
        zeros = np.unpackbits((~words).astype("<u8").view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")
        results[pairs] = (zeros[:, :width] & is_token).sum(axis=1)
        return results

    def _sentence(self, number: int) -> list[int]:
        return self._tokens[self._starts[number] : self._starts[number + 1]].tolist()  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class _Table:
    """The n-grams of one order in a few candidates (C), M distinct ones in total."""

    ids: Integers  # (M,) ascending
    weights: Floats  # (C, M)
    norms: Floats  # (C,)

    @classmethod
    def of(cls, order: _Order, candidates: Integers, inverse: InverseFrequencies) -> _Table:
        candidate, ids, counts = order.select(candidates)
        distinct, columns = np.unique(ids, return_inverse=True)
        weights = np.zeros((len(candidates), len(distinct)))
        weights[candidate, columns] = counts * inverse[ids]
        norms = np.sqrt(np.bincount(candidate, weights=weights[candidate, columns] ** 2, minlength=len(candidates)))
        return cls(distinct, weights, norms)


def longest_common_subsequence(first: Sequence[object], second: Sequence[object]) -> int:
    """Length of the longest common subsequence."""
    lengths = [0] * (len(second) + 1)  # for the tokens of `first` so far and each prefix of `second`
    for token in first:
        diagonal = 0
        for position, second_token in enumerate(second, start=1):
            above = lengths[position]
            lengths[position] = diagonal + 1 if token == second_token else max(above, lengths[position - 1])
            diagonal = above
    return lengths[-1]


def _number_ngrams(tokens: NDArray[np.int32], lengths: NDArray[np.int32]) -> Iterator[_Order]:
    """Yield the orders from 1 on. An n-gram is identified by its last token and the number of the tokens before it."""
    num_tokens = int(tokens.max(initial=0)) + 1
    ids, num_ids, starts = tokens, num_tokens, _offsets(lengths)
    yield _Order.from_positions(ids, starts, num_ids)
    last_tokens = tokens
    for order in range(2, MAX_ORDER + 1):
        has_any = starts[1:] > starts[:-1]
        is_last = np.zeros(len(ids), dtype=bool)
        is_last[starts[1:][has_any] - 1] = True
        is_first = np.zeros(len(ids), dtype=bool)
        is_first[starts[:-1][has_any]] = True
        last_tokens = last_tokens[~is_first]
        ids, num_ids = _number(ids[~is_last], last_tokens, num_tokens)
        starts = _offsets(np.maximum(0, lengths - (order - 1)))
        yield _Order.from_positions(ids, starts, num_ids)


def _number(
    prefixes: NDArray[np.int32], last_tokens: NDArray[np.int32], num_tokens: int
) -> tuple[NDArray[np.int32], int]:
    """The rank of each pair among the distinct pairs, and their number.

    The array of pairs as 64-bit integers is the largest thing in memory, so it is built twice instead of being copied.
    """

    def build_keys(part: slice) -> Integers:
        keys = prefixes[part].astype(np.int64)
        keys *= num_tokens
        keys += last_tokens[part]
        return keys

    ascending = build_keys(slice(None))
    ascending.sort()
    # Not `np.unique`, whose hash table takes ten times as long (numpy 2.4).
    distinct = ascending[_is_new(ascending)]
    del ascending
    if len(distinct) > np.iinfo(np.int32).max:
        raise OverflowError(f"{len(distinct):,} distinct n-grams do not fit into 32-bit numbers")
    ranks = np.empty(len(prefixes), dtype=np.int32)
    for start in range(0, len(prefixes), POSITIONS_PER_SLICE):
        keys = build_keys(slice(start, start + POSITIONS_PER_SLICE))
        order = np.argsort(keys)  # in this order the search stays in the processor's cache
        ranks[start : start + len(keys)][order] = np.searchsorted(distinct, keys[order])
    return ranks, max(1, len(distinct))


def _distinct(keys: Integers) -> Integers:
    """The distinct keys, ascending."""
    ascending = np.sort(keys)
    return ascending[_is_new(ascending)]


def _count_runs(ascending: Integers) -> tuple[Integers, Integers]:
    """The distinct values, and how often each occurs."""
    starts = np.flatnonzero(_is_new(ascending))
    return ascending[starts], np.diff(starts, append=len(ascending))


def _is_new(ascending: Integers) -> NDArray[np.bool_]:
    """Whether each value differs from the one before it."""
    is_new = np.ones(len(ascending), dtype=bool)
    np.not_equal(ascending[1:], ascending[:-1], out=is_new[1:])
    return is_new


def _directions(sentence: Integers, weights: Floats) -> Floats:
    """Divide the weights of each sentence's n-grams by their norm."""
    norms = np.sqrt(np.bincount(sentence, weights=weights**2))
    return _divide(weights, norms[sentence])


def _divide(numerators: NDArray[Any], denominators: NDArray[Any]) -> Floats:
    """Divide elementwise; 0 / 0 is 0."""
    quotients = np.zeros(len(numerators))
    np.divide(numerators, denominators, out=quotients, where=numerators != 0)
    return quotients


def _offsets(counts: NDArray[Any]) -> Integers:
    """(n + 1,): the start of each of n runs, and the end of the last one."""
    offsets = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets
