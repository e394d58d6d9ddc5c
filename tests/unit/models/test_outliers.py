from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imcap_ray.data.datasets import load_dataset
from imcap_ray.models.captioner import Captioner
from imcap_ray.models.outliers import check_outliers, compare_with, find_outliers, share_unfamiliar
from tests.small_data import FEATURE_SIZE, features_of, write_flickr8k


def test_a_few_images_of_other_kinds_are_outliers_and_the_most_unusual_is_the_first() -> None:
    features = features_of(300, seed=1)
    features[7] = features_of(1, seed=2, kind=1)
    features[200] = 9 * np.random.default_rng(3).normal(size=FEATURE_SIZE)

    outliers = find_outliers(features)

    assert outliers[:2].tolist() == [200, 7]
    assert len(outliers) <= 5


def test_images_of_one_kind_have_hardly_any_outliers() -> None:
    assert len(find_outliers(features_of(1000, seed=4))) <= 10


@pytest.mark.parametrize("number", [0, 1, 30, 79])
def test_among_few_images_there_are_no_outliers(number: int) -> None:
    assert len(find_outliers(features_of(number, seed=5))) == 0


def test_equal_images_are_no_outliers() -> None:
    assert len(find_outliers(np.ones((200, FEATURE_SIZE), np.float32))) == 0


def test_a_split_of_another_kind_is_unlike_the_training_images() -> None:
    training = features_of(400, seed=6)

    assert share_unfamiliar(compare_with(training, features_of(200, seed=7))) < 0.1
    assert share_unfamiliar(compare_with(training, features_of(200, seed=8, kind=1))) == 1
    assert share_unfamiliar(compare_with(training, features_of(3, seed=9, kind=1))) == 0  # too few to say


def test_a_check_names_outliers_and_passes_over_images_that_cannot_be_read(tmp_path: Path) -> None:
    data = write_flickr8k(tmp_path / "flickr8k", num_train=100, num_validation=24)
    images = data / "Flicker8k_Dataset"
    (images / "0003_photo.jpg").write_bytes(b"broken")
    (images / "0004_photo.jpg").unlink()
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(images / "0005_photo.jpg")
    progress = list[tuple[int, int]]()

    findings = check_outliers(
        load_dataset(str(data)), Captioner.load(), on_progress=lambda *counts: progress.append(counts)
    )

    [outliers] = [finding for finding in findings if finding.code == "outliers"]
    assert outliers.examples[0] == "0005_photo.jpg"
    assert outliers.count <= 3
    assert progress[-1][0] == progress[-1][1]
