"""The versions of Ray that this package runs on, and what older ones lack."""

from __future__ import annotations

from typing import Final

import ray
from packaging.version import Version

from imcap_ray.errors import ClusterError

OLDEST: Final = Version("2.55")
"""Ray Data commits its checkpoints in two phases since then: before, a killed run could lose or double rows."""

NEWEST_TESTED: Final = Version("2.60.0")

try:
    from ray.data.exceptions import ExecutionTimeoutError as ExecutionTimeoutError
except ImportError:  # Ray 2.57 and older, which have no limit on a pipeline without progress

    class ExecutionTimeoutError(Exception):  # type: ignore[no-redef]
        """Never raised by this version of Ray."""


def require_supported_version() -> None:
    """Raise ClusterError if the installed Ray is older than what this package runs on."""
    if Version(ray.__version__) < OLDEST:
        raise ClusterError(f"expected Ray {OLDEST} or newer, got {ray.__version__}: pip install 'ray>={OLDEST}'")


def describe_untested_version() -> str:
    """A line for the log if the installed Ray is newer than the newest that was tested; otherwise empty."""
    if Version(ray.__version__) <= NEWEST_TESTED:
        return ""
    return f"Ray {ray.__version__} is newer than {NEWEST_TESTED}, the newest version that imcap was tested with"
