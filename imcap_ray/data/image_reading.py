"""Rows of a manifest, or of the captions made of it -> the bytes of their images, whether these are files or lie in
tables or tars."""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import Any, Final

import pyarrow as pa
import pyarrow.dataset as pads

from imcap_ray import storage
from imcap_ray.data import tar_images
from imcap_ray.data.image_decoding import MAX_FILE_BYTES, image_error_from_os_error
from imcap_ray.data.manifest import folder_of, image_placer, is_tar, read_image_columns, read_run
from imcap_ray.data.parquet_images import read_table_images
from imcap_ray.data.schemas import MANIFEST_SCHEMA
from imcap_ray.errors import ImageError, ImcapError, InputError

Row = dict[str, Any]

_THREADS: Final = 16

_IMAGES_AT_A_TIME: Final = 64

_BYTES_AT_A_TIME: Final = 32 * 2**20

_SECONDS_BETWEEN_QUESTIONS: Final = 30
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
            yield row, _read_file(row["image_path"], root)
    for table_path, of_table in in_tables.items():
        yield from _TableReader(table_path, root, image_columns).read(of_table)


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
        self._ask_again: dict[str, float] = {}
        """By store, the time before which it is not asked whether it is reachable."""
        self._not_asked: dict[str, tuple[str, ImageError]] = {}
        """By store, the last image that could not be read and was not asked about."""

    def find(self, rows: Sequence[Row]) -> list[Row | None]:
        """For each row of captions, by its `image_id` and `image_path`, where its image is: these and `table_path`; for
        a row of a table all but `manifest_id` of `MANIFEST_SCHEMA`. None where the bytes were in a table that nothing
        names any more.

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
        filesystem = storage.resolve(self._manifest)[0]
        manifest = pads.dataset([storage.resolve(part)[1] for part in parts], filesystem=filesystem, format="parquet")
        columns = [name for name in MANIFEST_SCHEMA.names[1:] if name in manifest.schema.names]
        found = manifest.to_table(columns=columns, filter=pads.field("image_id").isin(image_ids)).to_pylist()
        for row in found:
            self._place(row, row["table_path"])
        return {row["image_id"]: row for row in found if row["table_path"]}

    @cached_property
    def _image_columns(self) -> list[str]:
        return read_image_columns(self._manifest)

    def _read_packed(self, places: list[Row]) -> Iterator[tuple[Row, bytes | ImageError]]:
        return read_rows(places, None, image_columns=self._image_columns)

    def load(self, rows: Sequence[Row], places: Sequence[Row | None] | None = None) -> Iterator[bytes | ImageError]:
        """The bytes of the image of each row, in their order, or why there are none. A few are in memory at a time.

        Bytes other than those that were captioned, by the row's `sha256`, are an error with the code `changed`. A table
        or tar that was rewritten makes a difference to rows without `sha256` only.

        Args:
            places: what `find` returned for these rows, where the caller needs it too.

        Raises:
            InputError: as `find`.
        """
        places = self.find(rows) if places is None else places
        with ThreadPoolExecutor(_THREADS) as threads:  # a disk, or a store, is waited for
            for start in range(0, len(rows), _IMAGES_AT_A_TIME):
                captioned = rows[start : start + _IMAGES_AT_A_TIME]
                chunk = places[start : start + _IMAGES_AT_A_TIME]
                packed = [
                    place | {"sha256": row.get("sha256")}
                    for row, place in zip(captioned, chunk, strict=True)
                    if place and place["table_path"]
                ]
                from_tables = {place["image_id"]: data for place, data in self._read_packed(packed)}
                paths = [place["image_path"] for place in chunk if place and not place["table_path"]]
                from_files = iter(threads.map(partial(_read_file, root=None), paths))
                for row, place in zip(captioned, chunk, strict=True):
                    if place is None:
                        yield ImageError("missing", "its bytes were in a table")
                    elif place["table_path"]:
                        yield _as_captioned(row, from_tables[place["image_id"]])
                    else:
                        yield _as_captioned(row, next(from_files))

    def require_reachable(self, location: str, error: ImageError) -> None:
        """Raise ImcapError if an image cannot be read because the store, or the disk of the run's input, is gone.

        A store that has just answered is not asked again, see `require_still_reachable`: with a store that throttles,
        the question takes seconds.

        Args:
            location: of the image, see `location_of`.
            error: why it could not be read.
        """
        if storage.is_uri(location):
            store = "/".join(location.split("/", 3)[:3])
            if time.monotonic() < self._ask_again.get(store, 0.0):
                self._not_asked[store] = location, error
            else:
                self._ask(store, location, error)
        elif self._input and storage.is_inside(self._input, location):
            _require_reachable(self._input, error)

    def require_still_reachable(self) -> None:
        """Ask the stores that `require_reachable` did not ask about their last error. Raises ImcapError likewise."""
        for store, (location, error) in list(self._not_asked.items()):
            self._ask(store, location, error)

    def _ask(self, store: str, location: str, error: ImageError) -> None:
        _require_reachable(location, error)
        self._not_asked.pop(store, None)
        self._ask_again[store] = time.monotonic() + _SECONDS_BETWEEN_QUESTIONS


def location_of(place: Row | None) -> str:
    """The file, table or tar of a place that `CaptionedImageSource.find` returned; "" where nothing names it."""
    return (place["table_path"] or place["image_path"]) if place else ""


def _as_captioned(row: Row, data: bytes | ImageError) -> bytes | ImageError:
    """The data, or an error if it is not what was captioned. Rows without a hash, as of a table made by hand, pass."""
    expected = row.get("sha256")
    if expected and isinstance(data, bytes) and hashlib.sha256(data).hexdigest() != expected:
        return ImageError("changed", "changed since it was captioned")
    return data


def _read_file(path: str, root: str | None) -> bytes | ImageError:
    if path.rpartition("/data:")[1]:
        return ImageError(
            "unsupported_format", f"expected the path of a file, got a data URI; put the bytes into a column: {path}"
        )
    try:
        return storage.read_bytes(path, max_bytes=MAX_FILE_BYTES)
    except OSError as error:
        _require_reachable(root, error)
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
            _require_reachable(self._root, error)
            yield from ((row, _unreadable(error, self._path)) for row in rows)
            return
        # A row's bytes are passed on only after the file was found unchanged once they had been read. A few rows are
        # checked together, because a store answers each question in a few hundredths of a second.
        waiting: list[tuple[Row, bytes | ImageError]] = []
        num_bytes = 0
        for row, data in self._read_places(rows):
            waiting.append((row, data))
            num_bytes += len(data) if isinstance(data, bytes) else 0
            if len(waiting) == _IMAGES_AT_A_TIME or num_bytes >= _BYTES_AT_A_TIME:
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
                _require_reachable(self._root, error)
            yield from ((place, _unreadable(error, self._path)) for place in places if place > last)

    def _confirm(self, found: list[tuple[Row, bytes | ImageError]]) -> Iterator[tuple[Row, bytes | ImageError]]:
        """What was found, if the file is still the one that was opened; else that it has changed, or why nobody can
        tell. Bytes of a row with a hash are passed on in any case."""
        problem: ImageError | None = None
        if found and not self._has_changed:
            try:
                self._has_changed = not storage.is_same_version(self._path, self._version, self._find_version())
            except OSError as error:
                _require_reachable(self._root, error)
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


def _require_reachable(root: str | None, error: Exception) -> None:
    """An error of one image is its own. When all are gone, the run must stop and not write a million failures."""
    if root and not storage.is_reachable(root):
        raise ImcapError(f"{root} cannot be read any more: {error}")
