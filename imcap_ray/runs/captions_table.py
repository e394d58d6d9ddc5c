"""A captions folder -> its table, its run.json, and where its images are."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import pyarrow as pa
import pyarrow.dataset as pads

from imcap_ray import storage
from imcap_ray.data.input_listing import packed_kind
from imcap_ray.data.parquet_files import read_table
from imcap_ray.data.parquet_images import refuse_pickles
from imcap_ray.data.schemas import CAPTIONS_SCHEMA, LATER_COLUMNS
from imcap_ray.errors import InputError, translate_errors

COMPLETE: Final = "complete"

REPLACING: Final = "replacing"
"""States of a run in run.json: all rows are final; the new rows of `--overwrite` are replacing the old ones."""

NEXT_FOLDER: Final = "next"
"""Name, below `_imcap`, of the folder of the new rows of `--overwrite` until they replace the old ones."""

REMOVED_FILE: Final = "removed"
"""Name, below `_imcap`, of the file with the ids of images that the run's input no longer has."""


def is_part(path: str) -> bool:
    """Whether the file has the name of a part that a run wrote, as Ray names them."""
    return re.fullmatch(r"[0-9a-f]{32}_[0-9]{6,}(\.parquet)?", path.rpartition("/")[2]) is not None


def open_captions(location: str) -> pads.Dataset:
    """The captions of a folder or a Parquet file, to be read in batches; columns that an earlier version
    did not write are null.

    If a run has written into the folder, other Parquet files there are left out.

    Raises:
        InputError: it does not exist, is no captions table, or may hold rows of two runs.
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
        columns = ", ".join(captions.schema.names) or "no Parquet file"
        raise InputError(f"{location} is no captions table: expected the columns image_id and caption, got {columns}")
    names = captions.schema.names
    if "confidence" in names and len(set(names)) == len(names):
        missing_fields = [CAPTIONS_SCHEMA.field(name) for name in LATER_COLUMNS if name not in names]
        captions = captions.replace_schema(pa.schema([*captions.schema, *missing_fields], captions.schema.metadata))
    return captions


def refuse_replacement(captions: str) -> None:
    """Raise InputError if a run is replacing the rows of this folder by new ones, or was when it was killed.

    Earlier versions did not write the state `replacing`; a complete run in `next` shows that they were replacing.
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
    """The content of `_imcap/run.json` of a captions folder, or of a captions file's folder; None if there is none.

    Raises:
        InputError: it is corrupt.
    """
    return read_run_file(storage.join(folder_of(captions), "_imcap", "run.json"))


def read_removed_ids(captions: str) -> pa.ChunkedArray:
    """The ids of images with rows that the input no longer has, as the last run has recorded them."""
    location = storage.join(folder_of(captions), "_imcap", REMOVED_FILE)
    if not storage.exists(location):
        return pa.chunked_array([], pa.string())
    return read_table(location, ["image_id"])["image_id"]


def read_run_file(location: str) -> dict[str, Any] | None:
    """The content of this run.json; None if it does not exist.

    Raises:
        InputError: it is corrupt.
    """
    with translate_errors(ValueError, to=InputError, message=f"{location} is damaged"):
        return parse_run_file(location)


def parse_run_file(location: str) -> dict[str, Any] | None:
    """As `read_run_file`, for callers that report a corrupt file in their own words.

    Raises:
        ValueError: it is corrupt.
    """
    if not storage.exists(location):
        return None
    run = json.loads(storage.read_bytes(location))
    return run if isinstance(run, dict) else {}


def image_locator(
    captions: str, *, folders: Sequence[str] = (), allow_outside_paths: bool = False
) -> Callable[[Mapping[str, Any], str], str]:
    """A function that locates the image file of a row of a captions table, or of its run's manifest.

    The file must be in the input that `run.json` names, below the captions, or in one of `folders`; a row that names
    another file is an InputError, unless `allow_outside_paths`. This guards against a foreign table among those of a
    run, but not against a forged run.
    """
    base = folder_of(captions)
    locations = [str((read_run(captions) or {}).get("input", "")), base, *folders]
    inside = [storage.parent(path) if packed_kind(path) else path for path in locations if path]

    def locate(row: Mapping[str, Any], path: str) -> str:
        source = f"{captions}, image {row['image_id']!r}"
        return storage.locate(path, base=base, folders=inside, source=source, allow_outside=allow_outside_paths)

    return locate
