from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray

from imcap_ray.distributed.cluster.connection import ClusterResources, connect


@pytest.fixture(scope="session")
def local_ray() -> Iterator[ClusterResources]:
    """One Ray on this machine for all integration tests."""
    yield connect("local", num_actors=4)
    ray.shutdown()
