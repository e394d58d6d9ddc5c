"""Finished files of a folder -> a seal, by which damage to any of them is noticed later. Knows nothing of Ray."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from imcap_ray import storage
from imcap_ray.errors import ImcapError

SEAL_FILE: Final = "seal.json"

_CHUNK_BYTES: Final = 16 * 2**20


def seal(folder: str, names: Iterable[str], *, seal_name: str = SEAL_FILE) -> None:
    """Write the hashes of these files of the folder to another file in it."""
    hashes = _hash_files(folder, list(names))
    storage.write_bytes(storage.join(folder, seal_name), json.dumps(hashes, indent=2).encode())


def sealed_names(folder: str, *, seal_name: str = SEAL_FILE) -> list[str]:
    """Names of the files that the seal of a folder names; none where it is missing or unreadable.

    Raises:
        ImcapError: a seal is there and cannot be read.
    """
    try:
        sealed = json.loads(_read(storage.join(folder, seal_name)))
    except (FileNotFoundError, ValueError):
        return []
    return [str(name) for name in sealed] if isinstance(sealed, dict) else []


def find_damage(folder: str, *, seal_name: str = SEAL_FILE) -> dict[str, str]:
    """What is wrong with the files of a sealed folder, by name; empty where each is as it was sealed.

    A seal that is missing or unreadable is the only damage told of, for then nothing is known of the others.

    Raises:
        ImcapError: a file is there and cannot be read, so that nothing can be said of it.
    """
    try:
        sealed = json.loads(_read(storage.join(folder, seal_name)))
        hashes = {str(name): str(value) for name, value in sealed.items()}
    except FileNotFoundError:
        return {seal_name: "is missing"}
    except (ValueError, AttributeError):
        return {seal_name: "is not the JSON that was written"}
    if not hashes:
        return {seal_name: "names no file"}
    found = _hash_files(folder, list(hashes))
    return {
        name: "is missing" if found[name] is None else "is not what was written"
        for name, expected in hashes.items()
        if found[name] != expected
    }


def _hash_files(folder: str, names: list[str]) -> dict[str, str | None]:
    """SHA-256 of each file; None where it is missing."""
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
