"""Rows of captions -> a text file next to each image."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Literal

from imcap_ray import storage
from imcap_ray.data.image_formats import IMAGE_EXTENSIONS
from imcap_ray.data.schemas import CaptionRow
from imcap_ray.errors import InputError
from imcap_ray.exports.captions_rows import READ_THREADS, ROWS_PER_REPORT

Existing = Literal["skip", "overwrite", "append"]
"""What happens to a sidecar that exists."""


def sidecar_name(image_id: str) -> str:
    """The path of an image's sidecar below the output.

    Raises:
        InputError: the id points out of the output, or is not a path.
    """
    if any(step in ("", ".", "..") for step in image_id.split("/")) or "\0" in image_id:
        raise InputError(
            f"the image id {image_id!r} is not a path below OUT, where its sidecar would be: export jsonl, csv, "
            "coco, hf or webdataset"
        )
    return f"{without_extension(image_id)}.txt"


def without_extension(image_id: str) -> str:
    """The id without its image extension, if it has one."""
    stem, extension = posixpath.splitext(image_id)
    return stem if extension[1:].lower() in IMAGE_EXTENSIONS else image_id


def write_sidecars(rows: Iterator[CaptionRow], output: str, *, existing: Existing) -> int:
    """Write a sidecar for each row; the number of files that were written or appended to."""
    number = 0

    def write(row: CaptionRow) -> bool:
        path = storage.join(output, sidecar_name(row["image_id"]))
        return _write_sidecar(path, " ".join(row["caption"].splitlines()), existing=existing)

    with ThreadPoolExecutor(READ_THREADS) as threads:  # because disks and stores have latency
        while chunk := list(islice(rows, ROWS_PER_REPORT)):
            number += sum(threads.map(write, chunk))
    return number


def _write_sidecar(path: str, caption: str, *, existing: Existing) -> bool:
    line = caption.encode() + b"\n"
    if existing != "overwrite" and (storage.exists(path) or os.path.islink(path)):
        if existing == "skip" or not storage.exists(path):  # a link to a share that is not available now
            return False
        content = storage.read_bytes(path)
        try:
            lines = content.decode("utf-8-sig").splitlines()
        except UnicodeDecodeError:  # nothing can be appended to text in another encoding
            return False
        if caption in lines or b"\0" in content:  # UTF-16, with or without a byte order mark
            return False
        line = content + (b"\n" if content and not content.endswith(b"\n") else b"") + line
    storage.write_bytes(path, line)
    return True
