"""`imcap check`."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from imcap_ray.cli.console import CLEAR_LINE, print_line, progress_reporter
from imcap_ray.cli.options import column_options, dataset_column_options, output_options, outside_option
from imcap_ray.config import DEFAULT_RECIPE

DATASET_UNUSABLE = 3
"""`imcap check` has found what would spoil a training."""


@click.command()
@click.argument("data")
@click.option("--decode/--no-decode", default=True, help="Read every image; without it only names and captions.")
@click.option("--recipe", default=DEFAULT_RECIPE, show_default=True, help="Whose vocabulary the captions are for.")
@click.option(
    "--set", "overrides", multiple=True, metavar="SECTION.NAME=VALUE", help="Override a setting of the recipe."
)
@dataset_column_options
@outside_option
@output_options
def check(data: str, **options: Any) -> None:
    """Tell what the captioned images of DATA hold, what is wrong with them, and what leaks between splits.

    Exit code 3 says that a training would be spoilt: there are no training or validation images; more than 10 % of the
    images are missing or unreadable; an image is in two splits with the same bytes, or more than 1 % of a split look
    the same as images of another; more than 1 % of the captions were read in the wrong encoding.

    \b
    imcap check flickr8k/
    imcap check coco/annotations/captions_val2017.json --no-decode
    """
    from imcap_ray.config import load_recipe, parse_override
    from imcap_ray.data.dataset_check import check_dataset
    from imcap_ray.data.datasets import load_dataset

    recipe = load_recipe(options["recipe"], dict(parse_override(text) for text in options["overrides"]))
    dataset = load_dataset(
        data,
        columns=column_options(options),
        allow_outside_paths=options["allow_outside_paths"],
        count_missing_files=False,
        refuse_leaks=False,
    )
    found = check_dataset(
        dataset,
        recipe=recipe,
        decode=options["decode"],
        on_progress=progress_reporter(quiet=options["quiet"]).report_images,
    )
    if sys.stderr.isatty() and options["decode"] and not options["quiet"]:
        click.echo(CLEAR_LINE, err=True, nl=False)
    if options["as_json"]:
        click.echo(json.dumps(found.to_mapping()))
    elif not options["quiet"]:
        for line in found.to_text().splitlines():
            print_line(line)
    if found.spoils:
        sys.exit(DATASET_UNUSABLE)
