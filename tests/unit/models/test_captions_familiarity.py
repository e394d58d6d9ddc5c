"""The familiarity that comes with captions, from the model folder to the caption."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from imcap_ray.errors import ModelError
from imcap_ray.models.captioner import Captioner, load_captioner
from imcap_ray.models.familiarity import Familiarity
from imcap_ray.models.model_averages import average_models
from imcap_ray.models.model_files import FAMILIARITY_FILE
from imcap_ray.models.model_folder import read_model_folder
from tests.small_data import IMAGE_SIZE, write_model_folder

PIXELS = np.random.default_rng(0).integers(0, 256, (60, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)


def familiarity_of(folder: Path) -> Familiarity:
    """That of a model trained on half of the images and validated on the other half."""
    features = Captioner.load(folder).encode(PIXELS).mean(1).numpy()
    learned = Familiarity.fit(features[:30], features[30:])
    assert learned is not None
    return learned


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("without"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, without: Path) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("model"), familiarity=familiarity_of(without))


def test_familiarity_comes_with_captions_and_changes_neither_them_nor_the_fingerprint(
    model: Path, without: Path
) -> None:
    captioner, plain = Captioner.load(model), Captioner.load(without)

    found, expected = captioner.caption_pixels(PIXELS), plain.caption_pixels(PIXELS)

    assert captioner.fingerprint == plain.fingerprint
    for captions, others in zip(found, expected, strict=True):
        assert [(one.text, one.logprob) for one in captions] == [(one.text, one.logprob) for one in others]
        assert all(0 < one.familiarity <= 1 for one in captions)
        assert all(math.isnan(one.familiarity) for one in others)


def test_familiarity_is_bit_identical_in_any_batch(model: Path) -> None:
    captioner = Captioner.load(model)
    together = captioner.caption_pixels(PIXELS)

    assert captioner.caption_pixels(PIXELS[[7, 3, 41]]) == [together[7], together[3], together[41]]


def test_a_file_without_a_checksum_belongs_to_another_model_and_is_ignored(model: Path, tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path)
    (folder / FAMILIARITY_FILE).write_bytes((model / FAMILIARITY_FILE).read_bytes())

    assert read_model_folder(folder).familiarity is None


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_damaged_file_is_an_error(without: Path, tmp_path: Path, damage: str) -> None:
    folder = write_model_folder(tmp_path, familiarity=familiarity_of(without))
    if damage == "missing":
        (folder / FAMILIARITY_FILE).unlink()
    else:
        (folder / FAMILIARITY_FILE).write_bytes(b"\0" + (folder / FAMILIARITY_FILE).read_bytes())

    with pytest.raises(ModelError, match=f"{FAMILIARITY_FILE}"):
        read_model_folder(folder)


def test_an_ensemble_has_the_mean_familiarity_of_its_cnns(model: Path, without: Path, tmp_path: Path) -> None:
    other_weights = write_model_folder(tmp_path / "plain", seed=1)
    other = write_model_folder(tmp_path / "other", seed=1, familiarity=familiarity_of(other_weights))

    together = load_captioner([model, other]).caption_pixels(PIXELS)
    first, second = (Captioner.load(folder).caption_pixels(PIXELS) for folder in (model, other))

    for captions, ones, others in zip(together, first, second, strict=True):
        assert captions[0].familiarity == pytest.approx((ones[0].familiarity + others[0].familiarity) / 2, abs=0.05)
    unknown = load_captioner([model, other_weights]).caption_pixels(PIXELS)
    assert all(math.isnan(captions[0].familiarity) for captions in unknown)


def test_the_average_of_models_has_no_familiarity_until_it_is_trained(model: Path) -> None:
    folder = read_model_folder(model)

    assert average_models([folder, folder]).familiarity is None


def test_patterns_are_unfamiliar_to_the_bundled_model() -> None:
    captioner = Captioner.load()
    size = captioner.image_size
    stripes = np.zeros((3, size, size), np.uint8)
    stripes[:, ::16] = 255
    noise = np.random.default_rng(0).integers(0, 256, (3, size, size), dtype=np.uint8)

    for [caption] in captioner.caption_pixels(np.stack([stripes, noise])):
        assert 0 < caption.familiarity < 0.05


def test_the_familiarity_of_the_bundled_model_takes_less_than_a_megabyte() -> None:
    familiarity = read_model_folder().familiarity

    assert familiarity is not None
    assert len(familiarity.to_bytes()) < 1e6
