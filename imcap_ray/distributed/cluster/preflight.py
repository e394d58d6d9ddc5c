"""Paths and captioners that a command uses -> whether the cluster's nodes have them, checked before work begins.

A path that exists only on the machine where the command was started is the commonest mistake with a cluster.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Final

import ray
from ray.exceptions import NodeDiedError, RayError, TaskUnschedulableError, WorkerCrashedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from imcap_ray import storage
from imcap_ray.distributed.cluster.connection import ClusterResources, runtime_environment
from imcap_ray.distributed.cluster.ray_messages import describe_error
from imcap_ray.errors import ClusterError, ImcapError
from imcap_ray.models.plugin import Options, load_plugin

MAX_NODES_ASKED: Final = 16
ANSWER_SECONDS: Final = 60
"""A node that has not answered by then is not waited for, because it may be starting or dying."""

PLUGIN_ADVICE: Final = "every node must have what the captioner needs"

ADVICE: Final = "give a URI, or a path of a file system that every node mounts"


def require_visible(
    resources: ClusterResources,
    *,
    reads: Sequence[tuple[str, str]],
    writes: Mapping[str, str],
    plugins: Sequence[tuple[str, Options]] = (),
) -> None:
    """Raise ClusterError unless the cluster's nodes see everything that is read, and everything that is written here.

    A single node is asked only for plug-ins, because it sees the same files as this process, but may import others.

    Args:
        reads: pairs of a name that the user knows and an absolute location, such as `("INPUT", "s3://bucket/images")`.
        writes: the same for output locations, which need not exist.
        plugins: names and options of captioners, whose factories are called on the nodes, without their weights.
    """
    if resources.nodes < 2 and (resources.is_local or not plugins):
        return
    with Marks(writes) as marks:
        task = ray.remote(num_cpus=0, max_retries=0)(find_problem)
        environment = runtime_environment(gpus=0.0) if plugins else None
        nodes = {
            task.options(
                runtime_env=environment,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            ).remote(reads, marks.locations, plugins): node["NodeManagerAddress"]
            for node in _working_nodes()[:MAX_NODES_ASKED]
        }
        answered, _ = ray.wait(list(nodes), num_returns=len(nodes), timeout=ANSWER_SECONDS) if nodes else ([], [])
        for reference in answered:
            try:
                problem = ray.get(reference)
            except (TaskUnschedulableError, WorkerCrashedError, NodeDiedError):
                continue  # the node is lost
            except RayError as error:
                problem = f"imcap cannot run: {describe_error(error)}: install on every node what imcap_ray depends on"
            if problem:
                raise ClusterError(f"on the cluster's node {nodes[reference]} {problem}")


def find_problem(
    reads: Sequence[tuple[str, str]], marks: Mapping[str, str], plugins: Sequence[tuple[str, Options]]
) -> str:
    """What this machine does not see, in one line; "" if it sees everything.

    Args:
        reads: locations that must exist.
        marks: files that another machine has written, or locations in a store, which only has to answer.
        plugins: names and options of captioners that must load here.
    """
    for name, location in reads:
        exists, problem = _check(name, location)
        if problem or not exists:
            return problem or f"{name} {location} does not exist: {ADVICE}"
    for name, location in marks.items():
        exists, problem = _check(name, location)
        if problem or not (exists or storage.is_uri(location)):
            return problem or f"{name}: {storage.parent(location)} is another folder than on this machine: {ADVICE}"
    for name, options in plugins:
        try:
            load_plugin(name, options)
        except ImcapError as error:
            return f"{error}: {PLUGIN_ADVICE}"
    return ""


def _check(name: str, location: str) -> tuple[bool, str]:
    try:
        return storage.exists(location), ""
    except (OSError, ImcapError) as error:
        return False, f"{name} {location} cannot be read: {storage.hide_secrets(' '.join(str(error).split()))}"


class Marks:
    """Files in the folders that will be written to, by which other machines recognise them; removed at the end.

    Nothing is written to a store, because its location is the same for all machines.
    """

    def __init__(self, writes: Mapping[str, str]) -> None:
        self.locations = {name: path if storage.is_uri(path) else _mark(path) for name, path in writes.items()}

    def __enter__(self) -> Marks:
        for location in self._files():
            storage.write_bytes(location, b"")
        return self

    def __exit__(self, *_: object) -> None:
        for location in self._files():
            storage.remove(location)

    def _files(self) -> list[str]:
        return [location for location in self.locations.values() if not storage.is_uri(location)]


def _mark(path: str) -> str:
    """A file name in the folder, which may be where a disk is mounted, or in the nearest parent that exists."""
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    # Named like a temporary file of `write_bytes`, so that it is removed if this process is killed.
    return storage.join(path, f".imcap.{uuid.uuid4().hex[:8]}")


def _working_nodes() -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node for node in nodes if node["Alive"] and node["Resources"].get("CPU")]
