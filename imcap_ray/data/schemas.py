"""The Arrow schemas of a row in (the manifest) and a row out (the captions)."""

from __future__ import annotations

from typing import Final

import pyarrow as pa

SCHEMA_VERSION: Final = "2"

MANIFEST_SCHEMA: Final = pa.schema(
    [
        # Position of the image in the manifest: 0, 1, 2, ... Ray's progress is kept by this number,
        # for eight bytes an image are affordable at 100 million images and strings are not.
        ("manifest_id", pa.int64()),
        ("image_id", pa.string()),
        ("image_path", pa.string()),  # "" when the bytes are in a table or a tar
        ("table_path", pa.string()),  # of the table or tar; "" when the image is a file of its own
        ("row_group", pa.int32()),  # of the table; the block of a tar, see `archives`; -1 for a file
        ("row", pa.int32()),  # within `row_group`; 0 in a tar; -1 for a file
        # Of the file, the table or the tar: by these a changed image under an old name is known. -1 and 0 for what a
        # table names in a store, which would have to be asked for each image.
        ("size", pa.int64()),
        ("modified_ns", pa.int64()),
    ]
)

CAPTIONS_SCHEMA: Final = pa.schema(
    [
        ("image_id", pa.string()),
        ("image_path", pa.string()),
        ("caption", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("confidence", pa.float32()),
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
    ]
)

OK: Final = "ok"

FAILED: Final = "failed"

DUPLICATE: Final = "duplicate"
