"""A trained CNN and photographs -> the CNN in int8, by NNCF's post-training quantisation."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from imcap_ray.errors import ConfigError
from imcap_ray.models.encoders import Encoder
from imcap_ray.models.quantized_encoder import QuantizedNetwork, import_openvino, without_telemetry


def import_nncf() -> tuple[Any, Any]:
    """The modules OpenVINO and NNCF; ConfigError that says how to install them."""
    openvino = import_openvino()
    try:
        with without_telemetry():
            import nncf
    except ImportError as error:
        raise ConfigError(f"quantising a model needs NNCF: pip install 'imcap_ray[quantize]' ({error})") from error
    return openvino, nncf


def quantize_encoder(encoder: Encoder, photographs: Sequence[npt.NDArray[np.uint8]]) -> QuantizedNetwork:
    """Quantise weights and activations; no weight is trained.

    Args:
        photographs: pixels (3, S, S), such as the model was trained on.

    Raises:
        ConfigError: NNCF is not installed.
    """
    openvino, nncf = import_nncf()
    logging.getLogger("nncf").setLevel(logging.ERROR)
    images = [photograph[None] for photograph in photographs]
    with torch.no_grad():
        program = torch.export.export(copy.deepcopy(encoder), (torch.from_numpy(images[0]),))
    model = openvino.convert_model(program)
    model.reshape(images[0].shape)
    # Seven bits for the weights: on a processor without VNNI, sums of two products would overflow 16 bits.
    quantized = nncf.quantize(
        model,
        nncf.Dataset(images),
        subset_size=len(images),
        preset=nncf.QuantizationPreset.MIXED,  # activations may be asymmetric: as fast, and slightly better scores
        advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE),
    )
    with TemporaryDirectory() as folder:
        path = Path(folder, "encoder.xml")
        openvino.save_model(quantized, path, compress_to_fp16=False)
        return QuantizedNetwork(path.read_bytes(), path.with_suffix(".bin").read_bytes())
