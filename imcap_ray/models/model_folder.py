"""A model folder <-> settings, weights, vocabulary and scores. Knows nothing of pixels.

Imports torch only for the weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

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
from imcap_ray.models.encoder_weights import EncoderWeights
from imcap_ray.models.familiarity import Familiarity
from imcap_ray.models.model_files import (
    CARD_FILE,
    CONFIG_FILE,
    FAMILIARITY_FILE,
    GRAPH_SUFFIX,
    IMAGE_NETWORK,
    INT8_FAMILIARITY_FILE,
    MAX_BYTES,
    METRICS_FILE,
    NETWORK_WEIGHTS_SUFFIX,
    STEP_NETWORK,
    VOCABULARY_FILE,
    WEIGHTS_FILE,
)
from imcap_ray.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION: Final = 2
"""Version of the folders that are written. Version 1, which is also read, has all its weights in float16."""

PRECISION: Final = "precision"
"""Entry of `config.json`: the precision in which the model captions by default; float32 if there is none."""

CHECKSUMS: Final = "sha256"
"""Section of `config.json` with the hashes of the other files, by file name; earlier versions wrote none."""

_INT8_CARD: Final = """
## Precision

This folder holds the model twice: in float32, and quantised to int8 with photographs of the training set (no weight was
trained). By default it captions in int8; `--precision float32` selects the other one. Scores in this card are those of
float32.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """The sections of `config.json`."""

    encoder: EncoderConfig
    encoder_weights: EncoderWeights
    preprocessing: PreprocessingConfig
    decoder: DecoderConfig
    search: SearchConfig


@dataclass(frozen=True, slots=True)
class Network:
    """A network in OpenVINO's format."""

    graph: bytes
    """XML."""
    weights: bytes


@dataclass(frozen=True, slots=True)
class QuantizedModel:
    """A model in int8."""

    image: Network
    """uint8 pixels (1, 3, S, S) -> mean features (1, F), and the decoder's memory of the image: tensors (1, ...)."""
    step: Network
    """Tokens (B, K), the rows (B, K) of the beams that they continue, the decoder's state, tensors (B, K', size), and
    memory -> log-probabilities (B, K, V) and the next state. Rows count the beams of all images, B * K'."""
    familiarity: Familiarity | None
    """That of images by their features in int8."""

    @property
    def files(self) -> dict[str, bytes]:
        """The files of the networks, by name."""
        networks = {IMAGE_NETWORK: self.image, STEP_NETWORK: self.step}
        graphs = {name + GRAPH_SUFFIX: network.graph for name, network in networks.items()}
        return graphs | {name + NETWORK_WEIGHTS_SUFFIX: network.weights for name, network in networks.items()}


@dataclass(frozen=True, kw_only=True)
class ModelFolder(ModelSettings):
    """The contents of a model folder."""

    location: str
    name: str
    """The location, or the name of the bundled model."""
    vocabulary: Vocabulary
    vocabulary_size: int
    weights: bytes
    """The file of the weights in float32."""
    metrics: dict[str, Any]
    familiarity: Familiarity | None
    """None in folders of earlier versions, and if there were too few images to learn it."""
    fingerprint: str
    """sha256 over the configuration without its checksums, the weights and the vocabulary. The same fingerprint means
    the same captions, in float32."""
    int8: QuantizedModel | None = None
    """None: this model captions in float32 only."""
    precision: str = FLOAT32
    """`float32` or `int8`: the precision in which the model captions by default."""

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Weights in float32, with names that begin with `decoder.`, or `encoder.` if the CNN's are in the folder.

        Raises:
            ModelError: the weights are corrupt, or those of another model.
        """
        from imcap_ray.models.model_weights import parse_weights

        try:
            return parse_weights(self.weights, self.decoder, self.vocabulary_size)
        except ModelError as error:
            raise ModelError(f"{self.location}: {error}") from error

    def resolve_precision(self, precision: str) -> str:
        """Return `float32` or `int8` for one of `PRECISIONS`; ModelError if this model has no int8 version."""
        resolved = self.precision if precision == AUTO else precision
        if resolved == INT8 and self.int8 is None:
            raise ModelError(
                f"{self.location} has no int8 version: make one with imcap quantize, or give --precision float32"
            )
        return resolved

    def fingerprint_in(self, precision: str) -> str:
        """The fingerprint of captions in `float32` or `int8`."""
        if precision == FLOAT32:
            return self.fingerprint
        assert self.int8
        digests = [hashlib.sha256(data).hexdigest() for data in self.int8.files.values()]
        return hashlib.sha256(" ".join([precision, self.fingerprint, *digests]).encode()).hexdigest()

    @property
    def fingerprints(self) -> Iterator[str]:
        """The fingerprints of captions in any precision that the model has."""
        yield self.fingerprint
        if self.int8:
            yield self.fingerprint_in(INT8)


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
    digest = hashlib.sha256()
    for name in (CONFIG_FILE, WEIGHTS_FILE, VOCABULARY_FILE):
        digest.update(digests[name].digest())
    return ModelFolder(
        location=location,
        name=DEFAULT_MODEL if model in (None, DEFAULT_MODEL) else location,
        vocabulary=vocabulary,
        vocabulary_size=vocabulary_size,
        weights=files[WEIGHTS_FILE],
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
        return storage.read_bytes(storage.join(location, name), max_bytes=MAX_BYTES[name])
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


def _read_int8(location: str, checksums: Mapping[str, Any]) -> QuantizedModel | None:
    image, step = (_read_network(location, name, checksums) for name in (IMAGE_NETWORK, STEP_NETWORK))
    if image is None or step is None:
        return None
    return QuantizedModel(image, step, _read_familiarity(location, INT8_FAMILIARITY_FILE, checksums))


def _read_network(location: str, name: str, checksums: Mapping[str, Any]) -> Network | None:
    graph = _read_optional_file(location, name + GRAPH_SUFFIX, checksums)
    weights = _read_optional_file(location, name + NETWORK_WEIGHTS_SUFFIX, checksums)
    return None if graph is None or weights is None else Network(graph, weights)


def _read_familiarity(location: str, name: str, checksums: Mapping[str, Any]) -> Familiarity | None:
    data = _read_optional_file(location, name, checksums)
    if data is None:
        return None
    try:
        return Familiarity.from_bytes(data)
    except ModelError as error:
        raise ModelError(f"{location}: {error}") from error


def _read_metrics(location: str) -> dict[str, Any]:
    path = storage.join(location, METRICS_FILE)
    if not storage.exists(path):
        return {}
    try:
        metrics = parse_json(storage.read_bytes(path, max_bytes=MAX_BYTES[METRICS_FILE]))
        if not isinstance(metrics, dict):
            raise ValueError(f"expected an object, got {type(metrics).__name__}")
        history = metrics.get("history", [])
        if not isinstance(history, list) or not all(isinstance(row, dict) for row in history):
            raise ValueError("history must be a list of objects")
    except (ValueError, OSError, MemoryError) as error:
        raise ModelError(f"{location}: {METRICS_FILE} is corrupt: {error}") from error
    return metrics


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
    """Write a model folder (path or URI), with narrower weights, see `format_weights`.

    Args:
        encoder_tensors: the CNN's weights, if another machine cannot get them from a library.
    """
    from imcap_ray.models.model_weights import format_weights

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
    weights = format_weights(decoder_tensors, encoder_tensors or {})
    files = {WEIGHTS_FILE: weights, VOCABULARY_FILE: vocabulary.to_json().encode()}
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


def save_with_int8(folder: ModelFolder, int8: QuantizedModel, location: str | Path) -> None:
    """Write a copy of a model folder that captions in int8 by default. The copy keeps the weights in float32.

    Raises:
        OutputError: something exists there.
    """
    refuse_existing(location)
    target = storage.absolute(str(location))
    config = parse_json(_read_file(folder.location, CONFIG_FILE))
    names = [WEIGHTS_FILE, VOCABULARY_FILE, *[FAMILIARITY_FILE] * (folder.familiarity is not None)]
    files = {name: _read_file(folder.location, name) for name in names}
    files |= int8.files
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
