"""pyarrow file systems that pass everything on to another one, except for what a subclass changes."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

from pyarrow import NativeFile, PythonFile, fs

_Result = TypeVar("_Result")

_FIRST_WAIT_SECONDS: Final = 0.05

# pyarrow's buffer for a response of S3 is as large as the range that was asked for. If an error's text is longer,
# neither pyarrow nor the AWS library knows the error, and neither tries again.
_LOST_ANSWER: Final = "Failed to flush response stream"


class FileSystemLayer(fs.FileSystemHandler):  # type: ignore[misc]
    """Passes every call on to another file system.

    Args:
        filesystem: where the files are.
    """

    def __init__(self, filesystem: fs.FileSystem) -> None:
        self.filesystem = filesystem

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.filesystem == other.filesystem

    def __hash__(self) -> int:
        return hash(type(self))

    def inner_path(self, path: str) -> str:
        """A file's path on the other file system."""
        return path

    def get_type_name(self) -> str:
        return str(self.filesystem.type_name)

    def normalize_path(self, path: str) -> str:
        return str(self.filesystem.normalize_path(path))

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        return list(self.filesystem.get_file_info([self.inner_path(path) for path in paths]))

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        return list(self.filesystem.get_file_info(selector))

    def create_dir(self, path: str, recursive: bool) -> None:
        self.filesystem.create_dir(path, recursive=recursive)

    def delete_dir(self, path: str) -> None:
        self.filesystem.delete_dir(path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self.filesystem.delete_dir_contents(path, missing_dir_ok=missing_dir_ok)

    def delete_root_dir_contents(self) -> None:
        raise OSError("the content of a whole file system is never deleted")

    def delete_file(self, path: str) -> None:
        self.filesystem.delete_file(self.inner_path(path))

    def move(self, source: str, target: str) -> None:
        self.filesystem.move(self.inner_path(source), self.inner_path(target))

    def copy_file(self, source: str, target: str) -> None:
        self.filesystem.copy_file(self.inner_path(source), self.inner_path(target))

    def open_input_stream(self, path: str) -> NativeFile:
        return self.filesystem.open_input_stream(self.inner_path(path), compression=None)

    def open_input_file(self, path: str) -> NativeFile:
        return self.filesystem.open_input_file(self.inner_path(path))

    def open_output_stream(self, path: str, metadata: Any) -> NativeFile:
        return self.filesystem.open_output_stream(self.inner_path(path), metadata=metadata, compression=None)

    def open_append_stream(self, path: str, metadata: Any) -> NativeFile:
        return self.filesystem.open_append_stream(self.inner_path(path), metadata=metadata, compression=None)


class RetriedReads(FileSystemLayer):
    """S3 on which a file's reads are repeated if the answer was lost, which pyarrow does not do.

    Args:
        filesystem: S3.
        attempts: number of attempts of each read. The first retry is immediate, and the waits before the others double.
    """

    def __init__(self, filesystem: fs.FileSystem, attempts: int) -> None:
        super().__init__(filesystem)
        self._attempts = attempts

    def open_input_file(self, path: str) -> NativeFile:
        return PythonFile(_RetriedFile(super().open_input_file(path), self._attempts), mode="r")


class _RetriedFile(io.RawIOBase):
    def __init__(self, file: NativeFile, attempts: int) -> None:
        self._file, self._attempts = file, attempts

    def read(self, size: int = -1, /) -> bytes:
        position, wanted = self._file.tell(), size if size >= 0 else None

        def read_once() -> bytes:
            self._file.seek(position)
            return bytes(self._file.read(wanted))

        return _retry_lost_answers(read_once, self._attempts)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        self._file.close()
        super().close()


def _retry_lost_answers(read: Callable[[], _Result], attempts: int) -> _Result:
    for attempt in range(1, attempts):
        try:
            return read()
        except OSError as error:
            if _LOST_ANSWER not in str(error):
                raise
            if attempt > 1:
                time.sleep(_FIRST_WAIT_SECONDS * 2 ** (attempt - 2))
    return read()
