"""A CNN in int8, computed by OpenVINO: pixels -> features. Knows nothing of how it was quantised.

Sums of int8 products are exact integers, so their order does not matter: the features of an image do not depend on the
batch or the number of threads, nor on the processor, as far as x86 with AVX2 or more goes (others are not tested). Only
CNNs that also average or multiply activations, such as squeeze-and-excitation, compute a part of their features in
floating point.

B images, S pixels a side, R regions, F channels.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor, nn

from imcap_ray.errors import ConfigError, ModelError
from imcap_ray.models.encoder_weights import EncoderWeights

_KERNELS: Final = "AVX512_CORE_VNNI"
"""The newest instructions that are used. Kernels for AMX, which newer Intel processors have, would take an eighth less
time, but they round differently from all others: 7 % of the bundled model's features would be others."""


@dataclass(frozen=True, slots=True)
class QuantizedNetwork:
    """A CNN in OpenVINO's format: uint8 pixels (1, 3, S, S) -> float32 features (1, R, F)."""

    graph: bytes
    """XML."""
    weights: bytes

    @property
    def sha256(self) -> str:
        """Hash of both."""
        return hashlib.sha256(hashlib.sha256(self.graph).digest() + hashlib.sha256(self.weights).digest()).hexdigest()


class QuantizedEncoder(nn.Module):
    """Like an `Encoder`: uint8 pixels (B, 3, S, S) -> float32 features (B, R, F), on the CPU.

    Images are computed one at a time, which is as fast as in batches.

    Raises:
        ConfigError: OpenVINO is not installed.
        ModelError: the network is corrupt, or takes images of another size.
    """

    def __init__(self, network: QuantizedNetwork, *, image_size: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.weights = EncoderWeights(source="int8", sha256=network.sha256)
        openvino = import_openvino()
        self._core = openvino.Core()
        try:
            self._model = self._core.read_model(network.graph, network.weights)
            shapes = [(port.element_type.get_type_name(), tuple(port.shape)) for port in self._model.inputs]
            outputs = [(port.element_type.get_type_name(), tuple(port.shape)) for port in self._model.outputs]
        except (RuntimeError, ValueError) as error:
            raise ModelError(f"the int8 encoder is corrupt: {' '.join(str(error).split())[:300]}") from error
        if shapes != [("u8", (1, 3, image_size, image_size))]:
            raise ModelError(
                f"the int8 encoder must take one image of {image_size} x {image_size} pixels, got {shapes}"
            )
        if len(outputs) != 1 or outputs[0][0] != "f32" or len(outputs[0][1]) != 3 or outputs[0][1][0] != 1:
            raise ModelError(f"the int8 encoder must return the features (1, R, F) of an image, got {outputs}")
        _, self.num_regions, self.num_channels = outputs[0][1]

    @cached_property
    def _request(self) -> Any:
        # One stream, because every process captions on cores of its own. The few sums of floating-point numbers are
        # computed in float32, also where a processor would compute them faster in bfloat16.
        settings = {
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "f32",
        }
        return self._core.compile_model(self._model, "CPU", settings).create_infer_request()

    def forward(self, pixels: Tensor) -> Tensor:
        """Features (B, R, F)."""
        features = torch.empty(len(pixels), self.num_regions, self.num_channels)
        for image, row in zip(pixels.numpy(), features.numpy(), strict=True):
            row[:] = self._request.infer([image[None]], share_inputs=True)[0][0]
        return features


def import_openvino() -> Any:
    """The module; ConfigError that says how to install it."""
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", _KERNELS)  # read by oneDNN, the library of kernels, at its first use
    try:
        with without_telemetry():
            import openvino
    except ImportError as error:
        raise ConfigError(
            f"captioning in int8 needs OpenVINO: pip install 'imcap_ray[int8]', or give --precision float32 ({error})"
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
