"""A captioner -> what is wrong with it, in sentences. For `imcap model check`, and for the tests of plug-in authors:

def test_my_captioner():
    assert not check_captioner("mine:Captioner").faults
"""

from __future__ import annotations

import io
import multiprocessing
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from imcap_ray.errors import ImageError, ImcapError
from imcap_ray.models.caption import Caption, ImageCaptioner
from imcap_ray.models.captioner_spec import CaptionerSpec

_NOISE: Final = np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8)

_IMAGES: Final = {
    "of 1 x 1 pixel": Image.new("RGB", (1, 1), "red"),
    "of 2000 x 8 pixels": Image.new("RGB", (2000, 8), "blue"),
    "that is grey": Image.new("L", (50, 70), 128),
    "that is black": Image.new("RGB", (64, 64)),
    "that is noise": Image.fromarray(_NOISE),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionerCheck:
    """The result of `check_captioner`."""

    faults: tuple[str, ...]
    """A sentence for each requirement that the captioner does not meet."""
    seconds_per_image: float = 0.0
    """Time of captioning, in batches of the check's images."""
    peak_bytes: int = 0
    """Memory of the process."""


def check_captioner(model: str, options: Mapping[str, str] | None = None) -> CaptionerCheck:
    """Load a captioner in a new process, and let it caption odd images alone and together.

    Raises:
        InputError: it cannot be loaded.
    """
    spec = CaptionerSpec(models=(model,), options=tuple((options or {}).items()))
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        try:
            return process.submit(_check, spec, sys.path).result()
        except BrokenProcessPool:
            return CaptionerCheck(faults=("its process died.",))


def _check(spec: CaptionerSpec, path: list[str]) -> CaptionerCheck:
    sys.path[:] = path
    captioner = spec()
    captioner.start(gpus=0)
    faults = [] if spec().fingerprint == captioner.fingerprint else ["its fingerprint is another one each time."]
    pixels: list[npt.NDArray[np.uint8]] = []
    for kind, image in _IMAGES.items():
        try:
            pixels.append(_prepare(captioner, image))
        except ImageError as error:
            faults.append(f"it cannot prepare an image {kind}: {error.message}.")
    start = time.perf_counter()
    if len(pixels) == len(_IMAGES):
        try:
            faults += _faults(captioner, np.stack(pixels))
        except ImcapError as error:
            faults.append(f"it cannot caption: {error}.")
    seconds = (time.perf_counter() - start) / (4 * len(_IMAGES))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return CaptionerCheck(faults=tuple(faults), seconds_per_image=seconds, peak_bytes=peak)


def _prepare(captioner: ImageCaptioner, image: Image.Image) -> npt.NDArray[np.uint8]:
    file = io.BytesIO()
    image.save(file, "PNG")
    return captioner.preparation(file.getvalue()).pixels


def _faults(captioner: ImageCaptioner, pixels: npt.NDArray[np.uint8]) -> Iterator[str]:
    together = _texts(captioner.caption_pixels(pixels))
    for kind, texts in zip(_IMAGES, together, strict=True):
        if isinstance(texts, str):
            yield f"it cannot caption an image {kind}: {texts}."
    if _texts(captioner.caption_pixels(pixels)) != together:
        yield "it captions the same images differently the second time."
    if _texts(captioner.caption_pixels(pixels[::-1].copy()))[::-1] != together:
        yield "captions depend on the order of the images in a batch, or are returned in another order."
    alone = [_texts(captioner.caption_pixels(pixels[number : number + 1]))[0] for number in range(len(pixels))]
    if alone != together:
        yield "captions of an image alone differ from those in a batch."


def _texts(results: Any) -> list[tuple[str, ...] | str]:
    """The texts of each image's captions, or the message of its error."""
    return [_texts_of(result) for result in results]


def _texts_of(result: list[Caption] | ImageError) -> tuple[str, ...] | str:
    return result.message if isinstance(result, ImageError) else tuple(caption.text for caption in result)
