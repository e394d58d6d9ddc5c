"""The rows of the two tables: the manifest, which lists the images to caption, and the captions."""

from __future__ import annotations

from typing import Final, TypedDict

import pyarrow as pa

SCHEMA_VERSION: Final = "4"

MANIFEST_SCHEMA: Final = pa.schema(
    [
        # Position of the image in the manifest: 0, 1, 2, ... Progress is kept by this number, because eight bytes an
        # image are affordable at 100 million images and strings are not.
        ("manifest_id", pa.int64()),
        ("image_id", pa.string()),
        ("image_path", pa.string()),  # "" if the bytes are in a table or a tar
        ("table_path", pa.string()),  # of the table or tar; "" if the image is a separate file
        ("row_group", pa.int32()),  # of the table; in a tar the number of the block, see `tar_images`; -1 for a file
        ("row", pa.int32()),  # within `row_group`; 0 in a tar; -1 for a file
        # Of the file, the table or the tar, to detect a changed image under an old name. -1 and 0 for objects of a
        # store that a table names, because asking for them would take a request for each image.
        ("size", pa.int64()),
        ("modified_ns", pa.int64()),
    ]
)


class ManifestEntry(TypedDict):
    """A row of `MANIFEST_SCHEMA` before it has a number."""

    image_id: str
    image_path: str
    table_path: str
    row_group: int
    row: int
    size: int
    modified_ns: int


class ManifestRow(ManifestEntry, total=False):
    """A row of `MANIFEST_SCHEMA`. Manifests of earlier versions have neither `size` nor `modified_ns`."""

    manifest_id: int
    sha256: str | None
    """Hash of the bytes that were captioned, if the row comes from a captions table; no column of the manifest."""


CAPTIONS_SCHEMA: Final = pa.schema(
    [
        ("image_id", pa.string()),
        ("image_path", pa.string()),
        ("caption", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("confidence", pa.float32()),
        ("familiarity", pa.float32()),
        ("logprob", pa.float32()),
        ("num_tokens", pa.int16()),
        ("status", pa.string()),
        ("error_code", pa.string()),
        ("error_message", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("format", pa.string()),
        ("sha256", pa.string()),
        ("duplicate_of", pa.string()),
        ("caption_source", pa.string()),  # MODEL or EXISTING; "" without a caption
    ]
)

LATER_COLUMNS: Final = ("familiarity", "caption_source")
"""Columns that outputs of earlier versions lack."""

MODEL: Final = "model"

EXISTING: Final = "existing"
"""Source of a caption that the run did not make, see `CaptioningConfig.existing`."""


def _without(*names: str) -> pa.Schema:
    return pa.schema([field for field in CAPTIONS_SCHEMA if field.name not in names])


CAPTIONS_SCHEMAS: Final = {
    SCHEMA_VERSION: CAPTIONS_SCHEMA,
    "3": _without("caption_source"),
    "2": _without("caption_source", "familiarity"),
}
"""Schemas of runs that can be resumed, by version. A run keeps its schema: all parts must have the same columns."""


class CaptionRow(TypedDict):
    """A row of `CAPTIONS_SCHEMA`. Confidence, familiarity and logprob are NaN without a caption, None in exports.

    The familiarity is also unknown if the model cannot tell.
    """

    image_id: str
    image_path: str
    caption: str
    captions: list[str]
    confidence: float | None
    familiarity: float | None
    logprob: float | None
    num_tokens: int
    status: str
    error_code: str
    error_message: str
    width: int
    height: int
    format: str
    sha256: str
    duplicate_of: str
    caption_source: str


UNFAMILIAR: Final = 0.05
"""An image of less familiarity is unlike what the model has learned from, and its caption is a guess."""

OK: Final = "ok"

FAILED: Final = "failed"

DUPLICATE: Final = "duplicate"
