"""`imcap report`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from imcap_ray import storage
from imcap_ray.cli.console import print_dataset, print_line
from imcap_ray.cli.options import column_options, dataset_column_options, outside_option, split_option, tokenizer_option
from imcap_ray.errors import DatasetError, ImageError, InputError

if TYPE_CHECKING:
    from imcap_ray.data.columns import ColumnOptions


@click.command()
@click.argument("captions")
@click.option("--references", help="A data set whose captions stand beside ours.")
@split_option
@tokenizer_option
@click.option("--output", help="The HTML file, path or URI. Default: report.html in CAPTIONS, or beside that file.")
@click.option("--max-images", type=click.IntRange(0), default=1000, show_default=True, help="Photographs shown.")
@click.option(
    "--attention",
    "num_attended",
    type=click.IntRange(0, 100),
    default=4,
    show_default=True,
    help="Photographs with where the model looked at each word, if the model of the captions can be loaded.",
)
@dataset_column_options
@outside_option
def report(captions: str, output: str | None, **options: Any) -> None:
    """Write one self-contained HTML file: photographs, captions, scores, failures.

    \b
    imcap report captions/
    imcap report captions/ --references flickr8k/      captions beside people's, the worst first
    """
    columns = column_options(options)
    options = {name: value for name, value in options.items() if not name.endswith("_column")}
    print_line(write_captions_report(captions, output, reference_columns=columns, **options))


def write_captions_report(
    captions: str,
    output: str | None,
    *,
    references: str | None = None,
    reference_columns: ColumnOptions | None = None,
    split: str | None = None,
    tokenizer: str = "ptb",
    max_images: int = 1000,
    num_attended: int = 4,
    allow_outside_paths: bool = False,
) -> str:
    """Write the report of a captions folder or file; where it is.

    Photographs are taken from where `image_placer` lets them be, and from the references' folder. Captions that cannot
    be scored stand beside the references without scores, unless a split is named.
    """
    from imcap_ray.data.columns import BY_NAME
    from imcap_ray.data.datasets import load_dataset
    from imcap_ray.reports.html_report import write_report
    from imcap_ray.reports.model_section import read_model_of_run
    from imcap_ray.runs.captioned_images import CaptionedImageSource
    from imcap_ray.runs.captions_table import folder_of, open_captions, read_run
    from imcap_ray.scoring.evaluate import captioned_folder, evaluate_captions

    table = open_captions(captions)
    output = output or storage.join(folder_of(captions), "report.html")
    if storage.is_folder(output):
        raise InputError(
            f"--output {output} is a folder: give the name of the page, as {output.rstrip('/')}/report.html"
        )
    dataset = None
    if references:
        dataset = load_dataset(
            references, columns=reference_columns or BY_NAME, allow_outside_paths=allow_outside_paths
        )
    images = CaptionedImageSource(
        captions, folders=[dataset.location] if dataset else [], allow_outside_paths=allow_outside_paths
    )
    not_shown: dict[str, str] = {}
    changed: set[str] = set()

    def load_images(rows: Sequence[dict[str, Any]]) -> Iterator[bytes | ImageError]:
        for row, data in zip(rows, images.load(rows), strict=True):
            if isinstance(data, ImageError) and data.code == "changed":
                changed.add(row["image_id"])
            elif isinstance(data, ImageError):
                not_shown[row["image_id"]] = data.message
            yield data

    scores, score_note = None, ""
    if dataset:
        try:
            scores = evaluate_captions(captions, dataset, split=split, tokenizer=tokenizer)
        except DatasetError as error:
            if split:
                raise
            score_note = str(error)
            print_line(f"without scores: {score_note}", err=True)
        print_dataset(dataset)
    columns = scores.image_scores if scores else {}
    folder = captioned_folder(captions, dataset) if dataset else ""

    def below(values: Mapping[str, Any]) -> dict[str, Any]:
        """The values by the ids that their images have in the captions; those of the captioned folder come first."""
        inside = {name.removeprefix(folder): value for name, value in values.items() if name.startswith(folder)}
        return {name: value for name, value in values.items() if not name.startswith(folder)} | inside

    run = read_run(captions) or {}
    model = read_model_of_run(run, with_attention=num_attended > 0)
    write_report(
        table,
        output,
        load_images=load_images,
        references=below(dataset.references()) if dataset else None,
        evaluation=json.loads(scores.to_json()) if scores else None,
        image_scores=below(dict(zip(columns["image_id"], map(float, columns["cider_d"]), strict=True)))
        if scores
        else None,
        history=model.history,
        run=run,
        attend=model.attend,
        num_attended=num_attended,
        attention_note=model.note,
        score_note=score_note,
        max_images=max_images,
    )
    if changed:
        photographs = f"{len(changed):,} photograph{'s' * (len(changed) != 1)}"
        print_line(f"not shown: {photographs} changed since captioning, the first is {min(changed)}", err=True)
    if not_shown:
        first = min(not_shown)
        photographs = f"photograph{'s' * (len(not_shown) != 1)}"
        print_line(
            f"{len(not_shown):,} {photographs} cannot be shown, the first is {first}: {not_shown[first]}", err=True
        )
    return output
