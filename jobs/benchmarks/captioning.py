"""Speed of `imcap caption` as a share of what this machine could reach. `imcap bench` measures one kind of image.

python jobs/benchmarks/captioning.py --images 5000
"""

from __future__ import annotations

import tempfile
from typing import Any

import click
from shared import json_option, show

from imcap_ray.cli.options import precision_option
from imcap_ray.data.synthetic_images import write_photographs, write_table
from imcap_ray.distributed.benchmark import (
    IMAGES_PER_ROUND,
    Comparison,
    describe_machine,
    measure_limit,
    measure_run,
    some_files,
)
from imcap_ray.models.captioner_spec import CaptionerSpec

SIZES = ((224, 224), (500, 375), (4000, 3000))
LARGE_PIXELS = 4_000_000


@click.command()
@click.option("--images", default=5000, show_default=True, help="Images of each size.")
@click.option("--large-images", default=1000, show_default=True, help="Images of 4000 x 3000.")
@click.option("--model", "models", multiple=True, help="Model folder. Default: the bundled model.")
@precision_option
@json_option
def main(images: int, large_images: int, models: tuple[str, ...], precision: str, as_json: bool) -> None:
    """Compare `imcap caption` with the limit of this machine: JPEGs of three sizes, as files and as a Parquet table."""
    runs: list[dict[str, Any]] = []
    spec = CaptionerSpec(models=models, precision=precision)
    for size in SIZES:
        with tempfile.TemporaryDirectory(prefix="imcap-bench-") as folder:
            count = large_images if size[0] * size[1] > LARGE_PIXELS else images
            files, table = f"{folder}/photographs", f"{folder}/photographs.parquet"
            write_photographs(files, count, size)
            write_table(files, table)
            limit = measure_limit(some_files(files, IMAGES_PER_ROUND), spec)
            for kind, input in (("folder", files), ("Parquet", table)):
                run = measure_run(input, f"{folder}/captions-{kind}", spec=spec)
                comparison = Comparison(limit=limit, run=run)
                name = f"{size[0]} x {size[1]}, {kind}"
                runs.append({"input": name} | comparison.to_dict())
                click.echo(f"--- {name}\n" + "\n".join(comparison.lines()), err=True)
    show({"machine": describe_machine(), "runs": runs}, as_json)


if __name__ == "__main__":
    main()
