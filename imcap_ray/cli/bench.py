"""`imcap bench`."""

from __future__ import annotations

import json
from typing import Any

import click

from imcap_ray.cli.console import print_line
from imcap_ray.cli.options import parse_size
from imcap_ray.config import DEFAULT_MODEL
from imcap_ray.distributed.ray_environment import set_ray_environment


@click.command()
@click.argument("input", required=False)
@click.option("--model", "models", multiple=True, help=f"Model folder. Default: {DEFAULT_MODEL}, the package's.")
@click.option("--images", type=click.IntRange(64), default=1000, show_default=True, help="Images that are made.")
@click.option("--size", callback=parse_size, default="500x375", show_default=True, help="Of the images that are made.")
@click.option("--num-actors", type=click.IntRange(1), help="Processes with a model. Default: one per GPU, or per core.")
@click.option("--batch-size", type=click.IntRange(1), help="Images an actor takes at a time.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def bench(input: str | None, **options: Any) -> None:
    """Images per second on this machine: what its cores or its GPU could do at best, and what `imcap caption` does.

    The images are those of INPUT, a folder or Parquet, or else made for it: noise that is as much work as photographs.
    Nothing is left behind. `jobs/benchmarks/` has more: alternatives, training, millions of images.

    \b
    imcap bench
    imcap bench ~/Pictures --model runs/mine
    imcap bench --size 4000x3000 --images 300
    """
    from tempfile import TemporaryDirectory

    set_ray_environment("local", verbose=False)

    from imcap_ray.data.synthetic_images import write_photographs
    from imcap_ray.distributed.benchmark import compare_with_limit, describe_machine

    with TemporaryDirectory(prefix="imcap-bench-") as folder:
        if input is None:
            write_photographs(input := f"{folder}/photographs", options["images"], options["size"])
        found = compare_with_limit(
            input,
            f"{folder}/captions",
            models=options["models"],
            num_actors=options["num_actors"],
            batch_size=options["batch_size"],
        )
    if options["as_json"]:
        click.echo(json.dumps({"machine": describe_machine()} | found.to_dict()))
        return
    print_line(", ".join(f"{name} {value}" for name, value in describe_machine().items()))
    for line in found.lines():
        print_line(line)
