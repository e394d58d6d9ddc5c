"""What captioners answer, and how many images they take together.

Knows no torch: whoever hands images to a captioner, or holds one that needs none, is spared two seconds of imports.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from imcap_ray.errors import ImageError

# Images computed together. Always this many, the last ones blank: matrix kernels choose their order of summation by
# the shape of the batch, so only a fixed shape gives the same bits whatever batches the images arrive in. Where memory
# runs out there are fewer, and the last digits of a confidence may be others.
COMPUTE_BATCH_SIZE: Final = 16

GPU_COMPUTE_BATCH_SIZE: Final = 64  # a step of a search takes a GPU as long for few images as for many


def compute_batch_size(*, on_gpu: bool) -> int:
    """Images computed together, as long as memory does not run out."""
    return GPU_COMPUTE_BATCH_SIZE if on_gpu else COMPUTE_BATCH_SIZE


@dataclass(frozen=True, slots=True)
class Caption:
    """A sentence for an image, and how sure the model is of it."""

    text: str
    """"" when the model's best answer is to say nothing."""
    logprob: float
    """Sum of the tokens' log-probabilities, the end token's among them, in nats."""
    num_tokens: int
    """Tokens with the end token."""

    @property
    def confidence(self) -> float:
        """Exp of the mean log-probability of a token: 0..1."""
        return math.exp(self.logprob / self.num_tokens)


def no_memory() -> ImageError:
    """The error of an image that a captioner has no caption for."""
    return ImageError("out_of_memory", "not enough memory to caption the image, even alone")


def not_finite(what: str) -> ImageError:
    """The error of an image for which a model computes NaN or infinity: its features, for instance."""
    return ImageError("internal", f"the {what} of the image are not finite numbers")
