"""Rows of a captions table -> the bytes of their images."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import Any

import pyarrow.dataset as pads

from imcap_ray import storage
from imcap_ray.data.image_reading import (
    IMAGES_PER_READ,
    REACHABILITY_INTERVAL_SECONDS,
    READ_THREADS,
    read_file,
    read_rows,
    require_reachable,
)
from imcap_ray.data.manifest import read_image_columns
from imcap_ray.data.schemas import MANIFEST_SCHEMA, ManifestRow
from imcap_ray.errors import ImageError
from imcap_ray.runs.captions_table import folder_of, image_locator, read_run


class CaptionedImageSource:
    """The images of a captions table: files where `image_locator` allows them, and rows of the tables and tars in the
    run's own manifest.

    Args:
        captions: a captions folder, or a Parquet file of it.
        folders, allow_outside_paths: see `image_locator`.
    """

    def __init__(self, captions: str, *, folders: Sequence[str] = (), allow_outside_paths: bool = False) -> None:
        self._locate = image_locator(captions, folders=folders, allow_outside_paths=allow_outside_paths)
        self._manifest = storage.join(folder_of(captions), "_imcap", "manifest")
        self._input = str((read_run(captions) or {}).get("input", ""))
        self._reachable_until: dict[str, float] = {}
        """The time until which each store counts as reachable."""
        self._not_probed: dict[str, tuple[str, ImageError]] = {}
        """The last image of each store that could not be read while the store counted as reachable."""

    def find(self, rows: Sequence[Mapping[str, Any]]) -> list[ManifestRow | None]:
        """Locate the image of each row of captions by its `image_id` and `image_path`.

        The result has no `manifest_id`, and for a file no size and time. It is None if the bytes were in a table that
        no manifest lists any more.

        Raises:
            InputError: a path leads outside the folders that are allowed.
        """
        packed = self._find_packed([row["image_id"] for row in rows if not row["image_path"]])
        return [
            _file_row(row["image_id"], self._locate(row, row["image_path"]))
            if row["image_path"]
            else packed.get(row["image_id"])
            for row in rows
        ]

    def _find_packed(self, image_ids: list[str]) -> dict[str, ManifestRow]:
        parts = storage.list_work_tables(self._manifest) if image_ids else []
        if not parts:
            return {}
        filesystem = storage.resolve(self._manifest)[0]
        manifest = pads.dataset([storage.resolve(part)[1] for part in parts], filesystem=filesystem, format="parquet")
        columns = [name for name in MANIFEST_SCHEMA.names[1:] if name in manifest.schema.names]
        rows = manifest.to_table(columns=columns, filter=pads.field("image_id").isin(image_ids)).to_pylist()
        for row in rows:
            self._locate(row, row["table_path"])
        return {row["image_id"]: row for row in rows if row["table_path"]}

    @cached_property
    def _image_columns(self) -> list[str]:
        return read_image_columns(self._manifest)

    def _read_packed(self, places: list[ManifestRow]) -> Iterator[tuple[ManifestRow, bytes | ImageError]]:
        return read_rows(places, None, image_columns=self._image_columns)

    def load(
        self, rows: Sequence[Mapping[str, Any]], places: Sequence[ManifestRow | None] | None = None
    ) -> Iterator[bytes | ImageError]:
        """The image bytes of each row in order, or an error. Only a few images are in memory at a time.

        Bytes that differ from those that were captioned, by the row's `sha256`, are an error with the code `changed`. A
        table or tar that was rewritten matters only to rows without `sha256`.

        Args:
            places: what `find` returned for these rows, if the caller has it.

        Raises:
            InputError: see `find`.
        """
        places = self.find(rows) if places is None else places
        with ThreadPoolExecutor(READ_THREADS) as threads:  # a disk, or a store, is waited for
            for start in range(0, len(rows), IMAGES_PER_READ):
                captioned = rows[start : start + IMAGES_PER_READ]
                chunk = places[start : start + IMAGES_PER_READ]
                packed: list[ManifestRow] = [
                    {**place, "sha256": row.get("sha256")}
                    for row, place in zip(captioned, chunk, strict=True)
                    if place and place["table_path"]
                ]
                from_tables = {place["image_id"]: data for place, data in self._read_packed(packed)}
                paths = [place["image_path"] for place in chunk if place and not place["table_path"]]
                from_files = iter(threads.map(partial(read_file, root=None), paths))
                for row, place in zip(captioned, chunk, strict=True):
                    if place is None:
                        yield ImageError("missing", "its bytes were in a table")
                    elif place["table_path"]:
                        yield _as_captioned(row, from_tables[place["image_id"]])
                    else:
                        yield _as_captioned(row, next(from_files))

    def require_reachable(self, location: str, error: ImageError) -> None:
        """Raise ImcapError if an image cannot be read because the store, or the disk of the run's input, is lost.

        A store that has just answered is not probed again, because that takes seconds with a store that throttles; see
        `require_still_reachable`.

        Args:
            location: location of the image, see `location_of`.
            error: why it could not be read.
        """
        if storage.is_uri(location):
            store = "/".join(location.split("/", 3)[:3])
            if time.monotonic() < self._reachable_until.get(store, 0.0):
                self._not_probed[store] = location, error
            else:
                self._probe(store, location, error)
        elif self._input and storage.is_inside(self._input, location):
            require_reachable(self._input, error)

    def require_still_reachable(self) -> None:
        """Probe stores that `require_reachable` did not probe after their last error. Raises ImcapError likewise."""
        for store, (location, error) in list(self._not_probed.items()):
            self._probe(store, location, error)

    def _probe(self, store: str, location: str, error: ImageError) -> None:
        require_reachable(location, error)
        self._not_probed.pop(store, None)
        self._reachable_until[store] = time.monotonic() + REACHABILITY_INTERVAL_SECONDS


def _file_row(image_id: str, path: str) -> ManifestRow:
    return {
        "image_id": image_id,
        "image_path": path,
        "table_path": "",
        "row_group": -1,
        "row": -1,
        "size": -1,
        "modified_ns": 0,
    }


def _as_captioned(row: Mapping[str, Any], data: bytes | ImageError) -> bytes | ImageError:
    """The data, or an error if other data were captioned. Rows without a hash, as in a table made by hand, pass."""
    expected = row.get("sha256")
    if expected and isinstance(data, bytes) and hashlib.sha256(data).hexdigest() != expected:
        return ImageError("changed", "changed since it was captioned")
    return data
