"""Captioners for tests, passed as `load_captioner` like the real one."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from os.path import exists
from pathlib import Path

import numpy as np
import numpy.typing as npt
import ray

from imcap_ray.config import SearchConfig
from imcap_ray.data.image_decoding import SquarePixels
from imcap_ray.models.caption import COMPUTE_BATCH_SIZE, ActorNeeds, Caption


class EchoCaptioner:
    """Captions an image with the hash of its pixels, without a model to load."""

    def __init__(self, *, image_size: int = 32, fingerprint: str = "echo", search: SearchConfig | None = None) -> None:
        self.preparation = SquarePixels(image_size)
        self.needs = ActorNeeds()
        self.fingerprint = fingerprint
        self.search = search or SearchConfig()
        self.compute_batch_size = COMPUTE_BATCH_SIZE
        self.num_beam_steps = 0

    def start(self, *, gpus: float) -> None:
        """Do nothing: it uses no GPU, so Ray's logical GPUs are enough."""

    def caption_pixels(self, pixels: npt.NDArray[np.uint8]) -> list[list[Caption]]:
        return [[Caption(text=echo(image), logprob=-1.0, num_tokens=2, familiarity=0.5)] for image in pixels]


class SaysItsGpus(EchoCaptioner):
    """Captions each image with the GPUs that its process can see."""

    def caption_pixels(self, pixels: npt.NDArray[np.uint8]) -> list[list[Caption]]:
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
        return [[Caption(text=f"sees {gpus}", logprob=-1.0, num_tokens=2)] for _ in pixels]


class FailsOn(EchoCaptioner):
    """Raises an error on one of these images, like a bug; errors of images themselves become failed rows."""

    def __init__(self, *, words: frozenset[str]) -> None:
        super().__init__()
        self._words = words

    def caption_pixels(self, pixels: npt.NDArray[np.uint8]) -> list[list[Caption]]:
        captions = super().caption_pixels(pixels)
        if any(caption[0].text in self._words for caption in captions):
            raise RuntimeError("planted")
        return captions


class DiesOf(EchoCaptioner):
    """Kills its process on one of these images; with `once`, the path of a file, only the first time."""

    def __init__(self, *, words: frozenset[str], once: str | None = None) -> None:
        super().__init__()
        self._words = words
        self._once = once

    def caption_pixels(self, pixels: npt.NDArray[np.uint8]) -> list[list[Caption]]:
        captions = super().caption_pixels(pixels)
        if any(caption[0].text in self._words for caption in captions) and not (self._once and exists(self._once)):
            if self._once:
                Path(self._once).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return captions


class TooLargeFor(EchoCaptioner):
    """Runs out of memory on some images, and has reduced its batch size."""

    def __init__(self, *, words: frozenset[str]) -> None:
        super().__init__()
        self.compute_batch_size = 8
        self._words = words

    def caption_pixels(self, pixels: npt.NDArray[np.uint8]) -> list[list[Caption]]:
        captions = super().caption_pixels(pixels)
        return [[] if found[0].text in self._words else found for found in captions]


class WaitsForFiles(EchoCaptioner):
    """Waits for a number of files in `folder` before captioning; each node that gets images writes one with its id."""

    def __init__(self, *, folder: str, num_files: int) -> None:
        super().__init__()
        self._folder = Path(folder)
        self._num_files = num_files

    def caption_pixels(self, pixels: npt.NDArray[np.uint8]) -> list[list[Caption]]:
        (self._folder / ray.get_runtime_context().get_node_id()).touch()
        deadline = time.monotonic() + 400
        while len(list(self._folder.iterdir())) < self._num_files:
            if time.monotonic() > deadline:
                raise RuntimeError("waited in vain")
            time.sleep(0.1)
        return super().caption_pixels(pixels)


def echo(image: npt.NDArray[np.uint8]) -> str:
    """Return the caption that `EchoCaptioner` gives to pixels (3, S, S)."""
    return f"seen {hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()[:12]}"


class TakesSteps(EchoCaptioner):
    """Takes 60 ms per image and seven steps per batch."""

    def caption_pixels(self, pixels: npt.NDArray[np.uint8]) -> list[list[Caption]]:
        time.sleep(0.06 * len(pixels))
        self.num_beam_steps += 7
        return super().caption_pixels(pixels)
