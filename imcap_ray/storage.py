"""Local paths and URIs -> files, through pyarrow's file systems, and the web's for single files. Knows no contents."""

from __future__ import annotations

import errno
import itertools
import os
import posixpath
import re
import shutil
import stat
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO, Final, NamedTuple
from urllib.parse import unquote

from pyarrow import NativeFile, PythonFile, fs

from imcap_ray import web
from imcap_ray.errors import ImcapError, InputError

S3_ATTEMPTS: Final = 11
"""Number of attempts of a request to S3, unless AWS_MAX_ATTEMPTS is set. The first retry is immediate, and the waits
before the others double from 50 ms to 12.8 s: 25.6 seconds in total. A short outage, or a store that throttles, costs a
run only time."""

MOST_S3_ATTEMPTS: Final = 16
"""Maximum of AWS_MAX_ATTEMPTS, because the waits double: 16 attempts wait 14 minutes, 20 would wait 4 hours."""

_CHECKSUM_VARIABLE: Final = "AWS_REQUEST_CHECKSUM_CALCULATION"
_CHUNK_HEADER: Final = re.compile(rb"[0-9a-fA-F]+(;chunk-signature=[0-9a-f]+)?\r\n")
"""Beginning of an upload that is encoded as `aws-chunked`."""
_READ_BACK_ATTEMPTS: Final = 3

_FIRST_WAIT_SECONDS: Final = 0.05
_REACHABLE_SECONDS: Final = 11.0
_REACHABLE_TIMEOUT_SECONDS: Final = 3.0
_REACHABLE_PAUSE_SECONDS: Final = 0.25

# pyarrow's buffer for a response of S3 is as large as the object. If an error's text is longer than that, neither
# pyarrow nor the AWS library knows the error, and neither tries again.
_LOST_ANSWER: Final = "Failed to flush response stream"

_ESCAPE: Final = re.compile(r"\\+x([89a-f][0-9a-f]|5c)")
_ESCAPE_BYTES: Final = re.compile(_ESCAPE.pattern.encode())
_NOT_UTF8: Final = re.compile("[\udc80-\udcff]")
_TEMPORARY: Final = re.compile(r"\..+\.[0-9a-f]{8}")
_TEMPORARY_LETTERS: Final = 60  # of the file's own name; 4 bytes each in UTF-8 leave room in the 255 that a name has
_COPY_BYTES: Final = 16 * 2**20
_SECOND_NS: Final = 10**9
_CONCURRENT_LISTINGS: Final = 16
_FILES_PER_TASK: Final = 1000

_NO_FILE: Final = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL)
_REFUSED_STATUS: Final = (401, 403, 404, 405, 501)
"""HTTP statuses, in the errors of fsspec's web stores, for which a retry is useless."""

_FORBIDDEN: Final = re.compile(r"AWS Error ACCESS_DENIED|HTTP status (401|403)\b")
_SECRET_NAMES: Final = (
    r"[\w.-]*(?:signature|secret|token|password|passwd|credential|api_?key|access_?key)[\w.-]*|sig|auth"
)
_SECRET_QUERY: Final = re.compile(rf"(?P<name>[?&;](?:{_SECRET_NAMES})=)[^&;#\s'\")]+", re.IGNORECASE)
_SECRET_USER: Final = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)[^/@\s'\"]*(?::|%3a)[^@\s'\"]+@", re.IGNORECASE
)


def is_uri(location: str) -> bool:
    """Whether the location is a URI (`s3://bucket/key`) rather than a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", location) is not None


def absolute(location: str) -> str:
    """The location as an absolute path without `file://`; a URI is returned unchanged.

    Raises:
        InputError: the URI contains a password, a key or a signature.
    """
    refuse_secrets(location)
    return _absolute(location)


def _absolute(location: str) -> str:
    if location[:7].lower() == "file://":
        location = location[7:]
    return location.rstrip("/") if is_uri(location) else _in_utf8(os.path.abspath(os.path.expanduser(location)))


def _in_utf8(path: str) -> str:
    """The location of a local path: each name that is not UTF-8 is escaped, because tables cannot contain it."""
    if _is_in_utf8(path):
        return path
    location = on_disk = "/"
    for name in path.split("/"):
        location, on_disk = join(location, _name_in_utf8(on_disk, name)), join(on_disk, name)
    return location


def _name_in_utf8(folder: str, name: str) -> str:
    """The name of a file or folder. A name that is not UTF-8 is escaped, with more backslashes if another file has that
    name."""
    escaped = escape(os.fsencode(name))
    while escaped != name and os.path.lexists(join(folder, escaped)):
        escaped = escaped.replace("\\x", "\\\\x")
    return escaped


def escape(data: bytes) -> str:
    """The text of these bytes. If they are not UTF-8, others and backslashes become `\\xff`, so that different bytes
    have different texts."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.replace(b"\\", rb"\x5c").decode("utf-8", "backslashreplace")


def _on_disk(path: str) -> str:
    """The path of the file at a location, in which names that are not UTF-8 are escaped, see `_name_in_utf8`.

    A file whose name is the escaped one takes precedence, because it is not listed under another.
    """
    if not _ESCAPE.search(path) or os.path.lexists(path):
        return path
    on_disk = "/"
    for name in path.split("/"):
        paths = (join(on_disk, one) for one in (name, _unescape(name)))
        on_disk = next(filter(os.path.lexists, paths), join(on_disk, name))
    return on_disk


def _unescape(name: str) -> str:
    """The name that is not UTF-8 of which this is the escaped form; any other name is returned unchanged."""
    unescaped = os.fsdecode(_ESCAPE_BYTES.sub(lambda match: bytes.fromhex(match[1].decode()), os.fsencode(name)))
    return unescaped if escape(os.fsencode(unescaped)) == _ESCAPE.sub(r"\\x\1", name) else name


def _is_in_utf8(path: str) -> bool:
    """Whether a path can be given to pyarrow, which refuses others."""
    return path.isascii() or not _NOT_UTF8.search(path)


def join(location: str, *parts: str) -> str:
    """The location of a file or folder below `location`; a part that is absolute or a URI replaces all before it."""
    last = next((number for number in reversed(range(len(parts))) if is_uri(parts[number])), None)
    return posixpath.join(location, *parts) if last is None else posixpath.join(*parts[last:])


def parent(location: str) -> str:
    """The folder that contains this location."""
    return posixpath.dirname(location.rstrip("/"))


def is_inside(folder: str, location: str) -> bool:
    """Whether an absolute location is `folder` or below it, by the names alone.

    `.` and `..` are resolved; in a URI also `%2e`, because a server may decode it. A backslash is an ordinary
    character. Links are not resolved: anyone who creates one inside a folder may write there, so it is followed.
    """
    if location.startswith(f"{folder}/") and "/.." not in location and "%" not in location:
        return True
    return _is_below(folder, location) and _is_below(_decode(folder), _decode(location))


def _is_below(folder: str, location: str) -> bool:
    outer, inner = _steps(folder), _steps(location)
    return outer is not None and inner is not None and inner[: len(outer)] == outer


def _steps(location: str) -> list[str] | None:
    """Scheme, authority and names in a location; None for a relative location, or one above the root."""
    if location[:7].lower() == "file://":
        location = location[7:]
    scheme, _, rest = location.partition("://") if is_uri(location) else ("", "", location)
    if not scheme and not rest.startswith("/"):
        return None
    authority, _, path = rest.partition("/")
    steps = [scheme.lower(), authority]
    for name in path.split("/"):
        if name == "..":
            if len(steps) == 2:
                return None
            steps.pop()
        elif name not in ("", "."):
            steps.append(name)
    return steps


def _decode(location: str) -> str:
    """A URI with all percent escapes decoded, also repeated ones; a path is returned unchanged."""
    while is_uri(location) and (decoded := unquote(location)) != location:
        location = decoded
    return location


def locate(
    path: str,
    *,
    base: str,
    folders: Sequence[str],
    source: str,
    allow_outside: bool,
    error: type[InputError] = InputError,
) -> str:
    """The location of a path in a table or a list; a relative path starts at `base`.

    Args:
        folders: the location must be in one of these, see `is_inside`, unless `allow_outside`.
        source: the table and the row, for the message.
        error: type of the error.

    Raises:
        InputError: the location is outside, or it is a URI with a secret.
    """
    try:
        refuse_secrets(path)
    except InputError as refused:
        raise error(f"{source}: {refused}") from refused
    location = join(base, path)
    if not allow_outside and not any(is_inside(folder, location) for folder in folders):
        raise error(
            f"{source}: the path {path!r} leads out of {' and '.join(folders)}; "
            "give --allow-outside-paths to allow any file that you can read"
        )
    return location


def refuse_secrets(location: str) -> None:
    """Raise InputError if a URI contains a password, a key or a signature, without repeating the secret.

    Locations are written to tables, to run.json, to logs and to the list of a cluster's jobs.
    """
    if not is_uri(location):
        return
    scheme, _, rest = location.partition("://")
    user, at, host = rest.partition("/")[0].rpartition("@")
    if at:  # abfs://container@account and gs://anonymous@bucket are not secrets
        has_key = ":" in unquote(user) or scheme.lower() in ("http", "https")
    else:  # a key that contains a slash looks like a port before the first slash
        port = re.sub(r"^\[.*?\]", "", host).partition(":")[2]
        has_key = not port.isdigit() and port != "" and not host.startswith("arn:")
    if has_key or _SECRET_QUERY.search(location):
        shown = "..." if has_key else re.split("[?&;]", rest)[0]
        raise InputError(
            f"the URI {scheme}://{shown} holds a secret, which would end up in tables and logs: remove it, and set "
            "environment variables (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or a profile (AWS_PROFILE) instead"
        )


def hide_secrets(text: str) -> str:
    """The text, such as that of an error, with passwords, keys and signatures in its URIs replaced by `***`."""
    return _SECRET_USER.sub(r"\g<scheme>***@", _SECRET_QUERY.sub(r"\g<name>***", text))


def resolve(location: str) -> tuple[fs.FileSystem, str]:
    """The file system and the path on it.

    Raises:
        InputError: no installed library supports the URI's scheme, or it is a web address, which only `read_bytes` can
            read.
    """
    location = _absolute(location)
    if not is_uri(location):
        return _local(), _on_disk(location)
    scheme, _, path = location.partition("://")
    if web.is_web(location):
        host = path.partition("/")[0].rpartition("@")[2]
        raise InputError(
            f"{scheme}://{host} is a web server, from which only single images are read (imcap caption ADDRESS, or "
            "addresses in a table with --allow-outside-paths): download anything else first"
        )
    authority = path.partition("/")[0]
    refuse_secrets(f"{scheme}://{authority}")  # not the rest: a key in a bucket may look like a query
    return _remote(scheme, authority), path


class _S3(fs.S3FileSystem):  # type: ignore[misc]
    """S3 with retries, which survive pickling; pyarrow's own pickling loses the number of attempts.

    The AWS library's "standard" strategy spends 5 of 500 tokens on each retry and never gets them back: after 100
    retries in a process it would stop retrying. The "default" strategy counts the retries of each request separately.

    Args:
        attempts: number of attempts of each request, including the first one.
        timeout_seconds: maximum time without a connection, or without a byte.
        endpoint: pyarrow's arguments for the location of the store.
    """

    def __init__(self, *, attempts: int, timeout_seconds: float, endpoint: dict[str, str]) -> None:
        if "endpoint_override" in endpoint:
            # Otherwise the AWS library appends a checksum to each upload, in an encoding that not every store decodes.
            os.environ.setdefault(_CHECKSUM_VARIABLE, "when_required")
        super().__init__(
            retry_strategy=fs.AwsDefaultS3RetryStrategy(max_attempts=attempts - 1),  # it counts retries
            connect_timeout=timeout_seconds,
            request_timeout=timeout_seconds,
            allow_delayed_open=True,  # a small object in one request instead of the three of a multipart upload
            **endpoint,
        )
        self._arguments: dict[str, Any] = {
            "attempts": attempts,
            "timeout_seconds": timeout_seconds,
            "endpoint": endpoint,
        }
        self._is_checked = "endpoint_override" not in endpoint

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(_S3, **self._arguments), ()

    def check_first_upload(self, path: str, size: int) -> None:
        """Raise InputError if the store has not stored the first object as it was written.

        Only sizes are compared, because another process may have written the object since. Stores other than AWS are
        checked, once in each process.
        """
        if self._is_checked:
            return
        try:
            for attempt in range(_READ_BACK_ATTEMPTS):
                stored = self.get_file_info(path)
                if stored.size == size:
                    self._is_checked = True
                    return
                time.sleep(attempt / 2)  # a store may need a moment to show it
            with self.open_input_stream(path) as stream:
                begins = bytes(stream.read(100))
        except FileNotFoundError:  # another process has removed it
            return
        except OSError as error:
            if not _is_forbidden(error):
                raise
            self._is_checked = True  # writing may be allowed without reading
            return
        reason = "ask its administrator whether it supports uploads with checksums"
        if _CHUNK_HEADER.match(begins):
            reason = f"it does not decode aws-chunked uploads; set {_CHECKSUM_VARIABLE}=when_required"
        endpoint = hide_secrets(self._arguments["endpoint"]["endpoint_override"])
        raise InputError(
            f"the store at {endpoint} did not store what was written to s3://{path}: expected {size:,} bytes, got "
            f"{stored.size:,}; {reason}"
        )

    def without_retries(self, *, timeout_seconds: float) -> _S3:
        """The same store without retries."""
        return _S3(**self._arguments | {"attempts": 1, "timeout_seconds": timeout_seconds})


def _open_s3(bucket: str) -> _S3:
    # pyarrow itself uses these variables only for URIs, and a URI cannot contain the number of attempts.
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    location = {"endpoint_override": endpoint} if endpoint else {"region": fs.resolve_s3_region(bucket)}
    return _S3(attempts=_s3_attempts(), timeout_seconds=10.0, endpoint=location)


def _s3_attempts() -> int:
    value = os.environ.get("AWS_MAX_ATTEMPTS") or str(S3_ATTEMPTS)
    if not value.isdigit() or int(value) < 1:
        raise InputError(f"AWS_MAX_ATTEMPTS must be a whole number of at least 1, got {value!r}")
    return min(int(value), MOST_S3_ATTEMPTS)


@lru_cache(maxsize=1)
def _local() -> fs.FileSystem:
    return fs.LocalFileSystem()


@lru_cache(maxsize=16)
def _remote(scheme: str, authority: str) -> fs.FileSystem:
    """The file system of a bucket. One object for each, because creating one for S3 takes a request for its region."""
    root = f"{scheme}://{authority}/"
    try:
        return _open_s3(authority) if scheme == "s3" else fs.FileSystem.from_uri(root)[0]
    except (ValueError, OSError) as arrow_error:
        try:
            import fsspec  # type: ignore[import-untyped]

            return fs.PyFileSystem(fs.FSSpecHandler(fsspec.core.url_to_fs(root)[0]))
        except (ImportError, ValueError, OSError) as error:
            raise InputError(hide_secrets(f"cannot open {root}: {arrow_error}; {error}")) from error


def exists(location: str) -> bool:
    """Whether a file or folder exists."""
    return bool(_kind_of(location) != fs.FileType.NotFound)


def is_file(location: str) -> bool:
    """Whether the location is an existing file."""
    return bool(_kind_of(location) == fs.FileType.File)


def is_folder(location: str) -> bool:
    """Whether the location is an existing folder; in an object store, whether any object is below that name."""
    return bool(_kind_of(location) == fs.FileType.Directory)


def _kind_of(location: str) -> fs.FileType:
    filesystem, path = resolve(location)
    if "\0" in path:  # in damaged data; no file has such a name, and asking for it raises different errors
        return fs.FileType.NotFound
    if _is_in_utf8(path):
        return filesystem.get_file_info(path).type
    if os.path.isdir(path):
        return fs.FileType.Directory
    return fs.FileType.File if os.path.isfile(path) else fs.FileType.NotFound


def open_file(location: str) -> NativeFile:
    """A file, to be read at any position."""
    filesystem, path = resolve(location)
    return filesystem.open_input_file(path) if _is_in_utf8(path) else PythonFile(open(path, "rb"), mode="r")


def names_in(folder: str) -> set[str]:
    """The names of everything in a local folder.

    Raises:
        OSError: it cannot be listed.
    """
    path = resolve(folder)[1]
    return {_name_in_utf8(path, name) for name in os.listdir(path)}


class ListedFile(NamedTuple):
    """A file in a listing."""

    location: str
    name: str
    """Path relative to the listed folder."""
    size: int
    """In bytes; -1 for a broken link."""
    modified_ns: int
    """Time of the last change since 1970; 0 if unknown."""


def list_files(
    folder: str, *, recursive: bool = True, is_skipped: Callable[[str], bool] = lambda name: False
) -> Iterator[ListedFile]:
    """The files below a folder, sorted within each folder.

    One folder at a time is in memory. Links are followed, but not into a folder that contains them. A broken link is
    listed, because it is an image whose row gets the error `missing`. A folder that cannot be read raises InputError.

    Args:
        is_skipped: whether the folders of this name are left out.
    """
    folder = absolute(folder)
    filesystem, root = resolve(folder)
    yield from _walk(filesystem, root, folder, "", lambda name: recursive and not is_skipped(name), ancestors=())


def describe_file(location: str) -> ListedFile:
    """A file as in a listing of its folder; with size and time 0 if it does not exist."""
    filesystem, path = resolve(location)
    name = location.rpartition("/")[2]
    if isinstance(filesystem, fs.LocalFileSystem):
        try:
            status = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return ListedFile(location, name, 0, 0)
        size = status.st_size if stat.S_ISREG(status.st_mode) else 0
        return ListedFile(location, name, size, _int64_or_unknown(status.st_mtime_ns))
    if isinstance(filesystem, fs.PyFileSystem):  # fsspec caches, and others write to the store
        filesystem.handler.fs.invalidate_cache()
    info = filesystem.get_file_info(path)
    return ListedFile(location, name, info.size or 0, _int64_or_unknown(info.mtime_ns or 0))


def describe_regular_file(location: str) -> ListedFile:
    """A regular file, see `describe_file`.

    Raises:
        OSError: the file does not exist, it is not a regular file, or the store does not answer.
    """
    filesystem, path = resolve(location)
    if isinstance(filesystem, fs.LocalFileSystem):
        _require_regular(os.stat(path), location)
        return describe_file(location)
    try:
        file = describe_file(location)
        file_exists = file.size > 0 or exists(location)
    except OSError:
        raise
    except Exception as error:  # fsspec libraries raise exceptions of any type
        raise OSError(hide_secrets(f"{type(error).__name__}: {error}")) from None
    if not file_exists:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), location)
    return file


def is_same_version(location: str, before: tuple[int, int], now: tuple[int, int]) -> bool:
    """Whether two pairs of size and modification time (ns) may belong to the same content of a file.

    An unknown size (0 or less) or time (0) is not compared. Times of an object are the same if they differ by less than
    a second and one of them has no fraction: some stores list milliseconds, and elsewhere report seconds.
    """
    (old_size, old_time), (size, time_) = before, now
    if old_size > 0 and size > 0 and old_size != size:
        return False
    if not old_time or not time_ or old_time == time_:
        return True
    is_rounded = old_time % _SECOND_NS == 0 or time_ % _SECOND_NS == 0
    return is_uri(location) and is_rounded and abs(old_time - time_) < _SECOND_NS


def _int64_or_unknown(modified_ns: int) -> int:
    """The time, or 0 if it does not fit into the 64 bits of a table, which are for the years 1677 to 2262."""
    return modified_ns if -(2**63) <= modified_ns < 2**63 else 0


def describe_file_or_nothing(location: str) -> ListedFile | None:
    """A file, see `describe_file`; None if the store does not allow to describe it.

    Raises:
        ImcapError: the store failed.
    """
    try:
        return describe_file(location)
    except ImcapError:
        raise
    except Exception as error:  # libraries under fsspec raise exceptions of any type
        if _is_refused(error):
            return None
        raise _cannot_describe(location, error) from error


def describe_files(locations: Iterable[str]) -> dict[str, ListedFile]:
    """Size and time of these files, as in a listing; -1 and 0 for a file that is missing or was not asked for.

    A store lists the files' folders, a thousand files a request. A file that is the only one of its folder is not asked
    for, because this would take a request for each, so its size and time stay unknown. A folder is listed completely,
    however few of its files are wanted, because its number of files is unknown: it is better to copy a few files of a
    folder of millions to another folder. pyarrow has the listings of at most 16 folders in memory at a time; only the
    wanted files are kept.

    Raises:
        ImcapError: a store or a file system failed.
    """
    local: list[str] = []
    in_folders: dict[str, dict[str, str]] = defaultdict(dict)
    files = {}
    for location in locations:
        if is_uri(location):
            name = location.rpartition("/")[2]
            if not web.is_web(location):  # a web server lists no files
                in_folders[parent(location)][name] = location
            files[location] = ListedFile(location, name, -1, 0)
        else:
            local.append(location)
    folders = {folder: names for folder, names in in_folders.items() if len(names) > 1}
    pieces = [local[start : start + _FILES_PER_TASK] for start in range(0, len(local), _FILES_PER_TASK)]
    with ThreadPoolExecutor(_CONCURRENT_LISTINGS) as threads:
        for described in itertools.chain(
            threads.map(_describe_local, pieces), threads.map(_list_wanted, folders, folders.values())
        ):
            files.update((file.location, file) for file in described)
    return files


def _describe_local(paths: Sequence[str]) -> list[ListedFile]:
    return [ListedFile(path, path.rpartition("/")[2], *_size_and_time(path)) for path in paths]


def _size_and_time(path: str) -> tuple[int, int]:
    try:
        status = os.stat(_on_disk(path))
    except ValueError:  # a name with a zero byte
        return -1, 0
    except OSError as error:
        if error.errno in _NO_FILE or _is_forbidden(error):
            return -1, 0
        raise _cannot_describe(path, error) from error
    return status.st_size, _int64_or_unknown(status.st_mtime_ns)


def _list_wanted(folder: str, wanted: Mapping[str, str]) -> list[ListedFile]:
    """The files of a folder with these names, given by location; none if the folder may not be listed."""
    try:
        filesystem, path = resolve(folder)
        try:
            entries = _entries_remote(filesystem, path)
        except FileNotFoundError:
            if not isinstance(filesystem, fs.PyFileSystem):
                raise
            filesystem.handler.fs.ls(path)  # pyarrow reports a folder that fsspec cannot list as missing
            entries = _entries_remote(filesystem, path)
    except ImcapError:
        raise
    except Exception as error:  # libraries under fsspec raise exceptions of any type
        if _is_refused(error):  # a store may allow reading without listing
            return []
        raise _cannot_describe(folder, error) from error
    return [
        ListedFile(wanted[entry.base_name], entry.base_name, entry.size or 0, _int64_or_unknown(entry.mtime_ns or 0))
        for entry in entries
        if entry.base_name in wanted and entry.type != fs.FileType.Directory
    ]


def _is_refused(error: Exception) -> bool:
    """Whether a retry is useless, because the object is missing, or the request not allowed or not supported."""
    kinds = (FileNotFoundError, NotADirectoryError, NotImplementedError)
    return isinstance(error, kinds) or _is_forbidden(error) or getattr(error, "status", None) in _REFUSED_STATUS


def _cannot_describe(location: str, error: Exception) -> ImcapError:
    return ImcapError(hide_secrets(f"size and time of files in {location} cannot be read: {error}"))


def list_parquet(folder: str) -> list[str]:
    """The Parquet files directly in a folder, without hidden ones; none if the folder does not exist.

    Raises:
        OSError: the folder cannot be listed.
    """
    return _list_matching(folder, re.compile(r"[^._].*\.parquet"))


def list_work_tables(folder: str) -> list[str]:
    """The Parquet files that a run keeps for itself directly in a folder; none if the folder does not exist.

    Their names have no extension, so that readers that collect `**/*.parquet` pass them by. Earlier versions named them
    `.parquet`.

    Raises:
        OSError: the folder cannot be listed.
    """
    return _list_matching(folder, re.compile(r"[^._][^.]*(\.parquet)?"))


def _list_matching(folder: str, pattern: re.Pattern[str]) -> list[str]:
    if not is_folder(folder):
        return []
    filesystem, path = resolve(folder)
    is_local = isinstance(filesystem, fs.LocalFileSystem)
    entries = _list_local(path) if is_local else _list_remote(filesystem, path)
    names = sorted(name for name, is_folder, *_ in entries if not is_folder)
    return [join(absolute(folder), name) for name in names if pattern.fullmatch(name)]


def _walk(
    filesystem: fs.FileSystem,
    path: str,
    location: str,
    name: str,
    enters: Callable[[str], bool],
    ancestors: tuple[str, ...],
) -> Iterator[ListedFile]:
    is_local = isinstance(filesystem, fs.LocalFileSystem)
    real_path = os.path.realpath(path) if is_local else path
    if real_path in ancestors:
        return
    try:
        entries = sorted(_list_local(path) if is_local else _list_remote(filesystem, path))
    except OSError as error:
        raise InputError(f"cannot list {location}: {error}") from error
    for entry, is_folder, size, modified_ns in entries:
        if not is_folder:
            listed = _name_in_utf8(path, entry) if is_local else entry
            yield ListedFile(join(location, listed), name + listed, size, modified_ns)
    for entry, is_folder, *_ in entries:
        if is_folder and enters(entry):
            listed = _name_in_utf8(path, entry) if is_local else entry
            below = (join(path, entry), join(location, listed), f"{name}{listed}/")
            yield from _walk(filesystem, *below, enters, (*ancestors, real_path))


def _list_local(path: str) -> list[tuple[str, bool, int, int]]:
    """Name, whether it is a folder, size and time of each entry of a folder. Not through pyarrow, which omits broken
    links and stops at a name that is not UTF-8."""
    listed = []
    with os.scandir(path) as entries:
        for entry in entries:
            try:
                status = entry.stat()
            except OSError:  # a broken or circular link
                listed.append((entry.name, False, -1, 0))
                continue
            if stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode):  # reading a pipe would block
                modified_ns = _int64_or_unknown(status.st_mtime_ns)
                listed.append((entry.name, stat.S_ISDIR(status.st_mode), status.st_size, modified_ns))
    return listed


def _list_remote(filesystem: fs.FileSystem, path: str) -> list[tuple[str, bool, int, int]]:
    return [
        (entry.base_name, entry.type == fs.FileType.Directory, entry.size or 0, _int64_or_unknown(entry.mtime_ns or 0))
        for entry in _entries_remote(filesystem, path)
    ]


def _entries_remote(filesystem: fs.FileSystem, path: str) -> list[fs.FileInfo]:
    if isinstance(filesystem, fs.PyFileSystem):  # fsspec caches listings, and others write to the store
        filesystem.handler.fs.invalidate_cache()
    entries: list[fs.FileInfo] = filesystem.get_file_info(fs.FileSelector(path, recursive=False))
    return entries


def read_bytes(location: str, *, max_bytes: int | None = None) -> bytes:
    """The file's content.

    Args:
        max_bytes: maximum size; a larger file is an error. With a maximum, so is anything but a regular file, because
            pipes and devices may never end.

    Raises:
        FileNotFoundError: the file does not exist.
        PermissionError: the file may not be read.
        OSError: any other error, after retries if it may be temporary. Its text contains no secret.
    """
    if web.is_web(location):
        return web.read(location, max_bytes=max_bytes)
    filesystem, path = resolve(location)
    if "\0" in path:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), location)
    if isinstance(filesystem, fs.LocalFileSystem):
        # Not through pyarrow: this is twice as fast, and its errors have types.
        return Path(path).read_bytes() if max_bytes is None else _read_regular(path, location, max_bytes)
    with _translate_read_errors(location):
        return _retry_lost_answers(lambda: _read_once(filesystem, path, max_bytes))


def read_beginning(location: str, num_bytes: int) -> bytes:
    """The first bytes of a file, or all of a smaller one. A store is not asked for more.

    Raises:
        OSError: as `read_bytes`.
    """
    filesystem, path = resolve(location)
    if isinstance(filesystem, fs.LocalFileSystem):
        with open(path, "rb", buffering=0) as file:
            return file.read(num_bytes)
    with _translate_read_errors(location):
        if isinstance(filesystem, fs.PyFileSystem):  # a file of fsspec reads megabytes ahead
            return bytes(filesystem.handler.fs.cat_file(path, start=0, end=num_bytes))
        return _retry_lost_answers(lambda: _read_once(filesystem, path, num_bytes=num_bytes))


@contextmanager
def _translate_read_errors(location: str) -> Iterator[None]:
    """Raise OSError, without secrets, for an error of any type while a file of a store is read."""
    try:
        yield
    except (OSError, MemoryError) as error:
        if _is_forbidden(error):
            raise PermissionError(errno.EACCES, "not allowed to read", location) from error
        if hide_secrets(str(error)) == str(error):
            raise
        # A store may redirect its client to a signed URL, which is then in the text of the error.
        kind = type(error) if type(error).__module__ == "builtins" else OSError
        raise kind(hide_secrets(str(error))) from None
    except Exception as error:  # fsspec libraries raise exceptions of any type
        raise OSError(hide_secrets(f"{type(error).__name__}: {error}")) from None


def _read_regular(path: str, location: str, max_bytes: int) -> bytes:
    """The content of a local regular file. The reported size may be wrong: files under /proc report 0, and a file may
    grow while it is read."""
    _require_regular(os.stat(path), location)  # before it is opened: opening a device may have effects
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        size = _require_regular(os.fstat(file.fileno()), location)
        if size > max_bytes:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), location)
        content: bytes | None = file.read(size + 1)
        if content is None:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), location)
        if len(content) <= size:
            return content
        longer = bytearray(content)
        while len(longer) <= max_bytes and (content := file.read(min(_COPY_BYTES, max_bytes + 1 - len(longer)))):
            longer += content
    if len(longer) > max_bytes:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), location)
    return bytes(longer)


def _require_regular(status: os.stat_result, location: str) -> int:
    """The size of a regular file; OSError for anything else, with its kind."""
    if stat.S_ISREG(status.st_mode):
        return status.st_size
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), location)
    kind = next((name for is_kind, name in _SPECIAL_FILES if is_kind(status.st_mode)), "a special file")
    raise OSError(errno.EINVAL, f"expected a regular file, got {kind}", location)


_SPECIAL_FILES: Final = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def _retry_lost_answers(read: Callable[[], bytes]) -> bytes:
    for attempt in range(1, _s3_attempts()):
        try:
            return read()
        except OSError as error:
            if _LOST_ANSWER not in str(error):
                raise
            if attempt > 1:
                time.sleep(_FIRST_WAIT_SECONDS * 2 ** (attempt - 2))
    return read()


def _read_once(
    filesystem: fs.FileSystem, path: str, max_bytes: int | None = None, *, num_bytes: int | None = None
) -> bytes:
    with filesystem.open_input_file(path) as file:  # not a stream, which takes a request for every 256 KB
        if max_bytes is not None and file.size() > max_bytes:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), path)
        return bytes(file.read(num_bytes))


def is_reachable(location: str) -> bool:
    """Whether the store still answers. After a failed read, this distinguishes a broken file from a missing store.

    S3 is probed for up to 11 seconds, and one answer is enough, because a store that throttles is reachable.

    Args:
        location: any URI of the store; on a local disk the input itself, a folder or a file. An empty folder is not
            reachable, because this is how an unmounted disk or share looks. A web server counts as reachable, because
            a table may name many and the failure of one says nothing of the others.
    """
    location = absolute(location)
    if web.is_web(location):
        return True
    try:
        if not is_uri(location):
            path = resolve(location)[1]
            if os.path.isfile(path):
                return True
            with os.scandir(path) as entries:
                return any(True for _ in entries)
        filesystem, path = resolve(location)
        if isinstance(filesystem, _S3):
            return _has_bucket(filesystem, path.partition("/")[0])
        filesystem.get_file_info(path)
    except Exception as error:  # of any type: the store did not answer
        return _is_forbidden(error)
    return True


def _has_bucket(filesystem: _S3, bucket: str) -> bool:
    without_retries = filesystem.without_retries(timeout_seconds=_REACHABLE_TIMEOUT_SECONDS)
    deadline = time.monotonic() + _REACHABLE_SECONDS
    while True:
        try:
            return bool(without_retries.get_file_info(bucket).type != fs.FileType.NotFound)
        except OSError as error:
            if _is_forbidden(error) or time.monotonic() > deadline - _REACHABLE_TIMEOUT_SECONDS:
                raise
        time.sleep(_REACHABLE_PAUSE_SECONDS)


def _is_forbidden(error: BaseException) -> bool:
    """Whether the store denied access, for which pyarrow has no exception type."""
    return isinstance(error, PermissionError) or _FORBIDDEN.search(str(error)) is not None


def write_bytes(location: str, data: bytes | memoryview) -> None:
    """Write a file so that readers see the old content or the new one, never a part.

    Raises:
        InputError: the store did not store the data as written.
    """
    filesystem, path = resolve(location)
    if isinstance(filesystem, fs.LocalFileSystem):
        with _replacing_local(Path(path)) as file:
            file.write(data)
    else:  # object stores show an upload when it is complete
        with filesystem.open_output_stream(path) as stream:
            stream.write(data)
        if isinstance(filesystem, _S3):
            filesystem.check_first_upload(path, memoryview(data).nbytes)


@contextmanager
def replacing(location: str) -> Iterator[BinaryIO]:
    """A file to be written piece by piece, which replaces `location` when the block ends.

    After an exception, `location` is unchanged. Data for an object store are first written to a local temporary file,
    because a stream to a store cannot be aborted, only closed, and would leave a part there.
    """
    filesystem, path = resolve(location)
    if isinstance(filesystem, fs.LocalFileSystem):
        with _replacing_local(Path(path)) as file:
            yield file
        return
    with TemporaryFile() as temporary:
        yield temporary
        size = temporary.seek(0, os.SEEK_END)
        temporary.seek(0)
        try:
            with filesystem.open_output_stream(path) as stream:
                shutil.copyfileobj(temporary, stream, _COPY_BYTES)
            if isinstance(filesystem, _S3):
                filesystem.check_first_upload(path, size)
        except BaseException:  # Ctrl-C too
            with suppress(OSError):
                filesystem.delete_file(path)
            raise


@contextmanager
def _replacing_local(path: Path) -> Iterator[BinaryIO]:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not the complete name, which may have the maximum length.
    temporary = path.with_name(f".{path.name[:_TEMPORARY_LETTERS]}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # otherwise a power cut may leave an empty file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def is_temporary(name: str) -> bool:
    """Whether `write_bytes` gives such names to its temporary files."""
    return _TEMPORARY.fullmatch(name) is not None


def remove_temporary(folder: str) -> None:
    """Remove the temporary files that killed processes have left in this folder."""
    filesystem, path = resolve(folder)
    if isinstance(filesystem, fs.LocalFileSystem) and os.path.isdir(path):
        for name, *_ in _list_local(path):
            if is_temporary(name):
                Path(path, name).unlink(missing_ok=True)


def move(source: str, target: str) -> None:
    """Move a file within one file system; an existing target is replaced."""
    filesystem, path = resolve(source)
    if isinstance(filesystem, fs.LocalFileSystem):
        os.replace(path, resolve(target)[1])
    else:
        filesystem.move(path, resolve(target)[1])


def remove(location: str) -> None:
    """Remove a file, or a folder with its contents, if it exists."""
    filesystem, path = resolve(location)
    kind = filesystem.get_file_info(path).type
    if kind == fs.FileType.File:
        filesystem.delete_file(path)
    elif kind == fs.FileType.Directory:
        filesystem.delete_dir(path)
