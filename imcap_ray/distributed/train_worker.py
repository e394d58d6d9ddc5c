"""One data-parallel worker of a training: epochs, each with a validation, a checkpoint and a report to Ray Train.

I images, R regions, F channels.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.train
import ray.train.torch
import torch

from imcap_ray import storage
from imcap_ray.captioner import search_captions
from imcap_ray.config import Recipe, TrainingConfig, from_mapping
from imcap_ray.datasets import TRAIN, VALIDATION
from imcap_ray.decoders import Decoder, build_decoder
from imcap_ray.distributed.checkpoints import HISTORY_FILE, SCORE, EpochCheckpoint, checkpoint_name, newest_checkpoint
from imcap_ray.distributed.seals import seal
from imcap_ray.metrics import score
from imcap_ray.training import Optimization, make_batch
from imcap_ray.vocabulary import Vocabulary

# In the training's work folder.
CAPTIONS_FILE: Final = "captions.parquet"
VOCABULARY_FILE: Final = "vocabulary.json"
METRICS_FILE: Final = "metrics.jsonl"
RUN_FOLDER: Final = "ray"
"""What Ray Train keeps: the checkpoints."""

# In a checkpoint.
DECODER_FILE: Final = "decoder.safetensors"
_STATE_FILE: Final = "training_state.pt"

SHUFFLE_BUFFER_IMAGES: Final = 1024
RESIDENT_SHARE: Final = 0.4
"""Of the free memory, what a worker's features may fill to be kept there."""

Value = TypeVar("Value")

BatchSource = Callable[..., Iterator[tuple[torch.Tensor, list[str]]]]
"""Called with batch_size and seed: one epoch of shuffled batches, features (I, views, R, F) and image ids."""


def train_worker(config: dict[str, Any]) -> None:
    """One data-parallel worker: epochs of training, each with a validation, a checkpoint and a report."""
    recipe = from_mapping(Recipe, config["recipe"])
    work, seed, settings = config["work"], config["seed"], recipe.training
    rank, world_size = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(config["threads"])

    vocabulary = Vocabulary.from_json(storage.read_bytes(storage.join(work, VOCABULARY_FILE)).decode())
    table = _read_table(storage.join(work, CAPTIONS_FILE))
    captions = dict(zip(table["image_id"].to_pylist(), table["captions"].to_pylist(), strict=True))
    torch.manual_seed(seed)
    shape = config["shapes"][TRAIN]
    decoder = build_decoder(recipe.decoder, num_channels=shape[2], vocabulary_size=len(vocabulary)).to(device)
    model = ray.train.torch.prepare_model(decoder, move_to_device=False)

    local_batch_size = max(1, settings.batch_size // world_size)
    steps_per_epoch = -(-(config["num_train_images"] // world_size) // local_batch_size)
    optimization = Optimization(model, decoder, settings, total_steps=settings.epochs * steps_per_epoch)
    # Not `ray.train.get_checkpoint()`: that is the last which Ray has noted, damaged or not. Ray looks every two
    # seconds, and a checkpoint whose worker died in between is whole but not noted.
    checkpoint = newest_checkpoint(storage.join(work, RUN_FOLDER)) if rank == 0 else None
    checkpoint = _broadcast(checkpoint, world_size)
    history = _restore(optimization, checkpoint, device) if checkpoint else []

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
    while not is_finished(history, settings):
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


def is_finished(history: list[dict[str, Any]], settings: TrainingConfig) -> bool:
    """Whether all epochs are done, or the last `patience` of them brought no better CIDEr-D."""
    patience = settings.patience
    if len(history) >= settings.epochs:
        return True
    if not patience or len(history) <= patience:
        return False
    scores = [row[SCORE] for row in history]
    return bool(max(scores[-patience:]) <= max(scores[:-patience]))


def _restore(optimization: Optimization, checkpoint: EpochCheckpoint, device: torch.device) -> list[dict[str, Any]]:
    """Go on from a checkpoint; the metrics of the epochs it has behind it."""
    state = storage.read_bytes(storage.join(checkpoint.location, _STATE_FILE))
    optimization.load_state_dict(torch.load(io.BytesIO(state), map_location=device, weights_only=True))
    return list(checkpoint.history)


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
    # By name first, for a cache of the same images that was made anew holds them in another order.
    by_name = torch.tensor(sorted(range(len(image_ids)), key=image_ids.__getitem__), dtype=torch.long)
    order = torch.randperm(len(image_ids), generator=torch.Generator().manual_seed(seed))
    for chosen in torch.split(by_name[order], batch_size):
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


def _broadcast(value: Value, world_size: int) -> Value:
    """Rank 0's value on every worker, so that all start after and stop at the same epoch."""
    if world_size == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def _report(optimization: Optimization, history: list[dict[str, Any]], work: str, rank: int) -> None:
    """Report the last epoch to Ray Train, with a checkpoint from rank 0."""
    name = checkpoint_name(len(history))
    if rank != 0:
        ray.train.report(history[-1], checkpoint_dir_name=name)
        return
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        torch.save(optimization.state_dict(), Path(folder, _STATE_FILE))
        tensors = {name: tensor.contiguous().cpu() for name, tensor in optimization.kept.state_dict().items()}
        save_file(tensors, Path(folder, DECODER_FILE))
        Path(folder, HISTORY_FILE).write_text(json.dumps(history))
        seal(folder, [_STATE_FILE, DECODER_FILE, HISTORY_FILE])
        checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report(history[-1], checkpoint=checkpoint, checkpoint_dir_name=name)
    write_metrics(work, history)


def write_metrics(work: str, history: list[dict[str, Any]]) -> None:
    """Write the metrics of each epoch as JSON lines into the training's work folder, for people and tools."""
    lines = "".join(json.dumps(row) + os.linesep for row in history)
    storage.write_bytes(storage.join(work, METRICS_FILE), lines.encode())


def _read_table(location: str) -> pa.Table:
    return pq.read_table(pa.BufferReader(storage.read_bytes(location)))
