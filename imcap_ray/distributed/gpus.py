"""Asks the nodes of a cluster whether PyTorch can use their GPUs, before work begins."""

from __future__ import annotations

from typing import Final

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from imcap_ray.errors import ImcapError

ANSWER_SECONDS: Final = 60.0
"""How long a node may take to answer; one whose GPUs are all busy is not asked."""


@ray.remote(num_cpus=0, max_retries=0)
def _look() -> None:
    from imcap_ray.models.devices import require_cuda

    require_cuda()


def require_gpus(gpus: float) -> None:
    """Raise ImcapError if PyTorch cannot use the GPUs of a node that is there.

    Ray Train would try several times to connect workers that have no CUDA, and its error says nothing of drivers.

    Args:
        gpus: of a worker.
    """
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU", 0.0) >= gpus]  # type: ignore[no-untyped-call]
    answers = {}
    for node in nodes:
        here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        answers[_look.options(num_gpus=gpus, scheduling_strategy=here).remote()] = node["NodeManagerHostname"]
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
            continue  # a node that has gone meanwhile
