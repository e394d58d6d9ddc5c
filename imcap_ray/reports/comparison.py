"""Captions of the same images by two captioners -> which words differ, and which images only one has captioned."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Final, NamedTuple

import pyarrow.dataset as ds

from imcap_ray.data.schemas import FAILED
from imcap_ray.reports.summary import file_name, known
from imcap_ray.text.tokenizers import SCRIPTS_WITHOUT_SPACES

_WORD: Final = re.compile(rf"[{SCRIPTS_WITHOUT_SPACES}]|[^\s{SCRIPTS_WITHOUT_SPACES}]+")
"""A word with its punctuation; a single character of scripts without spaces."""

_SIGNS: Final = string.punctuation + "\u3001\u3002\uff0c\uff0e\u060c\u061f\u0964"
"""Punctuation that does not make a word another one."""


class OneCaption(NamedTuple):
    """A captioner's best caption of an image."""

    text: str
    confidence: float | None = None


class Part(NamedTuple):
    """A part of a caption, with the spaces around and between its words."""

    text: str
    differs: bool
    """Whether these words are not in the other caption, or at another position."""


class ComparedCaption(NamedTuple):
    """A caption, and the other captioner's, with the words marked that differ."""

    parts: Sequence[Part]
    other_parts: Sequence[Part]
    other_confidence: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The captions of another captioner, to be shown next to the captions of a report."""

    name: str
    """Of the captioner whose captions the report is about."""
    other_name: str
    others: Mapping[str, OneCaption]
    """The other captions by the image_id of the report."""
    differences: Mapping[str, float]
    """From 0, the same words, to 1, no word in common: by image_id, for images that both have captioned."""
    only_own: Sequence[str]
    """Images that only the report's captioner has captioned."""
    only_other: Sequence[str]
    """Images that only the other captioner has captioned."""

    @property
    def num_different(self) -> int:
        """Number of images whose captions have different words."""
        return sum(difference > 0 for difference in self.differences.values())

    def of(self, image_id: str, caption: str) -> ComparedCaption | None:
        """The image's caption, "" if it failed, next to the other one; None if there is no other."""
        other = self.others.get(image_id)
        if not other:
            return None
        parts = mark_differences(caption, other.text) if caption else ([], [Part(other.text, False)])
        return ComparedCaption(*parts, other.confidence)


def compare_captions(captions: ds.Dataset, others: ds.Dataset, *, name: str, other_name: str) -> Comparison:
    """Compare two captions tables. Images are matched by id, or by a file name that is unique in both tables."""
    own, other = _read(captions), _read(others)
    names, other_names = Counter(map(file_name, own)), Counter(map(file_name, other))
    by_name = {file_name(image_id): image_id for image_id in other}
    pairs = {}
    for image_id in own:
        image_name = file_name(image_id)
        if image_id in other:
            pairs[image_id] = image_id
        elif names[image_name] == other_names[image_name] == 1:
            pairs[image_id] = by_name[image_name]
    differences, both = {}, set()
    for image_id, other_id in pairs.items():
        if (caption := own[image_id]) and (other_caption := other[other_id]):
            differences[image_id] = measure_difference(caption.text, other_caption.text)
            both.add(other_id)
    return Comparison(
        name=name,
        other_name=other_name,
        others={image_id: caption for image_id, other_id in pairs.items() if (caption := other[other_id])},
        differences=differences,
        only_own=sorted(image_id for image_id, caption in own.items() if caption and image_id not in differences),
        only_other=sorted(image_id for image_id, caption in other.items() if caption and image_id not in both),
    )


def _read(captions: ds.Dataset) -> dict[str, OneCaption | None]:
    """The caption of each image; None for failed images. Only image_id and caption need to be columns."""
    columns = [name for name in ("image_id", "caption", "status", "confidence") if name in captions.schema.names]
    return {
        row["image_id"]: OneCaption(row["caption"], known(row.get("confidence")))
        if row["caption"] and row.get("status") != FAILED
        else None
        for batch in captions.to_batches(columns=columns)
        for row in batch.to_pylist()
    }


def measure_difference(caption: str, other: str) -> float:
    """From 0, the same words, to 1, no word in common."""
    return 1 - SequenceMatcher(None, _keys(caption), _keys(other), autojunk=False).ratio()


def mark_differences(caption: str, other: str) -> tuple[list[Part], list[Part]]:
    """Both captions in parts, which are joined to the caption again."""
    blocks = SequenceMatcher(None, _keys(caption), _keys(other), autojunk=False).get_matching_blocks()
    common = {block.a + i for block in blocks for i in range(block.size)}
    other_common = {block.b + i for block in blocks for i in range(block.size)}
    return list(_parts(caption, common)), list(_parts(other, other_common))


def _parts(caption: str, common: set[int]) -> Iterator[Part]:
    """Words next to each other are one part if they are alike; the spaces between two parts are not marked."""
    start = end = 0
    differs = False
    for number, word in enumerate(_WORD.finditer(caption)):
        if differs != (number not in common):
            boundary = word.start() if not differs else end
            if boundary > start:
                yield Part(caption[start:boundary], differs)
            start, differs = boundary, not differs
        end = word.end()
    boundary = end if differs else len(caption)
    yield Part(caption[start:boundary], differs)
    if boundary < len(caption):
        yield Part(caption[boundary:], False)


def _keys(caption: str) -> list[str]:
    """The words as they are compared: in lower case, without punctuation around them."""
    return [word.casefold().strip(_SIGNS) or word for word in _WORD.findall(caption)]
