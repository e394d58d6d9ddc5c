"""Every use of a private Ray API. A Ray version that changes one costs a feature, not the run."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, Final
from unittest.mock import patch

import grpc  # type: ignore[import-untyped]
import ray
import ray.data
from ray._private import node, parameter, ray_constants, services, worker
from ray._private.state import GlobalState
from ray._raylet import AuthenticationTokenLoader, Config, GcsClient  # type: ignore[attr-defined]


@contextmanager
def without_cluster_actors() -> Iterator[None]:
    """Let pipelines that run meanwhile start none of them.

    Only for a Ray of one node, with no dashboard; and for one thread at a time, for it holds in the whole process.
    """
    # Not imported above: actors come here too, and need none of it.
    from ray.data._internal.cluster_autoscaler import ClusterAutoscaler
    from ray.data._internal.execution import streaming_executor
    from ray.data._internal.execution.interfaces import ExecutionResources
    from ray.data._internal.execution.operators import actor_pool_map_operator
    from ray.data._internal.stats import _StatsManager

    total: ExecutionResources = ExecutionResources.from_resource_dict(ray.cluster_resources())  # type: ignore[no-untyped-call]

    class NothingGrows(ClusterAutoscaler):
        def try_trigger_scaling(self) -> None:
            pass

        def on_executor_shutdown(self) -> None:
            pass

        def get_total_resources(self) -> ExecutionResources:
            return total

    tracker = SimpleNamespace(update_actor_location=SimpleNamespace(remote=_ignore))
    with ExitStack() as stack:
        for owner, name, stand_in in (
            (streaming_executor, "create_cluster_autoscaler", lambda *_, **__: NothingGrows()),
            (_StatsManager, "register_dataset_to_stats_actor", _ignore),
            (_StatsManager, "update_execution_metrics", _ignore),
            (actor_pool_map_operator, "get_or_create_actor_location_tracker", lambda: tracker),
            (actor_pool_map_operator, "get_actor_locations", lambda _: {}),
        ):
            stack.enter_context(patch.object(owner, name, stand_in))
        yield


def _ignore(*_: object, **__: object) -> None:
    pass


ANSWER_TIMEOUT_SECONDS: Final = 5

NODE_TIMEOUT_SECONDS: Final = 5

START_TIMEOUT_SECONDS: Final = 60.0

# As in "[DATE TIME I 5360 5360] logging.cc:303: Set ray log level from environment variable ..."
BACKEND_NOTICE: Final = r"^\[[-0-9]+ [0-9:,]+ [IW] [0-9]+ [0-9]+\] "


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for a while."""
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


@contextmanager
def fewer_processes(*, verbose: bool) -> Iterator[None]:
    """Let ray.init start, and wait for, what a private Ray needs and no more: 3.2 s instead of 5.5 on two cores.

    It would wait for a dashboard though told to leave it out, and start an autoscaler, and a reader of logs that none
    are shown of. The agent takes any free port: beside another Ray it tries for four seconds to get its own.
    """
    chosen: dict[str, Any] = {
        "no_monitor": True,
        "include_log_monitor": verbose,
        "dashboard_agent_listen_port": 0,
    }
    make: Any = parameter.RayParams

    def make_parameters(**others: Any) -> Any:
        _hold_termination()
        return make(**chosen, **others)

    with (
        patch.object(parameter, "RayParams", make_parameters),
        patch.object(node.Node, "start_api_server", lambda *_, **__: None),
    ):
        yield


@contextmanager
def short_node_wait(meanwhile: Callable[[], object], timeout: float) -> Iterator[None]:
    """Let ray.init see at once that its node is there. It looks once a second, and a node takes about a second.

    Args:
        meanwhile: called when all processes have been started. Before that, what is busy in a thread holds ray.init up.
        timeout: seconds after which ray.init raises TimeoutError. Its own limit is half a minute.
    """
    get_node: Any = services.get_node

    def wait_and_get_node(gcs_address: str, node_id: str) -> Any:
        meanwhile()
        state: Any = GlobalState()  # type: ignore[no-untyped-call]
        state._initialize_global_state(services._get_gcs_client_options(gcs_address))  # type: ignore[no-untyped-call]
        deadline = time.monotonic() + timeout
        while not state.node_table():
            if _is_terminated.is_set():
                raise KeyboardInterrupt
            if time.monotonic() >= deadline:
                raise TimeoutError(f"its processes were not ready after {timeout:g} s")
            time.sleep(0.02)
        return get_node(gcs_address, node_id)

    with patch.object(services, "get_node", wait_and_get_node):
        yield


def probe_gcs(place: str) -> None:
    """Take the steps on which ray.init waits 20 to 120 s for a cluster that is not there, with short deadlines."""
    channel = grpc.insecure_channel(place, options=[("grpc.enable_http_proxy", 0)])
    try:
        grpc.channel_ready_future(channel).result(timeout=ANSWER_TIMEOUT_SECONDS)
    except grpc.FutureTimeoutError:
        raise ConnectionError(
            f"no Ray answered within {ANSWER_TIMEOUT_SECONDS} s: give the HOST:PORT that `ray start --head` prints, "
            "usually with port 6379"
        ) from None
    finally:
        channel.close()
    client = GcsClient(address=place)
    try:
        services.get_node_to_connect_for_driver(client, timeout_seconds=NODE_TIMEOUT_SECONDS)
    except RuntimeError:
        raise ConnectionError("this machine is not one of its nodes: use `imcap submit` instead") from None


@contextmanager
def init_environment(variables: Mapping[str, str], *, verbose: bool) -> Iterator[None]:
    """Set variables that Ray reads while it starts, and take them back: its processes have them by then."""
    defaults = {"RAY_USAGE_STATS_ENABLED": "0"}
    if not verbose:
        # Else an error line for every pool of actors (ray-project/ray#53727), about nothing one could change.
        defaults["RAY_BACKEND_LOG_LEVEL"] = "fatal"
    variables = {name: os.environ.get(name, value) for name, value in defaults.items()} | dict(variables)
    # Else Ray's C++ side answers a SIGTERM first, by a stack trace, and on a busy machine by an abort: it allows itself
    # three seconds. Only this process is meant: what kills a worker stays in its log.
    ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER = True
    with environment(variables), _own_termination(), nullcontext() if verbose else _without_backend_notices():
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()
        yield


@contextmanager
def _own_termination() -> Iterator[None]:
    """Keep what this process does on SIGTERM: ray.init makes it exit with 15 or with 1, and without a word.

    Its own handler is in place when it begins. What that raises becomes what ours would have raised, also where Python
    has dropped it. While processes are started no handler may raise: an exception in a hook that follows a fork is only
    printed, and leaves locked what the hook was to unlock.
    """
    _is_terminated.clear()
    handler = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    try:
        with _received_signals() as received:
            yield
    except SystemExit as error:
        raise KeyboardInterrupt from error
    else:
        if signal.SIGTERM in received:
            handler(signal.SIGTERM, None)
    finally:
        signal.signal(signal.SIGTERM, handler)


_is_terminated = threading.Event()
"""Whether SIGTERM has arrived while `_hold_termination` holds it."""


def _hold_termination() -> None:
    """Only note a SIGTERM, until `_own_termination` handles it."""
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and callable(signal.getsignal(signal.SIGTERM)):
        signal.signal(signal.SIGTERM, lambda number, frame: _is_terminated.set())


@contextmanager
def _received_signals() -> Iterator[list[int]]:
    """The numbers of the signals that arrive while the block runs; filled in at its end."""
    received: list[int] = []
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield received
    finally:
        signal.set_wakeup_fd(before)
        with contextlib.suppress(BlockingIOError):
            received.extend(os.read(reader, 4096))
        os.close(reader)
        os.close(writer)


@contextmanager
def _without_backend_notices() -> Iterator[None]:
    """Let stderr through, but for information and warnings of Ray's C++ side, which even says that it will be silent.

    It writes to the file descriptor. Another process sifts, so that what an abort says is not lost.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    reading, writing = os.pipe()
    sieve = subprocess.Popen(
        ["grep", "-a", "-v", "-E", BACKEND_NOTICE], stdin=reading, stdout=stderr, start_new_session=True
    )
    os.close(reading)
    os.dup2(writing, 2)
    os.close(writing)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(stderr, 2)
        os.close(stderr)
        sieve.wait()


def silence_ray_logs(*, verbose: bool) -> None:
    """Turn off Ray's progress bars and, unless `verbose`, its log lines."""
    # imcap prints one line of its own. Ray warns that there will be no bars, and would log them instead.
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    if not verbose:
        # Errors come back as exceptions, and are told in one line of ours.
        for name in ("ray.data", "ray.train"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        # What Ray's daemons have to say Ray prints to stdout, which belongs to our results.
        worker.print_to_stdstream = _print_to_stderr


def limit_ray_data_actors() -> None:
    """Let Ray Data start no processes that a manifest of a few files has no work for.

    Its second reader of Parquet starts 32 actors to read footers (Ray 2.60, `RAY_DATA_PARQUET_FOOTER_NUM_ACTORS`), and
    each costs two cores half a second and more; usage statistics are an actor too.
    """
    ray.data.DataContext.get_current().use_datasource_v2 = False
    os.environ["RAY_DATA_USAGE_DISABLED"] = "1"


def poll_training_often() -> None:
    """Let Ray Train take what its workers report twice a second.

    Its default is every two seconds, for which a worker waits at the end of an epoch: a small data set's are shorter.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")


def _print_to_stderr(data: Mapping[str, Any], ignore_prefix: bool) -> None:
    """In the place of Ray's own, which tells of worker processes that start: only what is an error is passed on."""
    if data.get("is_err"):
        print(*data["lines"], sep="\n", file=sys.stderr)
