"""A model folder <-> settings, weights, vocabulary and scores. Knows no pixels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Final

import safetensors
import torch
from torch import Tensor

from imcap_ray import storage
from imcap_ray.config import (
    DEFAULT_MODEL,
    DecoderConfig,
    EncoderConfig,
    PreprocessingConfig,
    SearchConfig,
    from_mapping,
    parse_json,
    to_mapping,
)
from imcap_ray.errors import ConfigError, ModelError
from imcap_ray.models.decoders import build_decoder
from imcap_ray.models.encoder_weights import EncoderWeights
from imcap_ray.models.encoders import difference
from imcap_ray.text.vocabulary import Vocabulary

FORMAT_VERSION: Final = 2
"""What is written. Version 1, which is read too, has all its weights in float16."""

CONFIG_FILE: Final = "config.json"

WEIGHTS_FILE: Final = "model.safetensors"

VOCABULARY_FILE: Final = "vocabulary.json"

METRICS_FILE: Final = "metrics.json"

CARD_FILE: Final = "README.md"

CHECKSUMS: Final = "sha256"
"""What `config.json` holds of the weights and the vocabulary, by their files' names; folders of before lack it."""

_MAX_BYTES: Final = {CONFIG_FILE: 2**20, VOCABULARY_FILE: 2**26, METRICS_FILE: 2**26, WEIGHTS_FILE: 2**34}
"""Longest files that are read. Each is in memory as a whole."""

SCALE_SUFFIX: Final = ".scale"
"""Behind the name of an int8 matrix (M, N): that of the bfloat16 factors (M) of its rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFolder:
    """What a model folder holds."""

    location: str
    encoder: EncoderConfig
    encoder_weights: EncoderWeights
    preprocessing: PreprocessingConfig
    decoder: DecoderConfig
    search: SearchConfig
    vocabulary: Vocabulary
    vocabulary_size: int
    tensors: dict[str, Tensor]
    metrics: dict[str, Any]
    fingerprint: str
    """sha256 over the configuration without its checksums, the weights and the vocabulary: the same answers, the same
    fingerprint."""


def default_model_folder() -> str:
    """The folder of the model that comes with the package."""
    return str(resources.files("imcap_ray") / "pretrained" / DEFAULT_MODEL)


def read_model_folder(model: str | Path | None = None) -> ModelFolder:
    """Everything in a model folder (path or URI; None or its name: the one in the package), the weights in float32.

    Raises:
        ModelError: not a model folder, a file is missing or damaged, or its parts do not belong together.
    """
    location = default_model_folder() if model in (None, DEFAULT_MODEL) else storage.absolute(str(model))
    if not storage.exists(storage.join(location, CONFIG_FILE)):
        raise ModelError(
            f"{location} is not a model folder: expected a folder with {CONFIG_FILE}, as `imcap train` writes"
        )
    files = {}
    for name in (CONFIG_FILE, WEIGHTS_FILE, VOCABULARY_FILE):
        try:
            files[name] = storage.read_bytes(storage.join(location, name), max_bytes=_MAX_BYTES[name])
        except (OSError, MemoryError) as error:
            raise ModelError(f"the model folder {location} lacks a readable {name}: {error or 'no memory'}") from error
    try:
        config = parse_json(files[CONFIG_FILE])
        if not isinstance(config, dict):
            raise ValueError(f"expected an object, got {type(config).__name__}")
        version, vocabulary_size = (_integer(config, name) for name in ("format_version", "vocabulary_size"))
        if version not in range(1, FORMAT_VERSION + 1):
            raise ModelError(f"{location} has model format {version}, this imcap_ray reads 1 to {FORMAT_VERSION}")
        sections: dict[str, Any] = {
            name: from_mapping(config_class, config[name], section=name)
            for name, config_class in (
                ("encoder", EncoderConfig),
                ("encoder_weights", EncoderWeights),
                ("preprocessing", PreprocessingConfig),
                ("decoder", DecoderConfig),
                ("search", SearchConfig),
            )
        }
    except KeyError as error:
        raise ModelError(f"{location}: {CONFIG_FILE} is damaged or of another kind: {error} is missing") from error
    except (ValueError, ConfigError) as error:
        raise ModelError(f"{location}: {CONFIG_FILE} is damaged or of another kind: {error}") from error
    try:
        vocabulary = Vocabulary.from_json(files[VOCABULARY_FILE])
    except ModelError as error:
        raise ModelError(f"{location}: {error}") from error
    if len(vocabulary) != vocabulary_size:
        raise ModelError(
            f"{location}: the vocabulary has {len(vocabulary)} tokens but the decoder was trained with "
            f"{vocabulary_size}: the folder mixes two trainings"
        )
    digests = {name: hashlib.sha256(data) for name, data in files.items()}
    checksums = config.pop(CHECKSUMS, None)
    if checksums is not None:
        _require_checksums(location, checksums, digests)
        # The fingerprint is that of a folder without checksums: captions that were made before there were any resume.
        digests[CONFIG_FILE] = hashlib.sha256(_config_bytes(config))
    tensors = _read_tensors(location, files.pop(WEIGHTS_FILE))
    _require_decoder(location, sections["decoder"], tensors, vocabulary_size)
    digest = hashlib.sha256()
    for name in (CONFIG_FILE, WEIGHTS_FILE, VOCABULARY_FILE):
        digest.update(digests[name].digest())
    return ModelFolder(
        location=location,
        vocabulary=vocabulary,
        vocabulary_size=vocabulary_size,
        tensors=tensors,
        metrics=_read_metrics(location),
        fingerprint=digest.hexdigest(),
        **sections,
    )


def _integer(config: Mapping[str, Any], name: str) -> int:
    value = config[name]
    if type(value) is not int:
        raise ValueError(f"{name} must be an integer, got {repr(value)[:100]}")
    return value


def _config_bytes(config: Mapping[str, Any]) -> bytes:
    return json.dumps(config, indent=2).encode()


def _require_checksums(location: str, checksums: Any, digests: Mapping[str, Any]) -> None:
    """Raise ModelError if a file is not the one that was saved."""
    if not isinstance(checksums, dict):
        raise ModelError(f"{location}: {CONFIG_FILE} is damaged: {CHECKSUMS} must be a section")
    for name in (WEIGHTS_FILE, VOCABULARY_FILE):
        if name in checksums and checksums[name] != digests[name].hexdigest():
            raise ModelError(
                f"{location}: {name} is damaged, or was changed: its sha256 is {digests[name].hexdigest()[:12]}..., "
                f"{CONFIG_FILE} expects {str(checksums[name])[:12]}...: copy the folder again, or remove {CHECKSUMS!r} "
                f"from {CONFIG_FILE} if you made the change"
            )


def _read_tensors(location: str, data: bytes) -> dict[str, Tensor]:
    from safetensors.torch import load

    try:
        tensors = _widen(load(data))
        broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    except (safetensors.SafetensorError, RuntimeError, ValueError, LookupError, TypeError, MemoryError) as error:
        reason = " ".join(str(error).split())[:300] or "no memory"
        raise ModelError(f"{location}: {WEIGHTS_FILE} is damaged: {reason}") from error
    if broken:
        raise ModelError(f"{location}: {WEIGHTS_FILE} contains non-finite values, first in {broken[0][:100]}")
    return tensors


def _require_decoder(location: str, config: DecoderConfig, tensors: Mapping[str, Tensor], vocabulary_size: int) -> None:
    """Raise ModelError unless the weights are those of this decoder.

    It is built to be compared, in at most a few times the memory of the weights. (On torch's device `meta`, which takes
    none, drawing normal numbers imports torch._dynamo: 1.2 s in every process.)
    """
    weights = below("decoder.", tensors)
    # Each decoder has an embedding and an LSTM.
    least = vocabulary_size * config.embedding_size + 4 * config.hidden_size * (
        config.embedding_size + config.hidden_size
    )
    num_values = sum(tensor.numel() for tensor in weights.values())
    projection = "project_features.0.weight" if config.name == "attention" else "project_features.weight"
    shape = weights[projection].shape if projection in weights else ()
    if num_values < least:
        reason = f"its sizes need more than {least:,} numbers, the weights have {num_values:,}"
    else:
        num_channels = shape[1] if len(shape) == 2 else 1
        with torch.random.fork_rng(devices=()):
            decoder = build_decoder(config, num_channels=num_channels, vocabulary_size=vocabulary_size)
        reason = difference(decoder.state_dict(), weights)
    if reason:
        raise ModelError(f"{location}: {WEIGHTS_FILE} and {CONFIG_FILE} do not match: decoder: {reason}")


def _read_metrics(location: str) -> dict[str, Any]:
    path = storage.join(location, METRICS_FILE)
    if not storage.exists(path):
        return {}
    try:
        metrics = parse_json(storage.read_bytes(path, max_bytes=_MAX_BYTES[METRICS_FILE]))
        if not isinstance(metrics, dict):
            raise ValueError(f"expected an object, got {type(metrics).__name__}")
        history = metrics.get("history", [])
        if not isinstance(history, list) or not all(isinstance(row, dict) for row in history):
            raise ValueError("history must be a list of objects")
    except (ValueError, OSError, MemoryError) as error:
        raise ModelError(f"{location}: {METRICS_FILE} is damaged: {error}") from error
    return metrics


def average_models(folders: Sequence[ModelFolder]) -> ModelFolder:
    """One model whose weights are the means of these, which were trained on from one and the same model.

    Such trainings with several seeds end in one valley of the loss, and the middle of it is often better than any of
    them, at the cost of one (Wortsman et al., Model soups, 2022). Settings are those of the first, among them the size
    of its images.

    Raises:
        ModelError: they differ in more than their weights.
    """
    first = folders[0]
    if len(folders) == 1:
        return first

    def normalisation(folder: ModelFolder) -> PreprocessingConfig:
        return replace(folder.preprocessing, image_size=None)

    for other in folders[1:]:
        for what, is_same in (
            ("CNN", (other.encoder, normalisation(other)) == (first.encoder, normalisation(first))),
            ("decoder", replace(other.decoder, dropout=0.0) == replace(first.decoder, dropout=0.0)),
            ("vocabulary", other.vocabulary.tokens == first.vocabulary.tokens),
            ("weights' names", other.tensors.keys() == first.tensors.keys()),
            ("CNN's weights", other.encoder_weights == first.encoder_weights or below("encoder.", first.tensors)),
        ):
            if not is_same:
                raise ModelError(f"{other.location} and {first.location} have no mean: they differ in their {what}")
    fingerprints = hashlib.sha256("".join(folder.fingerprint for folder in folders).encode())
    return replace(
        first,
        location="the mean of " + " and ".join(folder.location for folder in folders),
        tensors=average_weights([folder.tensors for folder in folders]),
        fingerprint=fingerprints.hexdigest(),
    )


def average_weights(weights: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each floating-point tensor; of others, the first's. All have the same names and shapes."""
    return {
        name: torch.stack([tensors[name] for tensors in weights]).mean(0) if tensor.is_floating_point() else tensor
        for name, tensor in weights[0].items()
    }


def save_model_folder(
    location: str | Path,
    *,
    encoder: EncoderConfig,
    encoder_weights: EncoderWeights,
    preprocessing: PreprocessingConfig,
    decoder: DecoderConfig,
    decoder_tensors: Mapping[str, Tensor],
    search: SearchConfig,
    vocabulary: Vocabulary,
    metrics: Mapping[str, Any],
    card: str,
    encoder_tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model folder (path or URI): the decoder's matrices in int8, a scale for each row, the rest in float16.

    Args:
        encoder_tensors: the CNN's weights, when no library can bring them to another machine.
    """
    from safetensors.torch import save

    if encoder_tensors is None and not encoder_weights.portable:
        raise ValueError(f"weights from {encoder_weights.source} must be inside the model folder")
    config = {
        "format_version": FORMAT_VERSION,
        "encoder": to_mapping(encoder),
        "encoder_weights": asdict(encoder_weights),
        "preprocessing": to_mapping(preprocessing),
        "decoder": to_mapping(decoder),
        "search": to_mapping(search),
        "vocabulary_size": len(vocabulary),
    }
    matrices = {f"decoder.{name}": tensor for name, tensor in decoder_tensors.items() if tensor.dim() == 2}
    others = {f"decoder.{name}": tensor for name, tensor in decoder_tensors.items() if tensor.dim() != 2}
    others |= {f"encoder.{name}": tensor for name, tensor in (encoder_tensors or {}).items()}
    narrow = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in others.items()}
    for name, matrix in matrices.items():
        narrow[name], narrow[name + SCALE_SUFFIX] = _quantise(matrix)
    narrow = {name: tensor.contiguous().cpu() for name, tensor in narrow.items()}
    folder = storage.absolute(str(location))
    files = {WEIGHTS_FILE: save(narrow), VOCABULARY_FILE: vocabulary.to_json().encode()}
    config[CHECKSUMS] = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    for name, data in files.items():
        storage.write_bytes(storage.join(folder, name), data)
    storage.write_bytes(storage.join(folder, METRICS_FILE), json.dumps(metrics, indent=2).encode())
    storage.write_bytes(storage.join(folder, CARD_FILE), card.encode())
    # The last file written is the one that makes it a model folder.
    storage.write_bytes(storage.join(folder, CONFIG_FILE), _config_bytes(config))


def _quantise(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Int8 (M, N) and bfloat16 (M) of a matrix (M, N), the largest of each row as 127.

    The scale has so few digits that 127 times it is exact: what was read from a model folder is written unchanged.
    """
    scale = (matrix.detach().float().abs().amax(dim=1) / 127).bfloat16()
    steps = matrix.detach() / scale.float().clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    return steps.round().clamp(-127, 127).to(torch.int8), scale


def _widen(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a file in float32."""
    widened = {}
    for name, tensor in tensors.items():
        if (scale := tensors.get(name + SCALE_SUFFIX)) is not None:
            if scale.shape != tensor.shape[:1] or tensor.dim() != 2:
                raise ValueError(f"{name[:100]} and its scale have shapes that do not fit")
            widened[name] = tensor.float() * scale.float()[:, None]
        elif not name.endswith(SCALE_SUFFIX):
            widened[name] = tensor.float() if tensor.is_floating_point() else tensor
    return widened


def below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin so, named without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
