"""Local paths and URIs -> files, through pyarrow's file systems. Knows nothing of what the files hold."""

from __future__ import annotations

import os
import posixpath
import re
import uuid
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from pyarrow import fs

from imcap_ray.errors import InputError


def is_uri(location: str) -> bool:
    """Whether the location is written as a URI (`s3://bucket/key`) rather than as a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", location) is not None


def absolute(location: str) -> str:
    """The location independent of the current folder: a URI as it is, a path made absolute, `file://` taken off."""
    if location.startswith("file://"):
        location = location.removeprefix("file://")
    return location.rstrip("/") if is_uri(location) else os.path.abspath(os.path.expanduser(location))


def join(location: str, *parts: str) -> str:
    """The location of a file or folder below `location`."""
    return posixpath.join(location, *parts)


def parent(location: str) -> str:
    """The folder that holds this location."""
    return posixpath.dirname(location.rstrip("/"))


def resolve(location: str) -> tuple[fs.FileSystem, str]:
    """The file system and the path on it; InputError when no installed library knows the URI's scheme."""
    location = absolute(location)
    if not is_uri(location):
        return _local(), location
    scheme, _, path = location.partition("://")
    filesystem = _remote(scheme, path.partition("/")[0])
    return filesystem, path


@lru_cache(maxsize=1)
def _local() -> fs.FileSystem:
    return fs.LocalFileSystem()


@lru_cache(maxsize=16)
def _remote(scheme: str, authority: str) -> fs.FileSystem:
    """One file system object per bucket: making one for S3 costs a request for its region."""
    root = f"{scheme}://{authority}/"
    # A small object in one request instead of the three of a multipart upload.
    options = "?allow_delayed_open=true" if scheme == "s3" else ""
    try:
        return fs.FileSystem.from_uri(root + options)[0]
    except (ValueError, OSError) as arrow_error:
        try:
            import fsspec  # type: ignore[import-untyped]

            return fs.PyFileSystem(fs.FSSpecHandler(fsspec.core.url_to_fs(root)[0]))
        except (ImportError, ValueError, OSError) as error:
            raise InputError(f"cannot open {root}: {arrow_error}; {error}") from error


def exists(location: str) -> bool:
    """Whether a file or folder is there."""
    filesystem, path = resolve(location)
    return bool(filesystem.get_file_info(path).type != fs.FileType.NotFound)


def is_file(location: str) -> bool:
    """Whether a file is there."""
    filesystem, path = resolve(location)
    return bool(filesystem.get_file_info(path).type == fs.FileType.File)


def is_folder(location: str) -> bool:
    """Whether a folder is there; in an object store, whether anything is below that name."""
    filesystem, path = resolve(location)
    return bool(filesystem.get_file_info(path).type == fs.FileType.Directory)


def list_files(folder: str, *, recursive: bool = True) -> Iterator[tuple[str, str]]:
    """Location and path relative to `folder` of each file below it, sorted within each folder.

    One folder at a time is held in memory. Links are followed; a folder met a second time on the way down is not
    entered again. A link that leads nowhere is listed: it is somebody's image, and its row will say `missing`.
    A folder that cannot be read raises InputError.
    """
    folder = absolute(folder)
    filesystem, root = resolve(folder)
    yield from _walk(filesystem, root, folder, "", recursive, ancestors=())


def _walk(
    filesystem: fs.FileSystem, path: str, location: str, name: str, recursive: bool, ancestors: tuple[str, ...]
) -> Iterator[tuple[str, str]]:
    is_local = isinstance(filesystem, fs.LocalFileSystem)
    real_path = os.path.realpath(path) if is_local else path
    if real_path in ancestors:
        return
    try:
        entries = sorted(_list_local(path) if is_local else _list_remote(filesystem, path))
    except OSError as error:
        raise InputError(f"cannot list {location}: {error}") from error
    for entry, is_folder in entries:
        if not is_folder:
            yield join(location, _printable(entry)), name + _printable(entry)
    for entry, is_folder in entries:
        if is_folder and recursive:
            below = (join(path, entry), join(location, _printable(entry)), f"{name}{_printable(entry)}/")
            yield from _walk(filesystem, *below, recursive, (*ancestors, real_path))


def _list_local(path: str) -> list[tuple[str, bool]]:
    """Names in a folder, and whether each is a folder. Not through pyarrow, which leaves out links that lead nowhere
    and stops at a name that is not UTF-8."""
    with os.scandir(path) as entries:
        return [
            (entry.name, os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir())
            for entry in entries
            if entry.is_symlink() or entry.is_dir() or entry.is_file()  # a pipe would be waited for
        ]


def _list_remote(filesystem: fs.FileSystem, path: str) -> list[tuple[str, bool]]:
    entries = filesystem.get_file_info(fs.FileSelector(path, recursive=False))
    return [(entry.base_name, entry.type == fs.FileType.Directory) for entry in entries]


def _printable(name: str) -> str:
    """The name with bytes that are not UTF-8 written as `\\xff`: no table holds them, so its image is `missing`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def read_bytes(location: str) -> bytes:
    """The file's content; OSError as the file system raises it."""
    filesystem, path = resolve(location)
    if isinstance(filesystem, fs.LocalFileSystem):
        return Path(path).read_bytes()  # twice as fast as through pyarrow, and its errors have types
    with filesystem.open_input_stream(path) as stream:
        return bytes(stream.read())


def write_bytes(location: str, data: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    filesystem, path = resolve(location)
    if isinstance(filesystem, fs.LocalFileSystem):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(path).with_name(f".{Path(path).name}.{uuid.uuid4().hex[:8]}")
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    else:  # object stores show an upload when it is complete
        with filesystem.open_output_stream(path) as stream:
            stream.write(data)


def make_folder(location: str) -> None:
    """Make the folder and those above it; nothing to do where it exists or the store has no folders."""
    filesystem, path = resolve(location)
    if isinstance(filesystem, fs.LocalFileSystem):
        filesystem.create_dir(path, recursive=True)


def remove(location: str) -> None:
    """Remove a file, or a folder with all below it; nothing to do where there is none."""
    filesystem, path = resolve(location)
    kind = filesystem.get_file_info(path).type
    if kind == fs.FileType.File:
        filesystem.delete_file(path)
    elif kind == fs.FileType.Directory:
        filesystem.delete_dir(path)
