"""Rows of a manifest, or of the captions made of it -> the bytes of their images, whether these are files or lie in
tables or tars."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import pyarrow as pa

from imcap_ray import storage
from imcap_ray.data import tar_images
from imcap_ray.data.image_errors import MAX_FILE_BYTES, image_error_from_os_error
from imcap_ray.data.manifest import is_tar
from imcap_ray.data.parquet_images import read_table_images
from imcap_ray.errors import ImageError, ImcapError, InputError

Row = dict[str, Any]

READ_THREADS: Final = 16

IMAGES_PER_READ: Final = 64

_BYTES_AT_A_TIME: Final = 32 * 2**20

REACHABILITY_INTERVAL_SECONDS: Final = 30
"""Between two questions whether a store is reachable, each of which may take 11 s."""


def read_rows(
    rows: Iterable[Row], root: str | None, *, image_columns: Sequence[str] = ()
) -> Iterator[tuple[Row, bytes | ImageError]]:
    """The bytes of each row of `MANIFEST_SCHEMA`, or why there are none; rows of tables and tars last.

    A table or tar that was rewritten after its rows were listed may hold another image at their place. These rows get
    an ImageError `changed`, by its size and modification time, as far as both the row and the file system know them.
    A row with a `sha256` gets whatever bytes are at its place, because its caller can tell by them.

    Args:
        root: the location of the images. None: it is not checked whether it still exists.
        image_columns: the columns that the manifest of the rows notes, see `manifest.read_image_columns`.

    Raises:
        ImcapError: `root` no longer exists.
    """
    in_tables: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["table_path"]:
            in_tables[row["table_path"]].append(row)
        else:
            yield row, read_file(row["image_path"], root)
    for table_path, of_table in in_tables.items():
        yield from _TableReader(table_path, root, image_columns).read(of_table)


def root_of(rows: pa.Table) -> str:
    """Where the images of a manifest lie, as far as the first of them tells."""
    first = rows.slice(0, 1).to_pylist()[0]
    return first["table_path"] or storage.parent(first["image_path"])


def location_of(place: Row | None) -> str:
    """The file, table or tar of a place that `CaptionedImageSource.find` returned; "" where nothing names it."""
    return (place["table_path"] or place["image_path"]) if place else ""


def read_file(path: str, root: str | None) -> bytes | ImageError:
    """The bytes of an image file, or why there are none.

    Raises:
        ImcapError: `root` no longer exists.
    """
    if path.rpartition("/data:")[1]:
        return ImageError(
            "unsupported_format", f"expected the path of a file, got a data URI; put the bytes into a column: {path}"
        )
    try:
        return storage.read_bytes(path, max_bytes=MAX_FILE_BYTES)
    except OSError as error:
        require_reachable(root, error)
        return image_error_from_os_error(error, path)
    except MemoryError:
        return ImageError("out_of_memory", "not enough memory to read the file")


Place = tuple[int, int]
"""Row group and row in a table; block and 0 in a tar."""

_END: Final[tuple[Place, bytes]] = ((2**63, 0), b"")
"""Behind all rows of a table."""


class _DamageError(ImageError):
    """The file can be read, but has no image at this place."""


class _TableReader:
    """Reads rows of one table or tar, as long as it is the file that was listed."""

    def __init__(self, table_path: str, root: str | None, image_columns: Sequence[str]) -> None:
        self._path = table_path
        self._image_columns = image_columns
        self._root = root
        self._version = (0, 0)
        self._has_changed = False
        """Whether the file has been rewritten since the reader was opened."""

    def read(self, rows: Sequence[Row]) -> Iterator[tuple[Row, bytes | ImageError]]:
        """The rows, sorted by their places, with their bytes or why there are none.

        Raises:
            ImcapError: `root` no longer exists.
        """
        rows = sorted(rows, key=_place_of)
        try:
            self._version = self._find_version()
        except OSError as error:
            require_reachable(self._root, error)
            yield from ((row, _unreadable(error, self._path)) for row in rows)
            return
        # A row's bytes are passed on only after the file was found unchanged once they had been read. A few rows are
        # checked together, because a store answers each question in a few hundredths of a second.
        waiting: list[tuple[Row, bytes | ImageError]] = []
        num_bytes = 0
        for row, data in self._read_places(rows):
            waiting.append((row, data))
            num_bytes += len(data) if isinstance(data, bytes) else 0
            if len(waiting) == IMAGES_PER_READ or num_bytes >= _BYTES_AT_A_TIME:
                yield from self._confirm(waiting)
                waiting, num_bytes = [], 0
        yield from self._confirm(waiting)

    def _find_version(self) -> tuple[int, int]:
        file = storage.describe_regular_file(self._path)
        return file.size, file.modified_ns

    def _read_places(self, rows: Sequence[Row]) -> Iterator[tuple[Row, bytes | ImageError]]:
        is_listed = [storage.is_same_version(self._path, _listed_version(row), self._version) for row in rows]
        # A row with a hash is read whatever the file's size and time: a copy of a table has another time.
        is_read = [is_same or bool(row.get("sha256")) for row, is_same in zip(rows, is_listed, strict=True)]
        places = sorted({_place_of(row) for row, is_one in zip(rows, is_read, strict=True) if is_one})
        found = self._read_sorted(places)
        place, data = next(found, _END)
        for row, is_same in zip(rows, is_listed, strict=True):
            while place < _place_of(row):
                place, data = next(found, _END)
            if not is_same and (not row.get("sha256") or isinstance(data, _DamageError)):
                yield row, self._changed()
            elif place == _place_of(row):
                yield row, data
            else:
                yield row, ImageError("changed", f"{self._path} no longer has this row")

    def _read_sorted(self, places: Sequence[Place]) -> Iterator[tuple[Place, bytes | ImageError]]:
        """What is at those of these places that exist; after an error of the file that error for each of the others."""
        if not places:
            return
        found: Iterator[tuple[Place, bytes | Exception | None]]
        if is_tar(self._path):
            blocks = tar_images.read_files(self._path, [block for block, _ in places], max_bytes=MAX_FILE_BYTES)
            found = (((block, 0), data) for block, data in blocks)
        else:
            found = read_table_images(self._path, places, image_columns=self._image_columns)
        last: Place = (-1, -1)
        try:
            for last, data in found:
                yield last, data if isinstance(data, bytes) else _explain(data, self._path)
        except (OSError, pa.ArrowException, InputError) as error:  # InputError: the table has other columns now
            if not isinstance(error, InputError):
                require_reachable(self._root, error)
            yield from ((place, _unreadable(error, self._path)) for place in places if place > last)

    def _confirm(self, found: list[tuple[Row, bytes | ImageError]]) -> Iterator[tuple[Row, bytes | ImageError]]:
        """What was found, if the file is still the one that was opened; else that it has changed, or why nobody can
        tell. Bytes of a row with a hash are passed on in any case."""
        problem: ImageError | None = None
        if found and not self._has_changed:
            try:
                self._has_changed = not storage.is_same_version(self._path, self._version, self._find_version())
            except OSError as error:
                require_reachable(self._root, error)
                self._has_changed = isinstance(error, FileNotFoundError)
                problem = _unreadable(error, self._path)
        if self._has_changed:
            problem = self._changed()
        for row, data in found:
            is_known = bool(row.get("sha256")) and isinstance(data, bytes)
            yield row, data if problem is None or is_known else problem

    def _changed(self) -> ImageError:
        return ImageError("changed", f"{self._path} has changed since it was listed; run `imcap caption` again")


def _place_of(row: Row) -> Place:
    return row["row_group"], row["row"]


def _listed_version(row: Row) -> tuple[int, int]:
    return row.get("size", -1), row.get("modified_ns", 0)


def _unreadable(error: Exception, path: str) -> ImageError:
    if isinstance(error, FileNotFoundError | PermissionError):
        return image_error_from_os_error(error, path)
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    kind = ImageError if isinstance(error, OSError) else _DamageError
    return kind("read_error", f"cannot read the table: {storage.hide_secrets(text)}")


def _explain(error: Exception | None, path: str) -> ImageError:
    if error is None:
        return _DamageError("missing", "the table holds no image in this row")
    if isinstance(error, OSError):
        return image_error_from_os_error(error, path)
    return _DamageError("read_error", f"the tar has changed or is damaged: {error}")


def require_reachable(root: str | None, error: Exception) -> None:
    """An error of one image is its own. When all are gone, the run must stop and not write a million failures."""
    if root and not storage.is_reachable(root):
        raise ImcapError(f"{root} cannot be read any more: {error}")
