"""The same few operations on a local disk, on `file://` and on a file system that is not the local one."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest

from imcap_ray import storage
from imcap_ray.errors import InputError


@pytest.fixture(params=["path", "file", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place to write: a path, a `file://` URI, and a URI of fsspec's memory file system."""
    if request.param == "memory":
        return f"memory://bucket-{uuid.uuid4().hex}/some/folder"
    return f"file://{tmp_path}/some/folder" if request.param == "file" else f"{tmp_path}/some/folder"


def names(folder: str, **options: bool) -> list[str]:
    return [name for _, name in storage.list_files(folder, **options)]


# ---- on any file system


def test_what_is_written_is_read_and_listed(folder: str) -> None:
    contents = {"b.txt": b"1", "a/c.txt": b"", "a/b/d.txt": b"\0\xff" * 1000}

    for name, content in contents.items():
        storage.write_bytes(storage.join(folder, name), content)

    listed = list(storage.list_files(folder))
    assert {name for _, name in listed} == set(contents)
    assert {name: storage.read_bytes(location) for location, name in listed} == contents
    assert all(location == storage.join(storage.absolute(folder), name) for location, name in listed)


def test_files_come_sorted_those_of_a_folder_before_those_below_it(folder: str) -> None:
    for name in ("z.txt", "b/2.txt", "b/1.txt", "a/x/1.txt", "a/9.txt", "c.txt"):
        storage.write_bytes(storage.join(folder, name), b"1")

    assert names(folder) == ["c.txt", "z.txt", "a/9.txt", "a/x/1.txt", "b/1.txt", "b/2.txt"]
    assert names(folder, recursive=False) == ["c.txt", "z.txt"]


def test_a_file_is_a_file_and_a_folder_is_a_folder(folder: str) -> None:
    path = storage.join(folder, "a.txt")
    storage.write_bytes(path, b"1")

    assert (storage.exists(path), storage.is_file(path), storage.is_folder(path)) == (True, True, False)
    assert (storage.exists(folder), storage.is_file(folder), storage.is_folder(folder)) == (True, False, True)
    nowhere = storage.join(folder, "nowhere")
    assert (storage.exists(nowhere), storage.is_file(nowhere), storage.is_folder(nowhere)) == (False, False, False)


def test_writing_again_replaces(folder: str) -> None:
    path = storage.join(folder, "a.txt")

    storage.write_bytes(path, b"a long first version")
    storage.write_bytes(path, b"second")

    assert storage.read_bytes(path) == b"second"
    assert names(folder) == ["a.txt"]


def test_a_file_or_a_folder_is_removed_with_all_below_it(folder: str) -> None:
    for name in ("a.txt", "b/c.txt", "b/d/e.txt"):
        storage.write_bytes(storage.join(folder, name), b"1")

    storage.remove(storage.join(folder, "b"))
    assert names(folder) == ["a.txt"]
    storage.remove(storage.join(folder, "a.txt"))
    assert not storage.exists(storage.join(folder, "a.txt"))
    storage.remove(storage.join(folder, "a.txt"))  # twice is harmless


def test_reading_what_is_not_there_is_an_os_error(folder: str) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(folder, "nowhere.txt"))


def test_a_folder_that_is_not_there_cannot_be_listed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"cannot list {tmp_path}/nowhere"):
        names(f"{tmp_path}/nowhere")


def test_making_a_folder_twice_is_harmless(folder: str) -> None:
    storage.make_folder(folder)
    storage.make_folder(folder)

    storage.write_bytes(storage.join(folder, "a.txt"), b"1")
    assert names(folder) == ["a.txt"]


def test_an_unknown_scheme_is_an_input_error() -> None:
    with pytest.raises(InputError, match="cannot open nope://bucket/"):
        storage.exists("nope://bucket/key")


# ---- on the local disk


def test_a_failed_write_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    storage.write_bytes(str(path), b"old")

    def full(source: object, target: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            storage.write_bytes(str(path), b"new")

    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_link_that_leads_nowhere_is_listed(tmp_path: Path) -> None:
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "itself.jpg").symlink_to(tmp_path / "itself.jpg")
    (tmp_path / "real.jpg").write_bytes(b"1")

    assert names(str(tmp_path)) == ["dangling.jpg", "itself.jpg", "real.jpg"]


def test_links_are_followed_and_a_loop_of_them_ends(tmp_path: Path) -> None:
    (tmp_path / "input" / "sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "input" / "a.jpg").write_bytes(b"1")
    (tmp_path / "elsewhere" / "b.jpg").write_bytes(b"1")
    (tmp_path / "input" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "input" / "sub" / "up").symlink_to(tmp_path / "input")

    assert names(str(tmp_path / "input")) == ["a.jpg", "linked/b.jpg"]


def test_a_name_that_is_not_utf8_does_not_lose_the_others(tmp_path: Path) -> None:
    (tmp_path / "é.jpg").write_bytes(b"1")
    try:
        with open(os.fsencode(tmp_path) + b"/caf\xe9.jpg", "wb"):
            pass
    except OSError:
        pytest.skip("this file system holds only names in UTF-8")

    assert names(str(tmp_path)) == ["caf\\xe9.jpg", "é.jpg"]


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")  # reading it would wait for ever

    assert names(str(tmp_path)) == []


# ---- names


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("s3://bucket/key", True),
        ("file:///tmp/a", True),
        ("gs+x.y-1://a", True),
        ("/tmp/a", False),
        ("a/b", False),
        ("c:/a", False),
        ("1s://a", False),
        ("strange:name", False),
    ],
)
def test_a_uri_is_told_from_a_path(location: str, expected: bool) -> None:
    assert storage.is_uri(location) is expected


def test_a_location_becomes_independent_of_the_current_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")

    assert storage.absolute("a/../b/") == f"{tmp_path}/b"
    assert storage.absolute("~/b") == "/home/somebody/b"
    assert storage.absolute("file:///tmp/b/") == "/tmp/b"
    assert storage.absolute("s3://bucket/b/") == "s3://bucket/b"


def test_parent_undoes_join() -> None:
    for folder in ("/tmp/a", "s3://bucket/a"):
        assert storage.parent(storage.join(folder, "b")) == folder
        assert storage.parent(storage.join(folder, "b/")) == folder
