"""Finished files of a folder -> their SHA-256 hashes in a file, by which corrupt files are found later."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from imcap_ray import storage
from imcap_ray.errors import ImcapError

CHECKSUM_FILE: Final = "seal.json"

_CHUNK_BYTES: Final = 16 * 2**20


def write_checksums(folder: str, names: Iterable[str], *, file_name: str = CHECKSUM_FILE) -> None:
    """Write the hashes of these files of the folder to another file in it."""
    hashes = _hash_files(folder, list(names))
    storage.write_bytes(storage.join(folder, file_name), json.dumps(hashes, indent=2).encode())


def checksummed_files(folder: str, *, file_name: str = CHECKSUM_FILE) -> list[str]:
    """Names of the files whose hashes are recorded; none if the record is missing or is not JSON.

    Raises:
        ImcapError: the record exists and cannot be read.
    """
    try:
        hashes = json.loads(_read(storage.join(folder, file_name)))
    except (FileNotFoundError, ValueError):
        return []
    return [str(name) for name in hashes] if isinstance(hashes, dict) else []


def find_corrupt_files(folder: str, *, file_name: str = CHECKSUM_FILE) -> dict[str, str]:
    """What is wrong with the files whose hashes are recorded, by name; empty if nothing is.

    If the record itself is missing or corrupt, it is the only file reported, because nothing is known of the others.

    Raises:
        ImcapError: a file exists and cannot be read, so that its hash is unknown.
    """
    try:
        hashes = {str(name): str(value) for name, value in json.loads(_read(storage.join(folder, file_name))).items()}
    except FileNotFoundError:
        return {file_name: "is missing"}
    except (ValueError, AttributeError):
        return {file_name: "is not the JSON that was written"}
    if not hashes:
        return {file_name: "names no file"}
    actual = _hash_files(folder, list(hashes))
    return {
        name: "is missing" if actual[name] is None else "is not what was written"
        for name, expected in hashes.items()
        if actual[name] != expected
    }


def _hash_files(folder: str, names: list[str]) -> dict[str, str | None]:
    """SHA-256 of each file; None if it is missing."""
    with ThreadPoolExecutor(max_workers=8) as pool:
        return dict(zip(names, pool.map(lambda name: _hash_file(storage.join(folder, name)), names), strict=True))


def _hash_file(location: str) -> str | None:
    filesystem, path = storage.resolve(location)
    digest = hashlib.sha256()
    try:
        with filesystem.open_input_stream(path) as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ImcapError(f"cannot read {location}: {error}") from error
    return digest.hexdigest()


def _read(location: str) -> bytes:
    try:
        return storage.read_bytes(location)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ImcapError(f"cannot read {location}: {error}") from error
