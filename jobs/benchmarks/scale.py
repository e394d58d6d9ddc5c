"""Memory and speed of the pipeline as the number of images grows.

python jobs/benchmarks/scale.py --images 1000 --images 100000
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from shared import json_option, show

from imcap_ray.distributed.benchmark import describe_machine
from imcap_ray.distributed.cluster.ray_environment import ray_variables

RUN = Path(__file__).with_name("scale_run.py")
ROWS_PER_GROUP = 8192


@click.command()
@click.option("--images", "counts", multiple=True, type=int, default=(1_000, 10_000, 100_000), show_default=True)
@json_option
def main(counts: tuple[int, ...], as_json: bool) -> None:
    """Images per second, memory of the driver, the actors and the tasks, and what Ray spilled, by number of images.

    Tiny JPEGs in a Parquet table and a captioner that takes no time: only the pipeline is measured.
    """
    runs: list[dict[str, Any]] = []
    for count in counts:
        with tempfile.TemporaryDirectory(prefix="imcap-bench-") as folder:
            table = f"{folder}/tiny.parquet"
            _write_tiny_images(table, count)
            command = [sys.executable, str(RUN), table, f"{folder}/captions", str(time.time())]
            environment = os.environ | ray_variables("local", verbose=False)  # as `imcap caption` sets them
            run = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout)
        runs.append(run)
        megabytes = ", ".join(f"{kind} {size / 2**20:,.0f} MiB" for kind, size in sorted(run["peak_bytes"].items()))
        spilled = "unknown" if run["spilled_bytes"] is None else f"{run['spilled_bytes'] / 2**20:,.0f} MiB"
        steady = "too short for a steady rate" if run["steady"] is None else f"{run['steady']:,.0f} images/s steady"
        click.echo(
            f"{count:9,} images: {steady}, {run['seconds']:.0f} s in all, "
            f"the first after {run['first_seconds']:.0f} s; {megabytes}, "
            f"spilled {spilled}",
            err=True,
        )
    show({"machine": describe_machine(), "runs": runs}, as_json)


def _write_tiny_images(path: str, count: int) -> None:
    """Write a table of distinct JPEGs: one image, with its number in a comment."""
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (36, 48, 3), np.uint8)).save(stream, "JPEG")
    data = stream.getvalue()
    schema = pa.schema([("image_id", pa.string()), ("image", pa.binary())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, count, ROWS_PER_GROUP):
            numbers = range(start, min(count, start + ROWS_PER_GROUP))
            comments = [b"\xff\xfe" + (14).to_bytes(2, "big") + f"{number:012}".encode() for number in numbers]
            images = [data[:2] + comment + data[2:] for comment in comments]
            writer.write_table(pa.table([[f"{number:09}" for number in numbers], images], schema=schema))


if __name__ == "__main__":
    main()
