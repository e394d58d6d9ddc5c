"""Nothing -> a Ray on this machine that belongs to this process and ends with it."""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import os
import threading
import time
from concurrent.futures import Future, wait
from typing import Any, Final

import ray

from imcap_ray.distributed.cluster.private_folder import PrivateFolder
from imcap_ray.distributed.cluster.ray_environment import temporary_environment
from imcap_ray.distributed.cluster.ray_messages import in_one_line
from imcap_ray.errors import InputError, RayStartError

START_TIMEOUT_VARIABLE: Final = "IMCAP_RAY_START_TIMEOUT_SECONDS"
"""How long to keep trying to start a private Ray, on a machine that is busier than Ray's own time limits allow for."""

MINIMUM_ATTEMPTS: Final = 2

PAUSE_SECONDS: Final = 1.0
"""Between two attempts."""

_gcs_address: str | None = None
"""The address of the private Ray that this process has started, if it has."""


def is_connected() -> bool:
    """Whether this process is connected to a private Ray that it has started."""
    return _gcs_address is not None and ray.is_initialized() and ray.get_runtime_context().gcs_address == _gcs_address


def start(*, num_cpus: int, verbose: bool) -> PrivateFolder:
    """Start a private Ray with this number of logical CPUs; the folder that holds its files.

    Ray ends, and the folder is removed, when this process exits.

    Raises:
        RayStartError: two attempts have failed, and so have all others within the user's START_TIMEOUT_VARIABLE.
    """
    global _gcs_address
    deadline = time.monotonic() + start_timeout()
    attempt = 0
    while True:
        attempt += 1
        folder = PrivateFolder()
        # Ray's processes read both. Unlike this process, a worker that crashes leaves a stack trace in its log.
        variables = {"RAY_TMPDIR": folder.path, "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "0"}
        try:
            with temporary_environment(variables):
                initialize(address="local", num_cpus=num_cpus, include_dashboard=False, verbose=verbose)
            break
        except Exception as error:  # Ray has no type for it: its processes were slow to start, or a disk is full
            _shut_down(folder)
            if attempt >= MINIMUM_ATTEMPTS and time.monotonic() >= deadline:
                raise RayStartError(
                    f"Ray does not start on this machine, after {attempt} attempts: {in_one_line(error).rstrip('.')}; "
                    f"to keep trying for longer, set {START_TIMEOUT_VARIABLE}"
                ) from error
            time.sleep(PAUSE_SECONDS)
        except BaseException:
            _shut_down(folder)
            raise
    _gcs_address = ray.get_runtime_context().gcs_address
    atexit.register(_shut_down_own, folder)  # before Ray's own, which would write to the folder again
    return folder


def initialize(*, verbose: bool, **arguments: Any) -> None:
    """Call ray.init in a thread and wait for it.

    In the main thread ray.init would replace this process's handler of SIGTERM, and handlers that raise would interrupt
    it between a fork and its end. Here an interruption waits until a private Ray has started. If its processes ended
    before, ray.init would wait a minute for them and then abort this process.
    """
    result: Future[None] = Future()

    def call() -> None:
        try:
            ray.init(log_to_driver=verbose, logging_level=logging.INFO if verbose else logging.ERROR, **arguments)
        except BaseException as error:
            result.set_exception(error)
        else:
            result.set_result(None)
        # For ever: Linux ends Ray's processes when the thread that started them ends, and the end of the raylet ends
        # this process. Also after an error, because Ray may have started before it.
        threading.Event().wait()

    threading.Thread(target=call, name="imcap-ray-init", daemon=True).start()
    try:
        result.result()
    except KeyboardInterrupt:
        while arguments["address"] == "local" and not result.done():
            with contextlib.suppress(KeyboardInterrupt):
                wait([result])
        raise


def _shut_down(folder: PrivateFolder) -> None:
    if ray.is_initialized():  # first, because the end of its raylet would end this process
        ray.shutdown()
    folder.remove()


def _shut_down_own(folder: PrivateFolder) -> None:
    if is_connected():
        ray.shutdown()
    folder.remove()


def start_timeout() -> float:
    """Seconds that the user allows for attempts after the second.

    Raises:
        InputError: START_TIMEOUT_VARIABLE is not such a number.
    """
    text = os.environ.get(START_TIMEOUT_VARIABLE, "")
    if not text:
        return 0.0
    try:
        timeout = float(text)
    except ValueError:
        timeout = -1.0
    if not 0 < timeout < math.inf:
        raise InputError(f"{START_TIMEOUT_VARIABLE} must be a number of seconds above 0, got {text!r}")
    return timeout
