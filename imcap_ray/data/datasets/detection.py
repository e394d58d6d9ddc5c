"""Where captioned images are -> the data set, its format recognised by looking."""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import pyarrow as pa

from imcap_ray import storage
from imcap_ray.data.columns import BY_NAME, ColumnOptions, ImageColumns
from imcap_ray.data.datasets.coco_json import read_json
from imcap_ray.data.datasets.dataset import CaptionedImages, Contents, Source, examples
from imcap_ray.data.datasets.image_folders import find_captioned_images, read_hugging_face, read_sidecars
from imcap_ray.data.datasets.parquet import read_parquet
from imcap_ray.data.datasets.text_tables import read_text_files
from imcap_ray.data.datasets.webdataset import read_webdataset
from imcap_ray.errors import DatasetError, InputError

# Each returns None for what is not its own. The last is for folders that hold nothing but images and texts.
_READERS: Final[tuple[Callable[[Source], CaptionedImages | None], ...]] = (
    read_text_files,
    read_hugging_face,
    read_webdataset,  # before the tables that img2dataset puts beside tars
    read_parquet,
    read_json,
    read_sidecars,
)

_PACKED_READERS: Final = (read_webdataset, read_parquet)
"""Of images in tars and tables."""

_EXPECTED: Final = (
    "Flickr8k as distributed (Flickr8k.token.txt beside the image folder), Kaggle's form (captions.txt beside "
    "Images/), Flickr30k (results.csv or results_20130124.token), Karpathy's or COCO's JSON, Hugging Face's "
    "metadata.jsonl or metadata.csv, WebDataset tars, images with .txt files beside them, or Parquet with images, "
    "their paths or ids, and captions"
)


def load_dataset(
    location: str,
    *,
    columns: ColumnOptions = BY_NAME,
    allow_outside_paths: bool = False,
    count_missing_files: bool = True,
    refuse_leaks: bool = True,
) -> CaptionedImages:
    """The captioned images of a folder or file, its format recognised by looking.

    Args:
        columns: of Parquet tables, as the user names them; an error where the data are in another format.
        allow_outside_paths: whether the data may name images that are not below `location`, or a single file's folder.
        count_missing_files: whether to note how many of the images have no file, where they are on a local disk.
        refuse_leaks: whether an image in two splits is an error.

    Raises:
        DatasetError: nothing there, or nothing in a format that is known; the message lists those that are. Or an
            image lies where it may not, or is in two splits.
    """
    location = storage.absolute(location)
    if not storage.exists(location):
        raise DatasetError(f"no such data set: {location}")
    source = replace(_open(location), columns=columns)
    in_other_folders = [(read, replace(source, is_deep=True)) for read in _PACKED_READERS if source.contents]
    for read, place in (*((read, source) for read in _READERS), *in_other_folders):
        dataset = read(place)
        if dataset is not None:
            if source.contents and read in (*_PACKED_READERS, read_sidecars):
                dataset = _with_other_images(dataset, source.contents)
            if columns.given() and dataset.columns != columns:
                raise DatasetError(
                    f"{', '.join(columns.given())} applies only to Parquet tables, and {location} is {dataset.format}"
                )
            _check_places(dataset, source.base, allow_outside_paths)
            if dataset.leaks and refuse_leaks:
                raise _leaks(dataset)
            dataset = _in_the_form_on_disk(dataset)
            return (
                replace(dataset, notes=[*dataset.notes, *_describe_missing(dataset)])
                if count_missing_files
                else dataset
            )
    raise DatasetError(f"{location} holds no captioned images: expected {_EXPECTED}")


def _open(location: str) -> Source:
    if not storage.is_file(location):
        files = tuple(file.name for file in storage.list_files(location, recursive=False))
        return Source(location, location, files, contents=Contents(location))
    folder = storage.parent(location)
    # COCO's images lie beside the folder of its annotations.
    base = storage.parent(folder) if folder.endswith("/annotations") else folder
    return Source(location, base, (location[len(base) + 1 :],))


def _with_other_images(dataset: CaptionedImages, contents: Contents) -> CaptionedImages:
    """The same, with the images of the folder that are not among it: they have no captions.

    Raises:
        DatasetError: the folder holds captioned images of another kind too.
    """
    try:
        packed = contents.tars
        if contents.tables and (contents.images or packed):
            columns = ImageColumns(dataset.columns.image)
            packed = packed + [table.name for table in contents.listing.find_image_tables(columns)]
    except InputError as error:
        if dataset.packed or not dataset.columns_note:
            raise DatasetError(str(error)) from error
        packed = []  # the table names images elsewhere, and is what was read
    paths = {*dataset.table["image_path"].to_pylist(), *dataset.left_out["image_path"].to_pylist()}
    others = [file for file in contents.images if file.location not in paths]
    captioned = find_captioned_images(contents.location) if packed and contents.images else []
    if captioned:
        raise DatasetError(
            f"{dataset.location} holds captioned images of two kinds: {len(captioned):,} with a caption file next to "
            f"them ({captioned[0]}), and those in {packed[0]}{', ...' if len(packed) > 1 else ''}: give a folder or a "
            "file that holds one kind"
        )
    if not others:
        return dataset
    notes = dataset.notes
    if dataset.packed:
        count = len(others)
        what = "image files are" if count != 1 else "image file is"
        kind = "tars" if contents.tars else "tables"
        names = examples((file.name for file in others), count)
        notes = [*notes, f"{count:,} {what} next to the {kind} and without a caption: {names}"]
    known = {*dataset.table["image_id"].to_pylist(), *dataset.left_out["image_id"].to_pylist()}
    without_captions = dataset.without_captions | {file.name for file in others}
    return replace(dataset, notes=notes, without_captions=without_captions - known)


def _check_places(dataset: CaptionedImages, folder: str, allow_outside_paths: bool) -> None:
    """Raise DatasetError for the first image that lies where it may not, whatever the format says it with."""
    for table in (dataset.table, dataset.left_out):
        for number, row in enumerate(table.select(["image_id", "image_path"]).to_pylist()):
            if row["image_path"]:
                name = number if storage.is_uri(row["image_id"]) else repr(row["image_id"])  # a URI may hold a secret
                storage.locate(
                    row["image_path"],
                    base=folder,
                    folders=[folder],
                    source=f"{dataset.location}, image {name}",
                    allow_outside=allow_outside_paths,
                    error=DatasetError,
                )


def _leaks(dataset: CaptionedImages) -> DatasetError:
    image, split, other = dataset.leaks[0]
    number = f"the first of {len(dataset.leaks):,}; " if len(dataset.leaks) > 1 else ""
    return DatasetError(
        f"{dataset.location}: {image} is in two splits, {split} and {other} ({number}`imcap check` counts them): "
        "splits must be by image and not by caption, or a model is judged on what it has learnt by heart"
    )


def _in_the_form_on_disk(dataset: CaptionedImages) -> CaptionedImages:
    """The same images, where a file's name is written in another Unicode form than the data's: macOS takes names apart
    (NFD), most texts have them composed (NFC). Only on a local disk, as `_describe_missing`."""
    folders: dict[str, dict[str, str]] = {}
    changed: dict[str, str] = {}
    for path in dataset.table["image_path"].to_pylist():
        if not path or path.isascii() or path in dataset.packed or storage.is_uri(path) or os.path.exists(path):
            continue
        folder, name = storage.parent(path), path.rpartition("/")[2]
        if folder not in folders:
            folders[folder] = {unicodedata.normalize("NFC", one): one for one in _names_in(folder)}
        if found := folders[folder].get(unicodedata.normalize("NFC", name)):
            changed[path] = storage.join(folder, found)
    if not changed:
        return dataset
    paths = [changed.get(path, path) for path in dataset.table["image_path"].to_pylist()]
    number = dataset.table.schema.get_field_index("image_path")
    table = dataset.table.set_column(number, dataset.table.schema.field(number), pa.array(paths, pa.string()))
    count = len(changed)
    note = f"{count:,} name{'s' * (count != 1)} of files in another Unicode form than in the data"
    return replace(dataset, table=table, notes=[*dataset.notes, note])


def _describe_missing(dataset: CaptionedImages) -> list[str]:
    """How many of the images have no file. No error, for captions are of use without their images too, and a training
    counts what it cannot read; and only on a local disk, where it costs nothing."""
    names: dict[str, set[str]] = defaultdict(set)
    for path in dataset.table["image_path"].to_pylist():
        if path and path not in dataset.packed and not storage.is_uri(path):
            names[storage.parent(path)].add(path.rpartition("/")[2])
    num_images = sum(map(len, names.values()))
    missing = sorted(name for folder, wanted in names.items() for name in wanted - _names_in(folder))
    if not missing:
        return []
    if len(missing) == num_images:
        return [f"none of the {num_images:,} images is there"]
    return [f"{len(missing):,} of {num_images:,} images have no file: {examples(missing, len(missing))}"]


def _names_in(folder: str) -> set[str]:
    try:
        return set(os.listdir(folder))
    except (OSError, ValueError):  # not there; a name with a zero byte
        return set()
