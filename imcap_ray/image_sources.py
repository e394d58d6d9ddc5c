"""Rows of a manifest -> the bytes of their images, whether these are files or lie in tables or tars."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa

from imcap_ray import archives, storage
from imcap_ray.errors import ImageError, ImcapError
from imcap_ray.images import MAX_FILE_BYTES, image_error_from_os_error
from imcap_ray.manifest import is_tar, read_table_images

Row = dict[str, Any]


def read_rows(rows: Iterable[Row], root: str) -> Iterator[tuple[Row, bytes | ImageError]]:
    """The bytes of each row of `MANIFEST_SCHEMA`, or why there are none; rows of tables and tars last.

    Raises:
        ImcapError: `root`, where the images lie, is gone.
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


def _read_file(path: str, root: str) -> bytes | ImageError:
    try:
        return storage.read_bytes(path, max_bytes=MAX_FILE_BYTES)
    except OSError as error:
        _require_reachable(root, error)
        return image_error_from_os_error(error, path)
    except MemoryError:
        return ImageError("out_of_memory", "not enough memory to read the file")


def _read_table(
    rows: dict[int, Row], found: Iterator[tuple[int, bytes | None | Exception]], path: str, root: str
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


def _require_reachable(root: str, error: Exception) -> None:
    """An error of one image is its own. When all are gone, the run must stop and not write a million failures."""
    if not storage.is_reachable(root):
        raise ImcapError(f"{root} cannot be read any more: {error}")
