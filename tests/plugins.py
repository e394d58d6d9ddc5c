"""Captioners as others write them, loaded by name: `tests.plugins:Echo`."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from imcap_ray import Caption
from tests.fakes import echo


class Echo:
    """Captions an image with the hash of its pixels. `log` is a folder in which each process notes what it does."""

    batch_size = 16
    resources: Mapping[str, float] = {}

    def __init__(self, size: str = "32", log: str = "") -> None:
        self.size = int(size)
        self.fingerprint = "echo"
        self.log = log

    def load(self, gpus: float) -> None:
        self.is_loaded = True

    def prepare(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        assert image.mode == "RGB"
        return np.asarray(image.resize((self.size, self.size)))

    def caption(self, batch: npt.NDArray[np.uint8], num_captions: int) -> Sequence[Any]:
        assert self.is_loaded
        return [[Caption(f"{echo(image)} {rank}") for rank in range(num_captions)] for image in batch]


class Faulty(Echo):
    """Does `fault` to images whose top left pixel is redder than 250."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def caption(self, batch: npt.NDArray[np.uint8], num_captions: int) -> Sequence[Any]:
        results: list[Any] = list(super().caption(batch, num_captions))
        for number, image in enumerate(batch):
            if image[0, 0, 0] <= 250:
                continue
            if self.fault == "raises":
                raise RuntimeError("planted")
            if self.fault == "never returns":
                time.sleep(10_000)
            if self.fault == "too few":
                return results[:-1]
            results[number] = {
                "no captions": [],
                "not text": [Caption(math.nan)],  # type: ignore[arg-type]
                "no caption": ["a text"],
                "a text": "a text",
                "none": None,
                "infinite": [Caption("a", -math.inf, 2)],
                "positive": [Caption("a", 0.5, 2)],
                "too long": [Caption("a", -1.0, 2**15)],
                "surrogate": [Caption("\udcff")],
                "unfamiliar": [Caption("a", familiarity=7.0)],
            }[self.fault]
        return results


class WithoutCaption:
    """Lacks a method."""

    def __init__(self) -> None:
        self.prepare = self.fingerprint = ""


class TooGreedy(Echo):
    """Needs a petabyte."""

    resources: Mapping[str, float] = {"memory": 1e15}


class Unloadable(Echo):
    """Lacks its weights."""

    def load(self, gpus: float) -> None:
        raise FileNotFoundError("weights.bin")


def fails() -> Echo:
    """Raise an error."""
    raise KeyError("no such thing")


def returns_a_path() -> Path:
    """Return something that is no captioner."""
    return Path()


class Square(Echo):
    """Prepares images of different shapes."""

    def prepare(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        return np.asarray(image)


class Counting(Echo):
    """Captions with the number of calls and the place in the batch."""

    num_calls = 0

    def caption(self, batch: npt.NDArray[np.uint8], num_captions: int) -> Sequence[Any]:
        self.num_calls += 1
        return [[Caption(f"{self.num_calls} {place}")] for place in range(len(batch))]
