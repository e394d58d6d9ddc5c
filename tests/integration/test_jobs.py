"""Commands as jobs of a real cluster with token authentication, and their results."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray

from imcap_ray.distributed.cluster.jobs import submit
from imcap_ray.distributed.cluster.ray_environment import uses_tokens_found
from imcap_ray.errors import ClusterError
from imcap_ray.runs.captions_table import open_captions
from tests.hang_guard import HANG_SECONDS
from tests.ray_head import TOKEN, free_ports, running_head
from tests.small_data import jpeg

# A package of the same name in place of imcap_ray: what travels, how it is called and what comes back are the same.
STAND_IN = """
import json, sys, time
behaviour, *arguments = sys.argv[1:]
if behaviour == "exit":
    sys.exit(int(arguments[0]))
if behaviour == "print":
    print(json.dumps(arguments))
if behaviour == "wait":
    print("waiting", flush=True)
    time.sleep(300)
if behaviour == "go on":
    print("waiting", flush=True)
    time.sleep(5)
    print("done", flush=True)
    sys.exit(4)
if behaviour == "connect":
    import ray
    ray.init(logging_level="ERROR")
    def find(name):
        return __import__(name).__name__, __import__(name).__file__
    print(json.dumps(ray.get([ray.remote(find).remote(name) for name in ["imcap_ray", *arguments]])))
"""

SUBMIT = """
import json, os, signal, sys, types
from imcap_ray.distributed.cluster import jobs
from imcap_ray.distributed.cluster.captioner_code import captioner_code
from imcap_ray.errors import ImcapError

# Where the tests run in the background of a shell, Ctrl-C is ignored and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
stand_in, address, *command = sys.argv[1:]
jobs.imcap_ray = types.SimpleNamespace(__file__=stand_in)
lines = []

def echo(line):
    lines.append(line)
    if line == "waiting":
        os.kill(os.getpid(), signal.SIGINT)

job = os.environ.get("JOB")
how = {"address": address, "echo": echo, "on_interrupt": os.environ.get("ON_INTERRUPT", "stop")}
try:
    if command:
        code = captioner_code(os.environ.get("MODELS", "").split())
        result = {"exit_code": jobs.submit(command, submission_id=job, code=code, **how)}
    else:
        how["echo"] = lines.append
        result = {"exit_code": jobs.follow(job, **how)}
except ImcapError as error:
    result = {"error": type(error).__name__, "message": str(error)}
print(json.dumps(result | {"lines": lines}))
"""

CONNECT = """
import sys
from imcap_ray.distributed.cluster.ray_environment import set_ray_environment
from imcap_ray.errors import ClusterError
try:
    set_ray_environment(sys.argv[1], verbose=False)
    from imcap_ray.distributed.cluster.connection import connect
    print(connect(sys.argv[1]))
except ClusterError as error:
    print(error)
"""


PLUGIN = """
from {helper} import Caption
import numpy

class Constant:
    batch_size, resources, fingerprint = 8, {{"gpus": 0}}, "constant"

    def prepare(self, image):
        return numpy.zeros(1, numpy.uint8)

    def caption(self, batch, num_captions):
        return [[Caption("a caption")]] * len(batch)
"""

IMCAP = """
import os, sys
os.chdir(sys.argv.pop(1))
from imcap_ray.cli.main import main
main()
"""


@dataclass(frozen=True)
class Head:
    folder: Path
    dashboard: str
    address: str

    def run(self, program: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a Python program that finds no token by itself and has a misleading RAY_ADDRESS."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {"HOME": str(self.folder / "nobody"), "RAY_ADDRESS": "http://127.0.0.1:9", **variables}
        return subprocess.run(
            [sys.executable, "-c", program, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=HANG_SECONDS,
        )

    def submit(self, *command: str, **variables: str) -> dict[str, Any]:
        done = self.run(SUBMIT, str(self.folder / "imcap_ray" / "__init__.py"), self.dashboard, *command, **variables)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with running_head(num_cpus=4) as (folder, dashboard, address):
        (folder / "nobody").mkdir()
        (folder / "imcap_ray").mkdir()
        (folder / "imcap_ray" / "__init__.py").touch()
        (folder / "imcap_ray" / "__main__.py").write_text(STAND_IN)
        yield Head(folder, dashboard, address)


def test_a_command_arrives_unchanged_and_its_log_is_returned(head):
    words = ["s3://bucket/a b", 'it\'s "quoted"', "$(touch pwned) `id` ; * ~", "--name=ü\n"]
    result = head.submit("print", *words, RAY_AUTH_TOKEN=TOKEN)
    assert result["exit_code"] == 0
    assert json.loads(result["lines"][-1]) == words
    assert not (head.folder / "pwned").exists()


def test_the_exit_code_is_that_of_the_command(head):
    assert head.submit("exit", "3", RAY_AUTH_TOKEN=TOKEN)["exit_code"] == 3


def test_the_package_and_the_modules_of_captioners_are_sent_to_the_workers_too(head, tmp_path):
    for name in ("one_file", "same_content"):
        (tmp_path / f"{name}.py").touch()
    (tmp_path / "a_package").mkdir()
    (tmp_path / "a_package" / "__init__.py").touch()
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    models = "one_file:Captioner same_content:Captioner a_package:make no_such:Thing"
    words = ["connect", "one_file", "same_content", "a_package"]
    result = head.submit(*words, RAY_AUTH_TOKEN=TOKEN, MODELS=models, PYTHONPATH=paths)
    assert result["exit_code"] == 0
    assert "there is no module no_such here: no_such:Thing needs it on the cluster's nodes" in result["lines"]
    (found,) = [json.loads(line) for line in result["lines"] if "py_modules_files" in line]  # Ray may print more
    assert [name for name, file in found if "py_modules_files" in file] == ["imcap_ray", *words[1:]]


def test_a_cluster_that_was_started_in_another_folder_gets_the_captioner_or_is_refused_in_one_line(head, tmp_path):
    folders = [tmp_path / "project", tmp_path / "site-packages", tmp_path / "photographs"]
    for folder in folders:
        folder.mkdir()
    project, installed, photographs = folders
    (project / "mine.py").write_text(PLUGIN.format(helper="imcap_ray"))
    (project / "needy.py").write_text(PLUGIN.format(helper="installed_here"))
    (installed / "installed_here.py").write_text("from imcap_ray import Caption")
    (photographs / "1.jpg").write_bytes(jpeg(1))
    paths = os.pathsep.join([str(installed), *filter(None, [os.environ.get("PYTHONPATH")])])

    def caption(model):
        words = ["caption", photographs, tmp_path / model, "--model", f"{model}:Constant", "--address", head.address]
        return head.run(
            IMCAP, str(project), *map(str, words), RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN, PYTHONPATH=paths
        )

    done = caption("mine")
    assert done.returncode == 0, done.stderr
    assert open_captions(str(tmp_path / "mine")).to_table()["caption"].to_pylist() == ["a caption"]

    done = caption("needy")
    assert done.returncode == 2, done.stderr
    message = (
        r"imcap: on the cluster's node [\d.]+ needy:Constant cannot be imported: ModuleNotFoundError: "
        "No module named 'installed_here': every node must have what the captioner needs"
    )
    assert re.fullmatch(message, done.stderr.splitlines()[-1])
    assert "Traceback" not in done.stderr


def test_ctrl_c_stops_the_job(head):
    assert head.submit("wait", RAY_AUTH_TOKEN=TOKEN, JOB="interrupted")["exit_code"] == 130
    job = urllib.request.Request(f"{head.dashboard}/api/jobs/interrupted", headers={"Authorization": f"Bearer {TOKEN}"})
    status = "RUNNING"
    deadline = time.monotonic() + HANG_SECONDS
    while status == "RUNNING" and time.monotonic() < deadline:
        with urllib.request.urlopen(job, timeout=10) as answer:
            status = json.load(answer)["status"]
        time.sleep(0.5)
    assert status == "STOPPED"


def test_a_job_left_running_by_ctrl_c_can_be_followed_to_its_exit_code(head):
    left = head.submit("go on", RAY_AUTH_TOKEN=TOKEN, JOB="left", ON_INTERRUPT="detach")
    assert left["exit_code"] == 130
    assert f"imcap submit --address {head.dashboard} --follow left" in left["lines"][-1]

    followed = head.submit(RAY_AUTH_TOKEN=TOKEN, JOB="left")
    assert followed["exit_code"] == 4
    assert followed["lines"][-2:] == ["waiting", "done"]


def test_a_name_already_in_use_is_reported(head):
    results = [head.submit("exit", "0", RAY_AUTH_TOKEN=TOKEN, JOB="taken") for _ in range(2)]
    assert results[0]["exit_code"] == 0
    assert results[1]["error"] == "ClusterError"
    assert "--submission-id" in results[1]["message"]


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"RAY_AUTH_TOKEN": "wrong"},
        {"RAY_AUTH_TOKEN_PATH": "/no/such/file"},
        {"RAY_AUTH_MODE": "token"},
        {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": TOKEN},
    ],
    ids=["no token", "wrong token", "no token file", "mode without token", "token held back"],
)
def test_the_error_for_a_wrong_token_names_the_variable_to_set(head, variables):
    submitted = head.submit("exit", "0", **variables)
    assert submitted["error"] == "ClusterError"
    joined = head.run(CONNECT, head.address, **variables)
    assert joined.returncode == 0, joined.stderr
    for message in (submitted["message"], joined.stdout):
        assert "set RAY_AUTH_TOKEN, or" in message or "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN" in message
        assert len(message.splitlines()) == 1
    assert TOKEN not in submitted["message"] + joined.stdout


@pytest.mark.parametrize("where", ["variable", "path", "home"])
def test_a_token_is_found_where_ray_documents_it(head, where):
    variables = {
        "variable": {"RAY_AUTH_TOKEN": TOKEN},
        "path": {"RAY_AUTH_TOKEN_PATH": str(head.folder / "user" / ".ray" / "auth_token")},
        "home": {"HOME": str(head.folder / "user")},
    }[where]
    if not uses_tokens_found():
        variables["RAY_AUTH_MODE"] = "token"
    joined = head.run(CONNECT, head.address, **variables)
    assert "ClusterResources(is_local=False, cpus=4.0" in joined.stdout
    assert [line for line in joined.stderr.splitlines() if "RAY_BACKEND_LOG_LEVEL" not in line] == []


def test_another_version_of_ray_is_refused_by_name(head):
    program = CONNECT.replace("    print(", "    import ray\n    ray.__version__ = '2.59.0'\n    print(", 1)
    message = head.run(program, head.address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN).stdout
    assert "2.59.0" in message and ray.__version__ in message


def test_a_machine_without_dashboard_is_detected_within_seconds():
    start = time.monotonic()
    (port,) = free_ports(1)
    with pytest.raises(ClusterError, match=f"no Ray dashboard answers at http://127.0.0.1:{port}: use --address"):
        submit(["demo"], address=f"127.0.0.1:{port}", echo=print)
    assert time.monotonic() - start < 15
