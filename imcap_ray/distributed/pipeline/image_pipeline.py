"""A manifest of images -> Parquet with one row per image, computed by a pool of actors.

Shared by captioning, which writes captions, and by training, which writes features.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import pyarrow as pa
import ray
from pyarrow import fs
from ray.data import ActorPoolStrategy, DataContext, Dataset, TaskPoolStrategy
from ray.data.checkpoint import CheckpointConfig
from ray.exceptions import RayError

from imcap_ray import storage
from imcap_ray.data.image_decoding import Preparation
from imcap_ray.data.manifest import largest_row_group, read_image_columns
from imcap_ray.distributed.cluster.connection import ClusterResources, own_cores, runtime_environment
from imcap_ray.distributed.cluster.free_resources import FreeResources
from imcap_ray.distributed.cluster.ray_messages import describe_error
from imcap_ray.distributed.cluster.ray_versions import ExecutionTimeoutError
from imcap_ray.distributed.pipeline.checkpoint_files import WithoutExtension
from imcap_ray.distributed.pipeline.contention import (
    RELEASE_PENDING_SECONDS,
    RELEASE_SECONDS,
    REPORT_SECONDS,
    ROOM_FOR_TASKS,
    RoomWatch,
    releasable,
    wait_for_room,
)
from imcap_ray.distributed.pipeline.image_loading import IMAGES_PER_BLOCK, LoadImages
from imcap_ray.distributed.pipeline.parquet_sink import ParquetParts
from imcap_ray.distributed.pipeline.progress import Progress, WorkReport, start_counter
from imcap_ray.distributed.pipeline.ray_metrics import ActorMetrics, RunMetrics
from imcap_ray.errors import FullClusterError, ImcapError, StalledError
from imcap_ray.models.caption import COMPUTE_BATCH_SIZE
from imcap_ray.runs.heartbeat import repeating

SMALL_RUN = 512
"""Runs of up to this many images have blocks of one computed batch, so that all actors end at about the same time."""

UPDATE_SECONDS = 0.5
"""How often the progress of a pipeline is read."""

MOST_BLOCKS_READ = 200
"""Maximum number of blocks for which Ray is given the number of blocks of a manifest."""

RESUME_HINT = "what is written is kept; the same command resumes"


class ActorReporter:
    """Reports to the counter, and to Ray's metrics, how an actor of the operator spends its time."""

    def __init__(self, counter: Any, operator: str) -> None:
        self._counter = counter
        self._operator = operator
        self._last_end: float | None = None
        self._batch_size = 0

    @functools.cached_property
    def _metrics(self) -> ActorMetrics:  # made in the actor; this object comes from the driver
        return ActorMetrics(self._operator)

    @contextlib.contextmanager
    def batch(self) -> Iterator[Counter[str]]:
        """A block that works on a batch, and fills in the counts of its images by status."""
        counts: Counter[str] = Counter()
        start = time.perf_counter()
        waited = start - self._last_end if self._last_end is not None else 0.0
        if self._last_end is not None:
            self._metrics.observe_wait(waited)
        with self.working():
            yield counts
        self._last_end = time.perf_counter()
        self._counter.add_batch.remote(dict(counts), self._last_end - start, waited)
        self._metrics.count_images(counts)

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """A block that does anything else that takes time, such as loading a model."""
        report = WorkReport(self._counter, is_actor=True)
        report.continues()
        try:
            yield
        finally:
            report.ends()

    def report_batch_size(self, batch_size: int) -> None:
        """Report how many images this actor computes together."""
        if batch_size != self._batch_size:
            self._batch_size = batch_size
            self._counter.report_batch_size.remote(batch_size)

    def report_beam_steps(self, num_steps: int) -> None:
        """Report how many steps this actor's searches have taken so far."""
        self._metrics.report_beam_steps(num_steps)


def read_images(manifest: str, load: LoadImages, *, num_images: int) -> Dataset:
    """The images of a manifest, rows of `loaded_schema`, at most `IMAGES_PER_BLOCK` in a block.

    Args:
        num_images: images of the manifest that are to be read.
    """
    cores = own_cores()
    cpus = cores or max(1, int(ray.cluster_resources().get("CPU", 1)))  # type: ignore[no-untyped-call]
    # Ray itself reads a manifest of 100,000 rows as one block, whatever number of blocks is asked for.
    rows_per_task = images_per_task(num_images, cpus=cpus, row_group=largest_row_group(manifest))
    # Ray would join the tables that a task yields into blocks of 128 MiB. With this size each table is a block. It must
    # be, because a repeated task must return the same blocks even if an image fails that did not fail before.
    context = DataContext.get_current().copy()
    context.target_max_block_size = IMAGES_PER_BLOCK * math.prod(load.preparation.shape)
    blocks = -(-num_images // (COMPUTE_BATCH_SIZE if num_images <= SMALL_RUN else IMAGES_PER_BLOCK))
    with DataContext.current(context):
        return (
            ray.data.read_parquet(
                storage.resolve(manifest)[1],
                filesystem=storage.resolve(manifest)[0],
                file_extensions=None,
                # Ray itself makes a few blocks per CPU, however many images are computed together. For many images it
                # does not matter, because they are divided again.
                override_num_blocks=blocks if 0 < blocks <= MOST_BLOCKS_READ else None,
            )
            .repartition(target_num_rows_per_block=rows_per_task, strict=rows_per_task > IMAGES_PER_BLOCK)
            # A task waits for files half of its time. On a private Ray, whose CPUs are only tickets, its share leaves
            # room for as many tasks as there are cores, so that actors do not wait for large photographs. As the share
            # differs from the actors', Ray does not fuse both operators: a file that kills its decoder must not take a
            # model with it.
            .map_batches(
                load,
                batch_size=None,
                batch_format="pyarrow",
                num_cpus=0.1 if cores else 0.5,
                # A task may hold a row group of large photographs twice, 3 GB. More tasks than cores are no faster.
                compute=TaskPoolStrategy(size=cores and min(cores, max(1, blocks))),
                runtime_env=runtime_environment(gpus=0),
            )
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineFiles:
    """What a pipeline reads and writes."""

    manifest: str
    """Folder of Parquet files with `MANIFEST_SCHEMA`."""
    root: str
    """Where the images are. If it is missing too, a missing image is not that image's own fault."""
    output: str
    """Folder for the parts."""
    extension: str = ".parquet"
    """Of the parts' names."""
    schema: pa.Schema
    """Columns of the parts. The actors return them, and `manifest_id`."""
    work: str
    """Folder in which `done/` records what is written; images recorded there are not read again."""
    require_lease: Callable[[], None]
    """Called in the writing process before a part appears; raises if this run may not write any more."""

    def checkpointed_context(self) -> DataContext:
        """Settings with which Ray Data records what is done, and skips it on resumption."""
        context = DataContext.get_current().copy()
        context.execution_options.preserve_order = False
        # Only ids are kept: eight bytes per image. The id has to be a column of the manifest, or a resumed run raises
        # KeyError.
        context.checkpoint_config = CheckpointConfig(
            id_column="manifest_id",
            checkpoint_path=storage.join(self.work, "done"),
            delete_checkpoint_on_success=False,
            override_filesystem=fs.PyFileSystem(WithoutExtension(storage.resolve(self.work)[0])),
        )
        return context

    def sink(self, *, num_images: int) -> ParquetParts:
        """Where the rows of this many images are written."""
        return ParquetParts(
            self.output,
            extension=self.extension,
            schema=self.schema,
            min_rows_per_file=min(4096, max(IMAGES_PER_BLOCK, num_images // 64)),
            check=self.require_lease,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorPool:
    """The actors of a pipeline, which turn loaded images into rows."""

    actor_class: type
    """Called with a table of `loaded_schema`; built with `arguments` and a `reporter`."""
    arguments: Mapping[str, Any]
    preparation: Preparation
    """What the actors want their images to be."""
    batch_size: int
    """Images that an actor takes at a time."""
    num_actors: int
    gpus_per_actor: float
    memory_per_actor: float = 0
    """Bytes that Ray reserves; 0: none."""
    can_grow: bool = False
    """Whether the pool grows when nodes join the cluster, and shrinks again when they leave."""
    can_release: bool = False
    """Whether the pipeline ends if its actors are idle because all CPUs are in use: no cluster grows for it."""

    def map_options(self, counter: Any, *, num_images: int) -> dict[str, Any]:
        """Arguments of `Dataset.map_batches` for this many images."""
        most = num_blocks(num_images)
        num_actors = max(1, min(self.num_actors, most))
        return {
            "fn_constructor_kwargs": {
                **self.arguments,
                "reporter": ActorReporter(counter, self.actor_class.__name__),
            },
            "batch_size": self.batch_size,
            "batch_format": "pyarrow",
            "num_cpus": 1,
            "num_gpus": self.gpus_per_actor or None,
            "memory": self.memory_per_actor or None,
            "runtime_env": runtime_environment(gpus=self.gpus_per_actor),
            # The actors that fit now are the minimum, because Ray would otherwise begin by taking some away: it divides
            # the CPUs equally among the operators. It adds actors only while each has nearly two blocks waiting and the
            # other operators keep enough CPUs for a task, so that it uses nodes that join and nothing that they need.
            "compute": ActorPoolStrategy(
                min_size=num_actors,
                max_size=max(num_actors, most) if self.can_grow else num_actors,
                max_tasks_in_flight_per_actor=4,
            ),
        }

    def halve(
        self,
        error: FullClusterError,
        *,
        is_resumed: bool,
        require_lease: Callable[[], None],
        observer: PipelineObserver,
    ) -> ActorPool:
        """Half of this pool, which was released because the cluster is full, once there is room for an actor of it."""
        observer.report_waiting(f"{error}; released {self.num_actors} actor{'s' * (self.num_actors != 1)}")
        wait_for_room(
            cpus=1 + ROOM_FOR_TASKS + is_resumed,  # Ray Data leaves out what is done in an actor of its own
            gpus=self.gpus_per_actor,
            check=require_lease,
            on_waiting=observer.report_waiting,
        )
        observer.report_waiting("")
        return replace(self, num_actors=max(1, self.num_actors // 2), can_grow=False)


class PipelineObserver(Protocol):
    """Whoever is shown how a pipeline proceeds."""

    def report_progress(self, num_images: int) -> float | None:
        """Called about twice a second with the images that the pipeline is done with; returns its speed."""

    def report_waiting(self, reason: str) -> None:
        """Called with a reason when the pipeline begins to wait for CPUs or GPUs, and with "" when it continues."""


def map_images(
    files: PipelineFiles, pool: ActorPool, observer: PipelineObserver, *, num_images: int, index: Any = None
) -> Progress:
    """Read a manifest, decode its images in tasks, hand them to a pool of actors, and write the rows that these return.

    Images that an earlier, interrupted call has written are not read again.

    Args:
        num_images: images of the manifest that are not done.
        index: an `ImageIndex`, if repeated images are not to be computed.

    Raises:
        FullClusterError: the pipeline was ended, as `ActorPool.can_release` allows. The same call with fewer actors
            resumes when there is room for them.
        StalledError: nothing moved for `RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S` (half an hour).
        ImcapError: the run failed; what is written is kept, and the same call resumes.
    """
    context = files.checkpointed_context()
    counter = start_counter()
    load = LoadImages(
        preparation=pool.preparation,
        root=files.root,
        index=index,
        image_columns=tuple(read_image_columns(files.manifest)),
        counter=counter,
    )
    watch = _PipelineWatch(counter, pool, observer)
    with DataContext.current(context), watch.watching(), _ray_data_errors(context):
        (
            read_images(files.manifest, load, num_images=num_images)
            .map_batches(pool.actor_class, **pool.map_options(counter, num_images=num_images))
            .write_datasink(files.sink(num_images=num_images))
        )
    return watch.progress


@contextlib.contextmanager
def _ray_data_errors(context: DataContext) -> Iterator[None]:
    """Raise errors of Ray Data, and of what it runs, as errors of the package."""
    try:
        yield
    except ExecutionTimeoutError as error:  # its text is a page about operators
        seconds = context.execution_no_progress_timeout_s
        raise StalledError(f"nothing has moved for {seconds:.0f} s, is the cluster full?; {RESUME_HINT}") from error
    except (RayError, OSError) as error:
        raise ImcapError(f"stopped by an error: {describe_error(error)}; {RESUME_HINT}") from error


class _PipelineWatch:
    """Reports a running pipeline's progress, and releases its actors if they wait for CPUs of a full cluster."""

    def __init__(self, counter: Any, pool: ActorPool, observer: PipelineObserver) -> None:
        self.progress = Progress()
        self._counter = counter
        self._pool = pool
        self._observer = observer
        self._metrics = RunMetrics(pool.actor_class.__name__)
        self._room = RoomWatch()
        self._is_waiting = False
        self._has_released = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch while the block runs, which a release ends with FullClusterError."""
        try:
            # The manifest is read by a task too, so this begins before it is.
            with releasable() as release, repeating(functools.partial(self._update, release), seconds=UPDATE_SECONDS):
                yield
        finally:
            self._metrics.set_rate(0.0)
            with contextlib.suppress(RayError):  # the cluster itself may be lost
                ray.kill(self._counter)  # otherwise it lives as long as this process

    def _update(self, release: Callable[[str], None]) -> None:
        with contextlib.suppress(RayError):  # the counter is being restarted
            self.progress = ray.get(self._counter.get.remote())
            rate = self._observer.report_progress(self.progress.num_images)
            self._metrics.set_rate(rate or 0.0)
            if not own_cores():
                self._watch_room(release)

    def _watch_room(self, release: Callable[[str], None]) -> None:
        has_actors = self.progress.num_actors > 0
        waited = self._room.update(
            time.monotonic(),
            num_reports=self.progress.num_reports,
            num_working=self.progress.num_working,
            read_lack=lambda: FreeResources.read().lacks(
                cpus=ROOM_FOR_TASKS, gpus=0.0 if has_actors else self._pool.gpus_per_actor
            ),
        )
        if self._is_waiting != (waited >= REPORT_SECONDS):
            self._is_waiting = not self._is_waiting
            self._observer.report_waiting(f"waiting: {self._room.reason}" if self._is_waiting else "")
        patience = RELEASE_SECONDS if has_actors else RELEASE_PENDING_SECONDS
        if self._pool.can_release and waited >= patience and not self._has_released:
            self._has_released = True
            release(self._room.reason)


def images_per_task(num_images: int, *, cpus: int, row_group: int) -> int:
    """Number of images that a task decodes: a row group, or an equal part of one if there would be too few tasks.

    To read one row of a row group, all rows before it are read, and often the whole row group, as its values are in one
    page. So a task with the end of one row group and the start of the next would read two.

    Args:
        row_group: rows of the largest row group with images; 0 if images are files.
    """
    parts = max(1, round(row_group / math.ceil(num_images / cpus))) if num_images else 1
    return max(IMAGES_PER_BLOCK, math.ceil(row_group / parts))


def num_blocks(num_images: int) -> int:
    """Number of blocks of this many images; more actors than blocks would have nothing to do."""
    return -(-num_images // IMAGES_PER_BLOCK)


def default_num_actors(resources: ClusterResources, gpus_per_actor: float) -> int:
    """One actor per GPU, or per core if there is no GPU, with two CPUs left for Ray Data's tasks.

    On a cluster that does not grow, only CPUs and GPUs count that no other job holds.
    """
    cpus, gpus = resources.cpus, resources.gpus
    if resources.max_cpus <= resources.cpus:  # otherwise waiting actors make it grow
        cpus, gpus = min(cpus, resources.free_cpus), min(gpus, resources.free_gpus)
    if gpus_per_actor:
        return max(1, min(int(gpus / gpus_per_actor), int(cpus) - 2))
    return max(1, min(resources.physical_cores, int(cpus) - 2))
