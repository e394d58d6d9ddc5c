"""An address, or nothing -> a quiet connection to Ray, and what that Ray can hold.

Knows nothing of images, models or job submission.
"""

from __future__ import annotations

import atexit
import json
import logging
import math
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any, Final

import ray.data
import yaml
from ray._private import ray_constants, services, worker
from ray._private.utils import get_num_cpus
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]
from ray.exceptions import AuthenticationError, RayError

from imcap_ray.distributed.contention import FreeResources
from imcap_ray.distributed.gcs_watch import GcsWatch
from imcap_ray.distributed.memory import KEEP_FREED_MEMORY
from imcap_ray.distributed.private_folder import PrivateFolder
from imcap_ray.distributed.ray_internals import (
    START_TIMEOUT_SECONDS,
    fewer_processes,
    init_environment,
    limit_ray_data_actors,
    poll_training_often,
    probe_gcs,
    short_node_wait,
    silence_ray_logs,
)
from imcap_ray.errors import ClusterError, InputError, RayStartError

START_TIMEOUT_VARIABLE: Final = "IMCAP_RAY_START_TIMEOUT_SECONDS"
"""The user's own limit for one attempt to start a private Ray."""

START_ATTEMPTS: Final = 2

FREE_SAMPLES: Final = 6

FREE_SAMPLE_SECONDS: Final = 0.3

# Ray Data holds CPUs for its readers and writers while the actors hold theirs: with fewer than this a pipeline that
# resumes deadlocks (ray-project/ray#44687). Logical CPUs are tickets, not cores: spare ones cost nothing.
MINIMUM_LOCAL_CPUS: Final = 4

SPARE_LOCAL_CPUS: Final = 2

MAXIMUM_ACTORS_PER_CORE: Final = 4

_private_node: Any = None
"""Ray's handle of the private Ray that this process has started, if it has."""

_gcs_watch: GcsWatch | None = None
"""Of the Ray that this process is connected to."""

BOOTSTRAP_FILE: Final = "ray_bootstrap_config.yaml"
"""In the home of the head's user: the cluster file that `ray up` was given, with what it filled in."""

AUTHENTICATION_ADVICE: Final = (
    "set RAY_AUTH_TOKEN to the cluster's token, or RAY_AUTH_TOKEN_PATH to a file that holds it, "
    "and leave RAY_AUTH_MODE unset or set it to token"
)


@dataclass(frozen=True, kw_only=True)
class ClusterResources:
    """What the connected Ray has now; an autoscaled cluster may grow beyond it."""

    is_local: bool
    """Whether this process started the Ray it is connected to."""

    cpus: float
    """Logical CPUs: what tasks and actors may ask for in sum."""

    gpus: float
    """Logical GPUs."""

    nodes: int
    """Machines alive, the head among them."""

    physical_cores: int
    """How many processes can be busy at once: this machine's cores when local, else the cluster's CPUs."""

    max_cpus: float = 0.0
    """Logical CPUs when autoscaling has added what it may; 0 where there is none, inf where it does not say."""

    max_gpus: float = 0.0
    """Logical GPUs then."""

    free_cpus: float = inf
    """Logical CPUs that no other job holds; inf if this process has its own Ray."""

    free_gpus: float = inf
    """Logical GPUs that no other job holds."""

    @property
    def expects_gpus(self) -> bool:
        """Whether there are GPUs, or will be."""
        return self.gpus > 0 or 0 < self.max_gpus < inf


def connect(
    address: str | None = None,
    *,
    num_actors: int | None = None,
    verbose: bool = False,
    meanwhile: Callable[[], object] = lambda: None,
) -> ClusterResources:
    """Connect this process to Ray and say what it has; once connected, further calls keep the connection.

    `address` is HOST:PORT or "auto", the Ray that runs on this machine; without one RAY_ADDRESS counts, which is set
    inside a Ray job. "local", or nothing at all, starts a private Ray that ends with this process, with logical CPUs
    for `num_actors` unless that is more than the cores can carry. `verbose` lets Ray's own log lines through.
    `meanwhile` is called once, as soon as there is nothing to do here but to wait; it is to return at once. Raises
    ClusterError, within seconds, if there is no such cluster, if it refuses this process or runs other versions of
    Ray or Python, and RayStartError if a private Ray does not start. If the GCS, Ray's head service, is lost later, the
    process ends with one line on stderr and exit code 1.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address == "local" and not ray.is_initialized():
        _start(num_actors=num_actors or 0, verbose=verbose, meanwhile=meanwhile)
    else:
        meanwhile()
        if not ray.is_initialized():
            _join(address, verbose=verbose)
            _watch_gcs(clean_up=lambda: None)
    silence_ray_logs(verbose=verbose)
    limit_ray_data_actors()
    poll_training_often()
    return _resources() if _is_private() else _with_free(_resources())


def require(resources: ClusterResources, *, cpus: float, gpus: float, what: str) -> None:
    """Raise ClusterError unless Ray can hold `cpus` and `gpus` at once, now or when it has grown as far as it may.

    `what` is the setting that needs them.
    """
    holder, advice = ("this machine", "") if resources.is_local else ("the cluster", ", or add nodes")
    for unit, needed, available, maximum in (
        ("CPU", cpus, resources.cpus, resources.max_cpus),
        ("GPU", gpus, resources.gpus, resources.max_gpus),
    ):
        if needed > max(available, maximum):
            growth = f" and grows to {maximum:g}" if maximum > available else ""
            raise ClusterError(
                f"{what} needs {needed:g} {unit}{'' if needed == 1 else 's'}, "
                f"{holder} has {available:g}{growth}: ask for less{advice}"
            )


def runtime_environment(*, gpus: float) -> dict[str, Any] | None:
    """Ray's runtime environment for processes that decode or compute; None where all of Ray's have what they need.

    Those of a Ray that `connect` has started have it from their start, so that one that is there already can serve: to
    start another takes a second and more.

    Args:
        gpus: of each process. Without any it would see all of its node's, and load its model there.
    """
    resources = _resources()
    variables = {} if _is_private() else dict(KEEP_FREED_MEMORY)
    if not gpus and (resources.gpus or not resources.is_local):
        variables["CUDA_VISIBLE_DEVICES"] = ""
    return {"env_vars": variables} if variables else None


def own_cores() -> int | None:
    """The cores of a Ray that `connect` has started, which counts more CPUs than it has; None of any other."""
    return cores() if _is_private() else None


def is_ray_job() -> bool:
    """Whether this process is the driver of a submitted job."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ  # set by Ray there and nowhere else


def refuse_relative_paths_in_job(paths: Mapping[str, str]) -> None:
    """Raise InputError if this is a Ray job and one of `paths`, by name, is relative.

    Meant for what a run writes: a job's folder is a temporary copy of its working_dir, or one of the cluster's
    choosing, and what is written there is lost.
    """
    if not is_ray_job():
        return
    for name, path in paths.items():
        if "://" not in path and not os.path.isabs(path):
            raise InputError(
                f"{name} must be an absolute path or a URI inside a Ray job, got {path}: "
                f"the job's folder {os.getcwd()} is not kept"
            )


def authentication_headers() -> dict[str, str]:
    """The HTTP header that shows the user's token to a cluster; empty if there is no token to show.

    Raises AuthenticationError if RAY_AUTH_TOKEN_PATH names a file that cannot be read.
    """
    token = AuthenticationTokenLoader.instance()
    if not ray.is_initialized():  # a private Ray's token is in that cache and nowhere else
        token.reset_cache()
    return dict(token.get_token_for_http_header(ignore_auth_mode=True))


def _start(*, num_actors: int, verbose: bool, meanwhile: Callable[[], object]) -> None:
    global _private_node
    # Each phase of a training would start a process that watches for other nodes' notices of their end.
    variables = {**KEEP_FREED_MEMORY, "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "disabled":
        # Ray listens on all interfaces and runs what it is sent, so it gets a token; one that only this process and
        # its children know. Ray itself would save one as ~/.ray/auth_token, and from then on every `ray start` of
        # this user demands it while no client that is given an address shows it.
        variables |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    timeout = _start_timeout()
    has_loaded = False

    def meanwhile_once() -> None:
        nonlocal has_loaded
        if not has_loaded:
            has_loaded = True
            meanwhile()

    for attempt in range(1, START_ATTEMPTS + 1):
        folder = PrivateFolder()
        variables |= {"RAY_TMPDIR": folder.path, "RAY_gcs_server_port_wait_time_s": str(math.ceil(timeout))}
        try:
            with (
                init_environment(variables, verbose=verbose),
                fewer_processes(verbose=verbose),
                short_node_wait(meanwhile_once, timeout),
            ):
                ray.init(
                    address="local",
                    num_cpus=max(
                        MINIMUM_LOCAL_CPUS,
                        SPARE_LOCAL_CPUS + max(cores(), min(num_actors, MAXIMUM_ACTORS_PER_CORE * cores())),
                    ),
                    include_dashboard=False,
                    log_to_driver=verbose,
                    logging_level=_logging_level(verbose),
                )
            break
        except Exception as error:  # Ray has no type for it: its processes were slow to start, or a disk is full
            folder.remove()
            if attempt == START_ATTEMPTS:
                reason = _one_line(error).rstrip(".")
                raise RayStartError(
                    f"Ray does not start on this machine, after {START_ATTEMPTS} attempts: {reason}; "
                    f"{START_TIMEOUT_VARIABLE} allows each more than {timeout:g} s"
                ) from error
        except BaseException:
            if ray.is_initialized():  # the end of its raylet would end this process
                ray.shutdown()
            folder.remove()
            raise
    _private_node = worker._global_node

    def end() -> None:
        if _is_private():
            ray.shutdown()
        folder.remove()

    atexit.register(end)  # before Ray's own, which would write to the folder again
    _watch_gcs(clean_up=folder.remove_at_once)


def _start_timeout() -> float:
    text = os.environ.get(START_TIMEOUT_VARIABLE, "")
    try:
        timeout = float(text) if text else START_TIMEOUT_SECONDS
    except ValueError:
        timeout = -1.0
    if not 0 < timeout < inf:
        raise InputError(f"{START_TIMEOUT_VARIABLE} must be a number of seconds above 0, got {text!r}")
    return timeout


def _watch_gcs(*, clean_up: Callable[[], None]) -> None:
    global _gcs_watch
    if _gcs_watch:
        _gcs_watch.stop()
    address = ray.get_runtime_context().gcs_address
    connected = worker._global_node
    _gcs_watch = GcsWatch(
        address,
        is_private=_is_private(),
        is_connected=lambda: ray.is_initialized() and worker._global_node is connected,
        clean_up=clean_up,
    )
    atexit.register(_gcs_watch.stop)  # before everything that ends Ray: what is registered last is called first


def _join(address: str, *, verbose: bool) -> None:
    if "://" in address:
        raise ClusterError(
            f"expected HOST:PORT of a cluster this machine is part of, got {address}: "
            "use `imcap submit` from outside a cluster, or give --address local"
        )
    try:
        # Given an address, ray.init shows no token unless told to, although `ray start --head` demands one as soon
        # as it finds one.
        headers = authentication_headers()
        mode = os.environ.get("RAY_AUTH_MODE") or ("token" if headers else "disabled")
        if mode.lower() == "token" and not headers:
            raise AuthenticationError("RAY_AUTH_MODE=token, but there is none")  # Ray would abort the process
        with init_environment({"RAY_AUTH_MODE": mode}, verbose=verbose):
            place = services.canonicalize_bootstrap_address_or_die(address)
            probe_gcs(place)
            ray.init(address=place, log_to_driver=verbose, logging_level=_logging_level(verbose))
    except AuthenticationError as error:
        reason = _one_line(error).split(". ")[0]  # Ray goes on with advice for those who run clusters
        raise ClusterError(f"no access to the cluster at {address}: {reason}: {AUTHENTICATION_ADVICE}") from error
    except (RayError, ConnectionError, RuntimeError, ValueError) as error:
        advice = ": install the cluster's versions here" if "Version mismatch" in str(error) else ""
        raise ClusterError(f"cannot join the cluster at {address}: {_one_line(error)}{advice}") from error


def _is_private() -> bool:
    return _private_node is not None and worker._global_node is _private_node


def _resources() -> ClusterResources:
    node: Any = worker._global_node
    is_local = bool(node and node.is_head())
    available = ray.cluster_resources()  # type: ignore[no-untyped-call]
    cpus = available.get("CPU", 0.0)
    maximum = {} if is_local else _autoscaled_maximum()
    return ClusterResources(
        is_local=is_local,
        cpus=cpus,
        gpus=available.get("GPU", 0.0),
        nodes=sum(node["Alive"] for node in ray.nodes()),  # type: ignore[no-untyped-call]
        physical_cores=cores() if is_local else int(cpus),
        max_cpus=maximum.get("CPU", 0.0),
        max_gpus=maximum.get("GPU", 0.0),
    )


def _with_free(resources: ClusterResources) -> ClusterResources:
    """The resources with what is free: the most of several moments, because tasks of other jobs come and go."""
    free_cpus = free_gpus = 0.0
    for number in range(FREE_SAMPLES):
        if number:
            time.sleep(FREE_SAMPLE_SECONDS)
        free = FreeResources.read()
        free_cpus, free_gpus = max(free_cpus, free.free_cpus), max(free_gpus, free.free_gpus)
        if free_cpus >= resources.cpus and free_gpus >= resources.gpus:
            break
    return replace(resources, free_cpus=free_cpus, free_gpus=free_gpus)


def _autoscaled_maximum() -> dict[str, float]:
    """What the cluster may grow to, by resource; empty where no autoscaler runs.

    `ray up` leaves its cluster file on the head, where jobs run. On Kubernetes only the operator knows. (Ray's own
    question for this has no answer in 2.60: nothing reports the cluster's configuration.)
    """
    try:
        return maximum_of(yaml.safe_load((Path.home() / BOOTSTRAP_FILE).read_text()))
    except (OSError, yaml.YAMLError, LookupError, TypeError, ValueError, AttributeError):
        status = worker.global_worker.gcs_client.internal_kv_get(  # type: ignore[attr-defined]
            ray_constants.DEBUG_AUTOSCALING_STATUS.encode(), None
        )
        node_ids = [node["NodeID"] for node in ray.nodes()]  # type: ignore[no-untyped-call]
        return {"CPU": inf, "GPU": inf} if status and may_grow(status, node_ids) else {}


def may_grow(status: bytes, node_ids: Sequence[str]) -> bool:
    """Whether a cluster with this autoscaling status has an autoscaler that adds nodes.

    `ray start --head` runs Ray's monitor too, which then only reports nodes: each as a type of its own, "node_ID".
    """
    try:
        types = set(json.loads(status)["autoscaler_report"]["active_nodes"])
    except (ValueError, LookupError, TypeError):
        return True
    return not types or not types <= {f"node_{node_id}" for node_id in node_ids}


def maximum_of(cluster: Mapping[str, Any]) -> dict[str, float]:
    """What a cluster with this cluster file may grow to, by resource."""
    most, kinds = int(cluster["max_workers"]), cluster["available_node_types"]
    maximum = {}
    for name in ("CPU", "GPU"):
        size = {kind: float(node.get("resources", {}).get(name, 0)) for kind, node in kinds.items()}
        workers = [size[kind] for kind, node in kinds.items() for _ in range(min(most, int(node["max_workers"])))]
        maximum[name] = size[cluster["head_node_type"]] + sum(sorted(workers, reverse=True)[:most])
    return maximum


def cores() -> int:
    """Cores this process may use: a container's quota and a CPU affinity both count."""
    quota = int(get_num_cpus(override_docker_cpu_warning=True))
    return min(quota, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else quota


def _logging_level(verbose: bool) -> int:
    return logging.INFO if verbose else logging.WARNING


def without_ray_advice(text: str) -> str:
    """The text in one line, without what Ray advises programmers to set or to read."""
    line = " ".join(text.split())
    return " ".join(sentence for sentence in _SENTENCE_END.split(line) if not _RAY_ADVICE.search(sentence)) or line


_SENTENCE_END: Final = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")

_RAY_ADVICE: Final = re.compile(
    r"\bDataContext\b|\bds\.context\b|docs\.ray\.io|https://github\.com/ray-project|\bRAY_\w+=|"
    r"(set|setting) (the environment variable )?`?RAY_|s3fs|`ray (logs|stack|memory|start)|_system_config"
)


def _one_line(error: BaseException) -> str:
    return without_ray_advice(str(error))
