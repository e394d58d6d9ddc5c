"""A captions table and a data set's references -> scores."""

from __future__ import annotations

import math
from collections.abc import Mapping

from imcap_ray.datasets import SPLITS, TRAIN, CaptionedImages
from imcap_ray.errors import DatasetError
from imcap_ray.manifest import open_captions
from imcap_ray.metrics import EvaluationReport, evaluate

Captions = dict[str, tuple[str, float]]
"""Caption and confidence by image_id."""


def read_captions(location: str) -> Captions:
    """image_id -> caption and confidence of a captions table (folder or Parquet file); "" for images that have none."""
    dataset = open_captions(location)
    columns = ["image_id", "caption", "confidence"]
    table = dataset.to_table(columns=[name for name in columns if name in dataset.schema.names])
    rows = table.to_pylist()
    captions = {str(row["image_id"]): (row["caption"] or "", row.get("confidence", math.nan)) for row in rows}
    if len(captions) != len(rows):
        raise DatasetError(f"{location}: {len(rows) - len(captions):,} image ids stand there more than once")
    return captions


def evaluate_captions(
    location: str,
    references: CaptionedImages,
    *,
    split: str | None = None,
    tokenizer: str = "ptb",
    against: str | None = None,
) -> EvaluationReport:
    """Score the captions table at `location` against a data set.

    An image is looked up by its id, or by its file name where the captions were made from a folder above the images.
    With a split the captions of other images are left aside; without one there must be none, and the captions must
    be of all images of one split, or of all images.

    Args:
        against: another captions table, of the same images at least, to be compared with.

    Raises:
        DatasetError: the captions are of other images, or some of the split's images have none.
    """
    captions = _match(read_captions(location), references)
    if split is None:
        _refuse_strangers(location, captions, references)
        split = _split_of(captions, references)
    wanted = references.references(split)
    captions = _of_all(captions, wanted, location, f"{split or 'captioned'} images of {references.location}")
    other = None
    if against is not None:
        found = _match(read_captions(against), references)
        found = _of_all(found, wanted, against, f"images that {location} is scored on")
        other = (against, _texts(found))
    notes = "images of the training split: no measure of quality" if split == TRAIN else ""
    confidences = {image_id: confidence for image_id, (_, confidence) in captions.items()}
    return evaluate(
        _texts(captions),
        wanted,
        split=split or "",
        tokenizer=tokenizer,
        notes=notes,
        confidences=None if all(map(math.isnan, confidences.values())) else confidences,
        against=other,
    )


def _of_all(captions: Captions, wanted: Mapping[str, object], location: str, what: str) -> Captions:
    """The captions of the wanted images, or DatasetError when one has none."""
    captions = {image_id: caption for image_id, caption in captions.items() if image_id in wanted}
    missing = [image_id for image_id in wanted if image_id not in captions]
    if missing:
        raise DatasetError(
            f"{location} has captions for {len(captions):,} of the {len(wanted):,} {what}, {missing[0]} is missing: "
            "caption them all, or name the --split they are of; a score over a part cannot be compared"
        )
    return captions


def _texts(captions: Captions) -> dict[str, str]:
    return {image_id: text for image_id, (text, _) in captions.items()}


def _match(captions: Captions, references: CaptionedImages) -> Captions:
    """The captions under the data set's image ids: their own, or their file names."""
    if captions.keys().isdisjoint(references.table["image_id"].to_pylist()):
        by_name = {image_id.rpartition("/")[2]: caption for image_id, caption in captions.items()}
        if len(by_name) == len(captions):
            return by_name
    return captions


def _refuse_strangers(location: str, captions: Captions, references: CaptionedImages) -> None:
    known = set(references.table["image_id"].to_pylist())
    strangers = [image_id for image_id in captions if image_id not in known]
    if strangers:
        raise DatasetError(
            f"{location} does not match {references.location}: {len(strangers):,} of {len(captions):,} captioned "
            f"images have no references there, the first is {strangers[0]}"
        )


def _split_of(captions: Captions, references: CaptionedImages) -> str | None:
    """The split that all captioned images are of; None where they are of several."""
    table = references.table
    splits = dict(zip(table["image_id"].to_pylist(), table["split"].to_pylist(), strict=True))
    found = {splits[image_id] for image_id in captions}
    return found.pop() if len(found) == 1 and found <= set(SPLITS) else None
