"""Private Ray APIs and the fallbacks for versions of Ray without them. No Ray is started."""

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
def test_if_ray_does_not_report_it_a_kubernetes_cluster_is_assumed_to_autoscale(
    monkeypatch: pytest.MonkeyPatch, is_on_kubernetes: bool
) -> None:
    monkeypatch.delattr(ray._private.ray_constants, "DEBUG_AUTOSCALING_STATUS")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    if is_on_kubernetes:
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")

    assert has_autoscaler() is is_on_kubernetes


def test_if_ray_moved_its_constant_the_snapshot_keeps_its_usual_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = train_snapshot_file()
    monkeypatch.setitem(sys.modules, "ray.train.v2._internal.constants", None)
    assert train_snapshot_file() == name


def test_spilled_bytes_are_unknown_if_ray_does_not_report_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray._private.internal_api", None)
    assert spilled_bytes() is None
