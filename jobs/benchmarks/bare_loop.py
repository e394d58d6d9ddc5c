"""The default recipe's cross-entropy without anything around it, for training.py to time; torchrun starts it too."""

from __future__ import annotations

import itertools
import json
import os
import time

import click
import torch

from imcap_ray.config import load_recipe
from imcap_ray.data.datasets import TRAIN, load_dataset
from imcap_ray.models.decoders import build_decoder
from imcap_ray.models.encoders import build_encoder
from imcap_ray.models.inference_optimization import optimize_for_inference
from imcap_ray.text.vocabulary import Vocabulary
from imcap_ray.training.batches import make_batch
from imcap_ray.training.optimization import Optimization


@click.command()
@click.argument("data")
@click.argument("epochs", type=int)
@click.option("--encode", is_flag=True, help="Compute features in each step instead of taking them from memory.")
def main(data: str, epochs: int, encode: bool) -> None:
    """Print the seconds of each epoch over DATA, as a JSON list."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    if world_size > 1:
        torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    recipe = load_recipe("lite2-attention")
    captions = load_dataset(data).split(TRAIN)["captions"].to_pylist()
    words = Vocabulary.build(
        itertools.chain.from_iterable(captions),
        tokenizer="ptb",
        min_count=recipe.vocabulary.min_count,
    )
    max_length = recipe.training.max_caption_length
    ids = [[words.to_ids(text, max_length=max_length) for text in texts] for texts in captions[rank::world_size]]
    encoder, shape, dtype = None, (49, 1280), torch.float16
    if encode:
        encoder = optimize_for_inference(build_encoder(recipe.encoder, recipe.preprocessing), torch.device("cpu"))
        shape, dtype = (3, encoder.image_size, encoder.image_size), torch.uint8
    inputs = (torch.rand(len(ids), *shape) * 255).to(dtype)  # the content makes no difference to the time
    decoder = build_decoder(recipe.decoder, num_channels=1280, vocabulary_size=len(words))
    model = torch.nn.parallel.DistributedDataParallel(decoder) if world_size > 1 else decoder
    optimization = Optimization(model, decoder, recipe.training, total_steps=10**6)
    seconds = []
    for _ in range(epochs):
        start = time.perf_counter()
        for chosen in torch.randperm(len(ids)).split(recipe.training.batch_size // world_size):
            chunk = inputs[chosen]
            if encoder:
                with torch.inference_mode():
                    chunk = encoder(chunk)
            optimization.step(make_batch(chunk.clone(), [ids[number] for number in chosen], torch.device("cpu")))
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        click.echo(json.dumps(seconds))
    if world_size > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
