"""Rows of a captions table, and a way to load their images -> the cards and attention maps of a page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, NamedTuple

import numpy as np

from imcap_ray.data.schemas import EXISTING, FAILED, OK, UNFAMILIAR
from imcap_ray.errors import ImageError, ImcapError
from imcap_ray.reports.comparison import ComparedCaption, Comparison
from imcap_ray.reports.pictures import Thumbnail, heat_map_of, thumbnail_of
from imcap_ray.reports.summary import clip_message, known

CHANGED: Final = "changed since it was captioned"
"""Shown in place of an image whose bytes are not those that were captioned."""

_THUMBNAILS_AT_A_TIME: Final = 64

_MOST_WORDS_ATTENDED: Final = 40

Row = dict[str, Any]
"""A row of `CAPTIONS_SCHEMA`."""

LoadImages = Callable[[Sequence[Row]], Iterator[bytes | ImageError]]

Attend = Callable[[bytes, str], Sequence[tuple[str, np.ndarray[Any, Any]]]]
"""An image and its caption -> for each word the weights (rows, columns) over the image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What a page shows of one image."""

    image_id: str
    status: str
    caption: str
    other_captions: Sequence[str]
    confidence: float | None
    familiarity: float | None
    score: float | None
    references: Sequence[str]
    compared: ComparedCaption | None
    """With the caption of another captioner, if there is one."""
    difference: float | None
    """See `Comparison`."""
    thumbnail: str | None
    """Data URI; None if there is no picture."""
    no_thumbnail: str
    """Why there is no picture."""
    duplicate_of: str
    error_code: str
    error_message: str
    width: int
    height: int
    format: str
    is_existing: bool
    """Whether the caption is not the model's."""

    @property
    def is_unfamiliar(self) -> bool:
        """Whether the image is known to be unlike the training images."""
        return self.familiarity is not None and self.familiarity < UNFAMILIAR


class WordMap(NamedTuple):
    """A word, and the data URI of its heat map."""

    word: str
    heat: str


class AttentionExample(NamedTuple):
    """An image, and where the model looked at each word of its caption."""

    image_id: str
    caption: str
    confidence: float | None
    thumbnail: Thumbnail
    words: Sequence[WordMap]


def make_cards(
    rows: Sequence[Row],
    *,
    load_images: LoadImages,
    references: Mapping[str, Sequence[str]],
    image_scores: Mapping[str, float],
    comparison: Comparison | None = None,
) -> Iterator[Card]:
    """Make a card of each row. Images of failed rows are not loaded."""
    images = load_images([row for row in rows if row["status"] != FAILED])
    for row, thumbnail, reason in _with_thumbnails(rows, images):
        yield Card(
            image_id=row["image_id"],
            status=row["status"],
            caption=row["caption"],
            other_captions=[caption for caption in row["captions"] or () if caption != row["caption"]],
            confidence=known(row["confidence"]),
            familiarity=known(row["familiarity"]),
            score=image_scores.get(row["image_id"]),
            references=references.get(row["image_id"], ()),
            compared=comparison.of(row["image_id"], row["caption"]) if comparison else None,
            difference=comparison.differences.get(row["image_id"]) if comparison else None,
            thumbnail=thumbnail,
            no_thumbnail=reason,
            duplicate_of=row["duplicate_of"] if reason != CHANGED else "",  # not the same file any more
            error_code=row["error_code"],
            error_message=clip_message(row["error_message"]),
            width=row["width"] or 0,
            height=row["height"] or 0,
            format=row["format"],
            is_existing=row["caption_source"] == EXISTING,
        )


def make_attention_examples(
    rows: Sequence[Row], count: int, *, load_images: LoadImages, attend: Attend | None
) -> tuple[list[AttentionExample], str]:
    """Examples from the least to the most confident caption, and why there are none although some were asked for."""
    candidates = [row for row in rows if row["status"] == OK and row["caption"] and row["caption_source"] != EXISTING]
    candidates.sort(key=lambda row: -1.0 if known(row["confidence"]) is None else row["confidence"])
    if attend is None or not count or not candidates:
        return [], ""
    chosen = [candidates[i] for i in np.unique(np.linspace(0, len(candidates) - 1, count).round().astype(int))]
    examples, reason = [], "none of the chosen photographs is available as it was captioned"
    for row, data in zip(chosen, load_images(chosen), strict=True):
        if isinstance(data, ImageError):
            continue
        try:
            weights = attend(data, row["caption"])[:_MOST_WORDS_ATTENDED]
            thumbnail = thumbnail_of(data)
        except ImageError:
            continue
        except ImcapError as error:
            reason = str(error)
            break
        words = [WordMap(word, heat_map_of(weights_of_word)) for word, weights_of_word in weights]
        confidence = known(row["confidence"])
        examples.append(AttentionExample(row["image_id"], row["caption"], confidence, thumbnail, words))
    return examples, "" if examples else reason


def _with_thumbnails(
    rows: Sequence[Row], images: Iterator[bytes | ImageError]
) -> Iterator[tuple[Row, str | None, str]]:
    """Each row with the data URI of its thumbnail, or with the reason why it has none.

    `images` has one item for each row that has not failed.
    """
    left = iter(rows)
    with ThreadPoolExecutor() as threads:  # Pillow releases the interpreter's lock
        while chunk := list(islice(left, _THUMBNAILS_AT_A_TIME)):
            data = [None if row["status"] == FAILED else next(images) for row in chunk]
            for row, (thumbnail, reason) in zip(chunk, threads.map(_try_thumbnail, data), strict=True):
                yield row, thumbnail, reason


def _try_thumbnail(data: bytes | ImageError | None) -> tuple[str | None, str]:
    if data is None:
        return None, ""
    try:
        if isinstance(data, ImageError):
            raise data
        return thumbnail_of(data).uri, ""
    except ImageError as error:
        return None, CHANGED if error.code == "changed" else "no picture"
