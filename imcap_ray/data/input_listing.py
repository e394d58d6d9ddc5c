"""A folder -> its image files, tars and Parquet tables of images."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from typing import Final
from urllib.parse import urlsplit

import pyarrow as pa

from imcap_ray import storage
from imcap_ray.data.columns import ImageColumns, holds_image_bytes
from imcap_ray.data.image_formats import (
    begins_like_image,
    extension_of,
    is_hidden_folder,
    is_image_name,
    is_in_hidden_folder,
    may_be_image,
)
from imcap_ray.data.parquet_files import read_metadata
from imcap_ray.data.parquet_images import TablePaths, open_table
from imcap_ray.errors import InputError
from imcap_ray.storage import ListedFile
from imcap_ray.web import is_web

_SIGNATURE_BYTES: Final = 64

_FILES_PER_CHECK: Final = 256
"""Number of files that are recognised together, because a store takes a few hundredths of a second for each."""

_CONCURRENT_READS: Final = 16

_MAX_EXTENSIONS: Final = 100
"""Maximum number of extensions by which ignored files are counted: numbered files have a different one each."""

_DESCRIBED_EXTENSIONS: Final = 12

_OTHER_EXTENSIONS: Final = "other extensions"

_MAX_OBJECT_REQUESTS: Final = 8
"""Maximum number of objects of a store, named by a table next to image files, that are asked for one by one."""


PACKED_KINDS: Final = ("tar", "parquet", "compressed tar")
"""Kinds of files that may hold images."""

_COMPRESSED_TAR: Final = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4|lzma|z)|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)


class Listing:
    """The files of a location, sorted into image files, tars, Parquet tables and others.

    Files that captioning runs have written below the location, and files in `output`, count as others.
    """

    def __init__(self, location: str, *, recursive: bool = True, output: str | None = None) -> None:
        self.num_images = 0
        self._location = location
        self._recursive = recursive
        self._output = output
        self._packed: dict[str, list[ListedFile]] = {kind: [] for kind in PACKED_KINDS}
        self._others: Counter[str] = Counter()
        self._run_folders: set[str] = set()
        self.unreadable: list[str] = []
        """Names of the tables that `find_image_tables` could not read."""

    def images(self) -> Iterator[ListedFile]:
        """The image files. Everything else is known once all of them have been iterated."""
        if storage.is_file(self._location):
            file = storage.describe_file(self._location)
            if kind := packed_kind(file.name):
                self._packed[kind].append(file)
                return
            files: Iterable[ListedFile] = [file]
        else:
            files = storage.list_files(self._location, recursive=self._recursive, is_skipped=is_hidden_folder)
        for file, is_image in _recognise_images(files):
            folder, _, name = file.name.rpartition("/")
            if is_image:
                self.num_images += 1
                yield file
            elif (
                packed_kind(name)
                and not name.startswith(("_", "."))
                and not (self._output and storage.is_inside(self._output, file.location))
            ):
                self._packed[packed_kind(name)].append(file)
            else:
                kind = ignored_kind(name)
                is_counted = kind in self._others or len(self._others) < _MAX_EXTENSIONS
                self._others[kind if is_counted else _OTHER_EXTENSIONS] += 1
            before, work, _ = f"/{folder}/".partition("/_imcap/")
            if work and before:  # the location itself may be a captions folder, whose table names images
                self._run_folders.add(before[1:])

    def tars(self) -> list[ListedFile]:
        """The tars, sorted by name."""
        return sorted(self._without_runs("tar"), key=lambda file: file.name)

    def tables(self) -> list[ListedFile]:
        """The Parquet tables."""
        return self._without_runs("parquet")

    def compressed_tars(self) -> list[ListedFile]:
        """The compressed tars, which are not read."""
        return self._without_runs("compressed tar")

    def others(self) -> Counter[str]:
        """Number of files of other kinds, by `ignored_kind`."""
        files = chain.from_iterable(self._packed.values())
        ignored = [*filter(self._is_of_run, files), *self.compressed_tars()]
        return self._others + Counter(ignored_kind(file.name) for file in ignored)

    def _without_runs(self, kind: str) -> list[ListedFile]:
        return [file for file in self._packed[kind] if not self._is_of_run(file)]

    def _is_of_run(self, file: ListedFile) -> bool:
        folder = file.name.rpartition("/")[0]
        return folder in self._run_folders or "/_imcap/" in f"/{folder}/"

    def find_image_tables(self, columns: ImageColumns) -> list[ListedFile]:
        """The Parquet tables that belong to an input of image files or tars, because they hold images themselves.

        Raises:
            InputError: there are tars too, or a table names existing images that are not among the image files.
        """
        tables = [table for table in self._readable_tables() if self._holds_images(table, columns)]
        tars = self.tars()
        if tables and tars:
            raise InputError(
                f"{self._location} holds images in {count_files(tars, 'tar')} ({tars[0].name}) and in "
                f"{count_files(tables, 'Parquet table')} ({tables[0].name}), which may be the same images: give one of "
                "them as the input, or a folder that holds only one kind"
            )
        return tables

    def _readable_tables(self) -> Iterator[ListedFile]:
        self.unreadable = []
        for table in self.tables():
            try:
                read_metadata(table.location)
            except (pa.ArrowException, OSError):
                self.unreadable.append(table.name)
            else:
                yield table

    def _holds_images(self, table: ListedFile, columns: ImageColumns) -> bool:
        with open_table(table.location) as opened:
            column = columns.peek(opened, table.location)
        if column is None or (column.kind != "path" and holds_image_bytes(table.location, column) is False):
            return False
        named = _NamedFiles(self._location)
        first_row = 0
        for group in TablePaths(self._location, True, columns).row_groups(table.location, column):
            if group.paths is None or None in group.paths:
                return True
            if self.num_images:
                for path, row in _first_rows(group.paths, first_row):
                    named.add(path, row, is_listed=self._is_listed(path))
            first_row += group.num_rows
        unlisted = named.unlisted_image()
        if unlisted is not None:
            path, row = unlisted
            raise InputError(
                f"{self._location} holds {self.num_images:,} image file{'s' * (self.num_images != 1)}, and its "
                f"table {table.name} names images that are not among them (row {row}: {path!r}): give "
                f"{table.location} as the input, or a folder without it"
            )
        return False

    def _is_listed(self, path: str) -> bool:
        """Whether a file that a table names would be among the image files, if it exists; an object of a store whose
        name leaves that open, if it is an image."""
        is_below = storage.is_inside(self._location, path)
        if not (is_below if self._recursive else storage.parent(path) == self._location):
            return False
        if is_in_hidden_folder(path.removeprefix(f"{self._location}/")):
            return False
        if is_image_name(path) or not may_be_image(path):
            return is_image_name(path)
        return storage.is_uri(path) or (os.path.isfile(path) and _begins_like_image(path))


def _first_rows(paths: Iterable[str | None], first_row: int) -> Iterator[tuple[str, int]]:
    """Each path with the number of its first row, without empty ones."""
    rows: dict[str, int] = {}
    for row, path in enumerate(paths, first_row):
        if path:
            rows.setdefault(path, row)
    return iter(rows.items())


def _recognise_images(files: Iterable[ListedFile]) -> Iterator[tuple[ListedFile, bool]]:
    """Each file and whether it is an image: by its name, or by its first bytes if the name leaves that open."""
    remaining = iter(files)
    with ThreadPoolExecutor(_CONCURRENT_READS) as threads:
        while chunk := list(islice(remaining, _FILES_PER_CHECK)):
            unknown = [file.location for file in chunk if file.size > 0 and may_be_image(file.name)]
            images = dict(zip(unknown, threads.map(_begins_like_image, unknown), strict=True))
            for file in chunk:
                yield file, images.get(file.location, is_image_name(file.name))


def _begins_like_image(location: str) -> bool:
    """Whether a file begins like an image. One that cannot be read may be an image, and gets a row with the reason."""
    try:
        return begins_like_image(storage.read_beginning(location, _SIGNATURE_BYTES))
    except FileNotFoundError:
        return False
    except OSError:
        return True


def ignored_kind(name: str) -> str:
    """What a file that is not an image is counted as: its extension with the dot, "hidden" or "no extension"."""
    if name.rpartition("/")[2].startswith("."):
        return "hidden"
    extension = extension_of(name)
    return f".{extension}" if re.fullmatch(r"[\w-]{1,12}", extension) else "no extension"


def packed_kind(name: str) -> str:
    """Which of `PACKED_KINDS` a file is, by its name; "" for others."""
    if _COMPRESSED_TAR.search(name):
        return "compressed tar"
    return {"tar": "tar", "parquet": "parquet", "parq": "parquet", "pq": "parquet"}.get(extension_of(name), "")


def describe_compressed_tars(names: Sequence[str]) -> str:
    """Why compressed tars are not read, for people."""
    number = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
    return (
        f"compressed tars are not read, because their images cannot be read one by one: decompress {names[0]}{number}, "
        "for example with gunzip"
    )


def describe_kinds(counts: Mapping[str, int]) -> str:
    """Numbers of ignored files by `ignored_kind`, the most frequent first: ".txt 9, .mov 2"."""
    kinds = Counter(counts)
    most = Counter(dict(kinds.most_common(_DESCRIBED_EXTENSIONS)))
    if len(most) < len(kinds):
        most[_OTHER_EXTENSIONS] += kinds.total() - most.total()
    return ", ".join(f"{kind} {count:,}" for kind, count in most.items())


class _NamedFiles:
    """The files that a column of paths names, to find images among them that are not listed.

    Such a column may hold anything: the paths of scripts, or those that photographs had before they were moved. A file
    counts as an image if it exists and has the name or the first bytes of one; if at least half of the values are
    existing image files, any existing file does. In a store, only some objects below the input are asked for: others
    count as images, and a web address does if it ends like one.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._num_values = 0
        self._num_image_names = 0
        self._image: tuple[str, int] | None = None
        self._file: tuple[str, int] | None = None
        self._num_asked = 0

    def add(self, path: str, row: int, *, is_listed: bool) -> None:
        """Count a value of the column, given as an absolute path."""
        self._num_values += 1
        self._num_image_names += is_image_name(path) and (storage.is_uri(path) or os.path.isfile(path))
        if is_listed or self._image is not None:
            return
        if storage.is_uri(path) and not (storage.is_inside(self._folder, path) and not is_image_name(path)):
            if is_image_name(urlsplit(path).path) or not is_web(path):
                self._image = path, row
        elif self._exists(path):
            if is_image_name(path) or _begins_like_image(path):
                self._image = path, row
            elif self._file is None:
                self._file = path, row

    def unlisted_image(self) -> tuple[str, int] | None:
        """The first existing image that is not listed, and its row."""
        return self._image or (self._file if self._num_image_names * 2 >= self._num_values else None)

    def _exists(self, path: str) -> bool:
        if not storage.is_uri(path):
            return os.path.isfile(path)
        self._num_asked += 1
        return self._num_asked <= _MAX_OBJECT_REQUESTS and storage.is_file(path)


def count_files(files: Sequence[ListedFile], noun: str) -> str:
    """The number of files for people: "2 tars"."""
    return f"{len(files):,} {noun}{'s' * (len(files) != 1)}"
