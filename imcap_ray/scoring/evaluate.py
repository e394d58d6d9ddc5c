"""A captions table and a data set's references -> scores.

Texts stay in Arrow's tables and become Python's a few thousand at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from imcap_ray.data.datasets import SPLITS, TRAIN, CaptionedImages
from imcap_ray.errors import DatasetError
from imcap_ray.runs.captions_table import open_captions, read_run
from imcap_ray.scoring.evaluation_report import EvaluationReport, evaluate_texts

ROWS_AT_A_TIME: Final = 10_000


def read_captions(location: str) -> pa.Table:
    """image_id, caption and confidence of a captions table (folder or Parquet file).

    A caption is "" for an image that has none, a confidence null where it is not known.

    Raises:
        DatasetError: an id occurs more than once, or a column is of another kind.
    """
    dataset = open_captions(location)
    columns = ["image_id", "caption", "confidence"]
    try:
        table = dataset.to_table(columns=[name for name in columns if name in dataset.schema.names])
        num_rows = table.num_rows
        captions = pa.table(
            {
                "image_id": _text(table["image_id"]),
                "caption": pc.fill_null(_text(table["caption"]), ""),
                "confidence": table["confidence"].cast(pa.float64())
                if "confidence" in table.column_names
                else pa.nulls(num_rows, pa.float64()),
            }
        )
        captions.validate(full=True)  # Parquet's readers do not ask whether text is UTF-8
    except pa.ArrowException as error:
        raise DatasetError(f"{location} cannot be read as a captions table: {error}") from error
    num_ids = pc.count_distinct(captions["image_id"], mode="all").as_py()
    if num_ids != num_rows:
        raise DatasetError(f"{location}: {num_rows - num_ids:,} image ids occur more than once")
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

    An image is looked up by its id, with the folder before it where one of the data's own folders was captioned. Where
    no id is known, it is looked up by its file name, if only one captioned image and one of the data set has that name.
    Captions of images that the data set has without a caption are left aside. With a split the captions of other images
    are left aside too; without one there must be none, and the captions must be of all images of one split, or of all
    images. The notes count the captioned images without references.

    Args:
        against: another captions table, of the same images at least, to be compared with.

    Raises:
        DatasetError: the captions are of other images, or some of the split's images have none.
    """
    captions = _match(location, read_captions(location), references)
    if split is None:
        _refuse_strangers(location, captions, references)
        split = _split_of(captions, references)
    num_strangers = _strangers(captions, references).length()
    wanted = references.split(split) if split else references.table
    captions = _of_all(captions, wanted, location, f"{split or 'captioned'} images of {references.location}")
    other = None
    if against is not None:
        found = _match(against, read_captions(against), references)
        found = _of_all(found, wanted, against, f"images that {location} is scored on")
        other = (against, _Values(found["caption"]))
    confidences = captions["confidence"].to_numpy()  # nan where it is not known
    pa.default_memory_pool().release_unused()  # what reading took
    return evaluate_texts(
        _Values(captions["caption"]),
        _Values(wanted["captions"]),
        image_ids=wanted["image_id"].to_pylist(),
        split=split or "",
        tokenizer=tokenizer,
        notes="; ".join(_notes(location, split, num_strangers)),
        confidences=None if pc.all(pc.is_nan(pa.array(confidences))).as_py() else confidences,
        against=other,
    )


def _notes(location: str, split: str | None, num_strangers: int) -> Iterator[str]:
    """What a reader of the scores has to know: how the captions were sought, and of what images they are."""
    if num_strangers:
        yield f"{num_strangers:,} captioned image{'s have' if num_strangers != 1 else ' has'} no references"
    run = read_run(location) or {}
    if isinstance(search := run.get("search"), dict):
        yield f"beam {search.get('beam_size')}, length penalty {search.get('length_penalty')}"
    if fingerprint := run.get("model_fingerprint"):
        yield f"model {str(fingerprint)[:12]}"
    if split == TRAIN:
        yield "images of the training split: no measure of quality"


@dataclass(frozen=True)
class _Values:
    """The values of a column, a few thousand of them in memory at a time."""

    column: pa.ChunkedArray

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self.column), ROWS_AT_A_TIME):
            yield from self.column.slice(start, ROWS_AT_A_TIME).to_pylist()


def _text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(pa.string())


def _of_all(captions: pa.Table, wanted: pa.Table, location: str, what: str) -> pa.Table:
    """The captions of the wanted images, in their order; DatasetError when one has none."""
    positions = pc.index_in(wanted["image_id"], value_set=captions["image_id"])
    if positions.null_count:
        first = pc.index(positions.is_null(), True).as_py()
        raise DatasetError(
            f"{location} has captions for {wanted.num_rows - positions.null_count:,} of the {wanted.num_rows:,} "
            f"{what}, {wanted['image_id'][first]} is missing: "
            "caption them all, or name the --split they are of; a score over a part cannot be compared"
        )
    return captions.take(positions)


def captioned_folder(location: str, references: CaptionedImages) -> str:
    """What stands before the name of an image in the data set, and not in the captions, where one of the data set's
    folders was captioned: `val/`; else ""."""
    captioned = str((read_run(location) or {}).get("input", ""))
    above = f"{references.location}/"
    return f"{captioned.removeprefix(above)}/" if captioned.startswith(above) else ""


def _match(location: str, captions: pa.Table, references: CaptionedImages) -> pa.Table:
    """The captions under the data set's image ids: with the folder before them that was captioned, where that is one of
    the data's; their own; or their file names, where one captioned image and one of the data set has that name."""
    ids, known = captions["image_id"], references.table["image_id"]
    if folder := captioned_folder(location, references):
        with_folder = pc.binary_join_element_wise(folder, ids, "")
        if pc.any(pc.is_in(with_folder, value_set=known)).as_py():
            return captions.set_column(0, "image_id", with_folder)
    if pc.any(pc.is_in(ids, value_set=known)).as_py():
        return captions
    names = _file_names(ids)
    of_one_image = pc.and_(
        pc.is_in(names, value_set=_distinct(names)), pc.is_in(names, value_set=_distinct(_file_names(known)))
    )
    return captions.set_column(0, "image_id", pc.if_else(of_one_image, names, ids))


def _file_names(ids: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.replace_substring_regex(ids, "(?s)^.*/", "")


def _distinct(names: pa.ChunkedArray) -> pa.Array:
    """The names that occur once."""
    counts = pc.value_counts(names)
    return counts.field("values").filter(pc.equal(counts.field("counts"), 1))


def _strangers(captions: pa.Table, references: CaptionedImages) -> pa.ChunkedArray:
    """Ids of captioned images that have no references."""
    is_known = pc.is_in(captions["image_id"], value_set=references.table["image_id"])
    return captions["image_id"].filter(pc.invert(is_known))


def _refuse_strangers(location: str, captions: pa.Table, references: CaptionedImages) -> None:
    """Raise DatasetError if a captioned image is not in the data set, not even without a caption."""
    others = _strangers(captions, references)
    is_there = pc.is_in(others, value_set=pa.array(sorted(references.without_captions), pa.string()))
    strangers = others.filter(pc.invert(is_there))
    if len(strangers):
        raise DatasetError(
            f"{location} does not match {references.location}: {len(strangers):,} of {captions.num_rows:,} captioned "
            f"images have no references there, the first is {strangers[0]}; --split leaves others than a split's aside"
        )


def _split_of(captions: pa.Table, references: CaptionedImages) -> str | None:
    """The split that all captioned images are of; None where they are of several."""
    is_captioned = pc.is_in(references.table["image_id"], value_set=captions["image_id"])
    found = set(references.table["split"].filter(is_captioned).unique().to_pylist())
    return found.pop() if len(found) == 1 and found <= set(SPLITS) else None
