"""What imcap_ray claims of itself, measured on this machine. One command for each table.

imcap bench                                                     the table below for one kind of image
python jobs/benchmark.py captioning --images 5000                ours against the limit of this machine
python jobs/benchmark.py others                                  against what people would use instead
python jobs/benchmark.py scale --images 1000 --images 100000     memory and speed by the number of images
python jobs/benchmark.py beam-search                             a batch against one image at a time
python jobs/benchmark.py training                                against a bare loop, and torchrun
python jobs/benchmark.py train-step                              a step against the loop that tutorials have
python jobs/benchmark.py large-photographs flickr8k --images 1000
python jobs/benchmark.py evaluate --images 1000000               memory and time of scoring a million captions
python jobs/benchmark.py estimate --decode 320 --model 28        hours and cost of what is too large to be measured
python jobs/benchmark.py chaos --seeds 20
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import torch
from PIL import Image
from ray.cluster_utils import Cluster

from imcap_ray.config import SearchConfig, load_recipe
from imcap_ray.data.datasets import TRAIN, VALIDATION, load_dataset
from imcap_ray.data.image_decoding import decode_image
from imcap_ray.data.synthetic_images import write_photographs, write_table
from imcap_ray.distributed.benchmark import (
    IMAGES_PER_ROUND,
    Comparison,
    Rate,
    describe_machine,
    measure_limit,
    measure_run,
    some_files,
    steady_rate,
    watch_run,
)
from imcap_ray.distributed.captioning import caption_images
from imcap_ray.distributed.cluster import connect, cores
from imcap_ray.distributed.memory import KEEP_FREED_MEMORY
from imcap_ray.errors import ImageError, ImcapError
from imcap_ray.models.caption import COMPUTE_BATCH_SIZE, Caption
from imcap_ray.models.captioner import Captioner, search_captions
from imcap_ray.models.decoders import AttentionDecoder, Decoder, build_decoder
from imcap_ray.models.encoders import build_encoder
from imcap_ray.models.inference_optimization import optimize_for_inference
from imcap_ray.models.model_folder import below, read_model_folder
from imcap_ray.scoring.metrics import score
from imcap_ray.text.vocabulary import END_ID, PADDING_ID, START_ID, Vocabulary
from imcap_ray.training.batches import CaptionBatch, make_batch
from imcap_ray.training.optimization import Optimization, prefers_bfloat16


@click.group()
def main() -> None:
    """Measure imcap_ray on this machine."""


# ---- chaos: processes die at random; is every image one row in the end?

FAULTS = ("actor", "task", "index", "burst", "node", "driver", "orphan")
TASK_NAMES = ("ray::Map", "ray::Read", "ray::Write", "ray::Stream", "ray::Repart")
MAX_RESTARTS = 25
HANG_SECONDS = 300
SECONDS_PER_IMAGE = 0.01


class SlowEcho:
    """Stands in for a captioner: captions an image with the hash of its pixels, takes its time, and logs each caption.

    What dies is processes, and a model would only make the hundredth run slower.

    Args:
        log: folder in which this process keeps a file of its own.
        processes: those that this one works for: the driver, and the actor if the work is isolated.
    """

    image_size = 32
    fingerprint = "slow-echo"
    compute_batch_size = 16
    num_beam_steps = 0
    search = SearchConfig()

    def __init__(self, log: str, processes: tuple[int, ...]) -> None:
        name = "-".join(map(str, (*processes, os.getppid(), os.getpid())))
        self._log = os.open(Path(log, f"{name}@{time.time_ns()}"), os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def require_gpu(self) -> None:
        """It computes on none."""

    def caption_pixels(self, pixels: Any) -> list[list[Caption]]:
        """The hash of each image, with a confidence of its own."""
        time.sleep(SECONDS_PER_IMAGE * len(pixels))
        digests = [hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()[:16] for image in pixels]
        os.write(self._log, "".join(f"{digest} {time.monotonic()}\n" for digest in digests).encode())
        return [[Caption(text=digest, logprob=-int(digest[:2], 16) / 64, num_tokens=4)] for digest in digests]


@dataclass(frozen=True)
class LoadSlowEcho:
    """Makes a `SlowEcho`. Each process that hands this object to another one adds its own number."""

    log: str
    processes: tuple[int, ...] = ()

    def __call__(self) -> SlowEcho:
        return SlowEcho(self.log, self.processes)

    def __reduce__(self) -> tuple[Any, ...]:
        is_known = self.processes[-1:] == (os.getpid(),)
        return LoadSlowEcho, (self.log, self.processes if is_known else (*self.processes, os.getpid()))


@dataclass(frozen=True)
class Computed:
    """One computation of a caption."""

    caption: str
    """The hash of the pixels, so it identifies the image."""
    time: float
    """On the machine's monotonic clock."""
    processes: tuple[int, ...]
    """The driver, the actor if its work is isolated, the raylet, and the process itself. Where one of them is killed,
    the caption is lost unless it is noted as done."""

    @property
    def run(self) -> int:
        """The run's driver."""
        return self.processes[0]


@dataclass(frozen=True)
class Fault:
    """A kill, or the end of a run with an error."""

    kind: str
    run: int
    """The run's driver."""
    time: float
    """Just before the kill, on the machine's monotonic clock."""
    noted: frozenset[str]
    """Captions that were in parts noted as done by then."""
    killed: int
    """The process."""

    def can_have_lost(self, computed: Computed) -> bool:
        """Whether this was in flight, and a process that it needed was killed.

        It may have been computed after the fault. A process outlives its driver or raylet by up to a second, because
        Ray's workers check once a second whether their raylet is alive, and computes what it was handed before.
        """
        is_killed = self.run == computed.run and self.killed in computed.processes
        return is_killed and computed.caption not in self.noted


@dataclass(frozen=True)
class Recomputation:
    """Which captions were in flight at the faults, and whether only these were computed again."""

    in_flight: int
    """Captions that the faults can have lost: computed, not noted as done, and of a process that was killed, or whose
    driver or node was. Summed over the faults."""
    by_orphans: int
    """Of these, those that were computed after the fault, by processes that were about to end."""
    copies: int
    """Copies of an image that were captioned for their own sake after the index of known images was killed."""
    unexplained: int
    """Captions that were computed again although no fault can have lost them."""


def explain_recomputation(
    log: Sequence[Computed], faults: Sequence[Fault], runs: Sequence[int], copies: Mapping[str, int]
) -> Recomputation:
    """Check law 3, "nothing recomputed beyond the blocks in flight", image by image.

    Take two successive computations a, b of one image. The first was in vain, so a fault lost it: one that killed the
    process of a, its node or its driver, that came after a and before b, and at which the image was not yet noted as
    done. Whatever is computed and not noted belongs to a block in flight: its actor has not returned it yet, or it
    waits to be written, or its part is written but not noted. So b is unexplained if there is no such fault.

    The bound on the sum follows. The faults of successive pairs of one image are different ones, because each is
    between the two computations of its pair. So a fault accounts for at most one computation of each image that was in
    flight at it, and

        computed - needed <= sum over the faults of the images in flight + copies

    What a process computes after its driver was killed counts as computed at that moment: only a driver hands out
    blocks, so it belongs to one that was in flight. A count taken at the moment of the kill leaves these out.

    Copies of an image are captioned once because an index of hashes knows the first. An index whose process is killed
    is made again from what is noted as done, so each copy of an image that was not noted then may be captioned too.

    Args:
        runs: the drivers of all runs into the output, in order.
        copies: how many images have the same pixels as another one, by caption.
    """
    order = {run: number for number, run in enumerate(runs)}

    def moment_of(computed: Computed) -> tuple[int, float]:
        ends = [fault.time for fault in faults if fault.can_have_lost(computed)]
        return order[computed.run], min([computed.time, *ends])

    in_flight = by_orphans = num_copies = unexplained = 0
    for fault in faults:
        lost = [computed for computed in log if fault.can_have_lost(computed)]
        captions = {computed.caption for computed in lost}
        in_flight += len(captions)
        by_orphans += len(captions - {computed.caption for computed in lost if computed.time <= fault.time})
    by_caption: dict[str, list[Computed]] = {}
    for computed in sorted(log, key=moment_of):
        by_caption.setdefault(computed.caption, []).append(computed)
    for caption, computations in by_caption.items():
        copies_left = copies.get(caption, 0)
        for first, second in itertools.pairwise(computations):
            before = [fault for fault in faults if (order[fault.run], fault.time) < moment_of(second)]
            if any(fault.can_have_lost(first) for fault in before):
                continue
            ends_of_index = (fault for fault in before if fault.kind == "index" and fault.run == second.run)
            if copies_left and any(caption not in fault.noted for fault in ends_of_index):
                copies_left -= 1
                num_copies += 1
            else:
                unexplained += 1
    return Recomputation(in_flight=in_flight, by_orphans=by_orphans, copies=num_copies, unexplained=unexplained)


@dataclass
class ChaosResult:
    """What one seed, or all of them, came to."""

    seeds: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    restarts: int = 0
    """Starts of the command after the first: its process was killed, or ended with an error."""
    errors: int = 0
    """Of these, those where it ended with an error."""
    rows_expected: int = 0
    rows_lost: int = 0
    rows_duplicated: int = 0
    rows_wrong: int = 0
    """Rows that differ from those of an undisturbed run."""
    broken_files_read: int = 0
    """Times a reader met a file in the output that was not whole Parquet."""
    captions_needed: int = 0
    captions_computed: int = 0
    captions_in_flight: int = 0
    """See `Recomputation`, as for the next three."""
    captions_by_orphans: int = 0
    captions_of_copies: int = 0
    captions_unexplained: int = 0
    error_lines: list[str] = field(default_factory=list)

    def add(self, other: ChaosResult) -> None:
        """Sum up."""
        for name, value in asdict(other).items():
            if name == "faults":
                self.faults.update(other.faults)
            else:
                setattr(self, name, getattr(self, name) + value)

    @property
    def share_recomputed(self) -> float:
        """Of the captions that were needed, how many were computed beyond that."""
        return self.captions_computed / max(1, self.captions_needed) - 1

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"faults": dict(self.faults), "share_recomputed": round(self.share_recomputed, 4)}


@main.command()
@click.option("--seeds", default=5, show_default=True, help="Runs, each with other faults.")
@click.option("--first-seed", default=0, show_default=True)
@click.option("--images", default=2000, show_default=True, help="Images of a run.")
@click.option("--nodes", type=click.Choice(["1", "3", "both"]), default="both", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def chaos(seeds: int, first_seed: int, images: int, nodes: str, as_json: bool) -> None:
    """Kill actors, task workers, nodes and the driver of captioning runs at random moments; count what is lost.

    Each run is started again until it is done, and compared row by row with an undisturbed one of the same images. With
    --nodes both, each third run is on a simulated cluster of three nodes on this machine. A driver does not survive its
    own node.
    """
    total = ChaosResult()
    with tempfile.TemporaryDirectory(prefix="imcap-chaos-") as folder:
        source = Path(folder, "images")
        write_chaos_images(source, images)
        calm = Path(folder, "calm")
        if _start_run(source, calm, num_nodes=1).wait():
            raise SystemExit("the undisturbed run failed:\n" + Path(f"{calm}.log").read_text(errors="replace")[-2000:])
        expected, needed, copies = _read_rows(calm), _count_computed(calm), _count_copies(calm)
        for seed in range(first_seed, first_seed + seeds):
            num_nodes = {"1": 1, "3": 3}.get(nodes) or (3 if seed % 3 == 2 else 1)
            start = time.time()
            result = _run_seed(seed, source, Path(folder, f"seed{seed}"), expected, needed, copies, num_nodes)
            total.add(result)
            click.echo(
                f"seed {seed}, {num_nodes} node{'s' * (num_nodes > 1)}, {time.time() - start:.0f} s: "
                f"{', '.join(f'{count} {kind}' for kind, count in sorted(result.faults.items())) or 'no fault'}; "
                f"{result.rows_lost} lost, {result.rows_duplicated} duplicated, {result.rows_wrong} wrong, "
                f"{result.broken_files_read} broken, {result.captions_computed - needed} recomputed, "
                f"{result.captions_in_flight} in flight ({result.captions_by_orphans} by orphans), "
                f"{result.captions_of_copies} of copies, {result.captions_unexplained} unexplained"
                + "".join(f"\n  {line}" for line in result.error_lines),
                err=True,
            )
    if as_json:
        click.echo(json.dumps(total.to_dict()))
        return
    for name, value in total.to_dict().items():
        click.echo(f"{name:26} {value}")


def write_chaos_images(folder: Path, count: int) -> None:
    """`count` small JPEGs in ten folders: one in 20 the copy of another, one in 40 broken."""
    generator = np.random.default_rng(0)
    contents: list[bytes] = []
    for number in range(count):
        small = Image.fromarray(generator.integers(0, 256, (6, 8, 3), np.uint8))
        stream = io.BytesIO()
        small.resize((48, 36), Image.Resampling.BICUBIC).save(stream, "JPEG")
        data = stream.getvalue()
        if number % 20 == 7:
            data = contents[int(generator.integers(number))]
        if number % 40 == 13:
            data = (b"", b"no image", data[: len(data) // 2])[number % 3]
        contents.append(data)
        path = folder / f"{number % 10}" / f"{number:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _run_seed(
    seed: int,
    source: Path,
    output: Path,
    expected: dict[str, Any],
    needed: int,
    copies: Mapping[str, int],
    num_nodes: int,
) -> ChaosResult:
    chance = random.Random(seed)
    result = ChaosResult(seeds=1, rows_expected=len(expected), captions_needed=needed)
    budget = chance.randint(1, 6)
    runs: list[int] = []
    faults: list[Fault] = []
    with _reader(output) as broken:
        for _ in range(MAX_RESTARTS):
            process = _start_run(source, output, num_nodes=num_nodes)
            runs.append(process.pid)
            while process.poll() is None and sum(result.faults.values()) < budget:
                _wait_for_work(process, output, chance.uniform(0.1, 4.0))
                kind = chance.choice(FAULTS)
                if process.poll() is None and (injected := _inject(kind, process.pid, output, chance)):
                    result.faults[kind] += 1
                    faults += injected
            code = _wait_for_end(process, output)
            if code is None:
                _kill_group(process.pid)
                raise SystemExit(f"seed {seed}: hangs after {dict(result.faults)}, see {output}.log")
            if code == 0:
                break
            result.restarts += 1
            if code > 0:
                faults.append(_make_fault("end", process.pid, output, process.pid, lambda: None))
                result.errors += 1
                lines = Path(f"{output}.log").read_text(errors="replace").splitlines()
                result.error_lines += [line for line in lines if line.startswith(("Error", "Traceback"))][-1:]
        else:
            raise SystemExit(f"seed {seed}: not done after {MAX_RESTARTS} starts, see {output}.log")
        for run in runs:
            _kill_group(run)
        result.broken_files_read = len(broken)
    rows = [row for path in output.glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    counts = Counter(row["image_id"] for row in rows)
    result.rows_lost = len(expected.keys() - counts.keys())
    result.rows_duplicated = sum(counts.values()) - len(counts)
    result.rows_wrong = sum(_comparable(row) != expected.get(row["image_id"]) for row in rows)
    result.captions_computed = _count_computed(output)
    recomputation = explain_recomputation(_read_computed(output), faults, runs, copies)
    result.captions_in_flight = recomputation.in_flight
    result.captions_by_orphans = recomputation.by_orphans
    result.captions_of_copies = recomputation.copies
    result.captions_unexplained = recomputation.unexplained
    return result


def _start_run(source: Path, output: Path, *, num_nodes: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, "chaos-run", str(source), str(output), str(num_nodes)]
    with open(f"{output}.log", "ab") as log:
        return subprocess.Popen(command, start_new_session=True, stdout=log, stderr=log)


@main.command("chaos-run", hidden=True)
@click.argument("source")
@click.argument("output")
@click.argument("num_nodes", type=int)
def chaos_run(source: str, output: str, num_nodes: int) -> None:
    """One captioning run, for `chaos` to kill."""
    log = Path(f"{output}.computed")
    log.mkdir(exist_ok=True)
    cluster = None
    if num_nodes > 1:
        os.environ["RAY_AUTH_MODE"] = "disabled"  # on loopback, and for a minute
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        for _ in range(num_nodes - 1):
            cluster.add_node(num_cpus=2)
    try:
        summary = caption_images(
            source,
            output,
            load_captioner=LoadSlowEcho(str(log)),
            resources=connect(cluster.address if cluster else "local"),
            num_actors=2,
            max_failure_rate=1.0,
        )
    except ImcapError as error:
        raise click.ClickException(str(error)) from error
    finally:
        ray.shutdown()
        if cluster:
            cluster.shutdown()
    click.echo(json.dumps(asdict(summary)))


def _wait_for_work(process: subprocess.Popen[bytes], output: Path, seconds: float) -> None:
    """Wait until images are being captioned, for Ray's start is half of the run, and then so long."""
    known = _count_computed(output)
    deadline = time.monotonic() + 90
    while process.poll() is None and _count_computed(output) == known and time.monotonic() < deadline:
        time.sleep(0.1)
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)


def _wait_for_end(process: subprocess.Popen[bytes], output: Path) -> int | None:
    """The exit code, None for a run that hangs: one that has computed and noted nothing for `HANG_SECONDS`."""
    before, deadline = None, 0.0
    while process.poll() is None:
        progress = _count_computed(output), len(list(Path(output, "_imcap", "done").glob("*.parquet")))
        if progress != before:
            before, deadline = progress, time.monotonic() + HANG_SECONDS
        elif time.monotonic() > deadline:
            return None
        time.sleep(0.1)
    return process.returncode


def _inject(kind: str, driver: int, output: Path, chance: random.Random) -> list[Fault]:
    """Kill something of this run; the faults, none if there was nothing to kill."""
    make = partial(_make_fault, kind, driver, output)
    if kind == "driver":
        return [make(driver, partial(_kill_group, driver))]
    if kind == "orphan":  # what it started works on for a moment, and its files meet those of the next start
        return [make(driver, partial(os.kill, driver, signal.SIGKILL))]
    if kind == "burst":
        killed = [_inject(chance.choice(("actor", "task", "index")), driver, output, chance) for _ in range(4)]
        return [fault for faults in killed for fault in faults]
    processes = _processes_of(driver)
    is_victim = {
        "actor": lambda words: "CaptionImages" in words,
        "task": lambda words: words.startswith(TASK_NAMES) and "CaptionImages" not in words,
        "index": lambda words: words.startswith("ray::ImageIndex"),
        "node": lambda words: words.split("\0")[0].endswith("/raylet"),
    }[kind]
    victims = [pid for pid, words in processes.items() if is_victim(words)]
    if not victims:
        return []
    victim = chance.choice(sorted(victims))
    try:
        return [make(victim, partial(os.kill, victim, signal.SIGKILL))]
    except ProcessLookupError:
        return []


def _make_fault(kind: str, run: int, output: Path, killed: int, kill: Callable[[], None]) -> Fault:
    """Kill a process and describe that.

    The notes are listed just before, which is quick, and the parts that they name are read afterwards. What is noted in
    between counts as in flight, and so it was.
    """
    notes = [path.name for path in Path(output, "_imcap", "done").glob("*.parquet")]
    start = time.monotonic()
    kill()
    noted: set[str] = set()
    for name in notes:
        try:
            rows = pq.read_table(output / name, columns=["caption", "status"])
        except FileNotFoundError:
            continue  # a note that is pending
        noted.update(rows.filter(pc.equal(rows["status"], "ok"))["caption"].to_pylist())
    return Fault(kind=kind, run=run, time=start, noted=frozenset(noted), killed=killed)


def _processes_of(session: int) -> dict[int, str]:
    """Command lines of the processes that this run started, its own left out."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            pid = int(path.name)
            words = (path / "cmdline").read_text(errors="replace")
            if words and pid != session and os.getsid(pid) == session:  # a dead one has no words
                found[pid] = words
        except (OSError, ProcessLookupError):
            continue
    return found


def _kill_group(session: int) -> None:
    """Kill the run's driver and all that it started, as when a machine loses power."""
    while processes := _processes_of(session):
        for pid in (session, *processes):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)
    try:
        os.killpg(session, signal.SIGKILL)
    except ProcessLookupError:
        return


@contextmanager
def _reader(output: Path) -> Iterator[list[str]]:
    """Read the output all the time, as somebody else would; the errors that this met."""
    broken: list[str] = []
    finished = threading.Event()

    def read() -> None:
        while not finished.wait(0.2):
            for path in output.glob("*.parquet"):
                try:
                    pq.read_metadata(path)
                except FileNotFoundError:
                    continue  # taken back between the listing and the reading
                except (OSError, pa.ArrowException) as error:
                    broken.append(f"{path}: {error}")

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        yield broken
    finally:
        finished.set()
        thread.join()


def _read_rows(output: Path) -> dict[str, Any]:
    rows = [row for path in output.glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    assert rows, f"nothing in {output}"
    return {row["image_id"]: _comparable(row) for row in rows}


def _comparable(row: dict[str, Any]) -> tuple[Any, ...]:
    """All of a row; NaN, which differs from itself, as text."""
    return tuple(str(value) for value in row.values())


def _count_copies(output: Path) -> Counter[str]:
    """Images with the same pixels as another one, by their caption."""
    rows = [row for path in output.glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    return Counter(row["caption"] for row in rows if row["status"] == "duplicate")


def _count_computed(output: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in Path(f"{output}.computed").glob("*"))


def _read_computed(output: Path) -> list[Computed]:
    found = []
    for path in Path(f"{output}.computed").glob("*"):
        processes = tuple(int(process) for process in path.name.partition("@")[0].split("-"))
        for line in path.read_text().splitlines():
            caption, seconds = line.split()
            found.append(Computed(caption=caption, time=float(seconds), processes=processes))
    return found


# ---- captioning: against the limit, and against other ways to do it

SIZES = ((224, 224), (500, 375), (4000, 3000))
LARGE_PIXELS = 4_000_000


@main.command()
@click.option("--images", default=5000, show_default=True, help="Images of each size.")
@click.option("--large-images", default=1000, show_default=True, help="Of 4000 x 3000.")
@click.option("--model", "models", multiple=True, help="Model folder. Default: the one that comes with the package.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def captioning(images: int, large_images: int, models: tuple[str, ...], as_json: bool) -> None:
    """`imcap caption` against the limit of this machine, for JPEGs of three sizes, as files and as a Parquet table."""
    found: dict[str, Any] = {"machine": describe_machine(), "runs": []}
    for size in SIZES:
        with tempfile.TemporaryDirectory(prefix="imcap-bench-") as folder:
            count = large_images if size[0] * size[1] > LARGE_PIXELS else images
            files, table = f"{folder}/photographs", f"{folder}/photographs.parquet"
            write_photographs(files, count, size)
            write_table(files, table)
            limit = measure_limit(some_files(files, IMAGES_PER_ROUND), models)
            for kind, input in (("folder", files), ("Parquet", table)):
                run = measure_run(input, f"{folder}/captions-{kind}", models=models)
                comparison = Comparison(limit=limit, run=run)
                name = f"{size[0]} x {size[1]}, {kind}"
                found["runs"].append({"input": name} | comparison.to_dict())
                click.echo(f"--- {name}\n" + "\n".join(comparison.lines()), err=True)
    _show(found, as_json)


@main.command()
@click.option("--images", default=1000, show_default=True, help="Images of 500 x 375.")
@click.option("--tutorial-images", default=100, show_default=True, help="Of these, for the loop over single images.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--our-model", is_flag=True, help="Give the others our folded and fused CNN and our packed decoder too.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def others(images: int, tutorial_images: int, rounds: int, our_model: bool, as_json: bool) -> None:
    """`imcap caption` against other ways to caption a folder with the same model.

    A PyTorch DataLoader with a worker for each core, whose batches the main process captions; Ray Data's documented
    recipe (read_images, map, map_batches with actors); and one image at a time with a beam search in Python, as
    tutorials have it: those in Keras, and the seed, ask the whole decoder for each next word, with the image and all
    words so far; those in PyTorch keep the LSTM's state. The first two have our search in batches. The model of all is
    as torch runs it, in float32. Rates are steady ones: no start-up in them. The ways take turns, round by round.
    """
    load = Captioner.load if our_model else _load_plain
    ways: dict[str, Callable[[str, str], float]] = {
        "imcap caption": _caption_by_imcap,
        "DataLoader loop": partial(_caption_by_data_loader, load=load),
        "Ray's recipe": partial(_caption_by_ray_recipe, load=load),
        "tutorial loop": partial(_caption_one_by_one, load=load, count=tutorial_images, keeps_state=False),
        "tutorial loop, state kept": partial(_caption_one_by_one, load=load, count=tutorial_images, keeps_state=True),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory(prefix="imcap-bench-") as folder:
        source = f"{folder}/photographs"
        write_photographs(source, images, (500, 375))
        for number in range(rounds):
            for name, caption in ways.items():
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    rates[name].append(pool.submit(caption, source, f"{folder}/{name}-{number}").result())
                click.echo(f"round {number + 1}, {name}: {rates[name][-1]:.1f} images/s", err=True)
    ours = Rate(tuple(rates["imcap caption"]))
    found: dict[str, Any] = {"machine": describe_machine(), "images": images}
    for name, values in rates.items():
        rate = Rate(tuple(values))
        found[name] = rate.to_dict() | {"ours_is_times": round(ours.median / rate.median, 2)}
    _show(found, as_json)


def _caption_by_imcap(source: str, output: str) -> float:
    return _told(measure_run(source, output).steady)


def _load_plain() -> Captioner:
    """The captioner of the package as torch runs it: its CNN layer by layer, its decoder's weights as they are."""
    captioner, folder = Captioner.load(), read_model_folder()
    assert isinstance(captioner.decoder, AttentionDecoder)
    captioner.decoder.freeze(packed=False)
    encoder = build_encoder(folder.encoder, folder.preprocessing, load_weights=False)
    encoder.cnn.load_state_dict(below("encoder.", folder.tensors))
    captioner.encoder = encoder.eval().to(captioner.device)
    return captioner


def _caption_by_data_loader(source: str, output: str, *, load: Callable[[], Captioner]) -> float:
    captioner = load()
    loader = torch.utils.data.DataLoader(_Photographs(source, captioner.image_size), batch_size=32, num_workers=cores())
    return _rate_of(len(captioner.caption_pixels(pixels)) for pixels in loader)


class _Photographs(torch.utils.data.Dataset[torch.Tensor]):
    def __init__(self, source: str, image_size: int) -> None:
        self._files = sorted(Path(source).rglob("*.jpg"))
        self._image_size = image_size

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> torch.Tensor:
        return torch.from_numpy(_decode_whole(self._files[number].read_bytes(), self._image_size))


class RecipeCaptioner:
    """The actor of Ray Data's batch inference guide, with our model in it."""

    def __init__(self, load: Callable[[], Captioner]) -> None:
        self._captioner = load()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Captions of a batch of pixels."""
        captions = self._captioner.caption_pixels(np.stack(list(batch["pixels"])))
        return {"caption": ["" if isinstance(best, ImageError) else best[0].text for best in captions]}


def _caption_by_ray_recipe(source: str, output: str, *, load: Callable[[], Captioner]) -> float:
    # With Ray's own settings; with fewer logical CPUs than these its readers would have none beside the actors.
    ray.init(address="local", num_cpus=cores() + 2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    ray.cloudpickle.register_pickle_by_value(sys.modules[RecipeCaptioner.__module__])
    dataset = (
        ray.data.read_images(source, mode="RGB")
        .map(partial(_preprocess, image_size=Captioner.load().image_size))
        .map_batches(
            RecipeCaptioner,
            fn_constructor_args=(load,),
            batch_size=32,
            num_cpus=1,
            num_gpus=1 if gpus else None,
            compute=ray.data.ActorPoolStrategy(size=gpus or cores()),
        )
    )
    return _rate_of(len(batch["caption"]) for batch in dataset.iter_batches(batch_size=32))


def _preprocess(row: dict[str, Any], *, image_size: int) -> dict[str, Any]:
    squashed = Image.fromarray(row["image"]).resize((image_size, image_size), Image.Resampling.BICUBIC)
    return {"pixels": np.ascontiguousarray(np.asarray(squashed).transpose(2, 0, 1))}


def _caption_one_by_one(
    source: str, output: str, *, load: Callable[[], Captioner], count: int, keeps_state: bool
) -> float:
    captioner = load()
    files = sorted(Path(source).rglob("*.jpg"))[:count]
    return _rate_of(_one_caption(captioner, file, keeps_state=keeps_state) for file in files)


@torch.inference_mode()
def _one_caption(captioner: Captioner, file: Path, *, keeps_state: bool) -> int:
    """Caption a photograph with a beam of lists, beams that have ended leaving it.

    Args:
        keeps_state: go on from the LSTMs' last state, with keys and values of the image that are computed once; else
            the whole decoder computes anew for each word of each beam.
    """
    pixels = torch.from_numpy(_decode_whole(file.read_bytes(), captioner.image_size)).unsqueeze(0).to(captioner.device)
    search, decoder, features = captioner.search, captioner.decoder, captioner.encoder(pixels)
    assert isinstance(decoder, AttentionDecoder)
    step, state = decoder.start(features, 1) if keeps_state else (None, None)
    of_first_image = torch.zeros(1, dtype=torch.long, device=captioner.device)
    live: list[tuple[float, list[int], Any]] = [(0.0, [START_ID], state)]
    ended: list[tuple[float, list[int]]] = []
    for _ in range(search.max_length):
        grown = []
        for logprob, words, state_of_beam in live:
            tokens = torch.tensor([words], device=captioner.device)
            if step:
                log_probs, next_state = step(tokens[:, -1:], state_of_beam)
            else:
                logits = decoder(features, tokens, torch.tensor([len(words)]), of_first_image)
                log_probs, next_state = logits[None, -1:].log_softmax(dim=-1), state_of_beam
            values, words_after = log_probs[0, 0].topk(search.beam_size)
            grown += [
                (logprob + value, [*words, word], next_state)
                for value, word in zip(values.tolist(), words_after.tolist(), strict=True)
            ]
        grown.sort(key=lambda beam: -beam[0])
        best = grown[: search.beam_size - len(ended)]
        ended += [(logprob, words) for logprob, words, _ in best if words[-1] == END_ID]
        live = [beam for beam in best if beam[1][-1] != END_ID]
        if not live:
            break
    scored = ended or [(logprob, words) for logprob, words, _ in live]
    captioner.vocabulary.to_text(max(scored, key=lambda beam: beam[0] / len(beam[1]) ** search.length_penalty)[1][1:])
    return 1


def _rate_of(counts: Iterable[int]) -> float:
    """Images per second in the middle of a run, from the images of each of its steps."""
    timeline, done, start = [], 0, time.perf_counter()
    for count in counts:
        done += count
        timeline.append((time.perf_counter() - start, done))
    return _told(steady_rate(timeline))


def _told(rate: float | None) -> float:
    if rate is None:
        raise click.ClickException("the run was too short for its rate to be told: take more --images")
    return rate


# ---- scale: does memory, or the time an image takes, grow with their number?


class InstantEcho:
    """Stands in for a captioner that takes no time: what is left is the pipeline."""

    image_size = 32
    fingerprint = "instant-echo"
    compute_batch_size = 16
    num_beam_steps = 0
    search = SearchConfig()

    def require_gpu(self) -> None:
        """It computes on none."""

    def caption_pixels(self, pixels: Any) -> list[list[Caption]]:
        """The mean brightness of each image."""
        return [[Caption(text=f"{image.mean():.1f}", logprob=-1.0, num_tokens=2)] for image in pixels]


@main.command()
@click.option("--images", "counts", multiple=True, type=int, default=(1_000, 10_000, 100_000), show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def scale(counts: tuple[int, ...], as_json: bool) -> None:
    """Images per second, memory of the driver, the actors and the tasks, and what Ray spilled, by the number of images.

    Tiny JPEGs in a Parquet table and a captioner that takes no time: what is measured is the pipeline.
    """
    found: dict[str, Any] = {"machine": describe_machine(), "runs": []}
    for count in counts:
        with tempfile.TemporaryDirectory(prefix="imcap-bench-") as folder:
            table = f"{folder}/tiny.parquet"
            _write_tiny_images(table, count)
            command = [sys.executable, __file__, "scale-run", table, f"{folder}/captions", str(time.time())]
            run = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        found["runs"].append(run)
        megabytes = ", ".join(f"{kind} {size / 2**20:,.0f} MiB" for kind, size in sorted(run["peak_bytes"].items()))
        steady = "too short for a steady rate" if run["steady"] is None else f"{run['steady']:,.0f} images/s steady"
        click.echo(
            f"{count:9,} images: {steady}, {run['seconds']:.0f} s in all, "
            f"the first after {run['first_seconds']:.0f} s; {megabytes}, "
            f"spilled {run['spilled_bytes'] / 2**20:,.0f} MiB",
            err=True,
        )
    _show(found, as_json)


@main.command("scale-run", hidden=True)
@click.argument("source")
@click.argument("output")
@click.argument("start", type=float)
def scale_run(source: str, output: str, start: float) -> None:
    """One captioning run, for `scale` to watch."""
    click.echo(json.dumps(asdict(watch_run(source, output, InstantEcho, start))))


def _write_tiny_images(path: str, count: int) -> None:
    """Different JPEGs: one image, with its number in a comment."""
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (36, 48, 3), np.uint8)).save(stream, "JPEG")
    data = stream.getvalue()
    schema = pa.schema([("image_id", pa.string()), ("image", pa.binary())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, count, 8192):
            numbers = range(start, min(count, start + 8192))
            comments = [b"\xff\xfe" + (14).to_bytes(2, "big") + f"{number:012}".encode() for number in numbers]
            images = [data[:2] + comment + data[2:] for comment in comments]
            writer.write_table(pa.table([[f"{number:09}" for number in numbers], images], schema=schema))


# ---- estimate: what a cluster that is not at hand would do


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A run of `images` over a cluster, from rates that were measured on one core and one GPU.

    CPUs decode and GPUs caption at the same time, so the slower of both counts:

        images/s = share x min(cpus x decode, gpus x model)

    Without GPUs an image takes both of the same cores, one after the other:

        images/s = share x cpus / (1 / decode + 1 / model)

    `share` is what of that limit a run reaches (`imcap bench` tells it). Decoding and captioning need nothing of other
    images, so rates add up over nodes, while these hold:

    - The input is listed before work begins, by one process. A store answers with 1,000 names at a time; a table has
      its names within, and takes a thousandth of that.
    - Pixels travel from the node that decodes to the one that captions, where these are not the same: 3 x S x S bytes
      an image, S the model's image size. Past the network's bandwidth give GPU nodes the CPUs to decode for themselves.
    - One actor knows which bytes were seen, in 29 bits an image; one process holds the ids of all images that are
      done when a run is resumed, in 8 bytes each. At 10^10 images neither fits.
    - Every 64 images are a task, which Ray's driver starts: it takes 0.25 ms of CPU an image (`scale`, a million images
      on an Intel Xeon), so that one driver feeds some 4,000 images a second. Past that, split the input into several
      runs.
    """

    images: int
    cpus: int
    gpus: int
    decode: float
    """Images per second of one core."""
    model: float
    """Images per second of one GPU, or of one core where there are none."""
    share: float
    cpu_price: float
    """Of an hour of one core."""
    gpu_price: float
    """Of an hour of one GPU."""
    listing: float
    """Files per second."""
    image_size: int

    @property
    def images_per_second(self) -> float:
        """In the middle of the run."""
        if self.gpus:
            return self.share * min(self.cpus * self.decode, self.gpus * self.model)
        return self.share * self.cpus / (1 / self.decode + 1 / self.model)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        hours = self.images / self.images_per_second / 3600
        listing_hours = self.images / self.listing / 3600
        price = self.cpus * self.cpu_price + self.gpus * self.gpu_price
        return {
            "images_per_second": round(self.images_per_second, 1),
            "bound": "decoding" if self.gpus and self.cpus * self.decode < self.gpus * self.model else "the model",
            "hours": round(hours, 2),
            "listing_hours": round(listing_hours, 2),
            "cost": round((hours + listing_hours) * price, 2),
            "cost_per_100_million": round((hours + listing_hours) * price * 1e8 / self.images, 2),
            "pixels_megabytes_per_second": round(self.images_per_second * 3 * self.image_size**2 / 1e6, 1),
            "index_megabytes": round(self.images * 29 / 8 / 1e6, 1),
            "resumed_ids_megabytes": round(self.images * 8 / 1e6, 1),
        }


@main.command(help=Estimate.__doc__, short_help="Hours and cost of a run that is too large to be measured.")
@click.option("--images", default=100_000_000, show_default=True)
@click.option("--cpus", default=64, show_default=True, help="Cores of the cluster.")
@click.option("--gpus", default=0, show_default=True, help="GPUs of the cluster.")
@click.option("--decode", required=True, type=float, help="Images per second that one core decodes.")
@click.option("--model", required=True, type=float, help="Images per second of one GPU, or of one core without.")
@click.option("--share", default=0.9, show_default=True, help="Of the limit.")
@click.option("--cpu-price", default=0.0, help="Of a core's hour, in any currency.")
@click.option("--gpu-price", default=0.0, help="Of a GPU's hour.")
@click.option("--listing", default=10_000.0, show_default=True, help="Files listed in a second.")
@click.option("--image-size", default=224, show_default=True, help="Pixels a side that the model sees.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def estimate(as_json: bool, **values: Any) -> None:
    """Show what `Estimate` computes."""
    if min(values["cpus"], values["decode"], values["model"], values["share"], values["listing"]) <= 0:
        raise click.UsageError("--cpus, --decode, --model, --share and --listing must be above 0")
    _show(Estimate(**values).to_dict(), as_json)


# ---- beam search: all images of a batch at once against one after the other


@main.command()
@click.option("--images", default=64, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def beam_search(images: int, rounds: int, as_json: bool) -> None:
    """Images per second of the search alone, in batches as `imcap` does and one by one, where both find the same."""
    captioner = Captioner.load()
    with tempfile.TemporaryDirectory(prefix="imcap-bench-") as folder:
        write_photographs(folder, images, (224, 224))
        pixels = np.stack([captioner.read_pixels(file) for file in sorted(Path(folder).rglob("*.jpg"))])
    features = captioner.encode(pixels).to(captioner.device)
    rates: dict[str, list[float]] = {"batches": [], "one by one": []}
    texts: dict[str, list[str]] = {}
    for _ in range(rounds + 1):
        for name, size in (("batches", COMPUTE_BATCH_SIZE), ("one by one", 1)):
            start = time.perf_counter()
            found = [
                best[0].text
                for chunk in features.split(size)  # type: ignore[no-untyped-call]
                for best in search_captions(captioner.decoder, captioner.vocabulary, chunk, captioner.search)
            ]
            rates[name].append(images / (time.perf_counter() - start))
            texts[name] = found
    batches, one_by_one = (Rate(tuple(values[1:])) for values in rates.values())
    same = sum(one == other for one, other in zip(texts["batches"], texts["one by one"], strict=True))
    _show(
        {
            "machine": describe_machine(),
            "threads": torch.get_num_threads(),
            "batches": batches.to_dict(),
            "one_by_one": one_by_one.to_dict(),
            "ratio": round(batches.median / one_by_one.median, 2),
            "same_captions": f"{same} of {images}",
        },
        as_json,
    )


def _show(found: dict[str, Any], as_json: bool) -> None:
    """The object, as JSON or name by name."""
    if as_json:
        click.echo(json.dumps(found))
        return
    for name, value in found.items():
        click.echo(f"{name:22} {json.dumps(value) if isinstance(value, dict | list) else value}")


# ---- training: Ray Train against a bare loop, and against torchrun


@main.command()
@click.option("--images", default=1024, show_default=True, help="Training images, each with five captions.")
@click.option(
    "--epochs", type=click.IntRange(2), default=4, show_default=True, help="Of each round; one does not count."
)
@click.option("--rounds", type=click.IntRange(1), default=2, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def training(images: int, epochs: int, rounds: int, as_json: bool) -> None:
    """Captions per second of `imcap train` with one and two workers, against a bare loop and torchrun.

    The bare loop is the same optimizer step on the same captions, with features in memory and nothing else: no Ray, no
    validation, no checkpoint; with torchrun it is two processes of DistributedDataParallel. The epochs of `imcap train`
    are timed without their validation too. A last line: the bare loop with the CNN in it, as if nothing were cached.
    The ways take turns, round by round; all processes have the settings of malloc that our workers have.
    """
    with tempfile.TemporaryDirectory(prefix="imcap-bench-") as folder:
        data = Path(folder, "data")
        _write_captioned_photographs(data, images)
        ways: dict[str, Callable[[], list[float]]] = {
            "imcap train, 1 worker": partial(_train, data, workers=1, epochs=epochs),
            "bare loop": partial(_train_barely, data, workers=1, epochs=epochs),
            "imcap train, 2 workers": partial(_train, data, workers=2, epochs=epochs),
            "torchrun, 2 processes": partial(_train_barely, data, workers=2, epochs=epochs),
            "bare loop, nothing cached": partial(_train_barely, data, workers=1, epochs=epochs, encodes=True),
        }
        rates: dict[str, list[Rate]] = {name: [] for name in ways}
        for number in range(rounds):
            for name, train in list(ways.items())[:: -1 if number % 2 else 1]:
                rates[name].append(Rate(tuple(5 * images / seconds for seconds in train()[1:])))
                click.echo(f"round {number + 1}, {name}: {rates[name][-1].median:.0f} captions/s", err=True)
    found: dict[str, Any] = {"machine": describe_machine(), "images": images}
    for name, of_rounds in rates.items():
        found[name] = Rate(tuple(value for rate in of_rounds for value in rate.values)).to_dict()
    for ratio, ours, theirs in (
        ("of the bare loop", "imcap train, 1 worker", "bare loop"),
        ("of torchrun", "imcap train, 2 workers", "torchrun, 2 processes"),
    ):
        pairs = zip(rates[ours], rates[theirs], strict=True)
        found[ratio] = Rate(tuple(our.median / their.median for our, their in pairs)).to_dict()
    _show(found, as_json)


def _train(data: Path, *, workers: int, epochs: int) -> list[float]:
    """Seconds of each epoch of `imcap train`, which finds the images' features where the first one left them."""
    model = Path(tempfile.mkdtemp(dir=data.parent), "model")
    command = [sys.executable, "-m", "imcap_ray", "train", str(data), str(model), "--num-workers", str(workers)]
    options = ["--features", f"{data}-features", "--set", f"training.epochs={epochs}", "--quiet"]
    subprocess.run([*command, *options], check=True)
    lines = (model / "_training" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["train_seconds"] for line in lines]


def _train_barely(data: Path, *, workers: int, epochs: int, encodes: bool = False) -> list[float]:
    """Seconds of each epoch of the bare loop."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)] * (workers > 1)
    command = [sys.executable, *launcher, __file__, "bare-loop", str(data), str(epochs)]
    environment = os.environ | KEEP_FREED_MEMORY | {"OMP_NUM_THREADS": str(max(1, cores() // workers))}
    done = subprocess.run(command + ["--encode"] * encodes, check=True, stdout=subprocess.PIPE, env=environment)
    seconds: list[float] = json.loads(done.stdout)
    return seconds


def _write_captioned_photographs(folder: Path, num_train: int) -> None:
    """Photographs with five captions each, as long as those of Flickr8k, of 3,000 words; 32 of them for validation."""
    generator = np.random.default_rng(0)
    write_photographs(str(folder), num_train + 32, (224, 224))
    files = sorted(folder.rglob("*.jpg"))
    with open(folder / "metadata.jsonl", "w") as lines:
        for number, file in enumerate(files):
            lengths = np.clip(generator.normal(10.8, 3.8, size=5).round().astype(int), 4, 22)
            captions = [" ".join(f"word{word}" for word in generator.integers(3000, size=length)) for length in lengths]
            split = "train" if number < num_train else "validation"
            row = {"file_name": str(file.relative_to(folder)), "captions": captions, "split": split}
            lines.write(json.dumps(row) + "\n")


@main.command("bare-loop", hidden=True)
@click.argument("data")
@click.argument("epochs", type=int)
@click.option("--encode", is_flag=True)
def bare_loop(data: str, epochs: int, encode: bool) -> None:
    """Seconds of each epoch of the default recipe's cross-entropy, for `training`."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    if world_size > 1:
        torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    recipe = load_recipe("lite2-attention")
    captions = load_dataset(data).split(TRAIN)["captions"].to_pylist()
    words = Vocabulary.build(
        itertools.chain.from_iterable(captions),
        tokenizer=recipe.vocabulary.tokenizer,
        min_count=recipe.vocabulary.min_count,
    )
    max_length = recipe.training.max_caption_length
    ids = [[words.to_ids(text, max_length=max_length) for text in texts] for texts in captions[rank::world_size]]
    encoder, shape, dtype = None, (49, 1280), torch.float16
    if encode:
        encoder = optimize_for_inference(build_encoder(recipe.encoder, recipe.preprocessing), torch.device("cpu"))
        shape, dtype = (3, encoder.image_size, encoder.image_size), torch.uint8
    inputs = (torch.rand(len(ids), *shape) * 255).to(dtype)  # what they show costs no time
    decoder = build_decoder(recipe.decoder, num_channels=1280, vocabulary_size=len(words))
    model = torch.nn.parallel.DistributedDataParallel(decoder) if world_size > 1 else decoder
    optimization = Optimization(model, decoder, recipe.training, total_steps=10**6)
    seconds = []
    for _ in range(epochs):
        start = time.perf_counter()
        for chosen in torch.randperm(len(ids)).split(recipe.training.batch_size // world_size):
            chunk = inputs[chosen]
            if encoder:
                with torch.inference_mode():
                    chunk = encoder(chunk)
            optimization.step(make_batch(chunk.clone(), [ids[number] for number in chosen], torch.device("cpu")))
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        click.echo(json.dumps(seconds))
    if world_size > 1:
        torch.distributed.destroy_process_group()


# ---- training: a step of all captions at once against the loop that tutorials have


@main.command()
@click.option("--images", default=32, show_default=True, help="Images of a step, each with five captions.")
@click.option("--rounds", default=7, show_default=True, help="Steps of each kind; the median counts.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def train_step(images: int, rounds: int, as_json: bool) -> None:
    """Captions per second of the default recipe's optimizer step, against a plain loop over the positions.

    The plain loop has the same decoder, loss and optimizer, in float32; each caption has its own copy of its image's
    features, all are padded to the longest, and one position after the other goes through the decoder. Lengths are
    those of Flickr8k: 10.8 tokens in the mean, with a standard deviation of 3.8.
    """
    recipe = load_recipe("lite2-attention")
    generator = np.random.default_rng(0)
    torch.manual_seed(0)
    vocabulary_size = 2924
    decoder = build_decoder(recipe.decoder, num_channels=1280, vocabulary_size=vocabulary_size)
    features = torch.rand(images, 49, 1280)
    captions = [
        [[1, *generator.integers(4, vocabulary_size, size=length).tolist(), 2] for length in lengths]
        for lengths in np.clip(generator.normal(10.8, 3.8, size=(images, 5)).round().astype(int), 4, 22)
    ]
    batch = make_batch(features, captions, torch.device("cpu"))
    num_captions = len(batch.lengths)

    loss_of = {
        kind: float(nats.detach())
        for kind, nats in (
            ("imcap", _nats_at_once(decoder.eval(), batch)),
            ("plain", _nats_in_a_loop(decoder.eval(), batch)),
        )
    }
    assert abs(loss_of["imcap"] - loss_of["plain"]) < 0.01 * loss_of["plain"], loss_of

    optimization = Optimization(decoder, decoder, recipe.training, total_steps=10**6)
    plain = torch.optim.AdamW(decoder.parameters(), lr=1e-4)

    def plain_step() -> None:
        plain.zero_grad()
        _nats_in_a_loop(decoder.train(), batch).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        plain.step()

    seconds: dict[str, list[float]] = {"imcap": [], "plain": []}
    for _ in range(rounds + 1):  # in turn, so that whatever else the machine does falls on both; the first warms up
        for kind, step in (("imcap", lambda: optimization.step(batch)), ("plain", plain_step)):
            start = time.perf_counter()
            step()
            seconds[kind].append(time.perf_counter() - start)
    rates = {kind: [num_captions / value for value in values[1:]] for kind, values in seconds.items()}
    result = {
        "captions": num_captions,
        "threads": torch.get_num_threads(),
        "bfloat16": prefers_bfloat16(torch.device("cpu")),
        "captions_per_second": {kind: round(float(np.median(values)), 1) for kind, values in rates.items()},
        "lowest_and_highest": {kind: [round(min(values), 1), round(max(values), 1)] for kind, values in rates.items()},
        "ratio": round(float(np.median(rates["imcap"]) / np.median(rates["plain"])), 2),
    }
    if as_json:
        click.echo(json.dumps(result))
        return
    for kind, values in rates.items():
        click.echo(f"{kind}: {np.median(values):.0f} captions/s ({min(values):.0f} to {max(values):.0f})")
    click.echo(f"ratio {result['ratio']}, {result['threads']} threads")


def _nats_at_once(decoder: Decoder, batch: CaptionBatch) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=prefers_bfloat16(torch.device("cpu"))):
        logits = decoder(batch.inputs, batch.token_ids, batch.lengths, batch.image_of_caption)
    return torch.nn.functional.cross_entropy(logits.float(), batch.targets, ignore_index=PADDING_ID)


def _nats_in_a_loop(decoder: Decoder, batch: CaptionBatch) -> torch.Tensor:
    step, state = decoder.start(batch.inputs[batch.image_of_caption], 1)
    positions = []
    for position in range(batch.token_ids.shape[1]):
        log_probs, state = step(batch.token_ids[:, position : position + 1], state)
        positions.append(log_probs[:, 0])
    packed = torch.nn.utils.rnn.pack_padded_sequence(torch.stack(positions, dim=1), batch.lengths, batch_first=True)
    return torch.nn.functional.nll_loss(packed.data, batch.targets, ignore_index=PADDING_ID)


# ---- large photographs: JPEGs decoded at a reduced scale against all of their pixels


@main.command()
@click.argument("data", type=click.Path(exists=True))
@click.option("--images", default=200, show_default=True, help="Images of the validation split.")
@click.option("--model", help="Model folder. Default: the one that comes with the package.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def large_photographs(data: str, images: int, model: str | None, as_json: bool) -> None:
    """Milliseconds to decode a JPEG of 4000 x 3000 as `imcap` does and whole, and how often the captions are the same.

    The photographs are those of DATA's validation split, enlarged (bicubic) and saved at quality 90. CIDEr-D is of
    the captions of both ways, with document frequencies of these images.
    """
    captioner = Captioner.load(model)
    dataset = load_dataset(data)
    rows = dataset.split(VALIDATION).slice(0, images).to_pylist()
    milliseconds: dict[str, list[float]] = {"reduced": [], "whole": []}
    captions: dict[str, dict[str, str]] = {"reduced": {}, "whole": {}}
    for start in range(0, len(rows), COMPUTE_BATCH_SIZE):
        chunk = rows[start : start + COMPUTE_BATCH_SIZE]
        pixels: dict[str, list[np.ndarray[Any, Any]]] = {"reduced": [], "whole": []}
        for row in chunk:
            with Image.open(row["image_path"]) as small:
                stream = io.BytesIO()
                small.convert("RGB").resize((4000, 3000), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
            for way, decode in (("reduced", _decode_reduced), ("whole", _decode_whole)):
                before = time.perf_counter()
                pixels[way].append(decode(stream.getvalue(), captioner.image_size))
                milliseconds[way].append(1000 * (time.perf_counter() - before))
        for way, images_of_chunk in pixels.items():
            for row, best in zip(chunk, captioner.caption_pixels(np.stack(images_of_chunk)), strict=True):
                captions[way][row["image_id"]] = "" if isinstance(best, ImageError) else best[0].text
    same = sum(captions["reduced"][name] == text for name, text in captions["whole"].items())
    references = {row["image_id"]: row["captions"] for row in rows}
    medians = {way: float(np.median(values)) for way, values in milliseconds.items()}
    result = {
        "images": len(rows),
        "milliseconds": {way: round(value, 1) for way, value in medians.items()},
        "times_faster": round(medians["whole"] / medians["reduced"], 2),
        "same_caption": round(same / len(rows), 4),
        "same_caption_interval": [round(bound, 4) for bound in _wilson_interval(same, len(rows))],
        "cider_d": {way: round(score(texts, references).cider_d, 4) for way, texts in captions.items()},
    }
    if as_json:
        click.echo(json.dumps(result))
        return
    for name, value in result.items():
        click.echo(f"{name:22} {value}")


def _decode_reduced(data: bytes, image_size: int) -> np.ndarray[Any, Any]:
    return decode_image(data, image_size=image_size).pixels


def _decode_whole(data: bytes, image_size: int) -> np.ndarray[Any, Any]:
    with Image.open(io.BytesIO(data)) as image:
        squashed = image.convert("RGB").resize((image_size, image_size), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(squashed).transpose(2, 0, 1))


def _wilson_interval(count: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    share, spread = count / total, z**2 / total
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * (share * (1 - share) / total + spread / (4 * total)) ** 0.5
    return middle - half, middle + half


# ---- evaluate: seconds and memory of scoring many captions

NUM_WORDS = 30_000
WORDS_OF_A_SCENE = 8
CAPTIONS_AT_A_TIME = 20_000


@main.command()
@click.option("--images", default=100_000, show_default=True)
@click.option("--references", default=5, show_default=True, help="Of each image.")
@click.option("--against", is_flag=True, help="Compare with other captions too.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def evaluate(images: int, references: int, against: bool, as_json: bool) -> None:
    """Seconds and most memory of `imcap evaluate` on made-up captions, in a process of its own.

    Words are drawn with Zipf's frequencies, two of three from the scene of their image; a caption has 7 to 15. Real
    captions repeat themselves more, so they have fewer different n-grams, which are what takes memory.
    """
    with tempfile.TemporaryDirectory(prefix="imcap-evaluate-") as folder:
        write_made_up_captions(Path(folder), images, references)
        command = [sys.executable, "-m", "imcap_ray", "evaluate", "captions.parquet", "references.parquet", "--json"]
        command += ["--save", "scores", *(["--against", "others.parquet"] if against else [])]
        start = time.monotonic()
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE)
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - start
        if status:
            raise click.ClickException(f"imcap evaluate ended with status {os.waitstatus_to_exitcode(status)}")
    scores = json.loads(output)["scores"]
    result = {
        "images": images,
        "references_per_image": references,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_gib": round(usage.ru_maxrss / 2**20, 2),
        "captions_per_second": round(images / seconds),
        "cider_d": round(scores["cider_d"], 4),
        "bleu_4": round(scores["bleu_4"], 4),
    }
    if as_json:
        click.echo(json.dumps(result))
        return
    for name, value in result.items():
        click.echo(f"{name:22} {value}")


def write_made_up_captions(folder: Path, num_images: int, references: int) -> None:
    """captions.parquet, others.parquet and references.parquet of the same images."""
    generator = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = pa.array(
        sorted({"".join(generator.choice(letters, size=generator.integers(1, 9))) for _ in range(NUM_WORDS)})
    )
    frequencies = 1 / (10 + generator.permutation(len(words)))
    thresholds = np.cumsum(frequencies / frequencies.sum())

    def draw_words(shape: Any) -> np.ndarray[Any, Any]:
        return np.minimum(np.searchsorted(thresholds, generator.random(shape)), len(words) - 1).astype(np.int32)

    def draw_sentences(scenes: np.ndarray[Any, Any]) -> pa.Array:
        lengths = generator.integers(7, 16, size=len(scenes))
        image = np.repeat(np.arange(len(scenes)), lengths)
        of_scene = scenes[image, generator.integers(scenes.shape[1], size=len(image))]
        drawn = np.where(generator.random(len(image)) < 2 / 3, of_scene, draw_words(len(image)))
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
        return pc.binary_join(pa.ListArray.from_arrays(offsets, words.take(pa.array(drawn))), " ")

    schema = pa.schema([("image_id", pa.string()), ("caption", pa.string()), ("confidence", pa.float32())])
    reference_schema = pa.schema([schema.field(0), ("split", pa.string()), ("captions", pa.list_(pa.string()))])
    with (
        pq.ParquetWriter(folder / "captions.parquet", schema) as captions,
        pq.ParquetWriter(folder / "others.parquet", schema) as others,
        pq.ParquetWriter(folder / "references.parquet", reference_schema) as of_people,
    ):
        for start in range(0, num_images, CAPTIONS_AT_A_TIME):
            size = min(CAPTIONS_AT_A_TIME, num_images - start)
            image_ids = pa.array([f"{number:09}.jpg" for number in range(start, start + size)])
            scenes = draw_words((size, WORDS_OF_A_SCENE))
            for writer in (captions, others):
                confidences = pa.array(generator.random(size), pa.float32())
                writer.write(pa.record_batch([image_ids, draw_sentences(scenes), confidences], schema=schema))
            offsets = pa.array(np.arange(size + 1) * references, pa.int32())
            lists = pa.ListArray.from_arrays(offsets, draw_sentences(np.repeat(scenes, references, axis=0)))
            splits = pa.array(["test"] * size)
            of_people.write(pa.record_batch([image_ids, splits, lists], schema=reference_schema))


if __name__ == "__main__":
    main()
