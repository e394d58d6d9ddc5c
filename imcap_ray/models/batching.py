"""Applies a function to pixels in batches of one fixed shape, and halves the batches when memory runs out.

B images, S pixels a side.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

import numpy as np
import torch
from torch import Tensor

from imcap_ray.models.caption import compute_batch_size

# Messages of torch when memory runs out on the CPU or inside CUDA's libraries; they have no exception type.
_OUT_OF_MEMORY: Final = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory|CUDA error: out of memory|ALLOC(ATION)?_FAILED"
)

# torch's message when no algorithm of cuDNN gets the memory it needs, or when no algorithm exists at all.
_NO_ENGINE: Final = re.compile(r"unable to find an engine")

Computed = TypeVar("Computed")

_log = logging.getLogger(__name__)


class FixedBatches:
    """Computes on images of one size, on one device."""

    def __init__(self, image_size: int, device: torch.device) -> None:
        self._image_size = image_size
        self._device = device
        if device.type == "cuda":  # otherwise factors in float32 would be rounded to ten bits, like float16
            torch.backends.cudnn.allow_tf32 = False
        self.size = compute_batch_size(on_gpu=device.type == "cuda")
        """Images computed together. It is halved whenever memory runs out."""

    def compute(
        self, pixels: np.ndarray[Any, Any] | Tensor, function: Callable[[Tensor], Computed]
    ) -> Iterator[tuple[Computed | None, int]]:
        """Apply the function to `size` images at a time; yield its result and how many of the images are real.

        When memory runs out, these images and all later ones are computed in batches of half the size. If it runs out
        even for a single image, the result is None.

        Args:
            pixels: uint8 (B, 3, S, S).
        """
        expected = (3, self._image_size, self._image_size)
        if tuple(pixels.shape[1:]) != expected:
            raise ValueError(f"pixels must be (B, {', '.join(map(str, expected))}), got {tuple(pixels.shape)}")
        start = 0
        while start < len(pixels):
            part = pixels[start : start + self.size]
            try:
                computed = function(self._pad(part))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error, is_alone=self.size == 1):
                    raise
                computed = None
            if computed is None:  # not in the except block, where the exception keeps all that was computed alive
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()
                if self.size > 1:
                    self.size //= 2
                    _log.warning("memory ran out: %d images at a time from now on", self.size)
                    continue
            yield computed, len(part)
            start += len(part)

    def _pad(self, part: np.ndarray[Any, Any] | Tensor) -> Tensor:
        """Move the images to the device, with blank ones added up to `size`."""
        chunk = torch.zeros(self.size, *part.shape[1:], dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        # Ray's arrays are read-only, which torch warns about, so copy them.
        chunk[: len(part)] = part if isinstance(part, Tensor) else torch.from_numpy(np.array(part))
        return chunk.to(self._device, non_blocking=True)


def is_out_of_memory(error: BaseException, *, is_alone: bool) -> bool:
    """Whether memory ran out on the CPU or the GPU.

    Args:
        is_alone: the batch was of one image, so that an operator without an algorithm does not lack memory for one.
    """
    return (
        isinstance(error, torch.OutOfMemoryError | MemoryError)
        or _OUT_OF_MEMORY.search(str(error)) is not None
        or (not is_alone and _NO_ENGINE.search(str(error)) is not None)
    )
