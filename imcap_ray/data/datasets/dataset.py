"""The table of captioned images, and the `Collector` through which the reader of any format fills it.

A format is a module with a `FORMAT: DatasetFormat`, listed in `detection`.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Final, NamedTuple, TypedDict

import pyarrow as pa

from imcap_ray import storage
from imcap_ray.data.columns import BY_NAME, ColumnOptions
from imcap_ray.data.input_listing import Listing, packed_kind
from imcap_ray.data.manifest import with_image_columns
from imcap_ray.data.schemas import MANIFEST_SCHEMA
from imcap_ray.errors import DatasetError
from imcap_ray.storage import ListedFile
from imcap_ray.text.encodings import decode_text

TRAIN: Final = "train"

VALIDATION: Final = "validation"

TEST: Final = "test"

SPLITS: Final = (TRAIN, VALIDATION, TEST)

DATASET_SCHEMA: Final = pa.schema(
    [
        ("image_id", pa.string()),
        ("image_path", pa.string()),
        ("split", pa.string()),
        ("captions", pa.list_(pa.string())),
    ]
)


class DatasetRow(TypedDict):
    """One image of `DATASET_SCHEMA`."""

    image_id: str
    image_path: str
    """Location of the file; for an image in a tar or table a key of `CaptionedImages.packed`; "" if there is none."""
    split: str
    captions: list[str]


# Usual names of the splits. Karpathy's restval, the rest of COCO's validation images, is for training.
SPLIT_NAMES: Final[Mapping[str, str]] = {
    **dict.fromkeys(("train", "training", "restval"), TRAIN),
    **dict.fromkeys(("validation", "valid", "val", "dev", "development"), VALIDATION),
    **dict.fromkeys(("test", "testing"), TEST),
}

NUM_EXAMPLES: Final = 3
"""Number of examples that a note names; the rest is counted."""

_REQUESTS_AT_A_TIME: Final = 16

_LINE_ENDS_AND_TABS: Final = re.compile(r"[\t\r\n]+")

_SURROGATES: Final = re.compile("[\ud800-\udfff]")


class PackedImage(NamedTuple):
    """Position of an image's bytes in a Parquet table or a tar, as in `MANIFEST_SCHEMA`."""

    table_path: str
    row_group: int
    row: int


class Leak(NamedTuple):
    """An image that the data assign to two splits."""

    image: str
    split: str
    """The split that it has in the data set's table."""
    other: str


_NOT_PACKED: Final = PackedImage("", -1, -1)

_UNKNOWN_FILE: Final = ListedFile("", "", -1, 0)


@dataclass(frozen=True, slots=True)
class CaptionedImages:
    """A data set: its table (`DATASET_SCHEMA`, one row per image) and the problems found while reading it."""

    location: str
    format: str
    """Name for people: "Flickr8k as distributed"."""
    table: pa.Table
    notes: list[str] = field(default_factory=list)
    """One line for each kind of problem, with its count and the first few examples."""
    terms: str = ""
    """Origin and licence of the data, as far as the format implies them."""
    left_out: pa.Table = field(default_factory=DATASET_SCHEMA.empty_table)
    """Rows of captioned images that are in none of the official splits; `split` is ""."""
    packed: Mapping[str, PackedImage] = field(default_factory=dict)
    """By `image_path`, the images that are not separate files. Such a path consists of the tar and a member's name, or
    of the table and a row's number."""
    tables: Mapping[str, ListedFile] = field(default_factory=dict)
    """By location, size and time of the tables and tars when they were read."""
    leaks: list[Leak] = field(default_factory=list)
    """Images in two splits; see `load_dataset(refuse_leaks=...)`."""
    without_captions: frozenset[str] = frozenset()
    """Ids of images that exist and have no caption, as far as the format shows them."""
    columns: ColumnOptions = BY_NAME
    """Columns of tables that the user named."""
    image_columns: tuple[str, ...] = ()
    """Columns of Parquet tables that packed images are read from, see `columns.ImageColumns.names`."""
    has_official_splits: bool = True
    """Whether the data name the splits; otherwise they are `split_of` the names."""
    columns_note: str = ""
    """Description of the columns of tables that the data were read from."""

    def split(self, name: str) -> pa.Table:
        """The rows of one split; DatasetError if it has none."""
        rows = self.table.filter(pa.compute.equal(self.table["split"], name))
        if not rows.num_rows:
            raise DatasetError(f"{self.location} has no {name} images: it has {self.describe_splits()}")
        return rows

    def count_splits(self) -> dict[str, int]:
        """Number of images by split; splits without images are left out."""
        rows = self.table.group_by("split").aggregate([([], "count_all")]).to_pylist()
        counts = {row["split"]: row["count_all"] for row in rows}
        return {name: counts[name] for name in SPLITS if name in counts}

    def describe_splits(self) -> str:
        """The splits with their numbers of images, for people."""
        return ", ".join(f"{count:,} {name}" for name, count in self.count_splits().items()) or "nothing"

    def references(self, split: str | None = None) -> dict[str, list[str]]:
        """image_id -> captions, of one split or of all images."""
        rows = self.split(split) if split else self.table
        return dict(zip(rows["image_id"].to_pylist(), rows["captions"].to_pylist(), strict=True))

    def manifest(self, rows: pa.Table) -> pa.Table:
        """Rows of `table` that have images -> rows of `MANIFEST_SCHEMA`, whose `manifest_id` is the row's number.

        Tables and tars have the size and time of when the data set was read; files have the current ones.
        """
        paths = rows["image_path"].to_pylist()
        positions = [self.packed.get(path, _NOT_PACKED) for path in paths]
        listed = storage.describe_files(
            path for path, position in zip(paths, positions, strict=True) if position is _NOT_PACKED and path
        )
        listed |= self.tables
        tables = {position.table_path for position in positions if position.table_path}
        listed |= describe_tables(tables - self.tables.keys())
        files = [
            listed.get(position.table_path or path, _UNKNOWN_FILE)
            for path, position in zip(paths, positions, strict=True)
        ]
        manifest = pa.table(
            [
                range(len(paths)),
                rows["image_id"],
                [path if position is _NOT_PACKED else "" for path, position in zip(paths, positions, strict=True)],
                [position.table_path for position in positions],
                [position.row_group for position in positions],
                [position.row for position in positions],
                [file.size for file in files],
                [file.modified_ns for file in files],
            ],
            schema=MANIFEST_SCHEMA,
        )
        return with_image_columns(manifest, self.image_columns)


class FolderContents:
    """Images, tars and tables of a folder, as `imcap caption` lists them; listed on first use."""

    def __init__(self, location: str) -> None:
        self.location = location

    @cached_property
    def _listed(self) -> tuple[Listing, list[ListedFile]]:
        listing = Listing(self.location)
        return listing, list(listing.images())

    @property
    def listing(self) -> Listing:
        """The listing, complete."""
        return self._listed[0]

    @property
    def images(self) -> list[ListedFile]:
        """The image files."""
        return self._listed[1]

    def files_of_kind(self, kind: str) -> list[str]:
        """Names of the files of one of `PACKED_KINDS`."""
        if kind == "compressed tar":
            return [file.name for file in self.listing.compressed_tars()]
        return self.tars if kind == "tar" else self.tables

    @property
    def tars(self) -> list[str]:
        """Names of the tars."""
        return [file.name for file in self.listing.tars()]

    @property
    def tables(self) -> list[str]:
        """Names of the Parquet tables."""
        return [file.name for file in self.listing.tables()]


@dataclass(frozen=True, slots=True)
class Source:
    """A data set as the user names it: a folder, or one file of it."""

    location: str
    base: str
    """The folder that names of images are relative to and must not point out of."""
    files: tuple[str, ...]
    """Names of the files directly in the folder; the name of a single file."""
    columns: ColumnOptions = BY_NAME
    """Columns of tables that the user names."""
    is_deep: bool = False
    """Whether tars and tables are searched in all folders below, and not only in the usual ones."""
    contents: FolderContents | None = None
    """Contents of the folder; None for a file."""

    @property
    def is_file(self) -> bool:
        """Whether the user names a single file."""
        return self.base != self.location

    def files_of_kind(self, kind: str) -> list[str]:
        """Names below `base` of the files of one of `PACKED_KINDS`, sorted, without hidden ones.

        If any are in the usual folders, see `usual_files_of_kind`, or if `is_deep`, these are the files of all folders:
        the same ones that `imcap caption` reads.
        """
        names = set() if self.is_deep else {*self.usual_files_of_kind(kind)}
        if self.contents and (names or self.is_deep):
            names.update(self.contents.files_of_kind(kind))
        return sorted(names)

    def usual_files_of_kind(self, kind: str) -> list[str]:
        """The files directly in the folder, in folders named after splits, and in Hugging Face's `data`."""
        names = list(self.files)
        if not self.is_file:
            for folder in (*SPLIT_NAMES, "data"):
                location = storage.join(self.base, folder)
                if storage.is_folder(location):
                    names += [f"{folder}/{file.name}" for file in storage.list_files(location, recursive=False)]
        visible = (name for name in names if not name.rpartition("/")[2].startswith((".", "_")))
        return sorted(name for name in visible if packed_kind(name) == kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetFormat:
    """A format of captioned images."""

    description: str
    """Part of the list of expected formats in an error message."""
    read: Callable[[Source], CaptionedImages | None]
    """Reads a data set; returns None for data of another format."""
    is_packed: bool = False
    """Whether images are in tars or tables, which are then searched in all folders below as well."""
    covers_folder: bool = False
    """Whether the data set is all that the folder holds: other images are counted, other captioned images refused."""


class Collector:
    """Collects images, their captions and splits, and problems, while the reader of a format finds them."""

    def __init__(self, source: Source, format_name: str, *, terms: str = "") -> None:
        self.source = source
        self.captions: dict[str, list[str]] = defaultdict(list)
        self.splits: dict[str, str] = {}
        self.format = format_name
        self.terms = terms
        self._paths: dict[str, str] = {}
        self._problems: dict[tuple[str, str], list[str]] = defaultdict(list)
        self.without_captions: set[str] = set()
        self._leaks: dict[str, Leak] = {}

    def add_problem(self, one: str, many: str, where: str) -> None:
        """Count a problem. `one` or `many` follows the number: "line is blank", "lines are blank"."""
        self._problems[one, many].append(where)

    def add_uncaptioned(self, image_id: str, *, where: str) -> None:
        """Count an image that exists and has no caption."""
        self.without_captions.add(image_id)
        self.add_problem("image has no caption", "images have no caption", where)

    def add(
        self, image_id: str, captions: Iterable[str], *, where: str, path: str | None = None, split: str = ""
    ) -> None:
        """Add captions of an image; blank ones are counted and left out.

        Args:
            where: position in the file, for people.
            path: the image's location; None: `image_id` in the folder given to `to_dataset`.
            split: any usual name of the official split; "" for none.
        """
        if not image_id or _SURROGATES.search(image_id):
            self.add_problem(
                "image name is empty or not valid Unicode", "image names are empty or not valid Unicode", where
            )
            return
        kept = []
        for caption in captions:
            text = _LINE_ENDS_AND_TABS.sub(" ", caption).strip()
            if _SURROGATES.search(text):
                self.add_problem("caption is not valid Unicode", "captions are not valid Unicode", where)
                text = _SURROGATES.sub("\ufffd", text)
            if text:
                kept.append(text)
            else:
                self.add_problem("caption is blank", "captions are blank", where)
        if not kept:
            return
        if path and self._paths.get(image_id, path) != path:
            self.add_problem(
                "name is also that of another image, whose captions are left out",
                "names are also those of other images, whose captions are left out",
                f"{image_id} ({where})",
            )
            return
        self.captions[image_id] += kept
        if path is not None:
            self._paths.setdefault(image_id, path)
        if split:
            self.assign_split(image_id, split)

    def assign_split(self, image_id: str, split: str) -> None:
        """Set the official split of an image; DatasetError for an unknown name."""
        name = SPLIT_NAMES.get(split.strip().lower())
        if name is None:
            raise DatasetError(
                f"{self.source.location}: split must be {', '.join(SPLITS)}, got {split!r} at {image_id}"
            )
        known = self.splits.setdefault(image_id, name)
        if known != name:
            self._leaks.setdefault(image_id, Leak(image_id, known, name))

    def decode(self, data: bytes, name: str) -> str:
        """The text of a file; an encoding other than UTF-8 is noted."""
        decoded = decode_text(data)
        if decoded.encoding != "UTF-8":
            self.add_problem(f"file is {decoded.encoding}", f"files are {decoded.encoding}", name)
        for number in decoded.windows_lines:
            self.add_problem(
                "line is not UTF-8 and is read as Windows-1252 (latin-1)",
                "lines are not UTF-8 and are read as Windows-1252 (latin-1)",
                f"{name} line {number}",
            )
        return decoded.text

    def read_text(self, name: str) -> str:
        """The text of a file below the folder of the data."""
        location = storage.join(self.source.base, name)
        try:
            return self.decode(storage.read_bytes(location), name)
        except OSError as error:
            raise DatasetError(f"{location} cannot be read: {error}") from error

    def to_dataset(
        self,
        *,
        folder: str = "",
        packed: Mapping[str, PackedImage] | None = None,
        tables: Mapping[str, ListedFile] | None = None,
    ) -> CaptionedImages:
        """The data set, with the official splits if any image has one, otherwise with splits by a hash of the names.

        Args:
            folder: location of the images that were added without a path.
            tables: by location, the tables and tars that were read, as `describe_tables` described them before.

        Raises:
            DatasetError: nothing is usable, or a table or tar was rewritten while it was read.
        """
        location = self.source.location
        _refuse_rewritten(tables or {})
        has_splits = bool(self.splits)
        splits = self.splits if has_splits else self._hashed_splits()
        chosen = [image_id for image_id in splits if image_id in self.captions]
        left_out = [image_id for image_id in self.captions if image_id not in splits]
        for image_id in left_out:
            self.add_problem("captioned image is in no split", "captioned images are in no split", image_id)
        for image_id in (image_id for image_id in splits if image_id not in self.captions):
            self.add_problem("image of the splits has no caption", "images of the splits have no caption", image_id)
        notes = [_describe_problem(kind, positions) for kind, positions in self._problems.items()]
        if not chosen:
            reason = "no captioned image is in a split" if left_out else "without a single caption"
            raise DatasetError("; ".join([f"{location}: {self.format}, {reason}", *notes]))
        if not has_splits:
            notes.append("no official splits: each image's split is a hash of its name")
        table = self._rows(chosen, splits, folder)
        leaks = [*self._leaks.values()] or _find_leaked_files(table)
        return CaptionedImages(
            location,
            self.format,
            table,
            notes,
            self.terms,
            left_out=self._rows(left_out, {}, folder),
            packed=packed or {},
            tables=tables or {},
            leaks=leaks,
            without_captions=frozenset(self.without_captions - self.captions.keys()),
            has_official_splits=has_splits,
        )

    def _hashed_splits(self) -> dict[str, str]:
        """The split of each image by a hash; of several names of one file by that of the first."""
        firsts: dict[str, str] = {}
        return {
            image_id: split_of(firsts.setdefault(self._paths.get(image_id, image_id), image_id))
            for image_id in self.captions
        }

    def _rows(self, image_ids: list[str], splits: Mapping[str, str], folder: str) -> pa.Table:
        return pa.table(
            [
                image_ids,
                [self._paths.get(image_id, storage.join(folder, image_id)) for image_id in image_ids],
                [splits.get(image_id, "") for image_id in image_ids],
                [self.captions[image_id] for image_id in image_ids],
            ],
            schema=DATASET_SCHEMA,
        )


def describe_tables(locations: Iterable[str]) -> dict[str, ListedFile]:
    """Size and time of these tables and tars; -1 and 0 for those that are missing or may not be described.

    Raises:
        ImcapError: the store failed.
    """

    def describe(location: str) -> ListedFile:
        file = storage.describe_file_or_nothing(location)
        return file if file and file.size else _UNKNOWN_FILE  # a missing file is described as empty, and no table is

    chosen = sorted(locations)
    with ThreadPoolExecutor(_REQUESTS_AT_A_TIME) as threads:
        return dict(zip(chosen, threads.map(describe, chosen), strict=True))


def _refuse_rewritten(before: Mapping[str, ListedFile]) -> None:
    """Raise DatasetError if a table or tar has changed since it was described."""
    for location, now in describe_tables(before).items():
        old = before[location]
        if not storage.is_same_version(location, (old.size, old.modified_ns), (now.size, now.modified_ns)):
            raise DatasetError(f"{location} was rewritten while it was read: run the same command again")


def split_of(image_id: str) -> str:
    """The split of an image that has no official one, by a hash of its name: 90 % train, 5 % validation, 5 % test."""
    number = int.from_bytes(hashlib.sha256(image_id.encode()).digest()[:8], "big") % 100
    return TRAIN if number < 90 else VALIDATION if number < 95 else TEST


def split_in_name(name: str) -> str:
    """The split in the name of a file or folder, such as `captions_val2017`; "" if it has none or several."""
    words = re.split(r"[^a-z]+", name.lower())
    splits = {SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES}
    return splits.pop() if len(splits) == 1 else ""


def split_in_path(path: str) -> str:
    """The split that one of a file's folders is named after, such as `train` or Hive's `split=train`; "" if there is
    none."""
    folders = [folder.removeprefix("split=") for folder in path.lower().split("/")[:-1]]
    return next((SPLIT_NAMES[folder] for folder in folders if folder in SPLIT_NAMES), "")


IMAGE_FOLDERS: Final = (
    *("Flicker8k_Dataset", "Flickr8k_Dataset", "flickr30k_images", "flickr30k-images", "Images", "images"),
    *("flickr8k_images", "flickr8k-images", "flickr30k_images/flickr30k_images", "flickr8k", "flickr30k"),
)
"""Usual names of the folder of images next to a file of captions."""


def find_image_folder(base: str, names: Iterable[str], image_ids: Iterable[str]) -> str:
    """The first of these folders below `base`, the usual ones, and `base` that holds one of the images; otherwise the
    first that exists."""
    some = list(islice(plain_names(image_ids), 5))
    folders = image_folders(base, names)
    for folder in folders:
        if any(storage.is_file(storage.join(folder, image_id)) for image_id in some):
            return folder
    return folders[0]


def image_folders(base: str, names: Iterable[str] = ()) -> list[str]:
    """Those of these folders below `base`, and of the usual ones, that exist; then `base`."""
    folders = (storage.join(base, name) for name in (*names, *IMAGE_FOLDERS))
    return [*filter(storage.is_folder, folders), base]


def plain_names(names: Iterable[str]) -> Iterator[str]:
    """The names of files below a folder: no URIs, no absolute paths, and none that leave the folder."""
    return (name for name in names if not re.search(r"(^|/)\.\.(/|$)|^/|^[A-Za-z][\w+.-]*:|[\0]", name))


def examples(names: Iterable[str], total: int) -> str:
    """The first few names, with "..." if there are more."""
    return ", ".join(islice(names, NUM_EXAMPLES)) + (", ..." if total > NUM_EXAMPLES else "")


def _describe_problem(kind: tuple[str, str], positions: list[str]) -> str:
    return f"{len(positions):,} {kind[len(positions) != 1]}: {examples(positions, len(positions))}"


def _find_leaked_files(table: pa.Table) -> list[Leak]:
    """Files that are in two splits under different ids."""
    seen: dict[str, str] = {}
    leaks = []
    for path, split in zip(table["image_path"].to_pylist(), table["split"].to_pylist(), strict=True):
        if path and seen.setdefault(path, split) != split:
            leaks.append(Leak(path.rpartition("/")[2], seen[path], split))
    return leaks
