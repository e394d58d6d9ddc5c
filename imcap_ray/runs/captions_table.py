"""A captions folder -> its table, its run.json, and where its images are."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import pyarrow as pa
import pyarrow.dataset as pads

from imcap_ray import storage
from imcap_ray.data.parquet_images import refuse_pickles
from imcap_ray.errors import InputError

COMPLETE: Final = "complete"

REPLACING: Final = "replacing"
"""States of a run in run.json: all rows are there; the new rows of `--overwrite` are replacing the old ones."""

NEXT_FOLDER: Final = "next"
"""Below the run's own folder: what `--overwrite` makes, until it takes the place of the old."""


def is_part(path: str) -> bool:
    """Whether a run wrote this file into its output, by Ray's names; others there are somebody else's."""
    return re.fullmatch(r"[0-9a-f]{32}_[0-9]{6,}\.parquet", path.rpartition("/")[2]) is not None


def open_captions(location: str) -> pads.Dataset:
    """The captions of a folder or a Parquet file, to be read a piece at a time.

    Where a run has written into the folder, what else lies there is left out.

    Raises:
        InputError: nothing there, no captions table, or rows of two runs because one is replacing those of the other.
    """
    location = storage.absolute(location)
    if not storage.exists(location):
        raise InputError(f"no such captions: {location}")
    filesystem = storage.resolve(location)[0]
    try:
        files = [location] if storage.is_file(location) else storage.list_parquet(location)
        files = [path for path in files if is_part(path)] or files
        captions = pads.dataset([storage.resolve(path)[1] for path in files], filesystem=filesystem, format="parquet")
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{location} is not readable Parquet: {error}") from error
    refuse_replacement(location)  # after the files were listed: a replacement that began since removes some of them
    refuse_pickles(captions.schema, location)
    missing = {"image_id", "caption"} - set(captions.schema.names)
    if missing:
        found = ", ".join(captions.schema.names) or "no Parquet file"
        raise InputError(f"{location} is no captions table: expected the columns image_id and caption, got {found}")
    return captions


def refuse_replacement(captions: str) -> None:
    """Raise InputError if a run is replacing the rows of this folder by new ones, or was when it was killed.

    Earlier versions did not write the state `replacing`; what they left is known by a complete run in `next`.
    """
    run = read_run(captions)
    if run is None:
        return
    new = read_run(storage.join(folder_of(captions), "_imcap", NEXT_FOLDER)) or {}
    if run.get("state") == REPLACING or new.get("state") == COMPLETE:
        raise InputError(
            f"{folder_of(captions)} may hold rows of two runs, because `imcap caption --overwrite` is replacing the "
            "old rows by the new ones: wait until it has finished; if it was killed, the same command finishes it"
        )


def folder_of(captions: str) -> str:
    """The folder of a captions table that is a folder or a Parquet file."""
    location = storage.absolute(captions)
    return storage.parent(location) if storage.is_file(location) else location


def read_run(captions: str) -> dict[str, Any] | None:
    """What `_imcap/run.json` of a captions folder, or of the folder of a captions file, says; None where there is none.

    Raises:
        InputError: it is damaged.
    """
    location = storage.join(folder_of(captions), "_imcap", "run.json")
    if not storage.exists(location):
        return None
    try:
        run = json.loads(storage.read_bytes(location))
    except ValueError as error:
        raise InputError(f"{location} is damaged: {error}") from error
    return run if isinstance(run, dict) else {}


def image_placer(
    captions: str, *, folders: Sequence[str] = (), allow_outside_paths: bool = False
) -> Callable[[Mapping[str, Any], str], str]:
    """A function that says where the file is that the row of a captions table, or of its run's manifest, names.

    It must be in the input that `run.json` names, below the captions or in one of `folders`; a row that names another
    file is an InputError, unless `allow_outside_paths`. This guards against a table that is not ours among those of a
    run, not against a run that was made up.
    """
    base = folder_of(captions)
    places = [str((read_run(captions) or {}).get("input", "")), base, *folders]
    inside = [storage.parent(place) if place.endswith((".parquet", ".tar")) else place for place in places if place]

    def place(row: Mapping[str, Any], path: str) -> str:
        source = f"{captions}, image {row['image_id']!r}"
        return storage.locate(path, base=base, folders=inside, source=source, allow_outside=allow_outside_paths)

    return place
