"""Captioners for tests: they go in through `load_captioner`, as the real one does."""

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
from imcap_ray.models.caption import COMPUTE_BATCH_SIZE, Caption


class EchoCaptioner:
    """Says the hash of what it sees: the same pixels, the same words, and no model to load."""

    def __init__(self, *, image_size: int = 32, fingerprint: str = "echo", search: SearchConfig | None = None) -> None:
        self.image_size = image_size
        self.fingerprint = fingerprint
        self.search = search or SearchConfig()
        self.compute_batch_size = COMPUTE_BATCH_SIZE
        self.num_beam_steps = 0

    def require_gpu(self) -> None:
        """It computes on none, so that Ray's logical GPUs are enough for it."""

    def caption_pixels(self, pixels: npt.NDArray[np.uint8]) -> list[list[Caption]]:
        return [[Caption(text=echo(image), logprob=-1.0, num_tokens=2)] for image in pixels]


class SaysItsGpus(EchoCaptioner):
    """Says which GPUs its process may see."""

    def caption_pixels(self, pixels: npt.NDArray[np.uint8]) -> list[list[Caption]]:
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
        return [[Caption(text=f"sees {gpus}", logprob=-1.0, num_tokens=2)] for _ in pixels]


class FailsOn(EchoCaptioner):
    """Raises when it sees one of these images; stands for a bug, for what images can do ends in their rows."""

    def __init__(self, *, words: frozenset[str]) -> None:
        super().__init__()
        self._words = words

    def caption_pixels(self, pixels: npt.NDArray[np.uint8]) -> list[list[Caption]]:
        captions = super().caption_pixels(pixels)
        if any(caption[0].text in self._words for caption in captions):
            raise RuntimeError("planted")
        return captions


class DiesOf(EchoCaptioner):
    """Kills its process when it sees one of these images; with `once`, a file's path, only the first time."""

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
    """Has no memory for some images, and has learnt to compute fewer at a time."""

    def __init__(self, *, words: frozenset[str]) -> None:
        super().__init__()
        self.compute_batch_size = 8
        self._words = words

    def caption_pixels(self, pixels: npt.NDArray[np.uint8]) -> list[list[Caption]]:
        captions = super().caption_pixels(pixels)
        return [[] if found[0].text in self._words else found for found in captions]


class WaitsForFiles(EchoCaptioner):
    """Captions nothing before so many files are in `folder`; each node that is asked leaves one with its id there."""

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
    """What `EchoCaptioner` says of pixels (3, S, S)."""
    return f"seen {hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()[:12]}"


class TakesSteps(EchoCaptioner):
    """Takes 60 ms an image, and seven steps a batch."""

    def caption_pixels(self, pixels: npt.NDArray[np.uint8]) -> list[list[Caption]]:
        time.sleep(0.06 * len(pixels))
        self.num_beam_steps += 7
        return super().caption_pixels(pixels)
