"""Configuration and data set -> a training whose settings are checked, and a plan of what it would do."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import pyarrow as pa

from imcap_ray import storage
from imcap_ray.config import AUTO, MAX_LENGTH, Recipe, ResourcesConfig, TrainingRunConfig, to_mapping
from imcap_ray.data.columns import ColumnOptions, find_image_column_by_type, read_image_column
from imcap_ray.data.dataset_check import keep_duplicates_together, require_usable
from imcap_ray.data.datasets import TRAIN, VALIDATION, CaptionedImages, load_dataset
from imcap_ray.data.parquet_files import read_schema, read_table
from imcap_ray.distributed.cluster.connection import ClusterResources, require
from imcap_ray.distributed.training.phase_start import with_cnn_weights
from imcap_ray.errors import InputError, OutputError
from imcap_ray.models.decoders import find_decoder
from imcap_ray.models.encoders import Encoder, build_encoder, resolve_preprocessing
from imcap_ray.models.model_averages import average_models
from imcap_ray.models.model_files import CONFIG_FILE
from imcap_ray.models.model_folder import ModelFolder, read_model_folder
from imcap_ray.models.model_weights import select_tensors
from imcap_ray.runs.lease import has_foreign_files
from imcap_ray.runs.training_run import CAPTIONS_FILE, SETTINGS_FILE, WORK_FOLDER, History, read_metrics
from imcap_ray.text.escaping import short_value
from imcap_ray.text.tokenizers import choose_tokenizer
from imcap_ray.text.vocabulary import UNKNOWN_ID, Vocabulary
from imcap_ray.training.loop import require_layer
from imcap_ray.training.phases import CROSS_ENTROPY, kind_of, next_phase, num_epochs, phases

CPUS_FOR_READING: Final = 1
"""CPUs in addition to the workers', with which Ray Data reads their images."""


MAX_UNKNOWN_WORDS: Final = 0.5
"""Share of words that a model does not know above which captions are taken to be of another language than its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """The data-parallel processes of a training."""

    min_count: int
    max_count: int
    is_elastic: bool
    """Whether their number changes with the cluster, between these limits."""
    gpus: float
    """GPUs of each worker."""

    @classmethod
    def choose(cls, resources: ResourcesConfig, cluster: ClusterResources) -> Workers:
        """The workers that the user asks for; by default one per GPU, or one worker if there are none."""
        gpus = resources.gpus_per_worker
        if gpus is None:
            gpus = float(cluster.expects_gpus)
        count = resources.num_workers
        if count is None:
            count = max(1, int(cluster.gpus / gpus) if gpus >= 1 else 1)
        least, most = count if isinstance(count, tuple) else (count, count)
        return cls(min_count=least, max_count=most, is_elastic=isinstance(count, tuple), gpus=gpus)

    @property
    def min_cpus(self) -> int:
        """CPUs without which no training starts."""
        return self.min_count + CPUS_FOR_READING

    @property
    def min_gpus(self) -> float:
        """GPUs without which no training starts."""
        return self.min_count * self.gpus

    @property
    def range(self) -> str:
        """Their number as the user writes it: "2" or "2-4"."""
        return f"{self.min_count}-{self.max_count}" if self.max_count != self.min_count else f"{self.min_count}"

    def __str__(self) -> str:
        if self.is_elastic:
            return f"{self.min_count} to {self.max_count} workers"
        return f"{self.min_count} worker{'s' * (self.min_count != 1)}"

    def require(self, cluster: ClusterResources, batch_size: int) -> None:
        """Raise InputError if the cluster cannot hold the workers, or they cannot share its GPUs or a batch."""
        if 0 < self.gpus < 1 < self.max_count:
            raise InputError(
                f"--gpus-per-worker {self.gpus:g} would put several of {self.max_count} workers on one GPU, which "
                "NCCL, the library that exchanges their gradients, refuses: give each 1, or train with --num-workers 1"
            )
        if batch_size < self.max_count:
            raise InputError(f"--num-workers {self.max_count} exceeds the recipe's batch of {batch_size} images")
        # Ray does not ask an autoscaler for the CPUs of an elastic training, so the minimum has to be there already.
        present = replace(cluster, max_cpus=0.0) if self.is_elastic and not self.gpus else cluster
        require(present, cpus=self.min_cpus, gpus=self.min_gpus, what=f"--num-workers {self.range}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """What a training would do."""

    data: str
    model: str
    num_images: dict[str, int]
    """By split."""
    num_captions: int
    """Captions of the training split."""
    num_epochs: dict[str, int]
    """Maximum number of epochs, by phase."""
    num_epochs_done: int
    """Epochs that an earlier call finished and this one keeps."""
    num_workers: str
    gpus_per_worker: float
    batch_size: int
    """Images of a step, over all workers."""
    seconds: float | None
    """Maximum duration, if each remaining epoch takes as long as the last one; None if there is none yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedTraining:
    """A training that may begin."""

    config: TrainingRunConfig
    """The run, with the recipe completed by the model it starts from."""
    data: CaptionedImages
    model: str
    work: str
    features: str
    """Folder for cached features."""
    workers: Workers
    start_model: ModelFolder | None
    encoder: Encoder
    vocabulary: Vocabulary
    tokenizer_note: str
    """Which tokenizer was chosen, and why; "" if the recipe or the model that the training starts from names it."""
    settings: dict[str, Any]
    """The contents of settings.json: everything that must not change between a training and its resumption."""

    @property
    def recipe(self) -> Recipe:
        """The run's recipe."""
        return self.config.recipe

    def plan(self) -> TrainingPlan:
        """What the training would do, after the epochs that earlier calls have finished."""
        rows = read_metrics(self.work)
        num_left = num_epochs(self.recipe) - len(rows) if next_phase(rows, self.recipe) else 0
        return TrainingPlan(
            data=self.data.location,
            model=self.model,
            num_images=self.data.count_splits(),
            num_captions=count_captions(self.data.split(TRAIN)),
            num_epochs={phase: settings.epochs for phase, settings in phases(self.recipe).items()},
            num_epochs_done=len(rows),
            num_workers=str(self.workers),
            gpus_per_worker=self.workers.gpus,
            batch_size=self.recipe.training.batch_size,
            seconds=num_left * rows[-1]["seconds"] if rows else None,
        )


def load_data(
    config: TrainingRunConfig,
    *,
    decode: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> CaptionedImages:
    """Read the data set of a training, and check it like `imcap check` unless the training has finished an epoch.

    Args:
        decode: whether the check reads every image. A training itself finds out which images cannot be read.
        on_progress: see `check_dataset`.

    Raises:
        DatasetError: it has no training or no validation split, or is unusable and the config does not allow that.
    """
    columns = ColumnOptions(image=config.image_column, caption=config.caption_column, id=config.id_column)
    data = load_dataset(config.data, columns=columns, allow_outside_paths=config.allow_outside_paths)
    for split in (TRAIN, VALIDATION):
        data.split(split)
    work = storage.join(storage.absolute(config.model), WORK_FOLDER)
    if storage.exists(recorded := storage.join(work, CAPTIONS_FILE)):
        data = _with_recorded_splits(data, recorded)
    else:
        data = keep_duplicates_together(data, on_progress=on_progress)
    if not (config.allow_unusable or read_metrics(work)):
        require_usable(data, recipe=config.recipe, decode=decode, on_progress=on_progress)
    return data


def _with_recorded_splits(data: CaptionedImages, captions: str) -> CaptionedImages:
    """The data set with the splits with which its training began, if the data do not name the splits."""
    if data.has_official_splits:
        return data
    recorded = read_table(captions, ["image_id", "split"])
    positions = pa.compute.index_in(data.table["image_id"], value_set=recorded["image_id"])
    splits = pa.compute.coalesce(recorded["split"].take(positions), data.table["split"])
    return replace(data, table=data.table.set_column(data.table.schema.get_field_index("split"), "split", splits))


def prepare_training(
    config: TrainingRunConfig, resources: ResourcesConfig, *, data: CaptionedImages, cluster: ClusterResources
) -> PreparedTraining:
    """Check everything that `train` needs with these arguments. Nothing is written.

    Raises:
        InputError: something does not fit.
    """
    workers = Workers.choose(resources, cluster)
    workers.require(cluster, config.recipe.training.batch_size)
    train_images, _ = data.split(TRAIN), data.split(VALIDATION)  # raises if a split is missing
    start_model, recipe = _read_start(config)
    encoder = _build_encoder(recipe, start_model, config.encoder_weights)
    require_layer(encoder, recipe.finetune.first_layer)
    model = storage.absolute(config.model)
    work = storage.join(model, WORK_FOLDER)
    recipe, tokenizer_note = _with_tokenizer(recipe, train_images, start_model, recorded=_recorded_tokenizer(work))
    settings = _build_settings(data, recipe, encoder, config.seed)
    if start_model:
        settings["start_from"] = start_model.fingerprint
    _refuse_other_contents(model, work, settings, data, recipe)
    features = resources.features or storage.join(storage.parent(model), "_features")
    if storage.is_file(features := storage.absolute(features)):
        raise InputError(f"--features must be a folder, got a file: {features}")
    return PreparedTraining(
        config=replace(config, recipe=recipe),
        data=data,
        model=model,
        work=work,
        features=features,
        workers=workers,
        start_model=start_model,
        encoder=encoder,
        vocabulary=_build_vocabulary(train_images, recipe, start_model),
        tokenizer_note=tokenizer_note,
        settings=settings,
    )


def _read_start(config: TrainingRunConfig) -> tuple[ModelFolder | None, Recipe]:
    """The model to start from, if any, and the recipe completed by it."""
    recipe = config.recipe
    find_decoder(recipe.decoder)
    repetitions = recipe.finetune.repetitions
    if not config.start_from and not recipe.training.epochs and recipe.finetune.epochs and repetitions > 1:
        raise InputError(
            f"with finetune.repetitions {repetitions} all repetitions must start from the same weights, but "
            "training.epochs is 0: give --start-from, or more epochs"
        )
    start_model = None
    if config.start_from:
        start_model = average_models([read_model_folder(location) for location in config.start_from])
        recipe = _with_architecture(recipe, start_model)
    return start_model, replace(recipe, preprocessing=resolve_preprocessing(recipe.encoder, recipe.preprocessing))


def _with_tokenizer(
    recipe: Recipe, images: pa.Table, model: ModelFolder | None, *, recorded: str | None
) -> tuple[Recipe, str]:
    """The recipe with a tokenizer instead of `auto`, and a note if it was chosen here.

    Args:
        model: its tokenizer is used, unless most words are not in its vocabulary: then they are of another language.
        recorded: the tokenizer with which this training began.
    """
    tokenizer, note = recipe.vocabulary.tokenizer, ""
    if model and share_of_unknown_words(images, model.vocabulary) < MAX_UNKNOWN_WORDS:
        tokenizer = model.vocabulary.tokenizer
    elif tokenizer == AUTO and recorded:
        tokenizer = recorded
    elif tokenizer == AUTO:
        tokenizer, reason = choose_tokenizer(caption for texts in images["captions"].to_pylist() for caption in texts)
        note = f"tokenizer {tokenizer}: {reason}"
    return replace(recipe, vocabulary=replace(recipe.vocabulary, tokenizer=tokenizer)), note


def share_of_unknown_words(images: pa.Table, vocabulary: Vocabulary) -> float:
    """The share of the words in the images' captions that are not in a vocabulary."""
    captions = [caption for texts in images["captions"].to_pylist() for caption in texts]
    ids = [token_id for caption in captions for token_id in vocabulary.to_ids(caption, max_length=MAX_LENGTH)[1:-1]]
    return ids.count(UNKNOWN_ID) / max(1, len(ids))


def _recorded_tokenizer(work: str) -> str | None:
    try:
        settings = json.loads(storage.read_bytes(storage.join(work, SETTINGS_FILE)))
        return str(settings["recipe"]["vocabulary"]["tokenizer"])
    except (OSError, ValueError, LookupError, TypeError):  # there is none yet, or it is refused below
        return None


def _build_vocabulary(images: pa.Table, recipe: Recipe, model: ModelFolder | None) -> Vocabulary:
    """The words of the captions, after those of the model that the training starts from."""
    captions = (caption for captions in images["captions"].to_pylist() for caption in captions)
    start = model.vocabulary if model else Vocabulary([])
    return start.extend(captions, tokenizer=recipe.vocabulary.tokenizer, min_count=recipe.vocabulary.min_count)


def count_captions(images: pa.Table) -> int:
    """Number of captions of all these images."""
    return int(pa.compute.sum(pa.compute.list_value_length(images["captions"])).as_py())


def _with_architecture(recipe: Recipe, model: ModelFolder) -> Recipe:
    """The recipe with the CNN, preprocessing and decoder of a model; it keeps its own image size, if set."""
    image_size = recipe.preprocessing.image_size or model.preprocessing.image_size
    return replace(
        recipe,
        encoder=model.encoder,
        preprocessing=replace(model.preprocessing, image_size=image_size),
        decoder=replace(model.decoder, dropout=recipe.decoder.dropout),
    )


def _build_encoder(recipe: Recipe, model: ModelFolder | None, weights_path: str | None) -> Encoder:
    """The CNN of a recipe, with the model's weights if the model has its own."""
    if model and (tensors := select_tensors("encoder.", model.tensors)):
        return with_cnn_weights(build_encoder(recipe.encoder, recipe.preprocessing, tensors=tensors), model.tensors)
    expected = model.encoder_weights if model else None
    return build_encoder(recipe.encoder, recipe.preprocessing, weights_path=weights_path, expected=expected)


def _build_settings(data: CaptionedImages, recipe: Recipe, encoder: Encoder, seed: int) -> dict[str, Any]:
    """The contents of settings.json, see `PreparedTraining`."""
    digest = hashlib.sha256()
    for batch in data.table.to_batches():
        for row in batch.to_pylist():
            digest.update(json.dumps([row["image_id"], row["split"], row["captions"]]).encode())
    settings: dict[str, Any] = {
        "recipe": to_mapping(recipe),
        "seed": seed,
        "data_sha256": digest.hexdigest(),
        "encoder_weights": {"source": encoder.weights.source, "sha256": encoder.weights.sha256},
    }
    if data.image_columns:
        settings["image_columns"] = list(data.image_columns)
    return settings


def _refuse_other_contents(
    model: str, work: str, settings: Mapping[str, Any], data: CaptionedImages, recipe: Recipe
) -> None:
    """Raise OutputError if the model's folder contains anything but this training, or a shorter one to continue."""
    location = storage.join(work, SETTINGS_FILE)
    if storage.exists(location):
        before = _read_settings(location, model)
        if "image_columns" not in before and "image_columns" in settings:
            if column := before.pop("image_column", None):
                before["image_columns"] = [column]
            else:
                _refuse_other_column(model, data)
                before["image_columns"] = settings["image_columns"]
        different = list(_differences(before, settings))
        longer = [difference for difference in different if _is_longer(*difference)]
        if others := [difference for difference in different if difference not in longer]:
            raise OutputError(
                f"{model} holds a training with another {_describe_differences(others)}: choose another folder or "
                "remove it"
            )
        if longer:
            _require_lengthening(model, read_metrics(work), recipe, _describe_differences(longer))
    elif storage.exists(storage.join(model, CONFIG_FILE)):
        raise OutputError(f"{model} is a finished model: choose another folder or remove it")
    elif storage.is_file(model) or (storage.is_folder(model) and has_foreign_files(model, {f"{WORK_FOLDER}/owner"})):
        raise OutputError(f"{model} exists and is no training of imcap: choose another folder")


def _read_settings(location: str, model: str) -> dict[str, Any]:
    try:
        settings = json.loads(storage.read_bytes(location))
        if not isinstance(settings, dict):
            raise ValueError("expected an object")
    except ValueError as error:
        raise OutputError(
            f"{location} is corrupt, so it is unknown what was trained in {model} ({error}): restore the file, or "
            "choose another folder"
        ) from error
    recipe = settings.get("recipe")
    if isinstance(recipe, dict):
        # A setting that did not exist when the training began had its default value.
        for section, defaults in to_mapping(Recipe()).items():
            if isinstance(recorded := recipe.get(section, {}), dict):
                recipe[section] = defaults | recorded
    return settings


def _refuse_other_column(model: str, data: CaptionedImages) -> None:
    """Raise OutputError if the training was begun by an earlier version that read images from another column."""
    for location in data.tables:
        try:
            schema = read_schema(location)
            before = find_image_column_by_type(schema, location).name
            now = read_image_column(schema, location, data.image_columns).name
        except (
            pa.ArrowException,
            OSError,
            InputError,
        ):  # a table without images, from which the earlier version read none either
            continue
        if before != now:
            raise OutputError(
                f"{model} holds a training that read the images of {location} from column {before}, and would now read "
                f"them from {now}: give --image-column {before}, or choose another folder"
            )


def _is_longer(name: str, before: Any, now: Any) -> bool:
    """Whether a setting differs only in that a training takes more epochs."""
    _, _, setting = name.rpartition(".")
    if setting not in ("epochs", "patience") or not isinstance(before, int) or not isinstance(now, int):
        return False
    if setting == "patience":  # 0: without limit
        before, now = before or sys.maxsize, now or sys.maxsize
    return bool(now > before)


def _require_lengthening(model: str, history: History, recipe: Recipe, change: str) -> None:
    """Raise OutputError unless the training can continue with more epochs than it was begun with."""
    if not history:
        return
    last, following = history[-1]["phase"], next_phase(history, recipe)
    order = list(phases(recipe))
    if following is None:
        raise OutputError(
            f"{model}: {change} adds no epoch, because the training stopped after {len(history)} epochs without a "
            f"better score: set {'training' if last == CROSS_ENTROPY else kind_of(last)}.patience=0 too"
        )
    if order.index(following) < order.index(last):
        raise OutputError(
            f"{model}: {change} comes too late, because the {last} phase has begun: choose another folder, perhaps "
            f"with --start-from {model}"
        )


def _describe_differences(differences: Iterable[tuple[str, Any, Any]]) -> str:
    """Settings as the user writes them, with the values before and now."""
    return ", ".join(
        f"{_SETTING_NAMES.get(name, name.removeprefix('recipe.'))} ({short_value(before)}, now {short_value(now)})"
        for name, before, now in differences
    )


_SETTING_NAMES: Final = {"data_sha256": "set of images, splits or captions"}


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The name of each setting that differs, and both values."""
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            yield f"{prefix}{name}", old, new
