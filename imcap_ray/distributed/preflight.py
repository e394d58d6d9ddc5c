"""The places a command reads and writes -> whether the cluster's nodes see them, found out before work begins.

A path that is there on the machine that asks, and on no other, is the commonest mistake with a cluster.
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
from imcap_ray.distributed.cluster import ClusterResources
from imcap_ray.distributed.image_pipeline import describe_error
from imcap_ray.errors import ClusterError, ImcapError

MAX_NODES_ASKED: Final = 16
ANSWER_SECONDS: Final = 60
"""A node that has not answered by then, for it is just starting or dying, is left to Ray."""

ADVICE: Final = "give a URI, or a path of a file system that every node mounts"


def require_visible(
    resources: ClusterResources, *, reads: Sequence[tuple[str, str]], writes: Mapping[str, str]
) -> None:
    """Raise ClusterError unless the nodes that work see what is read, and see what is written here.

    Nothing is asked where there is one node: it sees what this process sees.

    Args:
        reads: names by which the user knows them, as in `("INPUT", "s3://bucket/images")`, and absolute locations.
        writes: the same of what a command will write; it need not exist.
    """
    if resources.nodes < 2:
        return
    with _Marks(writes) as marks:
        look = ray.remote(num_cpus=0, max_retries=0)(find_problem)
        nodes = {
            look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                reads, marks.locations
            ): node["NodeManagerAddress"]
            for node in _working_nodes()[:MAX_NODES_ASKED]
        }
        answered, _ = ray.wait(list(nodes), num_returns=len(nodes), timeout=ANSWER_SECONDS) if nodes else ([], [])
        for reference in answered:
            try:
                problem = ray.get(reference)
            except (TaskUnschedulableError, WorkerCrashedError, NodeDiedError):
                continue  # the node is gone
            except RayError as error:
                problem = f"imcap cannot run: {describe_error(error)}: install on every node what imcap_ray depends on"
            if problem:
                raise ClusterError(f"on the cluster's node {nodes[reference]} {problem}")


def find_problem(reads: Sequence[tuple[str, str]], marks: Mapping[str, str]) -> str:
    """What this machine does not see, in one line; "" where it sees all.

    Args:
        reads: locations that are to exist.
        marks: files that another machine has written, or locations in a store of which nothing is known but that it
            has to answer.
    """
    for name, location in reads:
        is_there, problem = _ask(name, location)
        if problem or not is_there:
            return problem or f"{name} {location} is not there: {ADVICE}"
    for name, location in marks.items():
        is_there, problem = _ask(name, location)
        if problem or not (is_there or storage.is_uri(location)):
            return problem or f"{name}: {storage.parent(location)} is another folder than here: {ADVICE}"
    return ""


def _ask(name: str, location: str) -> tuple[bool, str]:
    try:
        return storage.exists(location), ""
    except (OSError, ImcapError) as error:
        return False, f"{name} {location} cannot be read: {storage.hide_secrets(' '.join(str(error).split()))}"


class _Marks:
    """Files in the folders that will be written to, by which another machine knows them; gone at the end.

    In a store there is nothing to tell apart, and nothing is written: its location stands for itself.
    """

    def __init__(self, writes: Mapping[str, str]) -> None:
        self.locations = {name: place if storage.is_uri(place) else _mark(place) for name, place in writes.items()}

    def __enter__(self) -> _Marks:
        for location in self._files():
            storage.write_bytes(location, b"")
        return self

    def __exit__(self, *_: object) -> None:
        for location in self._files():
            storage.remove(location)

    def _files(self) -> list[str]:
        return [location for location in self.locations.values() if not storage.is_uri(location)]


def _mark(place: str) -> str:
    """A name in the folder, which may be where a disk is mounted, or in the nearest one above it that exists."""
    while not os.path.isdir(place):
        place = os.path.dirname(place)
    return storage.join(place, f".imcap.{uuid.uuid4().hex[:8]}")  # as a killed `write_bytes` leaves it: cleaned up too


def _working_nodes() -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [node for node in nodes if node["Alive"] and node["Resources"].get("CPU")]
