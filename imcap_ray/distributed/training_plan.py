"""A data set and a recipe -> everything a training needs before it starts, and what it would do."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from imcap_ray import storage
from imcap_ray.config import Recipe, to_mapping
from imcap_ray.data.columns import find_image_column_by_type, read_image_column
from imcap_ray.data.datasets import TRAIN, VALIDATION, CaptionedImages
from imcap_ray.distributed.cluster import ClusterResources, require
from imcap_ray.distributed.phase_start import with_cnn_weights
from imcap_ray.errors import DatasetError, InputError, OutputError
from imcap_ray.models.decoders import find_decoder
from imcap_ray.models.encoders import Encoder, build_encoder, resolve_preprocessing
from imcap_ray.models.model_folder import CONFIG_FILE, ModelFolder, average_models, read_model_folder, select_tensors
from imcap_ray.runs.training_run import SETTINGS_FILE, WORK_FOLDER, read_metrics
from imcap_ray.text.vocabulary import Vocabulary
from imcap_ray.training.loop import require_layer
from imcap_ray.training.phases import next_phase, num_epochs, phases

CPUS_FOR_READING: Final = 1
"""Beyond the workers': Ray Data reads their images with them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """What a training would do."""

    data: str
    model: str
    num_images: dict[str, int]
    """By split."""
    num_captions: int
    """Of the training split."""
    num_epochs: dict[str, int]
    """At most, by phase."""
    num_epochs_done: int
    """By an earlier call, and kept by this one."""
    num_workers: str
    gpus_per_worker: float
    batch_size: int
    """Images, over all workers."""
    seconds: float | None
    """At most, if the epochs that are left take what the last one took; None where there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedTraining:
    """A training that may begin."""

    data: CaptionedImages
    model: str
    work: str
    recipe: Recipe
    num_workers: int | tuple[int, int]
    gpus_per_worker: float
    start_model: ModelFolder | None
    encoder: Encoder
    vocabulary: Vocabulary
    settings: dict[str, Any]
    """What must not change between a training and its resumption."""

    def plan(self) -> TrainingPlan:
        """What it would do, with what earlier calls have done."""
        rows = read_metrics(self.work)
        left = num_epochs(self.recipe) - len(rows) if next_phase(rows, self.recipe) else 0
        return TrainingPlan(
            data=self.data.location,
            model=self.model,
            num_images=self.data.count_splits(),
            num_captions=count_captions(self.data.split(TRAIN)),
            num_epochs={phase: settings.epochs for phase, settings in phases(self.recipe).items()},
            num_epochs_done=len(rows),
            num_workers=describe_workers(self.num_workers),
            gpus_per_worker=self.gpus_per_worker,
            batch_size=self.recipe.training.batch_size,
            seconds=left * rows[-1]["seconds"] if rows else None,
        )


def prepare_training(
    data: CaptionedImages,
    model: str,
    *,
    recipe: Recipe,
    start_from: Sequence[str] = (),
    resources: ClusterResources,
    num_workers: int | tuple[int, int] | None = None,
    gpus_per_worker: float | None = None,
    seed: int = 0,
    encoder_weights: str | None = None,
) -> PreparedTraining:
    """Ask for all that `train` needs with these arguments. Nothing is written.

    Raises:
        InputError: something does not fit.
    """
    model = storage.absolute(model)
    gpus = gpus_per_worker if gpus_per_worker is not None else float(resources.expects_gpus)
    if num_workers is None:
        num_workers = max(1, int(resources.gpus / gpus) if gpus >= 1 else 1)
    least, most = num_workers if isinstance(num_workers, tuple) else (num_workers, num_workers)
    if 0 < gpus < 1 < most:
        raise InputError(
            f"--gpus-per-worker {gpus:g} would put several of {most} workers on one GPU, which NCCL, the library by "
            "which they exchange gradients, refuses: give each 1, or train with --num-workers 1"
        )
    if recipe.training.batch_size < most:
        raise InputError(f"--num-workers {most} exceeds the recipe's batch of {recipe.training.batch_size} images")
    # Ray asks no autoscaler for CPUs of an elastic training: the least have to be there.
    present = resources if isinstance(num_workers, int) or gpus else replace(resources, max_cpus=0.0)
    what = f"--num-workers {f'{least}-{most}' if least != most else most}"
    require(present, cpus=least + CPUS_FOR_READING, gpus=least * gpus, what=what)
    train_images, _ = data.split(TRAIN), data.split(VALIDATION)  # both, or nothing is begun
    [first] = data.manifest(train_images.slice(0, 1)).to_pylist()
    first_path = first["image_path"] or first["table_path"]
    if not storage.exists(first_path):
        raise DatasetError(
            f"{data.location}: its images are not where they should be, the first is missing: {first_path}"
        )
    if not start_from and not recipe.training.epochs and recipe.finetune.epochs and recipe.finetune.repetitions > 1:
        raise InputError(
            f"finetune.repetitions {recipe.finetune.repetitions} must have one start, but training.epochs is 0: "
            "give --start-from, or more epochs"
        )
    find_decoder(recipe.decoder)
    start_model = None
    if start_from:
        start_model = average_models([read_model_folder(place) for place in start_from])
        recipe = _with_architecture(recipe, start_model)
    recipe = replace(recipe, preprocessing=resolve_preprocessing(recipe.encoder, recipe.preprocessing))
    encoder = _build_encoder(recipe, start_model, encoder_weights)
    require_layer(encoder, recipe.finetune.first_layer)
    vocabulary = (
        start_model.vocabulary
        if start_model
        else Vocabulary.build(
            (caption for captions in train_images["captions"].to_pylist() for caption in captions),
            tokenizer=recipe.vocabulary.tokenizer,
            min_count=recipe.vocabulary.min_count,
        )
    )

    work = storage.join(model, WORK_FOLDER)
    settings = _settings(data, recipe, encoder, seed)
    if data.image_columns:
        settings["image_columns"] = list(data.image_columns)
    if start_model:
        settings["start_from"] = start_model.fingerprint
    _refuse_another(model, work, settings, data)
    return PreparedTraining(
        data=data,
        model=model,
        work=work,
        recipe=recipe,
        num_workers=num_workers,
        gpus_per_worker=gpus,
        start_model=start_model,
        encoder=encoder,
        vocabulary=vocabulary,
        settings=settings,
    )


def count_captions(images: pa.Table) -> int:
    """Number of captions of these images."""
    return int(pa.compute.sum(pa.compute.list_value_length(images["captions"])).as_py())


def max_workers(num_workers: int | tuple[int, int]) -> int:
    """The largest number of workers that was asked for."""
    return num_workers[1] if isinstance(num_workers, tuple) else num_workers


def _with_architecture(recipe: Recipe, model: ModelFolder) -> Recipe:
    """The recipe with the CNN, preprocessing, tokenizer and decoder of a model; a size of its own it keeps."""
    image_size = recipe.preprocessing.image_size or model.preprocessing.image_size
    return replace(
        recipe,
        encoder=model.encoder,
        preprocessing=replace(model.preprocessing, image_size=image_size),
        vocabulary=replace(recipe.vocabulary, tokenizer=model.vocabulary.tokenizer),
        decoder=replace(model.decoder, dropout=recipe.decoder.dropout),
    )


def _build_encoder(recipe: Recipe, model: ModelFolder | None, weights_path: str | None) -> Encoder:
    """The CNN of a recipe, with the weights of the model where that has its own."""
    if model and (inside := select_tensors("encoder.", model.tensors)):
        return with_cnn_weights(build_encoder(recipe.encoder, recipe.preprocessing, tensors=inside), model.tensors)
    expected = model.encoder_weights if model else None
    return build_encoder(recipe.encoder, recipe.preprocessing, weights_path=weights_path, expected=expected)


def describe_workers(num_workers: int | tuple[int, int]) -> str:
    """How many, for people: "1 worker", "2 to 4 workers"."""
    if isinstance(num_workers, tuple):
        return f"{num_workers[0]} to {num_workers[1]} workers"
    return f"{num_workers} worker{'s' * (num_workers != 1)}"


def _settings(data: CaptionedImages, recipe: Recipe, encoder: Encoder, seed: int) -> dict[str, Any]:
    """What must not change between a training and its resumption."""
    digest = hashlib.sha256()
    for batch in data.table.to_batches():
        for row in batch.to_pylist():
            digest.update(json.dumps([row["image_id"], row["split"], row["captions"]]).encode())
    weights = {"source": encoder.weights.source, "sha256": encoder.weights.sha256}
    return {"recipe": to_mapping(recipe), "seed": seed, "data_sha256": digest.hexdigest(), "encoder_weights": weights}


def _refuse_another(model: str, work: str, settings: dict[str, Any], data: CaptionedImages) -> None:
    """Raise OutputError where the model's folder holds something else than this training."""
    place = storage.join(work, SETTINGS_FILE)
    if storage.exists(place):
        try:
            before = json.loads(storage.read_bytes(place))
            if not isinstance(before, dict):
                raise ValueError("expected an object")
        except ValueError as error:
            raise OutputError(
                f"{place} is damaged, so nothing says what was trained in {model} ({error}): "
                "bring the file back, or choose another folder"
            ) from error
        if "image_columns" not in before and "image_columns" in settings:
            if named := before.pop("image_column", None):
                before["image_columns"] = [named]
            else:
                _refuse_another_column(model, data)
                before["image_columns"] = settings["image_columns"]
        different = sorted(_differences(before, settings))
        if different:
            raise OutputError(
                f"{model} holds a training with another {', '.join(different)}: choose another folder or remove it"
            )
    elif storage.exists(storage.join(model, CONFIG_FILE)):
        raise OutputError(f"{model} is a finished model: choose another folder or remove it")
    elif storage.is_file(model) or (storage.is_folder(model) and _is_somebody_elses(model)):
        raise OutputError(f"{model} exists and is no training of imcap: choose another folder")


def _refuse_another_column(model: str, data: CaptionedImages) -> None:
    """Raise OutputError if the earlier version that began this training read images from another column."""
    for location in data.tables:
        filesystem, path = storage.resolve(location)
        try:
            schema = pq.read_schema(path, filesystem=filesystem)
            before = find_image_column_by_type(schema, location).name
            now = read_image_column(schema, location, data.image_columns).name
        except (pa.ArrowException, OSError, InputError):  # no table with images: the earlier version read none from it
            continue
        if before != now:
            raise OutputError(
                f"{model} holds a training that read the images of {location} from column {before}, and would now read "
                f"them from {now}: give --image-column {before}, or choose another folder"
            )


def _is_somebody_elses(model: str) -> bool:
    """Whether there is more than a training leaves that was killed in its first moment."""
    names = (file.name for file in storage.list_files(model))
    return any(name != f"{WORK_FOLDER}/owner" and not storage.is_temporary(name.rpartition("/")[2]) for name in names)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            yield f"{prefix}{name}"
