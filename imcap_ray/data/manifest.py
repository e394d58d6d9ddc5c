"""An input -> its manifest: a table with one row for each image."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from imcap_ray import storage
from imcap_ray.data import tar_images
from imcap_ray.data.columns import BY_NAME, ColumnOptions, ImageColumns
from imcap_ray.data.image_formats import extension_of, is_image_name, is_in_hidden_folder
from imcap_ray.data.input_listing import Listing, count_files, describe_compressed_tars, describe_kinds, ignored_kind
from imcap_ray.data.known_images import (
    ID_CASE_KEY,
    ID_COLUMN_KEY,
    ID_SOURCE_KEY,
    IMAGE_COLUMNS_KEY,
    KnownImages,
    parse_image_columns,
    range_of,
)
from imcap_ray.data.parquet_files import read_metadata, read_table, write_table
from imcap_ray.data.parquet_images import TablePaths, open_table
from imcap_ray.data.schemas import MANIFEST_SCHEMA, ManifestEntry
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
    """The images of an input, described for the user."""

    num_images: int
    num_ignored: int
    """Number of files that are not images."""
    description: str
    notes: tuple[str, ...] = field(default=(), compare=False)
    """Remarks on how images are found and named."""
    image_column: str | None = field(default=None, compare=False)
    """Column of Parquet tables that images are read from; several are separated by commas."""
    id_column: str | None = field(default=None, compare=False)
    """Column of Parquet tables that ids are read from; None if ids are paths, names or row numbers."""
    changed: pa.Table = field(default_factory=MANIFEST_SCHEMA.empty_table, compare=False)
    """Current rows of `MANIFEST_SCHEMA` for images whose file has changed since the manifest was written."""
    removed: npt.NDArray[np.int64] | None = field(default=None, compare=False)
    """Numbers of images in the manifest that the input no longer has; None: unknown, because a limit was reached."""
    ignored: Mapping[str, int] = field(default_factory=dict, compare=False)
    """Number of files that are not images, by extension (".txt"), the most frequent first; see `ignored_kind`."""


def build_manifest(
    location: str,
    folder: str,
    options: InputOptions = DEFAULT_OPTIONS,
    *,
    output: str | None = None,
    check: Callable[[], None] = lambda: None,
    known_from: str | None = None,
    rows_per_part: int = ROWS_PER_PART,
) -> InputSummary:
    """Write the manifest of the images at `location` (folder, image, Parquet or tars) to Parquet files in `folder`.

    The images of a folder are its image files, those in its tars, and those in its Parquet tables. Tables that only
    name images are an input if there are neither image files nor tars, because otherwise they may describe these.

    Images that `folder` already lists keep their `manifest_id`, and new ones are appended. Moved images, for instance
    in a table that was renamed, get their new position. Changed images are reported, and their rows stay as they are
    until `update_manifest` is called.

    Args:
        output: the folder of the captions, which are not an input.
        check: called before anything is written; raises if this run may no longer write.
        known_from: the manifest of the images that are listed already, if it is not the one in `folder`, to which only
            new images are then written.

    Raises:
        InputError: there is no readable image, a path points outside, new tables make ids ambiguous, several columns or
            kinds of files may be meant, or the columns differ from before.
    """
    location = storage.absolute(location)
    if not storage.exists(location):
        raise InputError(f"no such input: {location}")
    known = KnownImages(known_from or folder)
    images = _InputImages(location, options, output=output, known=known)
    next_id, num_images, changed = known.next_id, 0, [MANIFEST_SCHEMA.empty_table()]
    is_listed = np.zeros(known.next_id, bool)
    entries = islice(images.entries(), options.limit)
    while chunk := list(islice(entries, rows_per_part)):
        num_images += len(chunk)
        rows = pa.Table.from_pylist(chunk, schema=MANIFEST_SCHEMA.remove(0))
        ids, is_changed, is_moved = known.find(rows)
        is_listed[ids[ids >= 0]] = True
        changed.append(_with_ids(rows.filter(is_changed), ids[is_changed]))
        if is_moved.any():
            check()
            moved = _with_ids(rows.filter(is_moved), ids[is_moved])
            update_manifest(folder, moved.replace_schema_metadata(images.metadata))
        rows = rows.filter(ids < 0)
        if rows.num_rows:
            check()
            new = _with_ids(rows, np.arange(next_id, next_id + rows.num_rows))
            part = storage.join(folder, manifest_part(next_id))
            write_table(part, new.replace_schema_metadata(images.metadata))
            next_id += rows.num_rows
    if not num_images:
        raise images.no_images_error()
    known_ids = known.ids()
    removed = None if num_images == options.limit else known_ids[~is_listed[known_ids]]
    return images.summary(num_images, changed=pa.concat_tables(changed), removed=removed)


def manifest_part(first_id: int) -> str:
    """Name of the manifest's part whose first image has this number."""
    return f"part-{first_id:012d}"


class _InputImages:
    """The images of an input, listed one by one; facts about them are known once all have been listed."""

    def __init__(self, location: str, options: InputOptions, *, output: str | None, known: KnownImages) -> None:
        self.metadata: dict[bytes, bytes] = {}
        """Metadata of the manifest's parts."""
        self.notes: list[str] = []
        self.image_column: str | None = None
        self.id_column: str | None = None
        self._location = location
        self._is_folder = storage.is_folder(location)
        self.description = "folder" if self._is_folder else "image"
        self._ignored_tables: Counter[str] = Counter()
        self._listing = Listing(location, recursive=options.recursive, output=output)
        self._options = options
        self._output = output
        self._known = known
        self._columns = ImageColumns(options.columns.image, known=known.image_columns, is_by_type=known.is_by_type)
        folder = location if self._is_folder else storage.parent(location)
        self._paths = TablePaths(folder, options.allow_outside_paths, self._columns)

    def summary(self, num_images: int, *, changed: pa.Table, removed: npt.NDArray[np.int64] | None) -> InputSummary:
        """The summary of a listing with this number of images."""
        return InputSummary(
            num_images=num_images,
            num_ignored=self._ignored().total(),
            description=self.description,
            notes=tuple(self.notes),
            image_column=self.image_column,
            id_column=self.id_column,
            changed=changed.replace_schema_metadata(self.metadata),
            removed=removed,
            ignored=dict(self._ignored().most_common()),
        )

    def no_images_error(self) -> InputError:
        """The error of an input without images."""
        kinds = self._ignored()
        number = kinds.total()
        others = f"{number:,} other file{'s' * (number != 1)} ({describe_kinds(kinds)})" if number else "nothing"
        return InputError(f"no images in {self._location}: found {others}; expected files with names like .jpg or .png")

    def _ignored(self) -> Counter[str]:
        """Number of files that were listed and are not part of the input, by `ignored_kind`."""
        return self._listing.others() + self._ignored_tables

    def entries(self) -> Iterator[ManifestEntry]:
        """Entries of a manifest: first of image files, then of images in tars and tables."""
        for file in self._listing.images():
            yield manifest_entry(file.name, file.location, file)
        listing = self._listing
        num_images, tars, tables = listing.num_images, listing.tars(), listing.tables()
        if compressed := listing.compressed_tars():
            problem = f"{self._location}: {describe_compressed_tars([file.name for file in compressed])}"
            if not (num_images or tars or tables):
                raise InputError(problem)
            self.notes.append(problem)
        if (num_images or tars) and tables:
            tables = self._choose_tables(tables)
        kinds = [self.description] if num_images else []
        kinds += [f"WebDataset, {count_files(tars, 'tar')}"] if tars else []
        kinds += [f"Parquet, {count_files(tables, 'file')}"] if tables else []
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
                + (count_files(tars, "tar") if tars else count_files(tables, "Parquet table"))
            )
        elif self._output and self._is_folder and storage.is_inside(self._location, self._output):
            raise InputError(f"OUTPUT {self._output} is inside INPUT {self._location}: choose a folder outside it")
        entries = _tar_entries(tars) if tars else self._entries_of_tables(tables)
        yield from self._with_distinct_ids(entries) if num_images else entries

    def _choose_tables(self, tables: list[ListedFile]) -> list[ListedFile]:
        """The tables with images, next to image files or tars; the others are noted."""
        chosen = self._listing.find_image_tables(self._columns)
        unreadable = self._listing.unreadable
        without = [table.name for table in tables if table not in chosen and table.name not in unreadable]
        for names, problem in ((without, "hold no images"), (unreadable, "cannot be read as Parquet")):
            if names:
                first = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
                self.notes.append(f"{self._location}: {len(names):,} of the tables {problem} and are ignored: {first}")
        self._ignored_tables = Counter(ignored_kind(table.name) for table in tables if table not in chosen)
        return chosen

    def _entries_of_tables(self, tables: list[ListedFile]) -> Iterator[ManifestEntry]:
        self._paths.check([table.location for table in tables], self._options.limit)
        id_columns = IdColumns(self._options.columns.id, known=self._known)
        ids = choose_ids(self._location, tables, self._known.id_source, self._columns, id_columns)
        self.metadata[ID_SOURCE_KEY] = IDS_FROM_POSITION.encode() if ids is None else IDS_FROM_TABLE.encode()
        if self._options.columns.id:
            self.metadata[ID_COLUMN_KEY] = self._options.columns.id.encode()
        if id_columns.in_any_case:
            self.metadata[ID_CASE_KEY] = b"any"
        if self._columns.names:
            self.metadata[IMAGE_COLUMNS_KEY] = json.dumps(self._columns.names).encode()
        if not self._options.columns.id:
            self.notes.extend(_describe_ids(tables[0].location))
        self.image_column = ", ".join(column.name for column in self._columns.chosen)
        self.id_column = ", ".join(id_columns.chosen) if ids is not None and id_columns.chosen else None
        name = tables[0].location if len(tables) == 1 else f"{self._location}, {count_files(tables, 'table')}"
        self.notes.append(f"{name}: {_describe_columns(self._columns, self.id_column, has_ids=ids is not None)}")
        return table_entries(tables, self._paths, ids)

    def _with_distinct_ids(self, entries: Iterable[ManifestEntry]) -> Iterator[ManifestEntry]:
        """The entries of tars and tables; InputError if an id is also that of an image file. Takes 12 bytes a file."""
        listing = Listing(self._location, recursive=self._options.recursive, output=self._output)
        names = tar_images.IdSet(file.name for file in listing.images())
        for entry in entries:
            if entry["image_id"] in names:
                raise InputError(
                    f"{self._location}: {entry['image_id']!r} is an image file and also the id of an image in "
                    f"{entry['table_path']}: caption the files and the tables or tars into separate OUTPUTs"
                )
            yield entry


def _describe_columns(columns: ImageColumns, id_column: str | None, *, has_ids: bool) -> str:
    """The columns of images and ids, for people."""
    if id_column:
        ids = f"ids from column {id_column}"
    elif not has_ids or columns.have_base64:
        ids = "ids are table names and row numbers"
    else:
        is_paths = any(column.kind == "path" for column in columns.chosen)
        ids = "ids are the paths" if is_paths else "ids are the names next to the bytes"
    return f"images from column {columns.describe()}, {ids}"


def update_manifest(folder: str, changed: pa.Table) -> None:
    """Replace the rows of a manifest that have the same `manifest_id`, and add the metadata of the new rows."""
    changed = changed.sort_by("manifest_id")
    changed_ids = changed["manifest_id"].to_numpy()
    for part in storage.list_work_tables(folder):
        ids = read_table(part, ["manifest_id"])["manifest_id"].to_numpy()  # consecutive numbers
        first, end = np.searchsorted(changed_ids, [ids[0], ids[-1] + 1])
        if first < end:
            new, rows = changed.slice(first, end - first), read_table(part)
            old = rows.filter(pc.invert(pc.is_in(rows["manifest_id"], value_set=new["manifest_id"])))
            joined = pa.concat_tables([old.replace_schema_metadata(), new.replace_schema_metadata()])
            metadata = {**(rows.schema.metadata or {}), **(changed.schema.metadata or {})}
            write_table(part, joined.sort_by("manifest_id").replace_schema_metadata(metadata))


def read_image_columns(manifest: str) -> list[str]:
    """The image columns of a manifest's tables, see `ImageColumns.names`; none in a manifest of earlier versions, or
    without tables."""
    names: dict[str, None] = {}
    for part in storage.list_work_tables(manifest):
        names |= dict.fromkeys(parse_image_columns(read_metadata(part).metadata))
    return list(names)


def image_columns_of(rows: pa.Table) -> list[str]:
    """The image columns of rows of a manifest, see `read_image_columns`."""
    return parse_image_columns(rows.schema.metadata)


def with_image_columns(rows: pa.Table, names: Sequence[str]) -> pa.Table:
    """Rows of `MANIFEST_SCHEMA` whose metadata name the image columns of their tables."""
    return rows.replace_schema_metadata({IMAGE_COLUMNS_KEY: json.dumps(list(names))} if names else None)


def is_tar(table_path: str) -> bool:
    """Whether the `table_path` of a manifest is that of a tar."""
    return extension_of(table_path) == "tar"


def largest_row_group(manifest: str) -> int:
    """Number of rows of the largest row group in a manifest, or fewer if it is not listed to its end; 0 for files."""
    largest = 0
    for part in storage.list_work_tables(manifest):
        rows = range_of(read_metadata(part), "row")
        greatest = rows[1] if rows else pc.max(read_table(part, ["row"])["row"]).as_py()
        largest = max(largest, -1 if greatest is None else greatest + 1)
    return largest


def _describe_ids(table_path: str) -> tuple[str, ...]:
    with open_table(table_path) as table:
        unused = describe_unused_ids(table.schema_arrow)
    if not unused:
        return ()
    return (
        f"{table_path}: {unused} cannot hold ids, which must be text, numbers or bytes; paths are the ids instead, or "
        "table names and row numbers",
    )


def _tar_entries(tars: list[ListedFile]) -> Iterator[ManifestEntry]:
    ids = tar_images.ImageIds()
    for tar in tars:
        try:
            with tar_images.open_tar(tar.location) as opened:
                for member in tar_images.list_files(opened):
                    if is_image_name(member.name) and not is_in_hidden_folder(member.name):
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
