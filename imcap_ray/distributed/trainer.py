"""Captioned images -> a model folder, by Ray Train."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
import ray.train
import safetensors.torch
from ray.data import DataContext
from ray.exceptions import RayError
from ray.train import CheckpointConfig, DataConfig, RunConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.config import FailureConfig, ScalingConfig

from imcap_ray import storage
from imcap_ray.config import Recipe, to_mapping
from imcap_ray.data.datasets import DATASET_SCHEMA, TRAIN, VALIDATION, CaptionedImages
from imcap_ray.data.image_reading import root_of
from imcap_ray.data.manifest import read_image_columns
from imcap_ray.data.parquet_files import write_table
from imcap_ray.distributed.checkpoints import NUM_BEST_TO_KEEP, choose_best, recover
from imcap_ray.distributed.cluster import ClusterResources, runtime_environment
from imcap_ray.distributed.failure_log import FailureLog, describe_failures, watch_failures
from imcap_ray.distributed.features import FeatureCache, FeatureEncoding, Views, cache_features, cache_key
from imcap_ray.distributed.gpus import require_gpus
from imcap_ray.distributed.image_pipeline import LoadImages, default_num_actors, describe_error, read_images
from imcap_ray.distributed.phase_start import read_weights, start_of_phase, start_weights_file, with_cnn_weights
from imcap_ray.distributed.ray_environment import temporary_environment
from imcap_ray.distributed.train_worker import train_worker
from imcap_ray.distributed.training_plan import (
    CPUS_FOR_READING,
    count_captions,
    describe_workers,
    max_workers,
    prepare_training,
)
from imcap_ray.errors import ImcapError, InputError
from imcap_ray.models.encoder_weights import FINETUNED
from imcap_ray.models.encoders import Encoder
from imcap_ray.models.model_folder import ModelSettings, save_model_folder, select_tensors
from imcap_ray.runs.feature_folder import FeatureFolder
from imcap_ray.runs.heartbeat import HEARTBEAT_SECONDS, repeating
from imcap_ray.runs.lease import Lease
from imcap_ray.runs.progress_reporter import ProgressReporter
from imcap_ray.runs.training_run import (
    CAPTIONS_FILE,
    RUN_FOLDER,
    SETTINGS_FILE,
    VALIDATION_ADVICE,
    VOCABULARY_FILE,
    WEIGHTS_FILE,
    read_metrics,
    read_validation_ids,
    take_stop,
    write_heartbeat,
    write_metrics,
    write_validation_ids,
)
from imcap_ray.text.vocabulary import UNKNOWN_ID, Vocabulary
from imcap_ray.training.experiment_trackers import Trackers, tracking
from imcap_ray.training.model_card import write_card
from imcap_ray.training.phases import SCORE, next_phase, num_epochs, phases, reads_pixels

START_TIMEOUT: Final = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"

WORKERS_START_SECONDS: Final = 600
"""How long Ray Train waits for room for a fixed number of workers before it counts a failure, of which the fourth is
its last; a machine that takes the place of a lost one needs minutes to come. An elastic training goes on with fewer."""


class RoomForReading(ScalingConfig):
    """As many workers as Ray has room for, within limits, and CPUs left to read with.

    Ray's own would take every CPU that is alive, and the workers would wait for ever for what nobody can read.
    """

    _is_valid = False

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]  # a cluster that is yet to grow is no mistake
        self._is_valid = True

    @property
    def max_workers(self) -> int:
        """The most that may run now. Ray asks in the process that decides, before each start and once a minute."""
        most = super().max_workers
        if not self._is_valid or not self.elasticity_enabled or self.use_gpu:  # beside GPUs there are CPUs enough
            return most
        cpus = ray.cluster_resources().get("CPU", 0.0)  # type: ignore[no-untyped-call]
        return min(most, int(cpus) - CPUS_FOR_READING)


class StoppedError(ImcapError):
    """The workers have stopped for a reason that would stop them again."""


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
    recipe_options: Sequence[str] = (),
    start_from: Sequence[str] = (),
    resources: ClusterResources,
    num_workers: int | tuple[int, int] | None = None,
    gpus_per_worker: float | None = None,
    seed: int = 0,
    encoder_weights: str | None = None,
    features: str | None = None,
    reporter: ProgressReporter | None = None,
) -> TrainingResult:
    """Train a decoder on the data set's training split and write the model folder.

    An interrupted training goes on from its newest whole checkpoint when called again with the same arguments.

    Args:
        model: folder to write, path or URI; on a cluster one that every node sees.
        recipe_options: of the command line, what changed the recipe of this name; for the card.
        start_from: a model folder to start from, path or URI, or the name of the one that comes with the package. Its
            CNN, preprocessing, vocabulary and decoder are taken instead of the recipe's. Of several, their mean.
        num_workers: data-parallel processes; None: one per GPU, or one where there is none. The least and the most:
            as many as the cluster has room for, fewer when a node dies and more when one joins.
        features: folder for cached features; None: `_features` beside the model folder, shared by its neighbours.
        reporter: None: lines are printed to stdout.

    Raises:
        InputError: something does not fit, found before work began.
        ImcapError: the training failed; the same call goes on from the last epoch, or the message says what to do.
    """
    start = time.time()
    reporter = reporter or ProgressReporter(print)
    echo = reporter.report
    prepared = prepare_training(
        data,
        model,
        recipe=recipe,
        start_from=start_from,
        resources=resources,
        num_workers=num_workers,
        gpus_per_worker=gpus_per_worker,
        seed=seed,
        encoder_weights=encoder_weights,
    )
    model, work, recipe = prepared.model, prepared.work, prepared.recipe
    encoder, vocabulary, start_model = prepared.encoder, prepared.vocabulary, prepared.start_model
    num_workers, gpus = prepared.num_workers, prepared.gpus_per_worker
    train_images = data.split(TRAIN)
    if gpus:
        require_gpus(gpus)
    features = storage.absolute(features) if features else storage.join(storage.parent(model), "_features")
    if storage.is_file(features):
        raise InputError(f"--features must be a folder, got a file: {features}")
    lease = Lease.acquire(work)  # before anything else, so that an older run of the same training writes no more
    check = lease.require
    storage.remove_temporary(work)
    storage.write_bytes(storage.join(work, SETTINGS_FILE), json.dumps(prepared.settings, indent=2).encode())
    for note in data.notes:
        echo(f"{data.location}: {note}")
    run = storage.join(work, RUN_FOLDER)
    resumed = recover(run, finished_epochs=len(read_metrics(work)), echo=echo)
    history = resumed.history if resumed else []
    write_metrics(work, history)

    uses: list[FeatureFolder] = []
    with _alive(work, check, uses):
        caches = _cache(
            encoder,
            data=data,
            recipe=recipe,
            folder=features,
            resources=resources,
            gpus=min(1.0, gpus),  # a CNN runs on one
            training=model if storage.is_uri(model) else f"{socket.gethostname()}:{model}",
            reporter=reporter,
            check=check,
            on_use=uses.append,
        )
    check()
    for split, of_split in caches.items():
        if failures := of_split.failures:
            first = failures[0]
            echo(
                f"{len(failures):,} {split} images left out, they cannot be read; the first is {first['image_id']}: "
                f"{first['error_message']}"
            )
    fix_validation(data, caches[VALIDATION], work, history, echo=echo)
    _write_table(storage.join(work, CAPTIONS_FILE), data.table)
    storage.write_bytes(storage.join(work, VOCABULARY_FILE), vocabulary.to_json().encode())
    echo(
        f"training {recipe.decoder.name} decoder, {len(vocabulary):,} tokens, on {train_images.num_rows:,} images, "
        f"{describe_workers(num_workers)}, {num_epochs(recipe)} epochs at most"
    )
    if start_model:
        first_phase = next(iter(phases(recipe)))
        storage.write_bytes(start_weights_file(work, first_phase), safetensors.torch.save(start_model.tensors))
    if history:
        echo(f"going on after epoch {len(history)}")
    elif start_model:
        echo(f"starting from {start_model.location}; {_describe_unknown_words(train_images, vocabulary, recipe)}")
    parameters = {"recipe": recipe_name, "seed": seed, "data": data.location, **to_mapping(recipe)}
    name = model.rstrip("/").rpartition("/")[2]
    with tracking(work, history, run_name=name, parameters=parameters, echo=echo) as trackers:
        while (phase := next_phase(history, recipe)) is not None:
            start_file = start_of_phase(phase, history, work, recipe=recipe, echo=echo)
            current = with_cnn_weights(encoder, read_weights(start_file)) if start_file else encoder
            inputs = _write_manifests(data, caches, storage.join(work, "manifests")) if reads_pixels(phase) else caches
            failure = None
            try:
                with _alive(work, check, uses):
                    _fit(
                        phase,
                        inputs,
                        echo=echo,
                        work=work,
                        owner=lease.token,
                        recipe=recipe,
                        seed=seed,
                        encoder=current,
                        start_file=start_file,
                        workers=num_workers,
                        gpus=gpus,
                        threads=max(1, resources.physical_cores // max_workers(num_workers))
                        if resources.is_local
                        else 1,
                        watchers=[
                            _watch_epochs(work, reporter.report_epoch, trackers, check),
                            watch_room(num_workers, gpus, echo),
                        ],
                    )
            except StoppedError:
                raise
            except ImcapError as error:
                failure = error
            check()  # what looks half done may be what the run that has taken over is writing
            resumed = recover(run, finished_epochs=len(read_metrics(work)), echo=echo)
            if failure:  # Ray Train counts failures from the start, which a long training on spot machines must not
                if resumed is None or len(resumed.history) <= len(history):
                    raise failure
                echo(f"{failure}; going on after epoch {len(resumed.history)}")
            elif resumed is None or next_phase(resumed.history, recipe) == phase:
                raise ImcapError(f"the training ended before its {phase} phase did; the same command resumes")
            history = resumed.history
            trackers.log(history)
    best, newest = choose_best(run, echo=echo)
    weights = read_weights(storage.join(best.location, WEIGHTS_FILE))
    kept = with_cnn_weights(encoder, weights)
    metrics = best.history[-1]
    check()
    save_model_folder(
        model,
        ModelSettings(
            encoder=recipe.encoder,
            encoder_weights=kept.weights,
            preprocessing=recipe.preprocessing,
            decoder=recipe.decoder,
            search=recipe.search,
        ),
        decoder_tensors=select_tensors("decoder.", weights),
        vocabulary=vocabulary,
        metrics={
            "validation": metrics,
            "recipe": recipe_name,
            "seed": seed,
            # With that of the model it started from, of several the first's: the way by which it came there.
            "history": [*(start_model.metrics.get("history", []) if start_model else []), *newest.history],
        },
        card=write_card(
            name=name,
            recipe=recipe,
            recipe_name=recipe_name,
            recipe_options=recipe_options,
            start_from=start_from,
            seed=seed,
            data=data.location.rstrip("/").rpartition("/")[2],
            data_format=data.format,
            data_terms=data.terms,
            num_images=train_images.num_rows,
            num_captions=count_captions(train_images),
            vocabulary_size=len(vocabulary),
            encoder_weights=encoder.weights.source
            + ", fine-tuned" * (kept is not encoder and encoder.weights.source != FINETUNED),
            metrics=metrics,
        ),
        encoder_tensors=None if kept.weights.portable else kept.cnn.state_dict(),
    )
    for use in uses:
        use.leave()
    return TrainingResult(model=model, metrics=metrics, num_epochs=newest.epoch, seconds=time.time() - start)


def _cache(
    encoder: Encoder,
    *,
    data: CaptionedImages,
    recipe: Recipe,
    folder: str,
    resources: ClusterResources,
    gpus: float,
    training: str,
    reporter: ProgressReporter,
    check: Callable[[], None],
    on_use: Callable[[FeatureFolder], None],
) -> dict[str, FeatureCache]:
    """The features of each split under this encoder, made or found, and which images cannot be read.

    Args:
        gpus: of each process that encodes.
        training: see `FeatureFolder`.
        on_use: called with this training's use of each folder, from then on to be kept alive.
    """
    caches = {}
    for split in (TRAIN, VALIDATION):
        images = data.split(split)
        views = Views(original=recipe.training.epochs > 0)  # the other phases read photographs
        if split == TRAIN and views.original:
            settings = recipe.training
            views = Views(flip=settings.flip, crops=settings.crops, min_crop_area=settings.min_crop_area)
        key = cache_key(
            images["image_id"],
            location=data.location,
            encoder=recipe.encoder,
            weights=encoder.weights,
            preprocessing=recipe.preprocessing,
            views=views,
            image_columns=data.image_columns,
        )
        use = FeatureFolder(storage.join(folder, key), training)
        on_use(use)
        caches[split] = cache_features(
            data.manifest(images),
            use,
            FeatureEncoding(
                encoder=encoder,
                views=views,
                num_actors=default_num_actors(resources, gpus),
                gpus_per_actor=gpus,
                can_grow=not resources.is_local,
                can_release=resources.max_cpus <= resources.cpus,
            ),
            reporter=reporter,
            task=f"{split} split",
            check=check,
        )
        for note in caches[split].notes:
            reporter.report(f"{split} images: {note}")
    return caches


def fix_validation(
    data: CaptionedImages,
    cache: FeatureCache,
    work: str,
    history: Sequence[Mapping[str, Any]],
    *,
    echo: Callable[[str], None],
) -> None:
    """Record the images that all epochs are scored on: those of the validation split that can be read at the start.

    Raises:
        ImcapError: epochs have finished, and some of their validation images can no longer be read.
    """
    failed = {row["image_id"]: f"{row['error_message']} ({row['error_code']})" for row in cache.failures}
    readable = [image_id for image_id in data.split(VALIDATION)["image_id"].to_pylist() if image_id not in failed]
    recorded = read_validation_ids(work) if history else None
    if recorded is None:
        before = history[-1].get("num_images", len(readable)) if history else len(readable)
        if before != len(readable):  # of a version that recorded no more than their number
            raise ImcapError(
                f"{len(readable):,} validation images can be read, but the epochs so far were scored on {before:,}: "
                "bring the images back, or train into another folder"
            )
        write_validation_ids(work, readable)
        return
    missing = [image_id for image_id in recorded if image_id in failed]
    if missing:
        first = [(image_id, failed[image_id]) for image_id in missing]
        raise ImcapError(f"{describe_failures(len(missing), 'validation', first)}: {VALIDATION_ADVICE}")
    if num_new := len(readable) - len(recorded):
        images = "image has become readable; it is" if num_new == 1 else "images have become readable; they are"
        echo(f"{num_new:,} validation {images} not scored, so that all epochs use the same images")


def _describe_unknown_words(images: pa.Table, vocabulary: Vocabulary, recipe: Recipe) -> str:
    captions = [caption for of_image in images["captions"].to_pylist() for caption in of_image]
    ids = [vocabulary.to_ids(caption, max_length=recipe.training.max_caption_length)[1:-1] for caption in captions]
    is_unknown = Counter(id_ == UNKNOWN_ID for of_caption in ids for id_ in of_caption)
    share = is_unknown[True] / max(1, is_unknown.total())
    return f"its vocabulary lacks {share:.1%} of the training captions' words"


@dataclass(frozen=True, slots=True)
class _Manifest:
    """The images of a split that can be read."""

    folder: str
    root: str
    num_images: int


def _write_manifests(data: CaptionedImages, caches: Mapping[str, FeatureCache], folder: str) -> dict[str, _Manifest]:
    manifests = {}
    for split, cache in caches.items():
        unreadable = pa.array([failure["image_id"] for failure in cache.failures], pa.string())
        rows = data.manifest(data.split(split))
        rows = rows.filter(pa.compute.invert(pa.compute.is_in(rows["image_id"], unreadable)))
        place = storage.join(folder, split)
        write_table(storage.join(place, "part-0.parquet"), rows)
        manifests[split] = _Manifest(place, root_of(rows), rows.num_rows)
    return manifests


def _fit(
    phase: str,
    inputs: Mapping[str, FeatureCache] | Mapping[str, _Manifest],
    *,
    work: str,
    owner: str,
    echo: Callable[[str], None],
    recipe: Recipe,
    seed: int,
    encoder: Encoder,
    start_file: str | None,
    workers: int | tuple[int, int],
    gpus: float,
    threads: int,
    watchers: Sequence[Callable[[], None]],
) -> None:
    """Run the workers until the phase is finished; the checkpoints are in the run's folder then.

    Args:
        owner: the name under which this run may write to the work folder.
        echo: called with a line when training images cannot be read.
        watchers: called every two seconds meanwhile, and once afterwards.

    Raises:
        StoppedError: the workers have stopped, and would again.
        ImcapError: the training failed.
    """
    take_stop(work)
    log = FailureLog.remote()  # type: ignore[attr-defined]
    look_for_failures = watch_failures(log, phase, echo)
    context = DataContext.get_current().copy()
    context.execution_options.preserve_order = True  # the same seed, the same batches
    # A read task's block is what the local shuffle and the object store hold at a time.
    context.target_max_block_size = 64 * 2**20
    filesystem, work_path = storage.resolve(work)
    with DataContext.current(context):
        datasets = {
            split: _read_features(of_split)
            if isinstance(of_split, FeatureCache)
            else _read_pixels(of_split, encoder, log if split == TRAIN else None)
            for split, of_split in inputs.items()
        }
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={
                "work": work,
                "owner": owner,
                "recipe": to_mapping(recipe),
                "seed": seed,
                "threads": threads,
                "gpus": gpus,
                "phase": phase,
                # Through the object store, so that weights from a file of this machine reach every node.
                "load_encoder": partial(ray.get, ray.put(encoder)),
                "start_file": start_file,
                "shapes": {split: _shape(of_split, encoder) for split, of_split in inputs.items()},
                "num_train_images": inputs[TRAIN].num_images - len(getattr(inputs[TRAIN], "failures", ())),
            },
            scaling_config=RoomForReading(
                num_workers=workers,
                use_gpu=gpus > 0,
                resources_per_worker={"CPU": 1, **({"GPU": gpus} if gpus else {})},
            ),
            run_config=RunConfig(
                name=RUN_FOLDER,
                storage_path=work_path,
                storage_filesystem=filesystem,  # the one that asks a store again which fails now and then
                worker_runtime_env=runtime_environment(gpus=1),  # type: ignore[call-arg]  # mypy sees an older class
                failure_config=FailureConfig(max_failures=3, controller_failure_limit=3),
                checkpoint_config=CheckpointConfig(
                    num_to_keep=NUM_BEST_TO_KEEP, checkpoint_score_attribute=SCORE, checkpoint_score_order="max"
                ),
            ),
            datasets={**datasets},
            dataset_config=DataConfig(datasets_to_split=[TRAIN]),
        )
        patience = {START_TIMEOUT: os.environ.get(START_TIMEOUT, str(WORKERS_START_SECONDS))}
        look = partial(_call_all, [*watchers, look_for_failures])
        with repeating(look, seconds=2.0), temporary_environment(patience if isinstance(workers, int) else {}):
            handler = signal.getsignal(signal.SIGINT)
            try:
                trainer.fit()
            except SystemExit as error:  # what Ray Train makes of Ctrl-C, without a word
                raise KeyboardInterrupt from error
            except (RayError, ray.train.TrainingFailedError) as error:
                cause = describe_error(error)
                raise ImcapError(
                    f"training stopped by an error: {cause}; the same command resumes after its last epoch"
                ) from error
            finally:  # Ray Train leaves its own in place, which ends the process with 0 once the training is over
                if threading.current_thread() is threading.main_thread():
                    signal.signal(signal.SIGINT, handler)
    look_for_failures(at_end=True)
    with suppress(RayError):
        ray.kill(log)
    if reason := take_stop(work):
        raise StoppedError(reason)


def _read_features(cache: FeatureCache) -> ray.data.Dataset:
    return (
        ray.data.read_parquet(
            [storage.resolve(file)[1] for file in cache.files()], filesystem=storage.resolve(cache.folder)[0]
        )
        .select_columns(["image_id", "features", "error_code"])
        # Before Ray splits the rows: workers with unequal numbers of batches would wait for each other.
        .filter(expr=ray.data.expressions.col("error_code") == "")
    )


def _read_pixels(manifest: _Manifest, encoder: Encoder, log: Any) -> ray.data.Dataset:
    """The images, decoded by Ray Data wherever there are CPUs, so that a GPU's worker need not do it.

    Args:
        log: a `FailureLog` for those that cannot be read, which are left out; None: they have an error and no pixels.
    """
    load = LoadImages(
        image_size=encoder.image_size,
        root=manifest.root,
        image_columns=tuple(read_image_columns(manifest.folder)),
        failures=log,
    )
    images = read_images(manifest.folder, load, num_images=manifest.num_images)
    if log is None:
        return images.select_columns(["image_id", "pixels", "error_code", "error_message"])
    return images.filter(expr=ray.data.expressions.col("error_code") == "").select_columns(["image_id", "pixels"])


def _shape(inputs: FeatureCache | _Manifest, encoder: Encoder) -> tuple[int, ...]:
    """Of what a worker reads of an image."""
    return inputs.shape if isinstance(inputs, FeatureCache) else (3, encoder.image_size, encoder.image_size)


@contextmanager
def _alive(work: str, check: Callable[[], None], uses: Sequence[FeatureFolder]) -> Iterator[None]:
    """Give signs of life while the block runs, unless another run has taken over; in the caches' folders too.

    Args:
        uses: of the caches' folders; those that are added while the block runs are kept alive as well.
    """

    def beat() -> None:
        for use in tuple(uses):
            use.try_to_beat()
        with suppress(OSError, ImcapError):
            check()
            write_heartbeat(work)

    beat()
    with repeating(beat, seconds=HEARTBEAT_SECONDS):
        yield


def _watch_epochs(
    work: str, echo: Callable[[str], None], trackers: Trackers, check: Callable[[], None]
) -> Callable[[], None]:
    """A function that says and logs the epochs which the workers have added to their history since its last call.

    Args:
        check: raises if this run may not write any more: then the epochs are another's.
    """
    known = len(read_metrics(work))
    num_logged: int | None = None

    def look() -> None:
        nonlocal known, num_logged
        try:
            check()
            rows = read_metrics(work)
        except (OSError, ImcapError):  # the next look may find the store again; the training does not depend on it
            return
        for row in rows[known:]:
            echo(
                f"epoch {row['epoch']}: {_describe_learning(row)}, validation CIDEr-D "
                f"{row['cider_d']:.3f}, BLEU-4 {100 * row['bleu_4']:.1f}, {row['seconds']:.0f} s"
            )
        known = max(known, len(rows))
        if num_logged != len(rows):
            num_logged = len(rows)
            trackers.log(rows)

    return look


def _call_all(functions: Sequence[Callable[[], None]]) -> None:
    for function in functions:
        function()


def watch_room(
    num_workers: int | tuple[int, int], gpus_per_worker: float, echo: Callable[[str], None]
) -> Callable[[], None]:
    """A function that says, once each time, that the cluster is too small for the least number of workers: a node is
    gone, or one that autoscaling brings is not there yet."""
    least = num_workers[0] if isinstance(num_workers, tuple) else num_workers
    needed = {"CPU": least + CPUS_FOR_READING, "GPU": least * gpus_per_worker}
    is_waiting = False

    def look() -> None:
        nonlocal is_waiting
        try:
            there = ray.cluster_resources()  # type: ignore[no-untyped-call]
        except RayError:
            return
        lacking = [name for name, count in needed.items() if count > there.get(name, 0.0)]
        if lacking and not is_waiting:
            lacks = ", ".join(f"{needed[name]:g} {name}s needed, {there.get(name, 0.0):g} there" for name in lacking)
            echo(f"waiting for room for {describe_workers(least)}: {lacks}")
        is_waiting = bool(lacking)

    return look


def _describe_learning(metrics: Mapping[str, Any]) -> str:
    if "train_reward" in metrics:
        return f"training reward {metrics['train_reward']:.3f}"
    return f"training loss {metrics['train_loss']:.3f}"


def _write_table(location: str, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table.cast(DATASET_SCHEMA), sink, compression="zstd")
    storage.write_bytes(location, sink.getvalue().to_pybytes())
