"""A captions table and a data set's references -> scores.

Texts stay in Arrow tables; only a few thousand at a time become Python strings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from imcap_ray.config import AUTO
from imcap_ray.data.datasets import TEST, TRAIN, CaptionedImages
from imcap_ray.data.schemas import EXISTING
from imcap_ray.errors import DatasetError
from imcap_ray.runs.captions_table import open_captions, read_run
from imcap_ray.scoring.evaluation_report import EvaluationReport, evaluate_texts
from imcap_ray.text.tokenizers import choose_tokenizer

ROWS_PER_SLICE: Final = 10_000

ALL_SPLITS: Final = "all"

RANKINGS: Final = ("confidence", "familiarity")
"""Columns that captions can be ranked by."""

FEW_IMAGES: Final = 100
"""Below this number of images a remark says how little CIDEr-D means."""


def read_captions(location: str) -> pa.Table:
    """Read image_id, caption, confidence, familiarity and is_existing of a captions table (folder or Parquet file).

    The caption is "" for an image without one, and confidence and familiarity are null or NaN if they are unknown.
    `is_existing` is whether the caption is not the model's, see `CaptioningConfig.existing`.

    Raises:
        DatasetError: an id occurs more than once, or a column has the wrong type.
    """
    dataset = open_captions(location)
    columns = ["image_id", "caption", "caption_source", *RANKINGS]
    try:
        table = dataset.to_table(columns=[name for name in columns if name in dataset.schema.names])
        num_rows = table.num_rows
        unknown = pa.chunked_array([pa.nulls(num_rows, pa.float64())])
        captions = pa.table(
            {
                "image_id": _text(table["image_id"]),
                "caption": pc.fill_null(_text(table["caption"]), ""),
                **{
                    name: table[name].cast(pa.float64()) if name in table.column_names else unknown for name in RANKINGS
                },
                "is_existing": pc.fill_null(pc.equal(table["caption_source"], EXISTING), False)
                if "caption_source" in table.column_names
                else pa.chunked_array([pa.repeat(False, num_rows)]),
            }
        )
        captions.validate(full=True)  # Parquet's readers do not check that text is UTF-8
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

    Images are matched by id, with the folder's name in front if one of the data set's folders was captioned. If no id
    matches, they are matched by file name, as long as the name is unique in both tables. Captions of images that have
    no references in the data set are ignored, and the notes count them.

    Images whose caption existed before are not scored, in neither table; the notes count them.

    With a split, captions of other images are ignored too. Without one, every image that has a caption must be in the
    data set, and the captions must cover one split or all images. If they cover the official test split and others, the
    test split is scored.

    Args:
        split: a split, or `ALL_SPLITS`.
        tokenizer: a name in `TOKENIZERS`, or `auto`: the one for the language of the references.
        against: another captions table of the same images, to compare with.

    Raises:
        DatasetError: the captions are of other images, or some images of the split have no caption.
    """
    captions = match_ids(location, read_captions(location), references)
    is_chosen = split is None
    split = _resolve_split(split, location, captions, references)
    num_without_references = _ids_without_references(captions, references).length()
    images = references.split(split) if split else references.table
    num_images = images.num_rows
    images = _without_existing(images, captions, location)
    if against is not None:
        other_captions = match_ids(against, read_captions(against), references)
        images = _without_existing(images, other_captions, against)
    counts = _count_captioned(captions, references)
    if tokenizer == AUTO:
        tokenizer, _ = choose_tokenizer(text for texts in _Values(images["captions"]) for text in texts)
    captions = _select(captions, images, location, f"{split or 'captioned'} images of {references.location}")
    other = None
    if against is not None:
        others = _select(other_captions, images, against, f"images that {location} is scored on")
        other = (against, _Values(others["caption"]))
    rankings = {name: captions[name].to_numpy() for name in RANKINGS}  # nan where unknown
    pa.default_memory_pool().release_unused()  # return the memory that reading took
    return evaluate_texts(
        _Values(captions["caption"]),
        _Values(images["captions"]),
        image_ids=images["image_id"].to_pylist(),
        split=split or "",
        tokenizer=tokenizer,
        notes="; ".join(
            [
                *_notes(location, num_without_references, num_images - images.num_rows),
                *_warnings(split, counts, is_chosen=is_chosen, is_official=references.has_official_splits),
                *_remark_on_few(images.num_rows),
                *([] if against is None else _speeds(location, against)),
            ]
        ),
        rankings=rankings,
        against=other,
    )


def _resolve_split(split: str | None, location: str, captions: pa.Table, references: CaptionedImages) -> str | None:
    """The split to score, None for all images: the one that was named, or the one that the captions cover."""
    if split is None:
        _refuse_unknown_images(location, captions, references)
        return _find_split(captions, references)
    return None if split == ALL_SPLITS else split


def _notes(location: str, num_without_references: int, num_existing: int) -> Iterator[str]:
    """Yield facts that the scores depend on: the search, the model and the images."""
    if num_without_references:
        verb = "has" if num_without_references == 1 else "have"
        yield f"{num_without_references:,} captioned image{'s' * (verb == 'have')} {verb} no references"
    if num_existing:
        images = "1 image whose caption is" if num_existing == 1 else f"{num_existing:,} images whose captions are"
        yield f"without {images} not the model's but existed before"
    run = read_run(location) or {}
    if isinstance(search := run.get("search"), dict) and "beam_size" in search:
        yield f"beam {search.get('beam_size')}, length penalty {search.get('length_penalty')}"
    if fingerprint := run.get("model_fingerprint"):
        yield f"model {str(fingerprint)[:12]}"


def _speeds(*locations: str) -> Iterator[str]:
    """Yield how fast each of these captions was made, if all are of runs that were long enough to know that."""
    speeds = [(read_run(location) or {}).get("images_per_second") for location in locations]
    if all(isinstance(speed, int | float) for speed in speeds):
        for location, speed in zip(locations, speeds, strict=True):
            yield f"{location} was captioned at {speed:.1f} images/s"


def _warnings(split: str | None, counts: Mapping[str, int], *, is_chosen: bool, is_official: bool) -> Iterator[str]:
    """Yield the reasons why the scores may mislead.

    Args:
        counts: number of captioned images by split.
        is_chosen: whether the split was chosen here, and not by the user.
        is_official: whether the data name the splits.
    """
    training = f"{counts.get(TRAIN, 0):,} of {sum(counts.values()):,} are training images"
    if is_chosen and split and len(counts) > 1:
        yield f"of the captioned images, {training}; only the {split} split is scored, see --split"
    elif split == TRAIN:
        yield "images of the training split, so the scores are no measure of quality"
    elif split is None and TRAIN in counts and is_official:
        yield f"{training}, so the scores are no measure of quality"
    elif split is None and TRAIN in counts:
        yield f"{training} of a model that was trained on these data; --split test leaves them out"


def _remark_on_few(num_images: int) -> Iterator[str]:
    if num_images < FEW_IMAGES:
        yield f"CIDEr-D of {num_images:,} images depends much on which they are, because they determine its weights"


def refuse_swapped(captions: str, references: str) -> None:
    """Raise DatasetError if the references are an output of `imcap caption`, and the captions are not."""
    if read_run(references) is not None and read_run(captions) is None:
        raise DatasetError(
            f"{references} holds captions by imcap, not references: the order is CAPTIONS REFERENCES, "
            f"imcap evaluate {references} {captions}"
        )


@dataclass(frozen=True)
class _Values:
    """Iterates over a column with only a few thousand values in memory at a time."""

    column: pa.ChunkedArray

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self.column), ROWS_PER_SLICE):
            yield from self.column.slice(start, ROWS_PER_SLICE).to_pylist()


def _text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(pa.string())


def _without_existing(images: pa.Table, captions: pa.Table, location: str) -> pa.Table:
    """The images whose captions did not exist before the run; DatasetError if there are none."""
    existing = captions["image_id"].filter(captions["is_existing"])
    images = images.filter(pc.invert(pc.is_in(images["image_id"], value_set=existing)))
    if not images.num_rows:
        raise DatasetError(
            f"{location} has no caption by a model to score: all captions of these images existed before (--existing)"
        )
    return images


def _select(captions: pa.Table, images: pa.Table, location: str, description: str) -> pa.Table:
    """The captions of these images, in their order; DatasetError if one has none."""
    positions = pc.index_in(images["image_id"], value_set=captions["image_id"])
    if positions.null_count:
        first = pc.index(positions.is_null(), True).as_py()
        raise DatasetError(
            f"{location} has captions for {images.num_rows - positions.null_count:,} of the {images.num_rows:,} "
            f"{description}, {images['image_id'][first]} is missing: caption all of them, or name their --split; "
            "a score over some of the images cannot be compared"
        )
    return captions.take(positions)


def captioned_folder(location: str, references: CaptionedImages) -> str:
    """The captioned folder's path within the data set, such as `val/`; "" if no folder inside it was captioned.

    The data set's image ids begin with this path, and those of the captions do not.
    """
    captioned = str((read_run(location) or {}).get("input", ""))
    parent = f"{references.location}/"
    return f"{captioned.removeprefix(parent)}/" if captioned.startswith(parent) else ""


def match_ids(location: str, captions: pa.Table, references: CaptionedImages) -> pa.Table:
    """Give the captions the data set's image ids, see `evaluate_captions`."""
    ids, known = captions["image_id"], references.table["image_id"]
    if folder := captioned_folder(location, references):
        with_folder = pc.binary_join_element_wise(folder, ids, "")
        if pc.any(pc.is_in(with_folder, value_set=known)).as_py():
            return captions.set_column(0, "image_id", with_folder)
    if pc.any(pc.is_in(ids, value_set=known)).as_py():
        return captions
    names = _file_names(ids)
    is_unique = pc.and_(
        pc.is_in(names, value_set=_find_unique(names)), pc.is_in(names, value_set=_find_unique(_file_names(known)))
    )
    return captions.set_column(0, "image_id", pc.if_else(is_unique, names, ids))


def _file_names(ids: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.replace_substring_regex(ids, "(?s)^.*/", "")


def _find_unique(names: pa.ChunkedArray) -> pa.Array:
    """The names that occur exactly once."""
    counts = pc.value_counts(names)
    return counts.field("values").filter(pc.equal(counts.field("counts"), 1))


def _ids_without_references(captions: pa.Table, references: CaptionedImages) -> pa.ChunkedArray:
    """Ids of captioned images that have no references."""
    is_known = pc.is_in(captions["image_id"], value_set=references.table["image_id"])
    return captions["image_id"].filter(pc.invert(is_known))


def _refuse_unknown_images(location: str, captions: pa.Table, references: CaptionedImages) -> None:
    """Raise DatasetError if an image that has a caption is not in the data set, not even without references."""
    ids = _ids_without_references(captions.filter(pc.not_equal(captions["caption"], "")), references)
    is_known = pc.is_in(ids, value_set=pa.array(sorted(references.without_captions), pa.string()))
    unknown = ids.filter(pc.invert(is_known))
    if len(unknown):
        raise DatasetError(
            f"{location} does not match {references.location}: {len(unknown):,} of {captions.num_rows:,} captioned "
            f"images have no references there, the first is {unknown[0]}; with --split, images outside the split are "
            "ignored"
        )


def _find_split(captions: pa.Table, references: CaptionedImages) -> str | None:
    """The split of all captioned images. If they are in several: the official test split, or None if it has none."""
    counts = _count_captioned(captions, references)
    if len(counts) == 1:
        return next(iter(counts))
    return TEST if TEST in counts and references.has_official_splits else None


def _count_captioned(captions: pa.Table, references: CaptionedImages) -> dict[str, int]:
    """Number of captioned images by split."""
    is_captioned = pc.is_in(references.table["image_id"], value_set=captions["image_id"])
    return replace(references, table=references.table.filter(is_captioned)).count_splits()
