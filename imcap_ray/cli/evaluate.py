"""`imcap evaluate`."""

from __future__ import annotations

import json
from typing import Any

import click

from imcap_ray import storage
from imcap_ray.cli.console import print_dataset, print_line
from imcap_ray.cli.options import (
    column_options,
    dataset_column_options,
    output_options,
    outside_option,
    split_option,
    tokenizer_option,
)


@click.command()
@click.argument("captions")
@click.argument("references")
@split_option
@tokenizer_option
@click.option(
    "--against",
    metavar="CAPTIONS",
    help="Other captions of the same images, to compare with.",
)
@click.option(
    "--save",
    help="Folder for scores.json, scores.md and scores.parquet (scores of each image). Default: _imcap in CAPTIONS if "
    "that is a folder; the table is image_scores there.",
)
@dataset_column_options
@outside_option
@output_options
def evaluate(captions: str, references: str, **options: Any) -> None:
    """Score CAPTIONS (a captions folder or Parquet file) against the captions of the data set REFERENCES.

    \b
    imcap evaluate captions/ flickr8k/
    imcap evaluate captions/ flickr8k/ --against captions-before/
    """
    import pyarrow as pa

    from imcap_ray.data.datasets import load_dataset
    from imcap_ray.data.parquet_files import write_table
    from imcap_ray.scoring.evaluate import evaluate_captions, refuse_swapped

    refuse_swapped(captions, references)
    dataset = load_dataset(
        references, columns=column_options(options), allow_outside_paths=options["allow_outside_paths"]
    )
    report = evaluate_captions(
        captions, dataset, split=options["split"], tokenizer=options["tokenizer"], against=options["against"]
    )
    if not options["quiet"]:
        print_dataset(dataset)
    folder = options["save"] or (storage.join(captions, "_imcap") if storage.is_folder(captions) else None)
    if folder:
        storage.write_bytes(storage.join(folder, "scores.json"), report.to_json().encode())
        storage.write_bytes(storage.join(folder, "scores.md"), report.to_markdown().encode())
        # In CAPTIONS without an extension: readers of every `.parquet` file below a folder would take it for captions.
        table = "scores.parquet" if options["save"] else "image_scores"
        write_table(storage.join(folder, table), pa.table(dict(report.image_scores)))
    if options["as_json"]:
        click.echo(json.dumps(json.loads(report.to_json()), indent=2))  # escapes control characters
    elif not options["quiet"]:
        for line in report.to_text().splitlines():
            print_line(line)
