"""Private Ray APIs and what is done where a version of Ray lacks them. No Ray is started."""

from __future__ import annotations

import json
import sys

import pytest
import ray

from imcap_ray.distributed.ray_internals import has_autoscaler, may_grow, spilled_bytes, train_snapshot_file


def status(*node_types: str) -> bytes:
    return json.dumps({"autoscaler_report": {"active_nodes": dict.fromkeys(node_types, 1)}}).encode()


def test_a_cluster_without_an_autoscaler_does_not_grow() -> None:
    assert not may_grow(status("node_abc", "node_def"), ["abc", "def", "123"])
    assert may_grow(status("head-group", "workers"), ["abc", "def"])
    assert may_grow(status("node_of_mine"), ["abc"])
    assert may_grow(status(), ["abc"])
    assert may_grow(b"{}", ["abc"])
    assert may_grow(b"not JSON", ["abc"])


@pytest.mark.parametrize("is_on_kubernetes", [False, True])
def test_where_ray_does_not_say_a_cluster_on_kubernetes_is_taken_to_grow(
    monkeypatch: pytest.MonkeyPatch, is_on_kubernetes: bool
) -> None:
    monkeypatch.delattr(ray._private.ray_constants, "DEBUG_AUTOSCALING_STATUS")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    if is_on_kubernetes:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")

    assert has_autoscaler() is is_on_kubernetes


def test_where_ray_has_moved_its_constant_the_snapshot_has_the_name_it_always_had(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = train_snapshot_file()
    monkeypatch.setitem(sys.modules, "ray.train.v2._internal.constants", None)
    assert train_snapshot_file() == name


def test_where_ray_does_not_tell_what_it_spilled_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray._private.internal_api", None)
    assert spilled_bytes() is None
