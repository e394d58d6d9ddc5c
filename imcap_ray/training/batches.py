"""Captions and features -> the batches of a training step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from imcap_ray.text.vocabulary import PADDING_ID

LENGTHS_ALIKE: Final = 16
"""So many captions in a row are padded to one length, so that a position has 16, 32, ... captions and few shapes come
up: for each shape of a matrix product oneDNN compiles a kernel, which takes longer than the product, and keeps it. A
step of the default recipe takes half of the time so, for 8 % more positions (torch 2.14, two cores with AMX)."""


@dataclass(frozen=True, slots=True)
class CaptionBatch:
    """Images with all their captions, the longest caption first."""

    inputs: Tensor
    """Features (I, R, F), or pixels (I, 3, S, S)."""
    token_ids: Tensor
    """(N, T) from the start token to the last word."""
    lengths: Tensor
    """(N,) on the CPU, falling; `LENGTHS_ALIKE` in a row are the same."""
    image_of_caption: Tensor
    """(N,) index into `inputs`."""
    targets: Tensor
    """(P,) the token that follows each, in the order of a packed sequence; `PADDING_ID` where its caption has ended."""
    weights: Tensor
    """(P,) how much each target counts: 1, or its caption's advantage."""
    num_tokens: int
    """Targets that are no padding."""


def make_batch(
    inputs: Tensor,
    captions: Sequence[Sequence[Sequence[int]]],
    device: torch.device,
    *,
    advantages: Sequence[Sequence[float]] | None = None,
) -> CaptionBatch:
    """The batch of these images: features or pixels, and for each image its captions as ids from start to end.

    Args:
        advantages: of each caption of each image, how much it is to be said more often, or less.
    """
    weights = [[1.0] * len(of_image) for of_image in captions] if advantages is None else advantages
    flat = [
        (image, ids, weight)
        for image, of_image in enumerate(captions)
        for ids, weight in zip(of_image, weights[image], strict=True)
    ]
    flat.sort(key=lambda caption: -len(caption[1]))
    padded = nn.utils.rnn.pad_sequence(
        [torch.tensor(ids) for _, ids, _ in flat], batch_first=True, padding_value=PADDING_ID
    )
    lengths = torch.tensor([len(ids) - 1 for _, ids, _ in flat])
    num_tokens = int(lengths.sum())
    lengths = lengths[::LENGTHS_ALIKE].repeat_interleave(LENGTHS_ALIKE)[: len(flat)]
    weight_of_caption = torch.tensor([weight for _, _, weight in flat]).unsqueeze(1)
    weights_of_tokens = weight_of_caption.expand(len(flat), padded.shape[1] - 1)
    return CaptionBatch(
        inputs=inputs.to(device).to(inputs.dtype if inputs.dtype == torch.uint8 else torch.float32),
        token_ids=padded[:, :-1].to(device),
        lengths=lengths,
        image_of_caption=torch.tensor([image for image, _, _ in flat], device=device),
        targets=pack_padded_sequence(padded[:, 1:], lengths, batch_first=True).data.to(device),
        weights=pack_padded_sequence(weights_of_tokens, lengths, batch_first=True).data.to(device),
        num_tokens=num_tokens,
    )


def augmentation(image_size: int, *, min_crop_area: float) -> Callable[[Tensor], Tensor]:
    """A function from uint8 pixels (I, 3, S, S) to another view of each image."""
    from torchvision.transforms import v2

    transform: Callable[[Tensor], Tensor] = v2.Compose(
        [
            v2.RandomResizedCrop(image_size, scale=(min_crop_area, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
        ]
    )
    return lambda pixels: torch.stack([transform(image) for image in pixels])
