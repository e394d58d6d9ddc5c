"""The results of captioners, and how many images they compute together.

Does not import torch, so that processes that only pass images to a captioner save two seconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from imcap_ray.config import PluginSearch, SearchConfig
from imcap_ray.data.image_decoding import Preparation
from imcap_ray.errors import ImageError

# Images computed together. A smaller batch is filled up with blank images: the shape of a batch decides in which order
# matrix kernels sum, so only a fixed shape gives the same bits whatever batches the images arrive in. The last digits
# of a confidence may change if memory runs out and the batches become smaller.
COMPUTE_BATCH_SIZE: Final = 16

GPU_COMPUTE_BATCH_SIZE: Final = 64  # on a GPU a search step takes as long for few images as for many


def compute_batch_size(*, on_gpu: bool) -> int:
    """Images computed together, unless memory runs out."""
    return GPU_COMPUTE_BATCH_SIZE if on_gpu else COMPUTE_BATCH_SIZE


@dataclass(frozen=True, slots=True)
class Caption:
    """A sentence for an image, and the model's confidence in it."""

    text: str
    """May be "", if the empty sequence is the most probable one."""
    logprob: float = math.nan
    """Sum of the log-probabilities of all tokens, including the end token, in nats; NaN: unknown."""
    num_tokens: int = 0
    """Number of tokens, including the end token; 0: unknown."""
    familiarity: float = math.nan
    """How much the image resembles the model's training images, 0..1, see `Familiarity`; NaN: the model cannot tell."""

    @property
    def confidence(self) -> float:
        """Geometric mean of the tokens' probabilities: 0..1; NaN if they are unknown."""
        return math.exp(self.logprob / self.num_tokens) if self.num_tokens else math.nan


def no_memory() -> ImageError:
    """The error of an image for which memory ran out."""
    return ImageError("out_of_memory", "not enough memory to caption the image, even alone")


def not_finite(values: str) -> ImageError:
    """The error of an image for which a model computes NaN or infinity in these values, such as its features."""
    return ImageError("internal", f"the {values} of the image are not finite numbers")


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorNeeds:
    """What each process with a captioner needs."""

    batch_size: int | None = None
    """Images that it takes at a time; None: as many as the models of this package compute together."""
    gpus: float | None = None
    """GPUs; None: 1 if there are any."""
    no_gpus: str = ""
    """Why it cannot use GPUs, if it cannot."""
    memory: float = 0
    """Bytes of memory; 0: no more than any process."""


class ImageCaptioner(Protocol):
    """The interface of a captioner that the pipeline uses; see `CaptionerPlugin` for what others implement."""

    @property
    def preparation(self) -> Preparation:
        """How images become the pixels that `caption_pixels` takes."""

    @property
    def needs(self) -> ActorNeeds:
        """What each process needs."""

    @property
    def fingerprint(self) -> str:
        """A hash that is equal for captioners with equal captions, apart from the rounding of different devices."""

    @property
    def search(self) -> SearchConfig | PluginSearch:
        """The search settings."""

    @property
    def compute_batch_size(self) -> int:
        """Images computed together. It is halved whenever memory runs out."""

    @property
    def num_beam_steps(self) -> int:
        """Number of positions that searches have computed so far."""

    def start(self, *, gpus: float) -> None:
        """Get ready to caption in this process, for which this many GPUs are reserved.

        Raises:
            ImcapError: it cannot, for example because a GPU is reserved that cannot be used.
        """

    def caption_pixels(self, pixels: npt.NDArray[np.uint8]) -> Sequence[list[Caption] | ImageError]:
        """Find the captions of each image of uint8 pixels (B, *preparation.shape), the best first.

        The list is empty if the image does not fit into memory. An image without captions for another reason gets an
        ImageError.
        """
