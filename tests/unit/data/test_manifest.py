"""Every image of any input is one row of its manifest."""

from __future__ import annotations

import gzip
import itertools
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import Mock

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from imcap_ray import storage
from imcap_ray.data.columns import ColumnOptions, ImageColumns
from imcap_ray.data.datasets import load_dataset
from imcap_ray.data.image_reading import read_rows
from imcap_ray.data.manifest import (
    InputOptions,
    InputSummary,
    build_manifest,
    largest_row_group,
    read_image_columns,
    update_manifest,
)
from imcap_ray.data.parquet_images import read_table_images
from imcap_ray.data.schemas import CAPTIONS_SCHEMA, MANIFEST_SCHEMA
from imcap_ray.errors import DatasetError, InputError
from imcap_ray.runs.captions_table import open_captions
from tests.small_data import jpeg, write_tar

IMAGES = [jpeg(number, width=20, height=20) for number in range(7)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "input").mkdir()
    return tmp_path / "input"


@pytest.fixture
def target(tmp_path: Path) -> str:
    return str(tmp_path / "manifest")


def read(folder: str) -> list[dict[str, Any]]:
    """Read the rows of a manifest in the order of their numbers, and check its invariants."""
    tables = [pq.read_table(location) for location in storage.list_work_tables(folder)]
    assert all(table.schema.equals(MANIFEST_SCHEMA) for table in tables)
    rows: list[dict[str, Any]] = sorted(pa.concat_tables(tables).to_pylist(), key=lambda row: row["manifest_id"])
    assert [row["manifest_id"] for row in rows] == list(range(len(rows)))
    assert len({row["image_id"] for row in rows}) == len(rows)
    return rows


def ids(folder: str) -> list[str]:
    return [row["image_id"] for row in read(folder)]


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def write_table(path: Path, columns: dict[str, Any], *, row_group_size: int = 3) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def hugging_face(images: Sequence[bytes | None], paths: Sequence[str | None]) -> pa.Array:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.array([{"bytes": data, "path": path} for data, path in zip(images, paths, strict=True)], kind)


def captured_bytes(rows: list[dict[str, Any]], target: str = "") -> list[bytes | None]:
    """Read the images of table rows from the columns recorded in the manifest `target`."""
    names = read_image_columns(target) if target else ()
    by_id = {row["image_id"]: data for row, data in read_rows(rows, None, image_columns=names)}
    return [data if isinstance(data := by_id[row["image_id"]], bytes) else None for row in rows]


# ---- a folder of images


def test_a_folder_is_read_recursively(source: Path, target: str) -> None:
    touch(source, "b.jpg", "a.PNG", "deep/er/c.webp", "notes.txt", "deep/README")

    summary = build_manifest(str(source), target)

    assert summary == InputSummary(num_images=3, num_ignored=2, description="folder")
    rows = read(target)
    assert [row["image_id"] for row in rows] == ["a.PNG", "b.jpg", "deep/er/c.webp"]
    assert [row["image_path"] for row in rows] == [f"{source}/{row['image_id']}" for row in rows]
    assert {(row["table_path"], row["row_group"], row["row"]) for row in rows} == {("", -1, -1)}


def test_a_folder_is_read_without_subfolders_on_request(source: Path, target: str) -> None:
    touch(source, "a.jpg", "deep/b.jpg", "deep/c.txt")

    summary = build_manifest(str(source), target, InputOptions(recursive=False))

    assert summary == InputSummary(num_images=1, num_ignored=0, description="folder")
    assert ids(target) == ["a.jpg"]


def test_hidden_files_are_not_images(source: Path, target: str) -> None:
    touch(source, "a.jpg", ".b.jpg", "deep/._c.jpg")

    assert build_manifest(str(source), target) == InputSummary(num_images=1, num_ignored=2, description="folder")
    assert ids(target) == ["a.jpg"]


def test_every_photograph_is_listed_by_its_name(source: Path, target: str) -> None:
    names = ["a.mpo", "b.jpf", "c.avifs", "d.cur", "e.dds", "f.jxl", "g.CR2", "h.nef", "i.dng", "j.raf"]
    touch(source, *names)

    build_manifest(str(source), target)

    assert ids(target) == names


def test_a_photograph_with_an_unknown_name_is_listed_by_its_content(source: Path, target: str) -> None:
    for name in ("IMG_0001", "b.jpg_large", "c.bin", "d.xyz"):
        (source / name).write_bytes(IMAGES[0])
    for name, content in (("README", b"BMW and other cars " * 9), ("NOTES", b"text " * 99), ("paper", b"%PDF-1.7" * 9)):
        (source / name).write_bytes(content)

    summary = build_manifest(str(source), target)

    assert ids(target) == ["IMG_0001", "b.jpg_large", "c.bin", "d.xyz"]
    assert summary.ignored == {"no extension": 3}


def test_photographs_with_unknown_names_are_listed_in_a_store_too(target: str) -> None:
    storage.write_bytes("memory://unknown-names/4f2a", IMAGES[0])
    storage.write_bytes("memory://unknown-names/notes", b"text " * 99)

    build_manifest("memory://unknown-names", target)

    assert ids(target) == ["4f2a"]


class _CountingStore(MemoryFileSystem):  # type: ignore[misc]
    """A store that records which parts of its files are read."""

    protocol = "counting"
    ranges: ClassVar[list[tuple[str, int | None, int | None]]] = []

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        self.ranges.append((path.rpartition("/")[2], start, end))
        return super().cat_file(path, start=start, end=end, **options)  # type: ignore[no-any-return]


def test_a_store_is_asked_only_for_the_first_bytes_of_files_with_unknown_names(target: str) -> None:
    fsspec.register_implementation("counting", _CountingStore, clobber=True)
    for name in ("4f2a", "notes", "a.jpg", "a.txt", "a.json", "clip.mov", "weights.safetensors"):
        storage.write_bytes(f"counting://first-bytes/{name}", IMAGES[0] + bytes(2**20))

    build_manifest("counting://first-bytes", target)

    assert sorted(_CountingStore.ranges) == [("4f2a", 0, 64), ("notes", 0, 64)]


def test_files_whose_extension_is_that_of_other_data_are_not_opened(source: Path, target: str) -> None:
    touch(source, "a.jpg")
    for name in ("b.json", "c.txt", "d.mp4", "e.caption", "f.npy"):
        (source / name).write_bytes(IMAGES[0])

    build_manifest(str(source), target)

    assert ids(target) == ["a.jpg"]


def test_a_photograph_with_an_unknown_name_that_may_not_be_read_is_listed(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec.register_implementation("counting", _CountingStore, clobber=True)
    storage.write_bytes("counting://refused/4f2a", IMAGES[0])
    monkeypatch.setattr(_CountingStore, "cat_file", Mock(side_effect=RuntimeError("HTTP status 403")))

    build_manifest("counting://refused", target)

    assert ids(target) == ["4f2a"]


def test_ignored_files_are_counted_by_their_extensions(source: Path, target: str) -> None:
    touch(source, "a.jpg", *(f"{number}.txt" for number in range(9)), "b.mov", "deep/c.MOV", ".d.jpg", "unknown")

    summary = build_manifest(str(source), target)

    assert summary.ignored == {".txt": 9, ".mov": 2, "hidden": 1, "no extension": 1}
    assert summary.num_ignored == 13


def test_many_different_extensions_are_counted_together(source: Path, target: str) -> None:
    touch(source, "a.jpg", *(f"frame.{number:05d}" for number in range(150)))

    summary = build_manifest(str(source), target)

    assert len(summary.ignored) <= 101 and summary.ignored["other extensions"] == 50


def test_hidden_folders_are_skipped_like_hidden_files(source: Path, target: str) -> None:
    touch(source, "a.jpg", ".thumbnails/a.jpg", "deep/@eaDir/a.jpg", "deep/.git/b.png", "deep/c.jpg")

    summary = build_manifest(str(source), target)

    assert ids(target) == ["a.jpg", "deep/c.jpg"]
    assert summary.ignored == {}


def test_hidden_folders_of_a_tar_are_skipped_too(source: Path, target: str) -> None:
    names = ["./a.jpg", "./.thumbnails/a.jpg", "deep/@eaDir/b.jpg", "deep/c.jpg"]
    write_tar(source / "a.tar", {name: IMAGES[0] for name in names})

    build_manifest(str(source), target)

    assert ids(target) == ["a", "deep/c"]


def test_a_table_that_names_photographs_without_extensions_next_to_it_is_ignored(source: Path, target: str) -> None:
    for number in range(3):
        (source / f"{number}").write_bytes(IMAGES[number])
    write_table(source / "names.parquet", {"path": ["0", "1", "2"]})

    summary = build_manifest(str(source), target)

    assert (ids(target), summary.ignored) == (["0", "1", "2"], {".parquet": 1})


def test_a_table_that_names_a_file_that_is_not_recognised_next_to_images_is_refused(source: Path, target: str) -> None:
    touch(source, "a.jpg", "b.jpg")
    (source / "photo").write_bytes(b"no known format " * 9)
    write_table(source / "names.parquet", {"path": ["a.jpg", "b.jpg", "photo"]})

    with pytest.raises(InputError, match=r"names images that are not among them \(row 2: .*photo"):
        build_manifest(str(source), target)


def test_a_single_image_is_an_input_too(source: Path, target: str) -> None:
    touch(source, "a.jpg", "b.jpg")

    summary = build_manifest(str(source / "a.jpg"), target)

    assert summary == InputSummary(num_images=1, num_ignored=0, description="image")
    assert [(row["image_id"], row["image_path"]) for row in read(target)] == [("a.jpg", f"{source}/a.jpg")]


def test_a_dangling_link_is_listed_as_an_image(source: Path, target: str) -> None:
    (source / "lost.jpg").symlink_to(source / "nowhere.jpg")

    assert build_manifest(str(source), target).num_images == 1
    assert ids(target) == ["lost.jpg"]


def test_a_link_loop_ends(source: Path, target: str) -> None:
    touch(source, "a.jpg", "deep/b.jpg")
    (source / "deep" / "up").symlink_to(source)

    assert build_manifest(str(source), target).num_images == 2


def test_a_name_that_is_not_utf8_gives_an_ordinary_row(source: Path, target: str) -> None:
    touch(source, "a.jpg")
    try:
        with open(os.fsencode(source) + b"/caf\xe9.jpg", "wb"):
            pass
    except OSError:
        pytest.skip("this file system holds only names in UTF-8")

    assert build_manifest(str(source), target).num_images == 2
    assert ids(target) == ["a.jpg", "caf\\xe9.jpg"]


@pytest.mark.parametrize("kind", ["files", "tar", "table", "paths"])
def test_images_in_files_with_names_that_are_not_utf8_are_read(source: Path, target: str, kind: str) -> None:
    folder = os.fsencode(source) + b"/caf\xe9"
    try:
        os.mkdir(folder)
    except OSError:
        pytest.skip("this file system holds only names in UTF-8")
    written = source / "written"
    if kind == "tar":
        write_tar(written, {"a.jpg": IMAGES[0], "a.txt": b"a dog"})
        os.rename(written, folder + b"/\xe9.tar")
    elif kind == "table":
        write_table(written, {"image": IMAGES[:1], "caption": ["a dog"], "id": ["a"]})
        os.rename(written, folder + b"/\xe9.parquet")
    else:
        for name, content in ((b"/\xe9.jpg", IMAGES[0]), (b"/\xe9.txt", b"a dog")):
            written.write_bytes(content)
            os.rename(written, folder + name)
        if kind == "paths":
            os.unlink(folder + b"/\xe9.txt")
            paths = pa.array([b"caf\xe9/\xe9.jpg"]).view(pa.string())
            write_table(source / "a.parquet", {"path": paths, "caption": ["a dog"]})
    image_id = "caf\\xe9/\\xe9.jpg" if kind in ("files", "paths") else "a"
    location = str(source / "a.parquet") if kind == "paths" else str(source)

    for _ in range(2):  # a run and its resumption
        summary = build_manifest(location, target)
        assert (summary.num_images, summary.changed.num_rows) == (1, 0)
    dataset = load_dataset(location)

    assert ids(target) == [image_id]
    assert captured_bytes(read(target), target) == IMAGES[:1]
    assert dataset.references() == {image_id: ["a dog"]}
    assert not any("no file" in note for note in dataset.notes)
    rows = dataset.manifest(dataset.table).to_pylist()
    assert [data for _, data in read_rows(rows, None, image_columns=dataset.image_columns)] == IMAGES[:1]


def test_a_limit_takes_the_first_images(source: Path, target: str) -> None:
    touch(source, *(f"{number}.jpg" for number in range(5)))

    assert build_manifest(str(source), target, InputOptions(limit=3)).num_images == 3
    assert ids(target) == ["0.jpg", "1.jpg", "2.jpg"]


def test_a_remote_file_system_is_read_the_same_way(target: str) -> None:
    for name in ("a.jpg", "deep/b.jpg", "c.txt"):
        storage.write_bytes(f"memory://manifest-test/in/{name}", b"1")

    summary = build_manifest("memory://manifest-test/in/", target)

    assert (summary.num_images, summary.num_ignored) == (2, 1)
    assert [(row["image_id"], row["image_path"]) for row in read(target)] == [
        ("a.jpg", "memory://manifest-test/in/a.jpg"),
        ("deep/b.jpg", "memory://manifest-test/in/deep/b.jpg"),
    ]


# ---- repeated listing


def test_the_same_input_again_adds_nothing(source: Path, target: str) -> None:
    touch(source, "a.jpg", "b.jpg")
    build_manifest(str(source), target)
    before = {path.name: path.read_bytes() for path in Path(target).iterdir()}

    summary = build_manifest(str(source), target)

    assert summary.num_images == 2
    assert {path.name: path.read_bytes() for path in Path(target).iterdir()} == before


def test_new_images_are_numbered_after_the_old_ones(source: Path, target: str) -> None:
    touch(source, "b.jpg", "d.jpg")
    build_manifest(str(source), target)
    touch(source, "a.jpg", "c.jpg")
    build_manifest(str(source), target)
    touch(source, "0.jpg")

    assert build_manifest(str(source), target).num_images == 5

    assert ids(target) == ["b.jpg", "d.jpg", "a.jpg", "c.jpg", "0.jpg"]


def test_a_limit_can_be_removed_later(source: Path, target: str) -> None:
    touch(source, *(f"{number}.jpg" for number in range(4)))
    build_manifest(str(source), target, InputOptions(limit=2))

    assert build_manifest(str(source), target).num_images == 4
    assert ids(target) == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]


def test_a_long_manifest_has_several_parts(source: Path, target: str) -> None:
    touch(source, *(f"{number}.jpg" for number in range(5)))
    build_manifest(str(source), target, rows_per_part=2)
    touch(source, "00.jpg", "5.jpg")

    build_manifest(str(source), target, rows_per_part=2)

    assert len(list(Path(target).iterdir())) >= 4
    assert ids(target) == [*(f"{number}.jpg" for number in range(5)), "00.jpg", "5.jpg"]


# ---- Parquet


def test_image_bytes_are_located_by_table_row_group_and_row(source: Path, target: str) -> None:
    path = write_table(source / "photos.parquet", {"caption": ["x"] * 7, "image": IMAGES})

    summary = build_manifest(str(path), target)

    assert summary == InputSummary(num_images=7, num_ignored=0, description="Parquet, 1 file")
    rows = read(target)
    assert [row["image_id"] for row in rows] == [f"photos.parquet#{number}" for number in range(7)]
    assert [(row["row_group"], row["row"]) for row in rows] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0)]
    assert {row["image_path"] for row in rows} == {""}
    assert captured_bytes(rows) == IMAGES


def test_several_tables_in_folders_are_one_input(source: Path, target: str) -> None:
    (source / "deep").mkdir()
    write_table(source / "b.parquet", {"img": IMAGES[:2]})
    write_table(source / "deep" / "a.parquet", {"img": IMAGES[2:4]})
    touch(source, "notes.txt", "_metadata.parquet")

    summary = build_manifest(str(source), target)

    assert summary == InputSummary(num_images=4, num_ignored=2, description="Parquet, 2 files")
    assert ids(target) == ["b.parquet#0", "b.parquet#1", "deep/a.parquet#0", "deep/a.parquet#1"]
    assert captured_bytes(read(target)) == IMAGES[:4]


@pytest.mark.parametrize("column", ["image_id", "__key__", "key", "id"])
def test_an_id_column_gives_the_image_ids(source: Path, target: str, column: str) -> None:
    path = write_table(source / "photos.parquet", {"jpg": IMAGES[:4], column: ["d", "a", "c", "b"]})

    build_manifest(str(path), target)

    assert ids(target) == ["d", "a", "c", "b"]
    assert captured_bytes(read(target)) == IMAGES[:4]


def test_ids_can_be_numbers(source: Path, target: str) -> None:
    build_manifest(str(write_table(source / "photos.parquet", {"image": IMAGES[:3], "id": [30, 10, 20]})), target)

    assert ids(target) == ["30", "10", "20"]


def test_paths_are_relative_to_the_folder_of_the_table(source: Path, target: str) -> None:
    paths = ["a.jpg", "deep/b.jpg", f"{source}/c.jpg", f"file://{source}/d.jpg", "deep/../e.jpg"]
    build_manifest(str(write_table(source / "list.parquet", {"path": paths, "title": ["x"] * 5})), target)

    rows = read(target)

    assert [row["image_id"] for row in rows] == paths
    assert [storage.absolute(row["image_path"]) for row in rows] == [
        f"{source}/{name}" for name in ("a.jpg", "deep/b.jpg", "c.jpg", "d.jpg", "e.jpg")
    ]
    assert {row["table_path"] for row in rows} == {""}


OUTSIDE = ["/elsewhere/c.jpg", "s3://bucket/d.jpg", "../e.jpg", "deep/../../e.jpg", "file:///elsewhere/f.jpg"]


@pytest.mark.parametrize("path", OUTSIDE)
@pytest.mark.parametrize("kind", ["path", "struct", "struct among others", "struct without statistics"])
def test_a_path_that_leads_out_of_the_folder_is_refused_before_anything_is_written(
    source: Path, target: str, path: str, kind: str
) -> None:
    paths = ["a.jpg", "b.jpg", "c.jpg", "d.jpg", path]
    images = [IMAGES[0] if kind == "struct among others" else None] * 4 + [None]
    column = {"path": paths} if kind == "path" else {"image": hugging_face(images, paths)}
    table = source / "list.parquet"
    pq.write_table(pa.table(column), table, row_group_size=3, write_statistics=kind != "struct without statistics")

    with pytest.raises(InputError) as caught:
        build_manifest(str(table), target)

    for words in (f"{table}, row 4: ", repr(path), f" {source};", "--allow-outside-paths"):
        assert words in str(caught.value)
    assert not Path(target).exists()
    assert build_manifest(str(table), target, InputOptions(limit=3)).num_images == 3


@pytest.mark.parametrize("kind", ["path", "struct"])
def test_a_path_can_lead_anywhere_if_allowed(source: Path, target: str, kind: str) -> None:
    column = {"path": OUTSIDE} if kind == "path" else {"image": hugging_face([None] * 5, OUTSIDE)}
    write_table(source / "list.parquet", column)

    build_manifest(str(source / "list.parquet"), target, InputOptions(allow_outside_paths=True))

    assert [row["image_path"] for row in read(target)] == [
        *OUTSIDE[:2],
        f"{source}/../e.jpg",
        f"{source}/deep/../../e.jpg",
        OUTSIDE[4],
    ]


def test_a_path_can_lead_from_one_folder_of_the_input_to_another(source: Path, target: str) -> None:
    (source / "tables").mkdir()
    write_table(source / "tables" / "list.parquet", {"path": ["../images/a.jpg"]})

    assert build_manifest(str(source), target).num_images == 1
    with pytest.raises(InputError, match=f"leads out of {source}/tables;"):
        build_manifest(str(source / "tables"), f"{target}2")


def test_a_link_in_the_folder_is_followed_anywhere(source: Path, tmp_path: Path, target: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.jpg").write_bytes(IMAGES[0])
    (source / "linked").symlink_to(tmp_path / "elsewhere")
    write_table(source / "list.parquet", {"path": ["linked/a.jpg"]})

    build_manifest(str(source / "list.parquet"), target)

    assert storage.read_bytes(read(target)[0]["image_path"]) == IMAGES[0]


def test_a_path_with_a_secret_is_refused_even_if_outside_paths_are_allowed(source: Path, target: str) -> None:
    signed = "https://bucket.s3.amazonaws.com/a.jpg?X-Amz-Signature=planted"
    path = write_table(source / "list.parquet", {"path": ["a.jpg", signed]})

    with pytest.raises(InputError, match=f"{path}, row 1: ") as caught:
        build_manifest(str(path), target, InputOptions(allow_outside_paths=True))
    assert "planted" not in str(caught.value)


def test_a_hugging_face_struct_gives_bytes_and_names(source: Path, target: str) -> None:
    path = write_table(source / "train.parquet", {"image": hugging_face(IMAGES[:4], ["a", "b", "c", "d"])})

    build_manifest(str(path), target)

    assert ids(target) == ["a", "b", "c", "d"]
    assert captured_bytes(read(target)) == IMAGES[:4]


def test_a_hugging_face_struct_can_point_to_a_file_instead(source: Path, target: str) -> None:
    images = hugging_face([IMAGES[0], None, None], ["a.jpg", "images/b.jpg", None])
    path = write_table(source / "train.parquet", {"image": images})

    build_manifest(str(path), target)

    rows = read(target)
    assert [row["image_id"] for row in rows] == ["train.parquet#0", "train.parquet#1", "train.parquet#2"]
    assert [row["image_path"] for row in rows] == ["", f"{source}/images/b.jpg", ""]
    assert captured_bytes([rows[0], rows[2]]) == [IMAGES[0], None]


def test_a_path_next_to_bytes_is_only_a_name(source: Path, target: str) -> None:
    path = write_table(source / "train.parquet", {"image": hugging_face(IMAGES[:5], OUTSIDE)})

    build_manifest(str(path), target)

    rows = read(target)
    assert [(row["image_id"], row["image_path"]) for row in rows] == [(name, "") for name in OUTSIDE]
    assert captured_bytes(rows) == IMAGES[:5]


def test_names_that_are_not_unique_are_not_used_as_ids(source: Path, target: str) -> None:
    images = hugging_face(IMAGES[:2], ["image.jpg", "image.jpg"])

    build_manifest(str(write_table(source / "train.parquet", {"image": images})), target)

    assert ids(target) == ["train.parquet#0", "train.parquet#1"]


def test_repeated_ids_are_refused_even_across_files(source: Path, target: str) -> None:
    write_table(source / "a.parquet", {"image": IMAGES[:2], "id": ["x", "y"]})
    write_table(source / "b.parquet", {"image": IMAGES[:2], "id": ["z", "x"]})

    with pytest.raises(InputError, match="image ids must be unique, but 'x' occurs more than once"):
        build_manifest(str(source), target)


def test_a_null_is_a_missing_image_and_keeps_its_row(source: Path, target: str) -> None:
    path = write_table(source / "a.parquet", {"image": pa.array([IMAGES[0], None], pa.binary())})

    assert build_manifest(str(path), target).num_images == 2
    assert captured_bytes(read(target)) == [IMAGES[0], None]


def test_a_limit_can_end_within_a_table(source: Path, target: str) -> None:
    path = write_table(source / "a.parquet", {"image": IMAGES, "id": list("abcdefg")})

    assert build_manifest(str(path), target, InputOptions(limit=5)).num_images == 5
    assert ids(target) == list("abcde")


def test_images_next_to_a_table_are_the_input(source: Path, target: str) -> None:
    write_table(source / "captions.parquet", {"image_path": ["a.jpg"], "caption": ["x"]})
    touch(source, "a.jpg")

    assert build_manifest(str(source), target) == InputSummary(num_images=1, num_ignored=1, description="folder")


def test_the_largest_row_group_of_the_tables_of_an_input(source: Path, target: str) -> None:
    for name, row_group_size in (("a", 2), ("b", 5)):
        write_table(source / f"{name}.parquet", {"image": IMAGES}, row_group_size=row_group_size)
    build_manifest(str(source), target)
    assert largest_row_group(target) == 5


def test_image_files_have_no_row_group(source: Path, target: str) -> None:
    touch(source, "a.jpg", "b.jpg")
    build_manifest(str(source), target)
    assert largest_row_group(target) == 0


def test_only_the_requested_rows_are_read(source: Path) -> None:
    path = write_table(source / "a.parquet", {"image": IMAGES}, row_group_size=7)

    images = dict(read_table_images(str(path), [(0, 1), (0, 5)]))

    assert images == {(0, 1): IMAGES[1], (0, 5): IMAGES[5]}


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"image": pa.binary(), "data": pa.binary()}, ("image", "bytes")),
        ({"pixels": pa.binary(), "caption": pa.string()}, ("pixels", "bytes")),
        ({"image": pa.large_binary(), "path": pa.string()}, ("image", "bytes")),
        ({"image": pa.string(), "caption": pa.string()}, ("image", "path")),
        ({"file_name": pa.large_string()}, ("file_name", "path")),
        ({"photo": pa.struct([("bytes", pa.binary())]), "image": pa.binary()}, ("image", "bytes")),
        ({"image_path": pa.string(), "thumbnail": pa.binary()}, ("image_path", "path")),
        ({"image_path": pa.string(), "phash": pa.binary(), "md5": pa.binary()}, ("image_path", "path")),
        ({"Image": pa.binary(), "thumbnail": pa.binary()}, ("Image", "bytes")),
        ({"path": pa.string(), "audio": pa.struct([("bytes", pa.binary()), ("path", pa.string())])}, ("path", "path")),
    ],
)
def test_the_image_column_is_chosen_by_name_before_type(
    tmp_path: Path, columns: dict[str, pa.DataType], expected: tuple[str, str]
) -> None:
    values = {"binary": jpeg(), "large_binary": jpeg(), "struct": {"bytes": jpeg()}}
    table = pa.table(
        {name: pa.array([values.get(str(kind).partition("<")[0], "a.jpg")], kind) for name, kind in columns.items()}
    )
    pq.write_table(table, tmp_path / "a.parquet")

    column = ImageColumns().get(pq.ParquetFile(tmp_path / "a.parquet"), str(tmp_path / "a.parquet"))

    assert (column.name, column.kind) == expected


# ---- choice of columns

PHASH = [bytes(8)] * 7
THUMBNAILS = [jpeg(number, width=12, height=12) for number in range(10, 17)]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("thumbnail", THUMBNAILS),
        ("phash", PHASH),
        ("embedding", [bytes(512)] * 7),
        ("audio", [{"bytes": b"RIFF" + bytes(100), "path": f"{number}.wav"} for number in range(7)]),
    ],
)
def test_files_named_by_a_table_take_precedence_over_its_bytes(
    source: Path, target: str, name: str, values: list[Any]
) -> None:
    paths = [f"{number}.jpg" for number in range(7)]
    table = write_table(source / "photos.parquet", {name: values, "image_path": paths})

    summary = build_manifest(str(table), target)

    assert [row["image_path"] for row in read(target)] == [f"{source}/{path}" for path in paths]
    assert summary.notes == (f"{table}: images from column image_path (paths), ids are the paths",)
    assert (summary.image_column, summary.id_column) == ("image_path", None)


@pytest.mark.parametrize("name", ["phash", "embedding", "md5", "audio"])
def test_bytes_that_are_not_images_are_never_chosen(source: Path, target: str, name: str) -> None:
    table = write_table(source / "a.parquet", {name: [bytes(600)] * 7, "caption": ["x"] * 7})

    with pytest.raises(InputError, match=f"no column of images: .*--image-column.*; the values of {name} are not imag"):
        build_manifest(str(table), target)

    build_manifest(str(table), target, InputOptions(columns=ColumnOptions(image=name)))
    assert captured_bytes(read(target), target) == [bytes(600)] * 7


def test_an_image_column_of_any_name_is_found_by_its_content(source: Path, target: str) -> None:
    table = write_table(source / "a.parquet", {"phash": PHASH, "photo": pa.array([None, *IMAGES[1:]], pa.binary())})

    summary = build_manifest(str(table), target)

    assert summary.image_column == "photo"
    assert captured_bytes(read(target), target) == [None, *IMAGES[1:]]


def test_several_image_columns_are_refused_unless_one_is_named(source: Path, target: str) -> None:
    table = write_table(source / "a.parquet", {"left": IMAGES, "right": THUMBNAILS, "id": list("abcdefg")})

    with pytest.raises(InputError, match=r"columns of images, left \(bytes\) and right \(bytes\): give --image-column"):
        build_manifest(str(table), target)
    assert not Path(target).exists()
    summary = build_manifest(str(table), target, InputOptions(columns=ColumnOptions(image="right")))

    assert summary.notes == (f"{table}: images from column right (bytes), ids from column id",)
    assert captured_bytes(read(target), target) == THUMBNAILS


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            ColumnOptions(image="photo"),
            r"--image-column photo: .*a.parquet has no such column; its columns are image \(bi",
        ),
        (ColumnOptions(image="number"), "--image-column number: expected bytes, paths, .* got int64 in .*a.parquet"),
        (ColumnOptions(id="photo"), "--id-column photo: .*a.parquet has no such column"),
        (ColumnOptions(id="words"), "--id-column words: expected text, numbers or bytes, got list<.*> in .*a.parquet"),
        (
            ColumnOptions(id="number"),
            "image ids must be unique, but '1' occurs more than once; --id-column names",
        ),
    ],
)
def test_an_unsuitable_named_column_is_refused(source: Path, target: str, columns: ColumnOptions, message: str) -> None:
    table = {"image": IMAGES[:2], "number": [1, 1], "words": [["a"], ["b"]]}

    with pytest.raises(InputError, match=message):
        build_manifest(str(write_table(source / "a.parquet", table)), target, InputOptions(columns=columns))
    assert not Path(target).exists()


def test_ids_come_from_the_named_column(source: Path, target: str) -> None:
    table = write_table(source / "a.parquet", {"image": IMAGES[:2], "id": [1, 2], "sku": ["x", "y"]})

    summary = build_manifest(str(table), target, InputOptions(columns=ColumnOptions(id="sku")))

    assert ids(target) == ["x", "y"]
    assert summary.id_column == "sku"


def test_columns_are_found_in_any_case(source: Path, target: str) -> None:
    columns = {"Image": IMAGES[:2], "Image_ID": ["a", "b"], "Photo": THUMBNAILS[:2], "SKU": ["x", "y"]}
    table = str(write_table(source / "a.parquet", columns))
    named = InputOptions(columns=ColumnOptions(image="photo", id="sku"))

    for _ in range(2):  # a run and its resumption
        assert build_manifest(table, target).id_column == "Image_ID"
        assert build_manifest(table, f"{target}-named", named).id_column == "SKU"

    assert ids(target) == ["a", "b"]
    assert captured_bytes(read(target), target) == IMAGES[:2]
    assert ids(f"{target}-named") == ["x", "y"]
    assert captured_bytes(read(f"{target}-named"), f"{target}-named") == THUMBNAILS[:2]
    assert build_manifest(table, f"{target}-named", InputOptions(columns=ColumnOptions(image="Photo", id="SKU")))


def test_a_column_with_exactly_the_given_name_takes_precedence_over_its_other_case(source: Path, target: str) -> None:
    table = str(write_table(source / "a.parquet", {"image": IMAGES[:2], "ID": ["x", "y"], "id": ["a", "b"]}))

    build_manifest(table, target)
    assert ids(target) == ["a", "b"]
    with pytest.raises(InputError, match="--id-column Id: .* has several columns of this name"):
        build_manifest(table, f"{target}2", InputOptions(columns=ColumnOptions(id="Id")))


def test_a_manifest_of_a_version_that_ignored_ids_in_upper_case_keeps_its_ids(source: Path, target: str) -> None:
    table = str(write_table(source / "a.parquet", {"image": hugging_face(IMAGES[:2], ["a.jpg", "b.jpg"])}))
    build_manifest(table, target)
    without_columns(target)
    write_table(source / "a.parquet", {"image": hugging_face(IMAGES[:2], ["a.jpg", "b.jpg"]), "ID": ["x", "y"]})

    assert build_manifest(table, target).num_images == 2
    assert ids(target) == ["a.jpg", "b.jpg"]


def test_the_columns_of_an_input_do_not_change(source: Path, target: str) -> None:
    columns = {"image": IMAGES[:3], "photo": THUMBNAILS[:3], "id": list("abc"), "sku": list("xyz")}
    table = str(write_table(source / "a.parquet", columns))
    build_manifest(table, target, InputOptions(columns=ColumnOptions(image="photo", id="sku")))

    with pytest.raises(InputError, match="read from column photo, and would now be read from image: give --image-col"):
        build_manifest(table, target)
    with pytest.raises(InputError, match="column sku, and would now come from column id: give --id-column"):
        build_manifest(table, target, InputOptions(columns=ColumnOptions(image="photo")))
    assert build_manifest(table, target, InputOptions(columns=ColumnOptions(image="photo", id="sku"))).num_images == 3
    assert ids(target) == list("xyz")
    assert captured_bytes(read(target), target) == THUMBNAILS[:3]


def test_a_table_whose_column_was_renamed_is_read_from_the_new_column(source: Path, target: str) -> None:
    write_table(source / "a.parquet", {"img": IMAGES[:2], "id": ["a", "b"]})
    build_manifest(str(source), target)
    write_table(source / "a.parquet", {"image": IMAGES[2:5], "id": ["a", "b", "c"]})

    update_manifest(target, build_manifest(str(source), target).changed)

    assert captured_bytes(read(target), target) == IMAGES[2:5]


def test_tables_of_one_input_can_have_different_image_columns(source: Path, target: str) -> None:
    write_table(source / "a.parquet", {"img": IMAGES[:2], "phash": PHASH[:2]})
    write_table(source / "b.parquet", {"image": IMAGES[2:4], "md5": PHASH[:2]})
    write_table(source / "c.parquet", {"photo": IMAGES[4:6]})

    summary = build_manifest(str(source), target)

    assert captured_bytes(read(target), target) == IMAGES[:6]
    assert summary.image_column == "img, image, photo"


@pytest.mark.parametrize("names", list(itertools.permutations("abc")))
def test_the_order_of_tables_does_not_affect_column_compatibility(
    source: Path, target: str, names: tuple[str, ...]
) -> None:
    tables = [
        {"img": IMAGES[:2]},
        {"image": IMAGES[2:4], "img": THUMBNAILS[2:4]},
        {"image_bytes": IMAGES[4:6], "jpg": THUMBNAILS[4:6]},
    ]
    for name, table in zip(names, tables, strict=True):
        write_table(source / f"{name}.parquet", {**table, "id": [f"{name}0", f"{name}1"]})

    build_manifest(str(source), target)

    rows = dict(zip(ids(target), captured_bytes(read(target), target), strict=True))
    for number, name in enumerate(names):
        assert [rows[f"{name}0"], rows[f"{name}1"]] == IMAGES[2 * number : 2 * number + 2]


@pytest.mark.parametrize("names", ["ab", "ba"])
def test_incompatible_columns_are_refused_in_either_order(source: Path, target: str, names: str) -> None:
    tables: list[dict[str, Any]] = [
        {"data": IMAGES[:2], "image_path": ["a", "b"]},
        {"data": ["1", "2"], "image_path": ["c", "d"]},
    ]
    for name, table in zip(names, tables, strict=True):
        write_table(source / f"{name}.parquet", table)

    with pytest.raises(InputError, match=r"b.parquet has images in column \w+, and other tables in \w+"):
        build_manifest(str(source), target)


def test_a_table_without_rows_does_not_affect_the_column_choice(source: Path, target: str) -> None:
    write_table(source / "a.parquet", {"photo": pa.array([], pa.binary())})
    write_table(source / "b.parquet", {"photo": IMAGES[:2]})

    assert build_manifest(str(source), target).num_images == 2
    assert captured_bytes(read(target), target) == IMAGES[:2]


def without_columns(target: str) -> None:
    """Turn a manifest into one of a version that did not record its columns."""
    for part in Path(target).iterdir():
        table = pq.read_table(part)
        metadata = {key: value for key, value in table.schema.metadata.items() if key == b"imcap_ray.id_source"}
        pq.write_table(table.replace_schema_metadata(metadata), part)


def test_a_manifest_of_an_earlier_version_is_read_and_can_grow(source: Path, target: str) -> None:
    columns = {"photo": hugging_face(IMAGES[:2], ["a", "b"]), "id": ["a", "b"]}
    write_table(source / "a.parquet", columns)
    build_manifest(str(source), target)
    without_columns(target)
    write_table(source / "b.parquet", {"photo": hugging_face(IMAGES[2:4], ["c", "d"]), "id": ["c", "d"]})

    assert build_manifest(str(source), target).num_images == 4
    assert ids(target) == list("abcd")
    assert captured_bytes(read(target), target) == IMAGES[:4]


def test_a_manifest_of_an_earlier_version_with_another_column_choice_is_refused(source: Path, target: str) -> None:
    columns = {"thumbnail": THUMBNAILS[:3], "image_path": ["a.jpg", "b.jpg", "c.jpg"], "id": list("abc")}
    table = str(write_table(source / "a.parquet", columns))
    build_manifest(table, target, InputOptions(columns=ColumnOptions(image="thumbnail")))
    without_columns(target)

    with pytest.raises(InputError, match="read from column thumbnail, and would now be read from image_path: give"):
        build_manifest(table, target)
    build_manifest(table, target, InputOptions(columns=ColumnOptions(image="thumbnail")))
    assert captured_bytes(read(target), target) == THUMBNAILS[:3]


# ---- names of tables and tars


@pytest.mark.parametrize("name", ["a.parquet", "a.PARQUET", "a.pq", "a.parq"])
def test_tables_have_any_usual_extension(source: Path, target: str, name: str) -> None:
    table = write_table(source / name, {"image": IMAGES[:2], "id": ["a", "b"], "caption": ["a dog", "a cat"]})

    assert build_manifest(str(source), target).num_images == 2
    assert build_manifest(str(table), target).changed.num_rows == 0
    assert ids(target) == ["a", "b"]
    assert captured_bytes(read(target), target) == IMAGES[:2]
    assert (
        load_dataset(str(source)).references()
        == load_dataset(str(table)).references()
        == {
            "a": ["a dog"],
            "b": ["a cat"],
        }
    )


@pytest.mark.parametrize("name", ["a.tar.gz", "a.TGZ", "a.tar.zst"])
@pytest.mark.parametrize("is_folder", [True, False])
def test_compressed_tars_are_refused_with_the_reason(source: Path, target: str, name: str, is_folder: bool) -> None:
    (source / name).write_bytes(gzip.compress(write_tar(source.parent / "t", {"a.jpg": IMAGES[0]}).read_bytes()))
    location = str(source if is_folder else source / name)
    message = f"compressed tars are not read, because .* one by one: decompress {name}, for example"

    with pytest.raises(InputError, match=message):
        build_manifest(location, target)
    with pytest.raises(DatasetError, match=message):
        load_dataset(location)


def test_compressed_tars_next_to_images_are_reported(source: Path, target: str) -> None:
    write_tar(source / "a.tar", {"a.jpg": IMAGES[0], "a.txt": b"a dog"})
    (source / "b.tar.gz").write_bytes(gzip.compress(b""))

    summary = build_manifest(str(source), target)

    assert summary.num_images == 1
    assert any("decompress b.tar.gz" in note for note in summary.notes)
    assert summary.ignored == {".gz": 1}
    assert "1 compressed tar is not read: decompress it: b.tar.gz" in load_dataset(str(source)).notes


# ---- several formats in one folder


def test_a_stray_picture_hides_no_table(source: Path, target: str) -> None:
    (source / "assets").mkdir()
    (source / "data").mkdir()
    (source / "README.md").write_text("a card")
    (source / "assets" / "example.png").write_bytes(IMAGES[6])
    write_table(source / "data" / "t.parquet", {"image": hugging_face(IMAGES[:6], [None] * 6), "id": list("abcdef")})

    summary = build_manifest(str(source), target)

    assert summary == InputSummary(num_images=7, num_ignored=1, description="folder and Parquet, 1 file")
    assert ids(target) == ["assets/example.png", *"abcdef"]
    assert captured_bytes(read(target), target) == [IMAGES[6], *IMAGES[:6]]
    assert f"{source}: the input is 1 image file and all images in 1 Parquet table" in summary.notes


def test_a_preview_image_hides_no_tar(source: Path, target: str) -> None:
    write_tar(source / "00000.tar", {"a.jpg": IMAGES[0], "a.txt": b"x", "b.jpg": IMAGES[1]})
    (source / "preview.jpg").write_bytes(IMAGES[2])
    write_table(source / "00000.parquet", {"key": ["a", "b"], "caption": ["x", "y"], "phash": PHASH[:2]})

    summary = build_manifest(str(source), target)

    assert ids(target) == ["preview.jpg", "a", "b"]
    assert captured_bytes(read(target), target) == [IMAGES[2], *IMAGES[:2]]
    assert f"{source}: 1 of the tables hold no images and are ignored: 00000.parquet" in summary.notes


def test_images_in_tables_and_tars_of_one_folder_are_refused_by_name(source: Path, target: str) -> None:
    write_tar(source / "0.tar", {"a.jpg": IMAGES[0]})
    write_table(source / "t.parquet", {"image": IMAGES})

    with pytest.raises(InputError, match=r"images in 1 tar \(0.tar\) and in 1 Parquet table \(t.parquet\)"):
        build_manifest(str(source), target)


def test_a_table_that_names_images_other_than_its_neighbours_is_refused_by_name(source: Path, target: str) -> None:
    touch(source, "assets/example.png", "data/photos/a")
    write_table(source / "data" / "t.parquet", {"path": ["../assets/example.png", "photos/a"]})

    with pytest.raises(
        InputError, match=r"1 image file, and its table data/t.parquet names images .*row 1: .*photos/a"
    ):
        build_manifest(str(source), target)
    assert build_manifest(str(source / "data"), target, InputOptions(allow_outside_paths=True)).num_images == 2


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("path", ["train.py", "train.py", "setup.cfg"]),  # train.py is there
        ("path", ["train.py", "lost.jpg", "b.png"]),
        ("file", ["1", "2", ""]),
        ("file_name", ["", "a.jpg", None]),
        ("image_path", ["/nowhere/before/a.jpg", "/nowhere/before/b.png"]),
        ("uri", ["https://example.com/page?number=1", "http://example.com/"]),
    ],
)
def test_a_table_next_to_image_files_that_names_no_other_image_is_ignored(
    source: Path, target: str, column: str, values: list[str | None]
) -> None:
    touch(source, "a.jpg", "b.png")
    (source / "train.py").write_text("import torch  # and more, so that it is longer than the header of an image")
    write_table(source / "log.parquet", {column: values})

    summary = build_manifest(str(source), target)

    assert ids(target) == ["a.jpg", "b.png"]
    assert summary.notes == (f"{source}: 1 of the tables hold no images and are ignored: log.parquet",)
    assert (summary.num_ignored, summary.image_column) == (2, None)


@pytest.mark.parametrize(
    "value",
    ["../other/c.jpg", "{outside}/c.jpg", "photo.txt", "s3://bucket/c.jpg", "s3://b/c", "https://host/c.jpg?w=20"],
)
def test_an_image_that_only_a_table_names_is_never_missing_silently(source: Path, target: str, value: str) -> None:
    touch(source, "a.jpg")
    (source / "photo.txt").write_bytes(IMAGES[0])
    touch(source.parent, "other/c.jpg")
    paths = ["train.py"] * 30 + [value.format(outside=source.parent / "other")]
    write_table(source / "log.parquet", {"path": paths})

    with pytest.raises(InputError, match=r"log.parquet names images that are not among them \(row 30: '"):
        build_manifest(str(source), target)


def test_an_unrelated_table_in_a_store_is_ignored(target: str) -> None:
    place = "memory://other-things"
    storage.write_bytes(f"{place}/a.jpg", IMAGES[0])
    storage.write_bytes(f"{place}/train.py", b"import torch" * 9)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"path": ["train.py", "1.txt", "lost.py"]}), sink)
    storage.write_bytes(f"{place}/log.parquet", sink.getvalue().to_pybytes())

    assert build_manifest(place, target).num_images == 1

    storage.write_bytes(f"{place}/1.txt", IMAGES[1])
    with pytest.raises(InputError, match=r"names images that are not among them \(row 1: "):
        build_manifest(place, target)


def test_an_ignored_table_does_not_affect_the_columns_of_the_others(source: Path, target: str) -> None:
    touch(source, "a.jpg")
    write_table(source / "captions.parquet", {"image_path": ["a.jpg"], "caption": ["x"]})
    write_table(source / "images.parquet", {"photo": IMAGES[:2], "id": ["x", "y"]})

    summary = build_manifest(str(source), target)

    assert (summary.image_column, read_image_columns(target)) == ("photo", ["photo"])
    assert ids(target) == ["a.jpg", "x", "y"]


def test_an_image_file_and_a_row_with_the_same_id_are_refused(source: Path, target: str) -> None:
    (source / "a.jpg").write_bytes(IMAGES[0])
    write_table(source / "t.parquet", {"image": hugging_face(IMAGES[1:3], ["a.jpg", "b.jpg"])})

    with pytest.raises(InputError, match="'a.jpg' is an image file and also the id of an image in .*t.parquet"):
        build_manifest(str(source), target)


def test_outputs_of_runs_among_photographs_are_not_input(source: Path, target: str) -> None:
    touch(source, "a.jpg")
    part = {"image_id": ["x"], "image": [IMAGES[0]], "caption": ["x"]}
    for name in ("captions", "earlier"):
        (source / name / "_imcap" / "manifest").mkdir(parents=True)
        write_table(source / name / "part.parquet", part)
        write_table(source / name / "_imcap" / "manifest" / "part-0.parquet", part)
    (source / "captions" / "_imcap").rename(source / "work")
    (source / "work" / "manifest" / "part-0.parquet").unlink()

    summary = build_manifest(str(source), target, output=str(source / "captions"))

    assert (ids(target), summary.notes) == (["a.jpg"], ())


# ---- inputs that cannot be captioned


def test_a_missing_input_is_named(tmp_path: Path, target: str) -> None:
    with pytest.raises(InputError, match=f"no such input: {tmp_path}/nowhere"):
        build_manifest(f"{tmp_path}/nowhere", target)


def test_an_empty_folder_is_refused(source: Path, target: str) -> None:
    with pytest.raises(InputError, match=f"no images in {source}: found nothing"):
        build_manifest(str(source), target)


def test_the_error_for_a_folder_without_images_has_the_number_of_its_files(source: Path, target: str) -> None:
    touch(source, "a.txt", "b.pdf", "deep/.c.jpg")

    with pytest.raises(InputError, match=r"found 3 other files \(.*\.txt 1.*\); expected files with names like .jpg"):
        build_manifest(str(source), target)
    assert not Path(target).exists()


def test_the_error_for_a_table_without_images_lists_its_columns(source: Path, target: str) -> None:
    path = write_table(source / "a.parquet", {"caption": ["x"], "score": [0.5]})

    with pytest.raises(InputError, match=r"a.parquet has no column of images: .* got caption \(string\), score \(dou"):
        build_manifest(str(path), target)


@pytest.mark.parametrize("columns", [{"image": IMAGES[:1]}, {"image": IMAGES[:1], "id": ["a"]}])
def test_a_corrupt_table_is_named_even_if_it_is_the_second(source: Path, target: str, columns: dict[str, Any]) -> None:
    write_table(source / "a.parquet", columns)
    (source / "b.parquet").write_bytes(b"PAR1 no table")

    with pytest.raises(InputError, match=f"{source}/b.parquet is not readable Parquet"):
        build_manifest(str(source), target)


# ---- pickles


class Trap:
    """Creates a folder of this name when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def pickled(path: Path) -> pa.Array:
    """Return a column as Ray Data writes it for values without an Arrow type."""
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType

    return pa.ExtensionArray.from_storage(ArrowPythonObjectType(), pa.array([pickle.dumps(Trap(path))], "large_binary"))


def test_the_malicious_pickle_of_these_tests_runs_code(tmp_path: Path) -> None:
    pa.table({"image": pickled(tmp_path / "snapped")}).to_pylist()

    assert (tmp_path / "snapped").exists()


@pytest.mark.parametrize("place", ["bytes", "column", "id", "elsewhere"])
def test_a_table_with_pickled_objects_is_refused_and_runs_no_code(
    source: Path, target: str, tmp_path: Path, place: str
) -> None:
    trap, names = pickled(tmp_path / "snapped"), pa.array(["a.jpg"])
    columns = {
        "bytes": {"image": pa.StructArray.from_arrays([trap, names], ["bytes", "path"])},
        "column": {"image": trap},
        "id": {"image_path": names, "image_id": trap},
        "elsewhere": {"image_path": names, "notes": pa.ListArray.from_arrays([0, 1], trap)},
    }[place]
    path = write_table(source / "a.parquet", columns)

    for read_it in (
        lambda: build_manifest(str(path), target),
        lambda: list(read_table_images(str(path), [(0, 0)])),
        lambda: load_dataset(str(path)),
        lambda: open_captions(str(path)),
    ):
        with pytest.raises(InputError, match="a.parquet: the column .* holds pickled Python objects, which run code"):
            read_it()
    assert not (tmp_path / "snapped").exists()
    assert not Path(target).exists()


# ---- captions


def captions_table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=CAPTIONS_SCHEMA)


def test_captions_are_read_from_a_folder_and_our_own_files_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "_imcap").mkdir()
    for number in range(2):
        table = captions_table([{"image_id": f"{number}.jpg", "caption": "a dog", "status": "ok", "error_code": ""}])
        pq.write_table(table, tmp_path / f"part-{number}.parquet")
    (tmp_path / "_imcap" / "run.json").write_text("{}")
    (tmp_path / "report.html").write_text("")

    assert sorted(open_captions(str(tmp_path)).to_table()["image_id"].to_pylist()) == ["0.jpg", "1.jpg"]


def test_other_files_among_the_parts_of_a_run_are_not_captions(tmp_path: Path) -> None:
    table = captions_table([{"image_id": "0.jpg", "caption": "a dog", "status": "ok", "error_code": ""}])
    pq.write_table(table, tmp_path / f"{'0a' * 16}_000000.parquet")
    pq.write_table(table, tmp_path / "copy.parquet")
    pq.write_table(pa.table({"number": [1]}), tmp_path / "notes.parquet")

    assert open_captions(str(tmp_path)).to_table()["image_id"].to_pylist() == ["0.jpg"]


def test_an_unsuitable_captions_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"no such captions: {tmp_path}/nowhere"):
        open_captions(f"{tmp_path}/nowhere")
    with pytest.raises(InputError, match="is no captions table: .* got no Parquet file"):
        open_captions(str(tmp_path))
    pq.write_table(pa.table({"image_id": ["a"], "text": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="expected the columns image_id and caption, got image_id, text"):
        open_captions(str(tmp_path))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no table")
    with pytest.raises(InputError, match="is not readable Parquet"):
        open_captions(str(tmp_path))


def test_a_listed_image_is_recognised_in_any_part_of_the_manifest(source: Path, target: str) -> None:
    touch(source, *(f"{number}.jpg" for number in range(1, 17, 2)))
    build_manifest(str(source), target, rows_per_part=3)
    before = {row["image_id"]: row["manifest_id"] for row in read(target)}
    touch(source, *(f"{number}.jpg" for number in range(0, 17, 2)), "below/1.jpg")
    (source / "7.jpg").write_bytes(b"changed")

    summary = build_manifest(str(source), target, rows_per_part=3)

    after = {row["image_id"]: row["manifest_id"] for row in read(target)}
    assert len(storage.list_work_tables(target)) > 5
    assert len(after) == 18
    assert before.items() <= after.items()
    assert summary.changed["image_id"].to_pylist() == ["7.jpg"]
    assert summary.changed["manifest_id"].to_pylist() == [before["7.jpg"]]
    assert build_manifest(str(source), target, rows_per_part=3).changed["image_id"].to_pylist() == ["7.jpg"]


def test_an_image_of_a_renamed_table_is_the_same_image_at_a_new_location(source: Path, target: str) -> None:
    table = write_table(source / "a.parquet", {"image": IMAGES, "id": list("abcdefg")})
    build_manifest(str(source), target)
    table.rename(source / "b.parquet")

    summary = build_manifest(str(source), target)

    assert (summary.num_images, summary.changed.num_rows) == (7, 0)
    assert ids(target) == list("abcdefg")
    assert {row["table_path"] for row in read(target)} == {f"{source}/b.parquet"}


def test_a_row_of_a_path_table_has_changed_if_its_file_has(source: Path, target: str) -> None:
    touch(source, "a.jpg", "b.jpg", "c.jpg")
    (source / "tables").mkdir()
    table = source / "tables" / "t.parquet"
    write_table(table, {"path": [f"{source}/a.jpg", f"{source}/b.jpg"]})
    build_manifest(str(table), target, InputOptions(allow_outside_paths=True))
    (source / "b.jpg").write_bytes(b"changed")
    write_table(table, {"path": [f"{source}/{name}.jpg" for name in "abc"]})

    summary = build_manifest(str(table), target, InputOptions(allow_outside_paths=True))

    assert ids(target) == [f"{source}/{name}.jpg" for name in "abc"]
    assert summary.changed["image_id"].to_pylist() == [f"{source}/b.jpg"]


def test_a_new_table_does_not_change_the_ids_of_known_images(source: Path, target: str) -> None:
    write_table(source / "a.parquet", {"image": hugging_face(IMAGES[:2], ["0.jpg", "1.jpg"])})
    build_manifest(str(source), target)
    write_table(source / "b.parquet", {"image": hugging_face(IMAGES[2:4], ["0.jpg", "2.jpg"])})

    with pytest.raises(InputError, match="ambiguous .'0.jpg' occurs more than once.*--overwrite"):
        build_manifest(str(source), target)

    assert ids(target) == ["0.jpg", "1.jpg"]


def test_images_identified_by_table_and_number_keep_their_ids_when_names_become_unique(
    source: Path, target: str
) -> None:
    write_table(source / "a.parquet", {"image": hugging_face(IMAGES[:2], ["0.jpg", "1.jpg"])})
    write_table(source / "b.parquet", {"image": hugging_face(IMAGES[2:4], ["0.jpg", "2.jpg"])})
    build_manifest(str(source), target)
    before = ids(target)
    (source / "b.parquet").unlink()

    build_manifest(str(source), target)

    assert ids(target) == before == ["a.parquet#0", "a.parquet#1", "b.parquet#0", "b.parquet#1"]


def test_a_run_without_its_lease_adds_nothing_to_a_manifest(source: Path, target: str) -> None:
    touch(source, "a.jpg")
    build_manifest(str(source), target)
    touch(source, "b.jpg")

    def refuse() -> None:
        raise InputError("another run is at it")

    with pytest.raises(InputError, match="another run"):
        build_manifest(str(source), target, check=refuse)

    assert ids(target) == ["a.jpg"]


def test_an_output_among_the_tables_of_its_input_is_refused(source: Path, target: str) -> None:
    write_table(source / "a.parquet", {"image": IMAGES})

    with pytest.raises(InputError, match="is inside INPUT"):
        build_manifest(str(source), target, output=str(source / "captions"))

    build_manifest(str(source), target, output=str(source.parent / "captions"))
