"""Captioning runs whose processes are killed, and clusters that nodes join and leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from tests.hang_guard import HANG_SECONDS, TIMEOUT_SECONDS
from tests.malformed_images import encode, photo

NUM_IMAGES = 2000
NUM_IMAGES_OF_NODES = 24 * 64
"""24 blocks: more than the actors of one node can hold at a time, which is four CPUs times four blocks."""
ROOT = Path(__file__).parents[2]
Read = Callable[[Path], list[dict[str, Any]]]

CAPTION_ON_NODES = """
import sys
from functools import partial
from imcap_ray.config import CaptioningConfig, ResourcesConfig
from imcap_ray.distributed.captioning import caption_images
from imcap_ray.distributed.cluster.connection import connect
from imcap_ray.runs.progress_reporter import ProgressReporter
from tests.fakes import WaitsForFiles

address, photographs, output, nodes, num_files = sys.argv[1:]
captioner = partial(WaitsForFiles, folder=nodes, num_files=int(num_files))
reporter = ProgressReporter(partial(print, flush=True))
config = CaptioningConfig(input=photographs, output=output)
caption_images(config, ResourcesConfig(), cluster=connect(address), load_captioner=captioner, reporter=reporter)
"""


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_every_image_is_one_row_after_any_kill(seed: int) -> None:
    options = ["--first-seed", str(seed), "--seeds", "1", "--images", str(NUM_IMAGES), "--json"]

    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos.random_faults", *options],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS["chaos"] - 50,
        cwd=ROOT,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["rows_expected"] == NUM_IMAGES
    assert sum(result["faults"].values()) >= 1, done.stderr
    for name in ("rows_lost", "rows_duplicated", "rows_wrong", "broken_files_read"):
        assert result[name] == 0, done.stderr
    # Nothing is recomputed beyond the blocks in flight: `explain_recomputation` has the derivation.
    assert result["captions_unexplained"] == 0, done.stderr
    recomputed = result["captions_computed"] - result["captions_needed"]
    assert recomputed <= result["captions_in_flight"] + result["captions_of_copies"], done.stderr


@dataclass(frozen=True)
class Nodes:
    """A cluster of nodes with CPUs, and a run whose captioners wait until `num_files` nodes have left a file each."""

    cluster: Cluster
    root: Path

    def start(self, *, num_files: int) -> subprocess.Popen[str]:
        (self.root / "photographs").mkdir()
        for number in range(NUM_IMAGES_OF_NODES):
            data = encode(photo(20 + number % 32, 20 + number // 32), "JPEG")
            (self.root / "photographs" / f"{number:04}.jpg").write_bytes(data)
        (self.root / "nodes").mkdir()
        folders = [self.root / name for name in ("photographs", "captions", "nodes")]
        words = [self.cluster.address, *folders, num_files]
        return subprocess.Popen(
            [sys.executable, "-c", CAPTION_ON_NODES, *map(str, words)], stdout=subprocess.PIPE, text=True
        )

    def captioning_nodes(self) -> set[str]:
        """Ids of the nodes that have received images to caption."""
        return {path.name for path in (self.root / "nodes").iterdir()}


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        yield Nodes(cluster, tmp_path)
    finally:
        cluster.shutdown()


def assert_complete(rows: list[dict[str, Any]]) -> None:
    names = [f"{number:04}.jpg" for number in range(NUM_IMAGES_OF_NODES)]
    assert [(row["image_id"], row["status"]) for row in rows] == [(name, "ok") for name in names]


@pytest.mark.slow
def test_a_node_that_joins_also_captions(nodes: Nodes, read: Read) -> None:
    first = nodes.cluster.add_node(num_cpus=4)
    process = nodes.start(num_files=2)
    assert process.stdout
    begun = process.stdout.readline()

    joined = nodes.cluster.add_node(num_cpus=4)
    process.communicate(timeout=TIMEOUT_SECONDS["chaos"] - 50)

    assert begun == f"captioning {NUM_IMAGES_OF_NODES:,} of {NUM_IMAGES_OF_NODES:,} images with 2 actors\n"
    assert process.returncode == 0
    assert nodes.captioning_nodes() == {first.node_id, joined.node_id}
    assert_complete(read(nodes.root / "captions"))


@pytest.mark.slow
def test_a_node_that_never_returns_leaves_work_and_cpus_to_the_others(
    nodes: Nodes, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S", "20")
    two = [nodes.cluster.add_node(num_cpus=4) for _ in range(2)]
    process = nodes.start(num_files=3)
    deadline = time.monotonic() + HANG_SECONDS
    while len(nodes.captioning_nodes()) < len(two):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)

    nodes.cluster.remove_node(two[1], allow_graceful=False)
    (nodes.root / "nodes" / "go on").touch()
    output, _ = process.communicate(timeout=TIMEOUT_SECONDS["chaos"] - HANG_SECONDS - 50)

    assert process.returncode == 0, output
    assert output.startswith(f"captioning {NUM_IMAGES_OF_NODES:,} of {NUM_IMAGES_OF_NODES:,} images with 6 actors\n")
    assert_complete(read(nodes.root / "captions"))


@pytest.mark.slow
def test_captioning_spreads_over_four_nodes(nodes: Nodes, read: Read) -> None:
    four = [nodes.cluster.add_node(num_cpus=2) for _ in range(4)]

    process = nodes.start(num_files=len(four))  # no image is captioned before every node has received one
    output, _ = process.communicate(timeout=TIMEOUT_SECONDS["chaos"] - 50)

    assert process.returncode == 0
    assert output.startswith(f"captioning {NUM_IMAGES_OF_NODES:,} of {NUM_IMAGES_OF_NODES:,} images with 6 actors\n")
    assert nodes.captioning_nodes() == {node.node_id for node in four}
    assert_complete(read(nodes.root / "captions"))
