"""The table of captioned images, and the collector through which the reader of any format fills it."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Final, NamedTuple

import pyarrow as pa

from imcap_ray import storage
from imcap_ray.data.columns import BY_NAME, ColumnOptions
from imcap_ray.data.manifest import Listing, with_image_columns
from imcap_ray.data.schemas import MANIFEST_SCHEMA
from imcap_ray.errors import DatasetError
from imcap_ray.storage import ListedFile
from imcap_ray.text.encodings import decode_text

TRAIN: Final = "train"

VALIDATION: Final = "validation"

TEST: Final = "test"

SPLITS: Final = (TRAIN, VALIDATION, TEST)

# One row per image: image_id, image_path, split, captions.
DATASET_SCHEMA: Final = pa.schema(
    [
        ("image_id", pa.string()),
        ("image_path", pa.string()),
        ("split", pa.string()),
        ("captions", pa.list_(pa.string())),
    ]
)

# What people call the splits. Karpathy's restval, the rest of COCO's validation images, is trained on.
SPLIT_NAMES: Final[Mapping[str, str]] = {
    **dict.fromkeys(("train", "training", "restval"), TRAIN),
    **dict.fromkeys(("validation", "valid", "val", "dev", "development"), VALIDATION),
    **dict.fromkeys(("test", "testing"), TEST),
}

NUM_EXAMPLES: Final = 3
"""So many of what is odd are named, the rest is counted."""

_REQUESTS_AT_A_TIME: Final = 16

_LINE_ENDS_AND_TABS: Final = re.compile(r"[\t\r\n]+")

_SURROGATES: Final = re.compile("[\ud800-\udfff]")


class PackedImage(NamedTuple):
    """Where in a Parquet table or a tar the bytes of an image are, as `MANIFEST_SCHEMA` says it."""

    table_path: str
    row_group: int
    row: int


class Leak(NamedTuple):
    """An image that is said to be in two splits."""

    image: str
    split: str
    """That it is in, here."""
    other: str


_NOT_PACKED: Final = PackedImage("", -1, -1)

_UNKNOWN: Final = ListedFile("", "", -1, 0)


@dataclass(frozen=True, slots=True)
class CaptionedImages:
    """A data set: its table (`DATASET_SCHEMA`, one row per image) and what was noticed while reading it."""

    location: str
    format: str
    """As a person would call it: "Flickr8k as distributed"."""
    table: pa.Table
    notes: list[str] = field(default_factory=list)
    """One line for each kind of oddity, with its count and the first few."""
    terms: str = ""
    """Where the data come from and what they may be used for, as far as the format tells."""
    left_out: pa.Table = field(default_factory=DATASET_SCHEMA.empty_table)
    """Rows of images that have captions and are in no split, where the others have official ones; `split` is ""."""
    packed: Mapping[str, PackedImage] = field(default_factory=dict)
    """By `image_path`, the images that are no files of their own; such a path is the tar's and the member's name, or
    the table's and the row's number."""
    tables: Mapping[str, ListedFile] = field(default_factory=dict)
    """By location, the tables and tars as they were when they were read."""
    leaks: list[Leak] = field(default_factory=list)
    """Images in two splits; `load_dataset` refuses them unless it is told not to."""
    without_captions: frozenset[str] = frozenset()
    """Ids of the images that are there and have no caption, as far as the format shows them."""
    columns: ColumnOptions = BY_NAME
    """The columns of Parquet tables that the user named."""
    image_columns: tuple[str, ...] = ()
    """The columns of Parquet tables that packed images are read from, see `columns.ImageColumns.names`."""
    columns_note: str = ""
    """From which columns of Parquet tables the data are, for people."""

    def split(self, name: str) -> pa.Table:
        """The rows of one split, or DatasetError naming those there are."""
        rows = self.table.filter(pa.compute.equal(self.table["split"], name))
        if not rows.num_rows:
            raise DatasetError(f"{self.location} has no {name} images: it has {self.describe_splits()}")
        return rows

    def count_splits(self) -> dict[str, int]:
        """Images by split; a split without any is left out."""
        counts = self.table.group_by("split").aggregate([([], "count_all")]).to_pylist()
        found = {row["split"]: row["count_all"] for row in counts}
        return {name: found[name] for name in SPLITS if name in found}

    def describe_splits(self) -> str:
        """The splits with their numbers of images."""
        return ", ".join(f"{count:,} {name}" for name, count in self.count_splits().items()) or "nothing"

    def references(self, split: str | None = None) -> dict[str, list[str]]:
        """image_id -> captions, of one split or of all images."""
        rows = self.split(split) if split else self.table
        return dict(zip(rows["image_id"].to_pylist(), rows["captions"].to_pylist(), strict=True))

    def manifest(self, rows: pa.Table) -> pa.Table:
        """Rows of its table that have images -> `MANIFEST_SCHEMA`, the ids being their numbers.

        Size and time of tables and tars are those from when the data set was read; of files, those from now.
        """
        paths = rows["image_path"].to_pylist()
        places = [self.packed.get(path, _NOT_PACKED) for path in paths]
        listed = storage.describe_files(
            path for path, place in zip(paths, places, strict=True) if place is _NOT_PACKED and path
        )
        listed |= self.tables
        listed |= describe_tables({place.table_path for place in places if place.table_path} - self.tables.keys())
        files = [listed.get(place.table_path or path, _UNKNOWN) for path, place in zip(paths, places, strict=True)]
        manifest = pa.table(
            [
                range(len(paths)),
                rows["image_id"],
                [path if place is _NOT_PACKED else "" for path, place in zip(paths, places, strict=True)],
                [place.table_path for place in places],
                [place.row_group for place in places],
                [place.row for place in places],
                [file.size for file in files],
                [file.modified_ns for file in files],
            ],
            schema=MANIFEST_SCHEMA,
        )
        return with_image_columns(manifest, self.image_columns)


class Contents:
    """What a folder holds, as `imcap caption` sees it; listed when it is first asked for."""

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
    """A data set as it was named: a folder, or one file of it."""

    location: str
    base: str
    """The folder that names of images start at and must not lead out of."""
    files: tuple[str, ...]
    """Names of the files directly in the folder; of the one that was named."""
    columns: ColumnOptions = BY_NAME
    """The columns of Parquet tables that the user names."""
    is_deep: bool = False
    """Whether tars and tables are looked for in all folders below, and not only in the usual ones."""
    contents: Contents | None = None
    """Of the folder; None for a file."""

    @property
    def is_file(self) -> bool:
        """Whether one file was named."""
        return self.base != self.location

    def files_ending(self, extension: str) -> list[str]:
        """Names below `base` of the files with this ending, sorted, without hidden ones; see `usual_files_ending`.

        If there are some in the usual folders, or `is_deep`, those in all other folders are among them: the same files
        that `imcap caption` reads.
        """
        names = set() if self.is_deep else {*self.usual_files_ending(extension)}
        if self.contents and (names or self.is_deep):
            names.update(self.contents.tars if extension == "tar" else self.contents.tables)
        return sorted(names)

    def usual_files_ending(self, extension: str) -> list[str]:
        """Those directly in the folder, in folders that are named after splits, and in Hugging Face's `data`."""
        names = list(self.files)
        if not self.is_file:
            for folder in (*SPLIT_NAMES, "data"):
                place = storage.join(self.base, folder)
                if storage.is_folder(place):
                    names += [f"{folder}/{file.name}" for file in storage.list_files(place, recursive=False)]
        return sorted(name for name in names if re.fullmatch(rf"(.*/)?[^._/][^/]*\.{extension}", name))


class Collector:
    """What the reader of a format has found so far: images, their captions and splits, and what was odd."""

    def __init__(self, source: Source, format_name: str, *, terms: str = "") -> None:
        self.source = source
        self.captions: dict[str, list[str]] = defaultdict(list)
        self.splits: dict[str, str] = {}
        self.format = format_name
        self.terms = terms
        self._paths: dict[str, str] = {}
        self._odd: dict[tuple[str, str], list[str]] = defaultdict(list)
        self.without_captions: set[str] = set()
        self._leaks: dict[str, Leak] = {}

    def odd(self, one: str, many: str, where: str) -> None:
        """Count something odd; `one` or `many` stands behind the number: "line is blank", "lines are blank"."""
        self._odd[one, many].append(where)

    def without_caption(self, image_id: str, *, where: str) -> None:
        """Count an image that is there and has no caption."""
        self.without_captions.add(image_id)
        self.odd("image has no caption", "images have no caption", where)

    def add(
        self, image_id: str, captions: Iterable[str], *, where: str, path: str | None = None, split: str = ""
    ) -> None:
        """Add captions of an image; blank ones are counted and left out.

        Args:
            where: the place in the file, for people.
            path: the image's location; None: `image_id` in the folder that `to_dataset` is told.
            split: its official split by any of its names; "": it has none.
        """
        if not image_id or _SURROGATES.search(image_id):
            self.odd("name of an image is empty or no Unicode", "names of images are empty or no Unicode", where)
            return
        kept = []
        for caption in captions:
            text = _LINE_ENDS_AND_TABS.sub(" ", caption).strip()
            if _SURROGATES.search(text):
                self.odd("caption has letters that are no Unicode", "captions have letters that are no Unicode", where)
                text = _SURROGATES.sub("\ufffd", text)
            if text:
                kept.append(text)
            else:
                self.odd("caption is blank", "captions are blank", where)
        if not kept:
            return
        if path and self._paths.get(image_id, path) != path:
            self.odd(
                "name stands for another image too, whose captions are left out",
                "names stand for other images too, whose captions are left out",
                f"{image_id} ({where})",
            )
            return
        self.captions[image_id] += kept
        if path is not None:
            self._paths.setdefault(image_id, path)
        if split:
            self.put_into(image_id, split)

    def put_into(self, image_id: str, split: str) -> None:
        """Say the official split of an image. DatasetError if it is none."""
        name = SPLIT_NAMES.get(split.strip().lower())
        if name is None:
            raise DatasetError(
                f"{self.source.location}: split must be {', '.join(SPLITS)}, got {split!r} at {image_id}"
            )
        known = self.splits.setdefault(image_id, name)
        if known != name:
            self._leaks.setdefault(image_id, Leak(image_id, known, name))

    def decode(self, data: bytes, name: str) -> str:
        """The text of a file, its encoding noted where it is not UTF-8."""
        decoded = decode_text(data)
        if decoded.encoding != "UTF-8":
            self.odd(f"file is {decoded.encoding}", f"files are {decoded.encoding}", name)
        for number in decoded.odd_lines:
            self.odd(
                "line is not UTF-8 and is read as Windows-1252 (latin-1)",
                "lines are not UTF-8 and are read as Windows-1252 (latin-1)",
                f"{name} line {number}",
            )
        return decoded.text

    def read_text(self, name: str) -> str:
        """The text of a file below the data's folder."""
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
        """The data set: with the official splits, where any image has one, else each image's by a hash of its name.

        Args:
            folder: where the images are that were added without a path.
            tables: by location, the tables and tars that were read, as `describe_tables` found them before.

        Raises:
            DatasetError: nothing can be used, or a table or tar was rewritten while it was read.
        """
        location = self.source.location
        _refuse_rewritten(tables or {})
        has_splits = bool(self.splits)
        splits = self.splits if has_splits else {image_id: split_of(image_id) for image_id in self.captions}
        chosen = [image_id for image_id in splits if image_id in self.captions]
        left_out = [image_id for image_id in self.captions if image_id not in splits]
        for image_id in left_out:
            self.odd("captioned image is in no split", "captioned images are in no split", image_id)
        for image_id in (image_id for image_id in splits if image_id not in self.captions):
            self.odd("image of the splits has no caption", "images of the splits have no caption", image_id)
        notes = [_describe(kind, places) for kind, places in self._odd.items()]
        if not chosen:
            found = "not one caption in it" if not left_out else "not one captioned image is in a split"
            raise DatasetError("; ".join([f"{location}: {self.format}, but {found}", *notes]))
        if not has_splits:
            notes.append("no official splits: each image's split is a hash of its name")
        table = self._rows(chosen, splits, folder)
        leaks = [*self._leaks.values()] or _find_files_in_two_splits(table)
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
        )

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
    """Size and time of these tables and tars; -1 and 0 for one that is missing or may not be described.

    Raises:
        ImcapError: the store failed.
    """

    def describe(location: str) -> ListedFile:
        file = storage.describe_file_or_nothing(location)
        return file if file and file.size else _UNKNOWN  # a missing file is described as empty, and no table is

    chosen = sorted(locations)
    with ThreadPoolExecutor(_REQUESTS_AT_A_TIME) as threads:
        return dict(zip(chosen, threads.map(describe, chosen), strict=True))


def _refuse_rewritten(before: Mapping[str, ListedFile]) -> None:
    """Raise DatasetError if a table or tar is no longer the version that this description is of."""
    for location, now in describe_tables(before).items():
        old = before[location]
        if not storage.is_same_version(location, (old.size, old.modified_ns), (now.size, now.modified_ns)):
            raise DatasetError(f"{location} was rewritten while it was read: run the same command again")


def split_of(image_id: str) -> str:
    """The split of an image that has no official one, by a hash of its name: 90 % train, 5 % validation, 5 % test."""
    number = int.from_bytes(hashlib.sha256(image_id.encode()).digest()[:8], "big") % 100
    return TRAIN if number < 90 else VALIDATION if number < 95 else TEST


def split_in_name(name: str) -> str:
    """The split that a file's or folder's name tells, like `captions_val2017`; "" if it tells none or several."""
    words = re.split(r"[^a-z]+", name.lower())
    found = {SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES}
    return found.pop() if len(found) == 1 else ""


def split_in_path(path: str) -> str:
    """The split that a folder on the way to a file is named after; "" if there is none."""
    folders = path.lower().split("/")[:-1]
    return next((SPLIT_NAMES[folder] for folder in folders if folder in SPLIT_NAMES), "")


def find_image_folder(base: str, names: Iterable[str], image_ids: Iterable[str]) -> str:
    """The first of these folders below `base`, or itself, that holds an image; else the first that is there."""
    plain = (one for one in image_ids if not re.search(r"(^|/)\.\.(/|$)|^/|^[A-Za-z][\w+.-]*:|[\0]", one))
    some = list(islice(plain, 5))
    folders = [folder for name in names if storage.is_folder(folder := storage.join(base, name))]
    for folder in (*folders, base):
        if any(storage.is_file(storage.join(folder, image_id)) for image_id in some):
            return folder
    return (*folders, base)[0]


def examples(names: Iterable[str], total: int) -> str:
    """The first few names, and a sign that there are more."""
    return ", ".join(islice(names, NUM_EXAMPLES)) + (", ..." if total > NUM_EXAMPLES else "")


def _describe(kind: tuple[str, str], places: list[str]) -> str:
    return f"{len(places):,} {kind[len(places) != 1]}: {examples(places, len(places))}"


def _find_files_in_two_splits(table: pa.Table) -> list[Leak]:
    """Whatever the ids are: the same file is the same image."""
    seen: dict[str, str] = {}
    leaks = []
    for path, split in zip(table["image_path"].to_pylist(), table["split"].to_pylist(), strict=True):
        if path and seen.setdefault(path, split) != split:
            leaks.append(Leak(path.rpartition("/")[2], seen[path], split))
    return leaks
