"""How a report shows the model that made its captions, and the note if there is nothing to show."""

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


def test_the_model_of_a_run_is_shown_with_its_history_and_attention(model: str) -> None:
    run = {"model": model, "model_fingerprint": read_model_folder(model).fingerprint}

    known = read_model_of_run(run, with_attention=True)

    assert (known.history, known.note) == ([{"epoch": 1, "cider_d": 0.5}], "")
    assert known.attend is not None
    assert [word for word, _ in known.attend(jpeg(1), "a dog")] == ["a", "dog"]


def test_without_attention_no_model_is_loaded(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Captioner, "load")

    known = read_model_of_run({"model": model}, with_attention=False)

    assert (len(known.history), known.attend, known.note) == (1, None, "")


def test_a_model_that_is_missing_or_has_changed_is_noted(model: str, tmp_path: Path) -> None:
    missing = read_model_of_run({"model": str(tmp_path / "missing")}, with_attention=True)
    other = read_model_of_run({"model": model, "model_fingerprint": "0" * 64}, with_attention=True)

    assert str(tmp_path / "missing") in missing.note
    assert model in other.note and "fingerprint" in other.note
    assert missing.attend is other.attend is None
    assert missing.history == other.history == ()


@pytest.mark.parametrize("metrics", ["[]", '{"history": 3}', '{"history": [3]}', '{"history": {"epoch": 1}}'])
def test_corrupt_metrics_are_noted_and_do_not_break_a_report(metrics: str, tmp_path: Path) -> None:
    folder = Path(write_model_folder(tmp_path))
    (folder / "metrics.json").write_text(metrics)

    known = read_model_of_run({"model": str(folder)}, with_attention=True)

    assert "corrupt" in known.note
    assert (known.history, known.attend) == ((), None)


def test_a_decoder_without_attention_is_noted(tmp_path: Path) -> None:
    model = str(write_model_folder(tmp_path, decoder="lstm"))

    assert "without attention" in read_model_of_run({"model": model}, with_attention=True).note


def test_captions_of_an_unknown_model_need_no_note() -> None:
    assert read_model_of_run({}, with_attention=True).note == ""
