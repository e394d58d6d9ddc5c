"""How a captioning run reports its speed and divides its images."""

from __future__ import annotations

import subprocess
import sys

import pytest

from imcap_ray.distributed.captioning import describe_bound
from imcap_ray.distributed.cluster.connection import ClusterResources
from imcap_ray.distributed.pipeline.image_pipeline import images_per_task
from imcap_ray.distributed.pipeline.progress import Progress


@pytest.mark.parametrize(
    ("waiting_seconds", "num_actors", "gpus", "expected"),
    [
        (
            50.0,
            4,
            0,
            "decode-bound: the model waited 50% of the time; more CPUs would help, or on these --num-actors 3",
        ),
        (50.0, 1, 0, "decode-bound: the model waited 50% of the time; more CPUs would help"),
        (50.0, 2, 1, "decode-bound: the model waited 50% of the time; more CPUs would help"),
        (5.0, 1, 0, "model-bound: the model was busy 95% of the time; --num-actors 4 would help"),
        (5.0, 4, 0, "model-bound: the model was busy 95% of the time; more CPUs would help"),
        (5.0, 1, 1, "model-bound: the model was busy 95% of the time; --num-actors 2 would help"),
        (
            *(5.0, 2, 1),
            "model-bound: the model was busy 95% of the time; more GPUs would help, or more actors on each: "
            "--gpus-per-worker 0.5",
        ),
    ],
)
def test_the_bottleneck_is_reported_with_the_option_that_would_help(
    waiting_seconds: float, num_actors: int, gpus: int, expected: str
) -> None:
    resources = ClusterResources(is_local=True, cpus=8, gpus=2 * gpus, nodes=1, physical_cores=4)
    progress = Progress({"ok": 1000}, busy_seconds=100 - waiting_seconds, waiting_seconds=waiting_seconds)

    assert describe_bound(progress, resources, num_actors, gpus) == expected


def test_more_actors_than_there_are_tasks_would_not_help() -> None:
    resources = ClusterResources(is_local=True, cpus=10, gpus=0, nodes=1, physical_cores=8)
    progress = Progress({"ok": 250}, busy_seconds=10)

    assert "--num-actors" not in describe_bound(progress, resources, 4, 0)


def test_gpus_are_suggested_only_where_there_are_some() -> None:
    progress = Progress({"ok": 1000}, busy_seconds=100)
    bounds = [
        describe_bound(progress, ClusterResources(is_local=True, cpus=6, gpus=gpus, nodes=1, physical_cores=4), 4, 0)
        for gpus in (0, 1)
    ]

    assert [bound.partition("; ")[2] for bound in bounds] == [
        "more CPUs would help",
        "more CPUs would help, or the GPUs: --gpus-per-worker 1",
    ]


@pytest.mark.parametrize("num_images", [0, 5, 199])
def test_a_run_too_short_for_a_bottleneck_is_reported_as_such(num_images: int) -> None:
    resources = ClusterResources(is_local=True, cpus=8, gpus=0, nodes=1, physical_cores=4)

    assert "too short" in describe_bound(Progress({"ok": num_images}, busy_seconds=10), resources, 1, 0)


def test_memory_that_ran_out_is_reported_however_short_the_run_was() -> None:
    resources = ClusterResources(is_local=True, cpus=8, gpus=0, nodes=1, physical_cores=4)

    assert "; memory ran out: 8 images" in describe_bound(Progress({"ok": 90}, batch_size=8), resources, 1, 0)


@pytest.mark.parametrize(
    ("num_images", "row_group", "expected"),
    [
        (1000, 256, 256),  # not a quarter of the images: three tasks of four would read two row groups
        (100_000, 256, 256),
        (1000, 1000, 250),
        (600, 256, 128),
        (1000, 10, 64),
        (1000, 0, 64),
        (0, 0, 64),
    ],
)
def test_a_task_decodes_a_row_group_or_an_equal_share_of_one(num_images: int, row_group: int, expected: int) -> None:
    assert images_per_task(num_images, cpus=4, row_group=row_group) == expected


def test_importing_captioning_imports_neither_torch_nor_nltk() -> None:
    code = "import sys, imcap_ray.distributed.captioning; print([m for m in ('torch', 'nltk') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=50)
    assert run.stdout.splitlines()[-1] == "[]"
