"""Captions and features -> the batches of a training step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from imcap_ray.text.vocabulary import PADDING_ID

LENGTH_BUCKET_SIZE: Final = 16
"""This many captions in a row are padded to the same length.

A position then has 16, 32, ... captions, so that few shapes occur: oneDNN compiles and keeps a kernel for each shape of
a matrix product, which takes longer than the product. This halves the time of a step of the default recipe and adds 8 %
more positions (torch 2.14, two cores with AMX)."""


@dataclass(frozen=True, slots=True)
class CaptionBatch:
    """Images with all their captions, the longest caption first."""

    inputs: Tensor
    """Features (I, R, F), or pixels (I, 3, S, S)."""
    token_ids: Tensor
    """(N, T) from the start token to the last word."""
    lengths: Tensor
    """(N,) on the CPU, in descending order; `bucket_size` in a row are equal."""
    image_of_caption: Tensor
    """(N,) index into `inputs`."""
    targets: Tensor
    """(P,) the next token at each position, in the order of a packed sequence; `PADDING_ID` after a caption's end."""
    weights: Tensor
    """(P,) the weight of each target: 1, or its caption's advantage."""
    num_tokens: int
    """Number of targets that are not padding."""


def make_batch(
    inputs: Tensor,
    captions: Sequence[Sequence[Sequence[int]]],
    device: torch.device,
    *,
    advantages: Sequence[Sequence[float]] | None = None,
    bucket_size: int = LENGTH_BUCKET_SIZE,
) -> CaptionBatch:
    """Build the batch of these images.

    Args:
        inputs: features or pixels, see `CaptionBatch`.
        captions: the captions of each image, as token ids from start to end.
        advantages: the advantage of each caption of each image, by which it becomes more or less probable.
        bucket_size: number of captions in a row that are padded to the same length.
    """
    weights = [[1.0] * len(image_captions) for image_captions in captions] if advantages is None else advantages
    flat = [
        (image, ids, weight)
        for image, image_captions in enumerate(captions)
        for ids, weight in zip(image_captions, weights[image], strict=True)
    ]
    flat.sort(key=lambda caption: -len(caption[1]))
    padded = nn.utils.rnn.pad_sequence(
        [torch.tensor(ids) for _, ids, _ in flat], batch_first=True, padding_value=PADDING_ID
    )
    lengths = torch.tensor([len(ids) - 1 for _, ids, _ in flat])
    num_tokens = int(lengths.sum())
    lengths = lengths[::bucket_size].repeat_interleave(bucket_size)[: len(flat)]
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
    """Return a function that crops and mirrors uint8 pixels (I, 3, S, S) at random, each image differently."""
    from torchvision.transforms import v2

    transform: Callable[[Tensor], Tensor] = v2.Compose(
        [
            v2.RandomResizedCrop(image_size, scale=(min_crop_area, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
        ]
    )
    return lambda pixels: torch.stack([transform(image) for image in pixels])
