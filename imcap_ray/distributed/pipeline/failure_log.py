"""Images that cannot be read during a training phase -> log lines, through an actor that all readers reach."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

import ray
from ray.exceptions import RayError

NUM_EXAMPLES: Final = 3
REPORT_SECONDS: Final = 60.0


@ray.remote(num_cpus=0)
class FailureLog:
    """Failed images, each once, however often they are read."""

    def __init__(self) -> None:
        self._failures: dict[str, str] = {}

    def add(self, failures: Mapping[str, str]) -> None:
        """Add failed images with their reasons."""
        self._failures |= failures

    def get(self) -> tuple[int, list[tuple[str, str]]]:
        """The number of failed images, and the first few."""
        return len(self._failures), list(self._failures.items())[:NUM_EXAMPLES]


def watch_failures(log: Any, phase: str, echo: Callable[[str], None]) -> Callable[..., None]:
    """A function that reports how many training images have failed, if there are new ones: at most once a minute unless
    `at_end`."""
    reported, last_time = 0, float("-inf")

    def report_failures(*, at_end: bool = False) -> None:
        nonlocal reported, last_time
        now = time.monotonic()
        if not at_end and now - last_time < REPORT_SECONDS:
            return
        with suppress(RayError):  # an actor that died costs the line, not the training
            count, first = ray.get(log.get.remote())
            if count > reported:
                reported, last_time = count, now
                echo(f"{phase}: {describe_failures(count, 'training', first)}: left out")

    return report_failures


def describe_failures(count: int, split: str, first: Sequence[tuple[str, str]]) -> str:
    """A line: how many images of a split cannot be read, and the reasons of the first few."""
    examples = "; ".join(f"{image_id}: {reason}" for image_id, reason in first[:NUM_EXAMPLES])
    return f"{count:,} {split} image{'s' * (count != 1)} cannot be read ({examples}{'; ...' * (count > NUM_EXAMPLES)})"
