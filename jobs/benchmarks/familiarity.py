"""How well features tell a data set's images from others, by the residual and by nearest neighbours.

python jobs/benchmarks/familiarity.py flickr8k aerial/ other/
python jobs/benchmarks/familiarity.py flickr8k aerial/ --encoder efficientnet_lite2
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from shared import json_option, show

from imcap_ray.config import EncoderConfig, PreprocessingConfig
from imcap_ray.data.datasets import load_dataset
from imcap_ray.data.image_inputs import read_image_input
from imcap_ray.models.encoders import Encoder, EncoderEnsemble, build_encoder
from imcap_ray.models.familiarity import Familiarity, Floats
from imcap_ray.models.torch_captioner import load_torch_captioner

RESIDUALS = (32, 64, 128, 256)
"""Numbers of directions."""

NEIGHBOURS = {"1 of 300": (1, 300), "5 of 1000": (5, 1000), "10 of 1000": (10, 1000)}
"""Which neighbour, and among how many training images."""

BATCH = 16


@click.command()
@click.argument("data")
@click.argument("others", nargs=-1, required=True)
@click.option("--model", help="Model folder. Default: the bundled model.")
@click.option("--encoder", help="A CNN with ImageNet's weights instead of a model's.")
@click.option("--resamples", default=1000, show_default=True, help="Bootstrap resamples of the intervals.")
@json_option
def main(data: str, others: tuple[str, ...], model: str | None, encoder: str | None, **options: Any) -> None:
    """AUROC between the validation images of DATA and the images below each folder of OTHERS, with a 95 % interval.

    Also the share of the others among those that are as familiar as 95 % of the validation images.
    """
    cnn = _build(encoder) if encoder else load_torch_captioner(model).encoder
    dataset = load_dataset(data)
    features = {
        split: _encode(cnn, [row["image_path"] for row in dataset.split(split).to_pylist()])
        for split in ("train", "validation")
    }
    unlike = {name: _encode(cnn, _images_below(name)) for name in others}
    table = {
        method: {
            Path(name).name: _compare(score(rows), score(features["validation"]), options["resamples"])
            for name, rows in unlike.items()
        }
        for method, score in _methods(features["train"], features["validation"]).items()
    }
    counts = {name: len(rows) for name, rows in (features | unlike).items()}
    show({"images": counts, **table}, options["as_json"])


def _build(name: str) -> Encoder:
    return build_encoder(EncoderConfig(name=name), PreprocessingConfig()).eval()


def _images_below(folder: str) -> list[str]:
    return sorted(str(path) for path in Path(folder).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))


@torch.inference_mode()
def _encode(cnn: Encoder | EncoderEnsemble, paths: list[str]) -> Floats:
    means = []
    for start in range(0, len(paths), BATCH):
        pixels = [read_image_input(path, image_size=cnn.image_size) for path in paths[start : start + BATCH]]
        means.append(cnn(torch.from_numpy(np.stack(pixels))).float().mean(1).numpy())
    return np.concatenate(means)


def _methods(training: Floats, validation: Floats) -> Mapping[str, Callable[[Floats], Floats]]:
    """How unfamiliar images are by each method."""
    methods: dict[str, Callable[[Floats], Floats]] = {}
    for number in RESIDUALS:
        learned = Familiarity.fit(training, validation, max_directions=number)
        assert learned is not None
        methods[f"residual, {number} directions"] = learned.residuals_of
    order = np.random.default_rng(0).permutation(len(training))
    for name, (rank, number) in NEIGHBOURS.items():
        stored = _unit(training[order[:number]])
        methods[f"neighbour {name}"] = lambda rows, stored=stored, rank=rank: -np.sort(_unit(rows) @ stored.T)[:, -rank]
    return methods


def _unit(rows: Floats) -> Floats:
    unit: Floats = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def _compare(unlike: Floats, familiar: Floats, resamples: int) -> dict[str, Any]:
    random = np.random.default_rng(0)
    drawn = [
        _auroc(random.choice(unlike, len(unlike)), random.choice(familiar, len(familiar))) for _ in range(resamples)
    ]
    return {
        "auroc": round(_auroc(unlike, familiar), 3),
        "interval": [round(float(edge), 3) for edge in np.percentile(drawn, [2.5, 97.5])],
        "kept": round(float(np.mean(unlike <= np.quantile(familiar, 0.95))), 3),
    }


def _auroc(unlike: Iterable[float], familiar: Iterable[float]) -> float:
    """Probability that an image of the first kind has a higher value than one of the second."""
    high, low = np.asarray(unlike), np.sort(np.asarray(familiar))
    below, up_to = np.searchsorted(low, high, "left"), np.searchsorted(low, high, "right")
    return float((below + up_to).mean() / (2 * len(low)))


if __name__ == "__main__":
    main()
