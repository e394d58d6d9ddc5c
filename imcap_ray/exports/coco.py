"""Rows -> COCO's annotations and results."""

from __future__ import annotations

import posixpath
import re
import shutil
from collections.abc import Iterator
from tempfile import TemporaryFile
from typing import Final

from imcap_ray import __version__, storage
from imcap_ray.exports.captions_rows import Row, file_name_of
from imcap_ray.exports.text import to_json_line

# The files of COCO itself: COCO_val2014_000000391895.jpg, 000000391895.jpg.
_COCO_NAME: Final = re.compile(r"(?:.*/)?(?:COCO_[a-z]+\d{4}_)?(\d{12})(?:\.jpg)?", re.DOTALL)


def coco_results_name(output: str) -> str:
    """The file of results beside the file of annotations."""
    stem, extension = posixpath.splitext(output)
    return f"{stem}_results{extension}" if extension == ".json" else f"{output}_results.json"


def write_coco(rows: Iterator[Row], output: str, *, keep_numbers: bool) -> None:
    """The annotations that pycocotools' `COCO(file)` reads, and the results that its `loadRes` reads beside them.

    Args:
        keep_numbers: whether the names have COCO's numbers; else images are numbered from 1.
    """
    about = {"description": f"captions exported by imcap_ray {__version__}"}
    with (
        storage.replacing(output) as dataset,
        storage.replacing(coco_results_name(output)) as results,
        TemporaryFile() as annotations,
    ):
        # No categories: with them pycocotools asks each annotation for its own.
        dataset.write(b'{"info": ' + to_json_line(about) + b', "licenses": [], "images": [')
        results.write(b"[")
        for number, row in enumerate(rows, start=1):
            coco_id = int(coco_number(row["image_id"])) if keep_numbers else number
            image = {"id": coco_id, "file_name": file_name_of(row), "width": row["width"], "height": row["height"]}
            answer = {"image_id": coco_id, "caption": row["caption"]}
            comma = b",\n" if number > 1 else b"\n"
            dataset.write(comma + to_json_line(image))
            annotations.write(comma + to_json_line({"id": number, **answer, "confidence": row["confidence"]}))
            results.write(comma + to_json_line(answer))
        dataset.write(b'\n], "annotations": [')
        annotations.seek(0)
        shutil.copyfileobj(annotations, dataset)
        dataset.write(b"\n]}\n")
        results.write(b"\n]\n")


def coco_number(image_id: str) -> str:
    """The number of an image of COCO; "" for other images."""
    found = _COCO_NAME.fullmatch(image_id)
    return found[1] if found else ""
