"""WebDataset tars -> captioned images, whose bytes stay in the tars."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Final

from imcap_ray import storage
from imcap_ray.data import tar_images
from imcap_ray.data.datasets.dataset import (
    CaptionedImages,
    Collector,
    DatasetFormat,
    PackedImage,
    Source,
    describe_tables,
    split_in_name,
    split_in_path,
)
from imcap_ray.data.datasets.sidecars import CAPTION_EXTENSIONS, caption_texts
from imcap_ray.data.image_formats import IMAGE_EXTENSIONS, is_in_hidden_folder, readable_names

MAX_CAPTION_BYTES: Final = 2**20
"""Longer members are not captions."""


@dataclass(frozen=True, slots=True)
class _Image:
    """An image in a tar."""

    name: str
    image_id: str
    block: int


@dataclass(slots=True)
class _Members:
    """Images and texts of a tar, in its order."""

    images: list[_Image] = field(default_factory=list)
    texts: list[tuple[str, bytes]] = field(default_factory=list)


def read_webdataset(source: Source) -> CaptionedImages | None:
    """Read `key.jpg` with `key.txt`, one caption a line, or with `key.json`; see `tar_images.pair_members`.

    The splits are those in the tars' names or folders: `train/000.tar`, `flickr-train-000.tar`. An image has the same
    id as in `imcap caption`, see `tar_images.ImageIds`.
    """
    names = source.files_of_kind("tar")
    if not names:
        return None
    collector = Collector(source, f"WebDataset, {len(names):,} tar{'s' * (len(names) != 1)}")
    for name in source.files_of_kind("compressed tar"):
        collector.add_problem("compressed tar is not read: decompress it", "compressed tars are not read", name)
    ids = tar_images.ImageIds()
    packed: dict[str, PackedImage] = {}
    # Before anything is read, so that a tar that is rewritten meanwhile does not count as the version that was read.
    tables = describe_tables(storage.join(source.base, name) for name in names)
    for name in names:
        _add_captions(collector, name, _read_tar(collector, name, ids), packed)
    return collector.to_dataset(packed=packed, tables=tables)


def _add_captions(collector: Collector, tar: str, members: _Members, packed: dict[str, PackedImage]) -> None:
    """Add the captioned images of a tar, with their positions in `packed`; count everything else."""
    pairing = tar_images.pair_members([image.name for image in members.images], [name for name, _ in members.texts])
    location = storage.join(collector.source.base, tar)
    split = split_in_path(tar) or split_in_name(tar.rpartition("/")[2].removesuffix(".tar"))
    repeated = Counter([*(image.name for image in members.images), *(name for name, _ in members.texts)])
    used: Counter[int] = Counter()
    for image, levels in zip(members.images, pairing.texts, strict=True):
        where = f"{tar}, {image.name}"
        captions: list[str] = []
        for numbers in levels:
            captions = caption_texts(collector, [members.texts[number] for number in numbers], where=where)
            if captions:
                used.update(numbers)
                break
        if not captions:
            collector.add_uncaptioned(image.image_id, where=where)
            continue
        path = storage.join(location, image.name)
        if path in packed:
            path = f"{path}#{image.block}"
        packed[path] = PackedImage(location, image.block, 0)
        collector.add(image.image_id, captions, where=where, path=path, split=split)
    for name, count in repeated.items():
        if count > 1:
            collector.add_problem(
                "name is in a tar more than once", "names are in a tar more than once", f"{tar}, {name} ({count} times)"
            )
    for kind, numbers in (
        (("caption file has no image", "caption files have no image"), pairing.unpaired),
        (
            ("caption file matches several images", "caption files match several images"),
            pairing.ambiguous,
        ),
        (
            ("caption file belongs to several images", "caption files belong to several images"),
            [number for number, count in used.items() if count > 1],
        ),
    ):
        for number in numbers:
            collector.add_problem(*kind, f"{tar}, {members.texts[number][0]}")


def _read_tar(collector: Collector, name: str, ids: tar_images.ImageIds) -> _Members:
    """The images and texts of a tar; if it ends early, those before its end."""
    members = _Members()
    try:
        with tar_images.open_tar(storage.join(collector.source.base, name)) as tar:
            for member in tar_images.list_files(tar):
                key, extensions = tar_images.split_name(member.name)
                if not key or is_in_hidden_folder(member.name):
                    continue
                kind = extensions.rpartition(".")[2]
                text = tar_images.printable_name(member)
                if kind in IMAGE_EXTENSIONS:
                    members.images.append(_Image(text, ids.choose(name, member), tar_images.block_of(member)))
                elif kind in CAPTION_EXTENSIONS and member.size <= MAX_CAPTION_BYTES:
                    content = tar.extractfile(member)
                    members.texts.append((text, content.read() if content else b""))
    except tar_images.DAMAGED as error:
        collector.add_problem("tar is damaged or ends early", "tars are damaged or end early", f"{name} ({error})")
    names: dict[str, list[str]] = defaultdict(list)
    for image in members.images:
        names[image.name.rpartition(".")[0]].append(image.name)
    kept = {name for same in names.values() for name in readable_names(same)}
    members.images = [image for image in members.images if image.name in kept]
    return members


FORMAT: Final = DatasetFormat(description="WebDataset tars", read=read_webdataset, is_packed=True, covers_folder=True)
