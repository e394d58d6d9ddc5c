"""Rows of a manifest -> the bytes of their images, which are files, or in tables or tars."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, TypeAlias

import pyarrow as pa

from imcap_ray import storage
from imcap_ray.data import tar_images
from imcap_ray.data.image_errors import MAX_FILE_BYTES, image_error_from_os_error
from imcap_ray.data.manifest import is_tar
from imcap_ray.data.parquet_images import read_table_images
from imcap_ray.data.schemas import ManifestRow
from imcap_ray.errors import ImageError, ImcapError, InputError

READ_THREADS: Final = 16

IMAGES_PER_READ: Final = 64

_BYTES_PER_CHECK: Final = 32 * 2**20

REACHABILITY_INTERVAL_SECONDS: Final = 30
"""Minimum time between two checks whether a store is reachable, each of which may take 11 s."""


def read_rows(
    rows: Iterable[ManifestRow],
    root: str | None,
    *,
    image_columns: Sequence[str] = (),
    rows_per_check: int = IMAGES_PER_READ,
) -> Iterator[tuple[ManifestRow, bytes | ImageError]]:
    """The bytes of each row, or why there are none; rows of tables and tars come last.

    A table or tar that was rewritten after its rows were listed may have other images in their positions. If size or
    modification time differ, these rows get an ImageError `changed`. A row with a `sha256` gets the bytes that are in
    its position, because the caller can check them.

    Args:
        root: location of the images. None: do not check whether it still exists.
        image_columns: the manifest's image columns, see `manifest.read_image_columns`.
        rows_per_check: maximum number of rows that are read before a check that their table has not changed.

    Raises:
        ImcapError: `root` no longer exists.
    """
    in_tables: dict[str, list[ManifestRow]] = defaultdict(list)
    for row in rows:
        if row["table_path"]:
            in_tables[row["table_path"]].append(row)
        else:
            yield row, read_file(row["image_path"], root)
    for table_path, of_table in in_tables.items():
        yield from _TableReader(table_path, root, image_columns, rows_per_check).read(of_table)


def root_of(rows: pa.Table) -> str:
    """The folder, table or tar of a manifest's first image."""
    first = rows.slice(0, 1).to_pylist()[0]
    return first["table_path"] or storage.parent(first["image_path"])


def location_of(row: ManifestRow | None) -> str:
    """The file, table or tar of a row; "" without a row."""
    return (row["table_path"] or row["image_path"]) if row else ""


def read_file(path: str, root: str | None) -> bytes | ImageError:
    """The bytes of an image file, or why there are none.

    Raises:
        ImcapError: `root` no longer exists.
    """
    if path.rpartition("/data:")[1]:
        return ImageError(
            "unsupported_format", f"expected the path of a file, got a data URI: store the bytes in a column: {path}"
        )
    try:
        return storage.read_bytes(path, max_bytes=MAX_FILE_BYTES)
    except OSError as error:
        require_reachable(root, error)
        return image_error_from_os_error(error, path)
    except MemoryError:
        return ImageError("out_of_memory", "not enough memory to read the file")


Position = tuple[int, int]
"""Row group and row in a table; block and 0 in a tar."""

_END: Final[tuple[Position, bytes]] = ((2**63, 0), b"")
"""Position after all rows of a table."""


class _DamageError(ImageError):
    """The file can be read, but has no image in this position."""


_Rows: TypeAlias = list[tuple[ManifestRow, bytes | ImageError]]


class _TableReader:
    """Reads rows of one table or tar, if it is still the file that was listed."""

    def __init__(self, table_path: str, root: str | None, image_columns: Sequence[str], rows_per_check: int) -> None:
        self._path = table_path
        self._image_columns = image_columns
        self._rows_per_check = rows_per_check
        self._root = root
        self._version = (0, 0)
        self._has_changed = False
        """Whether the file has been rewritten since the reader was opened."""

    def read(self, rows: Sequence[ManifestRow]) -> Iterator[tuple[ManifestRow, bytes | ImageError]]:
        """The rows, sorted by position, with their bytes or why there are none.

        Raises:
            ImcapError: `root` no longer exists.
        """
        rows = sorted(rows, key=_position_of)
        try:
            self._version = self._find_version()
        except OSError as error:
            require_reachable(self._root, error)
            yield from ((row, _unreadable(error, self._path)) for row in rows)
            return
        # A row's bytes are returned once a check after reading them has shown that the file is unchanged. Several rows
        # are checked together, because a store takes a few hundredths of a second to answer.
        waiting: _Rows = []
        num_bytes = 0
        for row, data in self._read_positions(rows):
            waiting.append((row, data))
            num_bytes += len(data) if isinstance(data, bytes) else 0
            if len(waiting) == self._rows_per_check or num_bytes >= _BYTES_PER_CHECK:
                yield from self._confirm(waiting)
                waiting, num_bytes = [], 0
        yield from self._confirm(waiting)

    def _find_version(self) -> tuple[int, int]:
        file = storage.describe_regular_file(self._path)
        return file.size, file.modified_ns

    def _read_positions(self, rows: Sequence[ManifestRow]) -> Iterator[tuple[ManifestRow, bytes | ImageError]]:
        is_listed = [storage.is_same_version(self._path, _listed_version(row), self._version) for row in rows]
        # A row with a hash is read whatever the file's size and time: a copy of a table has another time.
        is_read = [is_same or bool(row.get("sha256")) for row, is_same in zip(rows, is_listed, strict=True)]
        positions = sorted({_position_of(row) for row, is_wanted in zip(rows, is_read, strict=True) if is_wanted})
        images = self._read_sorted(positions)
        position, data = next(images, _END)
        for row, is_same in zip(rows, is_listed, strict=True):
            while position < _position_of(row):
                position, data = next(images, _END)
            if not is_same and (not row.get("sha256") or isinstance(data, _DamageError)):
                yield row, self._changed()
            elif position == _position_of(row):
                yield row, data
            else:
                yield row, ImageError("changed", f"{self._path} no longer has this row")

    def _read_sorted(self, positions: Sequence[Position]) -> Iterator[tuple[Position, bytes | ImageError]]:
        """The data in those of these positions that exist; after an error of the file, that error for all others."""
        if not positions:
            return
        images: Iterator[tuple[Position, bytes | Exception | None]]
        if is_tar(self._path):
            blocks = tar_images.read_files(self._path, [block for block, _ in positions], max_bytes=MAX_FILE_BYTES)
            images = (((block, 0), data) for block, data in blocks)
        else:
            images = read_table_images(self._path, positions, image_columns=self._image_columns)
        last: Position = (-1, -1)
        try:
            for last, data in images:
                yield last, data if isinstance(data, bytes) else _explain(data, self._path)
        except (OSError, pa.ArrowException, InputError) as error:  # InputError: the table has other columns now
            if not isinstance(error, InputError):
                require_reachable(self._root, error)
            yield from ((position, _unreadable(error, self._path)) for position in positions if position > last)

    def _confirm(self, rows: _Rows) -> Iterator[tuple[ManifestRow, bytes | ImageError]]:
        """The rows with their data, if the file is still the one that was opened. Otherwise they get the error
        `changed`, or the one of checking it; rows with a hash keep their bytes."""
        problem: ImageError | None = None
        if rows and not self._has_changed:
            try:
                self._has_changed = not storage.is_same_version(self._path, self._version, self._find_version())
            except OSError as error:
                require_reachable(self._root, error)
                self._has_changed = isinstance(error, FileNotFoundError)
                problem = _unreadable(error, self._path)
        if self._has_changed:
            problem = self._changed()
        for row, data in rows:
            is_known = bool(row.get("sha256")) and isinstance(data, bytes)
            yield row, data if problem is None or is_known else problem

    def _changed(self) -> ImageError:
        return ImageError("changed", f"{self._path} has changed since it was listed: run `imcap caption` again")


def _position_of(row: ManifestRow) -> Position:
    return row["row_group"], row["row"]


def _listed_version(row: ManifestRow) -> tuple[int, int]:
    return row.get("size", -1), row.get("modified_ns", 0)


def _unreadable(error: Exception, path: str) -> ImageError:
    if isinstance(error, FileNotFoundError | PermissionError):
        return image_error_from_os_error(error, path)
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    kind = ImageError if isinstance(error, OSError) else _DamageError
    return kind("read_error", f"cannot read the table: {storage.hide_secrets(text)}")


def _explain(error: Exception | None, path: str) -> ImageError:
    if error is None:
        return _DamageError("missing", "the table has no image in this row")
    if isinstance(error, OSError):
        return image_error_from_os_error(error, path)
    return _DamageError("read_error", f"the tar has changed or is damaged: {error}")


def require_reachable(root: str | None, error: Exception) -> None:
    """Raise ImcapError if `root` is unavailable, so that a run stops and does not fail a million images.

    An error of a single image belongs into its row.
    """
    if root and not storage.is_reachable(root):
        raise ImcapError(f"{root} cannot be read any more: {error}")
