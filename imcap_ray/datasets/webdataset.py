"""WebDataset tars -> captioned images, their bytes left where they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from imcap_ray import archives, storage
from imcap_ray.datasets.folders import CAPTION_EXTENSIONS, caption_texts
from imcap_ray.datasets.table import (
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
    image_id: str = ""
    image: str = ""
    packed: PackedImage | None = None
    texts: dict[str, bytes] = field(default_factory=dict)


def read_webdataset(source: Source) -> CaptionedImages | None:
    """`key.jpg` beside `key.txt`, a caption a line, or `key.json` with a caption.

    The splits are those of the tars' names or folders: `train/000.tar`, `flickr-train-000.tar`. An image's id is the
    one that `imcap caption` gives it, see `archives.ImageIds`.
    """
    names = source.files_ending("tar")
    if not names:
        return None
    collector = Collector(source, f"WebDataset, {len(names):,} tar{'s' * (len(names) != 1)}")
    ids = archives.ImageIds()
    packed: dict[str, PackedImage] = {}
    for sample in (sample for name in names for sample in _read_tar(collector, name, ids)):
        where = f"{sample.tar}, {sample.key}"
        captions = caption_texts(collector, sample.texts)
        if sample.packed is None:
            collector.odd("key has no image", "keys have no image", where)
        elif not captions:
            collector.odd("image has no caption", "images have no caption", where)
        else:
            path = storage.join(source.base, sample.tar, sample.image)
            packed[path] = sample.packed
            split = split_in_path(sample.tar) or split_in_name(sample.tar.rpartition("/")[2].removesuffix(".tar"))
            collector.add(sample.image_id, captions, where=where, path=path, split=split)
    return collector.to_dataset(packed=packed)


def _read_tar(collector: Collector, name: str, ids: archives.ImageIds) -> Iterator[_Sample]:
    """The samples of a tar; one that ends early has those before its end."""
    location = storage.join(collector.source.base, name)
    samples: dict[str, _Sample] = {}
    try:
        with archives.open_tar(location) as tar:
            for member in archives.list_files(tar):
                key, ending = archives.split_name(member.name)
                if not key:
                    continue
                sample = samples.setdefault(key, _Sample(name, key))
                kind = ending.rpartition(".")[2]
                if kind in IMAGE_EXTENSIONS:
                    image_id = ids.choose(name, member)
                    if sample.packed is None:
                        sample.image_id, sample.image = image_id, member.name
                        sample.packed = PackedImage(location, archives.block_of(member), 0)
                elif kind in CAPTION_EXTENSIONS and member.size <= MAX_CAPTION_BYTES:
                    content = tar.extractfile(member)
                    sample.texts[member.name] = content.read() if content else b""
    except archives.DAMAGED as error:
        collector.odd("tar is damaged or ends early", "tars are damaged or end early", f"{name} ({error})")
    yield from samples.values()
