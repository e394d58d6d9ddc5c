"""Checks, before work begins, that PyTorch can use the GPUs of a cluster's nodes."""

from __future__ import annotations

from typing import Final

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from imcap_ray.errors import ImcapError

ANSWER_SECONDS: Final = 60.0
"""How long a node may take to answer. A node whose GPUs are all busy does not answer and is not checked."""


@ray.remote(num_cpus=0, max_retries=0)
def _check() -> None:
    from imcap_ray.models.devices import require_cuda

    require_cuda()


def require_gpus(gpus: float) -> None:
    """Raise ImcapError if PyTorch cannot use the GPUs of a live node.

    Ray Train would try several times to connect workers without CUDA, and its error does not mention drivers.

    Args:
        gpus: GPUs of a worker.
    """
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU", 0.0) >= gpus]  # type: ignore[no-untyped-call]
    answers = {}
    for node in nodes:
        on_node = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        answers[_check.options(num_gpus=gpus, scheduling_strategy=on_node).remote()] = node["NodeManagerHostname"]
    ready, pending = ray.wait([*answers], num_returns=len(answers), timeout=ANSWER_SECONDS) if answers else ([], [])
    for answer in pending:
        ray.cancel(answer)
    for answer in ready:
        try:
            ray.get(answer)
        except RayTaskError as error:
            if isinstance(error.cause, ImcapError):
                raise ImcapError(f"{answers[answer]}: {error.cause}") from error
            raise ImcapError(f"{answers[answer]}: its GPUs could not be checked: {error.cause}") from error
        except RayError:
            continue  # the node has died in the meantime
