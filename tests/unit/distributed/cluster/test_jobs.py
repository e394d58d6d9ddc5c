"""What is sent to a cluster, tested without one; the rest is in tests/integration."""

from __future__ import annotations

import asyncio
import platform
import shlex
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from aiohttp import web
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from imcap_ray.cli.main import main
from imcap_ray.cli.submit import _with_absolute_paths
from imcap_ray.distributed.cluster import jobs
from imcap_ray.distributed.cluster.jobs import job_request
from imcap_ray.errors import ClusterError, ImcapError

HOSTILE = [
    "a b",
    "it's",
    '"quoted"',
    "$(touch pwned)",
    "`id`",
    "; rm -rf ~",
    "&& x",
    "| y",
    "two\nlines",
    "*",
    "",
    "\\",
]


@pytest.mark.parametrize("word", HOSTILE)
def test_a_shell_passes_a_hostile_argument_unchanged(word: str) -> None:
    request = job_request(["caption", word, f"--model={word}"])

    assert shlex.split(request["entrypoint"]) == ["python", "-m", "imcap_ray", "caption", word, f"--model={word}"]


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"))))
def test_any_arguments_arrive_unchanged(words: list[str]) -> None:
    assert shlex.split(job_request(words)["entrypoint"])[3:] == words


def test_a_job_receives_nothing_of_the_local_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN", "HF_TOKEN"):
        monkeypatch.setenv(name, "planted")

    request = job_request(["caption", "s3://bucket/images", "s3://bucket/captions"])

    assert set(request) == {"entrypoint", "runtime_env"}
    assert set(request["runtime_env"]) == {"py_modules"}
    assert "planted" not in repr(request)


# ---- following a job whose dashboard comes and goes


LOG = "first\nsecond is cut in the middle\n\nümlaut\nlast without an end"


class Dashboard:
    """Responds like the dashboard of Ray. Each log connection sends some of the pieces and ends as configured."""

    def __init__(
        self,
        *connections: tuple[int, str],
        details: dict[str, Any],
        ends_during: int | None = None,
        ray_version: str = ray.__version__,
        python_version: str = platform.python_version(),
    ) -> None:
        self.num_connections = 0
        self._connections = connections
        self._details = details
        self._ends_during = ends_during or len(connections)
        self._versions = ray_version, python_version

    async def version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "4", "ray_version": self._versions[0], "ray_commit": ""})

    async def nodes(self, request: web.Request) -> web.Response:
        nodes = [{"state": state, "resources_total": {"CPU": 4.0}} for state in ("ALIVE", "ALIVE", "DEAD")]
        return web.json_response({"result": True, "data": {"result": {"total": 3, "result": nodes}}})

    async def metadata(self, request: web.Request) -> web.Response:
        return web.json_response({"data": {"pythonVersion": self._versions[1]}})

    async def job(self, request: web.Request) -> web.Response:
        if request.match_info["job"] != "known":
            raise web.HTTPNotFound
        if self.num_connections and self._connections[0][1] == "away":
            raise web.HTTPInternalServerError
        has_ended = self.num_connections >= self._ends_during
        return web.json_response(self._details | ({} if has_ended else {"status": "RUNNING"}))

    async def log(self, request: web.Request) -> web.WebSocketResponse:
        num_characters, end = self._connections[min(self.num_connections, len(self._connections) - 1)]
        self.num_connections += 1
        if end in ("refuse", "away"):
            raise web.HTTPInternalServerError
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        size = 3 + self.num_connections  # pieces differ from connection to connection
        for start in range(0, num_characters, size):
            await socket.send_str(LOG[start : min(start + size, num_characters)])
        if end == "cut":
            assert request.transport is not None
            request.transport.abort()
        elif end == "silent":
            await asyncio.sleep(30)
        return socket


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Dashboard], str]]:
    """Run a dashboard in a thread and return its address."""
    monkeypatch.setattr(jobs, "LONGEST_PAUSE_SECONDS", 0.01)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    runners = []

    async def start(dashboard: Dashboard) -> int:
        app = web.Application()
        app.router.add_get("/api/version", dashboard.version)
        app.router.add_get("/api/v0/cluster_metadata", dashboard.metadata)
        app.router.add_get("/api/v0/nodes", dashboard.nodes)
        app.router.add_get("/api/jobs/{job}", dashboard.job)
        app.router.add_get("/api/jobs/{job}/logs/tail", dashboard.log)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        runners.append(runner)
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return runner.addresses[0][1]

    def serve(dashboard: Dashboard) -> str:
        return f"http://127.0.0.1:{asyncio.run_coroutine_threadsafe(start(dashboard), loop).result()}"

    yield serve
    for runner in runners:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


def lines_of(address: str, job: str = "known") -> tuple[int, list[str]]:
    """Return the exit code and the output after the first line, which says how to follow the job."""
    lines: list[str] = []
    code = jobs.follow(job, address=address, echo=lines.append)
    assert f"imcap submit --address {address} --follow {job}" in lines[0]
    return code, lines[1:]


SUCCEEDED = {"status": "SUCCEEDED", "driver_exit_code": 0}


@pytest.mark.parametrize(
    "connections",
    [
        [(len(LOG), "close")],
        [(8, "cut"), (30, "cut"), (20, "close"), (len(LOG), "close")],
        [(8, "refuse"), (len(LOG), "close")],
    ],
    ids=["undisturbed", "cut and closed in the middle of lines", "refused at first"],
)
def test_every_log_line_is_printed_once_despite_connection_failures(
    serve: Callable[[Dashboard], str], connections: list[tuple[int, str]]
) -> None:
    address = serve(Dashboard(*connections, details=SUCCEEDED))

    code, lines = lines_of(address)

    assert code == 0
    assert [line for line in lines if "answer" not in line] == LOG.split("\n")


def test_ray_output_before_the_job_begins_is_omitted(
    serve: Callable[[Dashboard], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = "captioning 9 of 9 images with 1 actor\nINFO: a photograph is named so"
    theirs = (
        "2026-11-25 23:06:30,945\tINFO job_manager.py:581 -- Runtime env is setting up.\n"
        "Running entrypoint for job known: python -m imcap_ray caption in out\n"
    )
    monkeypatch.setitem(globals(), "LOG", theirs + ours)

    code, lines = lines_of(serve(Dashboard((len(LOG), "close"), details=SUCCEEDED)))

    assert (code, lines) == (0, ours.split("\n"))


def test_a_long_silent_connection_is_reopened(
    serve: Callable[[Dashboard], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "SILENCE_SECONDS", 0.3)
    address = serve(Dashboard((10, "silent"), (len(LOG), "close"), details=SUCCEEDED))

    assert lines_of(address) == (0, LOG.split("\n"))


def test_last_lines_missing_from_a_log_that_was_read_while_the_job_ended_are_echoed(
    serve: Callable[[Dashboard], str],
) -> None:
    dashboard = Dashboard((10, "close"), (len(LOG), "close"), details=SUCCEEDED, ends_during=1)

    assert lines_of(serve(dashboard)) == (0, LOG.split("\n"))


def test_the_exit_code_of_a_finished_job_is_known_without_its_log(serve: Callable[[Dashboard], str]) -> None:
    dashboard = Dashboard((5, "cut"), details={"status": "FAILED", "driver_exit_code": 3})

    code, lines = lines_of(serve(dashboard))

    assert (code, lines[-1]) == (3, "first"[: len(lines[-1])])
    assert dashboard.num_connections == jobs.LOG_ATTEMPTS


@pytest.mark.parametrize(
    ("details", "code"),
    [
        ({"status": "SUCCEEDED", "driver_exit_code": 0}, 0),
        ({"status": "FAILED", "driver_exit_code": 2}, 2),
        ({"status": "FAILED", "driver_exit_code": -9}, 137),
        ({"status": "FAILED", "driver_exit_code": None, "message": "the runtime environment"}, 1),
        ({"status": "STOPPED", "driver_exit_code": None}, 130),
    ],
)
def test_the_exit_code_is_that_of_the_job(
    serve: Callable[[Dashboard], str], details: dict[str, Any], code: int
) -> None:
    assert lines_of(serve(Dashboard((len(LOG), "close"), details=details)))[0] == code


def test_a_missing_job_is_reported(serve: Callable[[Dashboard], str]) -> None:
    with pytest.raises(ClusterError, match="has no job unknown"):
        lines_of(serve(Dashboard((0, "close"), details=SUCCEEDED)), "unknown")


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ({"ray_version": "2.59.0"}, f"runs Ray 2.59.0, imcap here {ray.__version__}: install the same on both"),
        ({"python_version": "3.8.20"}, r"runs Python 3.8.20, imcap needs >=3.10.*: start it with another image"),
    ],
)
def test_a_cluster_of_other_versions_is_refused_before_anything_is_sent(
    serve: Callable[[Dashboard], str], versions: dict[str, str], message: str
) -> None:
    address = serve(Dashboard((len(LOG), "close"), details=SUCCEEDED, **versions))

    with pytest.raises(ClusterError, match=message):
        jobs.submit(["demo"], address=address, echo=lambda line: None)


def test_another_supported_python_version_is_reported(serve: Callable[[Dashboard], str]) -> None:
    lines: list[str] = []
    address = serve(Dashboard((len(LOG), "close"), details=SUCCEEDED, python_version="3.99.1"))

    assert jobs.follow("known", address=address, echo=lines.append) == 0
    assert lines[0] == f"the job will run with the cluster's Python, 3.99.1; this is {platform.python_version()}"


def test_a_cluster_that_is_currently_too_small_is_reported_before_anything_is_sent(
    serve: Callable[[Dashboard], str],
) -> None:
    lines: list[str] = []
    address = serve(Dashboard((len(LOG), "close"), details=SUCCEEDED))

    for need in (("--num-actors 6", 8, 0), ("--num-actors 9", 11, 9)):
        with pytest.raises(ClusterError, match="did not accept the job"):  # this one takes none
            jobs.submit(["demo"], address=address, need=need, echo=lines.append)

    end = "now: refused if it cannot grow"
    assert lines == [
        f"--num-actors 9 needs 11 CPUs, the cluster has 8 {end}",
        f"--num-actors 9 needs 9 GPUs, the cluster has 0 {end}",
    ]


def test_an_unreachable_dashboard_ends_the_command_with_how_to_follow_the_job(
    serve: Callable[[Dashboard], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "PATIENCE_SECONDS", 0.2)
    dashboard = Dashboard(*[(0, "away")] * 1000, details=SUCCEEDED)

    with pytest.raises(ImcapError, match=r"job known may .*: `imcap submit --address .* --follow known`") as raised:
        lines_of(serve(dashboard))
    assert raised.value.exit_code == 1


def test_local_paths_are_made_absolute_for_a_job_and_nothing_else_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photographs").mkdir()
    words = ["photographs", "s3://bucket/out", "--model=runs/mine", "--model", "runs/other", "--json", "--limit=5"]
    words += ["--set", "encoder.name=timm:a/b", "--set=training.epochs=3", "--recipe", "lite2-attention"]

    assert list(_with_absolute_paths(words)) == [
        *(f"{tmp_path}/photographs", "s3://bucket/out", f"--model={tmp_path}/runs/mine"),
        *("--model", f"{tmp_path}/runs/other", "--json", "--limit=5"),
        *("--set", "encoder.name=timm:a/b", "--set=training.epochs=3", "--recipe", "lite2-attention"),
    ]


def test_the_name_of_a_column_or_split_is_not_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("image", "caption", "id", "test"):
        (tmp_path / name).mkdir()
    words = ["image", "--image-column", "image", "--caption-column=caption", "--id-column", "id", "--split", "test"]

    assert list(_with_absolute_paths(words)) == [f"{tmp_path}/image", *words[1:]]


@pytest.mark.parametrize("words", [[], ["--follow", "job", "demo"]])
def test_submit_requires_a_command_or_a_job_to_follow(words: list[str]) -> None:
    result = CliRunner().invoke(main, ["submit", *words])

    assert result.exit_code == 2
    assert result.stderr.startswith("imcap: imcap submit takes a command")
