"""Endless inputs, files from the far future and circular tars: each gives a row or an error immediately."""

from __future__ import annotations

import io
import os
import random
import socket
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imcap_ray import storage
from imcap_ray.data import tar_images
from imcap_ray.data.image_reading import read_rows
from imcap_ray.data.manifest import InputOptions, build_manifest
from imcap_ray.data.parquet_files import read_table
from imcap_ray.errors import ImageError, InputError
from tests.small_data import jpeg, write_tar

BLOCK = tarfile.BLOCKSIZE


at_once = pytest.mark.timeout(10, func_only=True)
"""Fails a test that hangs. Such tests assert no time otherwise."""


def manifest_rows(folder: Path) -> list[dict[str, Any]]:
    return [row for part in storage.list_work_tables(str(folder)) for row in read_table(part).to_pylist()]


# ---- special files


def make_special(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.jpg"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "terminal":
        path.symlink_to("/dev/tty")
    else:
        path.mkdir()
    return path


SPECIAL = ["pipe", "socket", "device", "terminal", "folder"]


@at_once
@pytest.mark.parametrize("kind", SPECIAL)
def test_a_special_file_named_by_a_table_fails_immediately(tmp_path: Path, kind: str) -> None:
    special = make_special(tmp_path, kind)
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    pq.write_table(pa.table({"path": [special.name, "a.jpg"]}), tmp_path / "t.parquet")

    build_manifest(str(tmp_path / "t.parquet"), str(tmp_path / "manifest"))
    contents = [data for _, data in read_rows(manifest_rows(tmp_path / "manifest"), None)]

    assert isinstance(contents[0], ImageError) and contents[0].code == "read_error"
    assert str(special) in contents[0].message
    assert contents[1] == jpeg(0)


@at_once
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_table_or_tar_replaced_by_a_special_file_fails_immediately(tmp_path: Path, kind: str) -> None:
    rows = []
    for name in ("t.parquet", "t.tar"):
        if name == "t.tar":
            write_tar(tmp_path / name, {"a.jpg": jpeg(0)})
        else:
            pq.write_table(pa.table({"image": [jpeg(0)]}), tmp_path / name)
        build_manifest(str(tmp_path / name), str(tmp_path / name[2:]))
        rows += [row | {"size": -1, "modified_ns": 0} for row in manifest_rows(tmp_path / name[2:])]
        (tmp_path / name).unlink()
        make_special(tmp_path, kind).rename(tmp_path / name)

    contents = [data for _, data in read_rows(rows, None)]

    assert [data.code for data in contents if isinstance(data, ImageError)] == ["read_error", "read_error"]


@at_once
@pytest.mark.parametrize("kind", SPECIAL)
def test_reading_with_a_limit_refuses_a_special_file_immediately(tmp_path: Path, kind: str) -> None:
    special = make_special(tmp_path, kind)

    with pytest.raises(OSError, match="expected a regular file, got a|Is a directory"):
        storage.read_bytes(str(special), max_bytes=100)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_file_that_reports_a_wrong_size_is_read_up_to_the_limit() -> None:
    path = "/proc/self/status"  # reports 0 bytes
    assert storage.read_bytes(path, max_bytes=2**20).startswith(b"Name:")

    with pytest.raises(OSError, match="File too large"):
        storage.read_bytes(path, max_bytes=100)


def test_a_file_is_read_up_to_the_size_limit_and_refused_beyond_it(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    for size in (0, 1, 99, 100):
        path.write_bytes(b"x" * size)
        assert storage.read_bytes(str(path), max_bytes=100) == b"x" * size
    path.write_bytes(b"x" * 101)

    with pytest.raises(OSError, match="File too large"):
        storage.read_bytes(str(path), max_bytes=100)


# ---- times


@pytest.mark.parametrize("modified_ns", [2**63, 10**19 + 5, -(2**63) - 10**9, -5 * 10**9])
@pytest.mark.parametrize("kind", ["folder", "file", "table", "tar", "paths"])
def test_a_file_with_any_modification_time_is_listed_and_read(tmp_path: Path, kind: str, modified_ns: int) -> None:
    source = tmp_path / "in"
    source.mkdir()
    path = source / {"table": "t.parquet", "tar": "t.tar"}.get(kind, "a.jpg")
    if kind == "table":
        pq.write_table(pa.table({"image": [jpeg(0)]}), path)
    elif kind == "tar":
        write_tar(path, {"a.jpg": jpeg(0)})
    else:
        path.write_bytes(jpeg(0))
    try:
        os.utime(path, ns=(0, modified_ns))
    except (OverflowError, OSError):
        pytest.skip("this file system holds no such time")
    location = path if kind == "file" else source
    if kind == "paths":
        (tmp_path / "tables").mkdir()
        location = tmp_path / "tables" / "t.parquet"
        pq.write_table(pa.table({"path": [str(path)]}), location)

    for _ in range(2):
        summary = build_manifest(str(location), str(tmp_path / "manifest"), InputOptions(allow_outside_paths=True))
        assert (summary.num_images, summary.changed.num_rows) == (1, 0)

    [(_, data)] = read_rows(manifest_rows(tmp_path / "manifest"), None)
    assert data == jpeg(0)


# ---- tars


def tar_of(format: int) -> bytearray:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as tar:
        for name in ("a.jpg", "deep/" * 60 + "b.jpg", "c.jpg", "d.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 700
            tar.addfile(info, io.BytesIO(b"x" * 700))
    return bytearray(stream.getvalue())


def write_header(data: bytearray, start: int, *, at: int, value: bytes) -> None:
    """Change a header and update its checksum."""
    data[start + at : start + at + len(value)] = value
    data[start + 148 : start + 156] = b" " * 8
    data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + BLOCK])


def size_field(size: int) -> bytes:
    return tarfile.itn(size, 12, tarfile.GNU_FORMAT)  # type: ignore[attr-defined,no-any-return]


def headers(data: bytearray) -> list[int]:
    return [start for start in range(0, len(data), BLOCK) if data[start + 257 : start + 262] == b"ustar"]


def list_all(path: Path) -> list[str]:
    with tar_images.open_tar(str(path)) as tar:
        return [member.name for member in tar_images.list_files(tar)]


@at_once
@pytest.mark.parametrize("size", [-512, -513, -1024, -1536, -3 * 10**9, 2**40, 2**62, 2**70, -(2**70)])
@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("number", range(5))
def test_a_tar_header_with_an_impossible_size_is_corrupt(tmp_path: Path, format: int, number: int, size: int) -> None:
    data = tar_of(format)
    write_header(data, headers(data)[number], at=124, value=size_field(size))
    (tmp_path / "a.tar").write_bytes(data)

    with pytest.raises(InputError, match="a.tar is damaged"):
        build_manifest(str(tmp_path / "a.tar"), str(tmp_path / "manifest"))


@at_once
def test_a_negative_size_in_an_extended_header_is_corrupt_too(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(3):
            info = tarfile.TarInfo(f"{number}.jpg")
            info.size = 700
            info.pax_headers = {"comment": "size of here"} if number else {}
            tar.addfile(info, io.BytesIO(b"x" * 700))
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data.replace(b"24 comment=size of here\n", b"24 size=-2048          \n"))

    with pytest.raises(InputError, match="a.tar is damaged"):
        build_manifest(str(tmp_path / "a.tar"), str(tmp_path / "manifest"))


@pytest.mark.parametrize("end", [0, 100])
def test_a_tar_with_a_corrupt_inner_header_is_not_treated_as_a_shorter_tar(tmp_path: Path, end: int) -> None:
    """tarfile ends silently at a header whose checksum does not fit, and at a part of a header."""
    data = tar_of(tarfile.GNU_FORMAT)
    last = headers(data)[-1]
    if end:
        del data[last + end :]
    else:
        data[last + 5] ^= 1
    (tmp_path / "a.tar").write_bytes(data)

    with pytest.raises(InputError, match="a.tar is damaged"):
        build_manifest(str(tmp_path / "a.tar"), str(tmp_path / "manifest"))


def test_many_consecutive_extended_headers_are_corrupt_and_do_not_recurse(tmp_path: Path) -> None:
    header = tarfile.TarInfo("x")
    header.type = tarfile.XHDTYPE
    (tmp_path / "a.tar").write_bytes(header.tobuf() * 5000)

    with pytest.raises(InputError, match="a.tar is damaged"):
        build_manifest(str(tmp_path / "a.tar"), str(tmp_path / "manifest"))


def test_listing_a_corrupt_tar_always_terminates(tmp_path: Path) -> None:
    """With randomly changed headers the tar is listed, with members in increasing order, or is corrupt."""
    chance = random.Random(0)
    outcomes = set()
    for _ in range(300):
        data = tar_of(chance.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
        for _ in range(chance.randint(1, 3)):
            start = chance.choice(headers(data) or [0])
            kind = chance.random()
            if kind < 0.4:
                size = chance.choice([1, -1]) * 2 ** chance.randint(0, 80) - chance.choice([0, BLOCK])
                write_header(data, start, at=124, value=size_field(size))
            elif kind < 0.7:
                write_header(data, start, at=156, value=chance.choice(b"01234567LKxgXSDVNA\0").to_bytes(1, "big"))
            else:
                write_header(data, start, at=chance.randrange(500), value=chance.randbytes(chance.randint(1, 12)))
            data[chance.randrange(len(data))] ^= chance.choice([0, 0, 1, 255])
        (tmp_path / "a.tar").write_bytes(data)
        try:
            names = list_all(tmp_path / "a.tar")
            assert len(names) <= 5
            outcomes.add("listed")
        except tar_images.DAMAGED:
            outcomes.add("damaged")
    assert outcomes == {"listed", "damaged"}


@pytest.mark.parametrize("size", [-512, -1, 2**40, 2**62])
def test_a_member_whose_header_has_become_impossible_is_the_only_failure(tmp_path: Path, size: int) -> None:
    path = write_tar(tmp_path / "a.tar", {"a.jpg": jpeg(0), "b.jpg": jpeg(1), "c.jpg": jpeg(2)})
    build_manifest(str(path), str(tmp_path / "manifest"))
    rows = [row | {"size": -1, "modified_ns": 0} for row in manifest_rows(tmp_path / "manifest")]
    data = bytearray(path.read_bytes())
    write_header(data, (rows[1]["row_group"] - 1) * BLOCK, at=124, value=size_field(size))
    path.write_bytes(data)

    contents = [data for _, data in read_rows(rows, None)]

    assert (contents[0], contents[2]) == (jpeg(0), jpeg(2))
    assert isinstance(contents[1], ImageError) and contents[1].code == ("read_error" if size < 0 else "too_large")


def test_names_chosen_to_collide_get_unique_ids(tmp_path: Path) -> None:
    """The ids of the first tar are those that the image of the second one would get."""
    write_tar(tmp_path / "in" / "0.tar", {name: jpeg(0) for name in ("a.jpg", "1/a.jpg", "1/a#1.jpg")})
    write_tar(tmp_path / "in" / "1.tar", {"a.jpg": jpeg(1)})

    build_manifest(str(tmp_path / "in"), str(tmp_path / "manifest"))

    assert len({row["image_id"] for row in manifest_rows(tmp_path / "manifest")}) == 4
