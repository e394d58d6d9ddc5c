"""The tables: the Arrow schemas of a row in (the manifest) and a row out (the captions), an input -> its manifest."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imcap_ray import storage
from imcap_ray.data import tar_images
from imcap_ray.data.columns import BY_NAME, ColumnOptions, ImageColumns, holds_image_bytes
from imcap_ray.data.image_formats import extension_of, has_image_signature, is_image_name
from imcap_ray.data.known_images import (
    ID_COLUMN_KEY,
    ID_SOURCE_KEY,
    IMAGE_COLUMNS_KEY,
    KnownImages,
    parse_image_columns,
    range_of,
)
from imcap_ray.data.parquet_files import read_table, write_table
from imcap_ray.data.parquet_images import TablePaths, open_table
from imcap_ray.data.schemas import MANIFEST_SCHEMA
from imcap_ray.data.table_listing import (
    IDS_FROM_POSITION,
    IDS_FROM_TABLE,
    IdColumns,
    choose_ids,
    describe_unused_ids,
    manifest_entry,
    table_entries,
)
from imcap_ray.errors import InputError
from imcap_ray.storage import ListedFile

ROWS_PER_PART: Final = 100_000

_SIGNATURE_BYTES: Final = 64

_OBJECTS_ASKED: Final = 8
"""Of those that a table next to image files names in a store; each is a request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InputOptions:
    """Which images of an input are listed, as the user chooses."""

    recursive: bool = True
    """Whether folders below the input are listed too."""
    limit: int | None = None
    """Maximum number of images; None: all."""
    allow_outside_paths: bool = False
    """Whether paths in a table may point outside the input, or outside the folder of a single table."""
    columns: ColumnOptions = BY_NAME
    """Columns of Parquet tables."""


DEFAULT_OPTIONS: Final = InputOptions()


@dataclass(frozen=True, slots=True)
class InputSummary:
    """What a manifest was made of, in words for the user."""

    num_images: int
    num_ignored: int
    """Files whose names are not those of images."""
    description: str
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What the user should know about how images are found and named."""
    image_column: str | None = field(default=None, compare=False)
    """The column of Parquet tables that images are read from; several are separated by commas."""
    id_column: str | None = field(default=None, compare=False)
    """The column of Parquet tables that ids are read from; None if they are paths, names or numbers of rows."""
    changed: pa.Table = field(default_factory=MANIFEST_SCHEMA.empty_table, compare=False)
    """Rows of `MANIFEST_SCHEMA` as they are now, for images whose file has changed since the manifest was written."""


def build_manifest(
    location: str,
    folder: str,
    options: InputOptions = DEFAULT_OPTIONS,
    *,
    output: str | None = None,
    check: Callable[[], None] = lambda: None,
    known_from: str | None = None,
) -> InputSummary:
    """Write the manifest of the images at `location` (folder, image, Parquet or tars) to Parquet files in `folder`.

    The images of a folder are its image files, those in its tars, and those in its Parquet tables. Tables that hold no
    images themselves are an input of their own only where there are neither image files nor tars; next to these they
    may describe them.

    Images that a manifest already in `folder` lists keep their `manifest_id`; new ones are added behind them. Those
    that are in another place now, in a table that was renamed for instance, get that place. Changed ones are reported
    and left as they stand, until `update_manifest` is called.

    Args:
        output: where the captions go, which must not be taken for tables of images.
        check: called before anything is written; raises if nothing may be any more.
        known_from: the manifest that lists the known images; None: the one in `folder`. Only the new ones are written
            to `folder` then.

    Raises:
        InputError: nothing there, nothing readable, no image among it, a path that leads where it may not, ids that
            new tables have made ambiguous, several columns or several kinds of files of which any could be meant, or
            other columns than before.
    """
    location = storage.absolute(location)
    if not storage.exists(location):
        raise InputError(f"no such input: {location}")
    known = KnownImages(known_from or folder)
    images = _InputImages(location, options, output=output, known=known)
    next_id, num_images, changed = known.num_images, 0, []
    entries = islice(images.entries(), options.limit)
    while chunk := list(islice(entries, ROWS_PER_PART)):
        num_images += len(chunk)
        rows = pa.Table.from_pylist(chunk, schema=MANIFEST_SCHEMA.remove(0))
        ids, is_changed, is_moved = known.find(rows)
        if is_changed.any():
            changed.append(_with_ids(rows.filter(is_changed), ids[is_changed]))
        if is_moved.any():
            check()
            moved = _with_ids(rows.filter(is_moved), ids[is_moved])
            update_manifest(folder, moved.replace_schema_metadata(images.metadata))
        rows = rows.filter(ids < 0)
        if rows.num_rows:
            check()
            part = storage.join(folder, manifest_part(next_id))
            new = _with_ids(rows, np.arange(next_id, next_id + rows.num_rows))
            write_table(part, new.replace_schema_metadata(images.metadata))
            next_id += rows.num_rows
    if not num_images:
        ignored = images.num_ignored
        seen = f"{ignored:,} other file{'s' * (ignored != 1)}" if ignored else "nothing"
        raise InputError(f"no images in {location}: found {seen} there; images are known by names like .jpg or .png")
    changed_rows = pa.concat_tables(changed) if changed else MANIFEST_SCHEMA.empty_table()
    return InputSummary(
        num_images=num_images,
        num_ignored=images.num_ignored,
        description=images.description,
        notes=tuple(images.notes),
        image_column=images.image_column,
        id_column=images.id_column,
        changed=changed_rows.replace_schema_metadata(images.metadata),
    )


def manifest_part(first_id: int) -> str:
    """The name of the manifest's file whose first image has this number."""
    return f"part-{first_id:012d}.parquet"


class Listing:
    """The files of a location, sorted into image files, tars, Parquet tables and others.

    What captionings have written below the location, and what is in `output`, is neither a table nor a tar of it.
    """

    def __init__(self, location: str, *, recursive: bool = True, output: str | None = None) -> None:
        self.num_images = 0
        self._location = location
        self._recursive = recursive
        self._output = output
        self._packed: dict[str, list[ListedFile]] = {"tar": [], "parquet": []}
        self._num_others = 0
        self._run_folders: set[str] = set()
        self.unreadable: list[str] = []
        """Names of the tables that `find_image_tables` could not read."""

    def images(self) -> Iterator[ListedFile]:
        """The image files. The rest is known when all of them have been asked for."""
        if storage.is_file(self._location):
            file = storage.describe_file(self._location)
            if extension_of(file.name) in self._packed:
                self._packed[extension_of(file.name)].append(file)
                return
            files: Iterable[ListedFile] = [file]
        else:
            files = storage.list_files(self._location, recursive=self._recursive)
        for file in files:
            folder, _, name = file.name.rpartition("/")
            if is_image_name(file.name):
                self.num_images += 1
                yield file
            elif (
                extension_of(name) in self._packed
                and not name.startswith(("_", "."))
                and not (self._output and storage.is_inside(self._output, file.location))
            ):
                self._packed[extension_of(name)].append(file)
            else:
                self._num_others += 1
            before, work, _ = f"/{folder}/".partition("/_imcap/")
            if work and before:  # the location itself may be a table of captions, which names images
                self._run_folders.add(before[1:])

    def tars(self) -> list[ListedFile]:
        """The tars, in the order of their names."""
        return sorted(self._without_runs("tar"), key=lambda one: one.name)

    def tables(self) -> list[ListedFile]:
        """The Parquet tables."""
        return self._without_runs("parquet")

    def num_others(self) -> int:
        """Number of files of other kinds."""
        return self._num_others + sum(
            len(files) - len(self._without_runs(kind)) for kind, files in self._packed.items()
        )

    def _without_runs(self, kind: str) -> list[ListedFile]:
        return [file for file in self._packed[kind] if not self._is_of_run(file.name.rpartition("/")[0])]

    def _is_of_run(self, folder: str) -> bool:
        return folder in self._run_folders or "/_imcap/" in f"/{folder}/"

    def find_image_tables(self, columns: ImageColumns) -> list[ListedFile]:
        """The Parquet tables that are part of an input with image files or tars: those that hold images.

        Raises:
            InputError: there are tars too, or a table names images that are there and not among the image files.
        """
        tables = [table for table in self._readable_tables() if self._holds_images(table, columns)]
        tars = self.tars()
        if tables and tars:
            raise InputError(
                f"{self._location} holds images in {_count(tars, 'tar')} ({tars[0].name}) and in "
                f"{_count(tables, 'Parquet table')} ({tables[0].name}), which may be the same images: give one of them "
                "as the input, or a folder that holds only one kind"
            )
        return tables

    def _readable_tables(self) -> Iterator[ListedFile]:
        self.unreadable = []
        for table in self.tables():
            filesystem, path = storage.resolve(table.location)
            try:
                pq.read_metadata(path, filesystem=filesystem)
            except (pa.ArrowException, OSError):
                self.unreadable.append(table.name)
            else:
                yield table

    def _holds_images(self, table: ListedFile, columns: ImageColumns) -> bool:
        with open_table(table.location) as opened:
            column = columns.look(opened, table.location)
        if column is None or (column.kind != "path" and holds_image_bytes(table.location, column) is False):
            return False
        named = _NamedFiles(self._location)
        first_row = 0
        for _, num_rows, paths in TablePaths(self._location, True, columns).row_groups(table.location, column):
            if paths is None or None in paths:
                return True
            if self.num_images:
                for path, row in _first_rows(paths, first_row):
                    named.add(path, row, is_listed=self._is_listed(path))
            first_row += num_rows
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
        """Whether a file that a table names would be among the image files, if it is there."""
        is_below = storage.is_inside(self._location, path)
        return is_image_name(path) and (is_below if self._recursive else storage.parent(path) == self._location)


def _first_rows(paths: Iterable[str | None], first_row: int) -> Iterator[tuple[str, int]]:
    """Each path once, with the number of its first row; empty ones are left out."""
    rows: dict[str, int] = {}
    for row, path in enumerate(paths, first_row):
        if path:
            rows.setdefault(path, row)
    return iter(rows.items())


class _NamedFiles:
    """The files that a column of paths names, to find out whether images among them are not listed.

    Such a column may hold anything: the paths of scripts, or those that photographs had before they were moved. An
    image is a file that is there and has the name or the first bytes of one; where at least half of the values are
    image files that are there, any file. In a store only files below the input are asked for, and only some: an
    object elsewhere counts as an image, a web address only if it ends like one.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._num_values = 0
        self._num_image_names = 0
        self._image: tuple[str, int] | None = None
        self._file: tuple[str, int] | None = None
        self._num_asked = 0

    def add(self, path: str, row: int, *, is_listed: bool) -> None:
        """Count a value of the column, which leads to this place."""
        self._num_values += 1
        self._num_image_names += is_image_name(path) and (storage.is_uri(path) or os.path.isfile(path))
        if is_listed or self._image is not None:
            return
        if storage.is_uri(path) and not (storage.is_inside(self._folder, path) and not is_image_name(path)):
            is_web = path.lower().startswith(("http://", "https://"))
            if is_image_name(urlsplit(path).path) or not is_web:
                self._image = path, row
        elif self._is_there(path):
            if is_image_name(path) or _begins_like_an_image(path):
                self._image = path, row
            elif self._file is None:
                self._file = path, row

    def unlisted_image(self) -> tuple[str, int] | None:
        """The first image that is there and not listed, and its row."""
        return self._image or (self._file if self._num_image_names * 2 >= self._num_values else None)

    def _is_there(self, path: str) -> bool:
        if not storage.is_uri(path):
            return os.path.isfile(path)
        self._num_asked += 1
        return self._num_asked <= _OBJECTS_ASKED and storage.is_file(path)


def _begins_like_an_image(path: str) -> bool:
    filesystem, inner = storage.resolve(path)
    try:
        with filesystem.open_input_file(inner) as file:
            return has_image_signature(file.read(_SIGNATURE_BYTES))
    except OSError:
        return True  # it is there, and may be one


def _count(files: Sequence[ListedFile], what: str) -> str:
    return f"{len(files):,} {what}{'s' * (len(files) != 1)}"


class _InputImages:
    """The images of an input, listed one by one, and what is found out about them on the way."""

    def __init__(self, location: str, options: InputOptions, *, output: str | None, known: KnownImages) -> None:
        self.metadata: dict[bytes, bytes] = {}
        """Of the parts of the manifest."""
        self.notes: list[str] = []
        self.image_column: str | None = None
        self.id_column: str | None = None
        self._location = location
        self._is_folder = storage.is_folder(location)
        self.description = "folder" if self._is_folder else "image"
        self._num_ignored_tables = 0
        self._listing = Listing(location, recursive=options.recursive, output=output)
        self._options = options
        self._output = output
        self._known = known
        self._columns = ImageColumns(options.columns.image, known=known.image_columns, is_by_type=known.is_by_type)
        folder = location if self._is_folder else storage.parent(location)
        self._places = TablePaths(folder, options.allow_outside_paths, self._columns)

    @property
    def num_ignored(self) -> int:
        """Files that were listed and are no part of the input."""
        return self._listing.num_others() + self._num_ignored_tables

    def entries(self) -> Iterator[dict[str, Any]]:
        """What a manifest says of each image: files first, then what is in tars and tables."""
        for file in self._listing.images():
            yield manifest_entry(file.name, file.location, file)
        listing = self._listing
        num_images, tars, tables = listing.num_images, listing.tars(), listing.tables()
        if (num_images or tars) and tables:
            found = listing.find_image_tables(self._columns)
            unreadable = listing.unreadable
            without = [table.name for table in tables if table not in found and table.name not in unreadable]
            for names, problem in ((without, "hold no images"), (unreadable, "cannot be read as Parquet")):
                if names:
                    first = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
                    self.notes.append(
                        f"{self._location}: {len(names):,} of the tables {problem} and are ignored: {first}"
                    )
            self._num_ignored_tables = len(tables) - len(found)
            tables = found
        kinds = [self.description] if num_images else []
        kinds += [f"WebDataset, {_count(tars, 'tar')}"] if tars else []
        kinds += [f"Parquet, {_count(tables, 'file')}"] if tables else []
        self.description = " and ".join(kinds)
        given = self._options.columns.given()
        if given and not tables:
            raise InputError(
                f"{', '.join(given)} applies only to Parquet tables, and {self._location} has none with images"
            )
        if not tars and not tables:
            return
        if num_images:
            self.notes.append(
                f"{self._location}: the input is {num_images:,} image file{'s' * (num_images != 1)} and all images in "
                + (_count(tars, "tar") if tars else _count(tables, "Parquet table"))
            )
        elif self._output and self._is_folder and storage.is_inside(self._location, self._output):
            raise InputError(f"OUTPUT {self._output} is inside INPUT {self._location}: choose a folder outside it")
        entries = _tar_entries(tars) if tars else self._entries_of_tables(tables)
        yield from self._with_ids_of_their_own(entries) if num_images else entries

    def _entries_of_tables(self, tables: list[ListedFile]) -> Iterator[dict[str, Any]]:
        self._places.check([table.location for table in tables], self._options.limit)
        id_columns = IdColumns(self._options.columns.id, known=self._known)
        ids = choose_ids(self._location, tables, self._known.id_source, self._columns, id_columns)
        self.metadata[ID_SOURCE_KEY] = IDS_FROM_POSITION.encode() if ids is None else IDS_FROM_TABLE.encode()
        if self._options.columns.id:
            self.metadata[ID_COLUMN_KEY] = self._options.columns.id.encode()
        if self._columns.names:
            self.metadata[IMAGE_COLUMNS_KEY] = json.dumps(self._columns.names).encode()
        if not self._options.columns.id:
            self.notes.extend(_describe_ids(tables[0].location))
        self.image_column = ", ".join(column.name for column in self._columns.chosen)
        self.id_column = ", ".join(id_columns.chosen) if ids is not None and id_columns.chosen else None
        name = tables[0].location if len(tables) == 1 else f"{self._location}, {_count(tables, 'table')}"
        self.notes.append(f"{name}: {_describe_columns(self._columns, self.id_column, has_ids=ids is not None)}")
        return table_entries(tables, self._places, ids)

    def _with_ids_of_their_own(self, entries: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The entries of tars and tables; InputError if one has the id of an image file. Takes 12 bytes a file."""
        listing = Listing(self._location, recursive=self._options.recursive, output=self._output)
        names = tar_images.IdSet(file.name for file in listing.images())
        for entry in entries:
            if entry["image_id"] in names:
                raise InputError(
                    f"{self._location}: {entry['image_id']!r} is an image file and also the id of an image in "
                    f"{entry['table_path']}: caption the files and the tables or tars into an OUTPUT each"
                )
            yield entry


def _describe_columns(columns: ImageColumns, id_column: str | None, *, has_ids: bool) -> str:
    """From which columns the images and the ids of tables are."""
    images = ", ".join(map(str, columns.chosen))
    if id_column:
        ids = f"ids from column {id_column}"
    elif not has_ids:
        ids = "ids are the table's name and the row's number"
    else:
        is_paths = any(column.kind == "path" for column in columns.chosen)
        ids = "ids are the paths" if is_paths else "ids are the names next to the bytes"
    return f"images from column {images}, {ids}"


def update_manifest(folder: str, changed: pa.Table) -> None:
    """Put rows of `MANIFEST_SCHEMA` in the place of those with their ids; with the rows' metadata, if they have any."""
    changed = changed.sort_by("manifest_id")
    changed_ids = changed["manifest_id"].to_numpy()
    for part in storage.list_parquet(folder):
        ids = read_table(part, ["manifest_id"])["manifest_id"].to_numpy()  # a run of numbers
        first, end = np.searchsorted(changed_ids, [ids[0], ids[-1] + 1])
        if first < end:
            new, rows = changed.slice(first, end - first), read_table(part)
            old = rows.filter(pc.invert(pc.is_in(rows["manifest_id"], value_set=new["manifest_id"])))
            joined = pa.concat_tables([old.replace_schema_metadata(), new.replace_schema_metadata()])
            metadata = {**(rows.schema.metadata or {}), **(changed.schema.metadata or {})}
            write_table(part, joined.sort_by("manifest_id").replace_schema_metadata(metadata))


def read_image_columns(manifest: str) -> list[str]:
    """The columns that the tables of a manifest are read from, see `ImageColumns.names`; none in a manifest of earlier
    versions, or without tables."""
    names: dict[str, None] = {}
    for part in storage.list_parquet(manifest):
        filesystem, path = storage.resolve(part)
        names |= dict.fromkeys(parse_image_columns(pq.read_metadata(path, filesystem=filesystem).metadata))
    return list(names)


def image_columns_of(rows: pa.Table) -> list[str]:
    """The same for rows of a manifest that are in memory."""
    return parse_image_columns(rows.schema.metadata)


def with_image_columns(rows: pa.Table, names: Sequence[str]) -> pa.Table:
    """Rows of `MANIFEST_SCHEMA` that note from which columns their tables are read."""
    return rows.replace_schema_metadata({IMAGE_COLUMNS_KEY: json.dumps(list(names))} if names else None)


def is_tar(table_path: str) -> bool:
    """Whether what a manifest calls a table is a tar."""
    return extension_of(table_path) == "tar"


def largest_row_group(manifest: str) -> int:
    """Rows of the largest row group that the rows of a manifest lie in, or fewer where it is not listed to its end; 0
    for images that are files."""
    largest = 0
    for part in storage.list_parquet(manifest):
        filesystem, path = storage.resolve(part)
        with filesystem.open_input_file(path) as stream:
            rows = range_of(pq.read_metadata(stream), "row")
        greatest = rows[1] if rows else pc.max(read_table(part, ["row"])["row"]).as_py()
        largest = max(largest, -1 if greatest is None else greatest + 1)
    return largest


def _describe_ids(table_path: str) -> tuple[str, ...]:
    with open_table(table_path) as table:
        unused = describe_unused_ids(table.schema_arrow)
    if not unused:
        return ()
    return (
        f"{table_path}: the ids of images are not taken from {unused}: an id must be text, a number or bytes; images "
        "are named by their paths, or by the table's name and the row's number",
    )


def _tar_entries(tars: list[ListedFile]) -> Iterator[dict[str, Any]]:
    ids = tar_images.ImageIds()
    for tar in tars:
        try:
            with tar_images.open_tar(tar.location) as opened:
                for member in tar_images.list_files(opened):
                    if is_image_name(member.name):
                        block = tar_images.block_of(member)
                        yield manifest_entry(
                            ids.choose(tar.name, member), "", tar, table_path=tar.location, row_group=block, row=0
                        )
        except tar_images.DAMAGED as error:
            raise InputError(
                f"{tar.location} is damaged, ends early or is not an uncompressed tar: {error}; remove it or copy "
                "it again"
            ) from error


def _with_ids(rows: pa.Table, ids: npt.NDArray[np.int64]) -> pa.Table:
    return rows.add_column(0, MANIFEST_SCHEMA.field(0), pa.array(ids, pa.int64())).cast(MANIFEST_SCHEMA)
