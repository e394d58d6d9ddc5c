"""One captioning run that logs each caption it computes, in a process of its own, for random_faults.py to kill.

python -m tests.chaos.slow_run SOURCE OUTPUT NUM_NODES
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import ray
from ray.cluster_utils import Cluster

from imcap_ray.config import CaptioningConfig, ResourcesConfig, SearchConfig
from imcap_ray.data.image_decoding import SquarePixels
from imcap_ray.distributed.captioning import caption_images
from imcap_ray.distributed.cluster.connection import connect
from imcap_ray.errors import ImcapError
from imcap_ray.models.caption import ActorNeeds, Caption

SECONDS_PER_IMAGE = 0.01


def log_folder(output: Path) -> Path:
    """Return the folder in which the processes of all runs of an output log what they compute."""
    return Path(f"{output}.computed")


class SlowEcho:
    """A stand-in for a captioner: its caption of an image is the hash of the pixels. Takes its time, and logs captions.

    The chaos tests are about processes that die. A model would only make many runs slower.

    Args:
        log: folder in which this process keeps a file of its own.
        processes: the processes that this one works for: the driver, and the actor if the work is isolated.
    """

    preparation = SquarePixels(32)
    needs = ActorNeeds()
    fingerprint = "slow-echo"
    compute_batch_size = 16
    num_beam_steps = 0
    search = SearchConfig()

    def __init__(self, log: str, processes: tuple[int, ...]) -> None:
        name = "-".join(map(str, (*processes, os.getppid(), os.getpid())))
        self._log = os.open(Path(log, f"{name}@{time.time_ns()}"), os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def start(self, *, gpus: float) -> None:
        """Do nothing: it needs no GPU."""

    def caption_pixels(self, pixels: Any) -> list[list[Caption]]:
        """Caption each image with its hash, and a confidence that depends on it."""
        time.sleep(SECONDS_PER_IMAGE * len(pixels))
        digests = [hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()[:16] for image in pixels]
        os.write(self._log, "".join(f"{digest} {time.monotonic()}\n" for digest in digests).encode())
        return [[Caption(text=digest, logprob=-int(digest[:2], 16) / 64, num_tokens=4)] for digest in digests]


@dataclass(frozen=True)
class LoadSlowEcho:
    """Creates a `SlowEcho`. Each process that sends this object to another one adds its own number."""

    log: str
    processes: tuple[int, ...] = ()

    def __call__(self) -> SlowEcho:
        return SlowEcho(self.log, self.processes)

    def __reduce__(self) -> tuple[Any, ...]:
        is_known = self.processes[-1:] == (os.getpid(),)
        return LoadSlowEcho, (self.log, self.processes if is_known else (*self.processes, os.getpid()))


@click.command()
@click.argument("source")
@click.argument("output")
@click.argument("num_nodes", type=int)
def main(source: str, output: str, num_nodes: int) -> None:
    """Caption SOURCE into OUTPUT on a private Ray, or on a simulated cluster of NUM_NODES nodes."""
    log = log_folder(Path(output))
    log.mkdir(exist_ok=True)
    cluster = None
    if num_nodes > 1:
        os.environ["RAY_AUTH_MODE"] = "disabled"  # on loopback, and for a minute
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        for _ in range(num_nodes - 1):
            cluster.add_node(num_cpus=2)
    try:
        summary = caption_images(
            CaptioningConfig(input=source, output=output, max_failure_rate=1.0),
            ResourcesConfig(num_actors=2),
            cluster=connect(cluster.address if cluster else "local"),
            load_captioner=LoadSlowEcho(str(log)),
        )
    except ImcapError as error:
        raise click.ClickException(str(error)) from error
    finally:
        ray.shutdown()
        if cluster:
            cluster.shutdown()
    click.echo(json.dumps(asdict(summary)))


if __name__ == "__main__":
    main()
