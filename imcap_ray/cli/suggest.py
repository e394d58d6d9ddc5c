"""`imcap suggest`."""

from __future__ import annotations

import json
from typing import Any

import click

from imcap_ray.cli.console import progress_reporter
from imcap_ray.cli.options import output_options, outside_option


@click.command()
@click.argument("captions")
@click.argument("output", metavar="OUT")
@click.option("--count", type=click.IntRange(1), default=200, show_default=True, help="Number of images.")
@outside_option
@output_options
def suggest(captions: str, output: str, **options: Any) -> None:
    """Choose images of CAPTIONS for people to caption next, and write them to OUT.

    They are among the least confident and the least familiar images, and as different from each other as possible by
    the features of the bundled model's CNN. OUT is a new folder with small copies of the images and captions.csv.
    Correct its column `caption`, add rows with the same `file_name` for more captions of an image, delete the rows of
    useless images, and train on the folder.

    \b
    imcap suggest captions/ to-correct/ --count 300
    imcap train to-correct/ runs/mine --start-from flickr8k-lite2
    """
    from dataclasses import asdict

    from imcap_ray.exports.suggestions import TABLE_FILE, suggest_images
    from imcap_ray.models.torch_captioner import load_torch_captioner
    from imcap_ray.runs.captioned_images import CaptionedImageSource
    from imcap_ray.runs.captions_table import refuse_replacement

    refuse_replacement(captions)
    reporter = progress_reporter(quiet=options["quiet"])
    suggestions = suggest_images(
        captions,
        output,
        count=options["count"],
        captioner=load_torch_captioner(),
        images=CaptionedImageSource(captions, allow_outside_paths=options["allow_outside_paths"]),
        on_progress=reporter.report_images,
    )
    if options["as_json"]:
        click.echo(json.dumps(asdict(suggestions)))
        return
    if suggestions.num_unreadable:
        reporter.report(f"left out: {suggestions.num_unreadable:,} images that cannot be read or have changed")
    reporter.report(
        f"{suggestions.output}: {suggestions.num_images:,} images, chosen from {suggestions.num_candidates:,}; correct "
        f"the captions in {TABLE_FILE}"
    )
