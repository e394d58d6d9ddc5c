from __future__ import annotations

import io
import tarfile
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imcap_ray.data.image_reading import read_rows
from imcap_ray.data.manifest import InputOptions, InputSummary, build_manifest
from imcap_ray.data.parquet_files import read_table
from imcap_ray.data.tar_images import (
    IdSet,
    ImageIds,
    Pairing,
    block_of,
    list_files,
    open_tar,
    pair_members,
    read_files,
    split_name,
)
from imcap_ray.errors import ImageError, InputError
from tests.small_data import jpeg, write_tar

LONG = "deep/" * 60 + "name of more than a hundred letters.jpg"  # has headers before its own


def read_manifest(folder: Path) -> list[dict[str, Any]]:
    return [row for part in sorted(folder.iterdir()) for row in read_table(str(part)).to_pylist()]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_every_file_is_found_by_its_block(tmp_path: Path, format: int) -> None:
    files = {"a.jpg": b"x" * 512, "empty.jpg": b"", "b.png": b"y" * 1000, "c.jpg": b"z"}
    if format != tarfile.USTAR_FORMAT:
        files |= {LONG: b"long", "caf\u00e9.jpg": b"accent"}
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as tar:
        tar.addfile(tarfile.TarInfo("folder.jpg"), io.BytesIO())
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

    with open_tar(str(tmp_path / "a.tar")) as opened:
        blocks = {member.name: block_of(member) for member in list_files(opened)}
    contents = dict(read_files(str(tmp_path / "a.tar"), sorted(blocks.values()), max_bytes=10**6))

    assert {name: contents[block] for name, block in blocks.items()} == {"folder.jpg": b"", **files}


def test_a_file_that_cannot_be_read_does_not_affect_the_others(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"a.jpg": jpeg(0), "b.jpg": b"x" * 5000, "c.jpg": jpeg(2), "d.jpg": jpeg(3)})
    build_manifest(str(path), str(tmp_path / "manifest"))
    # As from a store without sizes and times: otherwise the entire tar counts as rewritten.
    rows = [row | {"size": -1, "modified_ns": 0} for row in read_manifest(tmp_path / "manifest")]
    with path.open("r+b") as file:
        file.seek(512 * (rows[2]["row_group"] - 1))
        file.write(b"no header any more")
        file.truncate(512 * rows[3]["row_group"] + 10)

    contents = [data for _, data in read_rows(rows, str(tmp_path))]
    [limited] = [data for block, data in read_files(str(path), [rows[1]["row_group"]], max_bytes=4999)]

    assert contents[:2] == [jpeg(0), b"x" * 5000]
    assert [data.code for data in contents[2:] if isinstance(data, ImageError)] == ["read_error", "read_error"]
    assert "the tar has changed or is damaged: ends after 10 of" in str(contents[3])
    assert isinstance(limited, OSError)


def test_ids_are_keys_and_do_not_change_when_tars_are_added(tmp_path: Path) -> None:
    source = tmp_path / "in"
    write_tar(
        source / "0.tar", {"a.jpg": jpeg(0), "a.txt": b"x", "deep/b.left.jpg": jpeg(1), "deep/b.right.png": jpeg(2)}
    )
    write_tar(source / "deep/1.tar", {"a.jpg": jpeg(3), ".hidden.jpg": jpeg(4), "a.webp": jpeg(5), "c.jpg.bak": b"x"})
    ids = ["a", "deep/b", "deep/b.right.png", "deep/1/a", "a.webp"]

    first = build_manifest(str(source), str(tmp_path / "manifest"), InputOptions(limit=3))
    assert [row["image_id"] for row in read_manifest(tmp_path / "manifest")] == ids[:3]
    build_manifest(str(source), str(tmp_path / "manifest"))
    assert [row["image_id"] for row in read_manifest(tmp_path / "manifest")] == ids
    write_tar(source / "deep/2.tar", {"a.jpg": jpeg(6)})
    later = build_manifest(str(source), str(tmp_path / "manifest"))

    assert first == InputSummary(num_images=3, num_ignored=0, description="WebDataset, 2 tars")
    assert (later.num_images, later.changed.num_rows) == (6, 0)
    rows = read_manifest(tmp_path / "manifest")
    assert [row["image_id"] for row in rows] == [*ids, "deep/2/a"]
    contents = [data for _, data in read_rows(rows, str(source))]
    assert contents == [jpeg(number) for number in (0, 1, 2, 3, 5, 6)]


def test_the_same_file_twice_in_a_tar_is_two_images(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(3):
            info = tarfile.TarInfo("./a.jpg")
            info.size = len(jpeg(number))
            tar.addfile(info, io.BytesIO(jpeg(number)))

    with open_tar(str(tmp_path / "a.tar")) as opened:
        ids = ImageIds()
        image_ids = [ids.choose("a.tar", member) for member in list_files(opened)]

    assert len(set(image_ids)) == 3 and not [image_id for image_id in image_ids if image_id.startswith(".")]
    assert image_ids[:2] == ["a", "a.jpg"]


@pytest.mark.parametrize("kind", ["cut", "compressed", "no tar"])
def test_an_unreadable_tar_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    path = write_tar(tmp_path / "in" / "a.tar", {"a.jpg": jpeg(0), "b.jpg": jpeg(1)})
    if kind == "cut":
        path.write_bytes(path.read_bytes()[: len(jpeg(0)) + 1024 + 300])
    elif kind == "compressed":
        with tarfile.open(path, "w:gz") as tar:
            tar.add(__file__, "a.jpg")
    else:
        path.write_bytes(b"something else" * 100)

    with pytest.raises(InputError, match=f"{path} is damaged, ends early or is not an uncompressed tar"):
        build_manifest(str(tmp_path / "in"), str(tmp_path / "manifest"))


def slow_pairing(images: Sequence[str], texts: Sequence[str]) -> Pairing:
    """The rule of `pair_members`, by comparing every text with every image."""

    def clean(name: str) -> str:
        return name.removeprefix("./")

    def key(name: str) -> str:
        return split_name(name)[0]

    def stem(name: str) -> str:
        return clean(name).rpartition(".")[0]

    image_stems = {stem(name) for name in images}
    is_key_enough = not any(stem(one) == stem(two) != key(one) for one in images for two in texts)
    pairing, images_of = Pairing([[] for _ in images]), {clean(text): set[str]() for text in texts}
    for number, image in enumerate(images):
        here = list(dict.fromkeys(clean(text) for text in texts if key(text) == key(image)))
        free = [text for text in here if stem(text) not in image_stems]
        own = [text for text in here if stem(text) == stem(image)]
        own += [text for text in free if stem(text).startswith(f"{stem(image)}.")]
        common = [text for text in free if stem(image).startswith(f"{stem(text)}.")]
        is_only = len({clean(name) for name in images if key(name) == key(image)}) == 1
        if not own and not common and is_only and is_key_enough:
            own = here
        same = [one for one, name in enumerate(images) if clean(name) == clean(image)]
        for level in (own, common):
            matches = []
            for text in level:
                images_of[text].add(clean(image))
                positions = [one for one, name in enumerate(texts) if clean(name) == text]
                if len(positions) == len(same):
                    matches.append(positions[same.index(number)])
            if matches:
                pairing.texts[number].append(matches)
    num_images, num_texts = Counter(map(clean, images)), Counter(map(clean, texts))
    for number, text in enumerate(texts):
        if any(num_images[image] != num_texts[clean(text)] for image in images_of[clean(text)]):
            pairing.ambiguous.append(number)
        elif not images_of[clean(text)]:
            pairing.unpaired.append(number)
    return pairing


STEMS = st.sampled_from(["k", "k.a", "k.b", "k.a.b", "k.a.b.c", "k.ab", "k..a", "m", "m.a", "./k", "d/k", "d.e/k.a"])
NAMES = st.lists(st.builds("{}{}".format, STEMS, st.sampled_from([".x", ".y"])), max_size=12)


@settings(max_examples=500, deadline=None)
@given(images=NAMES, texts=NAMES)
def test_members_are_paired_as_by_pairwise_comparison(images: list[str], texts: list[str]) -> None:
    images, texts = [name.replace(".x", ".jpg") for name in images], [name.replace(".x", ".txt") for name in texts]

    actual, expected = pair_members(images, texts), slow_pairing(images, texts)

    assert actual.texts == expected.texts
    assert (sorted(actual.unpaired), sorted(actual.ambiguous)) == (expected.unpaired, expected.ambiguous)


def test_a_tar_whose_images_share_one_key_is_paired_without_pairwise_comparison() -> None:
    stems = [f"2023.05.{number:06}" for number in range(50_000)]  # compared with each other they take an hour

    actual = pair_members([f"{stem}.jpg" for stem in stems], [f"{stem}.caption.txt" for stem in stems])

    assert actual == Pairing([[[number]] for number in range(50_000)])


def test_a_set_of_ids_takes_few_bytes_per_id() -> None:
    names = [f"folder/{number}.jpg" for number in range(100_000)]

    tracemalloc.start()
    ids = IdSet(iter(names))
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert size < 16 * len(names)
    assert all(name in ids for name in names)
    assert not any(f"{name}.png" in ids for name in names)
    assert "a" not in IdSet([])


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a.jpg", ("a", "jpg")),
        ("deep.er/a.left.JPG", ("deep.er/a", "left.jpg")),
        ("a", ("a", "")),
        ("./a.jpg", ("a", "jpg")),
        ("./deep/a.jpg", ("deep/a", "jpg")),
        (".a.jpg", ("", "a.jpg")),
        ("deep/.a.jpg", ("", "a.jpg")),
    ],
)
def test_names_are_split_as_by_webdataset(name: str, parts: tuple[str, str]) -> None:
    assert split_name(name) == parts
