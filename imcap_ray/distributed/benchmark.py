"""Measures how many images per second this machine captions, and how many its cores or its GPU could caption at best.

torch is imported inside functions, because a run that is measured imports this module first and would wait for it.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
from ast import literal_eval
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import linear_regression
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import pyarrow.dataset as pads
import ray

from imcap_ray.config import CaptioningConfig, ResourcesConfig
from imcap_ray.data.image_decoding import decode_image
from imcap_ray.data.image_reading import read_rows
from imcap_ray.data.manifest import build_manifest, read_image_columns
from imcap_ray.distributed import ray_internals
from imcap_ray.distributed.captioning import caption_images, connect_and_load
from imcap_ray.distributed.cluster.connection import connect, runtime_environment
from imcap_ray.distributed.cluster.machine import available_cores
from imcap_ray.distributed.cluster.ray_environment import ray_variables
from imcap_ray.errors import ImageError, ImcapError, InputError
from imcap_ray.models.caption import ImageCaptioner, compute_batch_size
from imcap_ray.models.captioner_spec import CaptionerSpec
from imcap_ray.runs.heartbeat import repeating
from imcap_ray.runs.progress_reporter import ProgressReporter

BUNDLED: Final = CaptionerSpec()

IMAGES_PER_ROUND: Final = 64
"""Images that each core decodes in a round."""

BATCH_MULTIPLES: Final = (1, 2, 4)
"""Batch sizes with which the model alone is measured, as multiples of the batch size of a run."""

STEADY_SHARES: Final = (0.15, 0.95)
"""Between these shares of a run's images, all actors are busy."""


@dataclass(frozen=True, slots=True)
class Rate:
    """Images per second, measured several times."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median."""
        return float(np.median(self.values))

    @property
    def spread(self) -> str:
        """The lowest and the highest value, for people."""
        return f"{min(self.values):,.1f} to {max(self.values):,.1f}"

    def to_dict(self) -> dict[str, float]:
        """The values for JSON."""
        return {
            "median": round(self.median, 2),
            "lowest": round(min(self.values), 2),
            "highest": round(max(self.values), 2),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """The speed of decoding and of the model, each measured alone."""

    decode: Rate
    """Decoding of files that are in memory, on all cores."""
    model: Rate
    """Captioning of pixels that are in memory, on all cores or on the GPUs, with the best batch size."""
    model_batch_size: int
    on_gpu: bool

    @property
    def images_per_second(self) -> float:
        """The slower one if each has its own processors, otherwise both one after the other on the same cores."""
        if self.on_gpu:
            return min(self.decode.median, self.model.median)
        return 1 / (1 / self.decode.median + 1 / self.model.median)

    def to_dict(self) -> dict[str, Any]:
        """The values for JSON."""
        return {
            "decode": self.decode.to_dict(),
            "model": self.model.to_dict(),
            "model_batch_size": self.model_batch_size,
            "images_per_second": round(self.images_per_second, 2),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpeed:
    """The speed of a captioning run in its own process."""

    num_images: int
    seconds: float
    """From the start of the process to the last row."""
    first_seconds: float
    """From the start of the process until there were captions."""
    steady: float | None
    """Images per second while all actors were busy; None if that time was too short."""
    cpu_seconds: dict[str, float]
    """By kind of process; empty if there is no /proc."""
    peak_bytes: dict[str, int]
    """Resident memory of the largest process of each kind; empty if there is no /proc."""
    spilled_bytes: int | None
    """Bytes that Ray's object store wrote to disk because memory ran out."""
    bound: str
    """A sentence about what limited the speed."""

    @property
    def images_per_second(self) -> float:
        """Speed of the complete run, with its start."""
        return self.num_images / self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A run compared with the limit of the machine."""

    limit: Limit
    run: RunSpeed

    @property
    def share_of_limit(self) -> float | None:
        """The run's steady speed divided by the limit; None if the run was too short."""
        return None if self.run.steady is None else self.run.steady / self.limit.images_per_second

    def to_dict(self) -> dict[str, Any]:
        """The values for JSON."""
        run = {name: round(value, 2) if isinstance(value, float) else value for name, value in asdict(self.run).items()}
        run["images_per_second"] = round(self.run.images_per_second, 2)
        share = None if self.share_of_limit is None else round(self.share_of_limit, 3)
        return {"limit": self.limit.to_dict(), "run": run, "share_of_limit": share}

    def lines(self) -> list[str]:
        """A table, and a sentence about the bottleneck."""
        limit, run = self.limit, self.run
        where = "GPU" if limit.on_gpu else "all cores"

        def line(name: str, rate: float | None, remark: str) -> str:
            return f"{name:24}{'-' if rate is None else format(rate, ',.1f'):>10}  {remark}"

        share = "too short to measure" if self.share_of_limit is None else f"{self.share_of_limit:.2f} of the limit"

        return [
            f"{'':24}{'images/s':>10}",
            line("decoding alone", limit.decode.median, f"{limit.decode.spread}, all cores"),
            line(
                "the model alone",
                limit.model.median,
                f"{limit.model.spread}, {where}, {limit.model_batch_size} images at a time",
            ),
            line("limit", limit.images_per_second, "the slower one" if limit.on_gpu else "both on the same cores"),
            line("imcap caption, steady", run.steady, share),
            line(
                "imcap caption, total",
                run.images_per_second,
                f"{run.num_images:,} images in {run.seconds:.0f} s, the first captions after {run.first_seconds:.0f} s",
            ),
            run.bound,
        ]


def compare_with_limit(
    input: str,
    output: str,
    *,
    spec: CaptionerSpec = BUNDLED,
    num_actors: int | None = None,
    batch_size: int | None = None,
) -> Comparison:
    """Measure the limit on images of `input`, then caption all of them into `output`.

    Raises:
        InputError: there is no image in `input`.
        ImcapError: what the run ended with.
    """
    limit = measure_limit(some_files(input, IMAGES_PER_ROUND), spec)
    run = measure_run(input, output, spec=spec, num_actors=num_actors, batch_size=batch_size)
    return Comparison(limit=limit, run=run)


def some_files(input: str, count: int) -> list[bytes]:
    """The bytes of up to this many images of a folder or a table, at regular distances and without unreadable ones.

    Raises:
        InputError: none of them can be read.
    """
    with TemporaryDirectory() as manifest:
        build_manifest(input, manifest)
        image_columns = read_image_columns(manifest)
        images = pads.dataset(manifest, format="parquet")
        total = images.count_rows()
        rows = images.take([number * total // min(count, total) for number in range(min(count, total))]).to_pylist()
    files = [
        data
        for _, data in read_rows(rows, input, image_columns=image_columns)
        if isinstance(data, bytes) and _is_readable(data)
    ]
    if not files:
        raise InputError(f"{input}: none of {len(rows)} of its {total} images can be read")
    return files


def _is_readable(data: bytes) -> bool:
    try:
        decode_image(data, image_size=32)
    except ImageError:
        return False
    return True


def describe_machine() -> dict[str, Any]:
    """The processors and versions that a measurement depends on."""
    import torch

    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    versions = {name: version(name) for name in ("torch", "ray", "pyarrow", "pillow")}
    return {
        "cpu": torch.cpu.get_capabilities().get("cpu_name", platform.machine()),
        "cores": available_cores(),
        "gpu": ", ".join(gpus) or "none",
        "python": platform.python_version(),
        **versions,
    }


def measure_limit(images: Sequence[bytes], spec: CaptionerSpec = BUNDLED, *, rounds: int = 3) -> Limit:
    """Measure how fast files are decoded, and pixels are captioned, if all cores or GPUs do nothing else.

    Args:
        images: some of the files; they are used repeatedly.
        spec: the captioner.

    Raises:
        InputError: it cannot be loaded.
    """
    needs = spec().needs  # errors are raised here and not in Ray's processes
    resources = connect("local")
    gpus = int(resources.gpus) if needs.gpus != 0 else 0
    files = ray.put([images[number % len(images)] for number in range(IMAGES_PER_ROUND)])
    decoder = _Alone.options(runtime_env=runtime_environment(gpus=0))  # type: ignore[attr-defined]
    workers = [decoder.remote(files, spec, on_gpu=False) for _ in range(resources.physical_cores)]
    decode = _measure(workers, rounds, lambda worker: worker.decode.remote())
    if gpus:
        for worker in workers:  # to free the CPUs for the next workers
            ray.kill(worker)
        variables = runtime_environment(gpus=1)
        captioner = _Alone.options(num_gpus=1, runtime_env=variables)  # type: ignore[attr-defined]
        workers = [captioner.remote(files, spec, on_gpu=True) for _ in range(gpus)]
    sizes = [times * (needs.batch_size or compute_batch_size(on_gpu=gpus > 0)) for times in BATCH_MULTIPLES]
    rates = {size: _measure(workers, rounds, partial(_start_captioning, size)) for size in sizes}
    best = max(rates, key=lambda size: rates[size].median)
    ray.shutdown()
    return Limit(decode=decode, model=rates[best], model_batch_size=best, on_gpu=gpus > 0)


def _start_captioning(batch_size: int, worker: Any) -> Any:
    return worker.caption.remote(batch_size)


def _measure(workers: list[Any], rounds: int, start: Callable[[Any], Any]) -> Rate:
    rates = []
    for _ in range(rounds + 1):
        counts, seconds = zip(*ray.get([start(worker) for worker in workers]), strict=True)
        rates.append(sum(counts) / max(seconds))
    return Rate(tuple(rates[1:]))  # the first round warms up


@ray.remote(num_cpus=1)
class _Alone:
    """One core, or one GPU, that does one thing only. Its methods return the number of images and the seconds."""

    def __init__(self, images: list[bytes], spec: CaptionerSpec, *, on_gpu: bool) -> None:
        self._images = images
        self._captioner = spec()
        self._captioner.start(gpus=float(on_gpu))
        self._on_gpu = on_gpu
        self._pixels = np.stack([self._decode(image) for image in images])

    def _decode(self, image: bytes) -> Any:
        return self._captioner.preparation(image).pixels

    def decode(self) -> tuple[int, float]:
        start = time.perf_counter()
        for image in self._images:
            self._decode(image)
        return len(self._images), time.perf_counter() - start

    def caption(self, batch_size: int) -> tuple[int, float]:
        # A single batch takes a GPU too little time to measure.
        num_images = 4 * batch_size if self._on_gpu else batch_size
        pixels = np.concatenate([self._pixels] * -(-num_images // len(self._pixels)))
        start = time.perf_counter()
        for first in range(0, len(pixels), batch_size):
            self._caption(pixels[first : first + batch_size])
        return len(pixels), time.perf_counter() - start

    def _caption(self, pixels: Any) -> None:
        from imcap_ray.models.torch_captioner import TorchCaptioner, search_captions

        captioner = self._captioner
        if not isinstance(captioner, TorchCaptioner):
            captioner.caption_pixels(pixels)
            return
        import torch

        with torch.inference_mode():  # all at once, whatever its own batch size
            features = captioner.encoder(torch.from_numpy(pixels).to(captioner.device))
            search_captions(captioner.decoder, captioner.vocabulary, features, captioner.search)


def measure_run(
    input: str,
    output: str,
    *,
    spec: CaptionerSpec = BUNDLED,
    num_actors: int | None = None,
    batch_size: int | None = None,
) -> RunSpeed:
    """Caption `input` into `output` in a new process with its own Ray, and measure it.

    Raises:
        ImcapError: the error of the run.
    """
    receiver, sender = multiprocessing.Pipe(duplex=False)
    arguments = repr((input, output, asdict(spec), time.time(), num_actors, batch_size))
    # Start as the command does. Multiprocessing would also import the caller's main module, and with it torch.
    program = f"from {__name__} import _send_run; _send_run()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(sender.fileno()), arguments],
        pass_fds=[sender.fileno()],
        env={**os.environ, **ray_variables("local", verbose=False)},
    )
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        raise ImcapError("the captioning run died before it was measured") from None
    except BaseException:  # Ctrl-C does not reach the run, which has its own session
        process.terminate()
        raise
    finally:
        process.wait()
    if isinstance(result, ImcapError):
        raise result
    assert isinstance(result, RunSpeed)
    return result


def _send_run() -> None:
    sender = Connection(int(sys.argv[1]), readable=False)
    input, output, spec, *others = literal_eval(sys.argv[2])
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # so that every `finally` block runs
    try:
        sender.send(watch_run(input, output, CaptionerSpec(**spec), *others))
    except ImcapError as error:
        sender.send(error)


def watch_run(
    input: str,
    output: str,
    load: Callable[[], ImageCaptioner],
    start: float,
    num_actors: int | None = None,
    batch_size: int | None = None,
) -> RunSpeed:
    """Caption `input` into `output` with a Ray of this process, and measure it. Call this only once in a process.

    Args:
        load: loads the captioner.
        start: when the process was started (Unix time).
    """
    if os.getsid(0) != os.getpid():
        os.setsid()  # all processes that this run starts inherit the session
    reporter = _TimelineReporter(start)
    resources = ResourcesConfig(address="local", num_actors=num_actors, batch_size=batch_size)
    watch = _ProcessWatch()
    try:
        cluster, captioner = connect_and_load(load, resources)
        with repeating(watch.update, seconds=1.0):
            summary = caption_images(
                CaptioningConfig(input=input, output=output, max_failure_rate=1.0),
                resources,
                cluster=cluster,
                load_captioner=load,
                captioner=captioner,
                reporter=reporter,
            )
            seconds = time.time() - start
        spilled_bytes = ray_internals.spilled_bytes()
    finally:
        ray.shutdown()
    return RunSpeed(
        num_images=summary.num_new,
        seconds=seconds,
        first_seconds=reporter.timeline[0][0] if reporter.timeline else seconds,
        steady=steady_rate(reporter.timeline),
        cpu_seconds=watch.cpu_seconds,
        peak_bytes=watch.peak_bytes,
        spilled_bytes=spilled_bytes,
        bound=summary.bound,
    )


class _TimelineReporter(ProgressReporter):
    """Prints nothing, and records the number of images over time."""

    def __init__(self, start: float) -> None:
        super().__init__(None)
        self._start = start
        self.timeline: list[tuple[float, int]] = []

    def report_images(self, done: int, total: int, task: str = "") -> None:
        """Record the number of images and the time."""
        if done:
            self.timeline.append((time.time() - self._start, done))


def steady_rate(timeline: Sequence[tuple[float, int]]) -> float | None:
    """Images per second in the middle of a run: the slope of a line through (seconds, images so far).

    None if there are fewer than three distinct counts within `STEADY_SHARES`.
    """
    total = timeline[-1][1] if timeline else 0
    low, high = (share * total for share in STEADY_SHARES)
    points = [(seconds, done) for seconds, done in timeline if low <= done <= high]
    if len({done for _, done in points}) < 3:
        return None
    return linear_regression(*zip(*points, strict=True)).slope


class _ProcessWatch:
    """Measures the CPU time and the memory of the processes of this session, by kind."""

    def __init__(self) -> None:
        self._used: dict[int, tuple[str, float]] = {}  # by process, including those that have ended
        self.peak_bytes: dict[str, int] = {}

    @property
    def cpu_seconds(self) -> dict[str, float]:
        """The sum over the processes of each kind. A worker counts as what it did last."""
        used: defaultdict[str, float] = defaultdict(float)
        for kind, seconds in self._used.values():
            used[kind] += seconds
        return {kind: round(seconds, 2) for kind, seconds in sorted(used.items())}

    def update(self) -> None:
        """Read the values of all processes."""
        for pid, kind, cpu_seconds, resident_bytes in _processes():
            known, _ = self._used.get(pid, (kind, 0.0))
            self._used[pid] = ("actors" if known == "actors" else kind, cpu_seconds)
            self.peak_bytes[kind] = max(self.peak_bytes.get(kind, 0), resident_bytes)


def _processes() -> Iterator[tuple[int, str, float, int]]:
    """Id, kind, CPU seconds and resident bytes of each process of this session."""
    ticks, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(folder.name)) != os.getsid(0):
                continue
            command = (folder / "cmdline").read_text(errors="replace")
            values = (folder / "stat").read_text().rsplit(") ", 1)[1].split()
            resident_pages = int((folder / "statm").read_text().split()[1])
        except OSError:
            continue  # the process has just ended
        cpu_ticks = int(values[11]) + int(values[12])  # utime and stime: fields 14 and 15 of proc(5)
        yield int(folder.name), _kind(int(folder.name), command), cpu_ticks / ticks, resident_pages * page


def _kind(pid: int, command: str) -> str:
    if pid == os.getpid():
        return "driver"
    if "CaptionImages" in command:
        return "actors"
    return "tasks" if command.startswith("ray::") else "ray"
