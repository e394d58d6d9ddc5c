"""`imcap quantize`."""

from __future__ import annotations

import json
from typing import Any

import click

from imcap_ray.cli.console import print_dataset, print_line, stdout_for_results
from imcap_ray.cli.options import column_options, dataset_column_options, output_options, outside_option


@click.command()
@click.argument("model")
@click.argument("data")
@click.argument("output")
@click.option("--encoder-weights", type=click.Path(), help="The CNN's weights, instead of a download.")
@dataset_column_options
@outside_option
@output_options
def quantize(model: str, data: str, output: str, **options: Any) -> None:
    """Copy the folder of MODEL to OUTPUT and add the model in int8.

    On a CPU with VNNI, int8 takes less than half the time. The copy captions in int8 by default; --precision float32
    selects the weights of MODEL. DATA are the captioned images that the model was trained on, in any format of imcap
    train. 320 training images decide the ranges of the model's values, and the validation images decide the
    familiarity. The captions change: compare the scores with imcap evaluate. Needs NNCF: pip install
    'imcap_ray[quantize]'.

    \b
    imcap quantize runs/mine flickr8k/ runs/mine-int8
    imcap caption ~/Pictures captions/ --model runs/mine-int8
    """
    from imcap_ray.data.datasets import load_dataset
    from imcap_ray.models.model_folder import read_model_folder
    from imcap_ray.training.quantization import quantize_model

    dataset = load_dataset(
        data, columns=column_options(options), allow_outside_paths=options["allow_outside_paths"], refuse_leaks=False
    )
    if not options["quiet"]:
        print_dataset(dataset)
    with stdout_for_results():
        num_images = quantize_model(model, dataset, output, encoder_weights=options["encoder_weights"])
    folder = read_model_folder(output)
    assert folder.int8
    num_bytes = sum(map(len, folder.int8.files.values()))
    if options["as_json"]:
        fingerprint = folder.fingerprint_in(folder.precision)
        click.echo(json.dumps({"output": output, "images": num_images, "bytes": num_bytes, "fingerprint": fingerprint}))
    elif not options["quiet"]:
        size = f"{num_bytes / 1e6:.1f} MB"
        print_line(f"{output}: quantised with {num_images} images; in int8 the model has {size}", err=True)
