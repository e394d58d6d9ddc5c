"""The same operations on a local disk, on `file://` and on a remote file system."""

from __future__ import annotations

import errno
import os
import re
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import fsspec.implementations.memory
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imcap_ray import storage
from imcap_ray.errors import ImcapError, InputError


@pytest.fixture(params=["path", "file", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place to write: a path, a `file://` URI, and a URI of fsspec's memory file system."""
    if request.param == "memory":
        return f"memory://bucket-{uuid.uuid4().hex}/some/folder"
    return f"file://{tmp_path}/some/folder" if request.param == "file" else f"{tmp_path}/some/folder"


def names(folder: str, **options: bool) -> list[str]:
    return [file.name for file in storage.list_files(folder, **options)]


# ---- on any file system


def test_written_files_can_be_read_and_listed(folder: str) -> None:
    contents = {"b.txt": b"1", "a/c.txt": b"", "a/b/d.txt": b"\0\xff" * 1000}

    for name, content in contents.items():
        storage.write_bytes(storage.join(folder, name), content)

    listed = list(storage.list_files(folder))
    assert {file.name: file.size for file in listed} == {name: len(content) for name, content in contents.items()}
    assert {file.name: storage.read_bytes(file.location) for file in listed} == contents
    assert all(file.location == storage.join(storage.absolute(folder), file.name) for file in listed)


def test_a_file_written_in_pieces_appears_only_when_it_is_complete(folder: str) -> None:
    path = storage.join(folder, "a", "b.txt")

    with storage.replacing(path) as file:
        file.write(b"one ")
        assert not storage.exists(path)
        file.write(b"two")
    assert storage.read_bytes(path) == b"one two"

    with pytest.raises(KeyboardInterrupt), storage.replacing(path) as file:
        file.write(b"half of the new")
        raise KeyboardInterrupt
    assert storage.read_bytes(path) == b"one two"
    assert names(folder) == ["a/b.txt"]


def test_the_longest_possible_name_is_accepted(folder: str) -> None:
    path = storage.join(folder, "猫" * 85)

    storage.write_bytes(path, b"1")

    assert storage.read_bytes(path) == b"1"


def test_files_are_sorted_and_those_of_a_folder_come_before_its_subfolders(folder: str) -> None:
    for name in ("z.txt", "b/2.txt", "b/1.txt", "a/x/1.txt", "a/9.txt", "c.txt"):
        storage.write_bytes(storage.join(folder, name), b"1")

    assert names(folder) == ["c.txt", "z.txt", "a/9.txt", "a/x/1.txt", "b/1.txt", "b/2.txt"]
    assert names(folder, recursive=False) == ["c.txt", "z.txt"]


def test_files_and_folders_are_distinguished(folder: str) -> None:
    path = storage.join(folder, "a.txt")
    storage.write_bytes(path, b"1")

    assert (storage.exists(path), storage.is_file(path), storage.is_folder(path)) == (True, True, False)
    assert (storage.exists(folder), storage.is_file(folder), storage.is_folder(folder)) == (True, False, True)
    nowhere = storage.join(folder, "nowhere")
    assert (storage.exists(nowhere), storage.is_file(nowhere), storage.is_folder(nowhere)) == (False, False, False)


def test_writing_again_replaces_the_content(folder: str) -> None:
    path = storage.join(folder, "a.txt")

    storage.write_bytes(path, b"a long first version")
    storage.write_bytes(path, b"second")

    assert storage.read_bytes(path) == b"second"
    assert names(folder) == ["a.txt"]


def test_a_file_or_folder_is_removed_with_everything_below_it(folder: str) -> None:
    for name in ("a.txt", "b/c.txt", "b/d/e.txt"):
        storage.write_bytes(storage.join(folder, name), b"1")

    storage.remove(storage.join(folder, "b"))
    assert names(folder) == ["a.txt"]
    storage.remove(storage.join(folder, "a.txt"))
    assert not storage.exists(storage.join(folder, "a.txt"))
    storage.remove(storage.join(folder, "a.txt"))  # twice is harmless


def test_reading_a_missing_file_is_an_os_error(folder: str) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(folder, "nowhere.txt"))


def test_a_missing_folder_cannot_be_listed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"cannot list {tmp_path}/nowhere"):
        names(f"{tmp_path}/nowhere")


def test_an_unknown_scheme_is_an_input_error() -> None:
    with pytest.raises(InputError, match="cannot open nope://bucket/"):
        storage.exists("nope://bucket/key")


def test_any_error_of_a_library_becomes_an_os_error() -> None:
    class BrokenFileSystem(type(fsspec.filesystem("memory"))):  # type: ignore[misc]
        def _open(self, path: str, *args: object, **options: object) -> None:
            raise KeyError("no idea")

    storage.write_bytes("memory://bucket/a.jpg", b"1")
    fsspec.register_implementation("broken", BrokenFileSystem, clobber=True)

    with pytest.raises(OSError, match="KeyError: 'no idea'"):
        storage.read_bytes("broken://bucket/a.jpg")


# ---- on the local disk


def test_a_folder_is_reachable_while_it_contains_anything(tmp_path: Path) -> None:
    (tmp_path / "input").mkdir()
    assert not storage.is_reachable(str(tmp_path / "input"))  # as a share that is not mounted

    (tmp_path / "input" / "a.jpg").write_bytes(b"1")
    assert storage.is_reachable(str(tmp_path / "input"))
    assert storage.is_reachable(str(tmp_path / "input" / "a.jpg"))
    assert not storage.is_reachable(str(tmp_path / "nowhere"))


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


def test_a_dangling_link_is_listed(tmp_path: Path) -> None:
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "itself.jpg").symlink_to(tmp_path / "itself.jpg")
    (tmp_path / "real.jpg").write_bytes(b"1")

    assert names(str(tmp_path)) == ["dangling.jpg", "itself.jpg", "real.jpg"]


def test_links_are_followed_and_a_link_loop_ends(tmp_path: Path) -> None:
    (tmp_path / "input" / "sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "input" / "a.jpg").write_bytes(b"1")
    (tmp_path / "elsewhere" / "b.jpg").write_bytes(b"1")
    (tmp_path / "input" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "input" / "sub" / "up").symlink_to(tmp_path / "input")

    assert names(str(tmp_path / "input")) == ["a.jpg", "linked/b.jpg"]


def test_a_name_that_is_not_utf8_does_not_affect_the_others(tmp_path: Path) -> None:
    (tmp_path / "é.jpg").write_bytes(b"1")
    try:
        with open(os.fsencode(tmp_path) + b"/caf\xe9.jpg", "wb"):
            pass
    except OSError:
        pytest.skip("this file system holds only names in UTF-8")

    assert names(str(tmp_path)) == ["caf\\xe9.jpg", "é.jpg"]


def test_a_pipe_is_not_a_file(tmp_path: Path) -> None:
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
def test_a_uri_is_distinguished_from_a_path(location: str, expected: bool) -> None:
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


# ---- locations inside a folder


@pytest.mark.parametrize(
    ("folder", "location"),
    [
        ("/data", "/data"),
        ("/data", "/data/a.jpg"),
        ("/data", "/data/deep/../a.jpg"),
        ("/data", "//data/./a//b.jpg"),
        ("/data", "/elsewhere/../data/a.jpg"),
        ("/data", "file:///data/a.jpg"),
        ("/data", "FILE:///data/a.jpg"),
        ("/data", "/data/..jpg"),
        ("/data", "/data/%2e%2e/a.jpg"),  # in a path these are letters
        ("/data", "/data/..\\..\\a.jpg"),
        ("/data", "/data/s3://bucket/a.jpg"),
        ("/", "/data/a.jpg"),
        ("s3://bucket/data", "s3://bucket/data/a.jpg"),
        ("s3://bucket/data", "S3://bucket/data/100%25.jpg"),
        ("s3://bucket", "s3://bucket/a.jpg"),
    ],
)
def test_a_path_below_a_folder_is_inside_it(folder: str, location: str) -> None:
    assert storage.is_inside(folder, location)


@pytest.mark.parametrize(
    ("folder", "location"),
    [
        ("/data", "/etc/passwd"),
        ("/data", "/"),
        ("/data", "/data2/a.jpg"),
        ("/data", "/data/../etc/passwd"),
        ("/data", "/data/a/../../b"),
        ("/data", "/data/.."),
        ("/data", "/data/../../../../etc/passwd"),
        ("/data", "data/a.jpg"),  # where that is depends on the current folder
        ("/data", "file:///etc/passwd"),
        ("/data", "FILE:///etc/passwd"),
        ("/data", "file:///data/../etc/passwd"),
        ("/data", "file:///data/%2e%2e/etc/passwd"),
        ("/data", "file://data/a.jpg"),
        ("/data", "local:///data/a.jpg"),
        ("/data", "s3://data/a.jpg"),
        ("s3://bucket/data", "/data/a.jpg"),
        ("s3://bucket/data", "s3://bucket/other/a.jpg"),
        ("s3://bucket/data", "s3://other/data/a.jpg"),
        ("s3://bucket/data", "gs://bucket/data/a.jpg"),
        ("s3://bucket/data", "s3://bucket/data/../secret.jpg"),
        ("s3://bucket", "s3://bucket/../other/secret.jpg"),
        ("http://host/data", "http://host/data/%2e%2e/secret.jpg"),
        ("http://host/data", "http://host/data/%2E%2e%2Fsecret.jpg"),
        ("http://host/data", "http://host/data/%252e%252e/secret.jpg"),
    ],
)
def test_a_path_that_leads_out_of_a_folder_is_not_inside_it(folder: str, location: str) -> None:
    assert not storage.is_inside(folder, location)


def test_the_error_for_an_outside_path_names_its_source_and_the_option_that_allows_it() -> None:
    with pytest.raises(InputError) as caught:
        storage.locate("../b.jpg", base="/in/deep/er", folders=["/in/deep/er"], source="a, row 3", allow_outside=False)

    for words in ("a, row 3: ", "'../b.jpg'", " /in/deep/er;", "--allow-outside-paths"):
        assert words in str(caught.value)
    place = storage.locate("../b.jpg", base="/in/deep", folders=["/in/deep"], source="", allow_outside=True)
    assert place == "/in/deep/../b.jpg"
    assert storage.locate("../b.jpg", base="/in/deep", folders=["/in"], source="", allow_outside=False) == place


# ---- secrets

PLANTED = "wJalrXUtnFEMI"


@pytest.mark.parametrize(
    "location",
    [
        f"s3://AKIAEXAMPLE:{PLANTED}@bucket/images",
        f"s3://AKIAEXAMPLE:ab/{PLANTED}@bucket/images",  # their keys have slashes
        f"s3://AKIAEXAMPLE:{PLANTED}?x@bucket/images",
        f"s3://AKIAEXAMPLE%3A{PLANTED}@bucket/images",
        f"s3://AKIAEXAMPLE:{PLANTED}/bucket",
        f"https://{PLANTED}@host/images",
        f"s3://bucket/images?access_key=AKIAEXAMPLE&secret_key={PLANTED}",
        f"https://bucket.s3.amazonaws.com/a.jpg?X-Amz-Date=20260101&X-Amz-Signature={PLANTED}",
        f"https://bucket.s3.amazonaws.com/a.jpg?X-Amz-Security-Token={PLANTED}@x",
        f"abfs://container@account.dfs.core.windows.net/a?sv=2024&sig={PLANTED}",
        f"https://host/a.jpg;token={PLANTED}",
    ],
)
def test_a_uri_with_a_secret_is_refused_without_repeating_it(location: str) -> None:
    with pytest.raises(InputError, match="AWS_PROFILE") as caught:
        storage.absolute(location)
    assert PLANTED not in str(caught.value)
    with pytest.raises(InputError) as caught:
        storage.locate(location, base="/a", folders=["/a"], source="a.parquet, row 1", allow_outside=True)
    assert "a.parquet, row 1" in str(caught.value)
    assert PLANTED not in str(caught.value)


def test_a_key_never_reaches_a_file_system(caplog: pytest.LogCaptureFixture) -> None:
    for act in (storage.exists, storage.read_bytes, storage.is_folder, storage.remove):
        with pytest.raises(InputError) as caught:
            act(f"s3://AKIAEXAMPLE:{PLANTED}@bucket/images")
        assert PLANTED not in str(caught.value)
    assert PLANTED not in caplog.text


@pytest.mark.parametrize(
    "location",
    [
        "s3://bucket/who@home/what?.jpg",
        "s3://bucket/a?page=2&design=1",
        "gs://anonymous@bucket/images",
        "abfs://container@account.dfs.core.windows.net/images",
        "hdfs://user@namenode:8020/images",
        "http://[::1]:8080/images",
        "memory://bucket/images",
        "file:///tmp/a:b@c",
        "/tmp/key:secret@home?token=1",
    ],
)
def test_a_uri_without_a_secret_is_accepted(location: str) -> None:
    storage.absolute(location)
    storage.locate(location, base="/", folders=["/"], source="", allow_outside=True)


def test_a_key_in_a_bucket_can_look_like_a_query() -> None:
    """Otherwise, a file that `wget` named after a signed URL would end a run that lists it."""
    storage.write_bytes("memory://looks/like/a.jpg?X-Amz-Signature=0", b"1")

    ((location, *_),) = storage.list_files("memory://looks/like")

    assert storage.read_bytes(location) == b"1"


def test_secrets_in_an_error_message_are_hidden() -> None:
    text = f"403, url='https://user:{PLANTED}@host/a?X-Amz-Signature={PLANTED}&x=1' (s3://K:{PLANTED}@b/c) sig=1"

    assert storage.hide_secrets(text) == "403, url='https://***@host/a?X-Amz-Signature=***&x=1' (s3://***@b/c) sig=1"
    for harmless in ("http://127.0.0.1:8265/api", "no such file: /tmp/a:b@c.jpg", "see https://a.b/c?x=1"):
        assert storage.hide_secrets(harmless) == harmless


def test_a_signed_url_in_a_store_error_is_hidden() -> None:
    from fsspec import register_implementation
    from fsspec.implementations.memory import MemoryFileSystem

    class Signing(MemoryFileSystem):  # type: ignore[misc]
        protocol = "signing"

        def _open(self, path: str, *arguments: object, **options: object) -> object:
            raise ConnectionError(f"503 Busy: https://cdn.example/{path}?Signature={PLANTED}")

        def isfile(self, path: str) -> bool:
            return True

    register_implementation("signing", Signing, clobber=True)

    with pytest.raises(ConnectionError, match="503 Busy") as caught:
        storage.read_bytes("signing://bucket/a.jpg")
    assert PLANTED not in str(caught.value)


def test_a_name_with_a_null_byte_is_a_missing_file(folder: str) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(folder, "a\0.jpg"))


def test_a_file_that_is_too_long_is_not_read(folder: str) -> None:
    path = storage.join(folder, "a.txt")
    storage.write_bytes(path, b"12345")

    assert storage.read_bytes(path, max_bytes=5) == b"12345"
    with pytest.raises(OSError, match="too large") as caught:
        storage.read_bytes(path, max_bytes=4)
    assert caught.value.errno == errno.EFBIG


# ---- size and time of files


class _Store(fsspec.implementations.memory.MemoryFileSystem):  # type: ignore[misc]
    """A store whose listings fail in a given way."""

    protocol = "failing"
    error: Exception | None = None

    def ls(self, path: str, detail: bool = True, **options: object) -> object:
        if self.error:
            raise self.error
        return super().ls(path, detail=detail, **options)

    def info(self, path: str, **options: object) -> object:
        if self.error:
            raise self.error
        return super().info(path, **options)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    fsspec.register_implementation("failing", _Store, clobber=True)
    folder = f"failing://{uuid.uuid4().hex}"
    for name in "abc":
        storage.write_bytes(f"{folder}/{name}", b"photograph")
    yield folder
    _Store.error = None


@pytest.mark.parametrize("error", [PermissionError("no"), OSError("HTTP status 403"), NotImplementedError()])
def test_files_of_a_folder_that_cannot_be_listed_have_unknown_size(failing: str, error: Exception) -> None:
    names = [f"{failing}/a", f"{failing}/b"]
    assert [file.size for file in storage.describe_files(names).values()] == [10, 10]

    _Store.error = error

    assert [file[2:] for file in storage.describe_files(names).values()] == [(-1, 0), (-1, 0)]
    assert storage.describe_file_or_nothing(names[0]) is None


@pytest.mark.parametrize("error", [TimeoutError("slow down"), RuntimeError("connection reset"), OSError(errno.EIO, "")])
def test_a_listing_that_fails_does_not_make_files_look_changed(failing: str, error: Exception) -> None:
    _Store.error = error

    with pytest.raises(ImcapError, match=f"size and time of files in {failing} cannot be read"):
        storage.describe_files([f"{failing}/a", f"{failing}/b"])
    with pytest.raises(ImcapError, match=f"size and time of files in {failing}/a cannot be read"):
        storage.describe_file_or_nothing(f"{failing}/a")


def test_a_disk_that_fails_does_not_make_files_look_changed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"photograph")
    missing = [str(tmp_path / "b"), str(tmp_path / "a" / "c"), "/a\0", "/" + 300 * "n"]
    described = storage.describe_files([str(tmp_path / "a"), *missing])
    assert [described[name].size for name in (str(tmp_path / "a"), *missing)] == [10, -1, -1, -1, -1]

    def fail(path: str) -> os.stat_result:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)

    with monkeypatch.context() as patch, pytest.raises(ImcapError, match="Stale file handle"):
        patch.setattr(os, "stat", fail)
        storage.describe_files([str(tmp_path / "a")])


def test_only_the_requested_files_of_a_large_folder_are_kept(failing: str) -> None:
    files = storage.describe_files([f"{failing}/a", f"{failing}/missing"])

    assert [(location, file.size) for location, file in files.items()] == [
        (f"{failing}/a", 10),
        (f"{failing}/missing", -1),
    ]


def test_local_files_are_described_concurrently(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a network share, for example, a call that waits must not delay the others."""
    together = threading.Barrier(2, timeout=20)
    paths = [f"/missing/{number}" for number in range(1001)]  # a thousand files are described one after the other

    def stat(path: str) -> os.stat_result:
        if path in (paths[0], paths[-1]):
            together.wait()
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", stat)
        assert len(storage.describe_files(paths)) == len(paths)


# ---- names that are not UTF-8


def write_raw(folder: Path, name: bytes, content: bytes) -> None:
    """Write a file with a name of these bytes, in folders that are created."""
    path = os.path.join(os.fsencode(folder), name)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)
    except OSError:
        pytest.skip("this file system holds only names in UTF-8")


def read_all(folder: Path) -> dict[str, bytes]:
    return {file.name: storage.read_bytes(file.location) for file in storage.list_files(str(folder))}


def test_files_with_names_that_are_not_utf8_are_read_at_their_listed_location(tmp_path: Path) -> None:
    for name in (b"\xe9t\xe9.jpg", b"caf\xe9/a.jpg", b"caf\xe9/\xff\xfe", b"caf\xc3\xa9.jpg", b"\\\xe9"):
        write_raw(tmp_path, name, name)

    files = list(storage.list_files(str(tmp_path)))

    assert read_all(tmp_path) == {
        r"\xe9t\xe9.jpg": b"\xe9t\xe9.jpg",
        r"caf\xe9/a.jpg": b"caf\xe9/a.jpg",
        r"caf\xe9/\xff\xfe": b"caf\xe9/\xff\xfe",
        "café.jpg": b"caf\xc3\xa9.jpg",
        r"\x5c\xe9": b"\\\xe9",
    }
    for file in files:
        assert storage.exists(file.location) and storage.is_file(file.location)
        assert storage.is_folder(storage.parent(file.location))
        assert storage.describe_file(file.location)[2:] == file[2:]
        assert storage.describe_files([file.location])[file.location][2:] == file[2:]
        assert storage.is_reachable(storage.parent(file.location))
        assert os.path.basename(file.location) in storage.names_in(storage.parent(file.location))
        with storage.open_file(file.location) as opened:
            assert opened.read() == storage.read_bytes(file.location)


def test_a_location_given_in_bytes_is_the_listed_one(tmp_path: Path) -> None:
    write_raw(tmp_path, b"caf\xe9/\xe9.jpg", b"1")

    assert storage.absolute(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")) == f"{tmp_path}/caf\\xe9"
    assert storage.read_bytes(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9/\xe9.jpg")) == b"1"


_NAME_PIECES = [b"\xe9", b"\xc3\xa9", b"\\", b"x", b"e9", b"\\xe9", b"\\x5c", b"a", b"\\xc3\\xa9", b"\\x61"]


@settings(max_examples=50, deadline=None)
@given(st.sets(st.lists(st.sampled_from(_NAME_PIECES), min_size=1, max_size=4).map(b"".join), min_size=1, max_size=12))
def test_no_file_is_read_for_another_whatever_the_names(
    tmp_path_factory: pytest.TempPathFactory, names: set[bytes]
) -> None:
    folder = tmp_path_factory.mktemp("names")
    for name in names:
        write_raw(folder, name, name)
        write_raw(folder, b"folder" + name + b"/" + name, name)

    files = list(storage.list_files(str(folder)))

    assert len({file.name for file in files}) == len(files) == 2 * len(names)
    assert sorted(map(storage.read_bytes, (file.location for file in files))) == sorted([*names, *names])
    for file in files:
        name = storage.read_bytes(file.location)
        is_utf8 = name == name.decode("utf-8", "ignore").encode()
        assert not is_utf8 or os.fsencode(file.name.rpartition("/")[2]) == name


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(_NAME_PIECES), min_size=1, max_size=4).map(b"".join))
def test_a_location_that_is_not_listed_is_missing(tmp_path_factory: pytest.TempPathFactory, name: bytes) -> None:
    folder = tmp_path_factory.mktemp("names")
    for piece in _NAME_PIECES:
        write_raw(folder, piece, piece)
    listed = {re.sub(r"\\+x", r"\\x", file.name) for file in storage.list_files(str(folder))}
    text = name.decode("utf-8", "ignore")

    assert not storage.is_file(f"{folder}/{text}") or re.sub(r"\\+x", r"\\x", text) in listed


def test_a_file_in_a_folder_whose_name_is_not_utf8_is_written_there(tmp_path: Path) -> None:
    write_raw(tmp_path, b"caf\xe9/a.jpg", b"1")

    storage.write_bytes(f"{tmp_path}/caf\\xe9/a.txt", b"2")

    assert os.listdir(tmp_path) == [os.fsdecode(b"caf\xe9")]
    assert read_all(tmp_path) == {r"caf\xe9/a.jpg": b"1", r"caf\xe9/a.txt": b"2"}


@pytest.mark.parametrize("name", ["a\0b", "\0/é", "é\0", "\0"])
def test_a_name_with_a_null_character_does_not_exist(tmp_path: Path, name: str) -> None:
    location = storage.join(str(tmp_path), name)

    assert not storage.exists(location)
    assert not storage.is_file(location)
    assert not storage.is_folder(location)
