"""The epochs of a training -> TensorBoard's event files, and an MLflow run if the environment names a server.

Each tracker gets all epochs so far and logs those that it lacks, so that an epoch is logged once however often a
training is interrupted. An error in a tracker is reported once and does not stop the training.
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
from imcap_ray.runs.training_run import EpochMetrics, History

EVENTS_FOLDER: Final = "tensorboard"

MLFLOW_FILE: Final = "mlflow.json"
"""The MLflow server and run that this training is logged to."""

# By default MLflow retries for four minutes when a server is down, and waits two minutes for each answer. The user's
# own values of these variables have priority.
_MLFLOW_PATIENCE: Final = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


class Tracker(Protocol):
    """A destination for the metrics of epochs."""

    name: str

    def log(self, epochs: History) -> None:
        """Log the epochs that have not been logged."""

    def end(self, status: str) -> None:
        """Note that the training has ended. The status is one of MLflow's: FINISHED, FAILED or KILLED."""


class TensorBoardFolder:
    """Event files in a folder, path or URI: one for each epoch, which is replaced if the epoch is repeated.

    TensorBoard reads the files of a folder in the order of their names. They are written with tensorboardX, which Ray
    Train depends on, so that only the viewer needs TensorBoard.
    """

    name = "TensorBoard"

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._num_logged: int | None = None

    def log(self, epochs: History) -> None:
        """Write missing files. The first call also removes files of epochs that will be repeated."""
        names = [f"events.out.tfevents.{number:010}.imcap" for number in range(1, len(epochs) + 1)]
        if self._num_logged is None:
            files = storage.list_files(self._folder) if storage.is_folder(self._folder) else []
            existing = {file.name for file in files}
            for name in existing.difference(names):
                storage.remove(storage.join(self._folder, name))
        else:
            existing = set(names[: self._num_logged])
        for name, metrics in zip(names, epochs, strict=True):
            if name not in existing:
                storage.write_bytes(storage.join(self._folder, name), _event_file(metrics))
        self._num_logged = len(epochs)

    def end(self, status: str) -> None:
        """Do nothing: no file is open."""


def _event_file(metrics: EpochMetrics) -> bytes:
    from tensorboardX import SummaryWriter

    with TemporaryDirectory() as folder:
        with SummaryWriter(folder) as writer:
            for key, value in _numbers(metrics).items():
                writer.add_scalar(key, value, metrics["epoch"])
        (file,) = Path(folder).iterdir()
        return file.read_bytes()


class MlflowRun:
    """One MLflow run for a training, even if it is interrupted and resumed.

    The server, the experiment and the credentials come from MLflow's own variables, such as MLFLOW_EXPERIMENT_NAME.

    Args:
        location: file that records the run, path or URI.
        run_name: name of a new run.
        parameters: parameters of a new run; nested ones get dotted names.
    """

    name = "MLflow"

    def __init__(self, location: str, *, tracking_uri: str, run_name: str, parameters: Mapping[str, Any]) -> None:
        self._location = location
        self._uri = tracking_uri
        self._run_name = run_name
        self._parameters = parameters
        self._client: Any = None
        self._run_id = ""
        self._logged: set[tuple[str, int]] = set()

    def log(self, epochs: History) -> None:
        """Log the values that the run lacks, one epoch per request."""
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
        """Set the run's status."""
        with _with_patience():
            if self._client is not None:
                # `set_terminated` would print the run's address to stdout, which is for our results.
                self._client.update_run(self._run_id, status=status)

    def _open(self) -> None:
        """Open the recorded run, or create one."""
        from mlflow import MlflowClient
        from mlflow.entities import Param

        client = MlflowClient(self._uri)
        run_id = os.environ.get("MLFLOW_RUN_ID") or self._recorded_run(client)
        if run_id:
            run = client.get_run(run_id)
            client.update_run(run_id, status="RUNNING")
        else:
            run = client.create_run(_experiment_id(client), run_name=self._run_name)
            run_id = run.info.run_id
            content = {"tracking_uri": storage.hide_secrets(self._uri), "run_id": run_id}
            storage.write_bytes(self._location, json.dumps(content).encode())
        self._logged = {
            (key, metric.step) for key in run.data.metrics for metric in client.get_metric_history(run_id, key)
        }
        missing = {key: value for key, value in _flatten(self._parameters) if key not in run.data.params}
        client.log_batch(run_id, params=[Param(key, str(value)) for key, value in missing.items()])
        self._client, self._run_id = client, run_id

    def _recorded_run(self, client: Any) -> str:
        """The id of the run that this training was logged to on this server; "" if there is none or it was deleted."""
        from mlflow.exceptions import MlflowException

        if not storage.exists(self._location):
            return ""
        try:
            content = json.loads(storage.read_bytes(self._location))
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
    """The id of the experiment that MLflow's variables name, or of its default. It is created if it does not exist."""
    if identity := os.environ.get("MLFLOW_EXPERIMENT_ID"):
        return identity
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "Default")
    experiment = client.get_experiment_by_name(name)
    return str(experiment.experiment_id if experiment else client.create_experiment(name))


@contextmanager
def _with_patience() -> Iterator[None]:
    """Keep MLflow's client from waiting long and from logging each attempt."""
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
    """All trackers of a training. Errors of a tracker cause a single warning."""

    def __init__(self, trackers: Sequence[Tracker], epochs: History, *, report: Callable[[str], None]) -> None:
        self._trackers = trackers
        self._report = report
        self._epochs = epochs
        self._has_warned: set[str] = set()

    def log(self, epochs: History) -> None:
        """Give every tracker all epochs so far."""
        self._epochs = list(epochs)
        for tracker in self._trackers:
            with self._warning_once(tracker):
                tracker.log(self._epochs)

    def end(self, status: str) -> None:
        """Log what is still missing, and set the status of the training."""
        for tracker in self._trackers:
            with self._warning_once(tracker):
                tracker.log(self._epochs)
                tracker.end(status)

    @contextmanager
    def _warning_once(self, tracker: Tracker) -> Iterator[None]:
        try:
            yield
        # Plugins of MLflow, file systems and proxies may raise anything; it must not stop the training.
        except Exception as error:
            if tracker.name not in self._has_warned:
                self._has_warned.add(tracker.name)
                reason = " ".join(storage.hide_secrets(str(error)).split())
                self._report(
                    f"cannot write to {tracker.name}; the training continues and tries again after each epoch: "
                    f"{reason[:300]}"
                )


@contextmanager
def tracking(
    work: str, epochs: History, *, run_name: str, parameters: Mapping[str, Any], report: Callable[[str], None]
) -> Iterator[Trackers]:
    """Provide the trackers of the training in this work folder while the block runs, and set the status at its end.

    Args:
        epochs: epochs that are finished before the block.
        parameters: see `MlflowRun`.
    """
    trackers: list[Tracker] = [TensorBoardFolder(storage.join(work, EVENTS_FOLDER))]
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if uri and find_spec("mlflow"):
        location = storage.join(work, MLFLOW_FILE)
        trackers.append(MlflowRun(location, tracking_uri=uri, run_name=run_name, parameters=parameters))
    elif uri:
        report("MLFLOW_TRACKING_URI is set, but mlflow is not installed, so nothing is logged there")
    everything = Trackers(trackers, epochs, report=report)
    try:
        yield everything
    except Exception:
        everything.end("FAILED")
        raise
    except BaseException:
        everything.end("KILLED")
        raise
    everything.end("FINISHED")


def _numbers(metrics: EpochMetrics) -> dict[str, float]:
    """The metrics that can be drawn as curves over the epochs."""
    return {
        key: float(value)
        for key, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and key != "epoch"
    }


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
