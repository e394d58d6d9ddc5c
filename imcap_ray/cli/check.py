"""`imcap check`."""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import Any

import click

from imcap_ray.cli.console import CLEAR_LINE, print_line, progress_reporter
from imcap_ray.cli.options import column_options, dataset_column_options, output_options, outside_option
from imcap_ray.config import DEFAULT_RECIPE

DATASET_UNUSABLE = 3
"""Exit code: the data set is unusable for training."""


@click.command()
@click.argument("data")
@click.option("--decode/--no-decode", default=True, help="Read every image, or check only names and captions.")
@click.option(
    "--outliers",
    is_flag=True,
    help="Name images that are unlike the others, and splits that are unlike the training images, by the features of "
    "the bundled model's CNN: 10 to 20 ms for each image.",
)
@click.option(
    "--recipe",
    default=DEFAULT_RECIPE,
    show_default=True,
    help="Recipe whose vocabulary the captions are compared with.",
)
@click.option(
    "--set", "overrides", multiple=True, metavar="SECTION.NAME=VALUE", help="Override a setting of the recipe."
)
@dataset_column_options
@outside_option
@output_options
def check(data: str, **options: Any) -> None:
    """Describe the captioned images of DATA, report problems, and find leaks between splits.

    Exit code 3 means that the data are unusable for training: there are no training or validation images; more than
    10 % of the images are missing or unreadable; the same image is in two splits, or more than 1 % of a split are near
    duplicates of images in another; more than 1 % of the captions were read in the wrong encoding. If the data do not
    name the splits, near duplicates are put into one split.

    \b
    imcap check flickr8k/
    imcap check flickr8k/ --outliers
    imcap check coco/annotations/captions_val2017.json --no-decode
    """
    from imcap_ray.config import load_recipe, parse_override
    from imcap_ray.data.dataset_check import check_dataset
    from imcap_ray.data.datasets import load_dataset
    from imcap_ray.models.decoders import find_decoder

    if options["outliers"]:
        from imcap_ray.models.outliers import check_outliers
        from imcap_ray.models.torch_captioner import load_torch_captioner

    recipe = load_recipe(options["recipe"], dict(parse_override(text) for text in options["overrides"]))
    find_decoder(recipe.decoder)
    dataset = load_dataset(
        data,
        columns=column_options(options),
        allow_outside_paths=options["allow_outside_paths"],
        count_missing_files=False,
        refuse_leaks=False,
    )
    reporter = progress_reporter(quiet=options["quiet"])
    result = check_dataset(
        dataset,
        recipe=recipe,
        decode=options["decode"],
        on_progress=reporter.report_images,
    )
    if options["outliers"]:
        result = result.with_findings(
            check_outliers(
                dataset, load_torch_captioner(), on_progress=partial(reporter.report_images, task="outliers")
            )
        )
    if sys.stderr.isatty() and (options["decode"] or options["outliers"]) and not options["quiet"]:
        click.echo(CLEAR_LINE, err=True, nl=False)
    if options["as_json"]:
        click.echo(json.dumps(result.to_mapping()))
    elif not options["quiet"]:
        for line in result.to_text().splitlines():
            print_line(line)
    if result.spoils:
        sys.exit(DATASET_UNUSABLE)
