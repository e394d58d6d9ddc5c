"""Beam search and sampling over next-token log-probabilities. Knows nothing of images, models or words.

B images, K beams per image, V vocabulary, L longest caption with its end token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from imcap_ray.config import SearchConfig

State = tuple[Tensor, ...]  # each (B, K, ...)

Step = Callable[[Tensor, State], tuple[Tensor, State]]  # tokens (B, K), state -> log-probabilities (B, K, V), state


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
    step: Step,
    state: State,
    *,
    search: SearchConfig,
    start_id: int,
    end_id: int,
    forbidden_ids: Sequence[int] = (),
) -> list[list[Hypothesis]]:
    """Find the `search.num_captions` best finished sequences of each image, the best first.

    A sequence's score is its log-probability divided by its number of tokens (the end counts) to the power of
    `length_penalty` (Wu et al. 2016, arXiv 1609.08144, section 7, without the constants). A sequence that ends moves
    from the beam to a pool of finished sequences; after `max_length` tokens the end is forced. With a beam size of 1
    this is greedy search. The result has fewer than `num_captions` sequences only if the search space has no more.

    Args:
        step: tokens (B, K) and state to log-probabilities (B, K, V) of the next token and the next state.
        state: each tensor (B, K, ...), equal along K at the start.
        forbidden_ids: tokens that never occur in a result.
    """
    beam_size, max_length, length_penalty = search.beam_size, search.max_length, search.length_penalty
    num_images = state[0].shape[0]
    device = state[0].device
    minus_infinity = float("-inf")

    # All beams are equal at the start, so begin with one; the first step expands it to `beam_size` or all there are.
    state = tuple(tensor[:, :1] for tensor in state)
    tokens = torch.full((num_images, 1), start_id, dtype=torch.long, device=device)
    forbidden = torch.tensor(list(forbidden_ids), dtype=torch.long, device=device)
    live_scores = torch.zeros((num_images, 1), device=device)
    sequences = torch.full((num_images, 1, max_length + 1), end_id, dtype=torch.long, device=device)

    pool_scores = torch.full((num_images, beam_size), minus_infinity, device=device)  # normalised
    pool_logprobs = torch.full((num_images, beam_size), minus_infinity, device=device)
    pool_lengths = torch.zeros((num_images, beam_size), dtype=torch.long, device=device)
    pool_sequences = sequences.repeat(1, beam_size, 1)

    for position in range(max_length + 1):
        log_probs, state = step(tokens, state)
        log_probs = log_probs.float()
        vocabulary_size = log_probs.shape[-1]
        log_probs.index_fill_(-1, forbidden, minus_infinity)
        if position == max_length:
            ending = log_probs[..., end_id].clone()
            log_probs.fill_(minus_infinity)
            log_probs[..., end_id] = ending

        totals = (live_scores.unsqueeze(-1) + log_probs).flatten(1)  # (B, K * V)
        live_scores, choice = totals.topk(min(beam_size, totals.shape[1]), dim=1)
        parent, tokens = choice // vocabulary_size, choice % vocabulary_size
        state = tuple(_gather_beams(tensor, parent) for tensor in state)
        sequences = _gather_beams(sequences, parent)
        sequences[:, :, position] = tokens

        ended = tokens == end_id
        length = position + 1
        ended_logprobs = live_scores.masked_fill(~ended, minus_infinity)
        ended_scores = ended_logprobs / length**length_penalty
        pool_scores, order = torch.cat([pool_scores, ended_scores], dim=1).topk(beam_size, dim=1)
        pool_logprobs = torch.cat([pool_logprobs, ended_logprobs], dim=1).gather(1, order)
        lengths = torch.full_like(tokens, length)
        pool_lengths = torch.cat([pool_lengths, lengths], dim=1).gather(1, order)
        pool_sequences = _gather_beams(torch.cat([pool_sequences, sequences], dim=1), order)

        live_scores = live_scores.masked_fill(ended, minus_infinity)
        # No continuation can score higher: log-probabilities only decrease, and the largest divisor is known.
        bound = live_scores.amax(dim=1) / (max_length + 1) ** length_penalty
        if bool((bound <= pool_scores[:, search.num_captions - 1]).all()):
            break

    return _to_hypotheses(pool_logprobs, pool_lengths, pool_sequences, search.num_captions)


def sample(
    step: Step,
    state: State,
    *,
    start_id: int,
    end_id: int,
    max_length: int,
    temperature: float = 1.0,
    forbidden_ids: Sequence[int] = (),
) -> list[list[list[int]]]:
    """Draw K token sequences for each image, each with its start token and, if it was reached, its end token.

    Args:
        step: tokens (B, K) and state to log-probabilities (B, K, V) of the next token and the next state.
        state: each tensor (B, K, ...), equal along K at the start.
        temperature: divides the log-probabilities; below 1, probable tokens are drawn even more often.
        forbidden_ids: tokens that are never drawn.
    """
    num_images, num_samples = state[0].shape[:2]
    tokens = torch.full((num_images, num_samples), start_id, dtype=torch.long, device=state[0].device)
    forbidden = torch.tensor(list(forbidden_ids), dtype=torch.long, device=tokens.device)
    drawn, has_ended = [tokens], torch.zeros_like(tokens, dtype=torch.bool)
    for _ in range(max_length + 1):
        log_probs, state = step(tokens, state)
        probabilities = (log_probs.float() / temperature).exp()  # up to a factor
        probabilities.index_fill_(-1, forbidden, 0.0)
        # Inverting the distribution function takes one random number per row. `torch.multinomial` takes one per token
        # of the vocabulary, a third of the whole time.
        cumulative = probabilities.cumsum(dim=-1)
        drawn_share = torch.rand(num_images, num_samples, 1, device=tokens.device) * cumulative[..., -1:]
        tokens = torch.searchsorted(cumulative, drawn_share, right=True).squeeze(-1)
        tokens.clamp_(max=cumulative.shape[-1] - 1)  # rounding
        drawn.append(tokens)
        has_ended |= tokens == end_id
        if bool(has_ended.all()):
            break
    sequences = torch.stack(drawn, dim=2).tolist()
    return [[_cut_after(end_id, ids) for ids in image_sequences] for image_sequences in sequences]


def _cut_after(end_id: int, token_ids: list[int]) -> list[int]:
    """The sequence up to its first end token, inclusive."""
    return token_ids[: token_ids.index(end_id) + 1] if end_id in token_ids else token_ids


def _gather_beams(tensor: Tensor, beams: Tensor) -> Tensor:
    """Rows `beams` (B, K') of a tensor (B, K, ...), per image: (B, K', ...)."""
    index = beams.reshape(*beams.shape, *(1,) * (tensor.dim() - 2))
    return tensor.gather(1, index.expand(*beams.shape, *tensor.shape[2:]))


def _to_hypotheses(logprobs: Tensor, lengths: Tensor, sequences: Tensor, count: int) -> list[list[Hypothesis]]:
    results = []
    for image_logprobs, image_lengths, image_sequences in zip(
        logprobs.tolist(), lengths.tolist(), sequences.tolist(), strict=True
    ):
        candidates = zip(image_logprobs[:count], image_lengths, image_sequences, strict=False)
        results.append(
            [
                Hypothesis(token_ids=tuple(sequence[: length - 1]), logprob=logprob, num_tokens=length)
                for logprob, length, sequence in candidates
                if logprob > float("-inf")
            ]
        )
    return results
