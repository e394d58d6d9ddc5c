"""The environment variables that Ray reads when its module is imported and when it starts. Imports no Ray.

Ray's C++ side reads its settings once, at `import ray`. The command line therefore calls `set_ray_environment` first.
In a program that has imported Ray already, Ray keeps the settings which that program has chosen.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Final

from packaging.version import Version

from imcap_ray.distributed.cluster.memory import KEEP_FREED_MEMORY
from imcap_ray.errors import ClusterError

TOKEN_FILE: Final = Path(".ray") / "auth_token"
"""Where Ray looks for the user's token in the home folder, if no environment variable names another place."""

KUBERNETES_TOKEN_VARIABLE: Final = "RAY_ENABLE_K8S_TOKEN_AUTH"
"""If it is set, Ray finds its token in the files of a Kubernetes service account."""

_QUIET: Final = {"RAY_BACKEND_LOG_LEVEL": "fatal"}
"""Without it, Ray prints an error line for each actor pool, which nobody can do anything about (ray#53727)."""

_DEFAULTS: Final = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_USAGE_DISABLED": "1",
    # What newer versions do: leave CUDA_VISIBLE_DEVICES as it is in a process without GPUs. Older ones warn about it.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Otherwise Ray's C++ side handles SIGTERM first, with a stack trace and, on a busy machine, an abort.
    "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",
    # How often Ray Train collects its workers' reports, for which they wait at the end of an epoch. Default: 2 s.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}


def set_ray_environment(address: str | None, *, verbose: bool) -> None:
    """Set the variables for the Ray at `address`, unless Ray has been imported; see `ray_variables`."""
    if "ray" not in sys.modules:
        os.environ.update(ray_variables(address, verbose=verbose))


def ray_variables(address: str | None, *, verbose: bool) -> dict[str, str]:
    """The variables for the Ray at `address`, without those that the user has set.

    Args:
        address: HOST:PORT or "auto"; "local", or None without RAY_ADDRESS, means a private Ray. It gets a token that
            only this process and its children know, because Ray listens on all interfaces and runs what it is sent.
        verbose: whether Ray's own log lines are wanted.

    Raises:
        ClusterError: the user's token cannot be read.
    """
    defaults = _DEFAULTS if verbose else _DEFAULTS | _QUIET
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    variables: dict[str, str] = {}
    if means_own_ray(address):
        defaults = defaults | {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}  # no other node can announce its end
        variables |= KEEP_FREED_MEMORY
        if mode != "disabled":
            variables |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    elif not mode and not os.environ.get(KUBERNETES_TOKEN_VARIABLE):
        variables["RAY_AUTH_MODE"] = "token" if uses_tokens_found() and find_token() else "disabled"
    return {name: value for name, value in defaults.items() if name not in os.environ} | variables


def means_own_ray(address: str | None) -> bool:
    """Whether this address means a Ray that this process starts for itself."""
    return (address or os.environ.get("RAY_ADDRESS") or "local") == "local"


def uses_tokens_found() -> bool:
    """Whether Ray uses a token that it finds. Before 2.59 it does so only if RAY_AUTH_MODE is token, on every node."""
    return Version(version("ray")) >= Version("2.59")


def find_token() -> str:
    """The user's token for Ray clusters, from the places that Ray documents; empty if there is none.

    Raises:
        ClusterError: RAY_AUTH_TOKEN_PATH names a file that cannot be read.
    """
    token = os.environ.get("RAY_AUTH_TOKEN", "").strip()
    if token:
        return token
    if path := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        try:
            return Path(path).read_text().strip()
        except (OSError, ValueError) as error:
            raise ClusterError(
                f"cannot read the token for Ray: {error}: set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a readable file"
            ) from error
    try:
        return (Path.home() / TOKEN_FILE).read_text().strip()
    except (OSError, ValueError, RuntimeError):  # no such file, no text, or no home folder
        return ""


@contextmanager
def temporary_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables while the block runs."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
