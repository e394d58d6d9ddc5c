"""The epochs of a training -> TensorBoard's event files, and a run of MLflow where the environment names a server.

Each tracker is told all epochs so far and takes from them what it lacks, so that an epoch is logged once however often
a training is interrupted. What goes wrong with that is told once, and is no reason to stop a training.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, Protocol

from imcap_ray import storage

EVENTS_FOLDER: Final = "tensorboard"

MLFLOW_FILE: Final = "mlflow.json"
"""Which run of which server this training is logged to."""

# MLflow asks a server that is down for four minutes, and waits two for each answer. Who wants that can say so.
_MLFLOW_PATIENCE: Final = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}

Epochs = Sequence[Mapping[str, Any]]
"""The metrics of each epoch so far."""


class Tracker(Protocol):
    """Somewhere to log epochs to."""

    name: str

    def log(self, epochs: Epochs) -> None:
        """Log those of the epochs that have not been logged."""

    def end(self, status: str) -> None:
        """The training has ended: FINISHED, FAILED or KILLED, in MLflow's words."""


class TensorBoardFolder:
    """Event files in a folder, path or URI: one for each epoch, which is written over when the epoch is done again.

    TensorBoard reads the files of a folder in the order of their names, and goes on to the next when there is one.
    tensorboardX, which Ray Train brings, writes them: whoever looks needs TensorBoard, the cluster does not.
    """

    name = "TensorBoard"

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._num_logged: int | None = None

    def log(self, epochs: Epochs) -> None:
        """Write the files that are lacking; at first, remove those of epochs that are to be done again."""
        names = [f"events.out.tfevents.{number:010}.imcap" for number in range(1, len(epochs) + 1)]
        if self._num_logged is None:
            is_there = storage.is_folder(self._folder)
            found = {file.name for file in storage.list_files(self._folder)} if is_there else set()
            for name in found.difference(names):
                storage.remove(storage.join(self._folder, name))
        else:
            found = set(names[: self._num_logged])
        for name, metrics in zip(names, epochs, strict=True):
            if name not in found:
                storage.write_bytes(storage.join(self._folder, name), _event_file(metrics))
        self._num_logged = len(epochs)

    def end(self, status: str) -> None:
        """Nothing is open."""


def _event_file(metrics: Mapping[str, Any]) -> bytes:
    from tensorboardX import SummaryWriter

    with TemporaryDirectory() as folder:
        with SummaryWriter(folder) as writer:
            for key, value in _numbers(metrics).items():
                writer.add_scalar(key, value, metrics["epoch"])
        (file,) = Path(folder).iterdir()
        return file.read_bytes()


class MlflowRun:
    """One run of MLflow for a training, in all its interruptions.

    The server, the experiment and the credentials come from MLflow's own variables, as MLFLOW_EXPERIMENT_NAME.

    Args:
        place: file that remembers the run, path or URI.
        run_name: of a run that begins.
        parameters: of a run that begins; nested ones get dotted names.
    """

    name = "MLflow"

    def __init__(self, place: str, *, tracking_uri: str, run_name: str, parameters: Mapping[str, Any]) -> None:
        self._place = place
        self._uri = tracking_uri
        self._run_name = run_name
        self._parameters = parameters
        self._client: Any = None
        self._run_id = ""
        self._logged: set[tuple[str, int]] = set()

    def log(self, epochs: Epochs) -> None:
        """Log the values that the run lacks, an epoch in a request."""
        from mlflow.entities import Metric

        with _with_patience():
            if self._client is None:
                self._open()
            now = int(1000 * time.time())
            for epoch in epochs:
                step = epoch["epoch"]
                values = {key: value for key, value in _numbers(epoch).items() if (key, step) not in self._logged}
                if values:
                    self._client.log_batch(
                        self._run_id, metrics=[Metric(key, value, now, step) for key, value in values.items()]
                    )
                    self._logged.update((key, step) for key in values)

    def end(self, status: str) -> None:
        """Say how the training ended."""
        with _with_patience():
            if self._client is not None:
                # Not `set_terminated`, which prints the run's address to stdout, where our results go.
                self._client.update_run(self._run_id, status=status)

    def _open(self) -> None:
        """Find the run, or begin one."""
        from mlflow import MlflowClient
        from mlflow.entities import Param

        client = MlflowClient(self._uri)
        run_id = os.environ.get("MLFLOW_RUN_ID") or self._remembered(client)
        if run_id:
            run = client.get_run(run_id)
            client.update_run(run_id, status="RUNNING")
        else:
            run = client.create_run(_experiment_id(client), run_name=self._run_name)
            run_id = run.info.run_id
            content = {"tracking_uri": storage.hide_secrets(self._uri), "run_id": run_id}
            storage.write_bytes(self._place, json.dumps(content).encode())
        self._logged = {
            (key, metric.step) for key in run.data.metrics for metric in client.get_metric_history(run_id, key)
        }
        lacking = {key: value for key, value in _flattened(self._parameters) if key not in run.data.params}
        client.log_batch(run_id, params=[Param(key, str(value)) for key, value in lacking.items()])
        self._client, self._run_id = client, run_id

    def _remembered(self, client: Any) -> str:
        """The run that this training was logged to on this server, if it is still there; else ""."""
        from mlflow.exceptions import MlflowException

        if not storage.exists(self._place):
            return ""
        try:
            content = json.loads(storage.read_bytes(self._place))
            if content["tracking_uri"] != storage.hide_secrets(self._uri):
                return ""
            run = client.get_run(content["run_id"])
        except (ValueError, LookupError, TypeError):
            return ""
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return ""
            raise
        return str(run.info.run_id) if run.info.lifecycle_stage == "active" else ""


def _experiment_id(client: Any) -> str:
    """The experiment that MLflow's variables name, or its default; made if there is none of this name."""
    if identity := os.environ.get("MLFLOW_EXPERIMENT_ID"):
        return identity
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "Default")
    experiment = client.get_experiment_by_name(name)
    return str(experiment.experiment_id if experiment else client.create_experiment(name))


@contextmanager
def _with_patience() -> Iterator[None]:
    """Keep MLflow's client from waiting long and from saying each of its attempts."""
    http, before = logging.getLogger("urllib3.connectionpool"), {}
    for name, value in _MLFLOW_PATIENCE.items():
        before[name] = os.environ.get(name)
        os.environ.setdefault(name, value)
    level = http.level
    http.setLevel(logging.ERROR)
    try:
        yield
    finally:
        http.setLevel(level)
        for name in (name for name, value in before.items() if value is None):
            del os.environ[name]


class Trackers:
    """All trackers of a training. What goes wrong with one of them is one warning."""

    def __init__(self, trackers: Sequence[Tracker], epochs: Epochs, *, echo: Callable[[str], None]) -> None:
        self._trackers = trackers
        self._echo = echo
        self._epochs = epochs
        self._has_warned: set[str] = set()

    def log(self, epochs: Epochs) -> None:
        """Tell every tracker all epochs so far."""
        self._epochs = list(epochs)
        for tracker in self._trackers:
            with self._warned_of(tracker):
                tracker.log(self._epochs)

    def end(self, status: str) -> None:
        """Try once more what is not logged, and say how the training ended."""
        for tracker in self._trackers:
            with self._warned_of(tracker):
                tracker.log(self._epochs)
                tracker.end(status)

    @contextmanager
    def _warned_of(self, tracker: Tracker) -> Iterator[None]:
        try:
            yield
        # Whatever a plugin of MLflow, a file system or a proxy may raise: the training is worth more than its curves.
        except Exception as error:
            if tracker.name not in self._has_warned:
                self._has_warned.add(tracker.name)
                reason = " ".join(storage.hide_secrets(str(error)).split())
                self._echo(
                    f"{tracker.name} cannot be written to, the training goes on without it and tries again after each "
                    f"epoch: {reason[:300]}"
                )


@contextmanager
def tracking(
    work: str, epochs: Epochs, *, run_name: str, parameters: Mapping[str, Any], echo: Callable[[str], None]
) -> Iterator[Trackers]:
    """The trackers of the training in this work folder while the block runs; they are told how it ends.

    Args:
        epochs: those that are done before the block.
    """
    trackers: list[Tracker] = [TensorBoardFolder(storage.join(work, EVENTS_FOLDER))]
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if uri and find_spec("mlflow"):
        place = storage.join(work, MLFLOW_FILE)
        trackers.append(MlflowRun(place, tracking_uri=uri, run_name=run_name, parameters=parameters))
    elif uri:
        echo("MLFLOW_TRACKING_URI is set, but mlflow is not installed: nothing is logged there")
    found = Trackers(trackers, epochs, echo=echo)
    try:
        yield found
    except Exception:
        found.end("FAILED")
        raise
    except BaseException:
        found.end("KILLED")
        raise
    found.end("FINISHED")


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """What can be drawn as a curve over the epochs."""
    return {
        key: float(value)
        for key, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and key != "epoch"
    }


def _flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
