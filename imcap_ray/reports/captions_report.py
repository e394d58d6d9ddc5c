"""A captions folder or file -> its HTML report, with scores where references are given."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from imcap_ray import storage
from imcap_ray.data.columns import BY_NAME, ColumnOptions
from imcap_ray.data.datasets import CaptionedImages, load_dataset
from imcap_ray.errors import DatasetError, ImageError, InputError
from imcap_ray.reports.cards import Row
from imcap_ray.reports.comparison import Comparison, compare_captions
from imcap_ray.reports.html_report import HumanCaptions, write_report
from imcap_ray.reports.model_section import read_model_of_run
from imcap_ray.runs.captioned_images import CaptionedImageSource
from imcap_ray.runs.captions_table import folder_of, open_captions, read_run
from imcap_ray.scoring.evaluate import captioned_folder, evaluate_captions
from imcap_ray.scoring.evaluation_report import EvaluationReport

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class References:
    """The data set whose captions are shown next to the generated ones, and how these are scored."""

    location: str
    columns: ColumnOptions = BY_NAME
    split: str | None = None
    """Captions that cannot be scored are an error if a split is named; otherwise the page has no scores."""
    tokenizer: str = "ptb"


@dataclass(frozen=True, kw_only=True)
class WrittenReport:
    """Where a report was written, and what its author should know about it."""

    path: str
    dataset: CaptionedImages | None
    """The data set of the references."""
    notes: list[str]
    """One line for each thing that the page lacks: scores, or photographs."""


def write_captions_report(
    captions: str,
    output: str | None = None,
    *,
    references: References | None = None,
    against: str | None = None,
    max_images: int = 1000,
    num_attended: int = 4,
    allow_outside_paths: bool = False,
) -> WrittenReport:
    """Write the report of a captions folder or file.

    Photographs are read from where `image_locator` allows them to be, and from the folder of the references.

    Args:
        output: the HTML file, path or URI. Default: report.html in the captions folder.
        against: other captions of the same images, shown next to these.
        max_images, num_attended: see `write_report`.
    """
    table = open_captions(captions)
    output = output or storage.join(folder_of(captions), "report.html")
    if storage.is_folder(output):
        raise InputError(
            f"--output {output} is a folder: give the name of the page, as {output.rstrip('/')}/report.html"
        )
    dataset, evaluation, score_note = None, None, ""
    if references:
        dataset = load_dataset(references.location, columns=references.columns, allow_outside_paths=allow_outside_paths)
        try:
            evaluation = evaluate_captions(captions, dataset, split=references.split, tokenizer=references.tokenizer)
        except DatasetError as error:
            if references.split:
                raise
            score_note = str(error)
    human = HumanCaptions(score_note=score_note)
    if dataset:
        folder = captioned_folder(captions, dataset)
        human = HumanCaptions(
            references=_by_captioned_id(dataset.references(), folder),
            image_scores=_by_captioned_id(_image_scores(evaluation), folder) if evaluation else {},
            evaluation=evaluation,
            score_note=score_note,
        )
    if against:
        human = replace(human, comparison=_compare(captions, against))
    folders = [dataset.location] if dataset else []
    photographs = _Photographs(CaptionedImageSource(captions, folders=folders, allow_outside_paths=allow_outside_paths))
    run = read_run(captions) or {}
    write_report(
        table,
        output,
        load_images=photographs.load,
        human=human,
        model=read_model_of_run(run, with_attention=num_attended > 0),
        run=run,
        num_attended=num_attended,
        max_images=max_images,
    )
    notes = [f"without scores: {score_note}"] if score_note else []
    if human.comparison:
        notes += _unpaired(human.comparison)
    return WrittenReport(path=output, dataset=dataset, notes=[*notes, *photographs.notes()])


def _compare(captions: str, against: str) -> Comparison:
    """Compare two captions tables, labelled by the models of their runs, or by their locations if these are alike."""
    locations = captions, against
    names = [str((read_run(location) or {}).get("model") or location) for location in locations]
    if names[0] == names[1]:
        names = [f"{name} ({location})" for name, location in zip(names, locations, strict=True)]
    comparison = compare_captions(open_captions(captions), open_captions(against), name=names[0], other_name=names[1])
    if not comparison.differences:
        raise InputError(f"{captions} and {against} have no captioned image in common")
    return comparison


def _unpaired(comparison: Comparison) -> Iterator[str]:
    for name, images in ((comparison.name, comparison.only_own), (comparison.other_name, comparison.only_other)):
        if images:
            yield f"captioned only by {name}: {len(images):,} image{'s' * (len(images) != 1)}, the first is {images[0]}"


def _image_scores(evaluation: EvaluationReport) -> dict[str, float]:
    columns = evaluation.image_scores
    return dict(zip(columns["image_id"], map(float, columns["cider_d"]), strict=True))


def _by_captioned_id(values: Mapping[str, Value], folder: str) -> dict[str, Value]:
    """The values by the ids that their images have in the captions; images of the captioned folder take precedence."""
    inside = {name.removeprefix(folder): value for name, value in values.items() if name.startswith(folder)}
    return {name: value for name, value in values.items() if not name.startswith(folder)} | inside


@dataclass(frozen=True)
class _Photographs:
    """Loads photographs and remembers which of them cannot be shown."""

    source: CaptionedImageSource
    changed: set[str] = field(default_factory=set)
    unreadable: dict[str, str] = field(default_factory=dict)
    """Error message by image_id."""

    def load(self, rows: Sequence[Row]) -> Iterator[bytes | ImageError]:
        for row, data in zip(rows, self.source.load(rows), strict=True):
            if isinstance(data, ImageError) and data.code == "changed":
                self.changed.add(row["image_id"])
            elif isinstance(data, ImageError):
                self.unreadable[row["image_id"]] = data.message
            yield data

    def notes(self) -> Iterator[str]:
        if self.changed:
            yield f"not shown: {_count(self.changed)} changed since captioning, the first is {min(self.changed)}"
        if self.unreadable:
            first = min(self.unreadable)
            yield f"{_count(self.unreadable)} cannot be shown, the first is {first}: {self.unreadable[first]}"


def _count(photographs: Collection[str]) -> str:
    return f"{len(photographs):,} photograph{'s' * (len(photographs) != 1)}"
