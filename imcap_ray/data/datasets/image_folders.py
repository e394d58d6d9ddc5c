"""Folders of images with their captions in files beside them -> captioned images: Hugging Face's, and sidecars."""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from imcap_ray import storage
from imcap_ray.data.datasets.dataset import SPLIT_NAMES, CaptionedImages, Collector, Source, split_in_path
from imcap_ray.data.datasets.fields import add_record, captions_in, has_caption_field
from imcap_ray.data.image_formats import IMAGE_EXTENSIONS
from imcap_ray.errors import DatasetError
from imcap_ray.text.encodings import split_lines

_METADATA: Final = ("metadata.jsonl", "metadata.csv")

CAPTION_EXTENSIONS: Final = ("txt", "caption", "json")
"""Of the files beside an image; the first that holds a caption counts."""

_READS_AT_A_TIME: Final = 16
"""A request to a store takes far longer than its answer."""


# ---- Hugging Face's imagefolder
def read_hugging_face(source: Source) -> CaptionedImages | None:
    """`metadata.jsonl` or `metadata.csv` beside the images or above them; folders named after splits are the splits."""
    if source.is_file:
        found = [name for name in source.files if name.endswith((".jsonl", "metadata.csv"))]
    else:
        found = [str(name) for name in _METADATA if name in source.files][:1]
        for folder in SPLIT_NAMES:
            places = [name for name in _METADATA if storage.is_file(storage.join(source.base, folder, name))]
            found += [f"{folder}/{name}" for name in places[:1]]
    if not found:
        return None
    collector = Collector(source, "Hugging Face's imagefolder")
    fields: dict[str, None] = {}
    for name in found:
        folder = f"{storage.parent(name)}/" if "/" in name else ""

        def place(image: str, folder: str = folder) -> tuple[str, str, str]:
            if storage.is_uri(image) or image.startswith("/"):
                return image, image, split_in_path(folder)
            image_id = folder + image.removeprefix("./")
            return image_id, storage.join(source.base, image_id), split_in_path(image_id)

        for number, record in _records(collector, name):
            where = f"{name} line {number}"
            if record is None:
                collector.odd("line is no JSON object", "lines are no JSON objects", where)
                continue
            fields.update(dict.fromkeys(map(str, record)))
            add_record(collector, record, where=where, place=place)
    if fields and not has_caption_field(fields):
        raise DatasetError(
            f"{source.location}: {found[0]} has no captions: expected a column text, caption or captions beside "
            f"file_name, got {', '.join(fields)}"
        )
    return collector.to_dataset()


def _records(collector: Collector, name: str) -> Iterator[tuple[int, dict[str, Any] | None]]:
    text = collector.read_text(name)
    if name.endswith(".csv"):
        try:
            for number, row in enumerate(csv.DictReader(io.StringIO(text, newline="")), 2):
                yield number, {key: value for key, value in row.items() if key}
        except csv.Error as error:
            raise DatasetError(f"{storage.join(collector.source.base, name)} is not valid CSV: {error}") from error
        return
    for number, line in enumerate(split_lines(text), 1):
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            yield number, record if isinstance(record, dict) else None


# ---- images with their captions beside them
def read_sidecars(source: Source) -> CaptionedImages | None:
    """`photo.jpg` and `photo.txt`, a caption a line, in any folder below; those named after splits are the splits."""
    if source.is_file:
        return None
    images, captions = _list_by_stem(source.base)
    pairs = {stem: captions[stem] for stem in images if stem in captions}
    if not pairs:
        return None
    collector = Collector(source, "a folder of images with their captions beside them")
    for stem, found in zip(pairs, _read_all(source, pairs), strict=True):
        names = images[stem]
        if len(names) > 1:
            collector.odd("caption file belongs to several images", "caption files belong to several images", stem)
        for name in (name for name, content in found.items() if content is None):
            collector.odd("file cannot be read", "files cannot be read", name)
        readable = [(name, content) for name, content in found.items() if content is not None]
        texts = caption_texts(collector, readable, where=stem)
        for name in names:
            if texts:
                path = storage.join(source.base, name)
                collector.add(name, texts, where=name, path=path, split=split_in_path(name))
            else:
                collector.without_caption(name, where=name)
    for stem in (stem for stem in images if stem not in captions):
        for name in images[stem]:
            collector.without_caption(name, where=name)
    for stem in (stem for stem in captions if stem not in images):
        collector.odd("file has no image beside it", "files have no image beside them", captions[stem][0])
    return collector.to_dataset()


def find_captioned_images(folder: str) -> list[str]:
    """Names of the images below a folder that have a caption file next to them."""
    images, captions = _list_by_stem(folder)
    return [name for stem, names in images.items() if stem in captions for name in names]


def _list_by_stem(folder: str) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The images and the caption files below a folder, by their names without the ending."""
    images: dict[str, list[str]] = defaultdict(list)
    captions: dict[str, list[str]] = defaultdict(list)
    for file in storage.list_files(folder):
        stem, _, extension = file.name.rpartition(".")
        if not stem or stem.endswith("/") or file.name.rpartition("/")[2].startswith("."):
            continue
        if extension.lower() in IMAGE_EXTENSIONS:
            images[stem].append(file.name)
        elif extension.lower() in CAPTION_EXTENSIONS:
            captions[stem].append(file.name)
    return images, captions


def _read_all(source: Source, pairs: dict[str, list[str]]) -> Iterator[dict[str, bytes | None]]:
    """For each image the content of the files beside it, by name; None of one that cannot be read."""

    def read(names: list[str]) -> dict[str, bytes | None]:
        return {name: read_one(storage.join(source.base, name)) for name in names}

    def read_one(location: str) -> bytes | None:
        try:
            return storage.read_bytes(location)
        except OSError:
            return None

    with ThreadPoolExecutor(_READS_AT_A_TIME) as pool:
        yield from pool.map(read, pairs.values())


def caption_texts(collector: Collector, files: Sequence[tuple[str, bytes]], *, where: str) -> list[str]:
    """The captions in the files of an image, given by name and content: those of the first kind that holds any.

    If there are several files of that kind, the first that holds a caption counts and the image is noted.
    """
    for extension in CAPTION_EXTENSIONS:
        of_kind = [(name, data) for name, data in files if name.rpartition(".")[2].lower() == extension]
        found = [captions for name, data in of_kind if (captions := _captions_in_file(collector, name, data))]
        if len(found) > 1:
            collector.odd(
                "image has several caption files, and the first counts",
                "images have several caption files, and the first counts",
                where,
            )
        if found:
            return found[0]
    return []


def _captions_in_file(collector: Collector, name: str, data: bytes) -> list[str]:
    text = collector.decode(data, name)
    if name.lower().endswith(".json"):
        return _captions_of_json(text)
    return [line for line in split_lines(text) if line.strip()]


def _captions_of_json(text: str) -> list[str]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return []
    return captions_in({str(key).lower(): value for key, value in record.items()}) if isinstance(record, dict) else []
