"""`imcap export`."""

from __future__ import annotations

import json
from typing import Any

import click

from imcap_ray.cli.console import progress_reporter
from imcap_ray.cli.options import output_options, outside_option
from imcap_ray.errors import InputError


@click.command()
@click.argument("captions")
@click.argument("output", metavar="OUT")
@click.option(
    "--to",
    "format",
    required=True,
    type=click.Choice(["coco", "jsonl", "csv", "sidecar", "hf", "webdataset"]),
    help="What OUT is to be.",
)
@click.option("--min-confidence", type=click.FloatRange(0, 1), help="Leave out captions with less confidence.")
@click.option(
    "--existing",
    type=click.Choice(["skip", "overwrite", "append"]),
    help="sidecar: leave a .txt that is there alone, replace it, or add a line to it. Default: skip.",
)
@click.option(
    "--shard-size",
    type=click.IntRange(1),
    help="hf, webdataset: images in a file. Default: 10000; a file of 1 GB is full in any case.",
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier export.")
@outside_option
@output_options
def export(captions: str, output: str, **options: Any) -> None:
    """Turn the captions of CAPTIONS (a captions folder or Parquet) into what other tools read.

    
    coco        annotations for pycocotools' COCO(OUT), and OUT_results.json for its loadRes
    jsonl       one JSON object a line
    csv         the same as a table; text that a spreadsheet would run (=...) gets a ' before it
    sidecar     a .txt for each image, in the folder OUT under the image's path below the input
    hf          Parquet with images and captions in the folder OUT, for datasets.load_dataset(OUT)
    webdataset  tar files with image, .txt and .json in the folder OUT

    Rows without a caption are left out and counted.

    
    imcap export captions/ captions.jsonl --to jsonl --min-confidence 0.3
    imcap export captions/ ~/Pictures --to sidecar          the .txt beside the images
    imcap export captions/ shards/ --to webdataset
    """
    from dataclasses import asdict

    from imcap_ray.exports.export import export_captions
    from imcap_ray.exports.shards import SHARD_IMAGES
    from imcap_ray.runs.captioned_images import CaptionedImageSource
    from imcap_ray.runs.captions_table import read_run, refuse_replacement

    format = options["format"]
    for option, formats in (("existing", ["sidecar"]), ("shard_size", ["hf", "webdataset"])):
        if options[option] is not None and format not in formats:
            raise InputError(f"--{option.replace('_', '-')} is for {' and '.join(formats)}, not for {format}")
    reporter = progress_reporter(quiet=options["quiet"])
    refuse_replacement(captions)
    if (read_run(captions) or {}).get("state", "complete") != "complete":
        reporter.report(f"{captions}: the run that writes these captions is not complete; what is there is exported")
    summary = export_captions(
        captions,
        output,
        format=format,
        images=CaptionedImageSource(captions, allow_outside_paths=options["allow_outside_paths"]),
        min_confidence=options["min_confidence"],
        existing=options["existing"] or "skip",
        shard_images=options["shard_size"] or SHARD_IMAGES,
        overwrite=options["overwrite"],
        on_progress=reporter.report_images,
    )
    if options["as_json"]:
        click.echo(json.dumps(asdict(summary)))
        return
    for image in summary.images_without:
        reporter.report(f"left out: {image}")
    if summary.left_out_without_image > len(summary.images_without):
        reporter.report(f"left out: {summary.left_out_without_image - len(summary.images_without):,} more")
    reporter.report(summary.describe())
