"""The file system on which Ray Data keeps the numbers of the images that are done."""

from __future__ import annotations

from typing import Final

from pyarrow import fs

from imcap_ray.file_systems import FileSystemLayer

EXTENSION: Final = ".parquet"


class WithoutExtension(FileSystemLayer):
    """A file system on which files that Ray Data names `NAME.parquet` are called `NAME`.

    Ray Data chooses the names of its checkpoint files, and a reader that collects `captions/**/*.parquet` would take
    them for captions.

    Args:
        filesystem: where the files are.
    """

    def inner_path(self, path: str) -> str:
        return path.removesuffix(EXTENSION)

    def get_type_name(self) -> str:
        return f"{self.filesystem.type_name} without extensions"

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        return [_renamed(info, path) for info, path in zip(super().get_file_info(paths), paths, strict=True)]

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        found = super().get_file_info_selector(selector)
        return [_renamed(info, info.path + EXTENSION) if info.is_file else info for info in found]


def _renamed(info: fs.FileInfo, path: str) -> fs.FileInfo:
    return fs.FileInfo(path, type=info.type, size=info.size, mtime_ns=info.mtime_ns)
