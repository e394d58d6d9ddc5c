"""`imcap bench`."""

from __future__ import annotations

import json
from typing import Any

import click

from imcap_ray.cli.console import print_line, stdout_for_results
from imcap_ray.cli.options import model_option, model_option_option, parse_size, precision_option
from imcap_ray.distributed.cluster.ray_environment import set_ray_environment


@click.command()
@click.argument("input", required=False)
@model_option
@model_option_option
@precision_option
@click.option("--images", type=click.IntRange(64), default=1000, show_default=True, help="Number of generated images.")
@click.option("--size", callback=parse_size, default="500x375", show_default=True, help="Size of generated images.")
@click.option("--num-actors", type=click.IntRange(1), help="Captioning processes. Default: one per GPU, or per core.")
@click.option("--batch-size", type=click.IntRange(1), help="Images an actor takes at a time.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def bench(input: str | None, **options: Any) -> None:
    """Measure images per second on this machine: the limit of its cores or its GPU, and the speed of `imcap caption`.

    INPUT is a folder or Parquet with images. Without it, images are generated from noise that takes as much work as
    photographs. No files are left behind. The programs in `jobs/benchmarks/` measure more, such as training.

    \b
    imcap bench
    imcap bench ~/Pictures --model runs/mine
    imcap bench --size 4000x3000 --images 300
    """
    from tempfile import TemporaryDirectory

    set_ray_environment("local", verbose=False)

    from imcap_ray.data.synthetic_images import write_photographs
    from imcap_ray.distributed.benchmark import compare_with_limit, describe_machine
    from imcap_ray.models.captioner_spec import CaptionerSpec, absolute_model

    models = tuple(map(absolute_model, options["models"]))

    with TemporaryDirectory(prefix="imcap-bench-") as folder, stdout_for_results():
        if input is None:
            write_photographs(input := f"{folder}/photographs", options["images"], options["size"])
        comparison = compare_with_limit(
            input,
            f"{folder}/captions",
            spec=CaptionerSpec(models=models, options=options["model_options"], precision=options["precision"]),
            num_actors=options["num_actors"],
            batch_size=options["batch_size"],
        )
    if options["as_json"]:
        click.echo(json.dumps({"machine": describe_machine()} | comparison.to_dict()))
        return
    print_line(", ".join(f"{name} {value}" for name, value in describe_machine().items()))
    for line in comparison.lines():
        print_line(line)
