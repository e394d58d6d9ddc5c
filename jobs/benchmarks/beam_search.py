"""Speed of the beam search over a batch of images, next to one image at a time.

python jobs/benchmarks/beam_search.py
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import click
import numpy as np
import torch
from shared import json_option, show

from imcap_ray.data.synthetic_images import write_photographs
from imcap_ray.distributed.benchmark import Rate, describe_machine
from imcap_ray.models.caption import COMPUTE_BATCH_SIZE
from imcap_ray.models.torch_captioner import load_torch_captioner, search_captions


@click.command()
@click.option("--images", default=64, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@json_option
def main(images: int, rounds: int, as_json: bool) -> None:
    """Images per second of the search alone, in batches as `imcap` does it and one by one, and whether both agree."""
    captioner = load_torch_captioner()
    with tempfile.TemporaryDirectory(prefix="imcap-bench-") as folder:
        write_photographs(folder, images, (224, 224))
        pixels = np.stack([captioner.read_pixels(file) for file in sorted(Path(folder).rglob("*.jpg"))])
    features = captioner.encode(pixels).to(captioner.device)
    rates: dict[str, list[float]] = {"batches": [], "one by one": []}
    captions: dict[str, list[str]] = {}
    for _ in range(rounds + 1):
        for name, size in (("batches", COMPUTE_BATCH_SIZE), ("one by one", 1)):
            start = time.perf_counter()
            captions[name] = [
                best[0].text
                for chunk in features.split(size)  # type: ignore[no-untyped-call]
                for best in search_captions(captioner.decoder, captioner.vocabulary, chunk, captioner.search)
            ]
            rates[name].append(images / (time.perf_counter() - start))
    batches, one_by_one = (Rate(tuple(values[1:])) for values in rates.values())  # the first round warms up
    same = sum(a == b for a, b in zip(captions["batches"], captions["one by one"], strict=True))
    show(
        {
            "machine": describe_machine(),
            "threads": torch.get_num_threads(),
            "batches": batches.to_dict(),
            "one_by_one": one_by_one.to_dict(),
            "ratio": round(batches.median / one_by_one.median, 2),
            "same_captions": f"{same} of {images}",
        },
        as_json,
    )


if __name__ == "__main__":
    main()
