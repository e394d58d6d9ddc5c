"""Rows of captions -> a text file next to each image."""

from __future__ import annotations

import hashlib
import os
import posixpath
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Final, Literal

from imcap_ray import storage
from imcap_ray.data.image_formats import IMAGE_EXTENSIONS
from imcap_ray.data.schemas import CaptionRow
from imcap_ray.errors import InputError
from imcap_ray.exports.captions_rows import NAMED_IMAGES, READ_THREADS, ROWS_PER_REPORT, ExportSummary
from imcap_ray.exports.image_names import NAME_BYTES, ImageNames, shorten_name

Existing = Literal["skip", "overwrite", "append"]
"""What happens to a sidecar that exists."""


_EXTENSION: Final = ".txt"

_NUM_FORMS: Final = 3


def sidecar_name(image_id: str, form: int = 0) -> str:
    """The path of an image's sidecar below the output.

    Args:
        form: 0 `a.txt`, 1 `a.jpg.txt`, 2 `a.jpg-HASH.txt`.

    Raises:
        InputError: the id points out of the output, or is not a path.
    """
    if any(step in ("", ".", "..") for step in image_id.split("/")) or "\0" in image_id:
        raise InputError(
            f"the image id {image_id!r} is not a path below OUT, where its sidecar would be: export jsonl, csv, "
            "coco, hf or webdataset"
        )
    folder, slash, name = image_id.rpartition("/")
    if form == 0:
        name = without_extension(name)
    elif form == 2:
        name += f"-{hashlib.sha256(image_id.encode()).hexdigest()[:8]}"
    return folder + slash + shorten_name(name, NAME_BYTES - len(_EXTENSION)) + _EXTENSION


def portable_sidecar_name(image_id: str, form: int = 0) -> str:
    """The same for all names that are one file on a file system that ignores case and Unicode form (macOS, SMB)."""
    name = unicodedata.normalize("NFC", sidecar_name(image_id, form))
    return unicodedata.normalize("NFC", name.casefold())


class SidecarNames:
    """The names of the sidecars of all images: `a.txt`, or a longer form where images would have the same file.

    Args:
        names: all images, with their `portable_sidecar_name`s.
    """

    def __init__(self, names: ImageNames) -> None:
        self._longer = [names.rename_shared(partial(portable_sidecar_name, form=form)) for form in range(1, _NUM_FORMS)]

    def form(self, image_id: str) -> int:
        """The form of an image's name."""
        return next((form for form in range(_NUM_FORMS - 1, 0, -1) if image_id in self._longer[form - 1]), 0)


def without_extension(image_id: str) -> str:
    """The id without its image extension, if it has one."""
    stem, extension = posixpath.splitext(image_id)
    return stem if extension[1:].lower() in IMAGE_EXTENSIONS else image_id


def write_sidecars(
    rows: Iterator[CaptionRow], summary: ExportSummary, names: SidecarNames, *, existing: Existing
) -> None:
    """Write a sidecar for each row; count those that were written or appended to, kept, and named in a longer form."""

    def write(row: CaptionRow, name: str) -> bool:
        caption = " ".join(row["caption"].splitlines())
        return _write_sidecar(storage.join(summary.output, name), caption, existing=existing)

    with ThreadPoolExecutor(READ_THREADS) as threads:  # because disks and stores have latency
        while chunk := list(islice(rows, ROWS_PER_REPORT)):
            forms = [names.form(row["image_id"]) for row in chunk]
            paths = [sidecar_name(row["image_id"], form) for row, form in zip(chunk, forms, strict=True)]
            longer = [path for path, form in zip(paths, forms, strict=True) if form]
            summary.num_renamed += len(longer)
            summary.renamed += longer[: NAMED_IMAGES - len(summary.renamed)]
            num_written = sum(threads.map(write, chunk, paths))
            summary.num_exported += num_written
            summary.num_kept += len(chunk) - num_written


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
