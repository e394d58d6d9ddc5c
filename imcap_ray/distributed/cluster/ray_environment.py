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
from pathlib import Path
from typing import Final

from imcap_ray.distributed.cluster.memory import KEEP_FREED_MEMORY
from imcap_ray.errors import ClusterError

TOKEN_FILE: Final = Path(".ray") / "auth_token"
"""Where Ray looks for the user's token in the home folder, if no environment variable names another place."""

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
    """Set the variables for the Ray at `address`; do nothing if Ray has been imported or the user has set them.

    Args:
        address: HOST:PORT or "auto"; "local", or None without RAY_ADDRESS, means a private Ray. It gets a token that
            only this process and its children know, because Ray listens on all interfaces and runs what it is sent.
        verbose: whether Ray's own log lines are wanted.

    Raises:
        ClusterError: the user's token cannot be read.
    """
    if "ray" in sys.modules:
        return
    for name, value in (_DEFAULTS if verbose else _DEFAULTS | _QUIET).items():
        os.environ.setdefault(name, value)
    if means_own_ray(address):
        # A private Ray has one node: nothing announces the end of another one.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        os.environ.update(KEEP_FREED_MEMORY)
        if os.environ.get("RAY_AUTH_MODE", "").lower() != "disabled":
            os.environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)})
    else:
        os.environ.setdefault("RAY_AUTH_MODE", "token" if find_token() else "disabled")


def means_own_ray(address: str | None) -> bool:
    """Whether this address means a Ray that this process starts for itself."""
    return (address or os.environ.get("RAY_ADDRESS") or "local") == "local"


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
