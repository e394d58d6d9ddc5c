"""When a run waits for CPUs in use, and how many actors it starts on a shared cluster."""

from __future__ import annotations

import signal
import threading
import time
from math import inf

import pytest

from imcap_ray.distributed.cluster.connection import ClusterResources
from imcap_ray.distributed.cluster.free_resources import FreeResources
from imcap_ray.distributed.pipeline.contention import RoomWatch, releasable
from imcap_ray.distributed.pipeline.image_pipeline import default_num_actors
from imcap_ray.errors import FullClusterError

FULL = FreeResources(cpus=4, free_cpus=0, gpus=0, free_gpus=0).lacks(cpus=1, gpus=0)


def look(watch: RoomWatch, now: float, *, num_reports: int = 5, num_working: int = 0, lack: str = FULL) -> float:
    return watch.update(now, num_reports=num_reports, num_working=num_working, read_lack=lambda: lack)


def test_a_run_is_waiting_while_it_has_no_process_and_the_cluster_is_full() -> None:
    watch = RoomWatch()

    assert [look(watch, now) for now in (0, 1, 2, 42)] == [0, 0, 1, 41]
    assert watch.reason == "the cluster has 0 of 4 CPUs free"


@pytest.mark.parametrize(
    "life", [{"num_working": 1}, {"num_reports": 6}, {"lack": ""}], ids=["works", "reports", "room"]
)
def test_a_run_with_recent_activity_or_free_cpus_is_not_waiting(life: dict[str, object]) -> None:
    watch = RoomWatch()
    for now in (0, 1, 41):
        look(watch, now)

    assert look(watch, 42, **life) == 0  # type: ignore[arg-type]
    assert watch.reason == ""
    assert look(watch, 43) == 0


def test_missing_resources_are_reported_with_both_numbers() -> None:
    free = FreeResources(cpus=8, free_cpus=1.5, gpus=2, free_gpus=0.5)

    assert free.lacks(cpus=1, gpus=0.5) == ""
    assert free.lacks(cpus=2, gpus=0) == "the cluster has 1.5 of 8 CPUs free"
    assert free.lacks(cpus=1, gpus=1) == "the cluster has 0.5 of 2 GPUs free"


def test_another_thread_can_end_a_block_and_the_signal_handler_is_restored() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    message = "nothing can be decoded: the cluster has 0 of 4 CPUs free"
    with pytest.raises(FullClusterError, match=message), releasable() as release:
        threading.Thread(target=release, args=(FULL,)).start()
        for _ in range(500):
            time.sleep(0.01)

    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_block_outside_the_main_thread_is_not_interrupted() -> None:
    ended = []

    def run() -> None:
        with releasable() as release:
            release(FULL)
            ended.append("normally")

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert ended == ["normally"]


def shared(**changes: float) -> ClusterResources:
    values = {"cpus": 8, "gpus": 0, "nodes": 1, "physical_cores": 8, "free_cpus": 8, "free_gpus": 0} | changes
    return ClusterResources(is_local=False, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("resources", "gpus_per_actor", "num_actors"),
    [
        (shared(), 0, 6),
        (shared(free_cpus=5), 0, 3),
        (shared(free_cpus=2.5), 0, 1),
        (shared(free_cpus=0), 0, 1),
        (shared(gpus=4, free_gpus=4), 1, 4),
        (shared(gpus=4, free_gpus=1), 1, 1),
        (shared(gpus=4, free_gpus=1), 0.5, 2),
        (shared(free_cpus=0, max_cpus=64), 0, 6),  # waiting actors make an autoscaled cluster grow
        (shared(free_cpus=0, max_cpus=inf), 0, 6),
    ],
)
def test_the_number_of_actors_depends_only_on_resources_free_of_other_jobs(
    resources: ClusterResources, gpus_per_actor: float, num_actors: int
) -> None:
    assert default_num_actors(resources, gpus_per_actor) == num_actors
