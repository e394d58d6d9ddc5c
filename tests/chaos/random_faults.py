"""Kill processes of captioning runs at random moments, and check that every image still becomes exactly one row.

python -m tests.chaos.random_faults --seeds 20
python -m tests.chaos.random_faults --first-seed 7 --seeds 1 --images 2000 --json

Run it in the folder of the README. The same seed chooses the same faults; the moments differ with the machine's speed.
"""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
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
from PIL import Image

from tests.chaos.recomputation import Computed, Fault, explain_recomputation
from tests.chaos.slow_run import log_folder

ROOT = Path(__file__).parents[2]
FAULTS = ("actor", "task", "index", "burst", "node", "driver", "orphan")
TASK_NAMES = ("ray::Map", "ray::Read", "ray::Write", "ray::Stream", "ray::Repart")
MAX_RESTARTS = 25
HANG_SECONDS = 300


@dataclass
class ChaosResult:
    """Counts of one or several seeds."""

    seeds: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    restarts: int = 0
    """Starts of the command after the first: its process was killed, or ended with an error."""
    errors: int = 0
    """Restarts after an error."""
    rows_expected: int = 0
    rows_lost: int = 0
    rows_duplicated: int = 0
    rows_wrong: int = 0
    """Rows that differ from those of an undisturbed run."""
    broken_files_read: int = 0
    """Times a reader met a file in the output that was not complete Parquet."""
    captions_needed: int = 0
    captions_computed: int = 0
    captions_in_flight: int = 0
    """See `Recomputation`, as for the next three."""
    captions_by_orphans: int = 0
    captions_of_copies: int = 0
    captions_unexplained: int = 0
    error_lines: list[str] = field(default_factory=list)

    def add(self, other: ChaosResult) -> None:
        """Add the counts of another result."""
        for name, value in asdict(other).items():
            if name == "faults":
                self.faults.update(other.faults)
            else:
                setattr(self, name, getattr(self, name) + value)

    @property
    def share_recomputed(self) -> float:
        """Captions computed beyond the needed ones, as a share of the needed ones."""
        return self.captions_computed / max(1, self.captions_needed) - 1

    def to_dict(self) -> dict[str, Any]:
        """The counts, ready for JSON."""
        return asdict(self) | {"faults": dict(self.faults), "share_recomputed": round(self.share_recomputed, 4)}

    def describe(self) -> str:
        """One line, and the errors below it."""
        faults = ", ".join(f"{count} {kind}" for kind, count in sorted(self.faults.items())) or "no fault"
        return (
            f"{faults}; {self.rows_lost} lost, {self.rows_duplicated} duplicated, {self.rows_wrong} wrong, "
            f"{self.broken_files_read} broken, {self.captions_computed - self.captions_needed} recomputed, "
            f"{self.captions_in_flight} in flight ({self.captions_by_orphans} by orphans), "
            f"{self.captions_of_copies} of copies, {self.captions_unexplained} unexplained"
        ) + "".join(f"\n  {line}" for line in self.error_lines)


@dataclass(frozen=True)
class Undisturbed:
    """A run in which nothing was killed, the reference for the others."""

    rows: dict[str, tuple[Any, ...]]
    """By image_id."""
    captions_computed: int
    copies: Counter[str]
    """Images with the same pixels as another one, by caption."""


@click.command()
@click.option("--seeds", default=5, show_default=True, help="Number of runs, each with other faults.")
@click.option("--first-seed", default=0, show_default=True)
@click.option("--images", default=2000, show_default=True, help="Images of a run.")
@click.option("--nodes", type=click.Choice(["1", "3", "both"]), default="both", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def main(seeds: int, first_seed: int, images: int, nodes: str, as_json: bool) -> None:
    """Kill actors, task workers, nodes and the driver of captioning runs at random moments; count lost rows.

    Each run is started again until it is done, and compared row by row with an undisturbed one of the same images. With
    --nodes both, each third run is on a simulated cluster of three nodes on this machine. A driver does not survive its
    own node.
    """
    total = ChaosResult()
    with tempfile.TemporaryDirectory(prefix="imcap-chaos-") as folder:
        source = Path(folder, "images")
        write_images(source, images)
        undisturbed = _run_undisturbed(source, Path(folder, "calm"))
        for seed in range(first_seed, first_seed + seeds):
            num_nodes = {"1": 1, "3": 3}.get(nodes) or (3 if seed % 3 == 2 else 1)
            start = time.time()
            result = _run_seed(seed, source, Path(folder, f"seed{seed}"), undisturbed, num_nodes)
            total.add(result)
            prefix = f"seed {seed}, {num_nodes} node{'s' * (num_nodes > 1)}, {time.time() - start:.0f} s: "
            click.echo(prefix + result.describe(), err=True)
    if as_json:
        click.echo(json.dumps(total.to_dict()))
        return
    for name, value in total.to_dict().items():
        click.echo(f"{name:26} {value}")


def write_images(folder: Path, count: int) -> None:
    """Write `count` small JPEGs in ten folders: one in 20 is the copy of another, one in 40 broken."""
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


# ---- runs


def _run_undisturbed(source: Path, output: Path) -> Undisturbed:
    if _start_run(source, output, num_nodes=1).wait():
        raise SystemExit("the undisturbed run failed:\n" + Path(f"{output}.log").read_text(errors="replace")[-2000:])
    rows = _read_rows(output)
    assert rows, f"no rows in {output}"
    return Undisturbed(
        rows={row["image_id"]: _comparable(row) for row in rows},
        captions_computed=_count_computed(output),
        copies=Counter(row["caption"] for row in rows if row["status"] == "duplicate"),
    )


def _run_seed(seed: int, source: Path, output: Path, undisturbed: Undisturbed, num_nodes: int) -> ChaosResult:
    """Start the run, and start it again after each fault until it is done; then compare its rows."""
    chance = random.Random(seed)
    result = ChaosResult(seeds=1)
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
    _count_rows(result, _read_rows(output), undisturbed)
    recomputation = explain_recomputation(_read_computed(output), faults, runs, undisturbed.copies)
    result.captions_computed = _count_computed(output)
    result.captions_in_flight = recomputation.in_flight
    result.captions_by_orphans = recomputation.by_orphans
    result.captions_of_copies = recomputation.copies
    result.captions_unexplained = recomputation.unexplained
    return result


def _count_rows(result: ChaosResult, rows: list[dict[str, Any]], undisturbed: Undisturbed) -> None:
    counts = Counter(row["image_id"] for row in rows)
    result.rows_expected = len(undisturbed.rows)
    result.rows_lost = len(undisturbed.rows.keys() - counts.keys())
    result.rows_duplicated = sum(counts.values()) - len(counts)
    result.rows_wrong = sum(_comparable(row) != undisturbed.rows.get(row["image_id"]) for row in rows)
    result.captions_needed = undisturbed.captions_computed


def _start_run(source: Path, output: Path, *, num_nodes: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.chaos.slow_run", str(source), str(output), str(num_nodes)]
    with open(f"{output}.log", "ab") as log:
        return subprocess.Popen(command, start_new_session=True, stdout=log, stderr=log, cwd=ROOT)


def _wait_for_work(process: subprocess.Popen[bytes], output: Path, seconds: float) -> None:
    """Wait until images are being captioned, because starting Ray takes half of the run, and then `seconds` longer."""
    known = _count_computed(output)
    deadline = time.monotonic() + 90
    while process.poll() is None and _count_computed(output) == known and time.monotonic() < deadline:
        time.sleep(0.1)
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)


def _wait_for_end(process: subprocess.Popen[bytes], output: Path) -> int | None:
    """The exit code; None if the run hangs, which is to compute and record nothing for `HANG_SECONDS`."""
    before, deadline = None, 0.0
    while process.poll() is None:
        progress = _count_computed(output), len(list(Path(output, "_imcap", "done").glob("*_??????")))
        if progress != before:
            before, deadline = progress, time.monotonic() + HANG_SECONDS
        elif time.monotonic() > deadline:
            return None
        time.sleep(0.1)
    return process.returncode


# ---- faults


def _inject(kind: str, driver: int, output: Path, chance: random.Random) -> list[Fault]:
    """Kill something of this run. Returns the faults: none if there was nothing to kill."""
    make = partial(_make_fault, kind, driver, output)
    if kind == "driver":
        return [make(driver, partial(_kill_group, driver))]
    if kind == "orphan":  # its processes work on for a moment, and their files meet those of the next start
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
    """Kill a process and describe the kill.

    The records of finished parts are listed just before, which is quick, and the parts are read afterwards. A part that
    is recorded in between counts as in flight, and so it was.
    """
    records = [path.name for path in Path(output, "_imcap", "done").glob("*_??????")]
    start = time.monotonic()
    kill()
    done: set[str] = set()
    for name in records:
        try:
            rows = pq.read_table(output / name, columns=["caption", "status"])
        except FileNotFoundError:
            continue  # a record that is pending
        done.update(rows.filter(pc.equal(rows["status"], "ok"))["caption"].to_pylist())
    return Fault(kind=kind, run=run, time=start, done=frozenset(done), killed=killed)


def _processes_of(session: int) -> dict[int, str]:
    """Command lines of the processes that this run started, without the run's own."""
    processes = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            pid = int(path.name)
            words = (path / "cmdline").read_text(errors="replace")
            if words and pid != session and os.getsid(pid) == session:  # a dead process has no words
                processes[pid] = words
        except (OSError, ProcessLookupError):
            continue
    return processes


def _kill_group(session: int) -> None:
    """Kill the run's driver and everything that it started, as when a machine loses power."""
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


# ---- reading the output


@contextmanager
def _reader(output: Path) -> Iterator[list[str]]:
    """Read the output all the time, as another user would. Yields the errors that this reader met."""
    broken: list[str] = []
    finished = threading.Event()

    def read() -> None:
        while not finished.wait(0.2):
            for path in output.glob("*.parquet"):
                try:
                    pq.read_metadata(path)
                except FileNotFoundError:
                    continue  # withdrawn between listing and reading
                except (OSError, pa.ArrowException) as error:
                    broken.append(f"{path}: {error}")

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        yield broken
    finally:
        finished.set()
        thread.join()


def _read_rows(output: Path) -> list[dict[str, Any]]:
    return [row for path in output.glob("*.parquet") for row in pq.read_table(path).to_pylist()]


def _comparable(row: dict[str, Any]) -> tuple[str, ...]:
    """All values of a row as text, because NaN differs from itself."""
    return tuple(str(value) for value in row.values())


def _count_computed(output: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in log_folder(output).glob("*"))


def _read_computed(output: Path) -> list[Computed]:
    log = []
    for path in log_folder(output).glob("*"):
        processes = tuple(int(process) for process in path.name.partition("@")[0].split("-"))
        for line in path.read_text().splitlines():
            caption, seconds = line.split()
            log.append(Computed(caption=caption, time=float(seconds), processes=processes))
    return log


if __name__ == "__main__":
    main()
