"""The file with a model's weights <-> tensors in float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import safetensors
import torch
from safetensors.torch import load, save
from torch import Tensor

from imcap_ray.config import DecoderConfig
from imcap_ray.errors import ConfigError, ModelError
from imcap_ray.models.decoders import build_decoder, find_decoder
from imcap_ray.models.encoders import describe_difference
from imcap_ray.models.model_files import CONFIG_FILE, WEIGHTS_FILE

SCALE_SUFFIX: Final = ".scale"
"""Appended to the name of an int8 matrix (M, N) to name the bfloat16 factors (M) of its rows."""


def parse_weights(data: bytes, decoder: DecoderConfig, vocabulary_size: int) -> dict[str, Tensor]:
    """The weights of a file, in float32.

    Raises:
        ModelError: the file is corrupt, or its decoder is another one.
    """
    try:
        tensors = _widen(load(data))
        not_finite = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    except (safetensors.SafetensorError, RuntimeError, ValueError, LookupError, TypeError, MemoryError) as error:
        reason = " ".join(str(error).split())[:300] or "no memory"
        raise ModelError(f"{WEIGHTS_FILE} is corrupt: {reason}") from error
    if not_finite:
        raise ModelError(f"{WEIGHTS_FILE} contains non-finite values, first in {not_finite[0][:100]}")
    try:
        _require_decoder(decoder, tensors, vocabulary_size)
    except ConfigError as error:
        raise ModelError(f"{CONFIG_FILE} is corrupt or of another kind: {error}") from error
    return tensors


def format_weights(decoder_tensors: Mapping[str, Tensor], encoder_tensors: Mapping[str, Tensor]) -> bytes:
    """A file with the decoder's matrices in int8 with a scale for each row, and all other weights in float16."""
    return save(_narrow(decoder_tensors, encoder_tensors))


def _require_decoder(config: DecoderConfig, tensors: Mapping[str, Tensor], vocabulary_size: int) -> None:
    """Raise ModelError unless the weights are those of this decoder.

    The decoder is built to be compared, which takes at most a few times the memory of the weights. (Torch's device
    `meta` would take none, but drawing normal numbers there imports torch._dynamo: 1.2 s in every process.)
    """
    weights = select_tensors("decoder.", tensors)
    # Every decoder has an embedding and an LSTM.
    min_values = vocabulary_size * config.embedding_size + 4 * config.hidden_size * (
        config.embedding_size + config.hidden_size
    )
    num_values = sum(tensor.numel() for tensor in weights.values())
    feature_weight = find_decoder(config).feature_weight
    shape = weights[feature_weight].shape if feature_weight in weights else ()
    if num_values < min_values:
        reason = f"its sizes need more than {min_values:,} numbers, the weights have {num_values:,}"
    else:
        num_channels = shape[1] if len(shape) == 2 else 1
        with torch.random.fork_rng(devices=()):
            decoder = build_decoder(config, num_channels=num_channels, vocabulary_size=vocabulary_size)
        reason = describe_difference(decoder.state_dict(), weights)
    if reason:
        raise ModelError(f"{WEIGHTS_FILE} and {CONFIG_FILE} do not match: decoder: {reason}")


def average_weights(weights: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Average each floating-point tensor; other tensors are the first model's. All have the same names and shapes."""
    return {
        name: torch.stack([tensors[name] for tensors in weights]).mean(0) if tensor.is_floating_point() else tensor
        for name, tensor in weights[0].items()
    }


def _narrow(decoder_tensors: Mapping[str, Tensor], encoder_tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights as a file stores them, see `format_weights`."""
    matrices = {f"decoder.{name}": tensor for name, tensor in decoder_tensors.items() if tensor.dim() == 2}
    others = {f"decoder.{name}": tensor for name, tensor in decoder_tensors.items() if tensor.dim() != 2}
    others |= {f"encoder.{name}": tensor for name, tensor in encoder_tensors.items()}
    narrow = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in others.items()}
    for name, matrix in matrices.items():
        narrow[name], narrow[name + SCALE_SUFFIX] = _quantise(matrix)
    return {name: tensor.contiguous().cpu() for name, tensor in narrow.items()}


def _quantise(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise a matrix (M, N) to int8 (M, N) and bfloat16 scales (M); the largest value of each row becomes 127.

    A bfloat16 scale times 127 is exact in float32, so a model folder that is read and written again does not change.
    """
    scale = (matrix.detach().float().abs().amax(dim=1) / 127).bfloat16()
    steps = matrix.detach() / scale.float().clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    return steps.round().clamp(-127, 127).to(torch.int8), scale


def _widen(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the weights of a file to float32."""
    widened = {}
    for name, tensor in tensors.items():
        if (scale := tensors.get(name + SCALE_SUFFIX)) is not None:
            if scale.shape != tensor.shape[:1] or tensor.dim() != 2:
                raise ValueError(f"{name[:100]} and its scale have shapes that do not match")
            widened[name] = tensor.float() * scale.float()[:, None]
        elif not name.endswith(SCALE_SUFFIX):
            widened[name] = tensor.float() if tensor.is_floating_point() else tensor
    return widened


def select_tensors(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with the prefix, under their names without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
