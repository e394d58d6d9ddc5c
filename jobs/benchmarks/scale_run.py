"""One captioning run, in a process of its own, for scale.py to measure: SOURCE OUTPUT START_TIME."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

from imcap_ray.config import SearchConfig
from imcap_ray.data.image_decoding import SquarePixels
from imcap_ray.distributed.benchmark import watch_run
from imcap_ray.models.caption import ActorNeeds, Caption


class InstantEcho:
    """A stand-in for a captioner that takes no time, so that only the pipeline is left."""

    preparation = SquarePixels(32)
    needs = ActorNeeds()
    fingerprint = "instant-echo"
    compute_batch_size = 16
    num_beam_steps = 0
    search = SearchConfig()

    def start(self, *, gpus: float) -> None:
        """Do nothing: it needs no GPU."""

    def caption_pixels(self, pixels: Any) -> list[list[Caption]]:
        """Caption each image with its mean brightness."""
        return [[Caption(text=f"{image.mean():.1f}", logprob=-1.0, num_tokens=2)] for image in pixels]


if __name__ == "__main__":
    source, output, start_time = sys.argv[1:]
    print(json.dumps(asdict(watch_run(source, output, InstantEcho, float(start_time)))))
