"""Every setting: frozen dataclasses, and TOML or JSON -> dataclass.

Settings that change the answers (encoder, preprocessing, vocabulary, decoder, search, training) travel in recipes
and model folders, or in a `CaptioningConfig`. Settings that change only the speed are a `ResourcesConfig`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from imcap_ray.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Config = TypeVar("Config")

DEFAULT_RECIPE = "lite2-attention"
DEFAULT_MODEL = "flickr8k-lite2"
"""The model that comes with the package."""

AUTO = "auto"
FLOAT32 = "float32"
INT8 = "int8"
PRECISIONS = (AUTO, FLOAT32, INT8)
"""Precisions of the CNN in captioning. `auto` is the model folder's choice and never the machine's, so that a model
captions alike everywhere."""

MAX_BEAM_SIZE = 1000
"""Widest beam; good captions need 3 to 5, and a beam that is much too wide fills the memory."""

MAX_LENGTH = 1000
"""Longest caption, in tokens."""

MAX_LAYER_SIZE = 2**16
"""Largest embedding or LSTM state: a matrix of that size takes 64 GiB."""

_MAX_DEPTH = 50
"""Deepest nesting of a JSON file."""


def _require(condition: bool, name: str, expectation: str, value: object) -> None:
    if not condition:
        raise ConfigError(f"{name} must be {expectation}, got {_shorten(value)}")


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderConfig:
    """Which CNN turns pixels into features, and which of its layers they are read from."""

    name: str = "efficientnet_lite2"
    """A name of `encoders.ENCODERS`, or `timm:NAME` for any other CNN that timm knows."""
    layer: str = "grid"
    """`grid`: the last feature map, one region per cell; `penultimate`: one vector, the classifier's input."""

    def __post_init__(self) -> None:
        # Of timm's other names some lead to a network or a disk: hf-hub:OWNER/NAME, local-dir:PATH.
        is_plain = not self.name.startswith("timm:") or re.fullmatch(r"timm:[\w.-]+", self.name, re.ASCII)
        _require(bool(is_plain), "encoder.name", "timm:NAME with a name that `timm.list_models()` lists", self.name)
        _require(self.layer in ("grid", "penultimate"), "encoder.layer", "'grid' or 'penultimate'", self.layer)


@dataclass(frozen=True, kw_only=True, slots=True)
class PreprocessingConfig:
    """From an image to the encoder's input; the same in training and in captioning."""

    image_size: int | None = None
    """Pixels on each side; the whole image is squashed into this square, as the Flickr8k copies were. None: the size of
    the model that a training starts from, otherwise 224."""
    mean: tuple[float, ...] | None = None
    """Subtracted from each channel (0..255); None: the values that the encoder was trained with."""
    std: tuple[float, ...] | None = None
    """Divides each channel after the mean is subtracted; None: the values that the encoder was trained with."""

    def __post_init__(self) -> None:
        size = self.image_size
        _require(size is None or 32 <= size <= 2048, "preprocessing.image_size", "32 to 2048", size)
        for name in ("mean", "std"):
            value = getattr(self, name)
            _require(value is None or len(value) == 3, f"preprocessing.{name}", "three numbers", value)
        _require(
            self.mean is None or all(abs(x) <= 1e6 for x in self.mean), "preprocessing.mean", "-1e6 to 1e6", self.mean
        )
        _require(self.std is None or all(x > 0 for x in self.std), "preprocessing.std", "above 0", self.std)
        _require(
            self.std is None or all(1e-6 <= x <= 1e6 for x in self.std), "preprocessing.std", "1e-6 to 1e6", self.std
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class VocabularyConfig:
    """How captions are cut into tokens, and which tokens are kept."""

    tokenizer: str = AUTO
    """A name in `imcap_ray.text.tokenizers.TOKENIZERS`; `auto`: the one for the language of the training captions."""
    min_count: int = 4
    """A token seen less often than this in the training captions becomes unknown."""

    def __post_init__(self) -> None:
        _require(self.min_count >= 1, "vocabulary.min_count", "at least 1", self.min_count)


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """The recurrent network that turns features into a caption."""

    name: str = "attention"
    """A name in `imcap_ray.models.decoders.DECODERS`."""
    embedding_size: int = 512
    """Size of a token's vector."""
    hidden_size: int = 512
    """Size of an LSTM's state."""
    num_heads: int = 8
    """Attention heads, a divisor of `hidden_size`; decoders without attention ignore it."""
    dropout: float = 0.5
    """Share of units dropped in training."""

    def __post_init__(self) -> None:
        _require(0 <= self.dropout < 1, "decoder.dropout", "in [0, 1)", self.dropout)
        for name in ("embedding_size", "hidden_size", "num_heads"):
            size = getattr(self, name)
            _require(size >= 1, f"decoder.{name}", "at least 1", size)
            _require(size <= MAX_LAYER_SIZE, f"decoder.{name}", f"at most {MAX_LAYER_SIZE:,}", size)


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchConfig:
    """How the caption is searched for among all token sequences."""

    beam_size: int = 4
    """Partial captions kept at every position; 1 is greedy search."""
    max_length: int = 22
    """Longest caption, in tokens without the end token."""
    length_penalty: float = 0.7
    """A finished caption's score is its log-probability divided by its number of tokens to this power."""
    num_captions: int = 1
    """Number of captions per image, the best first; at most `beam_size`."""

    def __post_init__(self) -> None:
        _require(self.beam_size >= 1, "search.beam_size", "at least 1", self.beam_size)
        _require(self.beam_size <= MAX_BEAM_SIZE, "search.beam_size", f"at most {MAX_BEAM_SIZE:,}", self.beam_size)
        _require(self.max_length >= 1, "search.max_length", "at least 1", self.max_length)
        _require(self.max_length <= MAX_LENGTH, "search.max_length", f"at most {MAX_LENGTH:,}", self.max_length)
        _require(self.length_penalty >= 0, "search.length_penalty", "at least 0", self.length_penalty)
        _require(self.length_penalty <= 100, "search.length_penalty", "at most 100", self.length_penalty)
        _require(
            1 <= self.num_captions <= self.beam_size,
            "search.num_captions",
            f"1 to search.beam_size ({self.beam_size})",
            self.num_captions,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PluginSearch:
    """The search settings of a captioner that is not from this package; it has the others to itself."""

    num_captions: int = 1
    """Number of captions per image, the best first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """How the decoder is trained."""

    epochs: int = 20
    """Passes over the training images, each with every caption of every image once; 0: this phase is skipped."""
    batch_size: int = 32
    """Images per optimizer step over all workers, each with all its captions."""
    optimizer: str = "adamw"
    """`adamw` or `adam`."""
    learning_rate: float = 5e-4
    """Peak of the schedule."""
    schedule: str = "cosine"
    """`cosine`: linear warm-up, then down to 1 % of the peak; `constant`."""
    warmup_steps: int = 200
    """Steps of linear warm-up; `constant` has none."""
    weight_decay: float = 1e-3
    """AdamW's decoupled weight decay."""
    label_smoothing: float = 0.1
    """Share of the target probability spread evenly over the vocabulary."""
    gradient_clip: float = 1.0
    """Largest norm of a step's gradient; 0 clips nothing."""
    ema_decay: float = 0.0
    """Decay of the moving average of the weights, which is validated and saved; 0: the weights themselves are."""
    flip: bool = False
    """Whether features of the mirrored image are cached too; each step draws one of the views."""
    crops: int = 0
    """Number of random crops of each image whose features are cached too; half of them are mirrored."""
    min_crop_area: float = 0.8
    """Smallest share of the image's area that these crops show."""
    max_caption_length: int = 22
    """Longer training captions are cut to this many tokens."""
    patience: int = 6
    """Stop after this many epochs without a better CIDEr-D on the validation split; 0: never stop early."""

    def __post_init__(self) -> None:
        _require(self.optimizer in ("adam", "adamw"), "training.optimizer", "'adam' or 'adamw'", self.optimizer)
        _require(
            self.schedule in ("cosine", "constant"),
            "training.schedule",
            "'cosine' or 'constant'",
            self.schedule,
        )
        for name in ("batch_size", "max_caption_length"):
            _require(getattr(self, name) >= 1, f"training.{name}", "at least 1", getattr(self, name))
        for name in ("epochs", "warmup_steps", "weight_decay", "gradient_clip", "crops", "patience"):
            _require(getattr(self, name) >= 0, f"training.{name}", "at least 0", getattr(self, name))
        _require(0 < self.min_crop_area <= 1, "training.min_crop_area", "in (0, 1]", self.min_crop_area)
        for name in ("label_smoothing", "ema_decay"):
            _require(0 <= getattr(self, name) < 1, f"training.{name}", "in [0, 1)", getattr(self, name))
        _require(self.learning_rate > 0, "training.learning_rate", "above 0", self.learning_rate)


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig:
    """How the CNN is trained with the decoder, after the decoder alone. Other settings are as in `training`."""

    epochs: int = 0
    """Passes over the training images; 0: the CNN is not trained."""
    learning_rate: float = 2e-4
    """Peak learning rate of the decoder."""
    encoder_learning_rate: float = 5e-5
    """Peak learning rate of the CNN. The statistics of its batch normalisation are never trained."""
    first_layer: str = ""
    """The first part of the CNN that is trained, as torch names it, such as `cnn.blocks.4`; "": all of it."""
    min_crop_area: float = 0.6
    """Images are random crops of at least this share of their area, half of them mirrored; in the self-critical phase
    too."""
    patience: int = 4
    """Stop after this many epochs without a better CIDEr-D on the validation split; 0: never stop early."""
    repetitions: int = 1
    """Number of runs, each from the same start. If there are several, the self-critical phase starts from the mean of
    their weights (Wortsman et al., Model soups, 2022)."""

    def __post_init__(self) -> None:
        for name in ("epochs", "patience"):
            _require(getattr(self, name) >= 0, f"finetune.{name}", "at least 0", getattr(self, name))
        _require(self.repetitions >= 1, "finetune.repetitions", "at least 1", self.repetitions)
        for name in ("learning_rate", "encoder_learning_rate"):
            _require(getattr(self, name) > 0, f"finetune.{name}", "above 0", getattr(self, name))
        _require(0 < self.min_crop_area <= 1, "finetune.min_crop_area", "in (0, 1]", self.min_crop_area)


@dataclass(frozen=True, kw_only=True, slots=True)
class SelfCriticalConfig:
    """How the decoder is finally trained on its own captions, by their rewards. Other settings are as in `training`."""

    epochs: int = 0
    """Passes over the training images; 0: this phase is skipped."""
    learning_rate: float = 5e-5
    """Peak of the schedule."""
    temperature: float = 0.5
    """Divides the logits that captions are sampled from; below 1, probable tokens become more probable."""
    num_samples: int = 5
    """Captions sampled for each image; each is compared with the mean of the others."""
    bleu_weight: float = 0.0
    """The reward is CIDEr-D plus this weight times the caption's smoothed BLEU-4 (Lin and Och 2004)."""
    patience: int = 0
    """Stop after this many epochs without a better CIDEr-D on the validation split; 0: never stop early."""
    repetitions: int = 1
    """Number of runs, each from the best epoch so far, with the learning rate starting at the peak again."""

    def __post_init__(self) -> None:
        for name in ("epochs", "patience"):
            _require(getattr(self, name) >= 0, f"self_critical.{name}", "at least 0", getattr(self, name))
        _require(self.repetitions >= 1, "self_critical.repetitions", "at least 1", self.repetitions)
        _require(self.learning_rate > 0, "self_critical.learning_rate", "above 0", self.learning_rate)
        _require(self.temperature > 0, "self_critical.temperature", "above 0", self.temperature)
        _require(self.num_samples >= 2, "self_critical.num_samples", "at least 2", self.num_samples)
        _require(self.bleu_weight >= 0, "self_critical.bleu_weight", "at least 0", self.bleu_weight)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything that determines a training, except the data and the seed."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """The CNN."""
    preprocessing: PreprocessingConfig = field(default_factory=PreprocessingConfig)
    """From an image to the CNN's input."""
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)
    """The tokens."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """The recurrent network."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How the recurrent network is trained."""
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """How the CNN is trained together with it."""
    self_critical: SelfCriticalConfig = field(default_factory=SelfCriticalConfig)
    """How the recurrent network is trained on its own captions."""
    search: SearchConfig = field(default_factory=SearchConfig)
    """How captions are searched for, in validation and as the trained model's default."""

    def __post_init__(self) -> None:
        phases = (self.training, self.finetune, self.self_critical)
        _require(any(phase.epochs for phase in phases), "training.epochs", "at least 1 where no phase has any", 0)
        if self.finetune.epochs and not self.self_critical.epochs:  # nothing would start from their mean
            repetitions = self.finetune.repetitions
            _require(repetitions == 1, "finetune.repetitions", "1 where self_critical.epochs is 0", repetitions)


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptioningConfig:
    """What a captioning run captions, with which model, and where to: everything that changes its answers."""

    input: str
    """Folder, image, Parquet or WebDataset tars; path or URI."""
    output: str
    """Folder for the captions; path or URI; on a cluster one that every node sees."""
    models: tuple[str, ...] = ()
    """Model folders, paths or URIs, which caption together, or one other captioner, see `CaptionerSpec`. Empty: the
    model of the package."""
    model_options: tuple[tuple[str, str], ...] = ()
    """Names and values for the factory of such a captioner."""
    encoder_weights: str | None = None
    """File with the CNN's weights; None: they are in the model folder or are downloaded."""
    precision: str = AUTO
    """One of `PRECISIONS`, of the CNN."""
    beam_size: int | None = None
    """As in `SearchConfig`; None here and below: as the model folder says."""
    max_length: int | None = None
    """As in `SearchConfig`."""
    length_penalty: float | None = None
    """As in `SearchConfig`."""
    num_captions: int | None = None
    """As in `SearchConfig`."""
    recursive: bool = True
    """Whether folders below the input are captioned too."""
    limit: int | None = None
    """Maximum number of images; None: all."""
    image_column: str | None = None
    """Column of a Parquet input that holds the images; None: recognised by its name and values."""
    id_column: str | None = None
    """Column of a Parquet input that holds the image ids; None: recognised by its name."""
    allow_outside_paths: bool = False
    """Whether paths in a table may point outside the input."""
    overwrite: bool = False
    """Start again; the old rows are removed when the new ones are complete."""
    retry_failed: bool = False
    """Caption images again that failed in an earlier run."""
    existing: str | None = None
    """Captions that images have already, in any of the formats of `imcap_ray.data.datasets`; path or URI. The run keeps
    them, and captions only the other images."""
    prune: bool = False
    """Remove the rows of images that are no longer in the input; not with `limit`, which leaves images out."""
    batch_timeout: float | None = None
    """Seconds that an actor may take for a batch. After that its process ends, and the images that take as long alone
    become failed rows; None: no limit."""
    max_failure_rate: float = 0.1
    """Share of images that may fail before the run ends with exit code 3."""

    def __post_init__(self) -> None:
        _require(self.precision in PRECISIONS, "precision", f"one of {', '.join(PRECISIONS)}", self.precision)
        if self.prune and self.limit is not None:
            raise ConfigError("--prune cannot be given with --limit, which leaves images out")

    @property
    def model_name(self) -> str:
        """The models, for people."""
        return ", ".join(self.models) or DEFAULT_MODEL


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRunConfig:
    """What a training run learns from, by which recipe, and where to: everything that changes its results."""

    data: str
    """Captioned images, in any of the formats of `imcap_ray.data.datasets`; path or URI."""
    model: str
    """Model folder to write; path or URI; on a cluster one that every node sees."""
    recipe: Recipe
    recipe_name: str = DEFAULT_RECIPE
    """Name or path of the recipe, for the model card."""
    recipe_options: tuple[str, ...] = ()
    """Settings that were changed in it, as in `training.epochs=3`, for the model card."""
    start_from: tuple[str, ...] = ()
    """Model folders to start from, paths or URIs. Their CNN, preprocessing, vocabulary and decoder replace the
    recipe's. If there are several, their weights are averaged."""
    seed: int = 0
    """Seed of the weights, the order of the images and the dropout."""
    encoder_weights: str | None = None
    """File with the CNN's weights; None: they are in the model folder or are downloaded."""
    image_column: str | None = None
    """Column of tables that holds the images; None: recognised by its name and values."""
    caption_column: str | None = None
    """Column of tables that holds the captions; None: recognised by its name."""
    id_column: str | None = None
    """Column of Parquet data that holds the image ids; None: recognised by its name."""
    allow_outside_paths: bool = False
    """Whether paths in a table may point outside the folder of the data."""
    allow_unusable: bool = False
    """Whether to train on data that `imcap check` calls unusable, for example because many images are missing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResourcesConfig:
    """What a command runs on: everything that changes only its speed."""

    address: str | None = None
    """A running Ray: HOST:PORT or auto; None: `RAY_ADDRESS`, otherwise this machine alone."""
    num_actors: int | None = None
    """Captioning processes; None: one per GPU, or per core, and more when nodes join the cluster."""
    num_workers: int | tuple[int, int] | None = None
    """Training processes, or the least and the most; None: one per GPU, or one."""
    gpus_per_worker: float | None = None
    """GPUs of each such process; None: 1 if there are any."""
    batch_size: int | None = None
    """Images that an actor takes at a time; None: as many as it computes together."""
    features: str | None = None
    """Folder for a training's cached features; None: `_features` next to the model, shared with its neighbours."""


def from_mapping(config_class: type[Config], values: Mapping[str, Any], *, section: str = "") -> Config:
    """The dataclass with these values; an unknown name or a value of another type raises a ConfigError."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{section or 'the settings'} must be a section, got {_shorten(values)}")
    hints = get_type_hints(config_class)
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        full_name = f"{section}.{name}" if section else name
        if name not in hints:
            raise ConfigError(f"unknown setting {_shorten(full_name)[1:-1]}: expected one of {', '.join(hints)}")
        arguments[name] = _convert(hints[name], value, full_name)
    for entry in dataclasses.fields(cast("Any", config_class)):
        has_default = entry.default is not dataclasses.MISSING or entry.default_factory is not dataclasses.MISSING
        if entry.name not in arguments and not has_default:
            raise ConfigError(f"{section}.{entry.name} is missing")
    return config_class(**arguments)


def _convert(hint: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_mapping(cast("type[Any]", hint), value, section=name)
    expected = get_args(hint) if get_origin(hint) is not tuple and get_args(hint) else (hint,)
    if isinstance(value, bool):
        matches = bool in expected
    elif isinstance(value, int | float) and float in expected:
        return _finite(value, name)
    elif isinstance(value, list):
        matches = any(get_origin(option) is tuple for option in expected) and all(
            type(item) in (int, float) for item in value
        )
        value = tuple(_finite(item, name) for item in value) if matches else value
    else:
        matches = type(value) in expected
    if not matches:
        names = " or ".join(getattr(option, "__name__", str(option)) for option in expected)
        raise ConfigError(f"{name} must be {names}, got {_shorten(value)}")
    return value


def _finite(value: float, name: str) -> float:
    try:
        number = float(value)
    except OverflowError:  # of an integer
        number = math.inf
    _require(math.isfinite(number), name, "a finite number", value)
    return number


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not JSON, an object repeats a key, or it is nested too deep.
    """
    try:
        value = json.loads(text, object_pairs_hook=_without_repeated_keys)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    if level:
        raise ValueError("it is nested too deep")
    return value


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        repeated, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"it repeats the key {_shorten(repeated)}")
    return values


def to_mapping(config: Any) -> dict[str, Any]:
    """The dataclass as plain dictionaries and lists, ready for JSON."""
    return dataclasses.asdict(config, dict_factory=_with_lists)


def _with_lists(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in items}


def _recipes_folder() -> Any:
    return resources.files("imcap_ray") / "training" / "recipes"


def recipe_names() -> list[str]:
    """Names of the recipes inside the package."""
    folder = _recipes_folder()
    return sorted(entry.name[: -len(".toml")] for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_recipe(name_or_path: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of this name inside the package, or the TOML file at this path.

    `overrides` maps dotted names to values and wins over the file: `{"training.epochs": 3}`.
    """
    if name_or_path in recipe_names():
        text = (resources.files("imcap_ray") / "training" / "recipes" / f"{name_or_path}.toml").read_text(
            encoding="utf-8"
        )
    elif Path(name_or_path).is_file():
        try:
            text = Path(name_or_path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"recipe {name_or_path} cannot be read: {error}") from error
    else:
        raise ConfigError(
            f"no recipe {name_or_path!r}: expected one of {', '.join(recipe_names())}, or the path of a TOML file"
        )
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, or a number of thousands of digits
        raise ConfigError(f"recipe {name_or_path} is not valid TOML: {error}") from error
    for dotted, value in (overrides or {}).items():
        section, _, name = dotted.partition(".")
        if isinstance(values.setdefault(section, {}), dict):  # otherwise it is refused below
            values[section][name] = value
    return from_mapping(Recipe, values)


def parse_override(text: str) -> tuple[str, Any]:
    """Dotted name and value of `SECTION.NAME=VALUE`. The value is TOML; text needs no quotes."""
    name, equals, value = text.partition("=")
    if not equals or "." not in name:
        raise ConfigError(f"--set takes SECTION.NAME=VALUE, for example training.epochs=5, got {text!r}")
    try:
        return name, tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        return name, value
