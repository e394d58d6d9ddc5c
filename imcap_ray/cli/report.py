"""`imcap report`."""

from __future__ import annotations

from typing import Any

import click

from imcap_ray.cli.console import print_dataset, print_line
from imcap_ray.cli.options import column_options, dataset_column_options, outside_option, split_option, tokenizer_option


@click.command()
@click.argument("captions")
@click.option("--references", help="A data set whose captions are shown next to the generated ones.")
@split_option
@tokenizer_option
@click.option("--against", metavar="CAPTIONS", help="Other captions of the same images, shown next to these.")
@click.option("--output", help="The HTML file, path or URI. Default: report.html in the folder of CAPTIONS.")
@click.option("--max-images", type=click.IntRange(0), default=1000, show_default=True, help="Photographs shown.")
@click.option(
    "--attention",
    "num_attended",
    type=click.IntRange(0, 100),
    default=4,
    show_default=True,
    help="Photographs with a map of the model's attention for each word, if the model can still be loaded.",
)
@dataset_column_options
@outside_option
def report(
    captions: str,
    output: str | None,
    references: str | None,
    against: str | None,
    split: str | None,
    tokenizer: str,
    **options: Any,
) -> None:
    """Write one self-contained HTML file: photographs, captions, scores, failures.

    \b
    imcap report captions/
    imcap report captions/ --references flickr8k/      next to human captions, the worst first
    imcap report captions/ --against captions-before/  next to other captions, the most different first
    """
    from imcap_ray.reports.captions_report import References, write_captions_report

    columns = column_options(options)
    compared = (
        References(location=references, columns=columns, split=split, tokenizer=tokenizer) if references else None
    )
    written = write_captions_report(
        captions,
        output,
        references=compared,
        against=against,
        max_images=options["max_images"],
        num_attended=options["num_attended"],
        allow_outside_paths=options["allow_outside_paths"],
    )
    if written.dataset:
        print_dataset(written.dataset)
    for note in written.notes:
        print_line(note, err=True)
    print_line(written.path)
