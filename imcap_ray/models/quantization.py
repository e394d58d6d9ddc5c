"""A trained model and photographs -> the model in int8, by NNCF's post-training quantisation."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.export import Dim

from imcap_ray.config import SearchConfig
from imcap_ray.errors import ConfigError
from imcap_ray.models.beam_search import beam_search
from imcap_ray.models.decoders import Decoder
from imcap_ray.models.encoders import Encoder
from imcap_ray.models.int8_captioner import BeamState, Int8Networks, import_openvino, without_telemetry
from imcap_ray.models.model_folder import Network
from imcap_ray.text.vocabulary import END_ID, START_ID

MAX_STEPS: Final = 100
"""Steps of searches that decide the ranges of the decoder's values."""


def import_nncf() -> tuple[Any, Any]:
    """The modules OpenVINO and NNCF; ConfigError that says how to install them."""
    openvino = import_openvino()
    try:
        with without_telemetry():
            import nncf
    except ImportError as error:
        raise ConfigError(f"quantising a model needs NNCF: pip install 'imcap_ray[quantize]' ({error})") from error
    return openvino, nncf


def quantize_networks(
    encoder: Encoder,
    decoder: Decoder,
    photographs: Sequence[npt.NDArray[np.uint8]],
    *,
    search: SearchConfig,
    vocabulary_size: int,
) -> tuple[Network, Network]:
    """Quantise weights and activations; no weight is trained. Returns the networks of a `QuantizedModel`.

    Args:
        photographs: pixels (3, S, S), such as the model was trained on.
        search: that of the searches whose steps decide the ranges of the decoder's values.

    Raises:
        ConfigError: NNCF is not installed.
    """
    image = _export_image_network(encoder, decoder, photographs[0])
    step = _export_step_network(encoder, decoder, photographs[0])
    networks = _Recorder(image, step, vocabulary_size=vocabulary_size)
    for photograph in photographs:
        _, *memory = networks.encode(photograph[None])
        state = BeamState(networks, memory, num_candidates=search.beam_size)
        beam_search(state.next_tokens, num_images=1, search=search, start_id=START_ID, end_id=END_ID)
    steps = networks.steps[:: -(-len(networks.steps) // MAX_STEPS)]
    quantized_image = _quantize(image, [[photograph[None]] for photograph in photographs])
    # Attention, sums and products of activations take little time, and converting the memory of the images to int8 at
    # every step would take more.
    return quantized_image, _quantize(step, steps, ignored=("ScaledDotProductAttention", "Add", "Multiply"))


class _ImageNetwork(nn.Module):
    def __init__(self, encoder: Encoder, decoder: Decoder) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder.requires_grad_(False)
        self.weights = decoder.search_weights(exported=True)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        features = self.encoder(pixels)
        return features.mean(dim=1), *self.decoder.memory(features, self.weights)


class _StepNetwork(nn.Module):
    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder
        self.weights = decoder.search_weights(exported=True)

    def forward(
        self, tokens: Tensor, rows: Tensor, state: tuple[Tensor, ...], memory: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        continued = tuple(part.flatten(0, 1).index_select(0, rows.flatten()).view(*rows.shape, -1) for part in state)
        log_probs, next_state = self.decoder.step(tokens, continued, memory, self.weights)
        return log_probs, *next_state


@torch.no_grad()
def _export_image_network(encoder: Encoder, decoder: Decoder, photograph: npt.NDArray[np.uint8]) -> Network:
    pixels = torch.from_numpy(photograph[None])
    network = _ImageNetwork(copy.deepcopy(encoder), copy.deepcopy(decoder)).eval()
    model = import_openvino().convert_model(torch.export.export(network, (pixels,)))
    model.reshape(tuple(pixels.shape))
    return _serialize(model)  # while torch's tensors exist, because the model uses their memory


@torch.no_grad()
def _export_step_network(encoder: Encoder, decoder: Decoder, photograph: npt.NDArray[np.uint8]) -> Network:
    decoder = copy.deepcopy(decoder).eval().requires_grad_(False)
    features = encoder(torch.from_numpy(photograph[None])).repeat(2, 1, 1)
    memory = decoder.memory(features, decoder.search_weights(exported=True))
    tokens, rows = torch.zeros(2, 2, 3, dtype=torch.long)  # different tensors: torch would take one for the other
    state = tuple(torch.zeros(2, 4, size) for size in decoder.state_sizes)
    images, beams, before = (Dim(name) for name in ("images", "beams", "before"))
    dynamic = ({0: images, 1: beams}, {0: images, 1: beams}, ({0: images, 1: before},) * len(state))
    program = torch.export.export(
        _StepNetwork(decoder),
        (tokens, rows, state, memory),
        dynamic_shapes=(*dynamic, ({0: images},) * len(memory)),
    )
    model = import_openvino().convert_model(program)
    shapes = [[-1, -1]] * 2 + [[-1, -1, size] for size in decoder.state_sizes]
    shapes += [[-1, *part.shape[1:]] for part in memory]
    model.reshape(dict(zip(model.inputs, shapes, strict=True)))
    return _serialize(model)


class _Recorder(Int8Networks):
    """Networks that remember the inputs of all steps."""

    def __init__(self, image: Network, step: Network, *, vocabulary_size: int) -> None:
        super().__init__(image, step, vocabulary_size=vocabulary_size)
        self.steps: list[list[npt.NDArray[Any]]] = []

    def step(self, inputs: Sequence[npt.NDArray[Any]]) -> list[npt.NDArray[np.float32]]:
        self.steps.append([part.copy() for part in inputs])
        return super().step(inputs)


def _quantize(
    network: Network, inputs: Sequence[Sequence[npt.NDArray[Any]]], *, ignored: Sequence[str] = ()
) -> Network:
    openvino, nncf = import_nncf()
    logging.getLogger("nncf").setLevel(logging.ERROR)
    return _serialize(
        nncf.quantize(
            openvino.Core().read_model(network.graph, network.weights),
            nncf.Dataset(inputs, list),
            subset_size=len(inputs),
            preset=nncf.QuantizationPreset.MIXED,  # activations may be asymmetric: as fast, and slightly better scores
            ignored_scope=nncf.IgnoredScope(types=list(ignored), validate=False),
            # Seven bits for the weights: on a processor without VNNI, sums of two products would overflow 16 bits.
            advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE),
        )
    )


def _serialize(model: Any) -> Network:
    with TemporaryDirectory() as folder:
        path = Path(folder, "network.xml")
        import_openvino().save_model(model, path, compress_to_fp16=False)
        return Network(path.read_bytes(), path.with_suffix(".bin").read_bytes())
