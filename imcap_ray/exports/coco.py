"""Rows of captions -> COCO's annotations and results."""

from __future__ import annotations

import posixpath
import re
import shutil
from collections.abc import Iterator
from tempfile import TemporaryFile
from typing import Final

from imcap_ray import __version__, storage
from imcap_ray.data.schemas import CaptionRow
from imcap_ray.exports.captions_rows import file_name_of
from imcap_ray.exports.text import to_json_line

# Files of COCO itself: COCO_val2014_000000391895.jpg, 000000391895.jpg.
_COCO_NAME: Final = re.compile(r"(?:.*/)?(?:COCO_[a-z]+\d{4}_)?(\d{12})(?:\.jpg)?", re.DOTALL)


def coco_results_name(output: str) -> str:
    """The file of results next to the file of annotations."""
    stem, extension = posixpath.splitext(output)
    return f"{stem}_results{extension}" if extension == ".json" else f"{output}_results.json"


def write_coco(rows: Iterator[CaptionRow], output: str, *, keep_numbers: bool) -> None:
    """Write annotations for pycocotools' `COCO(file)`, and results for its `loadRes` next to them.

    Args:
        keep_numbers: whether to use COCO's numbers, which are in the names; otherwise images are numbered from 1.
    """
    about = {"description": f"captions exported by imcap_ray {__version__}"}
    with (
        storage.replacing(output) as dataset,
        storage.replacing(coco_results_name(output)) as results,
        TemporaryFile() as annotations,
    ):
        # Without categories, because with them pycocotools expects one in each annotation.
        dataset.write(b'{"info": ' + to_json_line(about) + b', "licenses": [], "images": [')
        results.write(b"[")
        for number, row in enumerate(rows, start=1):
            coco_id = int(coco_number(row["image_id"])) if keep_numbers else number
            image = {"id": coco_id, "file_name": file_name_of(row), "width": row["width"], "height": row["height"]}
            result = {"image_id": coco_id, "caption": row["caption"]}
            comma = b",\n" if number > 1 else b"\n"
            dataset.write(comma + to_json_line(image))
            annotations.write(comma + to_json_line({"id": number, **result, "confidence": row["confidence"]}))
            results.write(comma + to_json_line(result))
        dataset.write(b'\n], "annotations": [')
        annotations.seek(0)
        shutil.copyfileobj(annotations, dataset)
        dataset.write(b"\n]}\n")
        results.write(b"\n]\n")


def coco_number(image_id: str) -> str:
    """The number in the name of an image of COCO; "" for other images."""
    match = _COCO_NAME.fullmatch(image_id)
    return match[1] if match else ""
