"""An ensemble captions by the mean of the log-probabilities of its models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from imcap_ray.data.image_decoding import decode_image
from imcap_ray.errors import ModelError
from imcap_ray.models.captioner import Captioner, load_captioner
from imcap_ray.text.vocabulary import START_ID
from tests.small_data import IMAGE_SIZE, WORDS, jpeg, write_model_folder

PIXELS = np.stack([decode_image(jpeg(number), image_size=IMAGE_SIZE).pixels for number in range(4)])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write_model_folder(tmp_path_factory.mktemp(name), decoder=name) for name in ("attention", "lstm")}


def test_an_ensemble_of_one_model_twice_captions_like_the_model(folders: dict[str, Path]) -> None:
    alone = load_captioner([folders["attention"]])

    twice = load_captioner([folders["attention"], folders["attention"]])

    for one, both in zip(alone.caption_pixels(PIXELS), twice.caption_pixels(PIXELS), strict=True):
        assert [caption.text for caption in both] == [caption.text for caption in one]
        assert both[0].logprob == pytest.approx(one[0].logprob, abs=1e-4)
    assert twice.fingerprint != alone.fingerprint


def test_a_step_is_the_normalised_mean_of_the_members_log_probabilities(folders: dict[str, Path]) -> None:
    together = load_captioner([folders["attention"], folders["lstm"]])

    tokens = torch.full((4, 1), START_ID)
    pixels = torch.from_numpy(PIXELS)
    with torch.inference_mode():
        expected = []
        for name in ("attention", "lstm"):
            member = Captioner.load(folders[name])
            step, state = member.decoder.start(member.encoder(pixels), 1)
            expected.append(step(tokens, state)[0])
        step, state = together.decoder.start(together.encoder(pixels), 1)
        actual, next_state = step(tokens, state)

    torch.testing.assert_close(actual, torch.stack(expected).mean(dim=0).log_softmax(dim=-1))
    assert [tensor.shape for tensor in next_state] == [tensor.shape for tensor in state]
    assert len(state) == 4 + 2
    torch.testing.assert_close(actual.exp().sum(dim=-1), torch.ones(4, 1))


def test_the_error_for_incompatible_models_names_the_difference(folders: dict[str, Path], tmp_path: Path) -> None:
    words = tuple("hound" if word == "dog" else word for word in WORDS)
    other = write_model_folder(tmp_path / "other", words=words)

    with pytest.raises(ModelError, match="cannot caption together: they differ in their vocabulary"):
        load_captioner([folders["attention"], other])
