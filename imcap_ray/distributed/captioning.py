"""Images -> captions, by Ray Data. One row for every image, whatever happens to it or to a process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, NamedTuple

import pyarrow as pa

from imcap_ray import storage
from imcap_ray.config import FLOAT32, CaptioningConfig, ResourcesConfig
from imcap_ray.data.manifest import build_manifest
from imcap_ray.data.schemas import CAPTIONS_SCHEMA, DUPLICATE, FAILED, MANIFEST_SCHEMA, MODEL, OK
from imcap_ray.distributed.cluster.connection import ClusterResources, connect, require, require_memory
from imcap_ray.distributed.cluster.gcs_watch import when_lost
from imcap_ray.distributed.cluster.ray_messages import without_ray_advice
from imcap_ray.distributed.pipeline.crash_isolation import Isolated, is_restarted_actor, process_ends_after
from imcap_ray.distributed.pipeline.duplicate_filter import image_index
from imcap_ray.distributed.pipeline.image_loading import stack_pixels
from imcap_ray.distributed.pipeline.image_pipeline import (
    RESUME_HINT,
    ActorPool,
    ActorReporter,
    PipelineFiles,
    default_num_actors,
    map_images,
    num_blocks,
)
from imcap_ray.distributed.pipeline.progress import Progress
from imcap_ray.errors import ConfigError, FullClusterError, ImageError, ImcapError, StalledError
from imcap_ray.models.caption import ActorNeeds, Caption, ImageCaptioner, compute_batch_size, no_memory
from imcap_ray.runs.captioning_run import (
    CaptioningRun,
    CaptioningSummary,
    describe_ignored,
    describe_removed,
    input_options,
    run_identity,
)
from imcap_ray.runs.captions_folder import CaptionsFolder, open_database, open_manifests
from imcap_ray.runs.existing_captions import ExistingCaptions
from imcap_ray.runs.progress_reporter import ProgressReporter
from imcap_ray.runs.rate import MIN_IMAGES

MAX_COUNTED: Final = 100_000
"""Maximum number of images that a plan counts, because a plan is to take seconds."""

LoadCaptioner = Callable[[], ImageCaptioner]

_NUMBERED_SCHEMA: Final = CAPTIONS_SCHEMA.insert(0, MANIFEST_SCHEMA.field("manifest_id"))


class CaptionImages:
    """Loaded images -> their captions. Each actor of the pool has one.

    An actor that replaces a dead one leaves the captioner to a process that may die again.

    Args:
        gpus: reserved for this actor.
        batch_timeout: seconds after which a batch ends the process of this actor; None means never.

    Raises:
        ImcapError: the captioner cannot start, for example because a GPU cannot be used.
    """

    def __init__(
        self,
        *,
        load_captioner: LoadCaptioner,
        reporter: ActorReporter,
        gpus: float = 0.0,
        batch_timeout: float | None = None,
    ) -> None:
        self._reporter = reporter
        make = partial(_RowCaptioner, load_captioner, gpus, batch_timeout)
        timeout = batch_timeout and ImageError(
            "timeout", f"captioning took longer than {batch_timeout:g} s, even alone"
        )
        self._isolated: Isolated | None = None
        self._captioner: _RowCaptioner | None = None
        with reporter.working():
            if is_restarted_actor():
                self._isolated = Isolated(make, time_limit=batch_timeout, timeout=timeout or None)
            else:
                self._captioner = make()

    def __call__(self, images: pa.Table) -> pa.Table:
        """A table of `loaded_schema` -> `CAPTIONS_SCHEMA` with manifest_id."""
        with self._reporter.batch() as counts:
            if self._captioner:
                rows = self._captioner(images)
                captioner = self._captioner.captioner
                if captioner.needs.batch_size is None:
                    self._reporter.report_batch_size(captioner.compute_batch_size)
                self._reporter.report_beam_steps(captioner.num_beam_steps)
            else:
                assert self._isolated
                rows = pa.concat_tables(
                    _caption_rows(part, [_Answer.failed(answer)] * part.num_rows)
                    if isinstance(answer, ImageError)
                    else answer
                    for part, answer in self._isolated(images)
                )
            counts.update(rows["status"].to_pylist())
            return rows


class _RowCaptioner:
    def __init__(self, load_captioner: LoadCaptioner, gpus: float, batch_timeout: float | None) -> None:
        self.captioner = load_captioner()
        self.captioner.start(gpus=gpus)
        self._batch_timeout = batch_timeout

    def __call__(self, images: pa.Table) -> pa.Table:
        pixels = stack_pixels(images, self.captioner.preparation.shape)
        with process_ends_after(self._batch_timeout) if self._batch_timeout else nullcontext():
            captions = iter(self.captioner.caption_pixels(pixels))
        states = images.select(["error_code", "error_message", "is_repeated"]).to_pylist()
        return _caption_rows(images, [_answer(**state, captions=captions) for state in states])


class _Answer(NamedTuple):
    """What a row of captions says of its image; the other columns are the loaded image's own."""

    status: str
    error_code: str = ""
    error_message: str = ""
    caption: str = ""
    captions: tuple[str, ...] = ()
    confidence: float = float("nan")
    familiarity: float = float("nan")
    logprob: float = float("nan")
    num_tokens: int = 0
    duplicate_of: str = ""
    caption_source: str = ""

    @classmethod
    def captioned(cls, captions: list[Caption]) -> _Answer:
        best = captions[0]
        return cls(
            OK,
            caption=best.text,
            captions=tuple(caption.text for caption in captions),
            confidence=best.confidence,
            familiarity=best.familiarity,
            logprob=best.logprob,
            num_tokens=best.num_tokens,
            caption_source=MODEL,
        )

    @classmethod
    def failed(cls, error: ImageError) -> _Answer:
        return cls(FAILED, error.code, error.message)


def _answer(
    error_code: str, error_message: str, is_repeated: bool, captions: Iterator[list[Caption] | ImageError]
) -> _Answer:
    """The answer for a loaded image. Takes the next of the captions if the image has pixels."""
    if error_code:
        return _Answer(FAILED, error_code, error_message)
    if is_repeated:  # gets the caption of its twin when all images are done
        return _Answer(DUPLICATE)
    answer = next(captions) or no_memory()
    return _Answer.failed(answer) if isinstance(answer, ImageError) else _Answer.captioned(answer)


def _caption_rows(images: pa.Table, answers: Sequence[_Answer]) -> pa.Table:
    """Loaded images and the answers for them, side by side."""
    columns = {name: [getattr(answer, name) for answer in answers] for name in _Answer._fields}
    return pa.table(
        {
            field.name: pa.array(columns[field.name], field.type) if field.name in columns else images[field.name]
            for field in _NUMBERED_SCHEMA
        },
        schema=_NUMBERED_SCHEMA,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptioningPlan:
    """What a captioning run would do."""

    input: str
    output: str
    num_images: int
    """Images of the input, as far as they were counted."""
    is_counted: bool
    """Whether these are all."""
    num_done: int
    """Rows that an earlier run has written, and this one would keep."""
    num_blocks: int
    """Decode tasks, of 64 images each."""
    num_actors: int
    gpus_per_actor: float
    images_per_second: float | None
    """Speed of the last run into this output that was long enough to measure it."""
    seconds: float | None
    """Duration at that speed."""
    num_not_in_input: int = 0
    """Images with rows that the input no longer has."""
    ignored: Mapping[str, int] = field(default_factory=dict)
    """See `InputSummary`."""
    notes: tuple[str, ...] = ()
    """See `InputSummary`."""
    image_column: str | None = None
    """See `InputSummary`."""
    id_column: str | None = None
    """See `InputSummary`."""
    num_existing: int = 0
    """Images whose captions exist and would be kept, as far as the images were counted."""


def connect_and_load(
    load_captioner: LoadCaptioner, resources: ResourcesConfig, *, modules: Sequence[Path] = (), verbose: bool = False
) -> tuple[ClusterResources, ImageCaptioner]:
    """Connect to Ray, and load the captioner while it starts. `modules`: see `connect`. Raises what either raises."""
    with ThreadPoolExecutor(1) as thread:
        captioner = thread.submit(load_captioner)
        cluster = connect(resources.address, num_actors=resources.num_actors, modules=modules, verbose=verbose)
        return cluster, captioner.result()


def plan_captioning(
    config: CaptioningConfig, resources: ResourcesConfig, *, cluster: ClusterResources, captioner: ImageCaptioner
) -> CaptioningPlan:
    """What `caption_images` would do with these arguments. Nothing is written.

    Raises:
        InputError: as `caption_images` would raise before work begins.
    """
    config = _with_absolute_paths(config)
    num_actors, gpus = _choose_actors(resources, cluster, captioner.needs)
    existing = ExistingCaptions.read(config.existing) if config.existing else None
    folder, known_from, keeps_rows = _folder_to_plan_for(config, _identity(config, captioner, existing))
    with TemporaryDirectory() as manifest:
        summary = build_manifest(
            config.input,
            manifest,
            replace(input_options(config), limit=min(config.limit or MAX_COUNTED, MAX_COUNTED)),
            output=config.output,
            known_from=known_from,
        )
        note, num_existing = _count_existing(existing, [manifest, *([known_from] if known_from else [])])
    run = folder.read_run() or {}
    num_images, num_done, num_removed, notes = summary.num_images, 0, 0, summary.notes
    if summary.ignored:
        notes = (describe_ignored(config.input, summary.ignored), *notes)
    notes += note
    if run and keeps_rows:  # then all images of its manifest were counted
        num_removed = 0 if summary.removed is None else summary.removed.size
        num_images = max(num_images + num_removed, folder.count_manifest())
        num_done = sum(folder.count_rows()[0].values())
        if num_removed:
            notes += (describe_removed(num_removed, config),)
        if config.prune:
            num_images, num_done = num_images - num_removed, num_done - num_removed
    num_existing_done = folder.count_existing() if run and keeps_rows else 0
    num_new = max(0, num_images - num_done - (num_existing - num_existing_done))
    rate = run.get("images_per_second") or folder.read_heartbeat().get("images_per_second")
    return CaptioningPlan(
        input=config.input,
        output=config.output,
        num_images=num_images,
        is_counted=summary.num_images < MAX_COUNTED,
        num_done=num_done,
        num_blocks=num_blocks(num_new),
        num_actors=min(num_actors, max(1, num_blocks(num_new))),
        gpus_per_actor=gpus,
        images_per_second=rate,
        seconds=num_new / rate if rate else None,
        num_not_in_input=num_removed,
        ignored=summary.ignored,
        notes=notes,
        image_column=summary.image_column,
        id_column=summary.id_column,
        num_existing=num_existing,
    )


def _count_existing(existing: ExistingCaptions | None, manifests: list[str]) -> tuple[tuple[str, ...], int]:
    """A line on the images that have captions already, and their number."""
    if not existing:
        return (), 0
    with open_database() as database:
        database.register("manifest", open_manifests(manifests))
        count = existing.match(database)
        return (existing.describe(database, count),), count


def _folder_to_plan_for(config: CaptioningConfig, identity: dict[str, Any]) -> tuple[CaptionsFolder, str | None, bool]:
    """The folder that a run would write to, the manifest that it would continue, and whether it would keep its rows."""
    folder, overwrite = CaptionsFolder(config.output), config.overwrite
    if folder.is_being_replaced():  # the run would begin by putting the new rows in place
        folder = folder.next()
        overwrite = overwrite and not folder.is_of(identity)
    if not overwrite:
        folder.require_identity(identity)
        return folder, folder.manifest, True
    # A run with --overwrite that was interrupted is resumed by the same command.
    return folder, folder.next().manifest if folder.next().is_of(identity) else None, False


def caption_images(
    config: CaptioningConfig,
    resources: ResourcesConfig,
    *,
    cluster: ClusterResources,
    load_captioner: LoadCaptioner,
    captioner: ImageCaptioner | None = None,
    reporter: ProgressReporter | None = None,
) -> CaptioningSummary:
    """Caption every image of the input and write one row for each to Parquet files in the output.

    A call that finds an unfinished output of the same input, model and search settings resumes it. It captions images
    that are new in the input, and those whose files have changed.

    Args:
        load_captioner: makes the captioner that each actor keeps.
        captioner: one of them, if the caller has it, for its fingerprint and settings; it captions nothing here.
        reporter: None: lines are printed to stdout.

    Raises:
        InputError: the input, the output or the settings are wrong, found before work began.
        FailureBudgetError: all rows are written, and more images failed than the config allows.
        ImcapError: the run failed; what is written is kept, and the same call resumes.
    """
    config, reporter = _with_absolute_paths(config), reporter or ProgressReporter(print)
    captioner = captioner or load_captioner()
    existing = ExistingCaptions.read(config.existing) if config.existing else None
    pool = _actor_pool(resources, cluster, load_captioner, captioner, batch_timeout=config.batch_timeout)
    progress = Progress()
    with (
        _storage_errors(),
        CaptioningRun.open(config, _identity(config, captioner, existing), reporter=reporter) as run,
        when_lost(run.record_failure),
    ):
        run.list_images(existing)
        pool = replace(pool, num_actors=min(pool.num_actors, max(1, num_blocks(run.num_pending))))
        if run.num_pending:
            reporter.report(_describe_start(run, pool))
        files, has_index = _pipeline_files(run), True
        while run.num_pending:
            try:
                with image_index(run, enabled=has_index) as index:
                    progress = map_images(files, pool, run, num_images=run.num_pending, index=index)
            except StalledError as error:
                run.recover()
                pool = _smaller_pool(pool, error, run)
                reporter.report(f"continuing with {_count(pool.num_actors)}")
                continue
            run.resolve_duplicates()
            has_index = False  # images that were taken for duplicates by mistake are captioned now
        summary = run.finish(describe_bound(progress, cluster, pool.num_actors, pool.gpus_per_actor))
    summary.require_few_failures(config.max_failure_rate)
    return summary


def _with_absolute_paths(config: CaptioningConfig) -> CaptioningConfig:
    return replace(
        config,
        input=storage.absolute(config.input),
        output=storage.absolute(config.output),
        existing=config.existing and storage.absolute(config.existing),
    )


def _identity(config: CaptioningConfig, captioner: ImageCaptioner, existing: ExistingCaptions | None) -> dict[str, Any]:
    return run_identity(
        config.input,
        fingerprint=captioner.fingerprint,
        search=captioner.search,
        precision=getattr(captioner, "precision", FLOAT32),  # captioners of others need not have one
        existing=existing,
    )


def _choose_actors(resources: ResourcesConfig, cluster: ClusterResources, needs: ActorNeeds) -> tuple[int, float]:
    """The number of actors and the GPUs of each.

    Raises:
        ClusterError: there is no room for them.
        ConfigError: the captioner cannot use GPUs.
    """
    default_gpus = float(cluster.expects_gpus) if needs.gpus is None else needs.gpus
    gpus = default_gpus if resources.gpus_per_worker is None else resources.gpus_per_worker
    if gpus and needs.no_gpus:
        raise ConfigError(needs.no_gpus)
    num_fitting = require_memory(cluster, needs.memory)
    num_actors = resources.num_actors or int(min(default_num_actors(cluster, gpus), num_fitting))
    # Besides the actors, Ray Data needs a CPU to decode, and on a resumed run one to leave out what is done.
    what = f"--num-actors {num_actors}" if resources.num_actors else "captioning"
    require(cluster, cpus=num_actors + 2, gpus=num_actors * gpus, what=what)
    return num_actors, gpus


def _actor_pool(
    resources: ResourcesConfig,
    cluster: ClusterResources,
    load_captioner: LoadCaptioner,
    captioner: ImageCaptioner,
    *,
    batch_timeout: float | None,
) -> ActorPool:
    num_actors, gpus = _choose_actors(resources, cluster, captioner.needs)
    return ActorPool(
        actor_class=CaptionImages,
        arguments={"load_captioner": load_captioner, "gpus": gpus, "batch_timeout": batch_timeout},
        preparation=captioner.preparation,
        batch_size=resources.batch_size or captioner.needs.batch_size or compute_batch_size(on_gpu=gpus > 0),
        num_actors=num_actors,
        gpus_per_actor=gpus,
        memory_per_actor=captioner.needs.memory,
        can_grow=resources.num_actors is None and not cluster.is_local,
        can_release=cluster.max_cpus <= cluster.cpus,
    )


def _pipeline_files(run: CaptioningRun) -> PipelineFiles:
    return PipelineFiles(
        manifest=run.folder.manifest,
        root=run.config.input,
        output=run.folder.location,
        extension=run.folder.part_extension,
        work=run.folder.work,
        schema=run.schema,
        require_lease=run.lease.require,
    )


def _smaller_pool(pool: ActorPool, error: StalledError, run: CaptioningRun) -> ActorPool:
    """Actors that fit after a pipeline has stalled. Raises the error if that is not because there are too many."""
    if isinstance(error, FullClusterError):
        # Other jobs use the CPUs, or a node was lost and its actors moved to those that are left.
        pool = pool.halve(error, is_resumed=run.num_done > 0, require_lease=run.lease.require, observer=run)
    num_fitting = default_num_actors(connect(), pool.gpus_per_actor)
    if num_fitting >= pool.num_actors and not isinstance(error, FullClusterError):
        raise error
    return replace(pool, num_actors=min(pool.num_actors, num_fitting))


@contextmanager
def _storage_errors() -> Iterator[None]:
    """Raise errors of a disk, a store or a file as ImcapErrors that say how to resume."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        reason = storage.hide_secrets(without_ray_advice(str(error)))
        raise ImcapError(f"stopped by an error: {reason}; {RESUME_HINT}") from error


def _describe_start(run: CaptioningRun, pool: ActorPool) -> str:
    done = f", {run.num_done:,} are done" if run.num_done else ""
    return f"captioning {run.num_pending:,} of {run.num_images:,} images with {_count(pool.num_actors)}{done}"


def _count(num_actors: int) -> str:
    return f"{num_actors} actor{'s' * (num_actors != 1)}"


def describe_bound(progress: Progress, cluster: ClusterResources, num_actors: int, gpus_per_actor: float) -> str:
    """One sentence: what limited the speed, by how long the actors waited, and what would help."""
    bound = _describe_bottleneck(progress, cluster, num_actors, gpus_per_actor)
    full = compute_batch_size(on_gpu=gpus_per_actor > 0)
    if 0 < progress.batch_size < full:
        remedy = f"--num-actors {num_actors - 1}" if num_actors > 1 else "more of it"
        bound += (
            f"; memory ran out: {progress.batch_size} images were computed at a time instead of {full}, "
            f"{remedy} would help"
        )
    return bound


def _describe_bottleneck(progress: Progress, cluster: ClusterResources, num_actors: int, gpus_per_actor: float) -> str:
    total = progress.busy_seconds + progress.waiting_seconds
    if not total or progress.num_images < MIN_IMAGES:
        return "the run was too short to know what limits its speed"
    waited = progress.waiting_seconds / total
    if waited > 0.25:
        bound = f"decode-bound: the model waited {waited:.0%} of the time; more CPUs would help"
        if not gpus_per_actor and num_actors > 1:
            bound += f", or on these --num-actors {num_actors - 1}"
        return bound
    bound = f"model-bound: the model was busy {1 - waited:.0%} of the time; "
    most_actors = min(default_num_actors(cluster, gpus_per_actor), num_blocks(progress.num_images))
    if num_actors < most_actors:
        return f"{bound}--num-actors {most_actors} would help"
    if gpus_per_actor:
        return f"{bound}more GPUs would help, or more actors on each: --gpus-per-worker {gpus_per_actor / 2:g}"
    return bound + "more CPUs would help" + ", or the GPUs: --gpus-per-worker 1" * cluster.expects_gpus
