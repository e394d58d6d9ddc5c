from __future__ import annotations

import codecs
import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imcap_ray.data.datasets import load_dataset
from imcap_ray.errors import InputError, OutputError
from imcap_ray.exports.suggestions import LONGEST_SIDE, TABLE_FILE, Suggestions, choose_diverse, suggest_images
from imcap_ray.exports.text import guard_cell
from imcap_ray.models.captioner import Captioner
from imcap_ray.runs.captioned_images import CaptionedImageSource
from tests.small_data import jpeg, write_model_folder
from tests.unit.exports.test_exports import FAILED, ODD_CAPTIONS, ODD_NAMES, row, write_captions, write_images


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Captioner:
    return Captioner.load(write_model_folder(tmp_path_factory.mktemp("model")))


def suggest(captions: Path, output: Path, captioner: Captioner, *, count: int) -> Suggestions:
    images = CaptionedImageSource(str(captions), allow_outside_paths=True)
    return suggest_images(str(captions), str(output), count=count, captioner=captioner, images=images)


def read_rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / TABLE_FILE, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def test_all_images_of_a_small_set_are_written_and_the_folder_is_a_data_set(
    tmp_path: Path, captioner: Captioner
) -> None:
    captions = write_captions(tmp_path / "captions", write_images(tmp_path / "images", ODD_NAMES))

    suggestions = suggest(captions, tmp_path / "out", captioner, count=100)

    rows = read_rows(tmp_path / "out")
    assert suggestions.num_images == len(rows) == len(ODD_NAMES)
    assert len({one["file_name"] for one in rows}) == len(rows)
    assert (tmp_path / "out" / TABLE_FILE).read_bytes().startswith(codecs.BOM_UTF8), "for spreadsheets"
    data = load_dataset(str(tmp_path / "out"))
    assert data.table.num_rows == len(ODD_NAMES)
    shown = {guard_cell(" ".join(caption.split())) for caption in ODD_CAPTIONS}
    assert {text for texts in data.table["captions"].to_pylist() for text in texts} == shown


def test_images_of_which_the_model_is_sure_are_not_suggested(tmp_path: Path, captioner: Captioner) -> None:
    rows = write_images(tmp_path / "images", [f"{number:02}.jpg" for number in range(40)])
    for number, one in enumerate(rows):
        one |= {"confidence": 0.2 + number / 100, "familiarity": 0.9 - number / 100}
    rows[20] |= FAILED
    rows[39] |= {"status": "duplicate", "duplicate_of": rows[0]["image_id"]}
    captions = write_captions(tmp_path / "captions", rows)

    suggestions = suggest(captions, tmp_path / "out", captioner, count=3)

    found = [one["image_id"] for one in read_rows(tmp_path / "out")]
    assert found[0] == "00.jpg" and len(found) == 3
    assert set(found) <= {f"{number:02}.jpg" for number in [*range(15), *range(24, 39)]}
    assert suggestions.num_candidates == 30


def test_images_that_cannot_be_read_or_have_changed_are_left_out_and_counted(
    tmp_path: Path, captioner: Captioner
) -> None:
    rows = write_images(tmp_path / "images", ["a.jpg", "b.jpg", "c.jpg", "d.jpg"])
    (tmp_path / "images" / "a.jpg").unlink()
    (tmp_path / "images" / "b.jpg").write_bytes(b"broken")
    rows[2]["sha256"] = "0" * 64
    captions = write_captions(tmp_path / "captions", rows)

    suggestions = suggest(captions, tmp_path / "out", captioner, count=4)

    assert suggestions.num_unreadable == 3
    assert [one["image_id"] for one in read_rows(tmp_path / "out")] == ["d.jpg"]


def test_images_keep_their_proportions_and_are_small(tmp_path: Path, captioner: Captioner) -> None:
    (tmp_path / "wide.jpg").write_bytes(jpeg(0))
    Image.new("RGB", (3000, 1000), "green").save(tmp_path / "wide.jpg")
    captions = write_captions(tmp_path / "captions", [row("wide.jpg", image_path=str(tmp_path / "wide.jpg"))])

    suggest(captions, tmp_path / "out", captioner, count=1)

    [name] = [one["file_name"] for one in read_rows(tmp_path / "out")]
    with Image.open(tmp_path / "out" / name) as image:
        assert image.size == (LONGEST_SIDE, 171)


def test_each_kind_of_image_is_chosen_before_a_second_one_of_any_kind() -> None:
    random = np.random.default_rng(0)
    kinds = random.normal(size=(5, 32))
    features = np.repeat(kinds, 20, axis=0) + 0.01 * random.normal(size=(100, 32))

    chosen = choose_diverse(features.astype(np.float32), 5)

    assert chosen[0] == 0
    assert sorted(number // 20 for number in chosen) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("features", [np.ones((4, 3)), np.zeros((4, 3))])
def test_equal_images_are_chosen_once_each(features: Any) -> None:
    assert sorted(choose_diverse(features.astype(np.float32), 9)) == [0, 1, 2, 3]


def test_a_folder_with_files_and_captions_without_images_are_errors(tmp_path: Path, captioner: Captioner) -> None:
    captions = write_captions(tmp_path / "captions", write_images(tmp_path / "images", ["a.jpg"]))
    failed = write_captions(tmp_path / "failed", [row("a.jpg") | FAILED])

    with pytest.raises(OutputError, match="new folder"):
        suggest(captions, tmp_path / "images", captioner, count=1)
    with pytest.raises(OutputError, match="new folder"):
        suggest(captions, tmp_path / "images" / "a.jpg", captioner, count=1)
    with pytest.raises(InputError, match="no captioned images"):
        suggest(failed, tmp_path / "out", captioner, count=1)
    assert not (tmp_path / "out").exists()
