"""Which versions of Ray are refused, and which are reported. No Ray is started."""

from __future__ import annotations

import pytest
import ray

from imcap_ray.distributed.cluster.ray_versions import (
    NEWEST_TESTED,
    OLDEST,
    describe_untested_version,
    require_supported_version,
)
from imcap_ray.errors import ClusterError


@pytest.mark.parametrize("version", ["2.54.1", "2.9.3", "1.13.0"])
def test_an_older_ray_is_refused_with_both_versions(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(ray, "__version__", version)

    with pytest.raises(ClusterError) as caught:
        require_supported_version()

    assert str(OLDEST) in str(caught.value) and version in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("version", ["2.55.0", "2.55.1", "2.60.0", "2.100.0", "3.0.0.dev0"])
def test_a_supported_or_newer_ray_runs(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(ray, "__version__", version)

    require_supported_version()


@pytest.mark.parametrize(("version", "is_reported"), [("2.55.1", False), (str(NEWEST_TESTED), False), ("2.61.0", True)])
def test_a_ray_newer_than_the_tested_versions_is_reported(
    monkeypatch: pytest.MonkeyPatch, version: str, is_reported: bool
) -> None:
    monkeypatch.setattr(ray, "__version__", version)

    line = describe_untested_version()

    assert (version in line and str(NEWEST_TESTED) in line) if is_reported else line == ""
