"""Beam search over next-token log-probabilities. Knows nothing of images, models or words, and does not import torch.

B images, K beams per image, C candidates per beam, L longest caption with its end token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from imcap_ray.config import SearchConfig

Ints = npt.NDArray[np.int64]

Floats = npt.NDArray[np.float32]


class Candidates(NamedTuple):
    """The most probable next tokens of each beam."""

    token_ids: Ints
    """(B, K, C): different tokens, as many as the beam size if the vocabulary is large enough."""
    logprobs: Floats
    """(B, K, C) in nats; NaN if the model computes no finite number."""
    end_logprobs: Floats
    """(B, K): log-probability of the end token, whether or not it is among the candidates."""


NextTokens = Callable[[Ints, Ints], Candidates]
"""The last token of each beam (B, K), and the beam of the step before that it continues (B, K) -> candidates. At the
first step there is one beam for each image, with the start token."""


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """One finished token sequence."""

    token_ids: tuple[int, ...]
    """Without start and end."""
    logprob: float
    """Sum over the tokens and the end token, in nats."""
    num_tokens: int
    """Number of tokens, including the end token."""


def beam_search(
    next_tokens: NextTokens, *, num_images: int, search: SearchConfig, start_id: int, end_id: int
) -> list[list[Hypothesis]]:
    """Find the `search.num_captions` best finished sequences of each image, the best first.

    A sequence's score is its log-probability divided by its number of tokens (the end counts) to the power of
    `length_penalty` (Wu et al. 2016, arXiv 1609.08144, section 7, without the constants). A sequence that ends moves
    from the beam to a pool of finished sequences; after `max_length` tokens the end is forced. With a beam size of 1
    this is greedy search. The result has fewer than `num_captions` sequences only if the search space has no more, and
    none if a log-probability of the image is NaN.
    """
    beam_size, max_length, length_penalty = search.beam_size, search.max_length, search.length_penalty
    # All beams are equal at the start, so begin with one; the first step expands it to `beam_size` or all there are.
    tokens = np.full((num_images, 1), start_id)
    parents = np.zeros_like(tokens)
    live_scores = np.zeros((num_images, 1), np.float32)
    sequences = np.full((num_images, 1, max_length + 1), end_id)
    is_lost = np.zeros(num_images, bool)
    pool = _Pool.empty(num_images, beam_size, max_length + 1)

    for position in range(max_length + 1):
        ids, logprobs, end_logprobs = next_tokens(tokens, parents)
        is_lost |= np.isnan(logprobs).any(axis=(1, 2)) | np.isnan(end_logprobs).any(axis=1)
        if position == max_length:
            ids, logprobs = np.full_like(tokens, end_id)[..., None], end_logprobs[..., None]
        totals = live_scores[..., None] + logprobs  # (B, K, C)
        totals[is_lost] = -np.inf
        live_scores, choice = _best(totals.reshape(num_images, -1), beam_size)
        parents, tokens = choice // ids.shape[2], _select(ids.reshape(num_images, -1), choice)
        sequences = _select(sequences, parents)
        sequences[:, :, position] = tokens

        has_ended = tokens == end_id
        ended = np.where(has_ended, live_scores, np.float32(-np.inf))
        pool = pool.with_ended(ended, sequences, length=position + 1, length_penalty=length_penalty)
        live_scores = np.where(has_ended, np.float32(-np.inf), live_scores)
        # No continuation can score higher: log-probabilities only decrease, and the largest divisor is known.
        bound = live_scores.max(axis=1) / (max_length + 1) ** length_penalty
        if (bound <= pool.scores[:, search.num_captions - 1]).all():
            break
    return [pool.hypotheses(image, search.num_captions) for image in range(num_images)]


class _Pool(NamedTuple):
    """The best finished sequences of each image, the best first. Places that are still empty score -inf."""

    scores: Floats
    """(B, K) normalised."""
    logprobs: Floats
    lengths: Ints
    sequences: Ints
    """(B, K, L)."""

    @classmethod
    def empty(cls, num_images: int, size: int, max_length: int) -> _Pool:
        shape = (num_images, size)
        nothing = np.full(shape, -np.inf, np.float32)
        return cls(nothing, nothing, np.zeros(shape, np.int64), np.zeros((*shape, max_length), np.int64))

    def with_ended(self, logprobs: Floats, sequences: Ints, *, length: int, length_penalty: float) -> _Pool:
        """The pool with the sequences of this length whose log-probability (B, K) is not -inf, if they are better."""
        scores = logprobs / length**length_penalty
        best_scores, order = _best(np.concatenate([self.scores, scores], axis=1), self.scores.shape[1])
        lengths = np.full(logprobs.shape, length)
        return _Pool(
            best_scores,
            *(
                _select(np.concatenate(both, axis=1), order)
                for both in ((self.logprobs, logprobs), (self.lengths, lengths), (self.sequences, sequences))
            ),
        )

    def hypotheses(self, image: int, count: int) -> list[Hypothesis]:
        return [
            Hypothesis(tuple(sequence[: length - 1].tolist()), float(logprob), int(length))
            for logprob, length, sequence in zip(
                self.logprobs[image, :count], self.lengths[image], self.sequences[image], strict=False
            )
            if logprob > -np.inf
        ]


def _best(scores: Floats, count: int) -> tuple[Floats, Ints]:
    """The highest scores of each row (B, N), the highest first, and their columns: (B, count) or fewer."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(scores, order, axis=1), order


def _select(values: npt.NDArray[Any], columns: Ints) -> npt.NDArray[Any]:
    """Columns (B, N') of values (B, N, ...), per image: (B, N', ...)."""
    return values[np.arange(len(values))[:, None], columns]
