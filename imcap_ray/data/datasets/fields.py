"""Records of an image and its captions, with fields of any usual name -> captioned images."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, TypeAlias

from imcap_ray.data.columns import ColumnOptions
from imcap_ray.data.datasets.dataset import Collector
from imcap_ray.data.field_names import (
    CAPTION_FIELDS,
    ID_FIELDS,
    IMAGE_FIELDS,
    SPLIT_FIELD,
    TABLE_CAPTION_FIELDS,
    TABLE_IMAGE_FIELDS,
)

_NUMBERED_CAPTION: Final = re.compile(r"caption_?\d+")

Record: TypeAlias = Mapping[str, object]
"""An image and its captions as a file describes them; neither fields nor values are known to be valid."""


def add_record(
    collector: Collector, record: object, *, where: str, locate: Callable[[str], tuple[str, str | None, str]]
) -> None:
    """Add the image of a record with its captions. A record without an image or a caption is counted.

    Args:
        where: position of the record, for people.
        locate: the record's name of the image -> its id, its location (None: in the image folder), and the split that
            the location implies.
    """
    fields: Record = (
        {str(key).strip().lower(): value for key, value in record.items()} if isinstance(record, Mapping) else {}
    )
    name = _first_text(fields, IMAGE_FIELDS)
    number = _first_text(fields, ID_FIELDS)
    captions = captions_in(fields)
    if not (name or number) or not captions:
        collector.add_problem("record has no image or no caption", "records have no image or no caption", where)
        return
    image_id, path, split = locate(name) if name else (number, "", "")
    own_split = fields.get(SPLIT_FIELD)
    collector.add(image_id, captions, where=where, path=path, split=own_split if isinstance(own_split, str) else split)


def fields_of_columns(names: Sequence[str], columns: ColumnOptions) -> list[str]:
    """The field that each column of a text table holds, by the column's name without case, spaces and punctuation.

    A usual column is "" if the user names another one for the same purpose.
    """
    usual = {_letters(name): name for name in (*IMAGE_FIELDS, *ID_FIELDS, *CAPTION_FIELDS, SPLIT_FIELD)}
    letters = [_letters(name) for name in names]
    fields = [usual.get(name, name) for name in letters]
    for field, named, is_usual, others in (
        ("image", columns.image, is_image_field, TABLE_IMAGE_FIELDS),
        ("caption", columns.caption, is_caption_field, TABLE_CAPTION_FIELDS),
    ):
        if named is not None:
            fields, others = ["" if is_usual(name) else name for name in fields], (named,)
        elif any(map(is_usual, fields)):
            continue
        number = next((letters.index(name) for name in map(_letters, others) if name in letters), None)
        if number is not None:
            fields[number] = field
    return fields


def _letters(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).lower()


def is_image_field(name: str) -> bool:
    """Whether a field holds the name of an image, by the field's name."""
    return name.strip().lower() in IMAGE_FIELDS


def has_caption_field(names: Iterable[object]) -> bool:
    """Whether one of these fields holds captions, by its name."""
    return any(is_caption_field(str(name)) for name in names)


def is_caption_field(name: str) -> bool:
    """Whether a field holds captions, by its name."""
    return name.strip().lower() in CAPTION_FIELDS or _is_numbered_caption(name)


def captions_in(fields: Record) -> list[str]:
    """The captions of a record, in any usual field: a text, a list, a list written as JSON, `caption_0`, ..."""
    for name in CAPTION_FIELDS:
        if captions := _texts(fields.get(name)):
            return captions
    return [text for name, value in fields.items() if _is_numbered_caption(name) for text in _texts(value)]


def _is_numbered_caption(name: str) -> bool:
    return _NUMBERED_CAPTION.fullmatch(name.strip().lower()) is not None


def _texts(value: object) -> list[str]:
    if isinstance(value, str):
        if value.startswith("["):
            try:
                listed = json.loads(value)
            except (ValueError, RecursionError):
                return [value]
            return _texts(listed) or [value]
        return [value] if value else []
    if isinstance(value, list):
        return [item for item in value if isinstance(item, str)]
    return []


def _first_text(fields: Record, names: tuple[str, ...]) -> str:
    """The value of the first of these fields that holds a text or a whole number."""
    values = (fields.get(name) for name in names)
    return next((str(value) for value in values if type(value) in (str, int) and value != ""), "")
