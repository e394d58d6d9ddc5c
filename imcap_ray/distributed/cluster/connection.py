"""An address, or nothing -> a quiet connection to Ray, and the resources of that Ray.

Knows nothing of images, models or job submission.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any, Final

import grpc  # type: ignore[import-untyped]
import ray.data
import yaml
from ray.exceptions import AuthenticationError, RayError

from imcap_ray.distributed import ray_internals
from imcap_ray.distributed.cluster import gcs_watch, private_ray, ray_environment
from imcap_ray.distributed.cluster.free_resources import FreeResources
from imcap_ray.distributed.cluster.machine import available_cores
from imcap_ray.distributed.cluster.memory import KEEP_FREED_MEMORY
from imcap_ray.distributed.cluster.ray_messages import in_one_line, silence_ray_logs
from imcap_ray.distributed.cluster.ray_versions import describe_untested_version, require_supported_version
from imcap_ray.errors import ClusterError, InputError

FREE_SAMPLES: Final = 6

FREE_SAMPLE_SECONDS: Final = 0.3

# Ray Data holds CPUs for its readers and writers while the actors hold theirs: with fewer than this a resumed pipeline
# deadlocks (ray-project/ray#44687). Logical CPUs are tickets, not cores: spare ones cost nothing.
MINIMUM_LOCAL_CPUS: Final = 4

SPARE_LOCAL_CPUS: Final = 2

MAXIMUM_ACTORS_PER_CORE: Final = 4

ANSWER_TIMEOUT_SECONDS: Final = 5
"""How long a cluster may take to accept a connection. Ray itself waits 20 to 120 s for one that is not there."""

_gcs_watch: gcs_watch.GcsWatch | None = None
"""Watches the GCS of the Ray that this process is connected to."""

BOOTSTRAP_FILE: Final = "ray_bootstrap_config.yaml"
"""The cluster file that `ray up` was given, with its defaults filled in: in the home of the head's user."""

AUTHENTICATION_ADVICE: Final = (
    "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the cluster's token or RAY_AUTH_TOKEN_PATH to a file that holds it"
)


@dataclass(frozen=True, kw_only=True)
class ClusterResources:
    """What the connected Ray has now; an autoscaled cluster may grow beyond it."""

    is_local: bool
    """Whether this process has started the Ray that it is connected to."""

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

    node_memory: tuple[float, ...] = ()
    """Bytes of memory that Ray may reserve on each machine."""

    @property
    def expects_gpus(self) -> bool:
        """Whether there are GPUs, or will be."""
        return self.gpus > 0 or 0 < self.max_gpus < inf


def connect(
    address: str | None = None,
    *,
    num_actors: int | None = None,
    modules: Sequence[Path] = (),
    verbose: bool = False,
) -> ClusterResources:
    """Connect this process to Ray and return its resources; further calls keep the connection.

    Args:
        address: HOST:PORT, or "auto" for the Ray that runs on this machine; None: RAY_ADDRESS, which is set inside a
            Ray job. "local", or nothing at all, starts a private Ray that ends with this process.
        num_actors: the private Ray gets logical CPUs for this many actors, unless the cores cannot carry them.
        modules: files and package folders that are sent to the nodes of a cluster that this process joins. A job has
            them already.
        verbose: whether to print Ray's own log lines.

    Raises:
        ClusterError: there is no such cluster, it refuses this process, or it runs other versions of Ray or Python.
        InputError: a name on the command line, or the current folder's, is not UTF-8.
        RayStartError: a private Ray does not start.

    If the GCS, Ray's head service, is lost later, the process ends with one line on stderr and exit code 1.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    require_supported_version()
    _require_utf8([*sys.argv, os.getcwd()])
    if verbose and (line := describe_untested_version()):
        print(f"imcap: {line}", file=sys.stderr)
    if not ray.is_initialized():
        if ray_environment.means_own_ray(address):
            cores = available_cores()
            num_cpus = SPARE_LOCAL_CPUS + max(cores, min(num_actors or 0, MAXIMUM_ACTORS_PER_CORE * cores))
            num_cpus = max(MINIMUM_LOCAL_CPUS, num_cpus)
            folder = private_ray.start(num_cpus=num_cpus, verbose=verbose)
            _watch_gcs(clean_up=folder.remove_at_once)
        else:
            _join(address, modules=() if is_ray_job() else modules, verbose=verbose)
            _watch_gcs(clean_up=lambda: None)
    silence_ray_logs(verbose=verbose)
    context = ray.data.DataContext.get_current()
    if hasattr(context, "use_datasource_v2"):  # Ray 2.56 and later; it would start 32 actors to read Parquet footers
        context.use_datasource_v2 = False
    return _resources() if private_ray.is_connected() else _with_free(_resources())


def _require_utf8(names: Iterable[str]) -> None:
    """Raise InputError if a name is not UTF-8. Ray sends the command line to its head service, and would hang."""
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise InputError(
                f"{name!r} is not UTF-8, and Ray starts neither with such a name on its command line nor in such a "
                "folder: rename it, or give the folder above it"
            ) from None


def require(resources: ClusterResources, *, cpus: float, gpus: float, what: str) -> None:
    """Raise ClusterError unless Ray can hold `cpus` and `gpus` at once, now or when it has grown as far as it may.

    `what` is the setting that needs them.
    """
    holder, advice = ("this machine", "") if resources.is_local else ("the cluster", ", or add nodes")
    # A private Ray counts more CPUs than this machine has cores.
    shown_cpus = resources.physical_cores if resources.is_local else resources.cpus
    for unit, needed, available, shown, maximum in (
        ("CPU", cpus, resources.cpus, shown_cpus, resources.max_cpus),
        ("GPU", gpus, resources.gpus, resources.gpus, resources.max_gpus),
    ):
        if needed > max(available, maximum):
            growth = f" and grows to {maximum:g}" if maximum > available else ""
            raise ClusterError(
                f"{what} needs {needed:g} {unit}{'' if needed == 1 else 's'}, "
                f"{holder} has {shown:g}{growth}: ask for less{advice}"
            )


def require_memory(resources: ClusterResources, memory: float) -> float:
    """The number of processes of this many bytes that fit into the memory of the nodes; inf if none are needed.

    Raises:
        ClusterError: no node has room for one, and the cluster does not grow.
    """
    if not memory:
        return inf
    num_fitting = sum(available // memory for available in resources.node_memory)
    if not num_fitting and resources.max_cpus <= resources.cpus:
        largest = max(resources.node_memory, default=0.0)
        holder = "this machine" if resources.is_local else "the largest node"
        raise ClusterError(
            f"the captioner needs {memory / 2**30:.1f} GiB of memory in each process, {holder} has "
            f"{largest / 2**30:.1f} GiB for Ray's processes"
        )
    return max(1.0, num_fitting)


def runtime_environment(*, gpus: float) -> dict[str, Any] | None:
    """Ray's runtime environment for processes that decode or compute; None if Ray's own processes have it already.

    The processes of a private Ray have it from their start, so that an idle one can be used: starting another takes a
    second or more.

    Args:
        gpus: GPUs of each process. A process without any would see all GPUs of its node, and load its model there.
    """
    is_private = private_ray.is_connected()
    is_set = is_private and os.environ.items() >= KEEP_FREED_MEMORY.items()
    variables = {} if is_set else dict(KEEP_FREED_MEMORY)
    has_gpus = not is_private or "GPU" in ray.cluster_resources()  # type: ignore[no-untyped-call]  # others may join
    if has_gpus and not gpus:
        variables["CUDA_VISIBLE_DEVICES"] = ""
    return {"env_vars": variables} if variables else None


def own_cores() -> int | None:
    """Cores of this machine if Ray is private and so counts more CPUs than there are cores; None otherwise."""
    return available_cores() if private_ray.is_connected() else None


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
    """The HTTP header that shows the user's token to a cluster; empty if the user has no token.

    Raises:
        ClusterError: RAY_AUTH_TOKEN_PATH names a file that cannot be read.
    """
    token = ray_environment.find_token()
    return {"Authorization": f"Bearer {token}"} if token else {}


def _watch_gcs(*, clean_up: Callable[[], None]) -> None:
    global _gcs_watch
    if _gcs_watch:
        _gcs_watch.stop()
    address = ray.get_runtime_context().gcs_address
    _gcs_watch = gcs_watch.GcsWatch(
        address,
        is_own=private_ray.is_connected(),
        is_connected=lambda: _is_connected(address),
        clean_up=clean_up,
    )
    atexit.register(_gcs_watch.stop)  # before everything that ends Ray: what is registered last is called first


def _is_connected(gcs_address: str) -> bool:
    try:
        return ray.is_initialized() and ray.get_runtime_context().gcs_address == gcs_address
    except Exception:  # Ray is being shut down
        return False


def _join(address: str, *, modules: Sequence[Path], verbose: bool) -> None:
    if "://" in address:
        raise ClusterError(
            f"expected HOST:PORT of a cluster this machine is part of, got {address}: "
            "use `imcap submit` from outside a cluster, or give --address local"
        )
    needs_token = os.environ.get("RAY_AUTH_MODE", "").lower() == "token"
    may_have_one = os.environ.get(ray_environment.KUBERNETES_TOKEN_VARIABLE) or authentication_headers()
    if needs_token and not may_have_one:  # Ray would abort
        raise ClusterError(f"no access to the cluster at {address}: there is no token: {AUTHENTICATION_ADVICE}")
    if address != "auto" and not _speaks_grpc(address):
        raise ClusterError(
            f"cannot join the cluster at {address}: no Ray answered within {ANSWER_TIMEOUT_SECONDS} s: "
            "give the HOST:PORT that `ray start --head` prints, usually with port 6379"
        )
    try:
        environment = {"runtime_env": {"py_modules": list(map(str, modules))}} if modules else {}
        private_ray.initialize(address=address, verbose=verbose, **environment)
    except AuthenticationError as error:
        reason = in_one_line(error).split(". ")[0]  # what follows is advice for administrators
        raise ClusterError(f"no access to the cluster at {address}: {reason}: {AUTHENTICATION_ADVICE}") from error
    except (RayError, ConnectionError, RuntimeError, ValueError) as error:
        advice = ""
        if "Version mismatch" in str(error):
            advice = ": install the cluster's versions here"
        elif "node info" in str(error):
            advice = ": this machine is not one of its nodes: use `imcap submit` instead"
        elif isinstance(error, ConnectionError):  # Ray gives the same reason to a client without the right token
            advice = f"; if the cluster wants a token, {AUTHENTICATION_ADVICE}"
        raise ClusterError(f"cannot join the cluster at {address}: {in_one_line(error)}{advice}") from error


def _speaks_grpc(address: str) -> bool:
    channel = grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)])
    try:
        grpc.channel_ready_future(channel).result(timeout=ANSWER_TIMEOUT_SECONDS)
    except grpc.FutureTimeoutError:
        return False
    finally:
        channel.close()
    return True


def _resources() -> ClusterResources:
    is_local = private_ray.is_connected()
    total, nodes = ray.cluster_resources(), ray.nodes()  # type: ignore[no-untyped-call]
    cpus = total.get("CPU", 0.0)
    maximum = {} if is_local else _autoscaled_maximum()
    return ClusterResources(
        is_local=is_local,
        cpus=cpus,
        gpus=total.get("GPU", 0.0),
        nodes=sum(node["Alive"] for node in nodes),
        physical_cores=available_cores() if is_local else int(cpus),
        max_cpus=maximum.get("CPU", 0.0),
        max_gpus=maximum.get("GPU", 0.0),
        node_memory=tuple(node["Resources"].get("memory", 0.0) for node in nodes if node["Alive"]),
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
    """The resources the cluster may grow to, by name; empty if no autoscaler runs.

    `ray up` leaves its cluster file on the head, where jobs run. Elsewhere, as on Kubernetes, only the autoscaler knows
    its limits: infinite here.
    """
    try:
        return maximum_of(yaml.safe_load((Path.home() / BOOTSTRAP_FILE).read_text()))
    except (OSError, yaml.YAMLError, LookupError, TypeError, ValueError, AttributeError):
        return {"CPU": inf, "GPU": inf} if ray_internals.has_autoscaler() else {}


def maximum_of(cluster: Mapping[str, Any]) -> dict[str, float]:
    """The resources that a cluster with this cluster file may grow to, by name."""
    max_workers, node_types = int(cluster["max_workers"]), cluster["available_node_types"]
    maximum = {}
    for name in ("CPU", "GPU"):
        sizes = {kind: float(node.get("resources", {}).get(name, 0)) for kind, node in node_types.items()}
        workers = [
            sizes[kind] for kind, node in node_types.items() for _ in range(min(max_workers, int(node["max_workers"])))
        ]
        maximum[name] = sizes[cluster["head_node_type"]] + sum(sorted(workers, reverse=True)[:max_workers])
    return maximum
