"""Sentences as integers -> for each image what its scores are made of. Knows no text and no model.

I images, R references of them all, S sentences (the references, image after image, and whatever is scored against
them), G different n-grams of one order in each sentence, counted over all sentences, U different ones in all.

Millions of sentences fit into memory: a token, and an n-gram of a sentence, is one 32-bit integer, and all counting is
done on slices of a few thousand images.
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

ROUGE_BETA: Final = 1.2  # above 1 recall counts for more than precision

CIDER_SIGMA: Final = 6.0  # tokens: the width of CIDEr-D's penalty on a difference in length

# Columns of a row of `Corpus.rows`, from which every corpus score follows by summing rows: matched n-grams by order,
# n-grams of the hypothesis by order, its length, the closest reference length, ROUGE-L, CIDEr-D.
MATCHES: Final = slice(0, MAX_ORDER)

TOTALS: Final = slice(MAX_ORDER, 2 * MAX_ORDER)

HYPOTHESIS_LENGTH: Final = 2 * MAX_ORDER

REFERENCE_LENGTH: Final = 2 * MAX_ORDER + 1

MEANS: Final = slice(2 * MAX_ORDER + 2, 2 * MAX_ORDER + 4)

NUM_COLUMNS: Final = 2 * MAX_ORDER + 4

_REFERENCES_AT_A_TIME: Final = 40_000

_PLACES_AT_A_TIME: Final = 4_000_000

_MOST_BITS: Final = 64


class SentenceCollector:
    """Sentences of tokens, put in one after the other."""

    def __init__(self) -> None:
        self._ids = _Numbering()
        self._tokens = array("i")
        self._lengths = array("i")

    def add(self, tokens: Sequence[str]) -> None:
        """Put in a sentence."""
        self._tokens.extend(map(self._ids.__getitem__, tokens))
        self._lengths.append(len(tokens))

    def __len__(self) -> int:
        return len(self._lengths)

    def to_corpus(self, num_references: Sequence[int] | NDArray[Any]) -> Corpus:
        """The corpus whose first sentences are the references: of the first image so many, at least one, and so on."""
        if not len(num_references) or min(num_references) < 1:
            raise ValueError("every image needs a reference, and there must be an image")
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
    """The different n-grams of one order in each sentence."""

    ids: NDArray[np.int32]  # (G,) rising within a sentence
    starts: Integers  # (S + 1,) where those of each sentence begin
    num_ids: int  # U
    repeated: Integers  # the places of those that are in their sentence more than once
    times: Integers  # how often these are

    @classmethod
    def of_places(cls, ids: NDArray[np.int32], starts: Integers, num_ids: int) -> _Order:
        """Of the n-grams at all places, sentence after sentence."""
        kept, num_kept, repeated, times = [], [np.zeros(0, dtype=np.int64)], [], []
        first, num_before = 0, 0
        while first < len(starts) - 1:
            most = starts[first] + _PLACES_AT_A_TIME
            last = max(first + 1, int(np.searchsorted(starts, most, side="right")) - 1)
            sentences = np.repeat(np.arange(last - first), np.diff(starts[first : last + 1]))
            keys, counts = _count_runs(np.sort(sentences * num_ids + ids[starts[first] : starts[last]]))
            sentences, different = np.divmod(keys, num_ids)
            kept.append(different.astype(np.int32))
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

    def of(self, sentences: Integers) -> tuple[Integers, Integers, Integers]:
        """The different n-grams of each of these sentences: number of the sentence among them, n-gram, count."""
        lengths = self.starts[sentences + 1] - self.starts[sentences]
        places = np.repeat(self.starts[sentences] - _offsets(lengths)[:-1], lengths) + np.arange(lengths.sum())
        counts = np.ones(len(places), dtype=np.int64)
        if len(self.repeated):
            nearest = np.minimum(np.searchsorted(self.repeated, places), len(self.repeated) - 1)
            is_repeated = self.repeated[nearest] == places
            counts[is_repeated] = self.times[nearest[is_repeated]]
        return np.repeat(np.arange(len(sentences)), lengths), self.ids[places].astype(np.int64), counts


@dataclass(frozen=True, slots=True)
class InverseFrequencies:
    """Of the n-grams of one order: log(images / images with it in their references), where no image counts as one.

    An item is that of an n-gram. Kept as counts, which take half the memory.
    """

    counts: NDArray[np.int32]  # (U,) images
    logs: Floats  # by count

    def __getitem__(self, ids: Integers) -> Floats:
        return self.logs[self.counts[ids]]


Frequencies = list[InverseFrequencies]
"""By order."""


@dataclass(frozen=True, slots=True)
class _Slice:
    """Some images, one after the other, and their references."""

    images: slice
    references: Integers  # (r,) sentences
    image_of_reference: Integers  # (r,) number within the slice
    first_reference: Integers  # (i,) number within the slice
    is_used: NDArray[np.bool_]  # (r,) False for those that are left out

    @property
    def num_images(self) -> int:
        return self.images.stop - self.images.start  # type: ignore[no-any-return]


class Corpus:
    """References of images, and other sentences to be scored against them, all known by their numbers."""

    def __init__(self, tokens: NDArray[np.int32], lengths: NDArray[np.int32], num_references: Integers) -> None:
        self._tokens = tokens
        self._starts = _offsets(lengths)
        self.lengths = lengths
        self.num_references = num_references  # (I,)
        self.first_reference = _offsets(num_references)  # (I + 1,)

    @property
    def num_images(self) -> int:
        """I."""
        return len(self.num_references)

    def tokens_of(self, sentence: int) -> bytes:
        """Equal for sentences of the same tokens."""
        return self._tokens[self._starts[sentence] : self._starts[sentence + 1]].tobytes()

    def count_different(self, sentences: Iterable[int]) -> int:
        """How many of the sentences are different from all others."""
        return len({self.tokens_of(sentence) for sentence in sentences})

    @cached_property
    def _orders(self) -> list[_Order]:
        return list(_number_ngrams(self._tokens, self.lengths))

    def inverse_frequencies(self, without: int | None = None) -> Frequencies:
        """Of the n-grams of each order.

        Args:
            without: leave out the reference of this number of every image, and images that have no such or no other.
        """
        num_images = self.num_images if without is None else int(self.has_other_than(without).sum())
        inverse_frequencies = []
        for order in self._orders:
            counts = np.zeros(order.num_ids, dtype=np.int32)
            for part in self._slices(without):
                reference, ids, _ = order.of(part.references)
                is_used = part.is_used[reference]
                images_with = _different(ids[is_used] * part.num_images + part.image_of_reference[reference[is_used]])
                found_ids, num_found = _count_runs(images_with // part.num_images)
                counts[found_ids] += num_found
            logs = np.log(num_images) - np.log(np.maximum(1, np.arange(counts.max(initial=0) + 1)))
            inverse_frequencies.append(InverseFrequencies(counts, logs))
        return inverse_frequencies

    def has_other_than(self, number: int) -> NDArray[np.bool_]:
        """(I,) whether the image has a reference of this number, and another one."""
        return (self.num_references > number) & (self.num_references > 1)

    def rows(self, hypotheses: Integers, inverse_frequencies: Frequencies, without: int | None = None) -> Floats:
        """One row for each image, of its hypothesis against its references; the columns stand at the module's top.

        Args:
            hypotheses: (I,) sentences.
            without: as for the frequencies. Images that are left out have no meaning in their row.
        """
        if len(hypotheses) != self.num_images:
            raise ValueError(f"expected a hypothesis for each of {self.num_images} images, got {len(hypotheses)}")
        rows = np.zeros((self.num_images, NUM_COLUMNS))
        for part in self._slices(without):
            self._fill(rows[part.images], part, hypotheses[part.images], inverse_frequencies)
        return rows

    def _fill(self, rows: Floats, part: _Slice, hypotheses: Integers, inverse_frequencies: Frequencies) -> None:
        of_reference = part.image_of_reference
        lengths, reference_lengths = self.lengths[hypotheses].astype(int), self.lengths[part.references].astype(int)
        cosines = np.zeros(len(part.references))
        for number, (order, inverse) in enumerate(zip(self._orders, inverse_frequencies, strict=True)):
            image, ids, counts = order.of(hypotheses)
            reference, reference_ids, reference_counts = order.of(part.references)
            keys = image * order.num_ids + ids  # rising
            wanted = of_reference[reference] * order.num_ids + reference_ids
            found = np.minimum(np.searchsorted(keys, wanted), max(0, len(keys) - 1))
            is_found = (keys[found] == wanted) & part.is_used[reference] if len(keys) else np.zeros(len(wanted), bool)
            hit, hit_reference = found[is_found], reference[is_found]

            most = np.zeros(len(keys), dtype=np.int64)
            most[hit] = 1
            is_repeated = reference_counts[is_found] > 1
            np.maximum.at(most, hit[is_repeated], reference_counts[is_found][is_repeated])
            rows[:, MATCHES.start + number] = np.bincount(
                image, weights=np.minimum(counts, most), minlength=part.num_images
            )
            rows[:, TOTALS.start + number] = np.maximum(0, lengths - number)

            weights, reference_weights = counts * inverse[ids], reference_counts * inverse[reference_ids]
            norms = np.sqrt(np.bincount(image, weights=weights**2, minlength=part.num_images))
            reference_norms = np.sqrt(np.bincount(reference, weights=reference_weights**2, minlength=len(cosines)))
            # Clipped: a word said twice as often as in the reference gains nothing.
            clipped = np.minimum(weights[hit], reference_weights[is_found]) * reference_weights[is_found]
            products = np.bincount(hit_reference, weights=clipped, minlength=len(cosines))
            cosines += _divide(products, norms[of_reference] * reference_norms)
        rows[:, HYPOTHESIS_LENGTH] = lengths
        far = np.abs(reference_lengths - lengths[of_reference]) << 32 | reference_lengths  # the shorter of two as close
        far[~part.is_used] = np.iinfo(np.int64).max
        rows[:, REFERENCE_LENGTH] = np.minimum.reduceat(far, part.first_reference) & 0xFFFFFFFF

        common = self._longest_common_subsequences(hypotheses[of_reference], part.references) * part.is_used
        precision = np.maximum.reduceat(common, part.first_reference) / np.maximum(1, lengths)
        recall = np.maximum.reduceat(common / np.maximum(1, reference_lengths), part.first_reference)
        squared = ROUGE_BETA**2
        rows[:, MEANS.start] = _divide((1 + squared) * precision * recall, recall + squared * precision)

        # coco-caption takes the number of bigrams for the length.
        differences = np.maximum(0, lengths - 1)[of_reference] - np.maximum(0, reference_lengths - 1)
        similarities = cosines * np.exp(-(differences**2) / (2 * CIDER_SIGMA**2)) * part.is_used
        num_used = np.add.reduceat(part.is_used.astype(int), part.first_reference)
        rows[:, MEANS.start + 1] = _divide(
            10 * np.add.reduceat(similarities, part.first_reference) / MAX_ORDER, num_used.astype(float)
        )

    def centralities(self, sentences: Integers, inverse_frequencies: Frequencies) -> Floats:
        """How close each of these sentences is to the mean of all references.

        This orders them nearly as their CIDEr-D does when every image has the same sentence, at a fraction of its
        cost: only the clipping and the penalty on length are lost.
        """
        total = np.zeros(len(sentences))
        for order, inverse in zip(self._orders, inverse_frequencies, strict=True):
            centroid = np.zeros(order.num_ids)
            for part in self._slices():
                reference, ids, counts = order.of(part.references)
                parts = self.num_references[part.images][part.image_of_reference]
                np.add.at(centroid, ids, _directions(reference, counts * inverse[ids]) / parts[reference])
            for start in range(0, len(sentences), _REFERENCES_AT_A_TIME):
                some = sentences[start : start + _REFERENCES_AT_A_TIME]
                sentence, ids, counts = order.of(some)
                closeness = _directions(sentence, counts * inverse[ids]) * centroid[ids]
                total[start : start + len(some)] += np.bincount(sentence, weights=closeness, minlength=len(some))
        return total

    def score_constants(self, candidates: Integers, inverse_frequencies: Frequencies) -> Floats:
        """For each of these sentences the mean CIDEr-D when every image has it."""
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
                reference, ids, counts = order.of(part.references)
                weights = counts * inverse[ids]
                norms = np.sqrt(np.bincount(reference, weights=weights**2, minlength=num_references))
                columns = np.minimum(np.searchsorted(table.ids, ids), len(table.ids) - 1)
                is_shared = table.ids[columns] == ids if len(table.ids) else np.zeros(len(ids), dtype=bool)
                reference, columns, weights = reference[is_shared], columns[is_shared], weights[is_shared]
                for number, (of_candidate, norm) in enumerate(zip(table.weights, table.norms, strict=True)):
                    clipped = np.minimum(of_candidate[columns], weights) * weights
                    products = np.bincount(reference, weights=clipped, minlength=num_references)
                    cosines[number] += _divide(products, norm * norms)
            lengths = np.maximum(0, self.lengths[part.references].astype(int) - 1)
            shares = self.num_references[part.images][part.image_of_reference]
            cosines *= np.exp(-((num_bigrams[:, None] - lengths) ** 2) / (2 * CIDER_SIGMA**2)) / shares
            totals += cosines.sum(axis=1)
        return 10 * totals / MAX_ORDER / self.num_images

    def _slices(self, without: int | None = None) -> Iterator[_Slice]:
        """The images, a few thousand at a time; the references that are left out are marked as not used."""
        start = 0
        while start < self.num_images:
            most = self.first_reference[start] + _REFERENCES_AT_A_TIME
            stop = max(start + 1, int(np.searchsorted(self.first_reference, most, side="right")) - 1)
            first, last = self.first_reference[start], self.first_reference[stop]
            counts = self.num_references[start:stop]
            of_reference = np.repeat(np.arange(stop - start), counts)
            offsets = _offsets(counts)[:-1]
            is_used = np.ones(last - first, dtype=bool)
            if without is not None:
                is_used = (np.arange(last - first) - offsets[of_reference]) != without
                is_used &= self.has_other_than(without)[start:stop][of_reference]
            yield _Slice(slice(start, stop), np.arange(first, last), of_reference, offsets, is_used)
            start = stop

    def _longest_common_subsequences(self, one: Integers, other: Integers) -> Integers:
        """For each pair of sentences the length of their longest common subsequence.

        All pairs go through the tokens of `other` together, those of `one` are the bits of a word (Hyyrö 2004,
        "Bit-parallel LCS-length computation revisited").
        """
        found = np.zeros(len(one), dtype=np.int64)
        if not len(self._tokens):
            return found
        is_long = self.lengths[one] > _MOST_BITS
        for pair in np.flatnonzero(is_long):
            found[pair] = longest_common_subsequence(*(self._sentence(number) for number in (one[pair], other[pair])))
        pairs = np.flatnonzero(~is_long)
        pairs = pairs[np.argsort(-self.lengths[other[pairs]], kind="stable")]  # those that end first come last
        one, other = one[pairs], other[pairs]
        lengths, other_lengths = self.lengths[one].astype(np.int64), self.lengths[other]
        width = -(-int(lengths.max(initial=1)) // 8) * 8
        place = np.arange(width)
        is_token = place < lengths[:, None]
        tokens = np.where(is_token, self._tokens[np.where(is_token, self._starts[one][:, None] + place, 0)], -1)
        words = np.full(len(pairs), ~np.uint64(0))
        for position in range(int(other_lengths.max(initial=0))):
            num_left = int(np.searchsorted(-other_lengths, -position, side="left"))
            token = self._tokens[self._starts[other[:num_left]] + position]
            mask = np.zeros((num_left, 8), dtype=np.uint8)
            mask[:, : width // 8] = np.packbits(tokens[:num_left] == token[:, None], axis=1, bitorder="little")
            word = words[:num_left]
            matches = word & mask.view("<u8")[:, 0].astype(np.uint64)
            words[:num_left] = (word + matches) | (word - matches)
        zeros = np.unpackbits((~words).astype("<u8").view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")
        found[pairs] = (zeros[:, :width] & is_token).sum(axis=1)
        return found

    def _sentence(self, number: int) -> list[int]:
        return self._tokens[self._starts[number] : self._starts[number + 1]].tolist()  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class _Table:
    """The n-grams of one order in a few candidates (C) that differ in M of them."""

    ids: Integers  # (M,) rising
    weights: Floats  # (C, M)
    norms: Floats  # (C,)

    @classmethod
    def of(cls, order: _Order, candidates: Integers, inverse: InverseFrequencies) -> _Table:
        candidate, ids, counts = order.of(candidates)
        different, columns = np.unique(ids, return_inverse=True)
        weights = np.zeros((len(candidates), len(different)))
        weights[candidate, columns] = counts * inverse[ids]
        norms = np.sqrt(np.bincount(candidate, weights=weights[candidate, columns] ** 2, minlength=len(candidates)))
        return cls(different, weights, norms)


def longest_common_subsequence(one: Sequence[object], other: Sequence[object]) -> int:
    """Its length."""
    lengths = [0] * (len(other) + 1)  # of the tokens of `one` so far and of each beginning of `other`
    for token in one:
        diagonal = 0
        for position, other_token in enumerate(other, start=1):
            above = lengths[position]
            lengths[position] = diagonal + 1 if token == other_token else max(above, lengths[position - 1])
            diagonal = above
    return lengths[-1]


def _number_ngrams(tokens: NDArray[np.int32], lengths: NDArray[np.int32]) -> Iterator[_Order]:
    """The orders from 1 on: an n-gram is known by the number of its first n - 1 tokens and its last token."""
    num_tokens = int(tokens.max(initial=0)) + 1
    ids, num_ids, starts = tokens, num_tokens, _offsets(lengths)
    yield _Order.of_places(ids, starts, num_ids)
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
        yield _Order.of_places(ids, starts, num_ids)


def _number(
    prefixes: NDArray[np.int32], last_tokens: NDArray[np.int32], num_tokens: int
) -> tuple[NDArray[np.int32], int]:
    """The rank of each pair among the different ones, and how many those are.

    The pairs as one array of 64-bit integers are the largest thing in memory, so they are made twice and never copied.
    """

    def keys(part: slice) -> Integers:
        found = prefixes[part].astype(np.int64)
        found *= num_tokens
        found += last_tokens[part]
        return found

    rising = keys(slice(None))
    rising.sort()
    # Not `np.unique`: its hash table takes ten times as long (numpy 2.4).
    different = rising[_is_new(rising)]
    del rising
    if len(different) > np.iinfo(np.int32).max:
        raise OverflowError(f"{len(different):,} different n-grams are more than 32 bits can number")
    ranks = np.empty(len(prefixes), dtype=np.int32)
    for start in range(0, len(prefixes), _PLACES_AT_A_TIME):
        some = keys(slice(start, start + _PLACES_AT_A_TIME))
        order = np.argsort(some)  # looked up in their order, neighbours are in the cache
        ranks[start : start + len(some)][order] = np.searchsorted(different, some[order])
    return ranks, max(1, len(different))


def _different(keys: Integers) -> Integers:
    """The different ones, rising."""
    rising = np.sort(keys)
    return rising[_is_new(rising)]


def _count_runs(rising: Integers) -> tuple[Integers, Integers]:
    """The different ones, and how many there are of each."""
    starts = np.flatnonzero(_is_new(rising))
    return rising[starts], np.diff(starts, append=len(rising))


def _is_new(rising: Integers) -> NDArray[np.bool_]:
    """Whether each differs from the one before it."""
    is_new = np.ones(len(rising), dtype=bool)
    np.not_equal(rising[1:], rising[:-1], out=is_new[1:])
    return is_new


def _directions(sentence: Integers, weights: Floats) -> Floats:
    """The weights of each sentence's n-grams over their norm."""
    norms = np.sqrt(np.bincount(sentence, weights=weights**2))
    return _divide(weights, norms[sentence])


def _divide(numerators: NDArray[Any], denominators: NDArray[Any]) -> Floats:
    """Their quotients; 0 over 0 is 0."""
    quotients = np.zeros(len(numerators))
    np.divide(numerators, denominators, out=quotients, where=numerators != 0)
    return quotients


def _offsets(counts: NDArray[Any]) -> Integers:
    """(n + 1,): where each of n runs begins, and the end."""
    offsets = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets
