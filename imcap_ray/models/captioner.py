"""Images -> captions, in one process. Knows nothing of Ray.

B images, S pixels a side, R regions, F channels.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, Final, TypeAlias, overload

import numpy as np
import torch
from torch import Tensor

from imcap_ray.config import AUTO, DEFAULT_MODEL, FLOAT32, INT8, SearchConfig
from imcap_ray.data.image_decoding import SquarePixels
from imcap_ray.data.image_inputs import ImageInput, is_image_input, read_image_input
from imcap_ray.errors import ConfigError, ImageError, InputError, ModelError
from imcap_ray.models.batching import FixedBatches
from imcap_ray.models.beam_search import beam_search
from imcap_ray.models.caption import ActorNeeds, Caption, no_memory, not_finite
from imcap_ray.models.decoders import AttentionDecoder, Decoder, DecoderEnsemble, State, build_decoder, next_tokens
from imcap_ray.models.devices import choose_device, require_cuda
from imcap_ray.models.encoders import Encoder, EncoderEnsemble, build_encoder, describe_difference
from imcap_ray.models.familiarity import Familiarity, mean_familiarity
from imcap_ray.models.inference_optimization import optimize_for_inference
from imcap_ray.models.model_folder import CONFIG_FILE, WEIGHTS_FILE, ModelFolder, read_model_folder, select_tensors
from imcap_ray.models.quantized_encoder import QuantizedEncoder
from imcap_ray.text.tokenizers import tokenize_words
from imcap_ray.text.vocabulary import END_ID, START_ID, SUPPRESSED_TOKEN_IDS, Vocabulary

AnyEncoder: TypeAlias = Encoder | QuantizedEncoder | EncoderEnsemble

_INT8_NEEDS_CPU: Final = (
    "this model captions in int8, which is computed on CPUs: give --precision float32 to use a GPU, or "
    "--gpus-per-worker 0"
)

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
    """Find the `search.num_captions` best captions of each image of `features` (B, R, F), the best first.

    The list is empty where the decoder computes no finite probability.

    Args:
        on_step: called at every position of the search.
    """
    step, state = decoder.start(features, search.beam_size)

    def counted_step(tokens: Tensor, state: State) -> tuple[Tensor, State]:
        on_step()
        return step(tokens, state)

    candidates = next_tokens(
        counted_step,
        state,
        num_candidates=search.beam_size,
        end_id=END_ID,
        forbidden_ids=SUPPRESSED_TOKEN_IDS,
    )
    results = beam_search(candidates, num_images=len(features), search=search, start_id=START_ID, end_id=END_ID)
    return [
        [
            Caption(
                text=vocabulary.to_text(hypothesis.token_ids),
                logprob=hypothesis.logprob,
                num_tokens=hypothesis.num_tokens,
            )
            for hypothesis in hypotheses
        ]
        for hypotheses in results
    ]


@dataclass(frozen=True, slots=True)
class WordAttention:
    """The decoder's attention over the image when it predicts a word."""

    word: str
    weights: np.ndarray[Any, Any]
    """(rows, columns) of the CNN's grid over the image; they sum to 1."""


class Captioner:
    """A CNN, a decoder and a vocabulary. Load it once and use it often.

    >>> Captioner.load().caption(["photograph.jpg"])[0].text  # doctest: +SKIP
    'a dog runs through the grass'
    """

    def __init__(
        self,
        *,
        encoder: AnyEncoder,
        decoder: Decoder | DecoderEnsemble,
        vocabulary: Vocabulary,
        search: SearchConfig,
        familiarity: Sequence[Familiarity] = (),
        device: str | torch.device | None = None,
        fingerprint: str = "",
        name: str = "",
    ) -> None:
        self.name = name
        """The model folder, or the name of the bundled model; "" if it was not loaded from one."""
        self.precision = INT8 if any(isinstance(part, QuantizedEncoder) for part in encoder.modules()) else FLOAT32
        """`float32` or `int8`: the precision of the CNN. In int8 everything is computed on the CPU."""
        self.device = torch.device(device or ("cpu" if self.precision == INT8 else choose_device(gpus=0)))
        if self.precision == INT8 and self.device.type != "cpu":
            raise ConfigError(_INT8_NEEDS_CPU)
        self.image_size = encoder.image_size
        """Pixels on each side of the images that `caption_pixels` takes."""
        self._trained_encoder = encoder.eval()
        self._trained_decoder = decoder.eval()
        self.vocabulary = vocabulary
        self.search = search
        self.familiarity = familiarity
        """That of each CNN; empty if the captioner cannot tell how familiar an image is."""
        self.fingerprint = fingerprint
        self._batches = FixedBatches(encoder.image_size, self.device)
        self.num_beam_steps = 0
        """Number of positions that searches have computed so far."""

    def __repr__(self) -> str:
        return (
            f"<Captioner {self.name or self.fingerprint[:12]}: {self.image_size} x {self.image_size} pixels, "
            f"{len(self.vocabulary):,} tokens, {self.search}, on {self.device}>"
        )

    def start(self, *, gpus: float) -> None:
        """Raise ImcapError if GPUs are reserved for this process, and cannot be used in it or by this captioner."""
        if gpus and self.precision == INT8:
            raise ConfigError(_INT8_NEEDS_CPU)
        if gpus:
            require_cuda()

    @property
    def preparation(self) -> SquarePixels:
        """How images become the pixels that `caption_pixels` takes."""
        return SquarePixels(self.image_size)

    @property
    def needs(self) -> ActorNeeds:
        """What a process with this captioner needs."""
        return ActorNeeds(gpus=0 if self.precision == INT8 else None)

    @property
    def compute_batch_size(self) -> int:
        """Images computed together. It is halved whenever memory runs out."""
        return self._batches.size

    # Encoder and decoder are moved to the device and optimized on first use: a process that only reads a captioner's
    # settings must not take GPU memory from the ones that caption.

    @cached_property
    def encoder(self) -> AnyEncoder:
        """The CNN, or several of them."""
        if self.precision == INT8:
            return self._trained_encoder
        assert not isinstance(self._trained_encoder, QuantizedEncoder)
        return optimize_for_inference(self._trained_encoder, self.device).to(self.device)

    @cached_property
    def decoder(self) -> Decoder | DecoderEnsemble:
        """The decoder, or several of them. Its weights must not change any more."""
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
        precision: str = AUTO,
    ) -> Captioner:
        """Load the captioner of a model folder (path or URI), or the bundled one (None, or its name).

        Args:
            search: settings to use instead of the folder's defaults.
            encoder_weights: file with the CNN's weights, for a machine that cannot download them.
            precision: `float32`, `int8`, or `auto`: as the model folder says.

        Raises:
            ModelError: the folder is incomplete or has no CNN in this precision, or the CNN's weights are not available
                or not those used in training.
            ConfigError: OpenVINO, which computes in int8, is not installed.
        """
        folder = read_model_folder(model)
        precision = folder.resolve_precision(precision)
        encoder = _load_int8_encoder(folder) if precision == INT8 else load_encoder(folder, encoder_weights)
        decoder = build_decoder(
            folder.decoder, num_channels=encoder.num_channels, vocabulary_size=folder.vocabulary_size
        )
        weights = select_tensors("decoder.", folder.tensors)
        if reason := describe_difference(decoder.state_dict(), weights):  # the CNN's features have another shape
            raise ModelError(f"{folder.location}: {WEIGHTS_FILE} and {CONFIG_FILE} do not match: {reason}")
        decoder.load_state_dict(weights)
        familiarity = folder.int8.familiarity if precision == INT8 and folder.int8 else folder.familiarity
        return cls(
            encoder=encoder,
            decoder=decoder,
            vocabulary=folder.vocabulary,
            search=search or folder.search,
            familiarity=[familiarity] if familiarity else (),
            device=device,
            fingerprint=folder.fingerprint_in(precision),
            name=DEFAULT_MODEL if model in (None, DEFAULT_MODEL) else folder.location,
        )

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

    def encode(self, pixels: np.ndarray[Any, Any] | Tensor) -> Tensor:
        """Compute the features (B, R, F) of uint8 pixels (B, 3, S, S), on the CPU; ImageError if memory runs out."""
        encoded = []
        for features, count in self._batches.compute(pixels, self._encode):
            if features is None:
                raise no_memory()
            encoded.append(features[:count].cpu())
        return torch.cat(encoded)

    def caption_pixels(
        self, pixels: np.ndarray[Any, Any] | Tensor, search: SearchConfig | None = None
    ) -> list[list[Caption] | ImageError]:
        """Find the `search.num_captions` best captions of each image of uint8 pixels (B, 3, S, S), the best first.

        The list is empty if memory runs out even for the image alone; the error to report then is `no_memory`. An image
        for which the model computes a number that is not finite gets an ImageError.

        Args:
            search: settings to use instead of the captioner's.
        """
        captions: list[list[Caption] | ImageError] = []
        for results, count in self._batches.compute(pixels, partial(self._search, search=search or self.search)):
            captions.extend([[] for _ in range(count)] if results is None else results[:count])
        return captions

    @torch.inference_mode()
    def attend(self, image: ImageInput, caption: str | None = None) -> list[WordAttention]:
        """Compute the attention for each word of the caption, by default the model's own best one.

        A word that is not in the vocabulary counts as unknown.

        Raises:
            ImageError: the image cannot be read, or memory runs out.
            ModelError: this model has no attention over a square grid, or consists of several models.
        """
        decoder = self.decoder
        if not isinstance(decoder, AttentionDecoder):
            kind = "several models" if isinstance(decoder, DecoderEnsemble) else "another decoder"
            raise ModelError(f"attention needs a single model with an attention decoder, got {kind}")
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
            raise ModelError(f"attention needs a square grid of regions, got {len(features)} regions")
        words = tokenize_words(caption, self.vocabulary.tokenizer)
        ids = torch.tensor(self.vocabulary.to_ids(caption, max_length=len(words)), device=self.device)
        weights = decoder.attention(features.to(self.device), ids[:-1]).reshape(-1, side, side).cpu().numpy()
        return [
            WordAttention(*pair) for pair in zip(words, weights[:-1], strict=True)
        ]  # the last ones are the end token's

    @torch.inference_mode()
    def _encode(self, chunk: Tensor) -> Tensor:
        features: Tensor = self.encoder(chunk)
        return features

    def _search(self, chunk: Tensor, search: SearchConfig) -> list[list[Caption] | ImageError]:
        features = self._encode(chunk)
        results = search_captions(self.decoder, self.vocabulary, features, search, on_step=self._count_step)
        are_finite = torch.isfinite(features).flatten(1).all(1).tolist()
        familiarity = self._familiarity_of(features)
        return [
            ([replace(caption, familiarity=familiar) for caption in captions] or not_finite("words' probabilities"))
            if is_finite
            else not_finite("features")
            for is_finite, familiar, captions in zip(are_finite, familiarity, results, strict=True)
        ]

    def _familiarity_of(self, features: Tensor) -> list[float]:
        """Familiarity of images with these features (B, R, F); NaN if it is unknown."""
        if not self.familiarity:
            return [math.nan] * len(features)
        familiarity: list[float] = mean_familiarity(self.familiarity, features.float().mean(1).cpu().numpy()).tolist()
        return familiarity

    def _count_step(self) -> None:
        self.num_beam_steps += 1


def load_encoder(folder: ModelFolder, encoder_weights: str | Path | None = None) -> Encoder:
    """Load the CNN of a model folder in float32; raises ModelError as `Captioner.load`."""
    cnn_tensors = select_tensors("encoder.", folder.tensors)
    try:
        return build_encoder(
            folder.encoder,
            folder.preprocessing,
            weights_path=None if cnn_tensors else encoder_weights,
            expected=folder.encoder_weights,
            tensors=cnn_tensors or None,
        )
    except InputError as error:
        raise ModelError(f"{folder.location}: {error}") from error


def _load_int8_encoder(folder: ModelFolder) -> QuantizedEncoder:
    assert folder.int8 and folder.preprocessing.image_size
    try:
        return QuantizedEncoder(folder.int8.network, image_size=folder.preprocessing.image_size)
    except ModelError as error:
        raise ModelError(f"{folder.location}: {error}") from error


def load_captioner(
    models: Sequence[str | Path] = (),
    *,
    search: SearchConfig | None = None,
    encoder_weights: str | Path | None = None,
    precision: str = AUTO,
) -> Captioner:
    """Load one or several model folders as one captioner; without any, load the bundled model.

    Models with the same CNN share it.

    Args:
        search: settings to use instead of the first folder's defaults.
        precision: as in `Captioner.load`.

    Raises:
        ModelError: as in `Captioner.load`, or the models differ in vocabulary, image size, number of regions or
            precision.
        ConfigError: as in `Captioner.load`.
    """
    loaded = [
        Captioner.load(model, search=search, encoder_weights=encoder_weights, precision=precision)
        for model in models or (None,)
    ]
    first = loaded[0]
    if len(loaded) == 1:
        return first
    encoders: list[Encoder | QuantizedEncoder] = []
    familiarity: list[Familiarity] = []
    members: list[tuple[Decoder, Encoder | QuantizedEncoder]] = []
    for model, captioner in zip(models, loaded, strict=True):
        encoder, decoder = captioner._trained_encoder, captioner._trained_decoder
        assert isinstance(encoder, Encoder | QuantizedEncoder) and isinstance(decoder, Decoder)
        for property, is_same in (
            ("vocabulary", captioner.vocabulary.tokens == first.vocabulary.tokens),
            ("precision", captioner.precision == first.precision),
            ("image size", encoder.image_size == first.image_size),
            ("number of regions", not encoders or encoder.num_regions == encoders[0].num_regions),
        ):
            if not is_same:
                raise ModelError(f"{model} and {models[0]} cannot caption together: they differ in their {property}")
        known = next((other for other in encoders if _have_same_features(encoder, other)), None)
        if known is None:
            encoders.append(encoder)
            familiarity += captioner.familiarity
        members.append((decoder, known or encoder))
    channels, end = {}, 0
    for encoder in encoders:
        channels[encoder] = slice(end, end := end + encoder.num_channels)
    return Captioner(
        encoder=EncoderEnsemble(encoders),
        decoder=DecoderEnsemble([decoder for decoder, _ in members], [channels[encoder] for _, encoder in members]),
        vocabulary=first.vocabulary,
        search=first.search,
        familiarity=familiarity if len(familiarity) == len(encoders) else (),
        fingerprint=hashlib.sha256("".join(captioner.fingerprint for captioner in loaded).encode()).hexdigest(),
        name=" + ".join(captioner.name for captioner in loaded),
    )


def _have_same_features(first: Encoder | QuantizedEncoder, second: Encoder | QuantizedEncoder) -> bool:
    """Whether both compute the same features; False if the hash of the weights is unknown."""
    if isinstance(first, QuantizedEncoder) or isinstance(second, QuantizedEncoder):
        return first.weights == second.weights
    return (
        bool(first.weights.sha256)
        and first.weights == second.weights
        and first.num_channels == second.num_channels
        and torch.equal(first.mean, second.mean)
        and torch.equal(first.std, second.std)
    )


def override_search(search: SearchConfig, **overrides: Any) -> SearchConfig:
    """Replace the settings for which `overrides` has a value other than None.

    Raises:
        ConfigError: a value is out of range. The message names the settings as the overrides do.
    """
    try:
        return replace(search, **{name: value for name, value in overrides.items() if value is not None})
    except ConfigError as error:
        raise ConfigError(str(error).replace("search.", "")) from error
