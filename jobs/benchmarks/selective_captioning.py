"""Captions that are kept if only some are: by confidence, by familiarity, and by both.

python jobs/benchmarks/selective_captioning.py captions/ flickr8k/ captions-of-other-things/ --split validation
"""

from __future__ import annotations

from typing import Any, Final

import click
import numpy as np
from numpy.typing import NDArray
from shared import json_option, show

from imcap_ray.cli.options import split_option
from imcap_ray.data.datasets import load_dataset
from imcap_ray.errors import ImcapError
from imcap_ray.scoring.evaluate import RANKINGS, evaluate_captions, match_ids, read_captions
from imcap_ray.scoring.evaluation_report import NUM_RESAMPLES, RESAMPLING_SEED, rank

SELECTIONS: Final = ("all", "confidence", "familiarity", "both")
MEASURES: Final = ("unfamiliar_share", "cider_d_of_familiar", "cider_d")


@click.command()
@click.argument("captions")
@click.argument("references")
@click.argument("unfamiliar")
@split_option
@click.option(
    "--share",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.5,
    show_default=True,
    help="Share of the images to keep.",
)
@json_option
def main(captions: str, references: str, unfamiliar: str, split: str | None, share: float, as_json: bool) -> None:
    """Unfamiliar images among the captions that are kept, and CIDEr-D of these captions.

    CAPTIONS are of images of the data set REFERENCES. UNFAMILIAR are captions, by the same model, of images unlike its
    training images. The images of both are mixed, and the --share that is ranked highest is kept: by confidence, by
    familiarity, or by both, which keeps those above a threshold of each.

    Unfamiliar images have no references, so nothing can score their captions. Each counts as a mistake with CIDEr-D 0
    in `cider_d`, the mean over all images that are kept. This is a choice: a few of these captions may be right, so
    `cider_d` is a lower bound, and it depends on how many unfamiliar images are mixed in. `cider_d_of_familiar` does
    not depend on the choice, because it is the mean over those images that are kept and have references.

    Unfamiliar images come first among equal values, so ties count against a ranking. 95 % bootstrap intervals draw from
    both sets of images, and the document frequencies of CIDEr-D are those of the images with references.
    """
    try:
        scores, familiar = _read_familiar(captions, references, split)
        others = read_captions(unfamiliar)
    except ImcapError as error:
        raise click.ClickException(str(error)) from error
    has_caption = np.array([caption != "" for caption in others["caption"].to_pylist()], dtype=bool)
    unscored = np.array([others[name].to_numpy()[has_caption] for name in RANKINGS])
    for location, values in ((captions, familiar), (unfamiliar, unscored)):
        if unknown := [name for name, column in zip(RANKINGS, values, strict=True) if np.isnan(column).all()]:
            raise click.ClickException(
                f"expected captions with confidence and familiarity: {location} has no {unknown[0]}"
            )
    num_unfamiliar = unscored.shape[1]
    values = np.hstack([unscored, familiar])
    cider_d = np.concatenate([np.zeros(num_unfamiliar), scores])
    measured = _measure(values, cider_d, num_unfamiliar, share)
    draws = _resample(values, cider_d, num_unfamiliar, share)
    both = SELECTIONS.index("both")
    show(
        {
            "familiar_images": len(scores),
            "unfamiliar_images": num_unfamiliar,
            "kept": _num_kept(share, len(cider_d)),
            **{name: _summarize(measured[row], draws[:, row]) for row, name in enumerate(SELECTIONS)},
            **{
                f"both_minus_{name}": _summarize(measured[both] - measured[row], draws[:, both] - draws[:, row])
                for row, name in enumerate(SELECTIONS)
                if row != both
            },
        },
        as_json,
    )


def _read_familiar(captions: str, references: str, split: str | None) -> tuple[NDArray[Any], NDArray[Any]]:
    """CIDEr-D of each image, and its confidence and familiarity (2, images)."""
    dataset = load_dataset(references)
    image_scores = evaluate_captions(captions, dataset, split=split).image_scores
    table = match_ids(captions, read_captions(captions), dataset)
    position = {image_id: number for number, image_id in enumerate(table["image_id"].to_pylist())}
    positions = [position[image_id] for image_id in image_scores["image_id"]]
    return np.asarray(image_scores["cider_d"]), np.array([table[name].to_numpy()[positions] for name in RANKINGS])


def _num_kept(share: float, num_images: int) -> int:
    return max(1, round(share * num_images))


def _measure(values: NDArray[Any], cider_d: NDArray[Any], num_unfamiliar: int, share: float) -> NDArray[Any]:
    """A row of `MEASURES` for each of the `SELECTIONS`. The unfamiliar images are the first."""
    confidences, familiarities = values
    rankings = [rank(confidences), rank(familiarities), rank(confidences, familiarities)]
    num_kept = _num_kept(share, len(cider_d))
    rows = []
    for kept in (np.arange(len(cider_d)), *(order[:num_kept] for order in rankings)):
        num_familiar = int((kept >= num_unfamiliar).sum())
        total = cider_d[kept].sum()
        rows.append([1 - num_familiar / len(kept), total / max(1, num_familiar), total / len(kept)])
    return np.array(rows)


def _resample(values: NDArray[Any], cider_d: NDArray[Any], num_unfamiliar: int, share: float) -> NDArray[Any]:
    """`_measure` of images drawn with replacement, as many of each kind: (draws, selections, measures)."""
    generator = np.random.default_rng(RESAMPLING_SEED)
    draws = []
    for _ in range(NUM_RESAMPLES):
        unfamiliar = generator.integers(num_unfamiliar, size=num_unfamiliar)
        others = generator.integers(num_unfamiliar, len(cider_d), size=len(cider_d) - num_unfamiliar)
        drawn = np.concatenate([unfamiliar, others])
        draws.append(_measure(values[:, drawn], cider_d[drawn], num_unfamiliar, share))
    return np.array(draws)


def _summarize(measured: NDArray[Any], draws: NDArray[Any]) -> dict[str, list[float]]:
    """The value of each measure, followed by the ends of its interval."""
    lows, highs = np.quantile(draws, [0.025, 0.975], axis=0)
    return {
        name: [round(float(value), 4) for value in (measured[column], lows[column], highs[column])]
        for column, name in enumerate(MEASURES)
    }


if __name__ == "__main__":
    main()
