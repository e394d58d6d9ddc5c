"""What a training says while it runs, without Ray."""

from __future__ import annotations

import pytest
import ray

from imcap_ray.distributed.trainer import watch_room


def test_a_cluster_that_is_too_small_is_told_once_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    there: dict[str, float] = {}
    lines: list[str] = []
    monkeypatch.setattr(ray, "cluster_resources", lambda: dict(there))
    look = watch_room((2, 8), 1.0, lines.append)

    for cpus, gpus in ((3, 2), (2, 2), (2, 1), (9, 8), (3, 1), (3, 2)):
        there.update(CPU=cpus, GPU=gpus)
        look()

    assert lines == [
        "waiting for room for 2 workers: 3 CPUs needed, 2 there",
        "waiting for room for 2 workers: 2 GPUs needed, 1 there",
    ]
