from __future__ import annotations

import math

import numpy as np
import pytest

from imcap_ray.errors import ModelError
from imcap_ray.models.familiarity import MIN_IMAGES, Familiarity, mean_familiarity

CHANNELS, DIMENSIONS = 64, 6


def like_training(number: int, *, seed: int) -> np.ndarray:
    """Return features in a subspace of a few dimensions, with some noise."""
    random = np.random.default_rng(seed)
    basis = np.random.default_rng(0).normal(size=(DIMENSIONS, CHANNELS))
    noise = 0.1 * random.normal(size=(number, CHANNELS))
    return (3 + random.normal(size=(number, DIMENSIONS)) @ basis + noise).astype(np.float32)


def unlike_training(number: int) -> np.ndarray:
    return (3 + 2 * np.random.default_rng(9).normal(size=(number, CHANNELS))).astype(np.float32)


@pytest.fixture(scope="module")
def familiarity() -> Familiarity:
    learned = Familiarity.fit(like_training(400, seed=1), like_training(300, seed=2))
    assert learned is not None
    return learned


def test_one_in_twenty_familiar_images_and_every_unlike_one_are_below_the_threshold(familiarity: Familiarity) -> None:
    familiar = familiarity.of(like_training(2000, seed=3))

    assert 0.03 < np.mean(familiar < 0.05) < 0.07
    assert abs(np.median(familiar) - 0.5) < 0.05
    assert (familiarity.of(unlike_training(100)) < 0.05).all()


def test_familiarity_does_not_depend_on_the_batch_and_stays_within_0_and_1(familiarity: Familiarity) -> None:
    features = np.concatenate([like_training(20, seed=4), unlike_training(20), np.zeros((1, CHANNELS), np.float32)])

    together = familiarity.of(features)

    assert [float(familiarity.of(features[number : number + 1])[0]) for number in range(41)] == together.tolist()
    assert ((together > 0) & (together <= 1)).all()


def test_features_that_are_not_finite_have_no_familiarity(familiarity: Familiarity) -> None:
    features = like_training(3, seed=5)
    features[0, 0], features[1, 1] = math.nan, math.inf

    assert np.isnan(familiarity.of(features)).tolist() == [True, True, False]


def test_a_stored_familiarity_gives_the_same_numbers(familiarity: Familiarity) -> None:
    features = np.concatenate([like_training(50, seed=6), unlike_training(50)])

    stored = familiarity.to_bytes()

    assert Familiarity.from_bytes(stored).of(features).tolist() == familiarity.of(features).tolist()


def test_the_file_is_smaller_than_a_megabyte_for_any_cnn() -> None:
    random = np.random.default_rng(0)
    learned = Familiarity.fit(random.normal(size=(300, 4096)), random.normal(size=(100, 4096)))

    assert learned is not None
    assert len(learned.to_bytes()) < 1e6


@pytest.mark.parametrize("num_train, num_validation", [(MIN_IMAGES - 1, 100), (100, MIN_IMAGES - 1)])
def test_too_few_images_teach_no_familiarity(num_train: int, num_validation: int) -> None:
    assert Familiarity.fit(like_training(num_train, seed=1), like_training(num_validation, seed=2)) is None


def test_several_models_give_the_mean_of_theirs(familiarity: Familiarity) -> None:
    features = like_training(10, seed=7)
    both = mean_familiarity([familiarity, familiarity], np.concatenate([features, unlike_training(10)], axis=1))

    assert both == pytest.approx((familiarity.of(features) + familiarity.of(unlike_training(10))) / 2)


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-9], lambda data: b"{}" + data])
def test_a_corrupt_file_is_an_error(familiarity: Familiarity, damage: object) -> None:
    with pytest.raises(ModelError, match="familiarity.safetensors is corrupt"):
        Familiarity.from_bytes(damage(familiarity.to_bytes()))  # type: ignore[operator]
