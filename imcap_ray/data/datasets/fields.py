"""Records of an image and its captions, as people name their fields -> captioned images."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from imcap_ray.data.datasets.dataset import Collector

IMAGE_FIELDS: Final = ("file_name", "filename", "image_path", "file_path", "filepath", "path", "image_name", "image")

ID_FIELDS: Final = ("image_id", "id")

CAPTION_FIELDS: Final = ("captions", "caption", "text", "comment", "raw")

_NUMBERED_CAPTION: Final = re.compile(r"caption_?\d+")

SPLIT_FIELD: Final = "split"


def add_record(
    collector: Collector, record: Any, *, where: str, place: Callable[[str], tuple[str, str | None, str]]
) -> None:
    """Add what one record says; one without an image or a caption is counted.

    Args:
        place: the record's name of the image -> its id, its location (None: below the image folder), and the split
            that the place tells.
    """
    fields = {str(key).strip().lower(): value for key, value in record.items()} if isinstance(record, Mapping) else {}
    name = _first_text(fields, IMAGE_FIELDS)
    number = _first_text(fields, ID_FIELDS)
    captions = captions_in(fields)
    if not (name or number) or not captions:
        collector.odd("record has no image or no caption", "records have no image or no caption", where)
        return
    image_id, path, split = place(name) if name else (number, "", "")
    own_split = fields.get(SPLIT_FIELD)
    collector.add(image_id, captions, where=where, path=path, split=own_split if isinstance(own_split, str) else split)


def has_caption_field(names: Any) -> bool:
    """Whether one of these names is that of a field of captions."""
    return any(is_caption_field(str(name)) for name in names)


def is_caption_field(name: str) -> bool:
    """Whether this is the name of a field of captions."""
    return name.strip().lower() in CAPTION_FIELDS or _is_numbered_caption(name)


def captions_in(fields: Mapping[str, Any]) -> list[str]:
    """The captions of a record, in whatever field and form: a text, a list, a list written as JSON, `caption_0`, ..."""
    for name in CAPTION_FIELDS:
        if found := _texts(fields.get(name)):
            return found
    return [text for name, value in fields.items() if _is_numbered_caption(name) for text in _texts(value)]


def _is_numbered_caption(name: str) -> bool:
    return _NUMBERED_CAPTION.fullmatch(name.strip().lower()) is not None


def _texts(value: Any) -> list[str]:
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


def _first_text(fields: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """The first of these fields that holds a text or a whole number."""
    values = (fields.get(name) for name in names)
    return next((str(value) for value in values if type(value) in (str, int) and value != ""), "")
