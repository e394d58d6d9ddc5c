"""One captioning run as it is kept on disk: its lease, heartbeat, manifest, rows and their counts.

    with CaptioningRun.open(config, identity, reporter=reporter) as run:
        run.list_images()
        while run.num_pending:
            ...                       # caption them, by whatever means, into `run.folder`
            run.resolve_duplicates()
        summary = run.finish(bound)

Knows neither Ray nor torch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from imcap_ray import __version__, storage
from imcap_ray.config import FLOAT32, CaptioningConfig, PluginSearch, SearchConfig, to_mapping
from imcap_ray.data.columns import ColumnOptions
from imcap_ray.data.input_listing import describe_kinds
from imcap_ray.data.manifest import InputOptions, build_manifest
from imcap_ray.data.schemas import CAPTIONS_SCHEMAS, FAILED, SCHEMA_VERSION
from imcap_ray.errors import FailureBudgetError, ImcapError, InputChangedError, InputError
from imcap_ray.runs.captions_folder import NO_CAPTIONS, CaptionsFolder
from imcap_ray.runs.captions_table import COMPLETE
from imcap_ray.runs.existing_captions import ExistingCaptions
from imcap_ray.runs.heartbeat import HEARTBEAT_SECONDS, CaptioningHeartbeat, now, repeating
from imcap_ray.runs.lease import Lease
from imcap_ray.runs.progress_reporter import ProgressReporter
from imcap_ray.runs.rate import MIN_IMAGES

RUNNING: Final = "running"


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptioningSummary:
    """The result of a captioning run."""

    input: str
    output: str
    num_images: int
    """Rows in the output, of this run and earlier ones."""
    num_new: int
    """Rows that this run wrote."""
    counts: dict[str, int]
    """Rows by status."""
    error_counts: dict[str, int]
    """Failed rows by error code."""
    seconds: float
    images_per_second: float | None
    """Speed without the start of Ray and the loading of models; None if this run was too short to measure it."""
    bound: str
    """One sentence: what limited the speed."""
    num_not_in_input: int = 0
    """Rows of images that the input no longer has."""
    ignored: Mapping[str, int] = field(default_factory=dict)
    """Number of files of the input that are not images, by extension (".txt")."""
    num_existing: int = 0
    """Rows whose caption existed before, see `CaptioningConfig.existing`."""
    num_unfamiliar: int | None = None
    """Captioned images that are unlike what the model has learned from; None if the model cannot tell."""

    def require_few_failures(self, max_failure_rate: float) -> None:
        """Raise FailureBudgetError if a greater share of the images failed."""
        num_failed = self.counts.get(FAILED, 0)
        if num_failed > max_failure_rate * self.num_images:
            raise FailureBudgetError(
                f"{num_failed:,} of {self.num_images:,} images failed, more than --max-failure-rate "
                f"{max_failure_rate:g} allows: "
                + ", ".join(f"{count:,} {code}" for code, count in self.error_counts.items())
            )


def run_identity(
    input: str,
    *,
    fingerprint: str,
    search: SearchConfig | PluginSearch,
    precision: str = FLOAT32,
    existing: ExistingCaptions | None = None,
) -> dict[str, Any]:
    """What must not change between a run and its resumption, as run.json records it."""
    return {
        "input": input,
        "precision": precision,
        "model_fingerprint": fingerprint,
        "search": to_mapping(search),
        "existing_captions": existing.fingerprint if existing else NO_CAPTIONS,
        "schema_version": SCHEMA_VERSION,
    }


def describe_removed(num_images: int, config: CaptioningConfig) -> str:
    """One line on images that the input no longer has."""
    images = "1 image is" if num_images == 1 else f"{num_images:,} images are"
    rows = (
        "their rows are removed" if config.prune else "the rows are kept and left out of exports; --prune removes them"
    )
    return f"{images} no longer in {config.input}: {rows}"


def describe_ignored(input: str, ignored: Mapping[str, int]) -> str:
    """One line on files of the input that are not images."""
    count = sum(ignored.values())
    files = "1 file that is not an image" if count == 1 else f"{count:,} files that are not images"
    return f"{input}: ignored {files} ({describe_kinds(ignored)})"


def input_options(config: CaptioningConfig) -> InputOptions:
    """Which images of its input a config selects."""
    return InputOptions(
        recursive=config.recursive,
        limit=config.limit,
        allow_outside_paths=config.allow_outside_paths,
        columns=ColumnOptions(image=config.image_column, id=config.id_column),
    )


class CaptioningRun:
    """A run that holds the lease on its output. Opened by `CaptioningRun.open`."""

    def __init__(
        self,
        config: CaptioningConfig,
        folder: CaptionsFolder,
        identity: Mapping[str, Any],
        *,
        start: float,
        reporter: ProgressReporter,
    ) -> None:
        self.config = config
        self.folder = folder
        self.lease = Lease.acquire(folder.work)
        self.num_images = 0
        """Images of the input, known once they are listed."""
        self.num_done = 0
        """Images that have a row."""
        self.num_new = 0
        """Images that had no row when they were listed."""
        self._num_to_caption = 0
        self.num_not_in_input = 0
        """Images with a row that the input no longer has, as far as this run knows."""
        self._ignored: Mapping[str, int] = {}
        self._reporter = reporter
        self._start = start
        self._before = folder.read_run()
        self.schema_version = str((self._before or identity)["schema_version"])
        self.schema: pa.Schema = CAPTIONS_SCHEMAS[self.schema_version].with_metadata(
            {
                "imcap_ray.schema_version": self.schema_version,
                "imcap_ray.model_fingerprint": identity["model_fingerprint"],
                "imcap_ray.models.beam_search": json.dumps(identity["search"]),
            }
        )
        """Columns of the parts."""
        self._record: dict[str, Any] = {
            **identity,
            "schema_version": self.schema_version,
            "model": config.model_name,
            "model_options": dict(config.model_options),
            "versions": {name: version(name) for name in ("ray", "torch", "pyarrow")} | {"imcap_ray": __version__},
            "started": now(),
        }
        self._heartbeat = CaptioningHeartbeat(started=self._record["started"])

    @classmethod
    @contextmanager
    def open(
        cls, config: CaptioningConfig, identity: Mapping[str, Any], *, reporter: ProgressReporter
    ) -> Iterator[CaptioningRun]:
        """A run into the output of the config, which has absolute paths. The block's end is recorded in run.json.

        With `overwrite`, the new rows are made in a folder of their own and replace the old ones at the end.

        Raises:
            OutputError: the output was made with other settings, or by something else.
        """
        start = time.time()
        output = CaptionsFolder(config.output)
        was_replacing = output.finish_replacement()
        # If the same command died while it replaced the old rows, nothing is left to replace.
        is_replacing = (
            config.overwrite and output.read_run() is not None and not (was_replacing and output.is_of(identity))
        )
        folder = output
        if is_replacing:
            Lease.acquire(output.work)  # a run that writes there stops
            output.recover()
            folder = output.next()
            if not folder.is_of(identity):
                storage.remove(folder.location)
        else:
            output.require_identity(identity)
        run = cls(config, folder, identity, start=start, reporter=reporter)
        run._beat()  # before run.json, which a resumed run writes only when its input is listed
        with run._recorded_end(), repeating(run._beat, seconds=HEARTBEAT_SECONDS):
            yield run
        if is_replacing:
            output.replace_by_next()

    @property
    def num_pending(self) -> int:
        """Images that have no row yet."""
        return self.num_images - self.num_done

    # --- the steps of a run ---

    def list_images(self, existing: ExistingCaptions | None = None) -> None:
        """Bring the folder and its manifest up to date with the input.

        Args:
            existing: captions of images that are not to be captioned; their rows are written here.

        Raises:
            InputError: the input has no images, or others than this output may have; a new folder is removed again.
        """
        num_deleted = self._delete_copies() if self._before is not None else 0
        if self._before is None:
            self._write_state(RUNNING)  # whose folder it is, before anything else is in it
        num_deleted += self._list_input()
        self.num_images = self.folder.count_manifest()
        num_added = self._add_existing(existing) if existing else 0
        self._count_done()
        was_complete = self._before is not None and self._before.get("state") == COMPLETE
        if not self.num_pending and (num_deleted or not was_complete):
            self.resolve_duplicates()
        self._num_to_caption = self.num_pending
        self.num_new = self.num_pending + num_added

    def _delete_copies(self) -> int:
        num_copies = self.folder.recover()
        if num_copies:
            parts = f"{num_copies:,} part{'s' * (num_copies != 1)}"
            self._reporter.report(f"{self.folder.location}: removed {parts} that repeated images of other parts")
        return num_copies

    def _list_input(self) -> int:
        """Update the manifest; how many rows were deleted because their images are to be captioned again."""
        try:
            summary = build_manifest(
                self.config.input,
                self.folder.manifest,
                input_options(self.config),
                output=self.config.output,
                check=self.lease.require,  # listing may take hours
            )
        except (InputError, InputChangedError):
            self.lease.require()
            if self._before is None:
                self.folder.discard()
            raise
        self.lease.require()
        if summary.num_ignored:
            self._reporter.report(describe_ignored(self.config.input, summary.ignored))
        self._ignored = summary.ignored
        for note in summary.notes:
            self._reporter.report(note)
        if summary.image_column:
            self._record |= {"image_column": summary.image_column, "id_column": summary.id_column}
        self._write_state(RUNNING)
        num_changed = self.folder.delete_changed_rows(summary.changed)
        num_failed = self.folder.delete_failed_rows() if self.config.retry_failed else 0
        for number, reason in ((num_changed, "changed since"), (num_failed, "failed before")):
            if number:
                self._reporter.report(f"{number:,} image{'s' * (number != 1)} {reason}: to be captioned again")
        return num_changed + num_failed + self._prune(summary.removed)

    def _add_existing(self, existing: ExistingCaptions) -> int:
        """Write the rows of images whose captions exist; how many."""
        num_added = 0
        with self.folder.database() as database:
            try:
                count = existing.match(database)
            except InputError:
                if self._before is None:
                    self.folder.discard()
                raise
            self._reporter.report(existing.describe(database, count))
            for rows in existing.rows(database, self.schema):
                self.lease.require()
                self.folder.add_part(rows)
                num_added += rows.num_rows
        return num_added

    def _prune(self, removed: npt.NDArray[np.int64] | None) -> int:
        """Report images that the input no longer has, and record or remove them; how many were removed."""
        if removed is None:  # a limit leaves images out
            return 0
        if removed.size:
            self._reporter.report(describe_removed(removed.size, self.config))
        if removed.size and self.config.prune:
            self.folder.prune(removed)
            return removed.size
        self.folder.record_removed(removed)
        self.num_not_in_input = removed.size
        return 0

    def recover(self) -> None:
        """Finish or undo what processes left behind that this run has lost sight of."""
        self.lease.require()
        self.folder.recover()
        self._count_done()

    def resolve_duplicates(self) -> None:
        """Give images of the same bytes the same caption; those without a captioned twin are pending again.

        Raises:
            ImcapError: images are pending and no work on them can help, because the manifest is corrupt.
        """
        num_done = self.num_done
        self.lease.require()
        self.folder.recover()
        num_orphans = self.folder.resolve_duplicates()
        self._count_done()
        if self.num_pending and not num_orphans and self.num_done == num_done:
            raise ImcapError(
                f"{self.num_pending:,} of {self.num_images:,} images were not captioned, because their numbers in "
                f"{self.folder.manifest} are corrupt: give --overwrite to start again"
            )

    def finish(self, bound: str) -> CaptioningSummary:
        """Verify that every image is exactly one row, and record the run as complete.

        Args:
            bound: one sentence: what limited the speed.

        Raises:
            ImcapError: the rows do not match the images.
        """
        self.lease.require()
        self.folder.verify_row_counts()
        counts, error_counts = self.folder.count_rows()
        num_unfamiliar = self.folder.count_unfamiliar()
        seconds = time.time() - self._start
        speed = self._reporter.mean_rate() if self._num_to_caption >= MIN_IMAGES else None
        last_speed = (self._before or {}).get("images_per_second")
        summary = CaptioningSummary(
            input=self.config.input,
            output=self.config.output,
            num_images=self.num_images,
            num_new=self.num_new,
            counts=counts,
            error_counts=error_counts,
            seconds=seconds,
            images_per_second=speed,
            bound=bound,
            num_not_in_input=self.num_not_in_input,
            ignored=self._ignored,
            num_existing=self.folder.count_existing() if self._record["existing_captions"] != NO_CAPTIONS else 0,
            num_unfamiliar=num_unfamiliar,
        )
        # If this run was too short to measure its speed, that of an earlier run is kept for the next plan.
        known_speed = {"images_per_second": last_speed if speed is None else speed}
        self.folder.write_run(self._record | asdict(summary) | known_speed | {"state": COMPLETE, "ended": now()})
        return summary

    # --- what others see of the run ---

    def report_progress(self, num_images: int) -> float | None:
        """Report images that were captioned since the last step; returns how many are captioned in a second."""
        self._reporter.report_images(num_images, self.num_pending)
        self._heartbeat.num_images = num_images
        return self._reporter.rate()

    def report_waiting(self, reason: str) -> None:
        """Report that the run waits, or that it continues if the reason is ""."""
        if reason:
            self._reporter.report(reason)
        self._heartbeat.waiting = reason
        self._beat()

    def record_failure(self) -> None:
        """Record in run.json that the run failed, if it still may."""
        self._record_end("failed")

    def _beat(self) -> None:
        with suppress(OSError, ImcapError):  # a heartbeat that cannot be written is no reason to stop
            self.lease.require()
            self.folder.write_heartbeat(self._heartbeat.content(self._reporter.rate()))

    @contextmanager
    def _recorded_end(self) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except BaseException as error:
            is_failure = isinstance(error, ImcapError | OSError | pa.ArrowException)
            self._record_end("failed" if is_failure else "interrupted")
            raise

    def _record_end(self, state: str) -> None:
        # The disk may be full or the store unreachable: then that is the error to report.
        with suppress(OSError, ImcapError):
            self.lease.require()
            self.folder.write_run(self._record | {"state": state, "ended": now()})

    def _write_state(self, state: str) -> None:
        self.folder.write_run(self._record | {"state": state})

    def _count_done(self) -> None:
        self.num_done = len(self.folder.done_ids())
