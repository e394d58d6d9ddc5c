"""Speed of one optimizer step over all positions at once, next to the loop over positions that tutorials have.

python jobs/benchmarks/train_step.py
"""

from __future__ import annotations

import time

import click
import numpy as np
import torch
from shared import json_option, show

from imcap_ray.config import load_recipe
from imcap_ray.models.decoders import Decoder, build_decoder
from imcap_ray.text.vocabulary import PADDING_ID
from imcap_ray.training.batches import CaptionBatch, make_batch
from imcap_ray.training.optimization import Optimization, prefers_bfloat16

VOCABULARY_SIZE = 2924


@click.command()
@click.option("--images", default=32, show_default=True, help="Images of a step, each with five captions.")
@click.option("--rounds", default=7, show_default=True, help="Steps of each kind; the median counts.")
@json_option
def main(images: int, rounds: int, as_json: bool) -> None:
    """Captions per second of the default recipe's optimizer step, next to a plain loop over the positions.

    The plain loop has the same decoder, loss and optimizer, in float32. Each caption has its own copy of its image's
    features, all captions are padded to the longest, and the decoder runs once for each position. Lengths are those of
    Flickr8k: 10.8 tokens on average, with a standard deviation of 3.8.
    """
    recipe = load_recipe("lite2-attention")
    torch.manual_seed(0)
    decoder = build_decoder(recipe.decoder, num_channels=1280, vocabulary_size=VOCABULARY_SIZE)
    batch = _make_batch(images)
    num_captions = len(batch.lengths)
    at_once = float(_loss_at_once(decoder.eval(), batch).detach())
    in_loop = float(_loss_in_a_loop(decoder.eval(), batch).detach())
    assert abs(at_once - in_loop) < 0.01 * in_loop, (at_once, in_loop)

    optimization = Optimization(decoder, decoder, recipe.training, total_steps=10**6)
    plain = torch.optim.AdamW(decoder.parameters(), lr=1e-4)

    def plain_step() -> None:
        plain.zero_grad()
        _loss_in_a_loop(decoder.train(), batch).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        plain.step()

    seconds: dict[str, list[float]] = {"imcap": [], "plain": []}
    for _ in range(rounds + 1):  # taking turns, so that other load on the machine affects both; the first warms up
        for kind, step in (("imcap", lambda: optimization.step(batch)), ("plain", plain_step)):
            start = time.perf_counter()
            step()
            seconds[kind].append(time.perf_counter() - start)
    rates = {kind: [num_captions / value for value in values[1:]] for kind, values in seconds.items()}
    show(
        {
            "captions": num_captions,
            "threads": torch.get_num_threads(),
            "bfloat16": prefers_bfloat16(torch.device("cpu")),
            "captions_per_second": {kind: round(float(np.median(values)), 1) for kind, values in rates.items()},
            "lowest_and_highest": {
                kind: [round(min(values), 1), round(max(values), 1)] for kind, values in rates.items()
            },
            "ratio": round(float(np.median(rates["imcap"]) / np.median(rates["plain"])), 2),
        },
        as_json,
    )


def _make_batch(images: int) -> CaptionBatch:
    generator = np.random.default_rng(0)
    captions = [
        [[1, *generator.integers(4, VOCABULARY_SIZE, size=length).tolist(), 2] for length in lengths]
        for lengths in np.clip(generator.normal(10.8, 3.8, size=(images, 5)).round().astype(int), 4, 22)
    ]
    return make_batch(torch.rand(images, 49, 1280), captions, torch.device("cpu"))


def _loss_at_once(decoder: Decoder, batch: CaptionBatch) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=prefers_bfloat16(torch.device("cpu"))):
        logits = decoder(batch.inputs, batch.token_ids, batch.lengths, batch.image_of_caption)
    return torch.nn.functional.cross_entropy(logits.float(), batch.targets, ignore_index=PADDING_ID)


def _loss_in_a_loop(decoder: Decoder, batch: CaptionBatch) -> torch.Tensor:
    step, state = decoder.start(batch.inputs[batch.image_of_caption], 1)
    positions = []
    for position in range(batch.token_ids.shape[1]):
        log_probs, state = step(batch.token_ids[:, position : position + 1], state)
        positions.append(log_probs[:, 0])
    packed = torch.nn.utils.rnn.pack_padded_sequence(torch.stack(positions, dim=1), batch.lengths, batch_first=True)
    return torch.nn.functional.nll_loss(packed.data, batch.targets, ignore_index=PADDING_ID)


if __name__ == "__main__":
    main()
