"""The file system on which Ray Data keeps the numbers of the images that are done."""

from __future__ import annotations

from typing import Any, Final

from pyarrow import fs

EXTENSION: Final = ".parquet"


class WithoutExtension(fs.FileSystemHandler):  # type: ignore[misc]
    """A file system on which files that Ray Data names `NAME.parquet` are called `NAME`.

    Ray Data chooses the names of its checkpoint files, and a reader that collects `captions/**/*.parquet` would take
    them for captions.

    Args:
        filesystem: where the files are.
    """

    def __init__(self, filesystem: fs.FileSystem) -> None:
        self._filesystem = filesystem

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WithoutExtension) and self._filesystem == other._filesystem

    def __hash__(self) -> int:
        return hash(type(self))

    def get_type_name(self) -> str:
        return f"{self._filesystem.type_name} without extensions"

    def normalize_path(self, path: str) -> str:
        return str(self._filesystem.normalize_path(path))

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        found = self._filesystem.get_file_info([path.removesuffix(EXTENSION) for path in paths])
        return [_renamed(info, path) for info, path in zip(found, paths, strict=True)]

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        found = self._filesystem.get_file_info(selector)
        return [_renamed(info, info.path + EXTENSION) if info.is_file else info for info in found]

    def create_dir(self, path: str, recursive: bool) -> None:
        self._filesystem.create_dir(path, recursive=recursive)

    def delete_dir(self, path: str) -> None:
        self._filesystem.delete_dir(path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self._filesystem.delete_dir_contents(path, missing_dir_ok=missing_dir_ok)

    def delete_root_dir_contents(self) -> None:
        raise OSError("the content of a whole file system is never deleted")

    def delete_file(self, path: str) -> None:
        self._filesystem.delete_file(path.removesuffix(EXTENSION))

    def move(self, source: str, target: str) -> None:
        self._filesystem.move(source.removesuffix(EXTENSION), target.removesuffix(EXTENSION))

    def copy_file(self, source: str, target: str) -> None:
        self._filesystem.copy_file(source.removesuffix(EXTENSION), target.removesuffix(EXTENSION))

    def open_input_stream(self, path: str) -> Any:
        return self._filesystem.open_input_stream(path.removesuffix(EXTENSION), compression=None)

    def open_input_file(self, path: str) -> Any:
        return self._filesystem.open_input_file(path.removesuffix(EXTENSION))

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        return self._filesystem.open_output_stream(path.removesuffix(EXTENSION), metadata=metadata, compression=None)

    def open_append_stream(self, path: str, metadata: Any) -> Any:
        return self._filesystem.open_append_stream(path.removesuffix(EXTENSION), metadata=metadata, compression=None)


def _renamed(info: fs.FileInfo, path: str) -> fs.FileInfo:
    return fs.FileInfo(path, type=info.type, size=info.size, mtime_ns=info.mtime_ns)
