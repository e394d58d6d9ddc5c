"""Several runs on one Ray that has too few CPUs for all of them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.malformed_images import encode, photo
from tests.ray_head import TOKEN, running_head

ROOT = Path(__file__).parents[2]
NUM_IMAGES = 800
Read = Callable[[Path], list[dict[str, Any]]]

CAPTION = """
import sys
from imcap_ray.config import CaptioningConfig, ResourcesConfig
from imcap_ray.distributed.captioning import caption_images
from imcap_ray.distributed.cluster.connection import connect
from tests.fakes import TakesSteps

address, photographs, output, num_actors = sys.argv[1:]
num_actors = int(num_actors) or None
cluster = connect(address, num_actors=num_actors)
config = CaptioningConfig(input=photographs, output=output)
summary = caption_images(config, ResourcesConfig(num_actors=num_actors), cluster=cluster, load_captioner=TakesSteps)
"""

HOLD_ALL_CPUS = """
import sys, time, ray
from pathlib import Path
ray.init(address=sys.argv[1], log_to_driver=False)
@ray.remote(num_cpus=int(sys.argv[2]))
class Holder:
    pass
holder = Holder.remote()
ray.get(holder.__ray_ready__.remote())
print("held", flush=True)
sys.stdin.readline()
"""


class SharedCluster:
    """A Ray in processes of its own, and programs that use it."""

    def __init__(self, address: str, root: Path) -> None:
        self.address = address
        self.root = root
        self.photographs = root / "photographs"
        self.photographs.mkdir()
        for number in range(NUM_IMAGES):
            data = encode(photo(20 + number % 40, 20 + number // 40), "JPEG")
            (self.photographs / f"{number:03}.jpg").write_bytes(data)

    def start(self, program: str, *words: object) -> subprocess.Popen[str]:
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"PYTHONPATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
        return subprocess.Popen(
            [sys.executable, "-uc", program, self.address, *map(str, words)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )

    def caption(self, output: Path, *, num_actors: int = 0) -> subprocess.Popen[str]:
        return self.start(CAPTION, self.photographs, output, num_actors)


@pytest.fixture
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SharedCluster]:
    with running_head(num_cpus=request.param) as (_, _, address):
        yield SharedCluster(address, tmp_path)


def test_a_token_for_a_cluster_without_tokens_is_an_error_that_names_the_variable_to_set(tmp_path: Path) -> None:
    with running_head(num_cpus=3, needs_token=False) as (_, _, address):
        output = SharedCluster(address, tmp_path).caption(tmp_path / "captions").communicate(timeout=120)[0]

    assert "If the cluster uses no token, set RAY_AUTH_MODE=disabled." in output.splitlines()[-1]


def finish(processes: list[subprocess.Popen[str]], *, seconds: float) -> list[str]:
    """Wait until all processes have succeeded, and return their output."""
    deadline = time.monotonic() + seconds
    try:
        outputs = [process.communicate(timeout=max(1.0, deadline - time.monotonic()))[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                print(process.communicate()[0])
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return outputs


def assert_complete(rows: list[dict[str, Any]]) -> None:
    expected = [(f"{number:03}.jpg", "ok") for number in range(NUM_IMAGES)]
    assert [(row["image_id"], row["status"]) for row in rows] == expected


@pytest.mark.parametrize("cluster", [4], indirect=True)
def test_a_second_run_takes_only_the_cpus_that_the_first_leaves(
    cluster: SharedCluster, tmp_path: Path, read: Read
) -> None:
    first = cluster.caption(tmp_path / "first")
    while not list((tmp_path / "first").glob("*.parquet")):  # then its actors have their CPUs
        assert first.poll() is None
        time.sleep(0.1)
    second = cluster.caption(tmp_path / "second")

    outputs = finish([first, second], seconds=200)

    assert "with 1 actor" in outputs[1]
    assert_complete(read(tmp_path / "first"))
    assert_complete(read(tmp_path / "second"))


@pytest.mark.slow
@pytest.mark.parametrize("cluster", [4], indirect=True)
def test_two_runs_whose_actors_hold_every_cpu_both_finish(cluster: SharedCluster, tmp_path: Path, read: Read) -> None:
    processes = [cluster.caption(tmp_path / name, num_actors=2) for name in ("first", "second")]

    finish(processes, seconds=600)  # which of them waits for CPUs, if any, is chance

    assert_complete(read(tmp_path / "first"))
    assert_complete(read(tmp_path / "second"))


@pytest.mark.slow
@pytest.mark.parametrize("cluster", [3], indirect=True)
def test_a_run_on_a_full_cluster_reports_that_it_waits_and_starts_when_there_is_room(
    cluster: SharedCluster, tmp_path: Path, read: Read
) -> None:
    holder = cluster.start(HOLD_ALL_CPUS, 3)
    assert holder.stdout and holder.stdin
    while (line := holder.stdout.readline()) != "held\n":
        assert line, "the holder has ended"
    started = time.monotonic()
    run = cluster.caption(tmp_path / "captions", num_actors=1)
    assert run.stdout
    while not (line := run.stdout.readline()).startswith("waiting: "):
        assert line, "the run has ended"
    reported = time.monotonic()
    holder.communicate("end\n", timeout=30)

    finish([run], seconds=120)

    assert line == "waiting: the cluster has 0 of 3 CPUs free\n"
    assert reported - started < 60
    assert_complete(read(tmp_path / "captions"))
