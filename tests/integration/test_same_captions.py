"""Captions of real photographs: optimized as in plain float32, and in int8 as on another processor."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from imcap_ray.config import SearchConfig
from imcap_ray.data.datasets import VALIDATION, load_dataset
from imcap_ray.data.image_inputs import read_image_input
from imcap_ray.models.captioner import Captioner
from imcap_ray.models.decoders import Decoder
from imcap_ray.models.encoders import build_encoder
from imcap_ray.models.inference_optimization import optimize_for_inference
from imcap_ray.models.int8_captioner import Int8Networks
from imcap_ray.models.model_folder import read_model_folder
from imcap_ray.models.model_weights import select_tensors
from imcap_ray.scoring.metrics import score
from imcap_ray.text.vocabulary import END_ID, START_ID, SUPPRESSED_TOKEN_IDS

NUM_IMAGES = 100
FLICKR8K = os.environ.get("IMCAP_FLICKR8K", "")

pytestmark = pytest.mark.skipif(
    not Path(FLICKR8K, "Flickr8k.token.txt").is_file() and not list(Path(FLICKR8K or ".").glob("*/Flickr8k.token.txt")),
    reason="IMCAP_FLICKR8K names no Flickr8k: the captions of real photographs are not compared",
)


@torch.inference_mode()
def plain_caption(decoder: Decoder, features: Tensor, search: SearchConfig) -> tuple[int, ...]:
    """Search with lists as beams, each of which is decoded from its start at every position."""
    live: list[tuple[float, list[int]]] = [(0.0, [START_ID])]
    ended: list[tuple[float, list[int]]] = []
    for position in range(search.max_length + 1):
        grown = []
        lengths = torch.full((len(live),), position + 1)
        image_of_caption = torch.zeros(len(live), dtype=torch.long)
        logits = decoder(features, torch.tensor([words for _, words in live]), lengths, image_of_caption)
        for (logprob, words), log_probs in zip(live, logits[-len(live) :].log_softmax(dim=-1), strict=True):
            log_probs[list(SUPPRESSED_TOKEN_IDS)] = float("-inf")
            values, next_words = log_probs.topk(search.beam_size)
            if position == search.max_length:
                values, next_words = log_probs[[END_ID]], torch.tensor([END_ID])
            grown += [
                (logprob + value, [*words, word])
                for value, word in zip(values.tolist(), next_words.tolist(), strict=True)
            ]
        best = sorted(grown, key=lambda beam: -beam[0])[: search.beam_size]
        ended += [beam for beam in best if beam[1][-1] == END_ID]
        live = [beam for beam in best if beam[1][-1] != END_ID]
        if not live:
            break
    winner = max(ended, key=lambda beam: beam[0] / (len(beam[1]) - 1) ** search.length_penalty)
    return tuple(winner[1][1:-1])


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.slow)])
def test_captions_equal_those_of_the_reference_path_on_development_images(kind: str) -> None:
    rows: list[dict[str, Any]] = load_dataset(FLICKR8K).split(VALIDATION).slice(0, NUM_IMAGES).to_pylist()
    captioner = Captioner.load(device=kind if torch.cuda.is_available() else "cpu")
    if kind != captioner.device.type:  # no GPU here: what a CNN computes on one a CPU can compute too
        captioner.encoder = optimize_for_inference(captioner._trained_encoder, torch.device(kind))
    pixels = np.stack([captioner.read_pixels(row["image_path"]) for row in rows])
    folder = read_model_folder()
    encoder = build_encoder(folder.encoder, folder.preprocessing, load_weights=False)
    encoder.cnn.load_state_dict(select_tensors("encoder.", folder.tensors))
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in encoder.modules()), (
        "the reference encoder is not folded"
    )
    decoder = copy.deepcopy(captioner._trained_decoder)
    assert isinstance(decoder, Decoder)
    decoder.load_state_dict(select_tensors("decoder.", folder.tensors))

    fast = [best[0].text for best in captioner.caption_pixels(pixels)]
    plain = []
    for image in torch.from_numpy(pixels):
        with torch.inference_mode():
            features = encoder(image.unsqueeze(0))
        plain.append(captioner.vocabulary.to_text(plain_caption(decoder, features, captioner.search)))

    same = sum(one == other for one, other in zip(fast, plain, strict=True))
    assert same >= 0.98 * NUM_IMAGES
    references = {row["image_id"]: row["captions"] for row in rows}
    names = list(references)
    cider_d = [score(dict(zip(names, texts, strict=True)), references).cider_d for texts in (fast, plain)]
    assert abs(cider_d[0] - cider_d[1]) <= 0.005


def test_int8_features_are_those_of_the_processor_on_which_the_bundled_model_was_quantised() -> None:
    """The model contains residuals of all development images, computed in int8 on an Intel processor with VNNI."""
    rows: list[dict[str, Any]] = load_dataset(FLICKR8K).split(VALIDATION).slice(0, NUM_IMAGES).to_pylist()
    folder = read_model_folder()
    assert folder.int8 and folder.int8.familiarity
    networks = Int8Networks(folder.int8.image, folder.int8.step, vocabulary_size=folder.vocabulary_size)

    pixels = [read_image_input(row["image_path"], image_size=networks.image_size) for row in rows]
    features = np.concatenate([networks.encode(image[None])[0] for image in pixels])
    residuals = folder.int8.familiarity.residuals_of(features)

    distances = np.abs(residuals[:, None] - folder.int8.familiarity.residuals).min(axis=1)
    assert distances.max() < 1e-6, "not the rounding of the residuals: two of them are 4e-4 apart, in the mean"
