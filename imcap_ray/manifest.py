"""The tables: the Arrow schemas of a row in (the manifest) and a row out (the captions), an input -> its manifest."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from imcap_ray import archives, storage
from imcap_ray.columns import (
    BY_NAME,
    ColumnOptions,
    ImageColumn,
    ImageColumns,
    field_type,
    holds_image_bytes,
    is_binary,
    is_string,
    read_image_column,
    require_column,
)
from imcap_ray.errors import InputChangedError, InputError
from imcap_ray.storage import ListedFile

SCHEMA_VERSION: Final = "2"

MANIFEST_SCHEMA: Final = pa.schema(
    [
        # Position of the image in the manifest: 0, 1, 2, ... Ray's progress is kept by this number,
        # for eight bytes an image are affordable at 100 million images and strings are not.
        ("manifest_id", pa.int64()),
        ("image_id", pa.string()),
        ("image_path", pa.string()),  # "" when the bytes are in a table or a tar
        ("table_path", pa.string()),  # of the table or tar; "" when the image is a file of its own
        ("row_group", pa.int32()),  # of the table; the block of a tar, see `archives`; -1 for a file
        ("row", pa.int32()),  # within `row_group`; 0 in a tar; -1 for a file
        # Of the file, the table or the tar: by these a changed image under an old name is known. -1 and 0 for what a
        # table names in a store, which would have to be asked for each image.
        ("size", pa.int64()),
        ("modified_ns", pa.int64()),
    ]
)

CAPTIONS_SCHEMA: Final = pa.schema(
    [
        ("image_id", pa.string()),
        ("image_path", pa.string()),
        ("caption", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("confidence", pa.float32()),
        ("logprob", pa.float32()),
        ("num_tokens", pa.int16()),
        ("status", pa.string()),
        ("error_code", pa.string()),
        ("error_message", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("format", pa.string()),
        ("sha256", pa.string()),
        ("duplicate_of", pa.string()),
    ]
)

OK: Final = "ok"
FAILED: Final = "failed"
DUPLICATE: Final = "duplicate"

COMPLETE: Final = "complete"
REPLACING: Final = "replacing"
"""States of a run in run.json: all rows are there; the new rows of `--overwrite` are replacing the old ones."""

NEXT_FOLDER: Final = "next"
"""Below the run's own folder: what `--overwrite` makes, until it takes the place of the old."""

IMAGE_EXTENSIONS: Final = frozenset(
    [
        "avif",
        "bmp",
        "dib",
        "gif",
        "heic",
        "heif",
        "ico",
        "j2k",
        "jfif",
        "jp2",
        "jpe",
        "jpeg",
        "jpg",
        "pbm",
        "pcx",
        "pgm",
        "png",
        "pnm",
        "ppm",
        "psd",
        "qoi",
        "svg",
        "tga",
        "tif",
        "tiff",
        "webp",
    ]
)
"""File names that are taken for images in a folder; what a file really holds is found by decoding it."""

ROWS_PER_PART: Final = 100_000

_ID_SOURCE: Final = b"imcap_ray.id_source"
"""In the metadata of a manifest of Parquet tables: whether the images' ids are `_TABLE`, those that the tables have for
them, or `_POSITION`, the table's name and the row's number."""
_TABLE: Final = "table"
_POSITION: Final = "position"

_IMAGE_COLUMNS: Final = b"imcap_ray.image_columns"
"""In the metadata of a manifest: a JSON list of the columns that the tables' images are read from, see
`ImageColumns.names`. Earlier versions wrote none."""
_ID_COLUMN: Final = b"imcap_ray.id_column"
"""In the metadata of a manifest: the column that the user named for the ids; absent if none was named."""

_READ_BYTES: Final = 2**20
"""Of a column that are asked for at once; else it would be read up to the end of the row group."""

_IDS_AT_A_TIME: Final = 4096

_UUID_BYTES: Final = 16

_MAX_PATH_CHARACTERS: Final = 4096
"""A longer text in a column of paths is no path: no system has longer ones."""

_SHOWN_CHARACTERS: Final = 60
"""Of such a text in the place of the path."""

_SIGNATURE_BYTES: Final = 64
_OBJECTS_ASKED: Final = 8
"""Of those that a table next to image files names in a store; each is a request."""

_PICKLES: Final = "arrow_pickled_object"
"""In the name of Ray's type for columns of pickled objects."""

_ID_COLUMNS: Final = ("image_id", "__key__", "key", "id")


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


def find_id_column(schema: pa.Schema) -> str | None:
    """The column of a Parquet table that holds the ids of its images, if it has one; see `can_be_id`."""
    types = dict(zip(schema.names, schema.types, strict=True))
    return next((name for name in _ID_COLUMNS if name in types and can_be_id(types[name])), None)


def build_manifest(
    location: str,
    folder: str,
    *,
    recursive: bool = True,
    limit: int | None = None,
    allow_outside_paths: bool = False,
    output: str | None = None,
    columns: ColumnOptions = BY_NAME,
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
        allow_outside_paths: whether paths in a table may lead out of `location`, or of a single table's folder.
        output: where the captions go, which must not be taken for tables of images.
        columns: of the tables, as the user names them.
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
    known = _KnownImages(known_from or folder)
    images = _InputImages(
        location,
        recursive=recursive,
        limit=limit,
        allow_outside_paths=allow_outside_paths,
        output=output,
        columns=columns,
        known=known,
    )
    next_id, num_images, changed = known.num_images, 0, []
    entries = islice(images.entries(), limit)
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
            if _extension(file.name) in self._packed:
                self._packed[_extension(file.name)].append(file)
                return
            files: Iterable[ListedFile] = [file]
        else:
            files = storage.list_files(self._location, recursive=self._recursive)
        for file in files:
            folder, _, name = file.name.rpartition("/")
            if _is_image(file.name):
                self.num_images += 1
                yield file
            elif (
                _extension(name) in self._packed
                and not name.startswith(("_", "."))
                and not (self._output and storage.is_inside(self._output, file.location))
            ):
                self._packed[_extension(name)].append(file)
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
        with _open_table(table.location) as opened:
            column = columns.look(opened, table.location)
        if column is None or (column.kind != "path" and holds_image_bytes(table.location, column) is False):
            return False
        named = _NamedFiles(self._location)
        first_row = 0
        for _, num_rows, paths in _Places(self._location, True, columns).row_groups(table.location, column):
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
        return _is_image(path) and (is_below if self._recursive else storage.parent(path) == self._location)


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
        self._num_image_names += _is_image(path) and (storage.is_uri(path) or os.path.isfile(path))
        if is_listed or self._image is not None:
            return
        if storage.is_uri(path) and not (storage.is_inside(self._folder, path) and not _is_image(path)):
            is_web = path.lower().startswith(("http://", "https://"))
            if _is_image(urlsplit(path).path) or not is_web:
                self._image = path, row
        elif self._is_there(path):
            if _is_image(path) or _begins_like_an_image(path):
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
    from imcap_ray.images import has_image_signature

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

    def __init__(
        self,
        location: str,
        *,
        recursive: bool,
        limit: int | None,
        allow_outside_paths: bool,
        output: str | None,
        columns: ColumnOptions,
        known: _KnownImages,
    ) -> None:
        self.metadata: dict[bytes, bytes] = {}
        """Of the parts of the manifest."""
        self.notes: list[str] = []
        self.image_column: str | None = None
        self.id_column: str | None = None
        self._location = location
        self._is_folder = storage.is_folder(location)
        self.description = "folder" if self._is_folder else "image"
        self._num_ignored_tables = 0
        self._listing = Listing(location, recursive=recursive, output=output)
        self._recursive = recursive
        self._limit = limit
        self._output = output
        self._options = columns
        self._known = known
        self._columns = ImageColumns(columns.image, known=known.image_columns, is_by_type=known.is_by_type)
        folder = location if self._is_folder else storage.parent(location)
        self._places = _Places(folder, allow_outside_paths, self._columns)

    @property
    def num_ignored(self) -> int:
        """Files that were listed and are no part of the input."""
        return self._listing.num_others() + self._num_ignored_tables

    def entries(self) -> Iterator[dict[str, Any]]:
        """What a manifest says of each image: files first, then what is in tars and tables."""
        for file in self._listing.images():
            yield _entry(file.name, file.location, file)
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
        if self._options.given() and not tables:
            raise InputError(
                f"{', '.join(self._options.given())} applies only to Parquet tables, and {self._location} has none "
                "with images"
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
        self._places.check([table.location for table in tables], self._limit)
        id_columns = IdColumns(self._options.id, known=self._known)
        ids = _choose_ids(self._location, tables, self._known.id_source, self._columns, id_columns)
        self.metadata[_ID_SOURCE] = _POSITION.encode() if ids is None else _TABLE.encode()
        if self._options.id:
            self.metadata[_ID_COLUMN] = self._options.id.encode()
        if self._columns.names:
            self.metadata[_IMAGE_COLUMNS] = json.dumps(self._columns.names).encode()
        if not self._options.id:
            self.notes.extend(_describe_ids(tables[0].location))
        self.image_column = ", ".join(column.name for column in self._columns.chosen)
        self.id_column = ", ".join(id_columns.chosen) if ids is not None and id_columns.chosen else None
        name = tables[0].location if len(tables) == 1 else f"{self._location}, {_count(tables, 'table')}"
        self.notes.append(f"{name}: {_describe_columns(self._columns, self.id_column, has_ids=ids is not None)}")
        return _table_entries(tables, self._places, ids)

    def _with_ids_of_their_own(self, entries: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The entries of tars and tables; InputError if one has the id of an image file. Takes 12 bytes a file."""
        listing = Listing(self._location, recursive=self._recursive, output=self._output)
        names = archives.IdSet(file.name for file in listing.images())
        for entry in entries:
            if entry["image_id"] in names:
                raise InputError(
                    f"{self._location}: {entry['image_id']!r} is an image file and also the id of an image in "
                    f"{entry['table_path']}: caption the files and the tables or tars into an OUTPUT each"
                )
            yield entry


class IdColumns:
    """Chooses for each table the column of its ids.

    Args:
        name: the column that the user names.
        known: the images of a manifest whose ids must stay the same.
    """

    def __init__(self, name: str | None = None, *, known: _KnownImages | None = None) -> None:
        self.chosen: dict[str, None] = {}
        self._name = name
        self._known = known if known and known.id_source is not None else None
        if self._known and name and self._known.id_source == _POSITION:
            raise InputError(
                f"--id-column {name}: the images known so far have the table's name and the row's number as ids: leave "
                "it out, choose another OUTPUT, or give --overwrite to start again"
            )

    def find(self, schema: pa.Schema, location: str) -> str | None:
        """The column, None if the table has none. InputError if the ids were of another column so far, or if the named
        column is not there or cannot hold ids."""
        name = self._name or find_id_column(schema)
        if self._name is not None:
            require_column(schema, self._name, location, option="--id-column")
            kind = schema.field(self._name).type
            if not can_be_id(kind):
                raise InputError(f"--id-column {name}: expected text, numbers or bytes, got {kind} in {location}")
        if self._known:
            before = self._known.id_column or find_id_column(schema)
            if before != name:
                raise InputError(
                    f"{location}: the ids of the images known so far were those of {_column_or_none(before)}, and "
                    f"would now be those of {_column_or_none(name)}: give --id-column as before, choose another "
                    "OUTPUT, or give --overwrite to start again"
                )
        if name is not None:
            self.chosen[name] = None
        return name


def _column_or_none(name: str | None) -> str:
    return f"column {name}" if name else "no column"


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


def list_table_images(
    tables: list[ListedFile], *, base: str, columns: ImageColumns, id_columns: IdColumns
) -> Iterator[dict[str, Any]]:
    """What a manifest says of each row of Parquet tables, the ids being those that `build_manifest` gives them; but
    rows may share an id or a path, as where each caption has a row. Null is the id of a row without one.

    Args:
        base: the folder of the data; whether a path leads out of it is for the caller to ask.

    Raises:
        InputError: a table is not readable or has no column of images, or a path holds a secret.
    """
    ids = _natural_ids(tables, columns, id_columns)
    if ids is not None and "name" in ids.kinds and not ids.are_distinct():  # a name beside bytes says nothing
        ids = None
    return _table_entries(tables, _Places(base, True, columns), ids)


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


def read_table(location: str, columns: list[str] | None = None) -> pa.Table:
    """A Parquet file as a whole."""
    filesystem, path = storage.resolve(location)
    with filesystem.open_input_file(path) as stream:
        return pq.read_table(stream, columns=columns)


def write_table(location: str, table: pa.Table) -> None:
    """Write a Parquet file that readers see whole or not at all."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    storage.write_bytes(location, sink.getvalue().to_pybytes())


def read_image_columns(manifest: str) -> list[str]:
    """The columns that the tables of a manifest are read from, see `ImageColumns.names`; none in a manifest of earlier
    versions, or without tables."""
    names: dict[str, None] = {}
    for part in storage.list_parquet(manifest):
        filesystem, path = storage.resolve(part)
        names |= dict.fromkeys(_image_columns(pq.read_metadata(path, filesystem=filesystem).metadata))
    return list(names)


def image_columns_of(rows: pa.Table) -> list[str]:
    """The same for rows of a manifest that are in memory."""
    return _image_columns(rows.schema.metadata)


def with_image_columns(rows: pa.Table, names: Sequence[str]) -> pa.Table:
    """Rows of `MANIFEST_SCHEMA` that note from which columns their tables are read."""
    return rows.replace_schema_metadata({_IMAGE_COLUMNS: json.dumps(list(names))} if names else None)


def _image_columns(metadata: Mapping[bytes, bytes] | None) -> list[str]:
    return [str(name) for name in json.loads((metadata or {}).get(_IMAGE_COLUMNS, b"[]"))]


def read_table_images(
    table_path: str, places: Iterable[tuple[int, int]], *, image_columns: Sequence[str] = ()
) -> Iterator[tuple[tuple[int, int], bytes | None]]:
    """The bytes in some rows of a table, each with its place (row group, row), sorted; None where the table holds none.

    A place that the table does not have is left out. Read are the pages up to the last of a row group's rows, because
    a table cannot be entered in the middle of a row group; a page is in memory at a time. No other file is opened:
    where a struct of bytes and path has only a path, `build_manifest` has made a row of that file.
    """
    rows_of: dict[int, set[int]] = defaultdict(set)
    for row_group, row in places:
        rows_of[row_group].add(row)
    filesystem, path = storage.resolve(table_path)
    with filesystem.open_input_file(path) as stream, pq.ParquetFile(stream, buffer_size=_READ_BYTES) as table:
        refuse_pickles(table.schema_arrow, table_path)
        column = read_image_column(table.schema_arrow, table_path, image_columns)
        for row_group in sorted(rows_of):
            if not 0 <= row_group < table.num_row_groups:
                continue
            rows, start = rows_of[row_group], 0
            for batch in table.iter_batches(batch_size=16, row_groups=[row_group], columns=[column.data]):
                for number, value in enumerate(_leaf(batch.column(0), "bytes"), start):
                    if number in rows:
                        yield (row_group, number), value.as_py()
                start += len(batch)
                if start > max(rows):
                    break


def is_tar(table_path: str) -> bool:
    """Whether what a manifest calls a table is a tar."""
    return _extension(table_path) == "tar"


def largest_row_group(manifest: str) -> int:
    """Rows of the largest row group that the rows of a manifest lie in, or fewer where it is not listed to its end; 0
    for images that are files."""
    largest = 0
    for part in storage.list_parquet(manifest):
        filesystem, path = storage.resolve(part)
        with filesystem.open_input_file(path) as stream:
            rows = _range_of(pq.read_metadata(stream), "row")
        greatest = rows[1] if rows else pc.max(read_table(part, ["row"])["row"]).as_py()
        largest = max(largest, -1 if greatest is None else greatest + 1)
    return largest


def _leaf(values: pa.Array | pa.ChunkedArray, name: str) -> pa.Array | pa.ChunkedArray:
    """A field of structs; values that are no structs as they are."""
    return pc.struct_field(values, name) if pa.types.is_struct(values.type) else values


def refuse_pickles(schema: pa.Schema, location: str) -> None:
    """Raise InputError if a table has a column of pickled Python objects, as Ray Data can write them.

    Whoever turns such a value into a Python object runs the code in it. Ray's own reader refuses them, pyarrow's
    does not.
    """
    for column in schema:
        if _PICKLES in pa.schema([column]).to_string(truncate_metadata=False):
            raise InputError(
                f"{location}: the column {column.name} holds pickled Python objects, which run code when they are "
                "read: leave it out of the table"
            )


def _extension(name: str) -> str:
    return name.rpartition(".")[2].lower() if "." in name else ""


def _is_image(name: str) -> bool:
    return _extension(name) in IMAGE_EXTENSIONS and not name.rpartition("/")[2].startswith(".")


def _entry(
    image_id: str, image_path: str, file: ListedFile, *, table_path: str = "", row_group: int = -1, row: int = -1
) -> dict[str, Any]:
    return {
        "image_id": image_id,
        "image_path": image_path,
        "table_path": table_path,
        "row_group": row_group,
        "row": row,
        "size": file.size,
        "modified_ns": file.modified_ns,
    }


def _choose_ids(
    location: str, tables: list[ListedFile], source: str | None, columns: ImageColumns, id_columns: IdColumns
) -> _NaturalIds | None:
    """The ids of the tables' rows, None where these are known by table and number.

    Args:
        source: where the images that are known already have theirs from; None where none is known. It stays, or all of
            them would be others.
    """
    if source == _POSITION:
        return None
    ids = _natural_ids(tables, columns, id_columns)
    if ids is None or ids.are_distinct():
        return ids
    counts = pc.value_counts(ids.values.drop_null())
    repeated = next((entry["values"].as_py() for entry in counts if entry["counts"].as_py() > 1), None)
    if source is None and (repeated is None or "id" not in ids.kinds):
        return None  # a name beside bytes may be the same for all images
    problem = "some rows have none" if repeated is None else f"{repeated!r} occurs more than once"
    if "id" in ids.kinds:
        raise InputError(f"{location}: image ids must be unique, but {problem}; --id-column names the column of ids")
    raise InputError(
        f"{location}: its images were known by their paths so far, which new tables have made ambiguous ({problem}): "
        "choose another OUTPUT, or give --overwrite to start again"
    )


def _describe_ids(table_path: str) -> tuple[str, ...]:
    with _open_table(table_path) as table:
        unused = describe_unused_ids(table.schema_arrow)
    if not unused:
        return ()
    return (
        f"{table_path}: the ids of images are not taken from {unused}: an id must be text, a number or bytes; images "
        "are named by their paths, or by the table's name and the row's number",
    )


@dataclass(frozen=True, slots=True)
class _NaturalIds:
    """The ids that the rows of Parquet tables have of their own, null for a row without one."""

    values: pa.ChunkedArray
    """Of all tables, one after the other."""
    num_rows: Mapping[str, int]
    """By table."""
    kinds: frozenset[str]
    """`id`: of a column of ids; `path` of an image's file; `name` next to its bytes."""

    def are_distinct(self) -> bool:
        """Whether each row has an id of its own."""
        return not self.values.null_count and pc.count_distinct(self.values).as_py() == len(self.values)

    def by_table(self) -> dict[str, pa.ChunkedArray]:
        """The ids of each table."""
        ends = np.cumsum([*self.num_rows.values()])
        return {
            table: self.values.slice(end - count, count)
            for (table, count), end in zip(self.num_rows.items(), ends, strict=True)
        }


def _table_entries(tables: list[ListedFile], places: _Places, ids: _NaturalIds | None) -> Iterator[dict[str, Any]]:
    """What a manifest says of each row.

    Raises:
        InputChangedError: a table has another number of rows than it has ids, because it has been rewritten since.
    """
    ids_of = ids.by_table() if ids is not None else {}
    for table in tables:
        natural = iter(ids_of[table.location].to_pylist()) if ids is not None else None
        first_row = 0
        for row_group, num_rows, image_paths in places.row_groups(table.location):
            if ids is not None and first_row + num_rows > ids.num_rows[table.location]:
                raise _rewritten(table)
            for row in range(num_rows):
                image_id = next(natural) if natural is not None else f"{table.name}#{first_row + row}"
                image_path = image_paths[row] if image_paths is not None else None
                if image_path is None:
                    yield _entry(image_id, "", table, table_path=table.location, row_group=row_group, row=row)
                else:
                    yield _entry(image_id, image_path, _named_file(image_path))
            first_row += num_rows
        if ids is not None and first_row != ids.num_rows[table.location]:
            raise _rewritten(table)


def _rewritten(table: ListedFile) -> InputChangedError:
    return InputChangedError(f"{table.location} was rewritten while it was listed: run the same command again")


def _named_file(location: str) -> ListedFile:
    """A file that a table names, as a listing of its folder shows it."""
    if not storage.is_uri(location):
        with suppress(OSError, ValueError):  # its row will say what is wrong with the path
            return storage.describe_file(location)
    return ListedFile(location, location, -1, 0)


def _tar_entries(tars: list[ListedFile]) -> Iterator[dict[str, Any]]:
    ids = archives.ImageIds()
    for tar in tars:
        try:
            with archives.open_tar(tar.location) as opened:
                for member in archives.list_files(opened):
                    if _is_image(member.name):
                        block = archives.block_of(member)
                        yield _entry(
                            ids.choose(tar.name, member), "", tar, table_path=tar.location, row_group=block, row=0
                        )
        except archives.DAMAGED as error:
            raise InputError(
                f"{tar.location} is damaged, ends early or is not an uncompressed tar: {error}; remove it or copy "
                "it again"
            ) from error


@contextmanager
def _open_table(table_path: str) -> Iterator[pq.ParquetFile]:
    filesystem, path = storage.resolve(table_path)
    try:
        with filesystem.open_input_file(path) as stream, pq.ParquetFile(stream) as table:
            refuse_pickles(table.schema_arrow, table_path)
            yield table
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{table_path} is not readable Parquet: {error}") from error


class _Places:
    """Where the images are that tables only name, in the folder that their paths must not leave."""

    def __init__(self, folder: str, allow_outside_paths: bool, columns: ImageColumns) -> None:
        self._folder = folder
        self._allow_outside_paths = allow_outside_paths
        self._columns = columns

    def check(self, tables: list[str], limit: int | None) -> None:
        """InputError for the first path in so many rows that leads where it may not."""
        num_rows = 0
        for table_path in tables:
            for _, count, _ in self.row_groups(table_path):
                num_rows += count
                if limit is not None and num_rows >= limit:
                    return

    def row_groups(
        self, table_path: str, column: ImageColumn | None = None
    ) -> Iterator[tuple[int, int, list[str | None] | None]]:
        """Number and rows of each row group, and where its images are: None for one, or all, with bytes in the table.

        Of a struct's bytes nothing is read where the table's statistics say that there are bytes in all its rows, or
        in none.
        """
        with _open_table(table_path) as table:
            column = column or self._columns.get(table, table_path)
            first_row = 0
            for row_group in range(table.num_row_groups):
                num_rows = table.metadata.row_group(row_group).num_rows
                paths = _read_paths(table, row_group, column)
                image_paths: list[str | None] | None = None
                if paths is not None:
                    image_paths = [
                        None if path is None else self._place(path, table_path, first_row + row)
                        for row, path in enumerate(paths)
                    ]
                yield row_group, num_rows, image_paths
                first_row += num_rows

    def _place(self, path: str, table_path: str, row: int) -> str:
        if not _can_be_path(path):
            path = f"{path[:_SHOWN_CHARACTERS]}... ({len(path):,} characters)"
        return storage.place(
            path,
            base=storage.parent(table_path),
            folders=[self._folder],
            source=f"{table_path}, row {row}",
            allow_outside=self._allow_outside_paths,
        )


def _read_paths(table: pq.ParquetFile, row_group: int, column: ImageColumn) -> list[str | None] | None:
    """The path in each row of a row group that has no bytes, None in the others; None if there is no such row."""
    if column.kind == "path":
        paths = _texts(table.read_row_group(row_group, columns=[column.name]).column(0))
        return [path or "" for path in paths]
    if column.kind == "bytes" or not is_string(field_type(table.schema_arrow.field(column.name).type, "path")):
        return None
    num_rows, num_missing = table.metadata.row_group(row_group).num_rows, _num_nulls(table, row_group, column.data)
    if num_missing == 0:
        return None
    paths = _texts(_leaf(table.read_row_group(row_group, columns=[f"{column.name}.path"]).column(0), "path"))
    if num_missing != num_rows:
        batches = table.iter_batches(batch_size=16, row_groups=[row_group], columns=[column.data])
        has_bytes = [found for batch in batches for found in _leaf(batch.column(0), "bytes").is_valid().to_pylist()]
        paths = [None if found else path for found, path in zip(has_bytes, paths, strict=True)]
    return [path or None for path in paths]


def _num_nulls(table: pq.ParquetFile, row_group: int, column_path: str) -> int | None:
    """How many rows have no value in this column, if the table says it."""
    metadata = table.metadata.row_group(row_group)
    for number in range(metadata.num_columns):
        column = metadata.column(number)
        if column.path_in_schema == column_path and column.statistics and column.statistics.has_null_count:
            return int(column.statistics.null_count)
    return None


def _natural_ids(tables: list[ListedFile], columns: ImageColumns, id_columns: IdColumns) -> _NaturalIds | None:
    """The ids the tables have of their own, None when one of them has none."""
    chunks: list[pa.Array] = []
    num_rows, kinds = {}, set()
    for listed in tables:
        with _open_table(listed.location) as table:
            schema = table.schema_arrow
            column = columns.get(table, listed.location)
            id_column = id_columns.find(schema, listed.location)
            if id_column is not None:
                kind = "id"
            elif column.kind == "path":
                id_column, kind = column.name, "path"
            elif column.kind == "struct" and schema.field(column.name).type.get_field_index("path") >= 0:
                id_column, kind = f"{column.name}.path", "name"
            else:
                return None
            kinds.add(kind)
            num_rows[listed.location] = 0
            for batch in table.iter_batches(batch_size=_IDS_AT_A_TIME, columns=[id_column]):
                ids = id_texts(_leaf(batch.column(0), "path"))
                if kind != "id":
                    ids = _without_contents(ids, listed.name, num_rows[listed.location])
                chunks.append(ids)
                num_rows[listed.location] += len(ids)
    return _NaturalIds(pa.chunked_array(chunks, pa.string()), num_rows, frozenset(kinds))


def id_texts(values: pa.Array) -> pa.Array:
    """Ids of any type that `can_be_id` as strings: numbers, times and the like as Arrow writes them, bytes as text if
    they are printable UTF-8 and else in hexadecimal, as those of UUIDs are. Null stays null."""
    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    kind = values.type
    if kind == pa.binary(_UUID_BYTES):
        return pa.array([value and value.hex() for value in values.to_pylist()], pa.string())
    if _is_bytes(kind):
        return pa.array([value and _text_or_hex(value) for value in values.to_pylist()], pa.string())
    return _valid_texts(values) if is_string(kind) else values.cast(pa.string())


def can_be_id(kind: pa.DataType) -> bool:
    """Whether values of this type can name images: not those that are made of several values."""
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return not pa.types.is_nested(kind)


def describe_unused_ids(schema: pa.Schema) -> str:
    """The columns that are named like ids and cannot be ids, with their types, if the table has no others; else ""."""
    if find_id_column(schema) is not None:
        return ""
    return ", ".join(f"{name} ({schema.field(name).type})" for name in _ID_COLUMNS if name in schema.names)


def _is_bytes(kind: pa.DataType) -> bool:
    return is_binary(kind) or bool(pa.types.is_fixed_size_binary(kind) or pa.types.is_binary_view(kind))


def _text_or_hex(value: bytes) -> str:
    with suppress(UnicodeDecodeError):
        text = value.decode()
        if text.isprintable():
            return text
    return value.hex()


def _valid_texts(values: pa.Array) -> pa.Array:
    """Strings as `pa.string`, with bytes that are not UTF-8 written as `\\xff`: Parquet's readers do not check them."""
    values = values.cast(pa.string())
    try:
        values.validate(full=True)
    except pa.ArrowInvalid:
        texts = values.cast(pa.binary()).to_pylist()
        values = pa.array([text and text.decode("utf-8", "backslashreplace") for text in texts], pa.string())
    return values


def _texts(values: pa.ChunkedArray) -> list[str | None]:
    return [text for chunk in values.chunks for text in _valid_texts(chunk).to_pylist()]


def _without_contents(paths: pa.Array, table_name: str, first_row: int) -> pa.Array:
    """Paths that serve as ids; where one is no path but content, as a data URI is, the table's name and the row's
    number."""
    if not any(path is not None and not _can_be_path(path) for path in paths.to_pylist()):
        return paths
    return pa.array(
        [
            path if path is None or _can_be_path(path) else f"{table_name}#{row}"
            for row, path in enumerate(paths.to_pylist(), first_row)
        ],
        pa.string(),
    )


def _can_be_path(text: str) -> bool:
    return len(text) <= _MAX_PATH_CHARACTERS and text[:5].lower() != "data:"


class _KnownImages:
    """The images that a manifest lists already, looked up without holding them all.

    A listing comes in the order in which the manifest was written, so that one part after the other is needed; which
    part may hold an id is told by the least and the greatest id in each.
    """

    def __init__(self, folder: str) -> None:
        self.num_images = 0
        self.id_source: str | None = None
        """`_TABLE` or `_POSITION` where these are rows of Parquet tables."""
        self.id_column: str | None = None
        """The column of ids that the user named."""
        self.image_columns: list[str] = []
        """See `ImageColumns.names`."""
        self._parts: list[tuple[str, tuple[str, str] | None]] = []
        for part in storage.list_parquet(folder):
            filesystem, path = storage.resolve(part)
            metadata = pq.read_metadata(path, filesystem=filesystem)
            self.num_images += metadata.num_rows
            self.id_source = ((metadata.metadata or {}).get(_ID_SOURCE) or b"").decode() or self.id_source
            self.id_column = ((metadata.metadata or {}).get(_ID_COLUMN) or b"").decode() or self.id_column
            self.image_columns = list(dict.fromkeys([*self.image_columns, *_image_columns(metadata.metadata)]))
            self._parts.append((part, _range_of(metadata, "image_id")))

    @property
    def is_by_type(self) -> bool:
        """Whether these are rows of tables, listed by a version that did not note the columns of images."""
        return self.id_source is not None and not self.image_columns

    def find(self, rows: pa.Table) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """For rows of a listing their `manifest_id`, -1 where they are new; whether they have changed since; whether
        they have not, but are in another place."""
        ids = np.full(rows.num_rows, -1, np.int64)
        is_changed, is_moved = np.zeros(rows.num_rows, bool), np.zeros(rows.num_rows, bool)
        least, greatest = pc.min_max(rows["image_id"]).as_py().values()
        for part, known_range in self._parts:
            if (ids >= 0).all():
                break
            if known_range and (known_range[1] < least or known_range[0] > greatest):
                continue
            part_rows = read_table(part)
            found = pc.index_in(rows["image_id"], value_set=part_rows["image_id"]).to_numpy(zero_copy_only=False)
            here = np.flatnonzero(~np.isnan(found))
            there = found[here].astype(np.int64)
            ids[here] = part_rows["manifest_id"].to_numpy()[there]
            before, now = part_rows.take(there), rows.take(here)
            is_changed[here] = _differ(before, now, "size", "modified_ns")
            is_moved[here] = ~is_changed[here] & _differ(before, now, "image_path", "table_path", "row_group", "row")
        return ids, is_changed, is_moved


def _range_of(metadata: pq.FileMetaData, name: str) -> tuple[Any, Any] | None:
    """The least and the greatest value of a column of a manifest; None if the file does not have them: Parquet keeps
    none of text longer than 4 KB."""
    column = MANIFEST_SCHEMA.get_field_index(name)
    ranges = [metadata.row_group(number).column(column).statistics for number in range(metadata.num_row_groups)]
    if not ranges or any(one is None or not one.has_min_max for one in ranges):
        return None
    return min(one.min for one in ranges), max(one.max for one in ranges)


def _differ(one: pa.Table, other: pa.Table, *columns: str) -> npt.NDArray[np.bool_]:
    """In which rows two tables differ in any of these columns."""
    differ = np.zeros(one.num_rows, bool)
    for name in columns:
        differ |= pc.not_equal(one[name], other[name]).to_numpy()
    return differ


def _with_ids(rows: pa.Table, ids: npt.NDArray[np.int64]) -> pa.Table:
    return rows.add_column(0, MANIFEST_SCHEMA.field(0), pa.array(ids, pa.int64())).cast(MANIFEST_SCHEMA)


def is_part(path: str) -> bool:
    """Whether a run wrote this file into its output, by Ray's names; others there are somebody else's."""
    return re.fullmatch(r"[0-9a-f]{32}_[0-9]{6,}\.parquet", path.rpartition("/")[2]) is not None


def open_captions(location: str) -> pads.Dataset:
    """The captions of a folder or a Parquet file, to be read a piece at a time.

    Where a run has written into the folder, what else lies there is left out.

    Raises:
        InputError: nothing there, no captions table, or rows of two runs because one is replacing those of the other.
    """
    location = storage.absolute(location)
    if not storage.exists(location):
        raise InputError(f"no such captions: {location}")
    filesystem = storage.resolve(location)[0]
    try:
        files = [location] if storage.is_file(location) else storage.list_parquet(location)
        files = [path for path in files if is_part(path)] or files
        captions = pads.dataset([storage.resolve(path)[1] for path in files], filesystem=filesystem, format="parquet")
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{location} is not readable Parquet: {error}") from error
    refuse_replacement(location)  # after the files were listed: a replacement that began since removes some of them
    refuse_pickles(captions.schema, location)
    missing = {"image_id", "caption"} - set(captions.schema.names)
    if missing:
        found = ", ".join(captions.schema.names) or "no Parquet file"
        raise InputError(f"{location} is no captions table: expected the columns image_id and caption, got {found}")
    return captions


def refuse_replacement(captions: str) -> None:
    """Raise InputError if a run is replacing the rows of this folder by new ones, or was when it was killed.

    Earlier versions did not write the state `replacing`; what they left is known by a complete run in `next`.
    """
    run = read_run(captions)
    if run is None:
        return
    new = read_run(storage.join(folder_of(captions), "_imcap", NEXT_FOLDER)) or {}
    if run.get("state") == REPLACING or new.get("state") == COMPLETE:
        raise InputError(
            f"{folder_of(captions)} may hold rows of two runs, because `imcap caption --overwrite` is replacing the "
            "old rows by the new ones: wait until it has finished; if it was killed, the same command finishes it"
        )


def folder_of(captions: str) -> str:
    """The folder of a captions table that is a folder or a Parquet file."""
    location = storage.absolute(captions)
    return storage.parent(location) if storage.is_file(location) else location


def read_run(captions: str) -> dict[str, Any] | None:
    """What `_imcap/run.json` of a captions folder, or of the folder of a captions file, says; None where there is none.

    Raises:
        InputError: it is damaged.
    """
    location = storage.join(folder_of(captions), "_imcap", "run.json")
    if not storage.exists(location):
        return None
    try:
        run = json.loads(storage.read_bytes(location))
    except ValueError as error:
        raise InputError(f"{location} is damaged: {error}") from error
    return run if isinstance(run, dict) else {}


def image_placer(
    captions: str, *, folders: Sequence[str] = (), allow_outside_paths: bool = False
) -> Callable[[Mapping[str, Any], str], str]:
    """A function that says where the file is that the row of a captions table, or of its run's manifest, names.

    It must be in the input that `run.json` names, below the captions or in one of `folders`; a row that names another
    file is an InputError, unless `allow_outside_paths`. This guards against a table that is not ours among those of a
    run, not against a run that was made up.
    """
    base = folder_of(captions)
    places = [str((read_run(captions) or {}).get("input", "")), base, *folders]
    inside = [storage.parent(place) if place.endswith((".parquet", ".tar")) else place for place in places if place]

    def place(row: Mapping[str, Any], path: str) -> str:
        source = f"{captions}, image {row['image_id']!r}"
        return storage.place(path, base=base, folders=inside, source=source, allow_outside=allow_outside_paths)

    return place
