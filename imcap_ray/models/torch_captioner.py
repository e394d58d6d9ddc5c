"""Images -> captions in floating point, on a CPU or a GPU, by torch.

B images, S pixels a side, R regions, F channels.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from imcap_ray.config import FLOAT32, SearchConfig
from imcap_ray.data.image_inputs import ImageInput
from imcap_ray.errors import ImageError, InputError, ModelError
from imcap_ray.models.batching import FixedBatches
from imcap_ray.models.beam_search import beam_search
from imcap_ray.models.caption import ActorNeeds, Caption, no_memory, not_finite
from imcap_ray.models.captioner import Captioner
from imcap_ray.models.decoders import AttentionDecoder, Decoder, DecoderEnsemble, State, build_decoder, next_tokens
from imcap_ray.models.devices import choose_device, require_cuda
from imcap_ray.models.encoders import Encoder, EncoderEnsemble, build_encoder, describe_difference
from imcap_ray.models.familiarity import Familiarity, mean_familiarity
from imcap_ray.models.inference_optimization import optimize_for_inference
from imcap_ray.models.model_files import CONFIG_FILE, WEIGHTS_FILE
from imcap_ray.models.model_folder import ModelFolder, read_model_folder
from imcap_ray.models.model_weights import select_tensors
from imcap_ray.text.tokenizers import tokenize_words
from imcap_ray.text.vocabulary import END_ID, START_ID, SUPPRESSED_TOKEN_IDS, Vocabulary

AnyEncoder: TypeAlias = Encoder | EncoderEnsemble


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


class TorchCaptioner(Captioner):
    """A captioner in float32, or in float16 on a GPU, of one model or of several that caption together."""

    precision = FLOAT32

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
        super().__init__(
            image_size=encoder.image_size,
            vocabulary=vocabulary,
            search=search,
            familiarity=familiarity,
            fingerprint=fingerprint,
            name=name,
        )
        self.device = torch.device(device or choose_device(gpus=0))
        self._trained_encoder = encoder.eval()
        self._trained_decoder = decoder.eval()
        self._batches = FixedBatches(encoder.image_size, self.device)

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} {self.name or self.fingerprint[:12]}: {self.image_size} x {self.image_size} "
            f"pixels, {len(self.vocabulary):,} tokens, {self.search}, on {self.device}>"
        )

    def start(self, *, gpus: float) -> None:
        """As `Captioner.start`."""
        if gpus:
            require_cuda()

    @property
    def needs(self) -> ActorNeeds:
        """As `Captioner.needs`."""
        return ActorNeeds()

    @property
    def compute_batch_size(self) -> int:
        """As `Captioner.compute_batch_size`."""
        return self._batches.size

    # Encoder and decoder are moved to the device and optimized on first use: a process that only reads a captioner's
    # settings must not take GPU memory from the ones that caption.

    @cached_property
    def encoder(self) -> AnyEncoder:
        """The CNN, or several of them."""
        return optimize_for_inference(self._trained_encoder, self.device).to(self.device)

    @cached_property
    def decoder(self) -> Decoder | DecoderEnsemble:
        """The decoder, or several of them. Its weights must not change any more."""
        decoder = self._trained_decoder.to(self.device)
        decoder.freeze()
        return decoder

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
        """As `Captioner.caption_pixels`."""
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


def load_torch_captioner(
    model: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    search: SearchConfig | None = None,
    encoder_weights: str | Path | None = None,
) -> TorchCaptioner:
    """Load a captioner in float32, whatever the folder's default is; arguments and errors as in `Captioner.load`."""
    return build_torch_captioner(
        read_model_folder(model), device=device, search=search, encoder_weights=encoder_weights
    )


def build_torch_captioner(
    folder: ModelFolder,
    *,
    device: str | torch.device | None = None,
    search: SearchConfig | None = None,
    encoder_weights: str | Path | None = None,
) -> TorchCaptioner:
    """The captioner of a model folder that has been read; ModelError as in `Captioner.load`."""
    encoder = load_encoder(folder, encoder_weights)
    return TorchCaptioner(
        encoder=encoder,
        decoder=load_decoder(folder, num_channels=encoder.num_channels),
        vocabulary=folder.vocabulary,
        search=search or folder.search,
        familiarity=[folder.familiarity] if folder.familiarity else (),
        device=device,
        fingerprint=folder.fingerprint,
        name=folder.name,
    )


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


def load_decoder(folder: ModelFolder, *, num_channels: int) -> Decoder:
    """Load the decoder of a model folder, for a CNN with this many channels; raises ModelError as `Captioner.load`."""
    decoder = build_decoder(folder.decoder, num_channels=num_channels, vocabulary_size=folder.vocabulary_size)
    weights = select_tensors("decoder.", folder.tensors)
    if reason := describe_difference(decoder.state_dict(), weights):  # the CNN's features have another shape
        raise ModelError(f"{folder.location}: {WEIGHTS_FILE} and {CONFIG_FILE} do not match: {reason}")
    decoder.load_state_dict(weights)
    return decoder


def load_ensemble(
    models: Sequence[str | Path], *, search: SearchConfig | None = None, encoder_weights: str | Path | None = None
) -> TorchCaptioner:
    """Load several models as one captioner, as `load_captioner` does. Models with the same CNN share it."""
    loaded = [load_torch_captioner(model, search=search, encoder_weights=encoder_weights) for model in models]
    first = loaded[0]
    encoders: list[Encoder] = []
    familiarity: list[Familiarity] = []
    members: list[tuple[Decoder, Encoder]] = []
    for model, captioner in zip(models, loaded, strict=True):
        encoder, decoder = captioner._trained_encoder, captioner._trained_decoder
        assert isinstance(encoder, Encoder) and isinstance(decoder, Decoder)
        for property, is_same in (
            ("vocabulary", captioner.vocabulary.tokens == first.vocabulary.tokens),
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
    return TorchCaptioner(
        encoder=EncoderEnsemble(encoders),
        decoder=DecoderEnsemble([decoder for decoder, _ in members], [channels[encoder] for _, encoder in members]),
        vocabulary=first.vocabulary,
        search=first.search,
        familiarity=familiarity if len(familiarity) == len(encoders) else (),
        fingerprint=hashlib.sha256("".join(captioner.fingerprint for captioner in loaded).encode()).hexdigest(),
        name=" + ".join(captioner.name for captioner in loaded),
    )


def _have_same_features(first: Encoder, second: Encoder) -> bool:
    """Whether both compute the same features; False if the hash of the weights is unknown."""
    return (
        bool(first.weights.sha256)
        and first.weights == second.weights
        and first.num_channels == second.num_channels
        and torch.equal(first.mean, second.mean)
        and torch.equal(first.std, second.std)
    )
