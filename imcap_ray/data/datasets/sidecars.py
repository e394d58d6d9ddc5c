"""Images with their captions in files next to them, `photo.txt` or `photo.jpg.txt` -> captioned images."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from imcap_ray import storage
from imcap_ray.data.datasets.dataset import (
    CaptionedImages,
    Collector,
    DatasetFormat,
    FolderContents,
    Source,
    split_in_path,
)
from imcap_ray.data.datasets.fields import captions_in
from imcap_ray.data.image_formats import extension_of, is_hidden_folder, readable_names
from imcap_ray.text.encodings import split_lines

CAPTION_EXTENSIONS: Final = ("txt", "caption", "json")
"""Extensions of caption files, in the order in which they are searched for a caption."""

_CONCURRENT_READS: Final = 16
"""A store takes far longer to answer a request than to send the data."""


def read_sidecars(source: Source) -> CaptionedImages | None:
    """Read images and caption files of all folders below, one caption a line. Folders named after splits are the
    splits."""
    if source.contents is None:
        return None
    images, captions, uncaptioned = _list_by_stem(source.contents)
    if not images:
        return None
    collector = Collector(source, "a folder of images with their captions next to them")
    pairs = {stem: captions[stem] for stem in images}
    for (stem, names), contents in zip(images.items(), _read_all(source, pairs), strict=True):
        if len(names) > 1:
            collector.add_problem(
                "caption file belongs to several images", "caption files belong to several images", stem
            )
        for name in (name for name, content in contents.items() if content is None):
            collector.add_problem("file cannot be read", "files cannot be read", name)
        readable = [(name, content) for name, content in contents.items() if content is not None]
        texts = caption_texts(collector, readable, where=stem)
        for name in names:
            if texts:
                path = storage.join(source.base, name)
                collector.add(name, texts, where=name, path=path, split=split_in_path(name))
            else:
                collector.add_uncaptioned(name, where=name)
    for name in uncaptioned:
        collector.add_uncaptioned(name, where=name)
    for name in (names[0] for stem, names in captions.items() if stem not in images):
        collector.add_problem("file has no image next to it", "files have no image next to them", name)
    return collector.to_dataset()


def find_captioned_images(contents: FolderContents) -> list[str]:
    """Names of the images below a folder that have a caption file next to them."""
    images, _, _ = _list_by_stem(contents)
    return [name for names in images.values() for name in names]


def has_only_caption_files(contents: FolderContents) -> bool:
    """Whether a folder has text files of captions, and neither images nor any other files."""
    names = [file.name for file in storage.list_files(contents.location, is_skipped=is_hidden_folder)]
    visible = [name for name in names if not name.rpartition("/")[2].startswith(".")]
    return bool(visible) and all(extension_of(name) in ("txt", "caption") for name in visible)


def _list_by_stem(contents: FolderContents) -> tuple[dict[str, list[str]], dict[str, list[str]], list[str]]:
    """The images and the caption files below a folder, by the caption files' names without extension.

    This is the image's complete name (`photo.jpg.txt`) if there is such a file, otherwise the name without extension
    (`photo.txt`). The third list has the images without a caption file.
    """
    images: dict[str, list[str]] = defaultdict(list)
    captions: dict[str, list[str]] = defaultdict(list)
    uncaptioned = []
    for file in storage.list_files(contents.location, is_skipped=is_hidden_folder):
        is_hidden = file.name.rpartition("/")[2].startswith(".")
        if extension_of(file.name) in CAPTION_EXTENSIONS and not is_hidden:
            captions[_stem(file.name)].append(file.name)
    for name in (file.name for file in contents.images):
        stem = name if name in captions else _stem(name)
        if stem in captions:
            images[stem].append(name)
        else:
            uncaptioned.append(name)
    return {stem: readable_names(names) for stem, names in images.items()}, captions, uncaptioned


def _stem(name: str) -> str:
    """The name without the extension of the file, if it has one."""
    stem, dot, extension = name.rpartition(".")
    return stem if dot and "/" not in extension else name


def _read_all(source: Source, pairs: dict[str, list[str]]) -> Iterator[dict[str, bytes | None]]:
    """For each image the contents of its caption files, by name; None for a file that cannot be read."""

    def read(names: list[str]) -> dict[str, bytes | None]:
        return {name: read_file(storage.join(source.base, name)) for name in names}

    def read_file(location: str) -> bytes | None:
        try:
            return storage.read_bytes(location)
        except OSError:
            return None

    with ThreadPoolExecutor(_CONCURRENT_READS) as pool:
        yield from pool.map(read, pairs.values())


def caption_texts(collector: Collector, files: Sequence[tuple[str, bytes]], *, where: str) -> list[str]:
    """The captions in the files of an image, given by name and content: those of the first extension that has any.

    If several files with this extension have captions, the first one is used and the image is noted.
    """
    for extension in CAPTION_EXTENSIONS:
        of_kind = [(name, data) for name, data in files if name.rpartition(".")[2].lower() == extension]
        texts = [captions for name, data in of_kind if (captions := _captions_in_file(collector, name, data))]
        if len(texts) > 1:
            collector.add_problem(
                "image has several caption files, of which the first is used",
                "images have several caption files, of which the first is used",
                where,
            )
        if texts:
            return texts[0]
    return []


def _captions_in_file(collector: Collector, name: str, data: bytes) -> list[str]:
    text = collector.decode(data, name)
    if name.lower().endswith(".json"):
        return _captions_in_json(text)
    return [line for line in split_lines(text) if line.strip()]


def _captions_in_json(text: str) -> list[str]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return []
    return captions_in({str(key).lower(): value for key, value in record.items()}) if isinstance(record, dict) else []


FORMAT: Final = DatasetFormat(description="images with .txt files next to them", read=read_sidecars, covers_folder=True)
