"""Speed and captions of large JPEGs that are decoded at a reduced scale, next to all of their pixels.

python jobs/benchmarks/large_photographs.py flickr8k --images 1000
"""

from __future__ import annotations

import io
import time
from typing import Any

import click
import numpy as np
from PIL import Image
from shared import decode_whole, json_option, show

from imcap_ray.data.datasets import VALIDATION, load_dataset
from imcap_ray.data.image_decoding import decode_image
from imcap_ray.errors import ImageError
from imcap_ray.models.caption import COMPUTE_BATCH_SIZE
from imcap_ray.models.captioner import Captioner
from imcap_ray.scoring.metrics import score


@click.command()
@click.argument("data", type=click.Path(exists=True))
@click.option("--images", default=200, show_default=True, help="Images of the validation split.")
@click.option("--model", help="Model folder. Default: the bundled model.")
@json_option
def main(data: str, images: int, model: str | None, as_json: bool) -> None:
    """Milliseconds to decode a JPEG of 4000 x 3000 as `imcap` does and whole, and how often the captions are the same.

    The photographs are those of DATA's validation split, enlarged (bicubic) and saved at quality 90. CIDEr-D scores the
    captions of both decodings, with document frequencies of these images.
    """
    captioner = Captioner.load(model)
    rows = load_dataset(data).split(VALIDATION).slice(0, images).to_pylist()
    decoders = {"reduced": _decode_reduced, "whole": decode_whole}
    milliseconds: dict[str, list[float]] = {name: [] for name in decoders}
    captions: dict[str, dict[str, str]] = {name: {} for name in decoders}
    for start in range(0, len(rows), COMPUTE_BATCH_SIZE):
        chunk = rows[start : start + COMPUTE_BATCH_SIZE]
        pixels: dict[str, list[np.ndarray[Any, Any]]] = {name: [] for name in decoders}
        for row in chunk:
            jpeg = _enlarge(row["image_path"])
            for name, decode in decoders.items():
                before = time.perf_counter()
                pixels[name].append(decode(jpeg, captioner.image_size))
                milliseconds[name].append(1000 * (time.perf_counter() - before))
        for name, images_of_chunk in pixels.items():
            for row, best in zip(chunk, captioner.caption_pixels(np.stack(images_of_chunk)), strict=True):
                captions[name][row["image_id"]] = "" if isinstance(best, ImageError) else best[0].text
    same = sum(captions["reduced"][name] == text for name, text in captions["whole"].items())
    references = {row["image_id"]: row["captions"] for row in rows}
    medians = {name: float(np.median(values)) for name, values in milliseconds.items()}
    show(
        {
            "images": len(rows),
            "milliseconds": {name: round(value, 1) for name, value in medians.items()},
            "times_faster": round(medians["whole"] / medians["reduced"], 2),
            "same_caption": round(same / len(rows), 4),
            "same_caption_interval": [round(bound, 4) for bound in _wilson_interval(same, len(rows))],
            "cider_d": {name: round(score(texts, references).cider_d, 4) for name, texts in captions.items()},
        },
        as_json,
    )


def _enlarge(path: str) -> bytes:
    stream = io.BytesIO()
    with Image.open(path) as small:
        small.convert("RGB").resize((4000, 3000), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def _decode_reduced(data: bytes, image_size: int) -> np.ndarray[Any, Any]:
    return decode_image(data, image_size=image_size).pixels


def _wilson_interval(count: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    share, spread = count / total, z**2 / total
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * (share * (1 - share) / total + spread / (4 * total)) ** 0.5
    return middle - half, middle + half


if __name__ == "__main__":
    main()
