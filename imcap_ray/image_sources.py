"""Rows of a manifest, or of the captions made of it -> the bytes of their images, whether these are files or lie in
tables or tars."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final

import pyarrow as pa
import pyarrow.dataset as pads

from imcap_ray import archives, storage
from imcap_ray.errors import ImageError, ImcapError
from imcap_ray.images import MAX_FILE_BYTES, image_error_from_os_error
from imcap_ray.manifest import folder_of, image_placer, is_tar, read_run, read_table_images

Row = dict[str, Any]

_THREADS: Final = 16
_IMAGES_AT_A_TIME: Final = 64


def read_rows(rows: Iterable[Row], root: str | None) -> Iterator[tuple[Row, bytes | ImageError]]:
    """The bytes of each row of `MANIFEST_SCHEMA`, or why there are none; rows of tables and tars last.

    Args:
        root: where the images lie. None: whether that is gone is not asked.

    Raises:
        ImcapError: `root` is gone.
    """
    in_tables: dict[tuple[str, int], dict[int, Row]] = defaultdict(dict)
    in_tars: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in rows:
        if is_tar(row["table_path"]):
            in_tars[row["table_path"]][row["row_group"]] = row
        elif row["table_path"]:
            in_tables[row["table_path"], row["row_group"]][row["row"]] = row
        else:
            yield row, _read_file(row["image_path"], root)
    for (table_path, row_group), by_row in in_tables.items():
        found = read_table_images(table_path, row_group=row_group, rows=set(by_row))
        yield from _read_table(by_row, found, table_path, root)
    for tar_path, by_block in in_tars.items():
        yield from _read_table(
            by_block, archives.read_files(tar_path, sorted(by_block), max_bytes=MAX_FILE_BYTES), tar_path, root
        )


def root_of(rows: pa.Table) -> str:
    """Where the images of a manifest lie, as far as the first of them tells."""
    first = rows.slice(0, 1).to_pylist()[0]
    return first["table_path"] or storage.parent(first["image_path"])


class CaptionedImageSource:
    """The images of a captions table: files where `image_placer` lets them be, and rows of the tables and tars that
    the run's own manifest names.

    Args:
        captions: a captions folder, or a Parquet file of it.
        folders, allow_outside_paths: see `image_placer`.
    """

    def __init__(self, captions: str, *, folders: Sequence[str] = (), allow_outside_paths: bool = False) -> None:
        self._place = image_placer(captions, folders=folders, allow_outside_paths=allow_outside_paths)
        self._manifest = storage.join(folder_of(captions), "_imcap", "manifest")
        self._input = str((read_run(captions) or {}).get("input", ""))

    def find(self, rows: Sequence[Row]) -> list[Row | None]:
        """For each row of captions, by its `image_id` and `image_path`, where its image is: these and `table_path`,
        `row_group` and `row` as in `MANIFEST_SCHEMA`. None where the bytes were in a table that nothing names any more.

        Raises:
            InputError: a path leads where it may not.
        """
        packed = self._find_packed([row["image_id"] for row in rows if not row["image_path"]])
        return [
            {**row, "image_path": self._place(row, row["image_path"]), "table_path": ""}
            if row["image_path"]
            else packed.get(row["image_id"])
            for row in rows
        ]

    def _find_packed(self, image_ids: list[str]) -> dict[str, Row]:
        parts = storage.list_parquet(self._manifest) if image_ids else []
        if not parts:
            return {}
        columns = ["image_id", "image_path", "table_path", "row_group", "row"]
        filesystem = storage.resolve(self._manifest)[0]
        manifest = pads.dataset([storage.resolve(part)[1] for part in parts], filesystem=filesystem, format="parquet")
        found = manifest.to_table(columns=columns, filter=pads.field("image_id").isin(image_ids)).to_pylist()
        for row in found:
            self._place(row, row["table_path"])
        return {row["image_id"]: row for row in found if row["table_path"]}

    def load(self, rows: Sequence[Row]) -> Iterator[bytes | ImageError]:
        """The bytes of the image of each row, in their order, or why there are none. A few are in memory at a time.

        Bytes other than those that were captioned, by the row's `sha256`, are an error with the code `changed`.

        Raises:
            InputError: as `find`.
        """
        places = self.find(rows)
        with ThreadPoolExecutor(_THREADS) as threads:  # a disk, or a store, is waited for
            for start in range(0, len(rows), _IMAGES_AT_A_TIME):
                captioned = rows[start : start + _IMAGES_AT_A_TIME]
                chunk = places[start : start + _IMAGES_AT_A_TIME]
                packed = [place for place in chunk if place and place["table_path"]]
                from_tables = {place["image_id"]: data for place, data in read_rows(packed, None)}
                paths = [place["image_path"] for place in chunk if place and not place["table_path"]]
                from_files = iter(threads.map(partial(_read_file, root=None), paths))
                for row, place in zip(captioned, chunk, strict=True):
                    if place is None:
                        yield ImageError("missing", "its bytes were in a table")
                    elif place["table_path"]:
                        yield _as_captioned(row, from_tables[place["image_id"]])
                    else:
                        yield _as_captioned(row, next(from_files))

    def locate(self, rows: Sequence[Row]) -> list[str]:
        """The file, table or tar that holds the image of each row; "" where nothing names it."""
        return [(place["table_path"] or place["image_path"]) if place else "" for place in self.find(rows)]

    def require_reachable(self, location: str, error: ImageError) -> None:
        """Raise ImcapError if an image cannot be read because the store, or the disk of the run's input, is gone.

        Args:
            location: of the image, see `locate`.
            error: why it could not be read.
        """
        if storage.is_uri(location):
            _require_reachable(location, error)
        elif self._input and storage.is_inside(self._input, location):
            _require_reachable(self._input, error)


def _as_captioned(row: Row, data: bytes | ImageError) -> bytes | ImageError:
    """The data, or an error if it is not what was captioned. Rows without a hash, as of a table made by hand, pass."""
    expected = row.get("sha256")
    if expected and isinstance(data, bytes) and hashlib.sha256(data).hexdigest() != expected:
        return ImageError("changed", "changed since it was captioned")
    return data


def _read_file(path: str, root: str | None) -> bytes | ImageError:
    try:
        return storage.read_bytes(path, max_bytes=MAX_FILE_BYTES)
    except OSError as error:
        _require_reachable(root, error)
        return image_error_from_os_error(error, path)
    except MemoryError:
        return ImageError("out_of_memory", "not enough memory to read the file")


def _read_table(
    rows: dict[int, Row], found: Iterator[tuple[int, bytes | None | Exception]], path: str, root: str | None
) -> Iterator[tuple[Row, bytes | ImageError]]:
    """Rows of one table or tar by their numbers in it, with what is found there."""
    left = dict(rows)
    try:
        for number, data in found:
            yield left.pop(number), data if isinstance(data, bytes) else _explain(data, path)
    except (OSError, pa.ArrowException) as error:
        _require_reachable(root, error)
        for row in left.values():
            yield row, ImageError("read_error", f"cannot read the table: {storage.hide_secrets(str(error))}")
    else:
        for row in left.values():
            yield row, ImageError("missing", "the table has no such row any more")


def _explain(error: Exception | None, path: str) -> ImageError:
    if error is None:
        return ImageError("missing", "the table holds no image in this row")
    if isinstance(error, OSError):
        return image_error_from_os_error(error, path)
    return ImageError("read_error", f"the tar has changed or is damaged: {error}")


def _require_reachable(root: str | None, error: Exception) -> None:
    """An error of one image is its own. When all are gone, the run must stop and not write a million failures."""
    if root and not storage.is_reachable(root):
        raise ImcapError(f"{root} cannot be read any more: {error}")
