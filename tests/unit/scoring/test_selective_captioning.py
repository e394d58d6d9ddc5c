"""What jobs/benchmarks/selective_captioning.py keeps of familiar and unfamiliar images."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from imcap_ray.scoring.evaluation_report import evaluate

BENCHMARKS = Path(__file__).parents[3] / "jobs" / "benchmarks"
REFERENCES = {
    "a.jpg": ["a dog runs in the grass", "the dog runs"],
    "b.jpg": ["a man holds a ball", "the man has a red ball"],
    "c.jpg": ["two cats sit on a wall", "cats on a wall"],
    "d.jpg": ["a child jumps in the water", "the child jumps"],
}
CAPTIONS = {image_id: texts[0] for image_id, texts in REFERENCES.items()} | {"d.jpg": "a"}


def write(path: Path, captions: Mapping[str, str], confidence: Sequence[float], familiarity: Sequence[float]) -> None:
    columns = {"image_id": [*captions], "caption": [*captions.values()]}
    pq.write_table(pa.table({**columns, "confidence": confidence, "familiarity": familiarity}), path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four familiar images, of which the last has a bad caption, and four others, of which one has no caption."""
    rows = [{"image_id": image_id, "split": "test", "captions": texts} for image_id, texts in REFERENCES.items()]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "references.parquet")
    # Confidence keeps a and two unfamiliar images. Familiarity keeps a, b and d. Both keep a, b and c.
    write(tmp_path / "captions.parquet", CAPTIONS, [0.9, 0.6, 0.55, 0.1], [0.8, 0.7, 0.5, 0.9])
    others = {"cup.jpg": "a dog", "car.jpg": "a dog", "tree.jpg": "a man", "broken.jpg": ""}
    write(tmp_path / "others.parquet", others, [0.8, 0.7, 0.2, 0.0], [0.01, 0.02, 0.03, 0.0])
    return tmp_path


def measure(folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> Result:
    monkeypatch.syspath_prepend(BENCHMARKS)
    program = importlib.import_module("selective_captioning")
    tables = [str(folder / f"{name}.parquet") for name in ("captions", "references", "others")]
    return CliRunner().invoke(program.main, [*tables, *options])


def values(measured: Mapping[str, Any], selection: str) -> list[float]:
    return [measured[selection][name][0] for name in ("unfamiliar_share", "cider_d_of_familiar", "cider_d")]


def test_unfamiliar_images_among_the_kept_count_as_mistakes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = measure(folder, monkeypatch, "--share", str(3 / 7), "--json")

    assert done.exit_code == 0, done.output
    measured = json.loads(done.output)
    a, b, c, d = map(float, evaluate(CAPTIONS, REFERENCES).image_scores["cider_d"])
    assert (measured["familiar_images"], measured["unfamiliar_images"], measured["kept"]) == (4, 3, 3)
    expected = {
        "all": [3 / 7, (a + b + c + d) / 4, (a + b + c + d) / 7],
        "confidence": [2 / 3, a, a / 3],
        "familiarity": [0, (a + b + d) / 3, (a + b + d) / 3],
        "both": [0, (a + b + c) / 3, (a + b + c) / 3],
    }
    for selection, numbers in expected.items():
        assert values(measured, selection) == pytest.approx(numbers, abs=1e-4), selection
    assert values(measured, "both_minus_confidence")[0] == pytest.approx(-2 / 3, abs=1e-4)


def test_equal_values_count_against_a_ranking(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = {"cup.jpg": "a dog", "car.jpg": "a dog", "tree.jpg": "a man", "broken.jpg": "a man"}
    write(folder / "captions.parquet", CAPTIONS, [0.5] * 4, [0.5] * 4)
    write(folder / "others.parquet", others, [0.5] * 4, [0.5] * 4)

    measured = json.loads(measure(folder, monkeypatch, "--json").output)

    assert [values(measured, name)[0] for name in ("all", "confidence", "familiarity", "both")] == [0.5, 1, 1, 1]


def test_captions_without_familiarity_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder / "captions.parquet", CAPTIONS, [0.5] * 4, [float("nan")] * 4)

    done = measure(folder, monkeypatch)

    assert done.exit_code == 1
    assert "captions.parquet has no familiarity" in done.output
