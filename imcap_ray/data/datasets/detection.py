"""The location of captioned images -> the data set, its format recognised by its files."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from dataclasses import replace
from typing import Final

import pyarrow as pa

from imcap_ray import storage
from imcap_ray.data.columns import BY_NAME, ColumnOptions, ImageColumns
from imcap_ray.data.datasets import coco_json, hugging_face, parquet, sidecars, text_tables, webdataset
from imcap_ray.data.datasets.dataset import CaptionedImages, DatasetFormat, FolderContents, Source, examples
from imcap_ray.data.input_listing import describe_compressed_tars
from imcap_ray.errors import DatasetError, InputError

# The first format that recognises the data reads them.
FORMATS: Final[tuple[DatasetFormat, ...]] = (
    text_tables.FORMAT,
    hugging_face.FORMAT,
    webdataset.FORMAT,  # before the tables that img2dataset writes next to tars
    parquet.FORMAT,
    coco_json.FORMAT,
    sidecars.FORMAT,  # last, because it takes any folder of images and texts
)

# Tried after tars and tables in all folders below too, because the only CSV of a folder may be anything.
_LAST: Final = text_tables.ONLY_TABLE


def load_dataset(
    location: str,
    *,
    columns: ColumnOptions = BY_NAME,
    allow_outside_paths: bool = False,
    count_missing_files: bool = True,
    refuse_leaks: bool = True,
) -> CaptionedImages:
    """The captioned images of a folder or file.

    Args:
        columns: columns of tables that the user names; an error if the data are in another format.
        allow_outside_paths: whether the data may name images that are not below `location`, or a single file's folder.
        count_missing_files: whether to note how many of the images have no file, if they are on a local disk.
        refuse_leaks: whether an image in two splits is an error.

    Raises:
        DatasetError: nothing exists there, or nothing in a known format; the message lists these formats. Or an image
            is outside of where it may be, or in two splits.
    """
    location = storage.absolute(location)
    if not storage.exists(location):
        raise DatasetError(f"no such data set: {location}")
    source = replace(_open(location), columns=columns)
    dataset = _read(source)
    _refuse_unused(columns, dataset)
    _check_paths(dataset, source.base, allow_outside_paths)
    if dataset.leaks and refuse_leaks:
        raise _leak_error(dataset)
    dataset = _with_names_on_disk(dataset)
    return replace(dataset, notes=[*dataset.notes, *_describe_missing(dataset)]) if count_missing_files else dataset


def _refuse_unused(columns: ColumnOptions, dataset: CaptionedImages) -> None:
    """Raise DatasetError if the user names a column of data that have no such columns."""
    unused = [option for option in columns.given() if option not in dataset.columns.given()]
    if unused:
        tables = "Parquet tables" if dataset.columns.given() or dataset.columns_note else "tables (Parquet, CSV, TSV)"
        raise DatasetError(f"{', '.join(unused)} applies only to {tables}, and {dataset.location} is {dataset.format}")


def _read(source: Source) -> CaptionedImages:
    in_all_folders = [(one, replace(source, is_deep=True)) for one in FORMATS if one.is_packed and source.contents]
    for format, searched in (*((one, source) for one in FORMATS), *in_all_folders, (_LAST, source)):
        dataset = format.read(searched)
        if dataset is not None:
            if source.contents and format.covers_folder:
                return _with_other_images(dataset, source.contents)
            return dataset
    if source.contents and sidecars.has_only_caption_files(source.contents):
        raise DatasetError(f"{source.location} has text files but no images: put them next to the images they caption")
    compressed = replace(source, is_deep=source.contents is not None).files_of_kind("compressed tar")
    reason = f"; {describe_compressed_tars(compressed)}" if compressed else ""
    expected = "; ".join(format.description for format in (*FORMATS, _LAST))
    raise DatasetError(f"{source.location} holds no captioned images: expected one of: {expected}{reason}")


def _open(location: str) -> Source:
    if not storage.is_file(location):
        files = tuple(file.name for file in storage.list_files(location, recursive=False))
        return Source(location, location, files, contents=FolderContents(location))
    folder = storage.parent(location)
    # COCO's images are next to the folder of its annotations.
    base = storage.parent(folder) if folder.endswith("/annotations") else folder
    return Source(location, base, (location[len(base) + 1 :],))


def _with_other_images(dataset: CaptionedImages, contents: FolderContents) -> CaptionedImages:
    """Add the folder's other images to the data set, as images without captions.

    Raises:
        DatasetError: the folder also holds captioned images of another kind.
    """
    try:
        packed = contents.tars
        if contents.tables and (contents.images or packed):
            columns = ImageColumns(dataset.columns.image)
            packed = packed + [table.name for table in contents.listing.find_image_tables(columns)]
    except InputError as error:
        if dataset.packed or not dataset.columns_note:
            raise DatasetError(str(error)) from error
        packed = []  # the table that was read names images elsewhere
    paths = {*dataset.table["image_path"].to_pylist(), *dataset.left_out["image_path"].to_pylist()}
    others = [file for file in contents.images if file.location not in paths]
    captioned = sidecars.find_captioned_images(contents) if packed and contents.images else []
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
        subject = "image files are" if count != 1 else "image file is"
        kind = "tars" if contents.tars else "tables"
        names = examples((file.name for file in others), count)
        notes = [*notes, f"{count:,} {subject} next to the {kind} and without a caption: {names}"]
    known = {*dataset.table["image_id"].to_pylist(), *dataset.left_out["image_id"].to_pylist()}
    without_captions = dataset.without_captions | {file.name for file in others}
    return replace(dataset, notes=notes, without_captions=without_captions - known)


def _check_paths(dataset: CaptionedImages, folder: str, allow_outside_paths: bool) -> None:
    """Raise DatasetError for the first image that is outside of the folder."""
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


def _leak_error(dataset: CaptionedImages) -> DatasetError:
    image, split, other = dataset.leaks[0]
    number = f"the first of {len(dataset.leaks):,}; " if len(dataset.leaks) > 1 else ""
    return DatasetError(
        f"{dataset.location}: {image} is in two splits, {split} and {other} ({number}`imcap check` counts them): "
        "splits must be by image and not by caption, otherwise a model is scored on captions that it was trained on"
    )


def _with_names_on_disk(dataset: CaptionedImages) -> CaptionedImages:
    """Replace the paths of files whose names on disk have another Unicode form than in the data.

    macOS writes decomposed names (NFD), and most texts have composed ones (NFC). Only local disks are checked.
    """
    folders: dict[str, dict[str, str]] = {}
    changed: dict[str, str] = {}
    for path in dataset.table["image_path"].to_pylist():
        if not path or path.isascii() or path in dataset.packed or storage.is_uri(path) or storage.exists(path):
            continue
        folder, name = storage.parent(path), path.rpartition("/")[2]
        if folder not in folders:
            folders[folder] = {unicodedata.normalize("NFC", other): other for other in _names_in(folder)}
        if name_on_disk := folders[folder].get(unicodedata.normalize("NFC", name)):
            changed[path] = storage.join(folder, name_on_disk)
    if not changed:
        return dataset
    paths = [changed.get(path, path) for path in dataset.table["image_path"].to_pylist()]
    number = dataset.table.schema.get_field_index("image_path")
    table = dataset.table.set_column(number, dataset.table.schema.field(number), pa.array(paths, pa.string()))
    count = len(changed)
    note = f"{count:,} file name{'s' * (count != 1)} in another Unicode form than in the data"
    return replace(dataset, table=table, notes=[*dataset.notes, note])


def _describe_missing(dataset: CaptionedImages) -> list[str]:
    """A note on how many of the images have no file.

    This is not an error, because captions are useful without their images too, and a training counts the images that
    it cannot read. Only local disks are checked, where it costs nothing.
    """
    names: dict[str, set[str]] = defaultdict(set)
    for path in dataset.table["image_path"].to_pylist():
        if path and path not in dataset.packed and not storage.is_uri(path):
            names[storage.parent(path)].add(path.rpartition("/")[2])
    num_images = sum(map(len, names.values()))
    missing = sorted(name for folder, wanted in names.items() for name in wanted - _names_in(folder))
    if not missing:
        return []
    if len(missing) == num_images:
        return [f"none of the {num_images:,} images has a file"]
    return [f"{len(missing):,} of {num_images:,} images have no file: {examples(missing, len(missing))}"]


def _names_in(folder: str) -> set[str]:
    try:
        return storage.names_in(folder)
    except (OSError, ValueError):  # the folder does not exist; a name with a zero byte
        return set()
