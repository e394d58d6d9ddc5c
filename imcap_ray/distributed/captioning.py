"""Images -> captions, by Ray Data. One row for every image, whatever happens to it or to a process."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from imcap_ray import __version__, storage
from imcap_ray.captioner import COMPUTE_BATCH_SIZE, Caption
from imcap_ray.config import SearchConfig, to_mapping
from imcap_ray.distributed.cluster import ClusterResources, require
from imcap_ray.distributed.images import (
    BatchReporter,
    Progress,
    default_num_actors,
    map_images,
    num_blocks,
    stack_pixels,
)
from imcap_ray.errors import FailureBudgetError, ImcapError, OutputError
from imcap_ray.manifest import CAPTIONS_SCHEMA, FAILED, OK, SCHEMA_VERSION, build_manifest, count_rows

RUN_FILE: Final = "run.json"
WORK_FOLDER: Final = "_imcap"
BATCH_SIZE: Final = 2 * COMPUTE_BATCH_SIZE


class ImageCaptioner(Protocol):
    """All that an actor asks of a captioner."""

    @property
    def image_size(self) -> int:
        """Pixels on each side."""

    @property
    def fingerprint(self) -> str:
        """The same for the same answers."""

    @property
    def search(self) -> SearchConfig:
        """How captions are sought."""

    def caption_pixels(self, pixels: npt.NDArray[np.uint8]) -> list[list[Caption]]:
        """For uint8 pixels (B, 3, S, S) the captions of each image, the best first."""


class CaptionImages:
    """Loaded images -> their captions. One lives in each actor of the pool."""

    def __init__(self, *, load_captioner: Callable[[], ImageCaptioner], reporter: BatchReporter) -> None:
        self._captioner = load_captioner()
        self._reporter = reporter

    def __call__(self, rows: pa.Table) -> pa.Table:
        """A table of `LOADED_SCHEMA` -> `CAPTIONS_SCHEMA` with manifest_id."""
        with self._reporter.batch() as counts:
            captions = iter(self._captioner.caption_pixels(stack_pixels(rows, self._captioner.image_size)))
            done = []
            for row in rows.drop(["pixels"]).to_pylist():
                done.append(_failed_row(row) if row["error_code"] else _captioned_row(row, next(captions)))
                counts[done[-1]["status"]] = counts.get(done[-1]["status"], 0) + 1
            return pa.Table.from_pylist(done, schema=CAPTIONS_SCHEMA.insert(0, rows.schema.field("manifest_id")))


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


def _failed_row(row: dict[str, Any]) -> dict[str, Any]:
    return row | {
        "caption": "",
        "captions": [],
        "confidence": float("nan"),
        "logprob": float("nan"),
        "num_tokens": 0,
        "status": FAILED,
        "duplicate_of": "",
    }


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


def caption_images(
    input: str,
    output: str,
    *,
    load_captioner: Callable[[], ImageCaptioner],
    resources: ClusterResources,
    model_name: str = "",
    num_actors: int | None = None,
    gpus_per_actor: float | None = None,
    batch_size: int = BATCH_SIZE,
    recursive: bool = True,
    limit: int | None = None,
    max_failure_rate: float = 0.1,
    echo: Callable[[str], None] = print,
    on_progress: Callable[[Progress, int], None] = lambda progress, total: None,
) -> CaptioningSummary:
    """Caption every image of `input` and write one row for each to Parquet files in `output`.

    A call that finds an unfinished output of the same input, model and search settings goes on with it.

    Args:
        input: folder, image or Parquet; path or URI.
        output: folder; path or URI; on a cluster one that every node sees.
        load_captioner: makes the captioner that each actor keeps.
        num_actors: None: one per GPU, or one per core where there is none.
        on_progress: called about once a second with the progress and the number of images to do.

    Raises:
        InputError: something does not fit, found before work began.
        FailureBudgetError: all is written, and more images failed than `max_failure_rate` of them.
        ImcapError: the run failed; what is written stays and the same call goes on.
    """
    start = time.time()
    input, output = storage.absolute(input), storage.absolute(output)
    gpus = gpus_per_actor if gpus_per_actor is not None else (1.0 if resources.gpus else 0.0)
    actors = num_actors or default_num_actors(resources, gpus)
    # Beside the actors Ray Data needs a CPU to decode with, and on a resumed run one to leave out what is done.
    require(resources, cpus=actors + 2, gpus=actors * gpus, what=f"--num-actors {actors}")
    captioner = load_captioner()
    work = storage.join(output, WORK_FOLDER)
    identity = {
        "input": input,
        "model_fingerprint": captioner.fingerprint,
        "search": to_mapping(captioner.search),
        "schema_version": SCHEMA_VERSION,
    }
    _claim(output, work, identity)
    found = build_manifest(input, storage.join(work, "manifest"), recursive=recursive, limit=limit)
    if found.num_ignored:
        files = "file is no image by its name" if found.num_ignored == 1 else "files are no images by their names"
        echo(f"{input}: {found.num_ignored:,} {files}: ignored")
    total, done = _count_manifest(work), _count_done(work)
    run = {
        **identity,
        "model": model_name,
        "versions": {name: version(name) for name in ("ray", "torch", "pyarrow")} | {"imcap_ray": __version__},
        "started": _now(),
    }
    _write_run(work, run | {"state": "running"})
    progress = Progress()
    try:
        if done < total:
            actors = min(actors, num_blocks(total - done))
            echo(
                f"captioning {total - done:,} of {total:,} images with {actors} actor{'s' * (actors != 1)}"
                + (f", {done:,} are done" if done else "")
            )
            progress = map_images(
                storage.join(work, "manifest"),
                output,
                work=work,
                schema=CAPTIONS_SCHEMA.with_metadata(
                    {
                        "imcap_ray.schema_version": SCHEMA_VERSION,
                        "imcap_ray.model_fingerprint": captioner.fingerprint,
                        "imcap_ray.search": json.dumps(to_mapping(captioner.search)),
                    }
                ),
                actor_class=CaptionImages,
                actor_arguments={"load_captioner": load_captioner},
                image_size=captioner.image_size,
                num_images=total - done,
                num_actors=actors,
                gpus_per_actor=gpus,
                batch_size=batch_size,
                on_progress=lambda progress: on_progress(progress, total - done),
            )
    except BaseException as error:
        state = "failed" if isinstance(error, ImcapError) else "interrupted"
        _write_run(work, run | {"state": state, "ended": _now()})
        raise
    counts, error_counts = count_rows(output)
    _check_accounts(counts, work, total)
    seconds = time.time() - start
    summary = CaptioningSummary(
        input=input,
        output=output,
        num_images=total,
        num_new=total - done,
        counts=counts,
        error_counts=error_counts,
        seconds=seconds,
        images_per_second=(total - done) / seconds,
        bound=progress.describe_bound(),
    )
    _write_run(work, run | asdict(summary) | {"state": "complete", "ended": _now()})
    num_failed = counts.get(FAILED, 0)
    if num_failed > max_failure_rate * total:
        raise FailureBudgetError(
            f"{num_failed:,} of {total:,} images failed, more than --max-failure-rate {max_failure_rate:g} allows: "
            + ", ".join(f"{count:,} {code}" for code, count in error_counts.items())
        )
    return summary


def _claim(output: str, work: str, identity: Mapping[str, Any]) -> None:
    """Refuse an output that something else has made."""
    place = storage.join(work, RUN_FILE)
    if not storage.exists(place):
        if storage.is_file(output) or (storage.is_folder(output) and any(True for _ in storage.list_files(output))):
            raise OutputError(f"{output} exists and is no captions folder of imcap: choose another OUTPUT")
        return
    before = json.loads(storage.read_bytes(place))
    names = {
        "input": "input",
        "model_fingerprint": "model",
        "search": "search settings",
        "schema_version": "version of the schema",
    }
    for key, name in names.items():
        if before.get(key) != identity[key]:
            raise OutputError(
                f"{output} was made with another {name} ({_short(before.get(key))}, now {_short(identity[key])}): "
                "choose another OUTPUT, or remove it"
            )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    is_digest = len(text) == 64 and set(text) <= set("0123456789abcdef")
    return f"{text[:12]}..." if is_digest else text


def _write_run(work: str, run: Mapping[str, Any]) -> None:
    storage.write_bytes(storage.join(work, RUN_FILE), json.dumps(run, indent=2).encode())


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _count_manifest(work: str) -> int:
    return sum(_num_rows(path) for path, _ in storage.list_files(storage.join(work, "manifest")))


def _count_done(work: str) -> int:
    """Images that an earlier run has written, by the ids that Ray has noted."""
    return len(_done_ids(work))


def _done_ids(work: str) -> npt.NDArray[np.int64]:
    folder = storage.join(work, "done")
    if not storage.is_folder(folder):
        return np.empty(0, np.int64)
    filesystem = storage.resolve(folder)[0]
    parts = [
        pq.read_table(storage.resolve(path)[1], filesystem=filesystem)["manifest_id"].to_numpy()
        for path, name in storage.list_files(folder)
        if name.endswith(".parquet") and not name.endswith(".pending.parquet")
    ]
    return np.unique(np.concatenate(parts)) if parts else np.empty(0, np.int64)


def _num_rows(path: str) -> int:
    filesystem, inner = storage.resolve(path)
    return int(pq.read_metadata(inner, filesystem=filesystem).num_rows)


def _check_accounts(counts: Mapping[str, int], work: str, total: int) -> None:
    """Every image of the manifest is exactly one row, or the run has failed."""
    num_rows, num_done = sum(counts.values()), _count_done(work)
    if not num_rows == num_done == total:
        raise ImcapError(
            f"the accounts do not add up: {total:,} images in the manifest, {num_done:,} noted as done, "
            f"{num_rows:,} rows written"
        )
