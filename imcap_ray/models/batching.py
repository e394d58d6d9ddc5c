"""Pixels of images -> what a function computes of them, in batches of one fixed shape.

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

# What torch says when memory runs out and it has no type for it: on the CPU, and inside CUDA's libraries.
_OUT_OF_MEMORY: Final = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory|CUDA error: out of memory|ALLOC(ATION)?_FAILED"
)

# What it says when none of cuDNN's ways gets the memory it wants; or when there is none, with all of the memory.
_NO_ENGINE: Final = re.compile(r"unable to find an engine")

Computed = TypeVar("Computed")

_log = logging.getLogger(__name__)


class FixedBatches:
    """Computes on images of one size, on one device."""

    def __init__(self, image_size: int, device: torch.device) -> None:
        self._image_size = image_size
        self._device = device
        if device.type == "cuda":  # what is in float32 there would have ten bits of a factor's digits, as float16 has
            torch.backends.cudnn.allow_tf32 = False
        self.size = compute_batch_size(on_gpu=device.type == "cuda")
        """Images computed together: half as many, once or more often, after memory has run out."""

    def compute(
        self, pixels: np.ndarray[Any, Any] | Tensor, function: Callable[[Tensor], Computed]
    ) -> Iterator[tuple[Computed | None, int]]:
        """What the function makes of `size` images at a time, and how many of them are real.

        Where memory runs out, the images are computed again, half as many at a time, and so are all later ones; None
        where it runs out for an image alone.

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
                computed = function(self._filled_up(part))
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error, is_alone=self.size == 1):
                    raise
                computed = None
            if computed is None:  # only here, for the exception has held on to all that was computed
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()
                if self.size > 1:
                    self.size //= 2
                    _log.warning("memory ran out: %d images at a time from now on", self.size)
                    continue
            yield computed, len(part)
            start += len(part)

    def _filled_up(self, part: np.ndarray[Any, Any] | Tensor) -> Tensor:
        """The images, and blank ones up to `size`, on the device."""
        chunk = torch.zeros(self.size, *part.shape[1:], dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        # torch warns of arrays that cannot be written to, as Ray's: it gets a copy.
        chunk[: len(part)] = part if isinstance(part, Tensor) else torch.from_numpy(np.array(part))
        return chunk.to(self._device, non_blocking=True)


def _is_out_of_memory(error: BaseException, *, is_alone: bool) -> bool:
    return (
        isinstance(error, torch.OutOfMemoryError | MemoryError)
        or _OUT_OF_MEMORY.search(str(error)) is not None
        or (not is_alone and _NO_ENGINE.search(str(error)) is not None)
    )
