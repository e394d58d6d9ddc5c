"""A model folder <-> settings, weights, vocabulary and scores. Knows nothing of pixels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, Final

import safetensors
import torch
from torch import Tensor

from imcap_ray import storage
from imcap_ray.config import (
    AUTO,
    DEFAULT_MODEL,
    FLOAT32,
    INT8,
    DecoderConfig,
    EncoderConfig,
    PreprocessingConfig,
    SearchConfig,
    from_mapping,
    parse_json,
    to_mapping,
)
from imcap_ray.errors import ConfigError, ModelError, OutputError
from imcap_ray.models.decoders import build_decoder, find_decoder
from imcap_ray.models.encoder_weights import EncoderWeights
from imcap_ray.models.encoders import describe_difference
from imcap_ray.models.familiarity import FAMILIARITY_FILE, Familiarity
from imcap_ray.models.quantized_encoder import QuantizedNetwork
from imcap_ray.text.vocabulary import Vocabulary

FORMAT_VERSION: Final = 2
"""Version of the folders that are written. Version 1, which is also read, has all its weights in float16."""

CONFIG_FILE: Final = "config.json"

WEIGHTS_FILE: Final = "model.safetensors"

VOCABULARY_FILE: Final = "vocabulary.json"

METRICS_FILE: Final = "metrics.json"

CARD_FILE: Final = "README.md"

INT8_GRAPH_FILE: Final = "encoder_int8.xml"

INT8_WEIGHTS_FILE: Final = "encoder_int8.bin"

INT8_FAMILIARITY_FILE: Final = "familiarity_int8.safetensors"

PRECISION: Final = "precision"
"""Entry of `config.json`: the precision in which the model captions by default; float32 if there is none."""

CHECKSUMS: Final = "sha256"
"""Section of `config.json` with the hashes of the other files, by file name; earlier versions wrote none."""

_MAX_BYTES: Final = {
    CONFIG_FILE: 2**20,
    VOCABULARY_FILE: 2**26,
    METRICS_FILE: 2**26,
    WEIGHTS_FILE: 2**34,
    FAMILIARITY_FILE: 2**24,
    INT8_GRAPH_FILE: 2**26,
    INT8_WEIGHTS_FILE: 2**32,
    INT8_FAMILIARITY_FILE: 2**24,
}
"""Sizes of the largest files that are read, because each is read into memory."""

_INT8_CARD: Final = """
## Precision

The CNN is here twice: in float32, and quantised to int8 with photographs of the training set (no weight was trained).
By default it captions in int8; `--precision float32` selects the other one. Scores in this card are those of float32.
"""

SCALE_SUFFIX: Final = ".scale"
"""Appended to the name of an int8 matrix (M, N) to name the bfloat16 factors (M) of its rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """The sections of `config.json`."""

    encoder: EncoderConfig
    encoder_weights: EncoderWeights
    preprocessing: PreprocessingConfig
    decoder: DecoderConfig
    search: SearchConfig


@dataclass(frozen=True, slots=True)
class Int8Encoder:
    """A model's CNN in int8, and the familiarity of images by its features."""

    network: QuantizedNetwork
    familiarity: Familiarity | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFolder(ModelSettings):
    """The contents of a model folder."""

    location: str
    vocabulary: Vocabulary
    vocabulary_size: int
    tensors: dict[str, Tensor]
    """Weights in float32, with names that begin with `decoder.`, or `encoder.` if the CNN's are in the folder."""
    metrics: dict[str, Any]
    familiarity: Familiarity | None
    """None in folders of earlier versions, and if there were too few images to learn it."""
    fingerprint: str
    """sha256 over the configuration without its checksums, the weights and the vocabulary. The same fingerprint means
    the same captions, in float32."""
    int8: Int8Encoder | None = None
    """None: this model captions in float32 only."""
    precision: str = FLOAT32
    """`float32` or `int8`: the precision in which the model captions by default."""

    def resolve_precision(self, precision: str) -> str:
        """Return `float32` or `int8` for one of `PRECISIONS`; ModelError if this model has no CNN in int8."""
        resolved = self.precision if precision == AUTO else precision
        if resolved == INT8 and self.int8 is None:
            raise ModelError(
                f"{self.location} has no CNN in int8: make one with imcap quantize, or give --precision float32"
            )
        return resolved

    def fingerprint_in(self, precision: str) -> str:
        """The fingerprint of captions in `float32` or `int8`."""
        if precision == FLOAT32:
            return self.fingerprint
        assert self.int8
        return hashlib.sha256(f"{precision} {self.fingerprint} {self.int8.network.sha256}".encode()).hexdigest()


def default_model_folder() -> str:
    """The folder of the bundled model."""
    return str(resources.files("imcap_ray") / "pretrained" / DEFAULT_MODEL)


def read_model_folder(model: str | Path | None = None) -> ModelFolder:
    """Read a model folder (path or URI; None or its name: the bundled one), with the weights in float32.

    Raises:
        ModelError: it is no model folder, a file is missing or corrupt, or its files do not belong together.
    """
    location = default_model_folder() if model in (None, DEFAULT_MODEL) else storage.absolute(str(model))
    files = _read_files(location)
    config, vocabulary_size, settings = _parse_config(location, files[CONFIG_FILE])
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
    checksums, precision = config.pop(CHECKSUMS, None), config.pop(PRECISION, FLOAT32)
    if precision not in (FLOAT32, INT8):
        raise ModelError(
            f"{location}: {PRECISION} in {CONFIG_FILE} must be {FLOAT32} or {INT8}, got {precision!r:.100}"
        )
    if checksums is not None:
        _require_checksums(location, checksums, digests)
        # The fingerprint is that of a folder without checksums, so that captions made before there were any resume. It
        # is also that of the folder without a CNN in int8, because both give the same captions in float32.
        digests[CONFIG_FILE] = hashlib.sha256(_config_bytes(config))
    tensors = _read_tensors(location, files.pop(WEIGHTS_FILE))
    _require_decoder(location, settings.decoder, tensors, vocabulary_size)
    digest = hashlib.sha256()
    for name in (CONFIG_FILE, WEIGHTS_FILE, VOCABULARY_FILE):
        digest.update(digests[name].digest())
    return ModelFolder(
        location=location,
        vocabulary=vocabulary,
        vocabulary_size=vocabulary_size,
        tensors=tensors,
        metrics=_read_metrics(location),
        familiarity=_read_familiarity(location, FAMILIARITY_FILE, checksums or {}),
        fingerprint=digest.hexdigest(),
        int8=_read_int8(location, checksums or {}),
        precision=precision,
        **{section.name: getattr(settings, section.name) for section in fields(settings)},
    )


def _read_files(location: str) -> dict[str, bytes]:
    """The files that decide the captions, by name."""
    if not storage.exists(storage.join(location, CONFIG_FILE)):
        raise ModelError(
            f"{location} is not a model folder: expected a folder with {CONFIG_FILE}, as `imcap train` writes"
        )
    return {name: _read_file(location, name) for name in (CONFIG_FILE, WEIGHTS_FILE, VOCABULARY_FILE)}


def _read_file(location: str, name: str) -> bytes:
    try:
        return storage.read_bytes(storage.join(location, name), max_bytes=_MAX_BYTES[name])
    except (OSError, MemoryError) as error:
        raise ModelError(f"the model folder {location} lacks a readable {name}: {error or 'no memory'}") from error


def _parse_config(location: str, data: bytes) -> tuple[dict[str, Any], int, ModelSettings]:
    """The object in `config.json`, the size of the vocabulary, and the settings."""
    try:
        config = parse_json(data)
        if not isinstance(config, dict):
            raise ValueError(f"expected an object, got {type(config).__name__}")
        version, vocabulary_size = (_integer(config, name) for name in ("format_version", "vocabulary_size"))
        if version not in range(1, FORMAT_VERSION + 1):
            raise ModelError(f"{location} has model format {version}, this imcap_ray reads 1 to {FORMAT_VERSION}")
        settings = ModelSettings(
            encoder=from_mapping(EncoderConfig, config["encoder"], section="encoder"),
            encoder_weights=from_mapping(EncoderWeights, config["encoder_weights"], section="encoder_weights"),
            preprocessing=from_mapping(PreprocessingConfig, config["preprocessing"], section="preprocessing"),
            decoder=from_mapping(DecoderConfig, config["decoder"], section="decoder"),
            search=from_mapping(SearchConfig, config["search"], section="search"),
        )
        find_decoder(settings.decoder)
    except KeyError as error:
        raise ModelError(f"{location}: {CONFIG_FILE} is corrupt or of another kind: {error} is missing") from error
    except (ValueError, ConfigError) as error:
        raise ModelError(f"{location}: {CONFIG_FILE} is corrupt or of another kind: {error}") from error
    return config, vocabulary_size, settings


def _integer(config: Mapping[str, Any], name: str) -> int:
    value = config[name]
    if type(value) is not int:
        raise ValueError(f"{name} must be an integer, got {repr(value)[:100]}")
    return value


def _config_bytes(config: Mapping[str, Any]) -> bytes:
    return json.dumps(config, indent=2).encode()


def _require_checksums(location: str, checksums: Any, digests: Mapping[str, Any]) -> None:
    """Raise ModelError if a file differs from the one that was saved."""
    if not isinstance(checksums, dict):
        raise ModelError(f"{location}: {CONFIG_FILE} is corrupt: {CHECKSUMS} must be a section")
    for name in digests.keys() & checksums.keys():
        if checksums[name] != digests[name].hexdigest():
            raise ModelError(
                f"{location}: {name} is corrupt, or was changed: its sha256 is {digests[name].hexdigest()[:12]}..., "
                f"{CONFIG_FILE} expects {str(checksums[name])[:12]}...: copy the folder again, or remove {CHECKSUMS!r} "
                f"from {CONFIG_FILE} if you made the change"
            )


def _read_optional_file(location: str, name: str, checksums: Mapping[str, Any]) -> bytes | None:
    """A file's content; None if the model folder has none. A file without a checksum is another model's."""
    if name not in checksums:
        return None
    data = _read_file(location, name)
    _require_checksums(location, checksums, {name: hashlib.sha256(data)})
    return data


def _read_int8(location: str, checksums: Mapping[str, Any]) -> Int8Encoder | None:
    graph, weights = (_read_optional_file(location, name, checksums) for name in (INT8_GRAPH_FILE, INT8_WEIGHTS_FILE))
    if graph is None or weights is None:
        return None
    familiarity = _read_familiarity(location, INT8_FAMILIARITY_FILE, checksums)
    return Int8Encoder(QuantizedNetwork(graph, weights), familiarity)


def _read_familiarity(location: str, name: str, checksums: Mapping[str, Any]) -> Familiarity | None:
    data = _read_optional_file(location, name, checksums)
    if data is None:
        return None
    try:
        return Familiarity.from_bytes(data)
    except ModelError as error:
        raise ModelError(f"{location}: {error}") from error


def _read_tensors(location: str, data: bytes) -> dict[str, Tensor]:
    from safetensors.torch import load

    try:
        tensors = _widen(load(data))
        not_finite = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    except (safetensors.SafetensorError, RuntimeError, ValueError, LookupError, TypeError, MemoryError) as error:
        reason = " ".join(str(error).split())[:300] or "no memory"
        raise ModelError(f"{location}: {WEIGHTS_FILE} is corrupt: {reason}") from error
    if not_finite:
        raise ModelError(f"{location}: {WEIGHTS_FILE} contains non-finite values, first in {not_finite[0][:100]}")
    return tensors


def _require_decoder(location: str, config: DecoderConfig, tensors: Mapping[str, Tensor], vocabulary_size: int) -> None:
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
        raise ModelError(f"{location}: {METRICS_FILE} is corrupt: {error}") from error
    return metrics


def average_models(folders: Sequence[ModelFolder]) -> ModelFolder:
    """Average the weights of models that were trained from the same model.

    Such trainings with different seeds end in the same valley of the loss, and its middle is often better than each of
    them, at the cost of one model (Wortsman et al., Model soups, 2022). The settings, among them the image size, are
    those of the first model.

    Raises:
        ModelError: the models differ in more than their weights.
    """
    first = folders[0]
    if len(folders) == 1:
        return first

    def normalisation(folder: ModelFolder) -> PreprocessingConfig:
        return replace(folder.preprocessing, image_size=None)

    for other in folders[1:]:
        for part, is_same in (
            ("CNN", (other.encoder, normalisation(other)) == (first.encoder, normalisation(first))),
            ("decoder", replace(other.decoder, dropout=0.0) == replace(first.decoder, dropout=0.0)),
            ("vocabulary", other.vocabulary.tokens == first.vocabulary.tokens),
            ("weights' names", other.tensors.keys() == first.tensors.keys()),
            (
                "CNN's weights",
                other.encoder_weights == first.encoder_weights or select_tensors("encoder.", first.tensors),
            ),
        ):
            if not is_same:
                raise ModelError(
                    f"{other.location} and {first.location} cannot be averaged: they differ in their {part}"
                )
    fingerprints = hashlib.sha256("".join(folder.fingerprint for folder in folders).encode())
    return replace(
        first,
        location="the average of " + " and ".join(folder.location for folder in folders),
        tensors=average_weights([folder.tensors for folder in folders]),
        familiarity=None,  # its features are those of none of the models
        int8=None,
        precision=FLOAT32,
        fingerprint=fingerprints.hexdigest(),
    )


def average_weights(weights: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Average each floating-point tensor; other tensors are the first model's. All have the same names and shapes."""
    return {
        name: torch.stack([tensors[name] for tensors in weights]).mean(0) if tensor.is_floating_point() else tensor
        for name, tensor in weights[0].items()
    }


def save_model_folder(
    location: str | Path,
    settings: ModelSettings,
    *,
    vocabulary: Vocabulary,
    decoder_tensors: Mapping[str, Tensor],
    encoder_tensors: Mapping[str, Tensor] | None = None,
    metrics: Mapping[str, Any],
    card: str,
    familiarity: Familiarity | None = None,
) -> None:
    """Write a model folder (path or URI).

    The decoder's matrices are stored in int8 with a scale for each row, all other weights in float16.

    Args:
        encoder_tensors: the CNN's weights, if another machine cannot get them from a library.
    """
    from safetensors.torch import save

    if encoder_tensors is None and not settings.encoder_weights.portable:
        raise ValueError(f"weights from {settings.encoder_weights.source} must be inside the model folder")
    config = {
        "format_version": FORMAT_VERSION,
        "encoder": to_mapping(settings.encoder),
        "encoder_weights": asdict(settings.encoder_weights),
        "preprocessing": to_mapping(settings.preprocessing),
        "decoder": to_mapping(settings.decoder),
        "search": to_mapping(settings.search),
        "vocabulary_size": len(vocabulary),
    }
    tensors = _narrow(decoder_tensors, encoder_tensors or {})
    files = {WEIGHTS_FILE: save(tensors), VOCABULARY_FILE: vocabulary.to_json().encode()}
    if familiarity:
        files[FAMILIARITY_FILE] = familiarity.to_bytes()
    config[CHECKSUMS] = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    folder = storage.absolute(str(location))
    for name, data in files.items():
        storage.write_bytes(storage.join(folder, name), data)
    storage.write_bytes(storage.join(folder, METRICS_FILE), json.dumps(metrics, indent=2).encode())
    storage.write_bytes(storage.join(folder, CARD_FILE), card.encode())
    # A folder is a model folder once it has this file, so it is written last.
    storage.write_bytes(storage.join(folder, CONFIG_FILE), _config_bytes(config))


def refuse_existing(location: str | Path) -> None:
    """Raise OutputError if something exists where a model folder is to be written."""
    if storage.exists(storage.absolute(str(location))):
        raise OutputError(f"{location} exists: choose another OUTPUT")


def save_with_int8(folder: ModelFolder, int8: Int8Encoder, location: str | Path) -> None:
    """Write a copy of a model folder that captions in int8 by default. The copy keeps the weights in float32.

    Raises:
        OutputError: something exists there.
    """
    refuse_existing(location)
    target = storage.absolute(str(location))
    config = parse_json(_read_file(folder.location, CONFIG_FILE))
    names = [WEIGHTS_FILE, VOCABULARY_FILE, *[FAMILIARITY_FILE] * (folder.familiarity is not None)]
    files = {name: _read_file(folder.location, name) for name in names}
    files |= {INT8_GRAPH_FILE: int8.network.graph, INT8_WEIGHTS_FILE: int8.network.weights}
    if int8.familiarity:
        files[INT8_FAMILIARITY_FILE] = int8.familiarity.to_bytes()
    config[CHECKSUMS] = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    config[PRECISION] = INT8
    card = storage.join(folder.location, CARD_FILE)
    files[CARD_FILE] = (storage.read_bytes(card) if storage.exists(card) else b"") + _INT8_CARD.encode()
    files[METRICS_FILE] = json.dumps(folder.metrics, indent=2).encode()
    for name, data in files.items():
        storage.write_bytes(storage.join(target, name), data)
    storage.write_bytes(storage.join(target, CONFIG_FILE), _config_bytes(config))  # last, as in `save_model_folder`


def _narrow(decoder_tensors: Mapping[str, Tensor], encoder_tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights as a file stores them, see `save_model_folder`."""
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
