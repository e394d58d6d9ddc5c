"""Captioned images in any of the formats people have -> one table. Knows no model and no pixel."""

from __future__ import annotations

import csv
import hashlib
import io
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from imcap_ray import storage
from imcap_ray.errors import DatasetError
from imcap_ray.manifest import refuse_pickles

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


@dataclass(frozen=True, slots=True)
class CaptionedImages:
    """A data set: its table (`DATASET_SCHEMA`, one row per image) and what was noticed while reading it."""

    location: str
    format: str
    """As a person would call it: "Flickr8k as distributed"."""
    table: pa.Table
    notes: list[str] = field(default_factory=list)
    """One line for each kind of oddity, with its count."""
    terms: str = ""
    """Where the data come from and what they may be used for, as far as the format tells."""

    def split(self, name: str) -> pa.Table:
        """The rows of one split, or DatasetError naming those there are."""
        rows = self.table.filter(pa.compute.equal(self.table["split"], name))
        if not rows.num_rows:
            raise DatasetError(f"{self.location} has no {name} images: it has {self.describe_splits()}")
        return rows

    def describe_splits(self) -> str:
        """The splits with their numbers of images."""
        counts = self.table.group_by("split").aggregate([([], "count_all")]).to_pylist()
        found = {row["split"]: row["count_all"] for row in counts}
        return ", ".join(f"{found[name]:,} {name}" for name in (*SPLITS, "") if name in found) or "nothing"

    def references(self, split: str | None = None) -> dict[str, list[str]]:
        """image_id -> captions, of one split or of all images."""
        rows = self.split(split) if split else self.table
        return dict(zip(rows["image_id"].to_pylist(), rows["captions"].to_pylist(), strict=True))


def load_dataset(location: str, *, allow_outside_paths: bool = False) -> CaptionedImages:
    """The captioned images of a folder or file, its format recognised by looking.

    Args:
        allow_outside_paths: whether the data may name images that are not below `location`, or a single file's folder.

    Raises:
        DatasetError: nothing there, or nothing in a format that is known; the message lists those that are. Or an
            image lies where it may not.
    """
    location = storage.absolute(location)
    if not storage.exists(location):
        raise DatasetError(f"no such data set: {location}")
    for recognise, read in _FORMATS:
        if recognise(location):
            dataset = read(location)
            _check_places(dataset, allow_outside_paths)
            return dataset
    raise DatasetError(
        f"{location} holds no captioned images: expected Flickr8k as distributed (Flickr8k.token.txt beside the image "
        "folder), Kaggle's form (captions.txt beside Images/), or Parquet with the columns image_id or image_path, "
        "and captions"
    )


def _check_places(dataset: CaptionedImages, allow_outside_paths: bool) -> None:
    """Raise DatasetError for the first image that lies where it may not, whatever the format says it with."""
    folder = storage.parent(dataset.location) if storage.is_file(dataset.location) else dataset.location
    for number, row in enumerate(dataset.table.select(["image_id", "image_path"]).to_pylist()):
        if row["image_path"]:
            name = number if storage.is_uri(row["image_id"]) else repr(row["image_id"])  # a URI may hold a secret
            storage.place(
                row["image_path"],
                base=folder,
                folders=[folder],
                source=f"{dataset.location}, image {name}",
                allow_outside=allow_outside_paths,
                error=DatasetError,
            )


def split_of(image_id: str) -> str:
    """The split of an image that has no official one, by a hash of its name: 90 % train, 5 % validation, 5 % test."""
    number = int.from_bytes(hashlib.sha256(image_id.encode()).digest()[:8], "big") % 100
    return TRAIN if number < 90 else VALIDATION if number < 95 else TEST


# ---- Flickr8k as distributed


_FLICKR8K_SPLITS: Final = {
    "Flickr_8k.trainImages.txt": TRAIN,
    "Flickr_8k.devImages.txt": VALIDATION,
    "Flickr_8k.testImages.txt": TEST,
}
_FLICKR8K_TERMS: Final = (
    "M. Hodosh, P. Young, J. Hockenmaier (2013), Framing Image Description as a Ranking Task, JAIR 47, 853-899. The "
    "photographs belong to their photographers; the collection is for non-commercial research."
)
_FLICKR8K_IMAGES: Final = ("Flicker8k_Dataset", "Flickr8k_Dataset", "Images", "images")


def _is_flickr8k(location: str) -> bool:
    return storage.is_file(storage.join(location, "Flickr8k.token.txt"))


def _read_flickr8k(location: str) -> CaptionedImages:
    captions: dict[str, list[str]] = defaultdict(list)
    num_odd_lines = 0
    for line in _read_text(storage.join(location, "Flickr8k.token.txt")).splitlines():
        key, tab, caption = line.partition("\t")
        image_id, hash_sign, _ = key.rpartition("#")
        if tab and hash_sign and caption.strip():
            captions[image_id].append(caption.strip())
        elif line.strip():
            num_odd_lines += 1

    splits: dict[str, str] = {}
    for file_name, split in _FLICKR8K_SPLITS.items():
        path = storage.join(location, file_name)
        if storage.exists(path):
            splits.update(dict.fromkeys(_read_text(path).split(), split))

    notes = [_count(num_odd_lines, "line is", "lines are", "not `name#number<TAB>caption`")]
    notes += [_count(len(set(captions) - set(splits)), "captioned image is", "captioned images are", "in no split")]
    if splits:
        without_captions = sorted(set(splits) - set(captions))
        if without_captions:
            raise DatasetError(
                f"{location}: {len(without_captions)} images of the split lists have no caption, "
                f"the first is {without_captions[0]}"
            )
        captions = {image_id: captions[image_id] for image_id in splits}
    else:
        splits = {image_id: split_of(image_id) for image_id in captions}
    return _to_dataset(
        location, "Flickr8k as distributed", captions, splits, _FLICKR8K_IMAGES, notes, terms=_FLICKR8K_TERMS
    )


# ---- Kaggle's form of Flickr8k


def _is_kaggle(location: str) -> bool:
    return storage.is_file(storage.join(location, "captions.txt"))


def _read_kaggle(location: str) -> CaptionedImages:
    captions: dict[str, list[str]] = defaultdict(list)
    num_odd_lines = 0
    for number, fields in enumerate(csv.reader(io.StringIO(_read_text(storage.join(location, "captions.txt"))))):
        if number == 0 and fields[:1] == ["image"]:
            continue
        caption = ",".join(fields[1:]).strip()  # an unquoted comma belongs to the caption
        if caption:
            captions[fields[0]].append(caption)
        elif fields:
            num_odd_lines += 1
    notes = [
        _count(num_odd_lines, "line is", "lines are", "not `image,caption`"),
        "no official splits: each image's split is a hash of its name",
    ]
    splits = {image_id: split_of(image_id) for image_id in captions}
    return _to_dataset(
        location, "Flickr8k in Kaggle's form", captions, splits, _FLICKR8K_IMAGES, notes, terms=_FLICKR8K_TERMS
    )


# ---- Parquet


def _is_parquet(location: str) -> bool:
    return any(True for _ in _parquet_files(location))


def _parquet_files(location: str) -> Iterable[str]:
    if storage.is_file(location):
        return [location] if location.endswith(".parquet") else []
    return storage.list_parquet(location)


def _read_parquet(location: str) -> CaptionedImages:
    """Columns `captions` (list of strings) or `caption`; `image_id` and `image_path`, either is enough; `split`.

    An image may have several rows. Rows without an image or a caption are counted and left out.
    """
    tables = []
    for path in _parquet_files(location):
        filesystem, inner = storage.resolve(path)
        try:
            schema = pq.read_schema(inner, filesystem=filesystem)
            refuse_pickles(schema, path)
            names = schema.names
            wanted = [n for n in ("image_id", "image_path", "split", "captions", "caption") if n in names]
            table = pq.read_table(inner, filesystem=filesystem, columns=wanted)
            tables.append(table.cast(pa.schema([(f.name, _text_type(f.type)) for f in table.schema])))
        except (pa.ArrowException, OSError) as error:
            raise DatasetError(f"{path} is not readable Parquet of captions: {error}") from error
    table = pa.concat_tables(tables, promote_options="default")
    names = table.column_names
    captions_column = "captions" if "captions" in names else "caption"
    if captions_column not in names or not {"image_id", "image_path"} & set(names):
        raise DatasetError(
            f"{location}: expected the columns image_id or image_path, and captions or caption; got {', '.join(names)}"
        )
    captions: dict[str, list[str]] = defaultdict(list)
    splits: dict[str, str] = {}
    paths: dict[str, str] = {}
    num_odd_rows = 0
    for row in table.to_pylist():
        image_id = row.get("image_id") or row.get("image_path")
        found = row[captions_column]
        found = [found] if isinstance(found, str) else found or []
        found = [caption.strip() for caption in found if caption and caption.strip()]
        if not image_id or not found:
            num_odd_rows += 1
            continue
        captions[image_id] += found
        paths[image_id] = row.get("image_path") or ""
        split = row.get("split") or split_of(image_id)
        if split not in SPLITS:
            raise DatasetError(f"{location}: split must be {', '.join(SPLITS)}, got {split!r} at {image_id}")
        if splits.setdefault(image_id, split) != split:
            raise DatasetError(f"{location}: {image_id} is in two splits, {splits[image_id]} and {split}")
    notes = [_count(num_odd_rows, "row has", "rows have", "no image or no caption")]
    dataset = _to_dataset(location, "Parquet", captions, splits, (), notes)
    base = location if not storage.is_file(location) else storage.parent(location)
    resolved = [_beside(base, paths[image_id]) for image_id in dataset.table["image_id"].to_pylist()]
    place = DATASET_SCHEMA.get_field_index("image_path")
    return replace(dataset, table=dataset.table.set_column(place, "image_path", pa.array(resolved, pa.string())))


def _text_type(stored: pa.DataType) -> pa.DataType:
    is_list = pa.types.is_list(stored) or pa.types.is_large_list(stored)
    return pa.list_(pa.string()) if is_list else pa.string()


def _beside(base: str, path: str) -> str:
    return path if not path or storage.is_uri(path) or path.startswith("/") else storage.join(base, path)


# ---- common


_FORMATS: Final[list[tuple[Callable[[str], bool], Callable[[str], CaptionedImages]]]] = [
    (_is_flickr8k, _read_flickr8k),
    (_is_kaggle, _read_kaggle),
    (_is_parquet, _read_parquet),
]


def _read_text(location: str) -> str:
    try:
        return storage.read_bytes(location).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{location} is not UTF-8: {error}") from error


def _count(number: int, singular: str, plural: str, rest: str) -> str:
    return f"{number:,} {singular if number == 1 else plural} {rest}" if number else ""


def _to_dataset(
    location: str,
    format_name: str,
    captions: Mapping[str, list[str]],
    splits: Mapping[str, str],
    image_folders: Iterable[str],
    notes: list[str],
    *,
    terms: str = "",
) -> CaptionedImages:
    if not captions:
        raise DatasetError(f"{location}: {format_name}, but not one caption in it")
    folder = next(
        (storage.join(location, name) for name in image_folders if storage.is_folder(storage.join(location, name))),
        location,
    )
    image_ids = list(captions)
    table = pa.table(
        [
            image_ids,
            [storage.join(folder, image_id) for image_id in image_ids],
            [splits[image_id] for image_id in image_ids],
            [captions[image_id] for image_id in image_ids],
        ],
        schema=DATASET_SCHEMA,
    )
    return CaptionedImages(location, format_name, table, [note for note in notes if note], terms)
