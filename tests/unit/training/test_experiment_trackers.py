from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from imcap_ray.training.experiment_trackers import EVENTS_FOLDER, MLFLOW_FILE, MlflowRun, TensorBoardFolder, tracking

PARAMETERS = {"recipe": "small", "seed": 0, "training": {"epochs": 3, "learning_rate": 1e-3}}


def epochs(count: int) -> list[dict[str, Any]]:
    return [
        {"epoch": number, "phase": "cross_entropy", "train_loss": 4.0 / number, "cider_d": 0.1 * number, "is_odd": True}
        for number in range(1, count + 1)
    ]


@pytest.fixture(autouse=True)
def without_mlflow_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the curves that TensorBoard shows for a folder."""
    shown = EventAccumulator(str(folder))
    shown.Reload()
    return {
        tag: [(event.step, pytest.approx(event.value)) for event in shown.Scalars(tag)]
        for tag in shown.Tags()["scalars"]
    }


def expected_curves(count: int) -> dict[str, list[tuple[int, float]]]:
    return {key: [(row["epoch"], row[key]) for row in epochs(count)] for key in ("train_loss", "cider_d")}


def test_tensorboard_shows_every_epoch_once_after_an_interruption(tmp_path: Path) -> None:
    first = TensorBoardFolder(str(tmp_path))
    first.log(epochs(1))
    first.log(epochs(2))

    TensorBoardFolder(str(tmp_path)).log(epochs(3))

    assert curves(tmp_path) == expected_curves(3)


def test_a_running_tensorboard_sees_the_next_epoch(tmp_path: Path) -> None:
    writer, shown = TensorBoardFolder(str(tmp_path)), EventAccumulator(str(tmp_path))
    seen = []
    for count in (1, 2, 3):
        writer.log(epochs(count))
        shown.Reload()
        seen.append([event.step for event in shown.Scalars("cider_d")])

    assert seen == [[1], [1, 2], [1, 2, 3]]


def test_repeated_epochs_replace_the_old_ones(tmp_path: Path) -> None:
    TensorBoardFolder(str(tmp_path)).log([row | {"cider_d": 9.0} for row in epochs(3)])

    again = TensorBoardFolder(str(tmp_path))
    again.log([])
    again.log(epochs(2))

    assert curves(tmp_path) == expected_curves(2)


def test_event_files_are_written_where_tensorboard_is_not_installed(tmp_path: Path) -> None:
    TensorBoardFolder(str(tmp_path / "deep" / "below")).log(epochs(2))

    assert sorted(path.name for path in (tmp_path / "deep" / "below").iterdir()) == [
        "events.out.tfevents.0000000001.imcap",
        "events.out.tfevents.0000000002.imcap",
    ]


class Server:
    """The file store of MLflow, queried like a user would."""

    def __init__(self, folder: Path) -> None:
        from mlflow import MlflowClient

        self.uri = folder.as_uri()
        self._client = MlflowClient(self.uri)

    def runs(self, experiment: str = "Default") -> list[Any]:
        identity = self._client.get_experiment_by_name(experiment).experiment_id
        return list(self._client.search_runs([identity]))

    def curve(self, run: Any, key: str) -> list[tuple[int, float]]:
        return [(metric.step, metric.value) for metric in self._client.get_metric_history(run.info.run_id, key)]

    def remove(self, run: Any) -> None:
        self._client.delete_run(run.info.run_id)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow would rather have a database since 3.7
    return Server(tmp_path / "mlruns")


@pytest.fixture
def work(tmp_path: Path) -> str:
    return str(tmp_path / "model" / "_training")


def train(work: str, done: int, until: int, lines: list[str], error: BaseException | None = None) -> None:
    """Simulate a training that resumes after `done` epochs and ends normally or with the error."""
    options: dict[str, Any] = {"run_name": "mine", "parameters": PARAMETERS, "report": lines.append}
    with tracking(work, epochs(done), **options) as trackers:
        for count in range(done, until + 1):
            trackers.log(epochs(count))
        if error:
            raise error


def test_an_interrupted_training_is_one_run_with_every_epoch_once(
    server: Server, work: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    lines: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        train(work, 0, 2, lines, KeyboardInterrupt())
    (interrupted,) = server.runs()

    train(work, 1, 3, lines)  # the second epoch's checkpoint was lost: it is done again
    train(work, 3, 3, lines)  # the same command after the end

    (run,) = server.runs()
    assert (interrupted.info.status, run.info.status) == ("KILLED", "FINISHED")
    assert run.info.run_name == "mine"
    for key, curve in expected_curves(3).items():
        assert server.curve(run, key) == curve
    assert run.data.params == {
        "recipe": "small",
        "seed": "0",
        "training.epochs": "3",
        "training.learning_rate": "0.001",
    }
    assert curves(Path(work) / EVENTS_FOLDER) == expected_curves(3)
    assert lines == []


def test_a_training_that_fails_is_a_failed_run(server: Server, work: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "captions")

    with pytest.raises(ValueError, match="planted"):
        train(work, 0, 1, [], ValueError("planted"))

    assert [run.info.status for run in server.runs("captions")] == ["FAILED"]


def test_a_run_that_was_deleted_is_replaced_by_a_new_one_with_all_epochs(
    server: Server, work: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    train(work, 0, 1, [])
    server.remove(server.runs()[0])

    train(work, 1, 2, [])

    (run,) = server.runs()
    assert server.curve(run, "cider_d") == expected_curves(2)["cider_d"]


def test_without_the_variable_there_is_no_run_and_no_message(work: str, tmp_path: Path) -> None:
    lines: list[str] = []

    train(work, 0, 2, lines)

    assert lines == []
    assert [path.name for path in Path(work).iterdir()] == [EVENTS_FOLDER]


def test_an_unreachable_server_costs_one_message_and_gets_all_epochs_when_it_is_back(
    server: Server, work: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    lines: list[str] = []

    train(work, 0, 2, lines)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    train(work, 2, 2, [])

    assert len(lines) == 1
    assert "MLflow" in lines[0]
    assert "secret" not in lines[0]
    assert capfd.readouterr() == ("", "")
    (run,) = server.runs()
    assert server.curve(run, "cider_d") == expected_curves(2)["cider_d"]
    assert json.loads((Path(work) / MLFLOW_FILE).read_text()) == {"tracking_uri": server.uri, "run_id": run.info.run_id}


def test_any_error_of_a_tracker_is_reported_once(tmp_path: Path) -> None:
    (tmp_path / EVENTS_FOLDER).write_text("in the way")
    lines: list[str] = []

    train(str(tmp_path), 0, 3, lines)

    assert len(lines) == 1
    assert "TensorBoard" in lines[0]


def test_a_run_that_the_environment_names_is_continued(
    server: Server, work: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    MlflowRun(f"{work}/{MLFLOW_FILE}", tracking_uri=server.uri, run_name="theirs", parameters={}).log([])
    (theirs,) = server.runs()
    (Path(work) / MLFLOW_FILE).unlink()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("MLFLOW_RUN_ID", theirs.info.run_id)

    train(work, 0, 1, [])

    assert [run.info.run_id for run in server.runs()] == [theirs.info.run_id]
    assert server.curve(theirs, "cider_d") == expected_curves(1)["cider_d"]
