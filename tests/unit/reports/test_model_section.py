"""What a report finds of the model that made its captions, and what it says when it finds none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from imcap_ray.models.captioner import Captioner
from imcap_ray.models.model_folder import read_model_folder
from imcap_ray.reports.model_section import read_model_of_run
from tests.small_data import jpeg, write_model_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = Path(write_model_folder(tmp_path_factory.mktemp("model")))
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps({**metrics, "history": [{"epoch": 1, "cider_d": 0.5}]}))
    return str(folder)


def test_the_model_of_a_run_tells_its_training_and_where_it_looks(model: str) -> None:
    run = {"model": model, "model_fingerprint": read_model_folder(model).fingerprint}

    found = read_model_of_run(run, with_attention=True)

    assert (found.history, found.note) == ([{"epoch": 1, "cider_d": 0.5}], "")
    assert found.attend is not None
    assert [word for word, _ in found.attend(jpeg(1), "a dog")] == ["a", "dog"]


def test_without_attention_no_model_is_loaded(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Captioner, "load")

    found = read_model_of_run({"model": model}, with_attention=False)

    assert (len(found.history), found.attend, found.note) == (1, None, "")


def test_a_model_that_is_not_there_or_another_by_now_is_said(model: str, tmp_path: Path) -> None:
    gone = read_model_of_run({"model": str(tmp_path / "gone")}, with_attention=True)
    other = read_model_of_run({"model": model, "model_fingerprint": "0" * 64}, with_attention=True)

    assert "gone is not a model folder" in gone.note
    assert other.note == f"{model} is another model by now than the one of these captions"
    assert gone.attend is other.attend is None
    assert gone.history == other.history == ()


@pytest.mark.parametrize("metrics", ["[]", '{"history": 3}', '{"history": [3]}', '{"history": {"epoch": 1}}'])
def test_damaged_metrics_are_said_and_break_no_report(metrics: str, tmp_path: Path) -> None:
    folder = Path(write_model_folder(tmp_path))
    (folder / "metrics.json").write_text(metrics)

    found = read_model_of_run({"model": str(folder)}, with_attention=True)

    assert "damaged" in found.note
    assert (found.history, found.attend) == ((), None)


def test_a_decoder_without_attention_is_said(tmp_path: Path) -> None:
    model = str(write_model_folder(tmp_path, decoder="lstm"))

    assert read_model_of_run({"model": model}, with_attention=True).note == f"{model} has a decoder without attention"


def test_captions_of_no_known_model_need_no_note() -> None:
    assert read_model_of_run({}, with_attention=True).note == ""
