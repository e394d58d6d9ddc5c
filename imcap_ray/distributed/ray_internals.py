"""Every use of a private Ray API, each with a public fallback: another Ray costs a feature, never the run."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from typing import Final

import ray

AUTOSCALER_REPORT_SECONDS: Final = 15.0
"""How long to wait for the first report of an autoscaler. A head that has just started writes it after about 5 s."""


def has_autoscaler() -> bool:
    """Whether an autoscaler adds nodes to the connected cluster.

    Ray publishes this only in its internal key-value store. Where that cannot be read, a cluster on Kubernetes is taken
    to have one: a request that cannot be met then waits, and the run reports it.
    """
    try:
        from ray._private import ray_constants, worker

        key = ray_constants.DEBUG_AUTOSCALING_STATUS.encode()
        deadline = time.monotonic() + AUTOSCALER_REPORT_SECONDS
        while True:
            status = worker.global_worker.gcs_client.internal_kv_get(key, None)  # type: ignore[attr-defined]
            if not status or b'"autoscaler_report"' in status or time.monotonic() >= deadline:
                break
            time.sleep(0.5)
    except (ImportError, AttributeError, TypeError):
        return "KUBERNETES_SERVICE_HOST" in os.environ
    return bool(status) and may_grow(status, [node["NodeID"] for node in ray.nodes()])  # type: ignore[no-untyped-call]


def may_grow(status: bytes, node_ids: Sequence[str]) -> bool:
    """Whether a cluster with this autoscaling status has an autoscaler that adds nodes.

    `ray start --head` runs Ray's monitor too, which then only reports nodes: each as a type of its own, "node_ID".
    """
    try:
        types = set(json.loads(status)["autoscaler_report"]["active_nodes"])
    except (ValueError, LookupError, TypeError):
        return True
    return not types or not types <= {f"node_{node_id}" for node_id in node_ids}


def train_snapshot_file() -> str:
    """Name of the file in a training's folder in which Ray Train lists its checkpoints."""
    try:
        from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
    except ImportError:
        return "checkpoint_manager_snapshot.json"
    return str(CHECKPOINT_MANAGER_SNAPSHOT_FILENAME)


def spilled_bytes() -> int | None:
    """Bytes that the object store has spilled to disk so far; None if this version of Ray does not tell."""
    try:
        from ray._private.internal_api import get_memory_info_reply, get_state_from_address

        state = get_state_from_address(ray.get_runtime_context().gcs_address)  # type: ignore[no-untyped-call]
        return int(get_memory_info_reply(state).store_stats.spilled_bytes_total)  # type: ignore[no-untyped-call]
    except (ImportError, AttributeError, TypeError):
        return None
