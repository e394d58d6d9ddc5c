"""`imcap export`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from imcap_ray.cli.console import progress_reporter
from imcap_ray.cli.options import output_options, outside_option
from imcap_ray.errors import InputError
from imcap_ray.runs.progress_reporter import ProgressReporter

if TYPE_CHECKING:
    from imcap_ray.exports.captions_rows import ExportSummary


@click.command()
@click.argument("captions")
@click.argument("output", metavar="OUT")
@click.option(
    "--to",
    "format",
    required=True,
    type=click.Choice(["coco", "jsonl", "csv", "sidecar", "hf", "webdataset"]),
    help="Format of OUT.",
)
@click.option("--min-confidence", type=click.FloatRange(0, 1), help="Leave out captions with a lower confidence.")
@click.option("--min-familiarity", type=click.FloatRange(0, 1), help="Leave out images of a lower familiarity.")
@click.option(
    "--existing",
    type=click.Choice(["skip", "overwrite", "append"]),
    help="For sidecar: keep an existing .txt, replace it, or append a line to it. Default: skip.",
)
@click.option(
    "--shard-size",
    type=click.IntRange(1),
    help="For hf and webdataset: maximum number of images in a file, which has at most 1 GB. Default: 10000.",
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier export.")
@outside_option
@output_options
def export(captions: str, output: str, **options: Any) -> None:
    """Write the captions of CAPTIONS (a captions folder or Parquet file) in a format that other tools read.

    
    coco        annotations for pycocotools' COCO(OUT), and OUT_results.json for its loadRes
    jsonl       one JSON object a line
    csv         a table for spreadsheets: UTF-8 with a byte order mark; text that a spreadsheet would run as a
                formula (=...) gets a ' in front
    sidecar     a .txt for each image in the folder OUT, with the same path as the image in the input;
                a.jpg.txt and a.png.txt where several would be a.txt
    hf          Parquet files with images and captions in the folder OUT, for datasets.load_dataset(OUT)
    webdataset  tar files in the folder OUT, with each image, its .txt and .json

    Rows without a caption are left out and counted.

    
    imcap export captions/ captions.jsonl --to jsonl --min-confidence 0.3
    imcap export captions/ ~/Pictures --to sidecar          .txt files next to the images
    imcap export captions/ shards/ --to webdataset
    """
    from dataclasses import asdict

    from imcap_ray.exports.export import ExportOptions, export_captions
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
        reporter.report(
            f"{captions}: the run that writes these captions is not complete; exporting the captions so far"
        )
    summary = export_captions(
        captions,
        output,
        ExportOptions(
            format=format,
            min_confidence=options["min_confidence"],
            min_familiarity=options["min_familiarity"],
            existing=options["existing"] or "skip",
            shard_images=options["shard_size"] or SHARD_IMAGES,
            overwrite=options["overwrite"],
        ),
        images=CaptionedImageSource(captions, allow_outside_paths=options["allow_outside_paths"]),
        on_progress=reporter.report_images,
    )
    if options["as_json"]:
        click.echo(json.dumps(asdict(summary)))
        return
    _report(summary, reporter)


def _report(summary: ExportSummary, reporter: ProgressReporter) -> None:
    for image in summary.images_without:
        reporter.report(f"left out: {image}")
    if summary.left_out_without_image > len(summary.images_without):
        reporter.report(f"left out: {summary.left_out_without_image - len(summary.images_without):,} more")
    if summary.renamed:
        more = ", ..." if summary.num_renamed > len(summary.renamed) else ""
        reporter.report(
            f"{summary.num_renamed:,} sidecars have a longer name than usual, because images differ only in extension, "
            f"case or Unicode form: {', '.join(summary.renamed)}{more}"
        )
    reporter.report(summary.describe())
