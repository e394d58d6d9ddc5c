"""A worker process of Ray Train: reads its shards, resumes from the newest checkpoint, runs the training loop, and
reports each epoch with a checkpoint."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import ray
import ray.train.torch
import safetensors.torch
import torch

from imcap_ray import storage
from imcap_ray.data.datasets import TRAIN, VALIDATION
from imcap_ray.data.parquet_files import read_table
from imcap_ray.distributed.cluster.machine import available_memory
from imcap_ray.distributed.training.checkpoints import HISTORY_FILE, EpochCheckpoint, checkpoint_name, newest_checkpoint
from imcap_ray.distributed.training.training_shards import ShardFormat, keep_shard, read_validation, stream_shard
from imcap_ray.models.devices import require_cuda
from imcap_ray.models.encoder_weights import FINETUNED
from imcap_ray.models.encoders import Encoder
from imcap_ray.runs.checksums import write_checksums
from imcap_ray.runs.lease import Lease
from imcap_ray.runs.training_run import (
    CAPTIONS_FILE,
    RUN_FOLDER,
    STATE_FILE,
    VOCABULARY_FILE,
    WEIGHTS_FILE,
    EpochMetrics,
    read_validation_ids,
    write_metrics,
    write_stop,
)
from imcap_ray.text.vocabulary import Vocabulary
from imcap_ray.training.loop import (
    Learner,
    LearningData,
    Phase,
    StoppedError,
    build_learner,
    decoder_of,
    stop_if,
    train_phase,
)
from imcap_ray.training.optimization import EndToEnd
from imcap_ray.training.team import Team


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerJob:
    """The work of all workers of a phase."""

    lease: Lease
    """The run's right to write to the work folder."""
    phase: Phase
    encoder: ray.ObjectRef[Encoder]
    """In the object store, so that weights from a file of the driver's machine reach every node."""
    start_file: str | None
    """File with the weights that the phase starts from; None: it starts from random ones."""
    shapes: Mapping[str, tuple[int, ...]]
    """Shape of what is read of an image, by split."""
    num_train_images: int
    threads: int
    """CPU threads of each worker."""
    needs_gpu: bool

    @property
    def work(self) -> str:
        """The training's work folder."""
        return self.lease.work


def train_worker(config: Mapping[str, WorkerJob]) -> None:
    """Run one worker; `config` has the job under "job"."""
    job = config["job"]
    if job.needs_gpu:
        require_cuda()
    context = ray.train.get_context()
    team = Team(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
    if team.device.type == "cpu":
        torch.set_num_threads(job.threads)
    # Ray restarts the workers after a failure. If it was that another run has acquired the lease, the driver reports
    # it.
    if not team.share(job.lease.is_held())[0]:
        return
    learner = _build_learner(job, team)
    history = _resume(job, learner, team)
    try:
        data = _read_data(job, team)
        train_phase(learner, data, history, team=team, save=partial(_save_epoch, job, learner, team))
    except StoppedError as error:
        if team.rank == 0:
            write_stop(job.lease, str(error))


def _build_learner(job: WorkerJob, team: Team) -> Learner:
    vocabulary = Vocabulary.from_json(storage.read_bytes(storage.join(job.work, VOCABULARY_FILE)).decode())
    # Without a device, DDP does not move the arguments: the lengths of captions stay on the CPU.
    distribute = partial(
        ray.train.torch.prepare_model,
        move_to_device=False,
        parallel_strategy_kwargs={"device_ids": None, "output_device": None},
    )
    return build_learner(
        job.phase,
        vocabulary=vocabulary,
        encoder=ray.get(job.encoder),
        start_weights=safetensors.torch.load(storage.read_bytes(job.start_file)) if job.start_file else None,
        num_images=job.num_train_images // team.size,
        team=team,
        distribute=distribute,
    )


def _resume(job: WorkerJob, learner: Learner, team: Team) -> list[EpochMetrics]:
    """Load the newest checkpoint if it is of this phase; the metrics of all epochs so far."""
    # `ray.train.get_checkpoint()` is the last checkpoint that Ray has noted, corrupt or not. Ray looks for new ones
    # every two seconds, so that a complete checkpoint whose worker died in between is not noted.
    checkpoint = newest_checkpoint(storage.join(job.work, RUN_FOLDER)) if team.rank == 0 else None
    newest = team.share(asdict(checkpoint) if checkpoint else None)[0]
    if not newest:
        return []
    checkpoint = EpochCheckpoint(**newest)
    if checkpoint.phase == job.phase.name:
        state = io.BytesIO(storage.read_bytes(storage.join(checkpoint.location, STATE_FILE)))
        num_done = sum(row["phase"] == job.phase.name for row in checkpoint.history)
        learner.optimization.load_state_dict(
            torch.load(state, map_location=team.device, weights_only=True), step=num_done * learner.steps_per_epoch
        )
    return list(checkpoint.history)


def _read_data(job: WorkerJob, team: Team) -> LearningData:
    """This worker's images, and the captions of all; StoppedError if a validation image cannot be read."""
    captions: dict[str, dict[str, list[str]]] = {TRAIN: {}, VALIDATION: {}}
    for row in read_table(storage.join(job.work, CAPTIONS_FILE)).to_pylist():
        captions.setdefault(row["split"], {})[row["image_id"]] = row["captions"]
    shard = ShardFormat.of_phase(job.phase.name, job.shapes)
    memory = available_memory() / ray.train.get_context().get_local_world_size()
    fits = shard.fits_on_every_node(job.num_train_images // team.size, memory, team)
    batches = keep_shard(shard) if fits else stream_shard(shard)
    validation_ids = read_validation_ids(job.work)
    assert validation_ids is not None  # the driver has written it
    # Every worker reads all validation images, because an equal split would drop some; it keeps every n-th batch.
    validation, problem = read_validation(shard, set(validation_ids), lambda number: number % team.size == team.rank)
    stop_if(problem, team)
    return LearningData(
        batches=batches,
        captions=captions[TRAIN],
        validation=validation,
        references=captions[VALIDATION],
        validation_ids=validation_ids,
    )


def _save_epoch(job: WorkerJob, learner: Learner, team: Team, history: list[EpochMetrics]) -> None:
    """Report the last epoch to Ray Train; the first worker adds a checkpoint."""
    dir_name = checkpoint_name(len(history))
    if team.rank != 0:
        ray.train.report(dict(history[-1]), checkpoint_dir_name=dir_name)
        return
    optimization, encoder = learner.optimization, learner.encoder
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
        job.lease.require()
        ray.train.report(dict(history[-1]), checkpoint=checkpoint, checkpoint_dir_name=dir_name)
    job.lease.require()
    write_metrics(job.work, history)
