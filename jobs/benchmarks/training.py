"""Speed of `imcap train` next to a bare loop, and to torchrun.

python jobs/benchmarks/training.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from shared import json_option, show

from imcap_ray.data.synthetic_images import write_photographs
from imcap_ray.distributed.benchmark import Rate, describe_machine
from imcap_ray.distributed.cluster.machine import available_cores
from imcap_ray.distributed.cluster.memory import KEEP_FREED_MEMORY

BARE_LOOP = Path(__file__).with_name("bare_loop.py")
CAPTIONS_PER_IMAGE = 5


@click.command()
@click.option("--images", default=1024, show_default=True, help="Training images, each with five captions.")
@click.option(
    "--epochs", type=click.IntRange(2), default=4, show_default=True, help="Epochs of each round; the first is ignored."
)
@click.option("--rounds", type=click.IntRange(1), default=2, show_default=True)
@json_option
def main(images: int, epochs: int, rounds: int, as_json: bool) -> None:
    """Captions per second of `imcap train` with one and two workers, next to a bare loop and torchrun.

    The bare loop takes the same optimizer steps on the same captions, with features in memory and nothing else: no Ray,
    no validation, no checkpoint. With torchrun it is two processes of DistributedDataParallel. Epochs of `imcap train`
    are timed without their validation too. The last line is the bare loop with the CNN in it, as if nothing were
    cached. The programs take turns, round by round, and all have the malloc settings of our workers.
    """
    with tempfile.TemporaryDirectory(prefix="imcap-bench-") as folder:
        data = Path(folder, "data")
        _write_captioned_photographs(data, images)
        programs: dict[str, Callable[[], list[float]]] = {
            "imcap train, 1 worker": partial(_train, data, workers=1, epochs=epochs),
            "bare loop": partial(_train_barely, data, workers=1, epochs=epochs),
            "imcap train, 2 workers": partial(_train, data, workers=2, epochs=epochs),
            "torchrun, 2 processes": partial(_train_barely, data, workers=2, epochs=epochs),
            "bare loop, nothing cached": partial(_train_barely, data, workers=1, epochs=epochs, encodes=True),
        }
        rates: dict[str, list[Rate]] = {name: [] for name in programs}
        for number in range(rounds):
            for name, train in list(programs.items())[:: -1 if number % 2 else 1]:
                rates[name].append(Rate(tuple(CAPTIONS_PER_IMAGE * images / seconds for seconds in train()[1:])))
                click.echo(f"round {number + 1}, {name}: {rates[name][-1].median:.0f} captions/s", err=True)
    result: dict[str, Any] = {"machine": describe_machine(), "images": images}
    for name, of_rounds in rates.items():
        result[name] = Rate(tuple(value for rate in of_rounds for value in rate.values)).to_dict()
    for ratio, ours, theirs in (
        ("of the bare loop", "imcap train, 1 worker", "bare loop"),
        ("of torchrun", "imcap train, 2 workers", "torchrun, 2 processes"),
    ):
        pairs = zip(rates[ours], rates[theirs], strict=True)
        result[ratio] = Rate(tuple(our.median / their.median for our, their in pairs)).to_dict()
    show(result, as_json)


def _train(data: Path, *, workers: int, epochs: int) -> list[float]:
    """Seconds of each epoch of `imcap train`. Trainings after the first use its cached features."""
    model = Path(tempfile.mkdtemp(dir=data.parent), "model")
    command = [sys.executable, "-m", "imcap_ray", "train", str(data), str(model), "--num-workers", str(workers)]
    options = ["--features", f"{data}-features", "--set", f"training.epochs={epochs}", "--quiet"]
    subprocess.run([*command, *options], check=True)
    lines = (model / "_training" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["train_seconds"] for line in lines]


def _train_barely(data: Path, *, workers: int, epochs: int, encodes: bool = False) -> list[float]:
    """Seconds of each epoch of the bare loop."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)] * (workers > 1)
    command = [sys.executable, *launcher, str(BARE_LOOP), str(data), str(epochs)]
    environment = os.environ | KEEP_FREED_MEMORY | {"OMP_NUM_THREADS": str(max(1, available_cores() // workers))}
    done = subprocess.run(command + ["--encode"] * encodes, check=True, stdout=subprocess.PIPE, env=environment)
    seconds: list[float] = json.loads(done.stdout)
    return seconds


def _write_captioned_photographs(folder: Path, num_train: int) -> None:
    """Write photographs with five captions each, of Flickr8k's lengths and 3,000 words; 32 of them for validation."""
    generator = np.random.default_rng(0)
    write_photographs(str(folder), num_train + 32, (224, 224))
    files = sorted(folder.rglob("*.jpg"))
    with open(folder / "metadata.jsonl", "w") as lines:
        for number, file in enumerate(files):
            lengths = np.clip(generator.normal(10.8, 3.8, size=CAPTIONS_PER_IMAGE).round().astype(int), 4, 22)
            captions = [" ".join(f"word{word}" for word in generator.integers(3000, size=length)) for length in lengths]
            split = "train" if number < num_train else "validation"
            row = {"file_name": str(file.relative_to(folder)), "captions": captions, "split": split}
            lines.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
