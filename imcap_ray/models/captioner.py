"""Image bytes -> captions on one machine; saves and loads the model folder. Knows nothing of Ray.

B images, S pixels a side, R regions, F channels.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imcap_ray import storage
from imcap_ray.config import SearchConfig
from imcap_ray.data.image_decoding import decode_image
from imcap_ray.data.image_errors import MAX_FILE_BYTES, image_error_from_os_error
from imcap_ray.errors import ImageError, InputError, ModelError
from imcap_ray.models.batching import FixedBatches
from imcap_ray.models.beam_search import State, beam_search
from imcap_ray.models.caption import Caption, no_memory, not_finite
from imcap_ray.models.decoders import AttentionDecoder, Decoder, DecoderEnsemble, build_decoder
from imcap_ray.models.devices import choose_device, require_cuda
from imcap_ray.models.encoders import Encoder, EncoderEnsemble, build_encoder, difference
from imcap_ray.models.inference_optimization import optimize_for_inference
from imcap_ray.models.model_folder import CONFIG_FILE, WEIGHTS_FILE, below, read_model_folder
from imcap_ray.text.tokenizers import tokenize
from imcap_ray.text.vocabulary import END_ID, START_ID, SUPPRESSED_TOKEN_IDS, Vocabulary

_log = logging.getLogger(__name__)


@torch.inference_mode()
def search_captions(
    decoder: Decoder | DecoderEnsemble,
    vocabulary: Vocabulary,
    features: Tensor,
    search: SearchConfig,
    *,
    on_step: Callable[[], None] = lambda: None,
) -> list[list[Caption]]:
    """For each image of `features` (B, R, F) its `search.num_captions` best captions, the best first; none where the
    decoder computes no finite probability.

    Args:
        on_step: called at every position that is computed.
    """
    step, state = decoder.start(features, search.beam_size)

    def told_step(tokens: Tensor, state: State) -> tuple[Tensor, State]:
        on_step()
        return step(tokens, state)

    found = beam_search(
        told_step,
        state,
        start_id=START_ID,
        end_id=END_ID,
        beam_size=search.beam_size,
        max_length=search.max_length,
        length_penalty=search.length_penalty,
        num_captions=search.num_captions,
        forbidden_ids=SUPPRESSED_TOKEN_IDS,
    )
    return [
        [
            Caption(text=vocabulary.to_text(one.token_ids), logprob=one.logprob, num_tokens=one.num_tokens)
            for one in hypotheses
        ]
        for hypotheses in found
    ]


@dataclass(frozen=True, slots=True)
class WordAttention:
    """Where the decoder looked before it said a word."""

    word: str
    weights: np.ndarray[Any, Any]
    """(rows, columns) of the grid that the CNN lays over the image; they sum to 1."""


class Captioner:
    """A CNN, an LSTM and a vocabulary: loaded once, used often.

    >>> Captioner.load().caption(["photograph.jpg"])[0].text  # doctest: +SKIP
    'a dog runs through the grass'
    """

    def __init__(
        self,
        *,
        encoder: Encoder | EncoderEnsemble,
        decoder: Decoder | DecoderEnsemble,
        vocabulary: Vocabulary,
        search: SearchConfig,
        device: str | torch.device | None = None,
        fingerprint: str = "",
    ) -> None:
        self.device = torch.device(device) if device else choose_device(gpus=0)
        self.image_size = encoder.image_size
        """Pixels on each side of what `caption_pixels` takes."""
        self._trained_encoder = encoder.eval()
        self._trained_decoder = decoder.eval()
        self.vocabulary = vocabulary
        self.search = search
        self.fingerprint = fingerprint
        self._batches = FixedBatches(encoder.image_size, self.device)
        self.num_beam_steps = 0
        """Positions that searches have computed so far."""

    def require_gpu(self) -> None:
        """Raise ImcapError if CUDA cannot be used in this process."""
        require_cuda()

    @property
    def compute_batch_size(self) -> int:
        """Images computed together: half as many, once or more often, after memory has run out."""
        return self._batches.size

    # Both are brought to their device, and made fast, when they are used first. For many only ask what a captioner is,
    # and would take the memory of a GPU from those that caption.

    @cached_property
    def encoder(self) -> Encoder | EncoderEnsemble:
        """The CNN, or several."""
        return optimize_for_inference(self._trained_encoder, self.device).to(self.device)

    @cached_property
    def decoder(self) -> Decoder | DecoderEnsemble:
        """The decoder, or several; its weights must not change any more."""
        decoder = self._trained_decoder.to(self.device)
        decoder.freeze()
        return decoder

    @classmethod
    def load(
        cls,
        model: str | Path | None = None,
        *,
        device: str | torch.device | None = None,
        search: SearchConfig | None = None,
        encoder_weights: str | Path | None = None,
    ) -> Captioner:
        """The captioner of a model folder (path or URI), or of the one in the package (None, or its name).

        Args:
            search: instead of the folder's defaults.
            encoder_weights: the CNN's weights, for a machine that cannot get them by itself.

        Raises:
            ModelError: the folder is not whole, or the CNN's weights cannot be had or are others than in training.
        """
        folder = read_model_folder(model)
        inside = below("encoder.", folder.tensors)
        try:
            encoder = build_encoder(
                folder.encoder,
                folder.preprocessing,
                weights_path=None if inside else encoder_weights,
                expected=folder.encoder_weights,
                tensors=inside or None,
            )
        except InputError as error:
            raise ModelError(f"{folder.location}: {error}") from error
        decoder = build_decoder(
            folder.decoder, num_channels=encoder.num_channels, vocabulary_size=folder.vocabulary_size
        )
        weights = below("decoder.", folder.tensors)
        if reason := difference(decoder.state_dict(), weights):  # its features are others than in training
            raise ModelError(f"{folder.location}: {WEIGHTS_FILE} and {CONFIG_FILE} do not match: {reason}")
        decoder.load_state_dict(weights)
        return cls(
            encoder=encoder,
            decoder=decoder,
            vocabulary=folder.vocabulary,
            search=search or folder.search,
            device=device,
            fingerprint=folder.fingerprint,
        )

    def caption(self, images: Sequence[str | Path | bytes]) -> list[Caption | ImageError]:
        """The best caption of each image (a path, a URI, or the file's bytes); an ImageError where there is none.

        Raises:
            TypeError: `images` is one image and not several, or has something else among them.
        """
        if isinstance(images, str | bytes | Path):
            raise TypeError(f"expected a list of images, got one {type(images).__name__}: [image] is a list of one")
        for image in images:
            if not isinstance(image, str | bytes | Path):
                raise TypeError(f"expected a path, a URI or a file's bytes, got {type(image).__name__}")
        pixels, errors = [], {}
        for number, image in enumerate(images):
            try:
                pixels.append(self.read_pixels(image))
            except ImageError as error:
                errors[number] = error
        found = iter(self.caption_pixels(np.stack(pixels))) if pixels else iter(())
        captions: list[Caption | ImageError] = []
        for number in range(len(images)):
            answer = errors[number] if number in errors else next(found)
            captions.append(answer if isinstance(answer, ImageError) else answer[0] if answer else no_memory())
        return captions

    def read_pixels(self, image: str | Path | bytes) -> np.ndarray[Any, Any]:
        """The image as uint8 pixels (3, S, S), or ImageError."""
        if isinstance(image, bytes):
            return decode_image(image, image_size=self.image_size).pixels
        try:
            data = storage.read_bytes(str(image), max_bytes=MAX_FILE_BYTES)
        except OSError as error:
            raise image_error_from_os_error(error, str(image)) from error
        return decode_image(data, image_size=self.image_size).pixels

    def encode(self, pixels: np.ndarray[Any, Any] | Tensor) -> Tensor:
        """Features (B, R, F) of uint8 pixels (B, 3, S, S), on the CPU; ImageError when memory runs out."""
        encoded = []
        for features, count in self._batches.compute(pixels, self._encode):
            if features is None:
                raise no_memory()
            encoded.append(features[:count].cpu())
        return torch.cat(encoded)

    def caption_pixels(self, pixels: np.ndarray[Any, Any] | Tensor) -> list[list[Caption] | ImageError]:
        """The `search.num_captions` best captions of each image of uint8 pixels (B, 3, S, S), the best first.

        An image for which memory runs out, though it is computed alone, has none: `no_memory` is the error to report.
        One for which the model computes numbers that are not finite has the error.
        """
        captions: list[list[Caption] | ImageError] = []
        for found, count in self._batches.compute(pixels, self._search):
            captions.extend([[] for _ in range(count)] if found is None else found[:count])
        return captions

    @torch.inference_mode()
    def attend(self, image: str | Path | bytes, caption: str | None = None) -> list[WordAttention]:
        """Where the decoder looks for each word of the caption; of its own best one, where none is given.

        A word that is not in the vocabulary is one that it could not have said; it is read as unknown.

        Raises:
            ImageError: the image cannot be read, or memory runs out.
            ModelError: this model has no attention over a grid, or is several models.
        """
        decoder = self.decoder
        if not isinstance(decoder, AttentionDecoder):
            kind = "models that caption together" if isinstance(decoder, DecoderEnsemble) else "a decoder without it"
            raise ModelError(f"attention is that of one model with an attention decoder, these are {kind}")
        pixels = self.read_pixels(image)[None]
        if caption is None:
            captions = self.caption_pixels(pixels)[0]
            if isinstance(captions, ImageError):
                raise captions
            if not captions:
                raise no_memory()
            caption = captions[0].text
        features = self.encode(pixels)[0]
        side = math.isqrt(len(features))
        if side * side != len(features):
            raise ModelError(f"the CNN's {len(features)} regions are no square grid")
        words = tokenize(caption, self.vocabulary.tokenizer)
        ids = torch.tensor(self.vocabulary.to_ids(caption, max_length=len(words)), device=self.device)
        weights = decoder.attention(features.to(self.device), ids[:-1]).reshape(-1, side, side).cpu().numpy()
        return [WordAttention(*pair) for pair in zip(words, weights[:-1], strict=True)]  # the last is of the end

    @torch.inference_mode()
    def _encode(self, chunk: Tensor) -> Tensor:
        features: Tensor = self.encoder(chunk)
        return features

    def _search(self, chunk: Tensor) -> list[list[Caption] | ImageError]:
        features = self._encode(chunk)
        found = search_captions(self.decoder, self.vocabulary, features, self.search, on_step=self._count_step)
        is_finite = torch.isfinite(features).flatten(1).all(1).tolist()
        return [
            not_finite("features") if not good else captions or not_finite("words' probabilities")
            for good, captions in zip(is_finite, found, strict=True)
        ]

    def _count_step(self) -> None:
        self.num_beam_steps += 1


def load_captioner(
    models: Sequence[str | Path] = (),
    *,
    search: SearchConfig | None = None,
    encoder_weights: str | Path | None = None,
) -> Captioner:
    """The captioner of these model folders together; of one, that one; of none, the one that comes with the package.

    Models with the same CNN share it.

    Args:
        search: instead of the first folder's defaults.

    Raises:
        ModelError: as `Captioner.load`, or the models do not speak the same words or see images differently.
    """
    loaded = [Captioner.load(model, search=search, encoder_weights=encoder_weights) for model in models or (None,)]
    first = loaded[0]
    if len(loaded) == 1:
        return first
    encoders: list[Encoder] = []
    members: list[tuple[Decoder, Encoder]] = []
    for model, captioner in zip(models, loaded, strict=True):
        encoder, decoder = captioner._trained_encoder, captioner._trained_decoder
        assert isinstance(encoder, Encoder) and isinstance(decoder, Decoder)
        for what, is_same in (
            ("vocabulary", captioner.vocabulary.tokens == first.vocabulary.tokens),
            ("image size", encoder.image_size == first.image_size),
            ("number of regions", not encoders or encoder.num_regions == encoders[0].num_regions),
        ):
            if not is_same:
                raise ModelError(f"{model} and {models[0]} cannot caption together: they differ in their {what}")
        known = next((other for other in encoders if _see_alike(encoder, other)), None)
        if known is None:
            encoders.append(encoder)
        members.append((decoder, known or encoder))
    channels, end = {}, 0
    for encoder in encoders:
        channels[encoder] = slice(end, end := end + encoder.num_channels)
    return Captioner(
        encoder=EncoderEnsemble(encoders),
        decoder=DecoderEnsemble([decoder for decoder, _ in members], [channels[encoder] for _, encoder in members]),
        vocabulary=first.vocabulary,
        search=first.search,
        fingerprint=hashlib.sha256("".join(captioner.fingerprint for captioner in loaded).encode()).hexdigest(),
    )


def _see_alike(one: Encoder, other: Encoder) -> bool:
    """Whether both give the same features; never where the hash of the weights is not known."""
    return (
        bool(one.weights.sha256)
        and one.weights == other.weights
        and one.num_channels == other.num_channels
        and torch.equal(one.mean, other.mean)
        and torch.equal(one.std, other.std)
    )


def override_search(search: SearchConfig, **overrides: Any) -> SearchConfig:
    """The same settings with those of `overrides` that are not None."""
    return replace(search, **{name: value for name, value in overrides.items() if value is not None})
