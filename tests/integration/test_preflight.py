"""The nodes of a real Ray are probed for access to input and output."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from imcap_ray.distributed.cluster.connection import ClusterResources
from imcap_ray.distributed.cluster.preflight import require_visible
from imcap_ray.errors import ClusterError


def test_all_nodes_are_probed_and_the_first_without_access_is_named(
    local_ray: ClusterResources, tmp_path: Path
) -> None:
    several = replace(local_ray, nodes=2)  # with one there would be nothing to ask
    output = {"OUTPUT": str(tmp_path / "out")}

    require_visible(several, reads=[("INPUT", str(tmp_path))], writes=output)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ClusterError, match=r"on the cluster's node [\d.]+ --model /no/such/model does not exist"):
        require_visible(several, reads=[("INPUT", str(tmp_path)), ("--model", "/no/such/model")], writes=output)
