"""An imcap command -> a Ray job on a cluster, its log and its exit code.

Talks to the cluster's dashboard over HTTP and joins no cluster itself, so it runs anywhere.
"""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import aiohttp
import ray
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

import imcap_ray
from imcap_ray.distributed.cluster import AUTHENTICATION_ADVICE, authentication_headers, environment
from imcap_ray.errors import ClusterError, ImcapError

DEFAULT_ADDRESS: Final = "http://127.0.0.1:8265"
ANSWER_TIMEOUT_SECONDS: Final = 5

# A tunnel that drops, or a dashboard that restarts, does not end the job: look again this often.
RECONNECT_ATTEMPTS: Final = 10
RECONNECT_PAUSE_SECONDS: Final = 3

LOST: Final = (RuntimeError, aiohttp.ClientError, requests.RequestException)
"""What the client raises when the dashboard is gone, or refuses."""

INTERRUPTED: Final = 130


def submit(
    command: Sequence[str],
    *,
    address: str | None,
    submission_id: str | None = None,
    follow: bool = True,
    echo: Callable[[str], None],
) -> int:
    """Run `imcap COMMAND ...` as a Ray job and return its exit code; 0 at once unless `follow`.

    The installed imcap_ray travels with the job: the cluster's nodes need what it depends on, not the package.
    `address` is the dashboard's, http://HOST:PORT; None: RAY_API_SERVER_ADDRESS, RAY_ADDRESS if it is of that form,
    or this machine's port 8265. Ctrl-C while following stops the job and returns 130, as does a job that is stopped
    by others. Raises ClusterError, within seconds, if the cluster cannot be reached or runs another Ray, and
    ImcapError if it is lost on the way.
    """
    address = _dashboard_address(address)
    headers = _preflight(address, echo)
    for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("ray._private.runtime_env").setLevel(logging.ERROR)  # it finds the package's own model large
    try:
        # The client lets this variable, and RAY_ADDRESS, override the address that it is given.
        with environment({"RAY_API_SERVER_ADDRESS": address}):
            client = JobSubmissionClient(address, headers=headers)
        job = client.submit_job(**job_request(command), submission_id=submission_id)
    except LOST as error:
        if "already exists" in str(error):
            raise ClusterError(
                f"the cluster at {address} has a job {submission_id} already: give another --submission-id"
            ) from error
        raise ClusterError(f"the cluster at {address} did not take the job: {error}") from error
    except AuthenticationError as error:
        raise ClusterError(f"RAY_AUTH_MODE=token, but there is none: {AUTHENTICATION_ADVICE}") from error
    echo(f"job {job} submitted to {address}")
    if not follow:
        return 0
    try:
        try:
            asyncio.run(_follow(client, job, echo))
        except KeyboardInterrupt:
            client.stop_job(job)
            echo(f"interrupted: job {job} is stopped, the same command resumes")
            return INTERRUPTED
        return _exit_code(client, job, echo)
    except LOST as error:
        raise ImcapError(f"lost {address}; job {job} may go on: `ray job logs --follow {job}` shows it") from error


def job_request(command: Sequence[str]) -> dict[str, Any]:
    """What a cluster is asked to run for `imcap COMMAND ...`.

    Ray hands the entry point to a shell, for which every word is quoted, and shows it to whoever sees the dashboard.
    Nothing of this machine's environment is in it: nodes have credentials of their own.
    """
    return {
        "entrypoint": shlex.join(["python", "-m", "imcap_ray", *command]),
        "runtime_env": {"py_modules": [str(Path(imcap_ray.__file__).parent)]},
    }


def _dashboard_address(address: str | None) -> str:
    cluster = os.environ.get("RAY_ADDRESS", "")
    address = (
        address
        or os.environ.get("RAY_API_SERVER_ADDRESS")
        or (cluster if cluster.startswith(("http://", "https://")) else DEFAULT_ADDRESS)
    )
    if "://" not in address:
        address = f"http://{address}"
    if not address.startswith(("http://", "https://")):
        raise ClusterError(f"expected the address of a Ray dashboard, http://HOST:PORT, got {address}")
    return address.rstrip("/")


def _preflight(address: str, echo: Callable[[str], None]) -> dict[str, str]:
    """Raise ClusterError unless the cluster can run the job; the headers that it wants to see."""
    headers: dict[str, str] = {}
    version = _get(address, "/api/version", headers)
    if version.status_code == 401:  # asks for a token; none is shown to a dashboard that does not ask
        try:
            headers = {} if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled" else authentication_headers()
        except AuthenticationError:
            headers = {}
        version = _get(address, "/api/version", headers)
    if version.status_code in (401, 403):
        found = "the token found here" if headers else "a request without a token"
        raise ClusterError(f"the cluster at {address} refused {found}: {AUTHENTICATION_ADVICE}")
    ray_version = _field(version, "ray_version")
    if ray_version is None:
        raise _no_dashboard(address)
    if ray_version != ray.__version__:
        raise ClusterError(
            f"the cluster at {address} runs Ray {ray_version}, imcap here {ray.__version__}: install the same on both"
        )
    python_version = _field(_get(address, "/api/v0/cluster_metadata", headers), "data", "pythonVersion")
    if python_version and python_version.split(".")[:2] != platform.python_version().split(".")[:2]:
        echo(f"the job will run with the cluster's Python, {python_version}; this is {platform.python_version()}")
    return headers


def _get(address: str, path: str, headers: dict[str, str]) -> requests.Response:
    try:
        return requests.get(address + path, headers=headers, timeout=ANSWER_TIMEOUT_SECONDS)
    except requests.RequestException as error:
        raise _no_dashboard(address) from error


def _no_dashboard(address: str) -> ClusterError:
    return ClusterError(
        f"no Ray dashboard answers at {address}: give its --address, "
        "or open a tunnel to it with `ray dashboard cluster.yaml`"
    )


def _field(response: requests.Response, *names: str) -> Any:
    """The value under `names` in a JSON answer, None if there is no such thing."""
    try:
        value = response.json()
        for name in names:
            value = value[name]
    except (ValueError, LookupError, TypeError):
        return None
    return value


async def _follow(client: JobSubmissionClient, job: str, echo: Callable[[str], None]) -> None:
    """Echo the job's log, each line once, until the job has ended."""
    num_seen = 0
    attempts = 0
    while True:
        num_lines = 0  # every connection starts again at the log's first line
        try:
            async for lines in client.tail_job_logs(job):
                attempts = 0
                for line in lines.splitlines():
                    num_lines += 1
                    if num_lines > num_seen:
                        echo(line)
                num_seen = max(num_seen, num_lines)
            if client.get_job_status(job).is_terminal():
                return
        except LOST:
            attempts += 1
            if attempts == RECONNECT_ATTEMPTS:
                raise
        await asyncio.sleep(RECONNECT_PAUSE_SECONDS)


def _exit_code(client: JobSubmissionClient, job: str, echo: Callable[[str], None]) -> int:
    details = client.get_job_info(job)
    if details.status == JobStatus.SUCCEEDED:
        return 0
    if details.status == JobStatus.STOPPED:
        echo(f"job {job} was stopped")
        return INTERRUPTED
    if details.driver_exit_code is None:
        echo(f"job {job} failed: {details.message}")
        return 1
    return details.driver_exit_code
