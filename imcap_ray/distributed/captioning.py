"""Images -> captions, by Ray Data. One row for every image, whatever happens to it or to a process."""

from __future__ import annotations

import contextlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from tempfile import TemporaryDirectory
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from imcap_ray import __version__, storage
from imcap_ray.config import SearchConfig, to_mapping
from imcap_ray.data.columns import BY_NAME, ColumnOptions
from imcap_ray.data.manifest import InputOptions, InputSummary, build_manifest
from imcap_ray.data.schemas import CAPTIONS_SCHEMA, DUPLICATE, FAILED, MANIFEST_SCHEMA, OK, SCHEMA_VERSION
from imcap_ray.distributed.cluster import ClusterResources, connect, require, without_ray_advice
from imcap_ray.distributed.contention import ROOM_FOR_TASKS, wait_for_room
from imcap_ray.distributed.crash_isolation import Isolated, is_repeated_work
from imcap_ray.distributed.duplicate_filter import end_image_index, start_image_index
from imcap_ray.distributed.gcs_watch import when_lost
from imcap_ray.distributed.image_pipeline import (
    RESUME_HINT,
    ActorReporter,
    default_num_actors,
    map_images,
    num_blocks,
    stack_pixels,
)
from imcap_ray.distributed.progress import Progress
from imcap_ray.errors import (
    FailureBudgetError,
    FullClusterError,
    ImageError,
    ImcapError,
    InputChangedError,
    InputError,
    StalledError,
)
from imcap_ray.models.caption import Caption, compute_batch_size, no_memory
from imcap_ray.runs.captions_folder import CaptionsFolder
from imcap_ray.runs.heartbeat import HEARTBEAT_SECONDS, repeating
from imcap_ray.runs.lease import Lease
from imcap_ray.runs.progress_reporter import ProgressReporter

MAX_COUNTED: Final = 100_000
"""Images that a plan counts at most: it is to take seconds."""

RATE_SECONDS: Final = 120
"""What "of late" means."""


class ImageCaptioner(Protocol):
    """All that an actor asks of a captioner."""

    @property
    def image_size(self) -> int:
        """Pixels on each side."""

    @property
    def fingerprint(self) -> str:
        """The same for the same answers, but for the rounding of another device."""

    @property
    def search(self) -> SearchConfig:
        """How captions are sought."""

    @property
    def compute_batch_size(self) -> int:
        """Images computed together: fewer after memory has run out."""

    @property
    def num_beam_steps(self) -> int:
        """Positions that its searches have computed so far."""

    def require_gpu(self) -> None:
        """Raise ImcapError if it computes with a GPU where there is one, and cannot use the one of this process."""

    def caption_pixels(self, pixels: npt.NDArray[np.uint8]) -> Sequence[list[Caption] | ImageError]:
        """For uint8 pixels (B, 3, S, S) the captions of each image, the best first; none where memory runs out, or the
        error of an image that has none for another reason."""


class CaptionImages:
    """Loaded images -> their captions. One lives in each actor of the pool.

    An actor that takes the place of a dead one leaves the captioner to a process that may die again.

    Args:
        gpus: reserved for this actor.

    Raises:
        ImcapError: it has a GPU that cannot be used.
    """

    def __init__(
        self, *, load_captioner: Callable[[], ImageCaptioner], reporter: ActorReporter, gpus: float = 0.0
    ) -> None:
        self._reporter = reporter
        self._isolated = Isolated(partial(_CaptionRows, load_captioner, gpus)) if is_repeated_work() else None
        with reporter.working():
            self._caption = None if self._isolated else _CaptionRows(load_captioner, gpus)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """A table of `loaded_schema` -> `CAPTIONS_SCHEMA` with manifest_id."""
        with self._reporter.batch() as counts:
            if self._caption:
                done = self._caption(rows)
                self._reporter.tell_batch_size(self._caption.captioner.compute_batch_size)
                self._reporter.tell_beam_steps(self._caption.captioner.num_beam_steps)
            else:
                assert self._isolated
                done = pa.concat_tables(
                    _blame(row, answer) if isinstance(answer, ImageError) else answer
                    for row, answer in self._isolated(rows)
                )
            counts.update(done["status"].to_pylist())
            return done


class _CaptionRows:
    def __init__(self, load_captioner: Callable[[], ImageCaptioner], gpus: float) -> None:
        self.captioner = load_captioner()
        if gpus:
            self.captioner.require_gpu()

    def __call__(self, rows: pa.Table) -> pa.Table:
        captions = iter(self.captioner.caption_pixels(stack_pixels(rows, self.captioner.image_size)))
        done = []
        for row in rows.drop(["pixels"]).to_pylist():
            if row["error_code"]:
                done.append(_empty_row(row, FAILED))
            elif row["is_repeated"]:  # its caption comes from its twin, when all are done
                done.append(_empty_row(row, DUPLICATE))
            else:
                found = next(captions) or no_memory()
                done.append(_blamed_row(row, found) if isinstance(found, ImageError) else _captioned_row(row, found))
        return pa.Table.from_pylist(done, schema=_NUMBERED_SCHEMA)


_NUMBERED_SCHEMA = CAPTIONS_SCHEMA.insert(0, MANIFEST_SCHEMA.field("manifest_id"))


def _captioned_row(row: dict[str, Any], captions: list[Caption]) -> dict[str, Any]:
    best = captions[0]
    return row | {
        "caption": best.text,
        "captions": [caption.text for caption in captions],
        "confidence": best.confidence,
        "logprob": best.logprob,
        "num_tokens": best.num_tokens,
        "status": OK,
        "duplicate_of": "",
    }


def _empty_row(row: dict[str, Any], status: str) -> dict[str, Any]:
    return row | {
        "caption": "",
        "captions": [],
        "confidence": float("nan"),
        "logprob": float("nan"),
        "num_tokens": 0,
        "status": status,
        "duplicate_of": "",
    }


def _blame(rows: pa.Table, error: ImageError) -> pa.Table:
    done = [_blamed_row(row, error) for row in rows.drop(["pixels"]).to_pylist()]
    return pa.Table.from_pylist(done, schema=_NUMBERED_SCHEMA)


def _blamed_row(row: dict[str, Any], error: ImageError) -> dict[str, Any]:
    return _empty_row(row | {"error_code": error.code, "error_message": error.message}, FAILED)


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptioningSummary:
    """What a captioning run came to."""

    input: str
    output: str
    num_images: int
    """Rows in the output, this run's and earlier ones'."""
    num_new: int
    """Rows that this run wrote."""
    counts: dict[str, int]
    """Rows by status."""
    error_counts: dict[str, int]
    """Failed rows by error code."""
    seconds: float
    images_per_second: float
    """Of this run, from its start to its end."""
    bound: str
    """One sentence: what limited the speed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptioningPlan:
    """What a captioning run would do."""

    input: str
    output: str
    num_images: int
    """Of the input, as far as they were counted."""
    is_counted: bool
    """Whether these are all."""
    num_done: int
    """Rows that an earlier run has written, and this one would keep."""
    num_blocks: int
    """Decode tasks, of 64 images each."""
    num_actors: int
    gpus_per_actor: float
    images_per_second: float | None
    """Of the last run into this output, if there was one."""
    seconds: float | None
    """At that speed."""
    notes: tuple[str, ...] = ()
    """See `InputSummary`."""
    image_column: str | None = None
    """See `InputSummary`."""
    id_column: str | None = None
    """See `InputSummary`."""


def load_captioner(
    models: Sequence[str] = (), *, search: SearchConfig | None = None, encoder_weights: str | None = None
) -> ImageCaptioner:
    """`imcap_ray.models.captioner.load_captioner`. Torch, which takes seconds to import, waits for the call."""
    from imcap_ray.models.captioner import load_captioner

    return load_captioner(models, search=search, encoder_weights=encoder_weights)


def connect_and_load(
    load_captioner: Callable[[], ImageCaptioner],
    address: str | None = None,
    *,
    num_actors: int | None = None,
    verbose: bool = False,
) -> tuple[ClusterResources, ImageCaptioner]:
    """Connect to Ray, and while it starts load the captioner, to be asked what it is. Raises what either raises."""
    loading: list[Future[ImageCaptioner]] = []
    with ThreadPoolExecutor(1) as thread:
        resources = connect(
            address,
            num_actors=num_actors,
            verbose=verbose,
            meanwhile=lambda: loading.append(thread.submit(load_captioner)),
        )
        return resources, loading[0].result()


def plan_captioning(
    input: str,
    output: str,
    *,
    load_captioner: Callable[[], ImageCaptioner],
    resources: ClusterResources,
    captioner: ImageCaptioner | None = None,
    num_actors: int | None = None,
    gpus_per_actor: float | None = None,
    recursive: bool = True,
    limit: int | None = None,
    overwrite: bool = False,
    columns: ColumnOptions = BY_NAME,
    allow_outside_paths: bool = False,
) -> CaptioningPlan:
    """What `caption_images` would do with these arguments. Nothing is written.

    Raises:
        InputError: what that would raise before work begins.
    """
    input, output = storage.absolute(input), storage.absolute(output)
    actors, gpus = _choose_actors(resources, num_actors, gpus_per_actor)
    folder = CaptionsFolder(output)
    identity = _identity(input, captioner or load_captioner())
    if folder.is_being_replaced():  # by the new rows, which the run would begin with putting in place
        folder = folder.next()
        overwrite = overwrite and not folder.is_of(identity)
    run = folder.read_run() or {}
    if not overwrite:
        folder.claim(identity)
    known_from = folder.manifest if not overwrite else None
    if overwrite and folder.next().is_of(identity):  # left by a run with --overwrite, which the same command resumes
        known_from = folder.next().manifest
    with TemporaryDirectory() as manifest:
        found = build_manifest(
            input,
            manifest,
            InputOptions(
                recursive=recursive,
                limit=min(limit or MAX_COUNTED, MAX_COUNTED),
                allow_outside_paths=allow_outside_paths,
                columns=columns,
            ),
            output=output,
            known_from=known_from,
        )
    num_images, num_done = found.num_images, 0
    if run and not overwrite:  # then its manifest has been counted to its end
        num_images = max(num_images, folder.count_manifest())
        num_done = sum(folder.count_rows()[0].values())
    num_new = max(0, num_images - num_done)
    rate = run.get("images_per_second") or folder.read_heartbeat().get("images_per_second")
    return CaptioningPlan(
        input=input,
        output=output,
        num_images=num_images,
        is_counted=found.num_images < MAX_COUNTED,
        num_done=num_done,
        num_blocks=num_blocks(num_new),
        num_actors=min(actors, max(1, num_blocks(num_new))),
        gpus_per_actor=gpus,
        images_per_second=rate,
        seconds=num_new / rate if rate else None,
        notes=found.notes,
        image_column=found.image_column,
        id_column=found.id_column,
    )


def _choose_actors(
    resources: ClusterResources, num_actors: int | None, gpus_per_actor: float | None
) -> tuple[int, float]:
    """How many actors, and how many GPUs each; ClusterError if there is no room for them."""
    gpus = gpus_per_actor if gpus_per_actor is not None else float(resources.expects_gpus)
    actors = num_actors or default_num_actors(resources, gpus)
    # Beside the actors Ray Data needs a CPU to decode with, and on a resumed run one to leave out what is done.
    require(resources, cpus=actors + 2, gpus=actors * gpus, what=f"--num-actors {actors}")
    return actors, gpus


def _identity(input: str, captioner: ImageCaptioner) -> dict[str, Any]:
    return {
        "input": input,
        "model_fingerprint": captioner.fingerprint,
        "search": to_mapping(captioner.search),
        "schema_version": SCHEMA_VERSION,
    }


def caption_images(
    input: str,
    output: str,
    *,
    load_captioner: Callable[[], ImageCaptioner],
    resources: ClusterResources,
    captioner: ImageCaptioner | None = None,
    model_name: str = "",
    num_actors: int | None = None,
    gpus_per_actor: float | None = None,
    batch_size: int | None = None,
    recursive: bool = True,
    limit: int | None = None,
    overwrite: bool = False,
    retry_failed: bool = False,
    columns: ColumnOptions = BY_NAME,
    allow_outside_paths: bool = False,
    max_failure_rate: float = 0.1,
    reporter: ProgressReporter | None = None,
) -> CaptioningSummary:
    """Caption every image of `input` and write one row for each to Parquet files in `output`.

    A call that finds an unfinished output of the same input, model and search settings goes on with it. It captions
    images that are new in the input, and those whose files have changed.

    Args:
        input: folder, image or Parquet; path or URI.
        output: folder; path or URI; on a cluster one that every node sees.
        load_captioner: makes the captioner that each actor keeps.
        captioner: one of them, if the caller has it, to be asked what it is; it captions nothing here.
        num_actors: None: one per GPU, or one per core where there is none, and more where nodes join the cluster.
        batch_size: images that an actor takes at a time; None: as many as it computes together.
        overwrite: start anew; the old rows go when the new ones are complete.
        retry_failed: caption the images that failed before once more.
        columns: of Parquet tables, as the user names them.
        allow_outside_paths: see `build_manifest`.
        reporter: None: lines are printed to stdout.

    Raises:
        InputError: something does not fit, found before work began.
        FailureBudgetError: all is written, and more images failed than `max_failure_rate` of them.
        ImcapError: the run failed; what is written stays and the same call goes on.
    """
    start = time.time()
    reporter = reporter or ProgressReporter(print)
    input, output = storage.absolute(input), storage.absolute(output)
    actors, gpus = _choose_actors(resources, num_actors, gpus_per_actor)
    captioner = captioner or load_captioner()
    identity = _identity(input, captioner)
    final = folder = CaptionsFolder(output)
    with _told_as_ours():
        is_replaced = final.finish_replacement()
    # The same command that died while the new took the place of the old has nothing more to replace.
    is_replacing = overwrite and final.read_run() is not None and not (is_replaced and final.is_of(identity))
    if is_replacing:
        Lease.acquire(final.work)  # whoever writes there stops
        final.recover()
        folder = final.next()
        if not folder.is_of(identity):
            storage.remove(folder.location)
    else:
        final.claim(identity)
    started = _now()
    run = {
        **identity,
        "model": model_name,
        "versions": {name: version(name) for name in ("ray", "torch", "pyarrow")} | {"imcap_ray": __version__},
        "started": started,
    }
    before = folder.read_run()
    check = Lease.acquire(folder.work).require
    heartbeat = _Heartbeat(folder, started, check)

    def show(progress: Progress) -> None:
        heartbeat.num_images = progress.num_images
        reporter.report_images(progress.num_images, num_new)

    def report_waiting(line: str) -> None:
        if line:
            reporter.report(line)
        heartbeat.waiting = line
        heartbeat.beat()

    heartbeat.beat()  # before run.json, which a resumed run writes when its input is listed
    with _state_written(folder, run, check), repeating(heartbeat.beat, seconds=HEARTBEAT_SECONDS):
        num_again = _prepare(
            folder,
            run,
            build=partial(
                build_manifest,
                options=InputOptions(
                    recursive=recursive, limit=limit, allow_outside_paths=allow_outside_paths, columns=columns
                ),
                output=output,
                check=check,
            ),
            check=check,
            retry_failed=retry_failed,
            reporter=reporter,
        )
        total, done = folder.count_manifest(), len(folder.done_ids())
        num_new, progress = total - done, Progress()
        actors = min(actors, max(1, num_blocks(num_new)))
        if num_new:
            reporter.report(
                f"captioning {num_new:,} of {total:,} images with {actors} actor{'s' * (actors != 1)}"
                + (f", {done:,} are done" if done else "")
            )
        index = start_image_index(folder.location, total, num_done=done) if num_new else None
        is_settled = before is not None and before.get("state") == "complete" and not num_again
        caption_rest = partial(
            map_images,
            folder.manifest,
            folder.location,
            work=folder.work,
            root=input,
            schema=CAPTIONS_SCHEMA.with_metadata(
                {
                    "imcap_ray.schema_version": SCHEMA_VERSION,
                    "imcap_ray.model_fingerprint": captioner.fingerprint,
                    "imcap_ray.models.beam_search": json.dumps(to_mapping(captioner.search)),
                }
            ),
            actor_class=CaptionImages,
            actor_arguments={"load_captioner": load_captioner, "gpus": gpus},
            image_size=captioner.image_size,
            gpus_per_actor=gpus,
            batch_size=batch_size or compute_batch_size(on_gpu=gpus > 0),
            on_progress=show,
            can_release=resources.max_cpus <= resources.cpus,
            check=check,
            on_waiting=report_waiting,
        )
        can_grow = num_actors is None and not resources.is_local
        while done < total or not is_settled:
            if done < total:
                try:
                    progress = caption_rest(num_images=total - done, num_actors=actors, can_grow=can_grow, index=index)
                except StalledError as error:
                    check()
                    folder.recover()
                    end_image_index(index)
                    index = None
                    done = len(folder.done_ids())
                    if isinstance(error, FullClusterError):
                        # The CPUs are other jobs', or those that are left when nodes are gone and their actors moved.
                        report_waiting(f"{error}; released {actors} actor{'s' * (actors != 1)}")
                        wait_for_room(
                            cpus=1 + ROOM_FOR_TASKS + (done > 0),  # Ray Data leaves out what is done in an actor
                            gpus=gpus,
                            check=check,
                            on_waiting=report_waiting,
                        )
                        report_waiting("")
                        actors, can_grow = max(1, actors // 2), False
                    left = default_num_actors(connect(), gpus)
                    if left >= actors and not isinstance(error, FullClusterError):
                        raise
                    actors = min(actors, left)
                    reporter.report(f"continuing with {actors} actor{'s' * (actors != 1)}")
                    index = start_image_index(folder.location, total, num_done=done)
                    continue
            check()
            folder.recover()  # of processes that this run has lost sight of
            # What was taken for a duplicate and has no twin is not done after all. It is not asked for again: the
            # index would answer the same.
            is_settled = folder.resolve_duplicates() == 0
            end_image_index(index)
            index = None
            done, done_before = len(folder.done_ids()), done
            if is_settled and done_before == done < total:
                raise ImcapError(
                    f"{total - done:,} of {total:,} images were not captioned, for their numbers in {folder.manifest} "
                    "are damaged: give --overwrite to start anew"
                )
        check()
        folder.verify_row_counts()
        counts, error_counts = folder.count_rows()
        seconds = time.time() - start
        summary = CaptioningSummary(
            input=input,
            output=output,
            num_images=total,
            num_new=num_new,
            counts=counts,
            error_counts=error_counts,
            seconds=seconds,
            # That of the last run that had something to do, for the next one's plan.
            images_per_second=num_new / seconds if num_new else (before or {}).get("images_per_second", 0.0),
            bound=describe_bound(progress, resources, num_actors=actors, gpus_per_actor=gpus),
        )
        folder.write_run(run | asdict(summary) | {"state": "complete", "ended": _now()})
    if is_replacing:
        with _told_as_ours():
            final.replace_by_next()
    num_failed = counts.get(FAILED, 0)
    if num_failed > max_failure_rate * total:
        raise FailureBudgetError(
            f"{num_failed:,} of {total:,} images failed, more than --max-failure-rate {max_failure_rate:g} allows: "
            + ", ".join(f"{count:,} {code}" for code, count in error_counts.items())
        )
    return summary


@contextmanager
def _told_as_ours() -> Iterator[None]:
    """An error of a disk, a store or a file there becomes one that says how to go on."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        reason = storage.hide_secrets(without_ray_advice(str(error)))
        raise ImcapError(f"stopped by an error: {reason}; {RESUME_HINT}") from error


@contextmanager
def _state_written(folder: CaptionsFolder, run: dict[str, Any], check: Callable[[], None]) -> Iterator[None]:
    """Write into run.json how the block ended, unless it ended well or the folder is another run's by now."""

    def write(state: str) -> None:
        # The disk may be full, or the store unreachable: that is the error to report.
        with contextlib.suppress(OSError, ImcapError):
            check()
            folder.write_run(run | {"state": state, "ended": _now()})

    try:
        with _told_as_ours(), when_lost(lambda: write("failed")):
            yield
    except InputError:
        raise
    except BaseException as error:
        write("failed" if isinstance(error, ImcapError) else "interrupted")
        raise


class _Heartbeat:
    """Says from time to time, in a file, that the run lives and how fast it is: whoever looks needs no Ray."""

    def __init__(self, folder: CaptionsFolder, started: str, check: Callable[[], None]) -> None:
        self.num_images = 0
        """Images that the actors are done with."""
        self.waiting = ""
        """What the run waits for; "" while it does not wait."""
        self._folder = folder
        self._started = started
        self._check = check
        self._beats: deque[tuple[float, int]] = deque(maxlen=1 + RATE_SECONDS // HEARTBEAT_SECONDS)
        self._last_image = (0, "")

    def beat(self) -> None:
        """Write the file. What goes wrong with that is no reason to stop."""
        if not self.num_images:  # while the actors load, there is no speed
            self._beats.clear()
        self._beats.append((time.monotonic(), self.num_images))
        (start, before), (now, after) = self._beats[0], self._beats[-1]
        rate = max(0, after - before) / (now - start) if now > start else None
        if self.num_images != self._last_image[0]:
            self._last_image = (self.num_images, _now())
        beat = {
            "time": _now(),
            "started": self._started,
            "images_per_second": None if self.waiting else rate,
            "last_image": self._last_image[1],
            "waiting": self.waiting,
        }
        with contextlib.suppress(OSError, ImcapError):
            self._check()
            self._folder.write_heartbeat(beat)


def _prepare(
    folder: CaptionsFolder,
    run: dict[str, Any],
    *,
    build: Callable[[str, str], InputSummary],
    check: Callable[[], None],
    retry_failed: bool,
    reporter: ProgressReporter,
) -> int:
    """Bring the folder and its manifest up to date; how many images or parts that were done need work again.

    Args:
        check: raises if this run may not write any more: listing may take hours.
    """
    is_fresh = folder.read_run() is None
    num_copied = 0
    if is_fresh:
        folder.write_run(run | {"state": "running"})  # whose it is, before anything else lies there
    elif num_copied := folder.recover():
        parts = f"{num_copied:,} part{'s' * (num_copied != 1)}"
        reporter.report(f"{folder.location}: removed {parts} that repeated images of other parts")
    try:
        found = build(run["input"], folder.manifest)
    except (InputError, InputChangedError):
        check()
        if is_fresh:
            folder.discard()
        raise
    check()
    if found.num_ignored:
        files = "file is no image by its name" if found.num_ignored == 1 else "files are no images by their names"
        reporter.report(f"{run['input']}: {found.num_ignored:,} {files}: ignored")
    for note in found.notes:
        reporter.report(note)
    if found.image_column:
        run |= {"image_column": found.image_column, "id_column": found.id_column}
    folder.write_run(run | {"state": "running"})
    num_changed = folder.delete_changed_rows(found.changed)
    num_failed = folder.delete_failed_rows() if retry_failed else 0
    for number, what in ((num_changed, "changed since"), (num_failed, "failed before")):
        if number:
            reporter.report(f"{number:,} image{'s' * (number != 1)} {what}: to be captioned again")
    return num_changed + num_failed + num_copied


def describe_bound(progress: Progress, resources: ClusterResources, *, num_actors: int, gpus_per_actor: float) -> str:
    """One sentence: what limited the speed, from what the actors waited, and what would help."""
    total = progress.busy_seconds + progress.waiting_seconds
    if not total or not progress.num_images:
        return "too short to tell what bounds it"
    waited = progress.waiting_seconds / total
    most_actors = min(default_num_actors(resources, gpus_per_actor), num_blocks(progress.num_images))
    if waited > 0.25:
        bound = f"decode-bound: the model waited {waited:.0%} of the time; more CPUs would help"
        if not gpus_per_actor and num_actors > 1:
            bound += f", or on these --num-actors {num_actors - 1}"
    else:
        bound = f"model-bound: the model was busy {1 - waited:.0%} of the time; "
        if num_actors < most_actors:
            bound += f"--num-actors {most_actors} would help"
        elif gpus_per_actor:
            bound += f"more GPUs would help, or more actors on each: --gpus-per-worker {gpus_per_actor / 2:g}"
        else:
            bound += "more CPUs would help, or GPUs: --gpus-per-worker 1"
    full = compute_batch_size(on_gpu=gpus_per_actor > 0)
    if 0 < progress.batch_size < full:
        remedy = f"--num-actors {num_actors - 1}" if num_actors > 1 else "more of it"
        bound += (
            f"; memory ran out: {progress.batch_size} images were computed at a time instead of {full}, "
            f"{remedy} would help"
        )
    return bound


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
