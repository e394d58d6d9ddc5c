"""Images -> captions in int8 on a CPU, by OpenVINO. Does not import torch.

Sums of int8 products are exact integers, so their order does not matter: the caption of an image does not depend on the
batch or the number of threads, and its features not on the processor either, as far as x86 with AVX2 or more goes
(others are not tested). CNNs that average or multiply activations, such as squeeze-and-excitation, compute that part of
their features in floating point, as every decoder does with attention and probabilities.

B images, S pixels a side, F channels, K beams, V vocabulary.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from imcap_ray.config import INT8, SearchConfig
from imcap_ray.errors import ConfigError, ImageError, ModelError
from imcap_ray.models.beam_search import Candidates, Floats, Ints, beam_search
from imcap_ray.models.caption import ActorNeeds, Caption, compute_batch_size, not_finite
from imcap_ray.models.captioner import INT8_NEEDS_CPU, Captioner
from imcap_ray.models.familiarity import mean_familiarity
from imcap_ray.models.model_folder import ModelFolder, Network
from imcap_ray.text.vocabulary import END_ID, START_ID, SUPPRESSED_TOKEN_IDS

_KERNELS: Final = "AVX512_CORE_VNNI"
"""The newest instructions that are used. Kernels for AMX, which newer Intel processors have, would take an eighth less
time, but they round differently from all others: 7 % of the bundled model's features would be others."""


class Int8Captioner(Captioner):
    """A captioner in int8.

    Raises:
        ConfigError: OpenVINO is not installed.
        ModelError: a network is corrupt, or does not fit the folder's settings.
    """

    precision = INT8

    def __init__(self, folder: ModelFolder, *, search: SearchConfig | None = None) -> None:
        assert folder.int8
        familiarity = folder.int8.familiarity
        super().__init__(
            image_size=folder.preprocessing.image_size or 0,
            vocabulary=folder.vocabulary,
            search=search or folder.search,
            familiarity=[familiarity] if familiarity else (),
            fingerprint=folder.fingerprint_in(INT8),
            name=folder.name,
        )
        try:
            self.networks = Int8Networks(folder.int8.image, folder.int8.step, vocabulary_size=folder.vocabulary_size)
            if self.networks.image_size != self.image_size:
                raise ModelError(
                    f"the network in int8 must take images of {self.image_size} x {self.image_size} pixels, got "
                    f"{self.networks.image_size}"
                )
        except ModelError as error:
            raise ModelError(f"{folder.location}: {error}") from error

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} {self.name}: {self.image_size} x {self.image_size} pixels, "
            f"{len(self.vocabulary):,} tokens, {self.search}>"
        )

    def start(self, *, gpus: float) -> None:
        """As `Captioner.start`."""
        if gpus:
            raise ConfigError(INT8_NEEDS_CPU)

    @property
    def needs(self) -> ActorNeeds:
        """As `Captioner.needs`."""
        return ActorNeeds(gpus=0, no_gpus=INT8_NEEDS_CPU)

    @property
    def compute_batch_size(self) -> int:
        """As `Captioner.compute_batch_size`."""
        return compute_batch_size(on_gpu=False)

    def caption_pixels(
        self, pixels: npt.NDArray[np.uint8], search: SearchConfig | None = None
    ) -> list[list[Caption] | ImageError]:
        """As `Captioner.caption_pixels`."""
        expected = (3, self.image_size, self.image_size)
        if pixels.shape[1:] != expected:
            raise ValueError(f"pixels must be (B, {', '.join(map(str, expected))}), got {pixels.shape}")
        captions: list[list[Caption] | ImageError] = []
        while len(captions) < len(pixels):
            batch = pixels[len(captions) : len(captions) + self.compute_batch_size]
            captions += self._compute(batch, search or self.search)
        return captions

    def _compute(self, pixels: npt.NDArray[np.uint8], search: SearchConfig) -> list[list[Caption] | ImageError]:
        features, *memory = self.networks.encode(pixels)
        beams = BeamState(self.networks, memory, num_candidates=search.beam_size)
        results = beam_search(
            beams.next_tokens, num_images=len(pixels), search=search, start_id=START_ID, end_id=END_ID
        )
        self.num_beam_steps += beams.num_steps
        unknown = [math.nan] * len(pixels)
        familiarity = mean_familiarity(self.familiarity, features).tolist() if self.familiarity else unknown
        captions: list[list[Caption] | ImageError] = []
        for hypotheses, familiar, is_finite in zip(
            results, familiarity, np.all(np.isfinite(features), axis=1).tolist(), strict=True
        ):
            found = [
                Caption(self.vocabulary.to_text(one.token_ids), one.logprob, one.num_tokens, familiar)
                for one in hypotheses
            ]
            captions.append((found or not_finite("words' probabilities")) if is_finite else not_finite("features"))
        return captions


class Int8Networks:
    """The two networks of a `QuantizedModel`, ready to compute.

    Raises:
        ConfigError: OpenVINO is not installed.
        ModelError: a network is corrupt.
    """

    def __init__(self, image: Network, step: Network, *, vocabulary_size: int) -> None:
        self._core = import_openvino().Core()
        self._image_model, self._step_model = (self._read(network) for network in (image, step))
        try:
            ((_, _, self.image_size, _),) = [tuple(port.shape) for port in self._image_model.inputs]
            num_memories = len(self._image_model.outputs) - 1
            _, _, *ports = self._step_model.inputs
            states = ports[: len(ports) - num_memories]
            self.state_sizes = [port.partial_shape[2].get_length() for port in states]
            fits = len(self._step_model.outputs) == 1 + len(states) > 1
            fits &= self._step_model.outputs[0].partial_shape[2].get_length() == vocabulary_size
        except (RuntimeError, ValueError) as error:
            raise _corrupt(error) from error
        if not fits:
            raise ModelError("the networks in int8 do not fit together, or belong to another vocabulary")

    def _read(self, network: Network) -> Any:
        try:
            return self._core.read_model(network.graph, network.weights)
        except (RuntimeError, ValueError) as error:
            raise _corrupt(error) from error

    def _compile(self, model: Any) -> Any:
        # One stream, because every process captions on cores of its own; pinned, all would share the first one. What is
        # not in int8 is computed in float32, also where a processor would compute it faster in bfloat16.
        settings: dict[str, Any] = {
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,
            "INFERENCE_PRECISION_HINT": "f32",
        }
        if threads := os.environ.get("OMP_NUM_THREADS"):  # set by Ray to the CPUs that a process has reserved
            settings["INFERENCE_NUM_THREADS"] = int(threads)
        return self._core.compile_model(model, "CPU", settings).create_infer_request()

    # Compiled on first use: a process that only reads a captioner's settings saves half a second.

    @cached_property
    def _image_request(self) -> Any:
        return self._compile(self._image_model)

    @cached_property
    def _step_request(self) -> Any:
        return self._compile(self._step_model)

    def encode(self, pixels: npt.NDArray[np.uint8]) -> list[Floats]:
        """Mean features (B, F) and memory of uint8 pixels (B, 3, S, S).

        Images are computed one at a time, which is as fast as in batches.
        """
        outputs = [
            [np.copy(part) for part in self._image_request.infer([image[None]], share_inputs=True).values()]
            for image in pixels
        ]
        return [np.concatenate(parts) for parts in zip(*outputs, strict=True)]

    def step(self, inputs: Sequence[npt.NDArray[Any]]) -> list[Floats]:
        """Tokens, rows, state and memory -> log-probabilities and the next state, see `QuantizedModel`."""
        return [np.copy(part) for part in self._step_request.infer(inputs, share_inputs=True).values()]


class BeamState:
    """The beams of a search over images with this memory."""

    def __init__(self, networks: Int8Networks, memory: Sequence[Floats], *, num_candidates: int) -> None:
        self._networks, self._memory, self._num_candidates = networks, memory, num_candidates
        self._state = [np.zeros((len(memory[0]), 1, size), np.float32) for size in networks.state_sizes]
        self.num_steps = 0
        """Number of positions computed so far."""

    def next_tokens(self, tokens: Ints, parents: Ints) -> Candidates:
        """As `NextTokens` describes it."""
        rows = parents + self._state[0].shape[1] * np.arange(len(parents))[:, None]
        logprobs, *self._state = self._networks.step([tokens, rows, *self._state, *self._memory])
        self.num_steps += 1
        logprobs[..., SUPPRESSED_TOKEN_IDS] = -np.inf
        end_logprobs = logprobs[..., END_ID].copy()
        ids, best = [], []
        for _ in range(min(self._num_candidates, logprobs.shape[-1])):  # for few candidates faster than a partition
            ids.append(logprobs.argmax(axis=-1)[..., None])
            best.append(np.take_along_axis(logprobs, ids[-1], axis=-1))
            np.put_along_axis(logprobs, ids[-1], -np.inf, axis=-1)
        return Candidates(np.concatenate(ids, axis=-1), np.concatenate(best, axis=-1), end_logprobs)


def _corrupt(error: Exception) -> ModelError:
    return ModelError(f"a network in int8 is corrupt: {' '.join(str(error).split())[:300]}")


def import_openvino() -> Any:
    """The module; ConfigError that says how to install it."""
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", _KERNELS)  # read by oneDNN, the library of kernels, at its first use
    try:
        with without_telemetry():
            import openvino
    except ImportError as error:
        raise ConfigError(
            f"captioning in int8 needs OpenVINO: pip install openvino, or give --precision float32 ({error})"
        ) from error
    return openvino


@contextmanager
def without_telemetry() -> Iterator[None]:
    """A block in which OpenVINO and NNCF, when imported, send no usage statistics: by default they do, except in CI."""
    before = os.environ.get("CI")
    os.environ["CI"] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["CI"]
        else:
            os.environ["CI"] = before
