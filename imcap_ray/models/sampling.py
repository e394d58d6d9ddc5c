"""Random token sequences by their probability, for training. Knows nothing of images, models or words."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from imcap_ray.models.decoders import State, Step


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
