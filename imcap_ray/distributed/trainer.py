"""Captioned images -> a model folder, by Ray Train."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data.expressions
import ray.train
import safetensors.torch
import torch
from ray.data import DataContext
from ray.exceptions import RayError
from ray.train import CheckpointConfig, DataConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.config import FailureConfig  # the one `ray.train` exports at run time; mypy sees the old one

from imcap_ray import storage
from imcap_ray.captioner import CONFIG_FILE, save_model_folder
from imcap_ray.config import Recipe, to_mapping
from imcap_ray.datasets import DATASET_SCHEMA, TRAIN, VALIDATION, CaptionedImages
from imcap_ray.distributed.checkpoints import NUM_BEST_TO_KEEP, SCORE, choose_best, recover
from imcap_ray.distributed.cluster import ClusterResources, require
from imcap_ray.distributed.features import FeatureCache, cache_features, cache_key
from imcap_ray.distributed.images import Progress, default_num_actors, explain, repeating
from imcap_ray.distributed.train_worker import (
    CAPTIONS_FILE,
    DECODER_FILE,
    METRICS_FILE,
    RUN_FOLDER,
    VOCABULARY_FILE,
    is_finished,
    train_worker,
    write_metrics,
)
from imcap_ray.encoders import Encoder, build_encoder, resolve_normalisation
from imcap_ray.errors import DatasetError, ImcapError, InputError, OutputError
from imcap_ray.model_card import write_card
from imcap_ray.vocabulary import Vocabulary

WORK_FOLDER: Final = "_training"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingResult:
    """What a training came to."""

    model: str
    metrics: dict[str, Any]
    """Of the epoch that was kept, on the validation split."""
    num_epochs: int
    seconds: float


def train(
    data: CaptionedImages,
    model: str,
    *,
    recipe: Recipe,
    recipe_name: str,
    resources: ClusterResources,
    num_workers: int | None = None,
    gpus_per_worker: float | None = None,
    seed: int = 0,
    encoder_weights: str | None = None,
    features: str | None = None,
    echo: Callable[[str], None] = print,
) -> TrainingResult:
    """Train a decoder on the data set's training split and write the model folder.

    An interrupted training goes on from its newest whole checkpoint when called again with the same arguments.

    Args:
        model: folder to write, path or URI; on a cluster one that every node sees.
        num_workers: data-parallel processes; None: one per GPU, or one where there is none.
        features: folder for cached features; None: `_features` beside the model folder, shared by its neighbours.

    Raises:
        InputError: something does not fit, found before work began.
        ImcapError: the training failed; the same call goes on from the last epoch, or the message says what to do.
    """
    start = time.time()
    model = storage.absolute(model)
    gpus = gpus_per_worker if gpus_per_worker is not None else (1.0 if resources.gpus else 0.0)
    workers = num_workers or max(1, int(resources.gpus / gpus) if gpus else 1)
    if recipe.training.batch_size < workers:
        raise InputError(f"--num-workers {workers} exceeds the recipe's batch of {recipe.training.batch_size} images")
    # One CPU beyond the workers': Ray Data reads their features with it.
    require(resources, cpus=workers + 1, gpus=workers * gpus, what=f"--num-workers {workers}")
    train_images, validation_images = data.split(TRAIN), data.split(VALIDATION)
    first_path = train_images["image_path"][0].as_py()
    if not storage.exists(first_path):
        raise DatasetError(
            f"{data.location}: its images are not where they should be, the first is missing: {first_path}"
        )
    encoder = build_encoder(recipe.encoder, recipe.preprocessing, weights_path=encoder_weights)
    vocabulary = Vocabulary.build(
        (caption for captions in train_images["captions"].to_pylist() for caption in captions),
        tokenizer=recipe.vocabulary.tokenizer,
        min_count=recipe.vocabulary.min_count,
    )

    work = storage.join(model, WORK_FOLDER)
    settings = _settings(data, recipe, encoder, seed)
    _claim(model, work, settings)
    for note in data.notes:
        echo(f"{data.location}: {note}")
    run = storage.join(work, RUN_FOLDER)
    resumed = recover(run, finished_epochs=len(_read_metrics(work)), echo=echo)
    history = resumed.history if resumed else []
    write_metrics(work, history)

    caches = {}
    for split, images in ((TRAIN, train_images), (VALIDATION, validation_images)):
        flip = recipe.training.flip and split == TRAIN
        key = cache_key(
            images["image_id"],
            location=data.location,
            encoder=recipe.encoder,
            weights=encoder.weights,
            preprocessing=recipe.preprocessing,
            flip=flip,
        )
        caches[split] = cache_features(
            images,
            storage.join(features or storage.join(storage.parent(model), "_features"), key),
            encoder=encoder,
            flip=flip,
            num_actors=default_num_actors(resources, 1.0 if resources.gpus else 0.0),
            gpus_per_actor=1.0 if resources.gpus else 0.0,
            on_progress=_echo_features(echo, split, images.num_rows),
        )
        for note in caches[split].notes:
            echo(f"features of {split} images: {note}")
        if failures := caches[split].failures:
            first = failures[0]
            echo(
                f"{len(failures):,} {split} images left out, they cannot be read; the first is {first['image_id']}: "
                f"{first['error_message']}"
            )
    _write_table(storage.join(work, CAPTIONS_FILE), data.table)
    storage.write_bytes(storage.join(work, VOCABULARY_FILE), vocabulary.to_json().encode())
    echo(
        f"training {recipe.decoder.name} decoder, {len(vocabulary):,} tokens, on {train_images.num_rows:,} images, "
        f"{workers} worker{'s' * (workers != 1)}, {recipe.training.epochs} epochs at most"
    )
    if history:
        echo(f"going on after epoch {len(history)}")
    if not is_finished(history, recipe.training):
        _fit(
            caches,
            work=work,
            recipe=recipe,
            seed=seed,
            workers=workers,
            gpus=gpus,
            threads=max(1, resources.physical_cores // workers) if resources.is_local else 1,
            echo=echo,
        )
    best, newest = choose_best(run, echo=echo)
    kept = _Kept(
        decoder_tensors=safetensors.torch.load(storage.read_bytes(storage.join(best.location, DECODER_FILE))),
        metrics=best.history[-1],
    )
    _write_model(model, kept, data, train_images, recipe, recipe_name, seed, encoder, vocabulary)
    return TrainingResult(model=model, metrics=kept.metrics, num_epochs=newest.epoch, seconds=time.time() - start)


def _settings(data: CaptionedImages, recipe: Recipe, encoder: Encoder, seed: int) -> dict[str, Any]:
    """What must not change between a training and its resumption."""
    digest = hashlib.sha256()
    for batch in data.table.to_batches():
        for row in batch.to_pylist():
            digest.update(json.dumps([row["image_id"], row["split"], row["captions"]]).encode())
    weights = {"source": encoder.weights.source, "sha256": encoder.weights.sha256}
    return {"recipe": to_mapping(recipe), "seed": seed, "data_sha256": digest.hexdigest(), "encoder_weights": weights}


def _claim(model: str, work: str, settings: dict[str, Any]) -> None:
    """Refuse a folder that holds something else; remember what is trained here."""
    place = storage.join(work, "settings.json")
    if storage.exists(place):
        try:
            before = json.loads(storage.read_bytes(place))
        except ValueError as error:
            raise OutputError(
                f"{place} is damaged, so nothing says what was trained in {model} ({error}): "
                "bring the file back, or choose another folder"
            ) from error
        different = sorted(_differences(before, settings))
        if different:
            raise OutputError(
                f"{model} holds a training with another {', '.join(different)}: choose another folder or remove it"
            )
    elif storage.exists(storage.join(model, CONFIG_FILE)):
        raise OutputError(f"{model} is a finished model: choose another folder or remove it")
    elif storage.is_file(model) or (storage.is_folder(model) and any(True for _ in storage.list_files(model))):
        raise OutputError(f"{model} exists and is no training of imcap: choose another folder")
    storage.write_bytes(place, json.dumps(settings, indent=2).encode())


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            yield f"{prefix}{name}"


def _echo_features(echo: Callable[[str], None], split: str, total: int) -> Callable[[Progress], None]:
    start = time.monotonic()
    last = [start]

    def on_progress(progress: Progress) -> None:
        now = time.monotonic()
        if now - last[0] >= 10 and progress.num_images:
            last[0] = now
            rate = progress.num_images / (now - start)
            echo(f"features of {split} images: {progress.num_images:,} of {total:,}, {rate:.0f} images/s")

    return on_progress


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    decoder_tensors: dict[str, torch.Tensor]
    metrics: dict[str, Any]


def _fit(
    caches: Mapping[str, FeatureCache],
    *,
    work: str,
    recipe: Recipe,
    seed: int,
    workers: int,
    gpus: float,
    threads: int,
    echo: Callable[[str], None],
) -> None:
    """Run the workers until the training is finished; the checkpoints are in the run's folder then."""
    context = DataContext.get_current().copy()
    context.execution_options.preserve_order = True  # the same seed, the same batches
    # A read task's block is what the local shuffle and the object store hold at a time.
    context.target_max_block_size = 64 * 2**20
    with DataContext.current(context):
        datasets = {
            split: ray.data.read_parquet(
                [storage.resolve(file)[1] for file in cache.files()],
                filesystem=storage.resolve(cache.folder)[0],
            )
            .select_columns(["image_id", "features", "error_code"])
            # Before Ray splits the rows: workers with unequal numbers of batches would wait for each other.
            .filter(expr=ray.data.expressions.col("error_code") == "")
            for split, cache in caches.items()
        }
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={
                "work": work,
                "recipe": to_mapping(recipe),
                "seed": seed,
                "threads": threads,
                "shapes": {split: cache.shape for split, cache in caches.items()},
                "num_train_images": caches[TRAIN].num_images - len(caches[TRAIN].failures),
            },
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=gpus > 0,
                resources_per_worker={"CPU": 1, **({"GPU": gpus} if gpus else {})},
            ),
            run_config=RunConfig(
                name=RUN_FOLDER,
                storage_path=work,
                failure_config=FailureConfig(max_failures=3, controller_failure_limit=3),
                checkpoint_config=CheckpointConfig(
                    num_to_keep=NUM_BEST_TO_KEEP, checkpoint_score_attribute=SCORE, checkpoint_score_order="max"
                ),
            ),
            datasets={**datasets},
            dataset_config=DataConfig(datasets_to_split=[TRAIN]),
        )
        with repeating(_echo_epochs(work, echo), seconds=2.0):
            try:
                trainer.fit()
            except (RayError, ray.train.TrainingFailedError) as error:
                raise ImcapError(
                    f"training stopped by an error: {explain(error)}; the same command goes on after its last epoch"
                ) from error


def _echo_epochs(work: str, echo: Callable[[str], None]) -> Callable[[], None]:
    """A function that says the epochs which the workers have added to their history since it was last called."""
    known = len(_read_metrics(work))

    def look() -> None:
        nonlocal known
        rows = _read_metrics(work)
        for row in rows[known:]:
            echo(
                f"epoch {row['epoch']}: training loss {row['train_loss']:.3f}, validation CIDEr-D "
                f"{row['cider_d']:.3f}, BLEU-4 {100 * row['bleu_4']:.1f}, {row['seconds']:.0f} s"
            )
        known = max(known, len(rows))

    return look


def _read_metrics(work: str) -> list[dict[str, Any]]:
    """Metrics of the epochs done, up to the first line that is damaged: what counts is in the checkpoints."""
    place = storage.join(work, METRICS_FILE)
    if not storage.exists(place):
        return []
    rows = []
    for line in storage.read_bytes(place).decode(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        rows.append(row)
    return rows


def _write_table(location: str, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table.cast(DATASET_SCHEMA), sink, compression="zstd")
    storage.write_bytes(location, sink.getvalue().to_pybytes())


def _write_model(
    model: str,
    kept: _Kept,
    data: CaptionedImages,
    train_images: pa.Table,
    recipe: Recipe,
    recipe_name: str,
    seed: int,
    encoder: Encoder,
    vocabulary: Vocabulary,
) -> None:
    save_model_folder(
        model,
        encoder=recipe.encoder,
        encoder_weights=encoder.weights,
        preprocessing=resolve_normalisation(recipe.encoder, recipe.preprocessing),
        decoder=recipe.decoder,
        decoder_tensors=kept.decoder_tensors,
        search=recipe.search,
        vocabulary=vocabulary,
        metrics={"validation": kept.metrics, "recipe": recipe_name, "seed": seed},
        card=write_card(
            name=model.rstrip("/").rpartition("/")[2],
            recipe=recipe,
            recipe_name=recipe_name,
            seed=seed,
            data=data.location.rstrip("/").rpartition("/")[2],
            data_format=data.format,
            data_terms=data.terms,
            num_images=train_images.num_rows,
            num_captions=pa.compute.sum(pa.compute.list_value_length(train_images["captions"])).as_py(),
            vocabulary_size=len(vocabulary),
            encoder_weights=encoder.weights.source,
            metrics=kept.metrics,
        ),
        encoder_tensors=None if encoder.weights.portable else encoder.cnn.state_dict(),
    )
