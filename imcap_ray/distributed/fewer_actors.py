"""Ray Data without the three actors in which it keeps what only a cluster asks for.

Each is a process that imports Ray, for half a second to a second of a core, while a pipeline's own processes start. One
counts for the dashboard; one asks for more nodes and says what there is, and until it does so no task starts; one knows
on which node each actor of a pool is. All that is used here is private to Ray, which is safe as long as the requirement
keeps to one minor version.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import ray


@contextmanager
def without_cluster_actors() -> Iterator[None]:
    """Let pipelines that run meanwhile start none of them.

    Only for a Ray of one node, with no dashboard; and for one thread at a time, for it holds in the whole process.
    """
    # Not imported above: actors come here too, and need none of it.
    from ray.data._internal.cluster_autoscaler import ClusterAutoscaler
    from ray.data._internal.execution import streaming_executor
    from ray.data._internal.execution.interfaces import ExecutionResources
    from ray.data._internal.execution.operators import actor_pool_map_operator
    from ray.data._internal.stats import _StatsManager

    total: ExecutionResources = ExecutionResources.from_resource_dict(ray.cluster_resources())  # type: ignore[no-untyped-call]

    class NothingGrows(ClusterAutoscaler):
        def try_trigger_scaling(self) -> None:
            pass

        def on_executor_shutdown(self) -> None:
            pass

        def get_total_resources(self) -> ExecutionResources:
            return total

    tracker = SimpleNamespace(update_actor_location=SimpleNamespace(remote=_ignore))
    with ExitStack() as stack:
        for owner, name, stand_in in (
            (streaming_executor, "create_cluster_autoscaler", lambda *_, **__: NothingGrows()),
            (_StatsManager, "register_dataset_to_stats_actor", _ignore),
            (_StatsManager, "update_execution_metrics", _ignore),
            (actor_pool_map_operator, "get_or_create_actor_location_tracker", lambda: tracker),
            (actor_pool_map_operator, "get_actor_locations", lambda _: {}),
        ):
            stack.enter_context(patch.object(owner, name, stand_in))
        yield


def _ignore(*_: object, **__: object) -> None:
    pass
