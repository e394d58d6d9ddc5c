"""WebDataset tars -> captioned images, their bytes left where they are."""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from imcap_ray import storage
from imcap_ray.datasets.folders import CAPTION_EXTENSIONS, caption_texts
from imcap_ray.datasets.table import (
    SPLIT_NAMES,
    CaptionedImages,
    Collector,
    PackedImage,
    Source,
    split_in_name,
    split_in_path,
)
from imcap_ray.manifest import IMAGE_EXTENSIONS

MAX_CAPTION_BYTES: Final = 2**20
"""A longer member is no caption."""


@dataclass(slots=True)
class _Sample:
    """The members of one key in one tar."""

    tar: str
    key: str
    image: str = ""
    packed: PackedImage | None = None
    texts: dict[str, bytes] = field(default_factory=dict)


def read_webdataset(source: Source) -> CaptionedImages | None:
    """`key.jpg` beside `key.txt`, a caption a line, or `key.json` with a caption.

    The splits are those of the tars' names or folders: `train/000.tar`, `flickr-train-000.tar`. An image's id is its
    key, with the tar's name before it where several tars have the same keys.
    """
    names = [name for name in source.files if name.endswith(".tar")]
    if not source.is_file:
        for folder in SPLIT_NAMES:
            place = storage.join(source.base, folder)
            if storage.is_folder(place):
                found = storage.list_files(place, recursive=False)
                names += [f"{folder}/{file.name}" for file in found if file.name.endswith(".tar")]
    if not names:
        return None
    collector = Collector(source, f"WebDataset, {len(names):,} tar{'s' * (len(names) != 1)}")
    samples = [sample for name in names for sample in _read_tar(collector, name)]
    counts = Counter(sample.key for sample in samples)
    packed: dict[str, PackedImage] = {}
    for sample in samples:
        where = f"{sample.tar}, {sample.key}"
        captions = caption_texts(collector, sample.texts)
        if sample.packed is None:
            collector.odd("key has no image", "keys have no image", where)
        elif not captions:
            collector.odd("image has no caption", "images have no caption", where)
        else:
            image_id = sample.key if counts[sample.key] == 1 else f"{sample.tar.removesuffix('.tar')}/{sample.key}"
            path = storage.join(source.base, sample.tar, sample.image)
            packed[path] = sample.packed
            split = split_in_path(sample.tar) or split_in_name(sample.tar.rpartition("/")[2].removesuffix(".tar"))
            collector.add(image_id, captions, where=where, path=path, split=split)
    return collector.to_dataset(packed=packed)


def _read_tar(collector: Collector, name: str) -> Iterator[_Sample]:
    """The samples of a tar; one that ends early has those before its end."""
    location = storage.join(collector.source.base, name)
    filesystem, path = storage.resolve(location)
    samples: dict[str, _Sample] = {}
    try:
        with filesystem.open_input_file(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                folder, slash, file_name = member.name.rpartition("/")
                stem, dot, extension = file_name.partition(".")
                if not member.isfile() or not stem or not dot:
                    continue
                key = f"{folder}{slash}{stem}"
                sample = samples.setdefault(key, _Sample(name, key))
                kind = extension.rpartition(".")[2].lower()
                if kind in IMAGE_EXTENSIONS and sample.packed is None:
                    sample.image = member.name
                    sample.packed = PackedImage(location, member.offset_data, member.size)
                elif kind in CAPTION_EXTENSIONS and member.size <= MAX_CAPTION_BYTES:
                    content = tar.extractfile(member)
                    sample.texts[member.name] = content.read() if content else b""
    except (tarfile.TarError, OSError, EOFError) as error:
        collector.odd("tar is damaged or ends early", "tars are damaged or end early", f"{name} ({error})")
    yield from samples.values()
