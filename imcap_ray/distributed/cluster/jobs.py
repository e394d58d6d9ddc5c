"""An imcap command -> a Ray job on a cluster, its log and its exit code.

Talks to the cluster's dashboard over HTTP without joining the cluster, so it runs anywhere. A job does not depend on
the process that follows it: if the connection breaks, another process can follow it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
import re
import secrets
import shlex
import shutil
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, cast

import aiohttp
import ray
import requests
from packaging.specifiers import SpecifierSet
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

import imcap_ray
from imcap_ray import storage
from imcap_ray.distributed.cluster.captioner_code import CaptionerCode, require_small
from imcap_ray.distributed.cluster.connection import AUTHENTICATION_ADVICE, authentication_headers
from imcap_ray.distributed.cluster.ray_environment import temporary_environment
from imcap_ray.errors import ClusterError, ImcapError

DEFAULT_ADDRESS: Final = "http://127.0.0.1:8265"

ANSWER_TIMEOUT_SECONDS: Final = 5

# A tunnel that drops, or a dashboard that restarts, does not end the job.
PATIENCE_SECONDS: Final = 600

LONGEST_PAUSE_SECONDS: Final = 30

SILENCE_SECONDS: Final = 60
"""Time without a line after which the log is requested again, because a dead connection may go unnoticed."""

LOG_ATTEMPTS: Final = 3
"""Attempts to read the end of the log of a finished job."""

LOST: Final = (ConnectionError, RuntimeError, aiohttp.ClientError, requests.RequestException)
"""Errors of the client when the dashboard is unreachable or refuses a request."""

# Lines that Ray writes at the top of every job's log. Errors from the same source are shown.
_PREAMBLE: Final = re.compile(r"(\x1b\[\d+m)*[-\d]+ [\d:,]+\s+INFO job_manager\.py:|Running entrypoint for job ")

INTERRUPTED: Final = 130

STOP: Final = "stop"

DETACH: Final = "detach"


def submit(
    command: Sequence[str],
    *,
    address: str | None,
    submission_id: str | None = None,
    need: tuple[str, float, float] | None = None,
    code: CaptionerCode | None = None,
    wait: bool = True,
    on_interrupt: str = STOP,
    echo: Callable[[str], None],
) -> int:
    """Run `imcap COMMAND ...` as a Ray job and return its exit code, or 0 at once unless `wait`.

    The installed imcap_ray is sent with the job: the cluster's nodes need its dependencies, not the package.

    Args:
        address: the dashboard's, http://HOST:PORT. None means RAY_API_SERVER_ADDRESS, RAY_ADDRESS if it has that form,
            or port 8265 of this machine.
        need: a setting, and the CPUs and GPUs that it needs at once.
        code: that of the command's captioners, whose modules are sent with the job too.

    Raises:
        ClusterError: the cluster cannot be reached or runs another Ray, reported within seconds.
        ImcapError: as `follow` raises it.
    """
    require_small(Path(imcap_ray.__file__).parent)
    dashboard = _connect(address, echo)
    if need:
        _report_shortage(dashboard, *need, echo)
    code = code or CaptionerCode()
    for note in code.notes:
        echo(note)
    job = submission_id or f"imcap-{command[0]}-{secrets.token_hex(4)}"
    try:
        with TemporaryDirectory() as folder:
            packages = [_as_package(module, Path(folder)) for module in code.modules]
            dashboard.client().submit_job(**job_request(command, packages), submission_id=job)
    except requests.RequestException as error:
        raise ImcapError(
            f"lost {dashboard.name} while submitting the job: `{dashboard.follow_command(job)}` shows whether it runs"
        ) from error
    except LOST as error:
        if "already exists" in str(error):
            raise ClusterError(
                f"the cluster at {dashboard.name} already has a job {job}: use another --submission-id, "
                f"or follow it with `{dashboard.follow_command(job)}`"
            ) from error
        raise ClusterError(f"the cluster at {dashboard.name} did not accept the job: {error}") from error
    echo(f"job {job} submitted to {dashboard.name}")
    if wait:
        return _follow(dashboard, job, on_interrupt=on_interrupt, echo=echo)
    echo(f"`{dashboard.follow_command(job)}` shows its log")
    return 0


def follow(job: str, *, address: str | None, on_interrupt: str = STOP, echo: Callable[[str], None]) -> int:
    """Echo the log of a job from its start, each line once, until the job ends. Returns its exit code.

    If the connection breaks, it is retried for ten minutes. Ctrl-C stops the job, or leaves it running if
    `on_interrupt` is `detach`, and returns 130. A job that was stopped by someone else returns 130 too.

    Raises:
        ClusterError: the cluster cannot be reached, or has no such job.
        ImcapError: the connection was lost; the job may still be running.
    """
    return _follow(_connect(address, echo), job, on_interrupt=on_interrupt, echo=echo)


def job_request(command: Sequence[str], packages: Sequence[Path] = ()) -> dict[str, Any]:
    """The request with which a cluster runs `imcap COMMAND ...`, which may import these packages.

    Ray passes the entry point to a shell, so every word is quoted, and shows it on the dashboard. The request contains
    nothing of this machine's environment, because nodes have credentials of their own.
    """
    return {
        "entrypoint": shlex.join(["python", "-m", "imcap_ray", *command]),
        "runtime_env": {"py_modules": [str(Path(imcap_ray.__file__).parent), *map(str, packages)]},
    }


def _as_package(module: Path, folder: Path) -> Path:
    """The folder of a package; that of a copy below `folder` for a module of one file, which Ray's client refuses."""
    if module.is_dir():
        return module
    package = folder / module.stem
    package.mkdir()
    shutil.copyfile(module, package / "__init__.py")
    # Ray knows a package by its files without the folder's name: a renamed module would not be sent again.
    (package / f"{module.stem}.txt").touch()
    return package


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


@dataclass(frozen=True, slots=True)
class _Dashboard:
    """The dashboard of a cluster, once it has answered."""

    address: str
    headers: dict[str, str]
    """HTTP headers for authentication."""

    @property
    def name(self) -> str:
        """The address without secrets, for messages."""
        return storage.hide_secrets(self.address)

    def client(self) -> JobSubmissionClient:
        try:
            # The client lets this variable, and RAY_ADDRESS, override the address that it is given.
            with temporary_environment({"RAY_API_SERVER_ADDRESS": self.address}):
                client = JobSubmissionClient(self.address, headers=self.headers)
        except AuthenticationError as error:
            raise ClusterError(f"RAY_AUTH_MODE is token, but there is no token: {AUTHENTICATION_ADVICE}") from error
        # The client has just configured Ray's loggers. They report uploads, and warn that the package's model is large.
        logging.getLogger("ray").setLevel(logging.ERROR)
        return client

    def describe(self, job: str) -> dict[str, Any]:
        """The job's `status`, `driver_exit_code` and `message`. Unlike Ray's client, this has a time limit."""
        answer = requests.get(f"{self.address}/api/jobs/{job}", headers=self.headers, timeout=ANSWER_TIMEOUT_SECONDS)
        if answer.status_code == 404:
            raise ClusterError(f"the cluster at {self.name} has no job {job}")
        answer.raise_for_status()
        return dict(answer.json())

    def follow_command(self, job: str) -> str:
        return f"imcap submit --address {self.name} --follow {shlex.quote(job)}"


def _connect(address: str | None, echo: Callable[[str], None]) -> _Dashboard:
    """Raise ClusterError unless the cluster can run the job."""
    address = _dashboard_address(address)
    headers: dict[str, str] = {}
    version = _get(address, "/api/version", headers)
    if version.status_code == 401:  # it wants a token, which is sent only to a dashboard that wants one
        headers = {} if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled" else authentication_headers()
        version = _get(address, "/api/version", headers)
    if version.status_code in (401, 403):
        refused = "this machine's token" if headers else "a request without a token"
        raise ClusterError(f"the cluster at {address} refused {refused}: {AUTHENTICATION_ADVICE}")
    ray_version = _field(version, "ray_version")
    if ray_version is None:
        raise _no_dashboard(address)
    if ray_version != ray.__version__:
        raise ClusterError(
            f"the cluster at {address} runs Ray {ray_version}, imcap here {ray.__version__}: install the same on both"
        )
    python_version = _field(_get(address, "/api/v0/cluster_metadata", headers), "data", "pythonVersion")
    if python_version and python_version not in SpecifierSet(metadata("imcap_ray")["Requires-Python"]):
        raise ClusterError(
            f"the cluster at {address} runs Python {python_version}, imcap needs "
            f"{metadata('imcap_ray')['Requires-Python']}: start it with another image or environment"
        )
    if python_version and python_version.split(".")[:2] != platform.python_version().split(".")[:2]:
        echo(f"the job will run with the cluster's Python, {python_version}; this is {platform.python_version()}")
    return _Dashboard(address, headers)


def _report_shortage(
    dashboard: _Dashboard, setting: str, cpus: float, gpus: float, echo: Callable[[str], None]
) -> None:
    """Report that a cluster is too small now. Only its head, where the job runs, knows whether it may grow."""
    nodes = _field(_get(dashboard.address, "/api/v0/nodes?detail=1&limit=10000", dashboard.headers), "data", "result")
    alive = [node for node in (nodes or {}).get("result", []) if node.get("state") == "ALIVE"]
    for unit, needed in (("CPU", cpus), ("GPU", gpus)):
        total = sum((node.get("resources_total") or {}).get(unit, 0) for node in alive)
        if alive and needed > total:
            echo(f"{setting} needs {needed:g} {unit}s, the cluster has {total:g} now: refused if it cannot grow")


def _get(address: str, path: str, headers: dict[str, str]) -> requests.Response:
    try:
        return requests.get(address + path, headers=headers, timeout=ANSWER_TIMEOUT_SECONDS)
    except requests.RequestException as error:
        raise _no_dashboard(address) from error


def _no_dashboard(address: str) -> ClusterError:
    return ClusterError(
        f"no Ray dashboard answers at {address}: use --address, "
        "or open a tunnel to it with `ray dashboard cluster.yaml`"
    )


def _field(response: requests.Response, *names: str) -> Any:
    """The value under `names` in a JSON response, or None if it is missing."""
    try:
        value = response.json()
        for name in names:
            value = value[name]
    except (ValueError, LookupError, TypeError):
        return None
    return value


def _follow(dashboard: _Dashboard, job: str, *, on_interrupt: str, echo: Callable[[str], None]) -> int:
    again = f"`{dashboard.follow_command(job)}` shows it again"
    echo(f"Ctrl-C {'stops it' if on_interrupt == STOP else 'leaves it running'}; {again}")
    try:
        try:
            job_info = asyncio.run(_echo_log(dashboard, job, echo))
        except KeyboardInterrupt:
            if on_interrupt == DETACH:
                echo(f"job {job} keeps running; {again}")
            else:
                dashboard.client().stop_job(job)
                echo(f"interrupted: job {job} was stopped; the same command resumes")
            return INTERRUPTED
    except LOST as error:
        raise ImcapError(f"lost {dashboard.name}; job {job} may still be running: {again}") from error
    return _exit_code(job, job_info, echo)


async def _echo_log(dashboard: _Dashboard, job: str, echo: Callable[[str], None]) -> dict[str, Any]:
    """Echo the job's log until the job has ended. Returns the dashboard's final description of the job."""
    job_info = dashboard.describe(job)
    client = dashboard.client()
    log = _Log(echo)
    num_failures, last_answer = 0, time.monotonic()
    while True:
        is_complete = False
        # Ray closes the log of a job that has just ended without its last lines: only what is read afterwards is all.
        had_ended = JobStatus(job_info["status"]).is_terminal()
        try:
            is_complete = await log.read(client, job)
            num_failures = 0
        except LOST:
            num_failures += 1
            if num_failures == 2:
                echo(f"no answer from {dashboard.name}, trying again; the job does not depend on it")
        try:
            job_info, last_answer = dashboard.describe(job), time.monotonic()
        except LOST:
            if time.monotonic() - last_answer > PATIENCE_SECONDS:
                raise
        if had_ended and (is_complete or num_failures >= LOG_ATTEMPTS):
            log.close()
            return job_info
        await asyncio.sleep(min(LONGEST_PAUSE_SECONDS, 2**num_failures))


class _Log:
    """A job's log, echoed line by line. Every connection sends it from its first character, in pieces of any size."""

    def __init__(self, echo: Callable[[str], None]) -> None:
        self._echo = echo
        self._num_seen = 0
        self._rest = ""

    async def read(self, client: JobSubmissionClient, job: str) -> bool:
        """Connect and echo new lines. Returns True at the end of the log, False if it was silent for too long."""
        position = 0
        generator = cast("AsyncGenerator[str, None]", client.tail_job_logs(job))  # Ray says AsyncIterator
        async with contextlib.aclosing(generator) as pieces:
            while True:
                try:
                    piece = await asyncio.wait_for(anext(pieces), SILENCE_SECONDS)
                except StopAsyncIteration:
                    return True
                except asyncio.TimeoutError:
                    return False
                position += len(piece)
                if position > self._num_seen:
                    self._feed(piece[-(position - self._num_seen) :])

    def close(self) -> None:
        """Echo the last line if it has no newline."""
        if self._rest:
            self._echo(self._rest)

    def _feed(self, new: str) -> None:
        self._num_seen += len(new)
        *lines, self._rest = (self._rest + new).split("\n")
        for line in lines:
            if not _PREAMBLE.match(line):
                self._echo(line)


def _exit_code(job: str, job_info: dict[str, Any], echo: Callable[[str], None]) -> int:
    code = job_info.get("driver_exit_code")
    if job_info["status"] == JobStatus.SUCCEEDED:
        return 0
    if job_info["status"] == JobStatus.STOPPED:
        echo(f"job {job} was stopped")
        return INTERRUPTED
    if code is None:
        echo(f"job {job} failed: {job_info.get('message')}")
        return 1
    return int(code) if code >= 0 else 128 - int(code)  # death by a signal, as shells report it
