"""Connecting to Ray is quiet and idempotent, and fails with a helpful error."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from imcap_ray.distributed.cluster import connection as cluster
from imcap_ray.distributed.cluster import private_ray
from imcap_ray.distributed.cluster.connection import ClusterResources, refuse_relative_paths_in_job, require
from imcap_ray.distributed.cluster.memory import KEEP_FREED_MEMORY
from imcap_ray.errors import ClusterError, InputError
from tests.hang_guard import HANG_SECONDS

CONNECT = """
import json, os, sys
from imcap_ray.distributed.cluster.ray_environment import set_ray_environment

set_ray_environment(*sys.argv[1:] or [None], verbose=False)

import ray
from imcap_ray.distributed.cluster.connection import connect, own_cores, runtime_environment
from imcap_ray.distributed.cluster.machine import available_cores
from imcap_ray.errors import ImcapError

try:
    resources = [vars(connect(*sys.argv[1:])) for _ in range(2)]
    @ray.remote
    def double(number):
        return 2 * number, os.environ.get("MALLOC_ARENA_MAX")
    answer, arenas = ray.get(double.remote(21))
    result = {
        "resources": resources,
        "has_token": bool(os.environ.get("RAY_AUTH_TOKEN")),
        "answer": answer,
        "arenas": arenas,
        "runtime_environment": runtime_environment(gpus=0),
        "cores": [own_cores(), available_cores()],
    }
except ImcapError as error:
    result = {"error": type(error).__name__, "message": str(error)}
print(json.dumps(result))
"""

INITIALIZE_WITH_A_LATE_ERROR = """
import time
import ray
from imcap_ray.distributed.cluster.private_ray import initialize

original = ray.init

def init_and_fail(**options):
    original(**options)
    raise RuntimeError("a late error")

ray.init = init_and_fail
try:
    initialize(address="local", num_cpus=1, include_dashboard=False, verbose=False)
except RuntimeError as error:
    time.sleep(1)
    print(error, ray.get(ray.remote(lambda: 42).remote()))
"""


@pytest.fixture
def home() -> Iterator[Path]:
    # Ray puts Unix sockets below its temporary folder, and their paths are limited to 107 characters.
    path = Path(tempfile.mkdtemp(prefix="imc", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def connect_elsewhere(*arguments: str, home: Path, **variables: str) -> tuple[dict, str]:
    """Return the result and the stderr of `connect` in a separate process, with `home` as its home folder."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(home), "RAY_TMPDIR": str(home), **variables}
    done = subprocess.run(
        [sys.executable, "-c", CONNECT, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_a_private_ray_is_quiet_and_leaves_no_token(home):
    result, stderr = connect_elsewhere(home=home)
    first, second = result["resources"]
    assert first == second
    assert first["is_local"] and first["nodes"] == 1
    assert first["cpus"] >= max(4, first["physical_cores"])
    assert result["answer"] == 42
    # No switch of Ray silences the line in which it reports the level of its log.
    assert [line for line in stderr.splitlines() if "RAY_BACKEND_LOG_LEVEL" not in line] == []
    assert len(stderr.splitlines()) <= 1
    # ~/.ray/auth_token would turn authentication on for every later `ray start` of this user.
    assert not (home / ".ray").exists()
    assert result["has_token"]


def test_workers_of_a_private_ray_need_no_separate_environment(home):
    result, _ = connect_elsewhere(home=home)
    assert result["arenas"] == "1"
    assert result["runtime_environment"] is None
    assert result["cores"][0] == result["cores"][1]  # though it counts more CPUs than it has


def test_local_takes_precedence_over_ray_address(home):
    result, _ = connect_elsewhere("local", home=home, RAY_ADDRESS="127.0.0.1:9")
    assert result["resources"][0]["is_local"]


@pytest.mark.parametrize("place", ["closed port", "another server"])
def test_an_address_without_ray_fails_after_our_timeout_of_seconds(home, place):
    with socket.socket() as listener:
        if place == "another server":
            listener.bind(("127.0.0.1", 0))
            listener.listen()
        port = listener.getsockname()[1] if place == "another server" else free_port()
        result, stderr = connect_elsewhere(f"127.0.0.1:{port}", home=home)
    assert result["error"] == "ClusterError"
    assert f"127.0.0.1:{port}" in result["message"] and "6379" in result["message"]
    # Ray itself would wait 20 to 120 s, and has another message.
    assert f"no Ray answered within {cluster.ANSWER_TIMEOUT_SECONDS} s" in result["message"]
    assert stderr == ""


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "ray://127.0.0.1:10001"])
def test_an_address_for_outsiders_points_to_submit(home, address):
    result, _ = connect_elsewhere(home=home, RAY_ADDRESS=address)
    assert result["error"] == "ClusterError"
    assert "imcap submit" in result["message"]


def test_the_error_for_too_large_a_request_has_both_numbers():
    resources = ClusterResources(is_local=False, cpus=4, gpus=1, nodes=2, physical_cores=4)
    require(resources, cpus=4, gpus=1, what="--num-workers 1")
    with pytest.raises(ClusterError, match=r"--num-workers 8 needs 9 CPUs, the cluster has 4: ask for less"):
        require(resources, cpus=9, gpus=0, what="--num-workers 8")
    with pytest.raises(ClusterError, match=r"--num-actors 2 needs 2 GPUs, the cluster has 1: .* add nodes"):
        require(resources, cpus=2, gpus=2, what="--num-actors 2")


@pytest.mark.parametrize(
    ("is_private", "cluster_gpus", "gpus", "kept", "hidden"),
    [
        (True, 0, 0, False, False),
        (True, 2, 0, False, True),
        (True, 2, 1, False, False),
        (False, 0, 0, True, True),  # a node with GPUs may join
        (False, 2, 0, True, True),
        (False, 2, 0.5, True, False),
    ],
)
def test_a_worker_gets_missing_environment_variables(monkeypatch, is_private, cluster_gpus, gpus, kept, hidden):
    monkeypatch.setattr(
        ray, "cluster_resources", lambda: {"CPU": 8.0} | ({"GPU": cluster_gpus} if cluster_gpus else {})
    )
    monkeypatch.setattr(private_ray, "is_connected", lambda: is_private)
    for name, value in KEEP_FREED_MEMORY.items():
        if is_private:  # its processes have inherited them
            monkeypatch.setenv(name, value)
        else:
            monkeypatch.delenv(name, raising=False)

    variables = (cluster.runtime_environment(gpus=gpus) or {}).get("env_vars", {})

    assert ("MALLOC_ARENA_MAX" in variables) == kept
    assert (variables.get("CUDA_VISIBLE_DEVICES") == "") == hidden


def test_a_job_cannot_write_to_its_temporary_folder(monkeypatch):
    refuse_relative_paths_in_job({"OUTPUT": "captions"})
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    refuse_relative_paths_in_job({"OUTPUT": "/mnt/captions", "MODEL": "s3://bucket/model"})
    with pytest.raises(InputError, match="MODEL must be an absolute path or a URI inside a Ray job, got runs/mine"):
        refuse_relative_paths_in_job({"OUTPUT": "/mnt/captions", "MODEL": "runs/mine"})


def test_a_ray_that_has_started_survives_an_error_of_its_start(home):
    """Otherwise, the end of its processes would end this one before it could try once more."""
    environment = os.environ | {"RAY_TMPDIR": str(home)}
    program = [sys.executable, "-c", INITIALIZE_WITH_A_LATE_ERROR]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS)

    assert done.stdout == "a late error 42\n", done.stderr
