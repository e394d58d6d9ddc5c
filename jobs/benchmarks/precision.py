"""A quantised model in float32 and in int8: images per second in turn, captions in common, and scores.

python jobs/benchmarks/precision.py runs/mine-int8 ~/Pictures --references flickr8k/
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # as in an actor; read when torch is imported

import click
import numpy as np
from shared import json_option, require_rate, show

from imcap_ray.config import FLOAT32, INT8
from imcap_ray.data.image_inputs import read_image_input
from imcap_ray.distributed.benchmark import Rate, describe_machine
from imcap_ray.models.captioner import Captioner
from imcap_ray.runs.captions_table import open_captions

PRECISIONS = (FLOAT32, INT8)
SCORES = ("bleu_1", "bleu_4", "cider_d")


@click.command()
@click.argument("model")
@click.argument("images")
@click.option("--references", help="Score the captions against this data set.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--model-images", default=64, show_default=True, help="Images per round of the model alone.")
@json_option
def main(model: str, images: str, references: str | None, rounds: int, model_images: int, as_json: bool) -> None:
    """Compare the precisions of MODEL on the JPEGs of the folder IMAGES."""
    alone = _measure_model(model, sorted(Path(images).glob("*.jpg"))[:model_images], rounds)
    with tempfile.TemporaryDirectory(prefix="imcap-bench-") as folder:
        outputs = {precision: f"{folder}/{precision}" for precision in PRECISIONS}
        whole: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
        for _ in range(rounds):
            for precision, output in outputs.items():
                options = ["--model", model, "--precision", precision, "--overwrite"]
                run = _imcap("caption", images, output, *options)
                whole[precision].append(require_rate(run["images_per_second"]))
        captions = {precision: _read_captions(output) for precision, output in outputs.items()}
        scores = {
            precision: {name: _imcap("evaluate", output, references)["scores"][name] for name in SCORES}
            for precision, output in outputs.items()
            if references
        }
    same = np.mean([captions[INT8][image] == caption for image, caption in captions[FLOAT32].items()])
    show(
        {
            "machine": describe_machine(),
            "model alone, images/s of one core": {name: rate.to_dict() for name, rate in alone.items()},
            "ratio": round(alone[INT8].median / alone[FLOAT32].median, 2),
            "imcap caption, images/s": {name: Rate(tuple(values)).to_dict() for name, values in whole.items()},
            "ratio of imcap caption": round(float(np.median(whole[INT8]) / np.median(whole[FLOAT32])), 2),
            "same captions": round(float(same), 3),
            "SHA-256 of the captions in int8": _hash_captions(captions[INT8]),
            "scores": scores,
        },
        as_json,
    )


def _measure_model(model: str, paths: list[Path], rounds: int) -> dict[str, Rate]:
    """Images per second of CPU time, of the CNN and the search, in one process."""
    captioners = {precision: Captioner.load(model, precision=precision) for precision in PRECISIONS}
    size = captioners[INT8].image_size
    pixels = np.stack([read_image_input(path, image_size=size) for path in paths])
    rates: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
    for _ in range(rounds + 1):
        for precision, captioner in captioners.items():
            start = time.process_time()
            captioner.caption_pixels(pixels)
            rates[precision].append(len(pixels) / (time.process_time() - start))
    return {precision: Rate(tuple(values[1:])) for precision, values in rates.items()}  # the first round warms up


def _imcap(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "imcap_ray", *arguments, "--json"]
    result: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)
    return result


def _read_captions(output: str) -> dict[str, str]:
    rows = open_captions(output).to_table(columns=["image_id", "caption"]).to_pylist()
    return {row["image_id"]: row["caption"] for row in rows}


def _hash_captions(captions: dict[str, str]) -> str:
    """Hash of all captions, to compare two machines."""
    return hashlib.sha256(json.dumps(captions, sort_keys=True).encode()).hexdigest()


if __name__ == "__main__":
    main()
