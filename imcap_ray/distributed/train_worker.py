"""One data-parallel worker of a training: the epochs of a phase, each with a validation, a checkpoint and a report to
Ray Train.

I images, R regions, F channels, S pixels a side.
"""

from __future__ import annotations

import io
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.train.torch
import safetensors.torch
import torch
from ray._private.utils import estimate_available_memory
from torch import Tensor
from torch.nn import functional

from imcap_ray import storage
from imcap_ray.config import Recipe, from_mapping
from imcap_ray.data.datasets import TRAIN, VALIDATION
from imcap_ray.distributed.checkpoints import HISTORY_FILE, EpochCheckpoint, checkpoint_name, newest_checkpoint
from imcap_ray.distributed.failure_log import describe_failures
from imcap_ray.models.caption import Caption
from imcap_ray.models.decoders import Decoder, build_decoder
from imcap_ray.models.devices import require_cuda
from imcap_ray.models.encoder_weights import FINETUNED
from imcap_ray.models.encoders import Encoder
from imcap_ray.models.model_folder import select_tensors
from imcap_ray.runs.checksums import write_checksums
from imcap_ray.runs.lease import Lease
from imcap_ray.runs.training_run import (
    CAPTIONS_FILE,
    RUN_FOLDER,
    STATE_FILE,
    VALIDATION_ADVICE,
    VOCABULARY_FILE,
    WEIGHTS_FILE,
    read_validation_ids,
    write_metrics,
    write_stop,
)
from imcap_ray.text.tokenizers import scoring_tokenizer
from imcap_ray.text.vocabulary import SUPPRESSED_TOKEN_IDS, Vocabulary
from imcap_ray.training.loop import (
    LearningState,
    batch_maker,
    caption_split,
    decoder_of,
    encode_images,
    run_epoch,
    score_captions,
    unfreeze,
)
from imcap_ray.training.optimization import EndToEnd, Optimization
from imcap_ray.training.phases import CROSS_ENTROPY, FINETUNE, SELF_CRITICAL, kind_of, next_phase, phases, reads_pixels

SHUFFLE_BUFFER_IMAGES: Final = 1024

RESIDENT_SHARE: Final = 0.4
"""Of a node's available memory, the file cache with it, what the features of its workers may fill to be kept there."""

_LOWER: Final = {
    CROSS_ENTROPY: "lower training.learning_rate",
    FINETUNE: "lower finetune.learning_rate and finetune.encoder_learning_rate",
    SELF_CRITICAL: "lower self_critical.learning_rate",
}
"""What to do when a phase of this kind diverges."""

BatchSource = Callable[..., Iterator[tuple[Tensor, list[str]]]]
"""Called with batch_size and seed: one epoch of shuffled batches, what the phase reads of images and their ids."""


def train_worker(config: dict[str, Any]) -> None:
    """One data-parallel worker: the epochs of a phase, each with a validation, a checkpoint and a report."""
    recipe = from_mapping(Recipe, config["recipe"])
    work, seed, phase = config["work"], config["seed"], config["phase"]
    kind, settings = kind_of(phase), phases(recipe)[phase]
    if config["gpus"]:
        require_cuda()
    rank, world_size = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(config["threads"])
    # Ray starts the workers again after a failure. Was it that another run has taken over, the driver will say so.
    if not share(Lease(work, config["owner"]).is_held(), world_size, device)[0]:
        return

    vocabulary = Vocabulary.from_json(storage.read_bytes(storage.join(work, VOCABULARY_FILE)).decode())
    table = _read_table(storage.join(work, CAPTIONS_FILE))
    captions: dict[str, dict[str, list[str]]] = {TRAIN: {}, VALIDATION: {}}
    for row in table.to_pylist():
        captions.setdefault(row["split"], {})[row["image_id"]] = row["captions"]
    torch.manual_seed(seed)
    encoder: Encoder = config["load_encoder"]()
    decoder = build_decoder(recipe.decoder, num_channels=encoder.num_channels, vocabulary_size=len(vocabulary))
    if start_file := config["start_file"]:
        decoder.load_state_dict(select_tensors("decoder.", safetensors.torch.load(storage.read_bytes(start_file))))
    trained: Decoder | EndToEnd = decoder
    if kind == FINETUNE:
        unfreeze(encoder, recipe.finetune.first_layer)
        trained = EndToEnd(encoder, decoder)
    trained.to(device)
    # Without a device for DDP to move the arguments to: the lengths of captions stay on the CPU.
    on_its_device = {"device_ids": None, "output_device": None}
    model = ray.train.torch.prepare_model(trained, move_to_device=False, parallel_strategy_kwargs=on_its_device)

    # All for this number of workers, which may be another after the next node that dies or joins.
    local_batch_size = max(1, settings.batch_size // world_size)
    num_images = config["num_train_images"] // world_size
    steps_per_epoch = -(-num_images // local_batch_size)
    optimization = Optimization(
        model,
        trained,
        settings,
        total_steps=settings.epochs * steps_per_epoch,
        encoder_learning_rate=recipe.finetune.encoder_learning_rate,
        temperature=recipe.self_critical.temperature if kind == SELF_CRITICAL else 1.0,
        forbidden_ids=SUPPRESSED_TOKEN_IDS if kind == SELF_CRITICAL else (),
    )
    # Not `ray.train.get_checkpoint()`: that is the last which Ray has noted, damaged or not. Ray looks every two
    # seconds, and a checkpoint whose worker died in between is whole but not noted.
    checkpoint = newest_checkpoint(storage.join(work, RUN_FOLDER)) if rank == 0 else None
    newest = share(asdict(checkpoint) if checkpoint else None, world_size, device)[0]
    checkpoint = EpochCheckpoint(**newest) if newest else None
    history = list(checkpoint.history) if checkpoint else []
    if checkpoint and checkpoint.phase == phase:
        state = storage.read_bytes(storage.join(checkpoint.location, STATE_FILE))
        done = sum(row["phase"] == phase for row in history)
        optimization.load_state_dict(
            torch.load(io.BytesIO(state), map_location=device, weights_only=True), step=done * steps_per_epoch
        )

    def stops(problem: str) -> bool:
        """Whether any worker has a problem. All ask at the same place, or they would wait for each other."""
        problems = [one for one in share(problem, world_size, device) if one]
        if problems and rank == 0:
            record_stop(work, config["owner"], problems[0])
        return bool(problems)

    inputs = _Inputs.of(config)
    workers_on_node = ray.train.get_context().get_local_world_size()
    fits = _fits_in_memory(num_images, inputs, estimate_available_memory() / workers_on_node)  # type: ignore[no-untyped-call]
    source = _keep_shard(inputs) if agree(fits, world_size, device) else partial(_stream_shard, inputs)
    expected = read_validation_ids(work)
    assert expected is not None  # the driver has written it
    # Every worker is handed all validation images, for an equal split would drop some; it keeps each n-th batch.
    validation, problem = _read_validation(inputs, set(expected), lambda number: number % world_size == rank)
    if stops(problem):
        return
    encoder.to(device)
    if kind == SELF_CRITICAL:  # the CNN stays as it is, and so do its features
        validation = [(encode_images(encoder, pixels.to(device)).unsqueeze(1), ids) for pixels, ids in validation]
    make = batch_maker(phase, recipe, vocabulary, captions[TRAIN], optimization, encoder, device)
    while next_phase(history, recipe) == phase:
        epoch = len(history) + 1
        start = time.time()
        epoch_seed = seed * 1_000_003 + epoch * 1009 + rank
        torch.manual_seed(epoch_seed)  # dropout, views, crops and samples differ between workers and epochs
        batches = source(batch_size=local_batch_size, seed=epoch_seed)
        learnt = run_epoch(optimization, make, batches, partial(_first_of, world_size, device))
        if stops(_describe_learning_problem(learnt, optimization, epoch, kind)):
            return
        hypotheses = caption_split(optimization.kept, vocabulary, validation, recipe, device)
        hypotheses = _gather(hypotheses, world_size, device)
        if stops(_describe_missing_captions([one for one in expected if one not in hypotheses], epoch, kind)):
            return
        metrics: dict[str, Any] = {}
        if rank == 0:
            references = {image_id: captions[VALIDATION][image_id] for image_id in hypotheses}
            scores = score_captions(hypotheses, references, scoring_tokenizer(vocabulary.tokenizer))
            told = {"epoch": epoch, "phase": phase, "num_workers": world_size}
            metrics = {**told, **learnt.averages, **scores, "seconds": time.time() - start}
        # Rank 0's on every worker, so that all stop at the same epoch.
        history.append(share(metrics, world_size, device)[0])
        if rank == 0:
            _report(optimization, encoder, history, work, Lease(work, config["owner"]).require)
        else:
            ray.train.report(history[-1], checkpoint_dir_name=checkpoint_name(len(history)))


def record_stop(work: str, owner: str, reason: str) -> None:
    """Record why the workers of this run have stopped, unless another run has taken over: it would take the reason for
    its own workers'."""
    if Lease(work, owner).is_held():
        write_stop(work, reason)


def _first_of(world_size: int, device: torch.device, step: int) -> int:
    return min((one for one in share(step, world_size, device) if one), default=0)


def _describe_learning_problem(learnt: LearningState, optimization: Optimization, epoch: int, kind: str) -> str:
    """Why an epoch is not worth keeping; "" if it is."""
    if learnt.bad_step:
        what = f"the loss is not finite at step {learnt.bad_step} of epoch {epoch}"
    elif not learnt.num_images:
        return f"no training images can be read in epoch {epoch}, or fewer than there are workers"
    elif not all(bool(torch.isfinite(parameter).all()) for parameter in optimization.kept.parameters()):
        what = f"the weights are not finite after epoch {epoch}"
    else:
        return ""
    return f"{what}; {_LOWER[kind]}. Epochs before it are kept"


def _describe_missing_captions(image_ids: Sequence[str], epoch: int, kind: str) -> str:
    """Why validation images have no caption; "" if each has one."""
    if not image_ids:
        return ""
    return (
        f"the model's outputs for {len(image_ids):,} validation images are not finite after epoch {epoch}, the first "
        f"is {image_ids[0]}; {_LOWER[kind]}. Epochs before it are kept"
    )


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What a phase reads of an image."""

    column: str
    dtype: type[np.generic]
    shapes: Mapping[str, tuple[int, ...]]
    """By split."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> _Inputs:
        if reads_pixels(config["phase"]):
            return cls("pixels", np.uint8, config["shapes"])  # (3, S, S)
        return cls("features", np.float16, config["shapes"])  # (views, R, F)

    def from_rows(self, rows: pa.Table, split: str) -> Tensor:
        arrays = [np.frombuffer(value.as_buffer(), self.dtype) for value in rows[self.column]]
        return torch.from_numpy(np.stack(arrays).reshape(-1, *self.shapes[split]))


def _fits_in_memory(num_images: int, inputs: _Inputs, available_bytes: float) -> bool:
    """Whether this worker can keep its shard of the training images in its share of the node's memory."""
    size_bytes = num_images * int(np.prod(inputs.shapes[TRAIN])) * np.dtype(inputs.dtype).itemsize
    return size_bytes <= RESIDENT_SHARE * available_bytes


def agree(is_possible: bool, world_size: int, device: torch.device) -> bool:
    """Whether it is possible on every worker.

    The workers' nodes may differ, but all must read their shards equally often: Ray begins to read an epoch when every
    worker asks for it.
    """
    return all(share(is_possible, world_size, device))


def _keep_shard(inputs: _Inputs) -> BatchSource:
    """This worker's shard of the training images, read once.

    While Ray Data streams, its scheduler keeps half a core busy (Ray 2.60), a quarter of a two-core machine. What does
    not fit in memory is streamed again in every epoch all the same.
    """
    parts = list(_read_shard(TRAIN, inputs, batch_size=256))
    num_images = sum(len(part) for part, _ in parts)
    images = torch.empty(num_images, *inputs.shapes[TRAIN], dtype=parts[0][0].dtype if parts else torch.uint8)
    image_ids: list[str] = []
    while parts:  # each part is freed when it is copied, so that the peak is little more than the whole
        part, part_ids = parts.pop(0)
        images[len(image_ids) : len(image_ids) + len(part)] = part
        image_ids += part_ids
    return partial(_shuffle_resident, images, image_ids)


def _shuffle_resident(
    images: Tensor, image_ids: list[str], *, batch_size: int, seed: int
) -> Iterator[tuple[Tensor, list[str]]]:
    if not image_ids:
        return
    # By name first, for a cache of the same images that was made anew holds them in another order.
    by_name = torch.tensor(sorted(range(len(image_ids)), key=image_ids.__getitem__), dtype=torch.long)
    order = torch.randperm(len(image_ids), generator=torch.Generator().manual_seed(seed))
    for chosen in torch.split(by_name[order], batch_size):
        yield images[chosen], [image_ids[number] for number in chosen.tolist()]


def _stream_shard(inputs: _Inputs, *, batch_size: int, seed: int) -> Iterator[tuple[Tensor, list[str]]]:
    yield from _read_shard(
        TRAIN,
        inputs,
        batch_size=batch_size,
        local_shuffle_buffer_size=SHUFFLE_BUFFER_IMAGES,
        local_shuffle_seed=seed,
    )


def _read_shard(split: str, inputs: _Inputs, **options: Any) -> Iterator[tuple[Tensor, list[str]]]:
    """Batches of this worker's images: features (I, views, R, F) in float16 or pixels (I, 3, S, S), and ids."""
    for rows in ray.train.get_dataset_shard(split).iter_batches(batch_format="pyarrow", **options):
        yield inputs.from_rows(rows, split), rows["image_id"].to_pylist()


def _read_validation(
    inputs: _Inputs, expected: Set[str], is_own: Callable[[int], bool]
) -> tuple[list[tuple[Tensor, list[str]]], str]:
    """Those batches of the validation images that are this worker's, by their numbers; and which images of all batches
    cannot be read, "" if there are none.

    Args:
        expected: the images that every epoch is scored on; others are left out.
    """
    batches: list[tuple[Tensor, list[str]]] = []
    missing = dict.fromkeys(sorted(expected), "missing")
    shard = ray.train.get_dataset_shard(VALIDATION)
    for number, rows in enumerate(shard.iter_batches(batch_format="pyarrow", batch_size=64)):
        is_good = [image_id in expected for image_id in rows["image_id"].to_pylist()]
        if "error_message" in rows.column_names:
            for position, row in enumerate(rows.select(["image_id", "error_code", "error_message"]).to_pylist()):
                if row["error_code"] and is_good[position]:
                    is_good[position] = False
                    missing[row["image_id"]] = f"{row['error_message']} ({row['error_code']})"
        if not all(is_good):
            rows = rows.filter(pa.array(is_good))
        image_ids = rows["image_id"].to_pylist()
        for image_id in image_ids:
            missing.pop(image_id, None)
        if is_own(number) and image_ids:
            batches.append((inputs.from_rows(rows, VALIDATION), image_ids))
    if not missing:
        return batches, ""
    return batches, f"{describe_failures(len(missing), 'validation', [*missing.items()])}: {VALIDATION_ADVICE}"


def _gather(part: dict[str, Caption], world_size: int, device: torch.device) -> dict[str, Caption]:
    """The captions of all workers on every worker."""
    parts = share({image_id: asdict(caption) for image_id, caption in part.items()}, world_size, device)
    return {image_id: Caption(**fields) for one in parts for image_id, fields in one.items()}


def share(value: Any, world_size: int, device: torch.device) -> list[Any]:
    """Every worker's value, made of what JSON knows, on every worker, by rank.

    Not by torch's calls for objects, which unpickle whatever arrives: nobody has to say who he is to be a worker.

    Args:
        device: where the backend takes tensors from.
    """
    if world_size == 1:
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    lengths = [int(length) for length in _gather_tensors(torch.tensor([len(data)], device=device), world_size)]
    padded = functional.pad(data, (0, max(lengths) - len(data)))
    texts = zip(_gather_tensors(padded, world_size), lengths, strict=True)
    return [json.loads(text[:length].cpu().numpy().tobytes()) for text, length in texts]


def _gather_tensors(tensor: Tensor, world_size: int) -> list[Tensor]:
    """Every worker's tensor, all of one shape, by rank."""
    tensors = [torch.empty_like(tensor) for _ in range(world_size)]
    torch.distributed.all_gather(tensors, tensor)
    return tensors


def _report(
    optimization: Optimization,
    encoder: Encoder,
    history: list[dict[str, Any]],
    work: str,
    check: Callable[[], None],
) -> None:
    """Report the last epoch to Ray Train with a checkpoint.

    Args:
        check: raises if this run may not write any more.
    """
    kept = optimization.kept
    tensors = {f"decoder.{name}": tensor for name, tensor in decoder_of(kept).state_dict().items()}
    if isinstance(kept, EndToEnd) or encoder.weights.source == FINETUNED:
        cnn = kept.encoder.cnn if isinstance(kept, EndToEnd) else encoder.cnn
        tensors |= {f"encoder.{name}": tensor for name, tensor in cnn.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        torch.save(optimization.state_dict(), Path(folder, STATE_FILE))
        contiguous = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        safetensors.torch.save_file(contiguous, Path(folder, WEIGHTS_FILE))
        Path(folder, HISTORY_FILE).write_text(json.dumps(history))
        write_checksums(folder, [STATE_FILE, WEIGHTS_FILE, HISTORY_FILE])
        checkpoint = ray.train.Checkpoint.from_directory(folder)
        check()
        ray.train.report(history[-1], checkpoint=checkpoint, checkpoint_dir_name=checkpoint_name(len(history)))
    check()
    write_metrics(work, history)


def _read_table(location: str) -> pa.Table:
    return pq.read_table(pa.BufferReader(storage.read_bytes(location)))
