"""Usual names of the fields of captioned images. Imports nothing, so that `--help` can list them at once."""

from __future__ import annotations

from typing import Final

IMAGE_FIELDS: Final = ("file_name", "filename", "image_path", "file_path", "filepath", "path", "image_name", "image")

ID_FIELDS: Final = ("image_id", "id")

CAPTION_FIELDS: Final = ("captions", "caption", "text", "comment", "raw")

SPLIT_FIELD: Final = "split"

# In CSV and TSV only, and only if there is no column of the names above: in other data these often hold something else.
TABLE_IMAGE_FIELDS: Final[tuple[str, ...]] = (
    "img",
    "img_path",
    "img_name",
    "image_file",
    "image_file_name",
    "file",
    "photo",
    "picture",
    "image_url",
    "url",
)

TABLE_CAPTION_FIELDS: Final[tuple[str, ...]] = (
    "caption_text",
    "image_caption",
    "description",
    "sentence",
    "title",
    "label",
)

IMAGE_NAMES: Final = ", ".join((*IMAGE_FIELDS, *TABLE_IMAGE_FIELDS))
"""For people, the names of a CSV's column of images."""

CAPTION_NAMES: Final = ", ".join((*CAPTION_FIELDS, *TABLE_CAPTION_FIELDS))
"""For people, the names of a CSV's column of captions."""
