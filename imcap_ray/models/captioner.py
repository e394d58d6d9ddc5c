"""A model folder -> the captioner of its images, in one process. Knows nothing of Ray, and does not import torch.

B images, S pixels a side.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, overload

import numpy as np

from imcap_ray.config import AUTO, FLOAT32, INT8, SearchConfig
from imcap_ray.data.image_decoding import SquarePixels
from imcap_ray.data.image_inputs import ImageInput, is_image_input, read_image_input
from imcap_ray.errors import ConfigError, ImageError, ModelError
from imcap_ray.models.caption import ActorNeeds, Caption, no_memory
from imcap_ray.models.familiarity import Familiarity
from imcap_ray.models.model_folder import read_model_folder
from imcap_ray.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    import torch

INT8_NEEDS_CPU: Final = (
    "this model captions in int8, which is computed on CPUs: give --precision float32 to use a GPU, or "
    "--gpus-per-worker 0"
)


class Captioner(ABC):
    """A CNN, a decoder and a vocabulary. Load it once and use it often.

    >>> Captioner.load().caption(["photograph.jpg"])[0].text  # doctest: +SKIP
    'a dog runs through the grass'
    """

    precision: str
    """`float32` or `int8`. In int8 everything is computed on the CPU."""

    def __init__(
        self,
        *,
        image_size: int,
        vocabulary: Vocabulary,
        search: SearchConfig,
        familiarity: Sequence[Familiarity],
        fingerprint: str,
        name: str,
    ) -> None:
        self.image_size = image_size
        """Pixels on each side of the images that `caption_pixels` takes."""
        self.vocabulary = vocabulary
        self.search = search
        self.familiarity = familiarity
        """That of each CNN; empty if the captioner cannot tell how familiar an image is."""
        self.fingerprint = fingerprint
        self.name = name
        """The model folder, or the name of the bundled model; "" if it was not loaded from one."""
        self.num_beam_steps = 0
        """Number of positions that searches have computed so far."""

    @staticmethod
    def load(
        model: str | Path | None = None,
        *,
        device: str | torch.device | None = None,
        search: SearchConfig | None = None,
        encoder_weights: str | Path | None = None,
        precision: str = AUTO,
    ) -> Captioner:
        """Load the captioner of a model folder (path or URI), or the bundled one (None, or its name).

        Args:
            search: settings to use instead of the folder's defaults.
            encoder_weights: file with the CNN's weights, for a machine that cannot download them.
            precision: `float32`, `int8`, or `auto`: as the model folder says.

        Raises:
            ModelError: the folder is incomplete or has no networks in this precision, or the CNN's weights are not
                available or not those used in training.
            ConfigError: int8 on a GPU, or OpenVINO, which computes in int8, is not installed.
        """
        folder = read_model_folder(model)
        if folder.resolve_precision(precision) == INT8:
            if device is not None and str(device) != "cpu":
                raise ConfigError(INT8_NEEDS_CPU)
            from imcap_ray.models.int8_captioner import Int8Captioner

            return Int8Captioner(folder, search=search)
        from imcap_ray.models.torch_captioner import build_torch_captioner

        return build_torch_captioner(folder, device=device, search=search, encoder_weights=encoder_weights)

    @property
    @abstractmethod
    def compute_batch_size(self) -> int:
        """Images computed together. It is halved whenever memory runs out."""

    @property
    @abstractmethod
    def needs(self) -> ActorNeeds:
        """What a process with this captioner needs."""

    @abstractmethod
    def start(self, *, gpus: float) -> None:
        """Raise ImcapError if GPUs are reserved for this process, and cannot be used in it or by this captioner."""

    @abstractmethod
    def caption_pixels(
        self, pixels: np.ndarray[Any, Any], search: SearchConfig | None = None
    ) -> list[list[Caption] | ImageError]:
        """Find the `search.num_captions` best captions of each image of uint8 pixels (B, 3, S, S), the best first.

        The list is empty if memory runs out even for the image alone; the error to report then is `no_memory`. An image
        for which the model computes a number that is not finite gets an ImageError.

        Args:
            search: settings to use instead of the captioner's.
        """

    @property
    def preparation(self) -> SquarePixels:
        """How images become the pixels that `caption_pixels` takes."""
        return SquarePixels(self.image_size)

    @overload
    def caption(
        self, images: Iterable[ImageInput], *, num_captions: None = None, beam_size: int | None = None
    ) -> list[Caption | ImageError]: ...

    @overload
    def caption(
        self, images: Iterable[ImageInput], *, num_captions: int, beam_size: int | None = None
    ) -> list[list[Caption] | ImageError]: ...

    def caption(
        self, images: Iterable[ImageInput], *, num_captions: int | None = None, beam_size: int | None = None
    ) -> list[Caption | ImageError] | list[list[Caption] | ImageError]:
        """Find the best caption of each image; an ImageError if there is none.

        Args:
            images: paths, URIs, bytes of files, open binary files, PIL images, or uint8 arrays (H, W, 3). They are read
                a batch at a time.
            num_captions: return a list of this many captions for each image, the best first.
            beam_size: beam size to use instead of the captioner's.

        Raises:
            ConfigError: `beam_size` is out of range, or smaller than `num_captions`.
            TypeError: `images` is a single image, or one of them is none of the above.
        """
        if is_image_input(images) or not isinstance(images, Iterable):
            raise TypeError(f"expected a list of images, got one {type(images).__name__}: [image] is a list of one")
        search = override_search(self.search, num_captions=num_captions, beam_size=beam_size)
        inputs = map(self._read_pixels_or_error, images)  # reads each image as it comes, while its file is open
        results: list[list[Caption] | ImageError] = []
        while batch := list(islice(inputs, self.compute_batch_size)):
            results += self._caption_batch(batch, search)
        if num_captions is not None:
            return results
        return [result if isinstance(result, ImageError) else result[0] for result in results]

    def _read_pixels_or_error(self, image: ImageInput) -> np.ndarray[Any, Any] | ImageError:
        try:
            return self.read_pixels(image)
        except ImageError as error:
            return error

    def _caption_batch(
        self, inputs: Sequence[np.ndarray[Any, Any] | ImageError], search: SearchConfig
    ) -> list[list[Caption] | ImageError]:
        """At least one caption of each image, or an ImageError."""
        pixels = [one for one in inputs if not isinstance(one, ImageError)]
        captions = iter(self.caption_pixels(np.stack(pixels), search) if pixels else ())
        return [one if isinstance(one, ImageError) else next(captions) or no_memory() for one in inputs]

    def read_pixels(self, image: ImageInput) -> np.ndarray[Any, Any]:
        """Read an image as uint8 pixels (3, S, S); ImageError if that fails, TypeError if it is not an image."""
        return read_image_input(image, image_size=self.image_size)


def load_captioner(
    models: Sequence[str | Path] = (),
    *,
    search: SearchConfig | None = None,
    encoder_weights: str | Path | None = None,
    precision: str = AUTO,
) -> Captioner:
    """Load one or several model folders as one captioner; without any, load the bundled model.

    Several models caption together in float32.

    Args:
        search: settings to use instead of the first folder's defaults.
        precision: as in `Captioner.load`.

    Raises:
        ModelError: as in `Captioner.load`; or the models differ in vocabulary, image size or number of regions, or are
            to caption together in int8.
        ConfigError: as in `Captioner.load`.
    """
    if len(models) < 2:
        model = models[0] if models else None
        return Captioner.load(model, search=search, encoder_weights=encoder_weights, precision=precision)
    if precision == INT8:
        raise ModelError(f"several models caption together only in {FLOAT32}: give one --model, or no --precision")
    from imcap_ray.models.torch_captioner import load_ensemble

    return load_ensemble(models, search=search, encoder_weights=encoder_weights)


def override_search(search: SearchConfig, **overrides: Any) -> SearchConfig:
    """Replace the settings for which `overrides` has a value other than None.

    Raises:
        ConfigError: a value is out of range. The message names the settings as the overrides do.
    """
    try:
        return replace(search, **{name: value for name, value in overrides.items() if value is not None})
    except ConfigError as error:
        raise ConfigError(str(error).replace("search.", "")) from error
