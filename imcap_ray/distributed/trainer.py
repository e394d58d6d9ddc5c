"""Captioned images -> a model folder, by Ray Train."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data.expressions
import ray.train
import torch
from ray.data import DataContext
from ray.exceptions import RayError
from ray.train import CheckpointConfig, DataConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.config import FailureConfig  # the one `ray.train` exports at run time; mypy sees the old one

from imcap_ray import storage
from imcap_ray.captioner import CONFIG_FILE, save_model_folder, search_captions
from imcap_ray.config import Recipe, from_mapping, to_mapping
from imcap_ray.datasets import DATASET_SCHEMA, TRAIN, VALIDATION, CaptionedImages
from imcap_ray.decoders import Decoder, build_decoder
from imcap_ray.distributed.cluster import ClusterResources, require
from imcap_ray.distributed.features import FeatureCache, cache_features, cache_key
from imcap_ray.distributed.images import Progress, explain
from imcap_ray.encoders import Encoder, build_encoder, resolve_normalisation
from imcap_ray.errors import ImcapError, InputError, OutputError
from imcap_ray.metrics import score
from imcap_ray.model_card import write_card
from imcap_ray.training import Optimization, make_batch
from imcap_ray.vocabulary import Vocabulary

WORK_FOLDER: Final = "_training"
SHUFFLE_BUFFER_IMAGES: Final = 1024
RESIDENT_SHARE: Final = 0.4
"""Of the free memory, what a worker's features may fill to be kept there."""

BatchSource = Callable[..., Iterator[tuple[torch.Tensor, list[str]]]]
"""Called with batch_size and seed: one epoch of shuffled batches, features (I, views, R, F) and image ids."""

_STATE_FILE: Final = "training_state.pt"
_DECODER_FILE: Final = "decoder.safetensors"
_METRICS_FILE: Final = "metrics.jsonl"


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

    An interrupted training goes on from its last epoch when called again with the same arguments.

    Args:
        model: folder to write, path or URI; on a cluster one that every node sees.
        num_workers: data-parallel processes; None: one per GPU, or one where there is none.
        features: folder for cached features; None: `_features` beside the model folder, shared by its neighbours.

    Raises:
        InputError: something does not fit, found before work began.
        ImcapError: the training failed; the same call goes on from the last epoch.
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
            num_actors=int(resources.gpus) or resources.physical_cores,
            gpus_per_actor=1.0 if resources.gpus else 0.0,
            on_progress=_echo_features(echo, split, images.num_rows),
        )
        if failures := caches[split].failures:
            first = failures[0]
            echo(
                f"{len(failures):,} {split} images left out, they cannot be read; the first is {first['image_id']}: "
                f"{first['error_message']}"
            )
    _write_table(storage.join(work, "captions.parquet"), data.table)
    storage.write_bytes(storage.join(work, "vocabulary.json"), vocabulary.to_json().encode())
    echo(
        f"training {recipe.decoder.name} decoder, {len(vocabulary):,} tokens, on {train_images.num_rows:,} images, "
        f"{workers} worker{'s' * (workers != 1)}, {recipe.training.epochs} epochs at most"
    )
    kept = _fit(
        caches,
        work=work,
        recipe=recipe,
        seed=seed,
        workers=workers,
        gpus=gpus,
        threads=max(1, resources.physical_cores // workers) if resources.is_local else 1,
        echo=echo,
    )
    _write_model(model, kept, data, train_images, recipe, recipe_name, seed, encoder, vocabulary)
    return TrainingResult(
        model=model,
        metrics=kept.metrics,
        num_epochs=len(_read_metrics(work)),
        seconds=time.time() - start,
    )


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
        before = json.loads(storage.read_bytes(place))
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
) -> _Kept:
    """Run the workers; the decoder and the metrics of the best epoch."""
    context = DataContext.get_current().copy()
    context.execution_options.preserve_order = True  # the same seed, the same batches
    # A read task's block is what the local shuffle and the object store hold at a time.
    context.target_max_block_size = 64 * 2**20
    with DataContext.current(context):
        datasets = {
            split: ray.data.read_parquet(
                [storage.resolve(file)[1] for file in cache.files()],
                filesystem=storage.resolve(cache.folder)[0],
                columns=["image_id", "features", "error_code"],
            )
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
                name="ray",
                storage_path=work,
                failure_config=FailureConfig(max_failures=3, controller_failure_limit=3),
                checkpoint_config=CheckpointConfig(
                    num_to_keep=1, checkpoint_score_attribute="cider_d", checkpoint_score_order="max"
                ),
            ),
            datasets={**datasets},
            dataset_config=DataConfig(datasets_to_split=[TRAIN]),
        )
        with _echo_epochs(work, echo):
            try:
                result = trainer.fit()
            except (RayError, ray.train.TrainingFailedError) as error:
                raise ImcapError(
                    f"training stopped by an error: {explain(error)}; the same command goes on after its last epoch"
                ) from error
    best = result.get_best_checkpoint("cider_d", "max")
    if best is None:
        raise ImcapError("training ended without a checkpoint")
    from safetensors.torch import load_file

    with best.as_directory() as folder:
        tensors = load_file(Path(folder, _DECODER_FILE))
        metrics = json.loads(Path(folder, "metrics.json").read_text())
    return _Kept(decoder_tensors=tensors, metrics=metrics)


@contextlib.contextmanager
def _echo_epochs(work: str, echo: Callable[[str], None]) -> Iterator[None]:
    """Say each epoch that the workers add to `metrics.jsonl`."""
    import threading

    finished = threading.Event()
    known = len(_read_metrics(work))
    if known:
        echo(f"going on after epoch {known}")

    def watch() -> None:
        nonlocal known
        while True:
            stop = finished.wait(2.0)
            rows = _read_metrics(work)
            for row in rows[known:]:
                echo(
                    f"epoch {row['epoch']}: training loss {row['train_loss']:.3f}, validation CIDEr-D "
                    f"{row['cider_d']:.3f}, BLEU-4 {100 * row['bleu_4']:.1f}, {row['seconds']:.0f} s"
                )
            known = max(known, len(rows))
            if stop:
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def _read_metrics(work: str) -> list[dict[str, Any]]:
    place = storage.join(work, _METRICS_FILE)
    if not storage.exists(place):
        return []
    return [json.loads(line) for line in storage.read_bytes(place).decode().splitlines()]


def _write_table(location: str, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table.cast(DATASET_SCHEMA), sink, compression="zstd")
    storage.write_bytes(location, sink.getvalue().to_pybytes())


def _read_table(location: str) -> pa.Table:
    return pq.read_table(pa.BufferReader(storage.read_bytes(location)))


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
            num_images=train_images.num_rows,
            num_captions=pa.compute.sum(pa.compute.list_value_length(train_images["captions"])).as_py(),
            vocabulary_size=len(vocabulary),
            encoder_weights=encoder.weights.source,
            metrics=kept.metrics,
        ),
        encoder_tensors=None if encoder.weights.portable else encoder.cnn.state_dict(),
    )


# ---- what each worker runs


def train_worker(config: dict[str, Any]) -> None:
    """One data-parallel worker: epochs of training, each with a validation, a checkpoint and a report."""
    recipe = from_mapping(Recipe, config["recipe"])
    work, seed, settings = config["work"], config["seed"], recipe.training
    rank, world_size = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(config["threads"])

    vocabulary = Vocabulary.from_json(storage.read_bytes(storage.join(work, "vocabulary.json")).decode())
    table = _read_table(storage.join(work, "captions.parquet"))
    captions = dict(zip(table["image_id"].to_pylist(), table["captions"].to_pylist(), strict=True))
    torch.manual_seed(seed)
    shape = config["shapes"][TRAIN]
    decoder = build_decoder(recipe.decoder, num_channels=shape[2], vocabulary_size=len(vocabulary)).to(device)
    model = ray.train.torch.prepare_model(decoder, move_to_device=False)

    local_batch_size = max(1, settings.batch_size // world_size)
    steps_per_epoch = -(-(config["num_train_images"] // world_size) // local_batch_size)
    optimization = Optimization(model, decoder, settings, total_steps=settings.epochs * steps_per_epoch)
    history: list[dict[str, Any]] = []
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder, _STATE_FILE), map_location=device, weights_only=True)
        optimization.load_state_dict(state["optimization"])
        history = state["history"]

    source = _choose_source(config["num_train_images"] // world_size, shape)
    # Every worker is handed all validation images, for an equal split would drop some; it keeps each n-th batch.
    validation = [
        (features[:, 0], image_ids)
        for number, (features, image_ids) in enumerate(
            _read_shard(VALIDATION, config["shapes"][VALIDATION], batch_size=64)
        )
        if number % world_size == rank
    ]
    ids = {id_: vocabulary_ids(vocabulary, texts, settings.max_caption_length) for id_, texts in captions.items()}
    while len(history) < settings.epochs and not _has_stopped(history, settings.patience):
        epoch = len(history) + 1
        start = time.time()
        epoch_seed = seed * 1_000_003 + epoch * 1009 + rank
        generator = torch.Generator().manual_seed(epoch_seed)
        torch.manual_seed(epoch_seed)  # dropout differs between workers and epochs
        batches = source(batch_size=local_batch_size, seed=epoch_seed)
        train_loss = _run_epoch(optimization, batches, ids, generator, device)
        hypotheses = _caption(optimization.kept, vocabulary, validation, recipe, device)
        hypotheses = _gather(hypotheses, world_size)
        metrics: dict[str, Any] = {}
        if rank == 0:
            scores = score(hypotheses, {image_id: captions[image_id] for image_id in hypotheses})
            metrics = {"epoch": epoch, "train_loss": train_loss, **scores.to_dict(), "seconds": time.time() - start}
        metrics = _broadcast(metrics, world_size)
        history.append(metrics)
        _report(optimization, history, work, rank)


def vocabulary_ids(vocabulary: Vocabulary, captions: list[str], max_length: int) -> list[list[int]]:
    """The captions of an image as token ids from start to end."""
    return [vocabulary.to_ids(caption, max_length=max_length) for caption in captions]


def _has_stopped(history: list[dict[str, Any]], patience: int) -> bool:
    """Whether the last `patience` epochs brought no better CIDEr-D."""
    if not patience or len(history) <= patience:
        return False
    scores = [row["cider_d"] for row in history]
    return bool(max(scores[-patience:]) <= max(scores[:-patience]))


def _run_epoch(
    optimization: Optimization,
    batches: Iterator[tuple[torch.Tensor, list[str]]],
    ids: Mapping[str, list[list[int]]],
    generator: torch.Generator,
    device: torch.device,
) -> float:
    """One pass over this worker's images; the mean cross-entropy of a token, in nats."""
    loss_sum, num_tokens = 0.0, 0
    for features, image_ids in batches:
        views = torch.randint(features.shape[1], (len(image_ids),), generator=generator)
        chosen = features[torch.arange(len(image_ids)), views]
        batch = make_batch(chosen, [ids[image_id] for image_id in image_ids], device)
        loss, count = optimization.step(batch)
        loss_sum, num_tokens = loss_sum + loss, num_tokens + count
    return loss_sum / max(1, num_tokens)


def _choose_source(num_images: int, shape: tuple[int, int, int]) -> BatchSource:
    """How this worker reads its shard of the training features.

    Features that fit in memory are read once: while Ray Data streams, its scheduler keeps half a core busy (Ray 2.60),
    a quarter of a two-core machine. Larger ones are streamed anew in every epoch.
    """
    available_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    size_bytes = num_images * int(np.prod(shape)) * np.dtype(np.float16).itemsize
    if size_bytes > RESIDENT_SHARE * available_bytes:
        return partial(_stream_shard, shape)
    parts = list(_read_shard(TRAIN, shape, batch_size=256))
    features = torch.empty(sum(len(part) for part, _ in parts), *shape, dtype=torch.float16)
    image_ids: list[str] = []
    while parts:  # each part is freed when it is copied, so that the peak is little more than the whole
        part, part_ids = parts.pop(0)
        features[len(image_ids) : len(image_ids) + len(part)] = part
        image_ids += part_ids
    return partial(_shuffle_resident, features, image_ids)


def _shuffle_resident(
    features: torch.Tensor, image_ids: list[str], *, batch_size: int, seed: int
) -> Iterator[tuple[torch.Tensor, list[str]]]:
    order = torch.randperm(len(image_ids), generator=torch.Generator().manual_seed(seed))
    for chosen in torch.split(order, batch_size):
        yield features[chosen], [image_ids[number] for number in chosen.tolist()]


def _stream_shard(
    shape: tuple[int, int, int], *, batch_size: int, seed: int
) -> Iterator[tuple[torch.Tensor, list[str]]]:
    yield from _read_shard(
        TRAIN,
        shape,
        batch_size=batch_size,
        local_shuffle_buffer_size=SHUFFLE_BUFFER_IMAGES,
        local_shuffle_seed=seed,
    )


def _read_shard(split: str, shape: tuple[int, int, int], **options: Any) -> Iterator[tuple[torch.Tensor, list[str]]]:
    """Batches of this worker's images: features (I, views, R, F) in float16, and ids."""
    for rows in ray.train.get_dataset_shard(split).iter_batches(batch_format="pyarrow", **options):
        arrays = [np.frombuffer(value.as_buffer(), np.float16).reshape(shape) for value in rows["features"]]
        yield torch.from_numpy(np.stack(arrays)), rows["image_id"].to_pylist()


def _caption(
    decoder: torch.nn.Module,
    vocabulary: Vocabulary,
    batches: list[tuple[torch.Tensor, list[str]]],
    recipe: Recipe,
    device: torch.device,
) -> dict[str, str]:
    decoder.eval()
    captions = {}
    for features, image_ids in batches:
        found = search_captions(decoder_of(decoder), vocabulary, features.to(device, torch.float32), recipe.search)
        captions.update({image_id: best[0].text for image_id, best in zip(image_ids, found, strict=True)})
    return captions


def decoder_of(module: torch.nn.Module) -> Decoder:
    """The module as what it is known to be."""
    assert isinstance(module, Decoder)
    return module


def _gather(part: dict[str, str], world_size: int) -> dict[str, str]:
    if world_size == 1:
        return part
    parts: list[dict[str, str] | None] = [None] * world_size
    torch.distributed.all_gather_object(parts, part)
    return {image_id: caption for one in parts if one for image_id, caption in one.items()}


def _broadcast(metrics: dict[str, Any], world_size: int) -> dict[str, Any]:
    """Rank 0's metrics on every worker, so that all stop at the same epoch."""
    if world_size == 1:
        return metrics
    box = [metrics]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def _report(optimization: Optimization, history: list[dict[str, Any]], work: str, rank: int) -> None:
    """Report the last epoch to Ray Train, with a checkpoint from rank 0."""
    if rank != 0:
        ray.train.report(history[-1])
        return
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        torch.save({"optimization": optimization.state_dict(), "history": history}, Path(folder, _STATE_FILE))
        tensors = {name: tensor.contiguous().cpu() for name, tensor in optimization.kept.state_dict().items()}
        save_file(tensors, Path(folder, _DECODER_FILE))
        Path(folder, "metrics.json").write_text(json.dumps(history[-1]))
        ray.train.report(history[-1], checkpoint=ray.train.Checkpoint.from_directory(folder))
    lines = "".join(json.dumps(row) + os.linesep for row in history)
    storage.write_bytes(storage.join(work, _METRICS_FILE), lines.encode())
