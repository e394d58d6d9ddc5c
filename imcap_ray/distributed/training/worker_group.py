"""Runs the workers of one phase of a training with Ray Train."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Final

import ray.train
from ray.data import DataContext
from ray.exceptions import RayError
from ray.train import CheckpointConfig, DataConfig, RunConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.config import FailureConfig, ScalingConfig

from imcap_ray import storage
from imcap_ray.data.datasets import TRAIN
from imcap_ray.distributed.cluster.connection import runtime_environment
from imcap_ray.distributed.cluster.ray_environment import temporary_environment
from imcap_ray.distributed.cluster.ray_messages import describe_error
from imcap_ray.distributed.pipeline.failure_log import FailureLog, watch_failures
from imcap_ray.distributed.pipeline.progress import start_counter
from imcap_ray.distributed.training.checkpoints import NUM_BEST_TO_KEEP
from imcap_ray.distributed.training.train_worker import WorkerJob, train_worker
from imcap_ray.distributed.training.training_inputs import Inputs, read_inputs
from imcap_ray.distributed.training.training_plan import CPUS_FOR_READING, Workers
from imcap_ray.errors import ImcapError
from imcap_ray.models.encoders import Encoder
from imcap_ray.runs.heartbeat import repeating
from imcap_ray.runs.training_run import RUN_FOLDER, take_stop
from imcap_ray.training.loop import StoppedError
from imcap_ray.training.phases import SCORE

START_TIMEOUT: Final = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"

WORKERS_START_SECONDS: Final = 600
"""How long Ray Train waits for room for a fixed number of workers before it counts a failure; the fourth ends the
training. Replacing a lost machine takes minutes. An elastic training continues with fewer workers instead."""

MAX_BLOCK_BYTES: Final = 64 * 2**20
"""Size of Ray Data's blocks, which the local shuffle and the object store hold one at a time."""

_WATCH_SECONDS: Final = 2.0


class RoomForReading(ScalingConfig):
    """A number of workers for which the cluster has room, with CPUs left to read the images.

    Ray's own config would let workers take every CPU, and they would wait forever for images that nothing can read.
    """

    _is_valid = False

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]  # a cluster that is still to grow is no mistake
        self._is_valid = True

    @property
    def max_workers(self) -> int:
        """The most workers that may run now. Ray's controller asks before each start and once a minute."""
        most = super().max_workers
        if not self._is_valid or not self.elasticity_enabled or self.use_gpu:  # machines with GPUs have CPUs enough
            return most
        cpus = ray.cluster_resources().get("CPU", 0.0)  # type: ignore[no-untyped-call]
        return min(most, int(cpus) - CPUS_FOR_READING)


def run_workers(
    job: WorkerJob,
    inputs: Mapping[str, Inputs],
    *,
    encoder: Encoder,
    workers: Workers,
    watchers: Sequence[Callable[[], None]],
    report: Callable[[str], None],
) -> None:
    """Run the workers until the phase is finished; its checkpoints are in the run's folder then.

    Args:
        inputs: by split.
        watchers: called every two seconds while the workers run, and once afterwards.
        report: called with a line when training images cannot be read.

    Raises:
        StoppedError: the workers stopped, and would stop again.
        ImcapError: the training failed.
    """
    take_stop(job.work)
    log, counter = FailureLog.remote(), start_counter()  # type: ignore[attr-defined]
    report_failures = watch_failures(log, job.phase.name, report)
    context = DataContext.get_current().copy()
    context.execution_options.preserve_order = True  # so that the same seed gives the same batches
    context.target_max_block_size = MAX_BLOCK_BYTES
    with DataContext.current(context):
        datasets = {
            split: read_inputs(inputs[split], encoder, failures=log if split == TRAIN else None, counter=counter)
            for split in inputs
        }
        trainer = _build_trainer(job, datasets, workers)

        def watch() -> None:
            for watcher in (*watchers, report_failures):
                watcher()

        # An elastic training needs no patience, see `WORKERS_START_SECONDS`.
        timeout = (
            {} if workers.is_elastic else {START_TIMEOUT: os.environ.get(START_TIMEOUT, str(WORKERS_START_SECONDS))}
        )
        with repeating(watch, seconds=_WATCH_SECONDS), temporary_environment(timeout), _own_interrupts():
            try:
                trainer.fit()
            except (RayError, ray.train.TrainingFailedError) as error:
                raise ImcapError(
                    f"training stopped by an error: {describe_error(error)}; "
                    "the same command resumes after its last epoch"
                ) from error
            finally:
                with suppress(RayError):
                    ray.kill(counter)
    report_failures(at_end=True)
    with suppress(RayError):
        ray.kill(log)
    if reason := take_stop(job.work):
        raise StoppedError(reason)


def _build_trainer(job: WorkerJob, datasets: Mapping[str, ray.data.Dataset], workers: Workers) -> TorchTrainer:
    filesystem, work_path = storage.resolve(job.work)
    return TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        scaling_config=RoomForReading(
            num_workers=(workers.min_count, workers.max_count) if workers.is_elastic else workers.min_count,
            use_gpu=workers.gpus > 0,
            resources_per_worker={"CPU": 1, **({"GPU": workers.gpus} if workers.gpus else {})},
        ),
        run_config=RunConfig(
            name=RUN_FOLDER,
            storage_path=work_path,
            storage_filesystem=filesystem,  # ours retries when a store fails now and then
            worker_runtime_env=runtime_environment(gpus=1),  # type: ignore[call-arg]  # mypy sees an older class
            failure_config=FailureConfig(max_failures=3, controller_failure_limit=3),
            checkpoint_config=CheckpointConfig(
                num_to_keep=NUM_BEST_TO_KEEP, checkpoint_score_attribute=SCORE, checkpoint_score_order="max"
            ),
        ),
        datasets=dict(datasets),
        dataset_config=DataConfig(datasets_to_split=[TRAIN]),
    )


@contextmanager
def _own_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt where Ray Train ends the process on Ctrl-C, and restore the handler that it replaces.

    Its own handler would end the process with exit code 0 even after the training is over.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        raise KeyboardInterrupt from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


def watch_room(
    workers: Workers,
    report: Callable[[str], None],
    *,
    get_resources: Callable[[], Mapping[str, float]] = ray.cluster_resources,
) -> Callable[[], None]:
    """Return a function that reports, once each time, that the cluster has no room for the least number of workers.

    Then a node has died, or one that autoscaling adds is not there yet.

    Args:
        get_resources: returns the cluster's CPUs and GPUs.
    """
    needed = {"CPU": float(workers.min_cpus), "GPU": workers.min_gpus}
    is_waiting = False

    def check() -> None:
        nonlocal is_waiting
        try:
            available = get_resources()
        except RayError:
            return
        lacking = [name for name, count in needed.items() if count > available.get(name, 0.0)]
        if lacking and not is_waiting:
            details = ", ".join(
                f"{needed[name]:g} {name}s needed, {available.get(name, 0.0):g} there" for name in lacking
            )
            fewest = replace(workers, max_count=workers.min_count, is_elastic=False)
            report(f"waiting for room for {fewest}: {details}")
        is_waiting = bool(lacking)

    return check
