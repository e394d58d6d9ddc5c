"""Trainings whose worker, driver or node is killed, or whose files are corrupted: the metrics stay the same."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from ray.cluster_utils import Cluster

from tests import small_data
from tests.hang_guard import HANG_SECONDS, TIMEOUT_SECONDS

# A test's own time, without the undisturbed training's.
pytestmark = pytest.mark.timeout(TIMEOUT_SECONDS["chaos"], func_only=True)

EPOCHS: Final = 24
EPOCHS_ON_TWO_NODES: Final = 8
SETTINGS: Final = small_data.TINY_TRAINING | {
    "decoder.dropout": 0.3,
    "training.learning_rate": 2e-2,
    "training.warmup_steps": 10,
    "training.ema_decay": 0.8,
    "training.epochs": EPOCHS,
    "training.patience": 0,
}


@dataclass(frozen=True)
class Workplace:
    """A folder for the trainings of this file, with one data set and one cache of features."""

    root: Path

    def command(self, name: str, *options: str) -> list[str]:
        command = [sys.executable, "-m", "imcap_ray", "train", str(self.root / "flickr8k"), str(self.root / name)]
        command += [f"--features={self.root / 'features'}"]
        return [*command, *(f"--set={name}={value}" for name, value in SETTINGS.items()), *options]

    def run(self, name: str) -> str:
        """Train to the end and return the output."""
        with self.running(name) as process:
            return self.finish(name, process)

    def finish(self, name: str, process: subprocess.Popen[bytes]) -> str:
        """Wait for the end of a training and return its output."""
        wait_until(lambda: process.poll() is not None, lambda: self.output(name))
        assert process.returncode == 0, self.output(name)
        return self.output(name)

    @contextlib.contextmanager
    def running(self, name: str, *options: str, report_seconds: float = 0.2) -> Iterator[subprocess.Popen[bytes]]:
        """Start a training in a process group of its own, and kill the group afterwards.

        Args:
            report_seconds: time in which Ray Train accepts one report; its default is two seconds.
        """
        environment = os.environ | {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(report_seconds)}
        with open(self.root / f"{name}.log", "wb") as log:
            process = subprocess.Popen(
                self.command(name, *options), env=environment, start_new_session=True, stdout=log, stderr=log
            )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def output(self, name: str) -> str:
        """The output of the newest process of this training, so far."""
        return (self.root / f"{name}.log").read_text()

    def epochs(self, name: str) -> list[dict[str, Any]]:
        """The metrics so far, without durations."""
        path = self.root / name / "_training" / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [{key: value for key, value in row.items() if not key.endswith("seconds")} for row in rows]

    def wait_for_epoch(self, name: str, epoch: int, process: subprocess.Popen[bytes]) -> None:
        wait_until(lambda: len(self.epochs(name)) >= epoch or process.poll() is not None, lambda: self.output(name))
        assert process.poll() is None, self.output(name)

    def wait_for_workers(self, name: str, count: int, process: subprocess.Popen[bytes]) -> None:
        """Wait until an epoch has been trained by `count` workers."""
        wait_until(
            lambda: process.poll() is not None or [row["num_workers"] for row in self.epochs(name)][-1:] == [count],
            lambda: self.output(name),
        )
        assert process.poll() is None, self.output(name)

    def weights(self, name: str) -> bytes:
        return (self.root / name / "model.safetensors").read_bytes()


def wait_until(condition: Callable[[], object], explain: Callable[[], str], *, seconds: float = HANG_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {explain()}"
        time.sleep(0.02)


def train_workers_below(pid: int) -> list[int]:
    """Ids of Ray Train's worker processes among this process's descendants."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()]
    family = {pid}
    while more := {int(row[0]) for row in rows if int(row[1]) in family} - family:
        family |= more
    return [int(row[0]) for row in rows if int(row[0]) in family and "RayTrainWorker" in row[2]]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    workplace = Workplace(tmp_path_factory.mktemp("trainings"))
    small_data.write_flickr8k(workplace.root / "flickr8k", num_train=12, num_validation=4)
    return workplace


@pytest.fixture(scope="module")
def undisturbed(workplace: Workplace) -> str:
    """Name of a training that was not disturbed."""
    workplace.run("undisturbed")
    assert len({row["bleu_1"] for row in workplace.epochs("undisturbed")}) > 2, "the epochs do not differ"
    return "undisturbed"


def test_a_killed_worker_a_killed_driver_and_corrupt_files_do_not_change_the_result(
    workplace: Workplace, undisturbed: str
) -> None:
    with workplace.running("disturbed") as process:
        workplace.wait_for_epoch("disturbed", 3, process)
        [first] = train_workers_below(process.pid)
        os.kill(first, signal.SIGKILL)
        killed_after = len(workplace.epochs("disturbed"))
        workplace.wait_for_epoch("disturbed", killed_after + 3, process)
        [second] = train_workers_below(process.pid)
        # The worker too, because it would outlive its driver by seconds, in which it may train to the end.
        os.kill(second, signal.SIGSTOP)
        os.killpg(process.pid, signal.SIGKILL)
        os.kill(second, signal.SIGKILL)
        process.wait()
        wait_until(lambda: not is_alive(second), lambda: f"worker {second} is alive")
    work = workplace.root / "disturbed" / "_training"
    assert len(workplace.epochs("disturbed")) < EPOCHS
    newest = max((work / "ray").glob("epoch_*/training_state.pt")).parent
    for damaged in (newest / "training_state.pt", work / "ray" / "checkpoint_manager_snapshot.json"):
        os.truncate(damaged, damaged.stat().st_size // 2)
    os.truncate(work / "metrics.jsonl", (work / "metrics.jsonl").stat().st_size - 9)

    output = workplace.run("disturbed")

    assert f"checkpoint {newest}: training_state.pt is not what was written" in output, output
    assert "resuming after epoch" in output
    assert workplace.epochs("disturbed") == workplace.epochs(undisturbed)
    assert workplace.weights("disturbed") == workplace.weights(undisturbed)


@pytest.mark.slow
def test_a_training_on_two_nodes_survives_the_loss_of_one(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        nodes = [cluster.add_node(num_cpus=3) for _ in range(2)]
        options = [f"--address={cluster.address}", "--num-workers=2", f"--set=training.epochs={EPOCHS_ON_TWO_NODES}"]
        with workplace.running("node", *options) as process:
            workplace.wait_for_epoch("node", 2, process)
            lost = next(node for node in nodes if train_workers_below(raylet_of(node)))
            cluster.remove_node(lost, allow_graceful=False)
            killed_after = len(workplace.epochs("node"))
            workplace.finish("node", process)
    finally:
        cluster.shutdown()

    assert killed_after < EPOCHS_ON_TWO_NODES
    assert [row["epoch"] for row in workplace.epochs("node")] == list(range(1, EPOCHS_ON_TWO_NODES + 1))


@pytest.mark.slow
def test_a_training_continues_with_fewer_workers_and_uses_a_node_that_joins(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        options = [f"--address={cluster.address}", "--num-workers=1-2", "--set=training.epochs=1000"]
        # An epoch every two seconds: Ray checks once a minute whether there is room for more workers.
        with workplace.running("elastic", *options, report_seconds=2.0) as process:
            workplace.wait_for_workers("elastic", 2, process)
            lost = next(node for node in nodes if train_workers_below(raylet_of(node)))
            cluster.remove_node(lost, allow_graceful=False)
            workplace.wait_for_workers("elastic", 1, process)
            cluster.add_node(num_cpus=1)
            workplace.wait_for_workers("elastic", 2, process)
    finally:
        cluster.shutdown()

    rows = workplace.epochs("elastic")
    assert [row["epoch"] for row in rows] == list(range(1, len(rows) + 1))
    assert [count for count, _ in itertools.groupby(row["num_workers"] for row in rows)] == [2, 1, 2]


def raylet_of(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)
