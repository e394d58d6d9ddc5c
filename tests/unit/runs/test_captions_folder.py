from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from imcap_ray import storage
from imcap_ray.cli.main import main
from imcap_ray.data.manifest import build_manifest
from imcap_ray.data.parquet_files import read_table, write_table
from imcap_ray.data.schemas import CAPTIONS_SCHEMA, MANIFEST_SCHEMA
from imcap_ray.errors import ImcapError, InputError, OutputError
from imcap_ray.runs.captions_folder import CaptionsFolder, contains_any
from imcap_ray.runs.captions_table import open_captions
from imcap_ray.runs.lease import Lease
from imcap_ray.runs.status import CaptioningStatus, read_status

IDENTITY = {
    **{"input": "/in", "precision": "float32", "model_fingerprint": "a" * 64},
    **{"search": {"beam_size": 4}, "existing_captions": "none", "schema_version": "1"},
}

RUN, OTHER = "0123456789abcdef" * 2, "fedcba9876543210" * 2
"""Part name prefixes, in the format of Ray."""

HASHES = {name: sha256(name.encode()).hexdigest() for name in "xyz"}


def row(image_id: str, status: str = "ok", *, content: str = "", duplicate_of: str = "") -> dict[str, Any]:
    """Return a row of an image; `content` names its bytes."""
    has_caption = status == "ok" or bool(duplicate_of)
    return {
        "image_id": image_id,
        "image_path": f"/in/{image_id}",
        "caption": f"says {content or image_id}" if has_caption else "",
        "captions": [f"says {content or image_id}"] if has_caption else [],
        "confidence": 0.5 if has_caption else float("nan"),
        "logprob": -1.0 if has_caption else float("nan"),
        "num_tokens": 2 if has_caption else 0,
        "status": status,
        "error_code": "internal" if status == "failed" else "",
        "error_message": "it died" if status == "failed" else "",
        "width": 4,
        "height": 3,
        "format": "jpeg",
        "sha256": HASHES.get(content, ""),
        "duplicate_of": duplicate_of,
    }


def write_folder(location: Path, *parts: list[dict[str, Any]], manifest: Iterable[str] | None = None) -> CaptionsFolder:
    """Write a captions folder of these parts; its manifest has their images in that order or in the given one."""
    folder = CaptionsFolder(str(location))
    names = list(manifest) if manifest is not None else [one["image_id"] for part in parts for one in part]
    entries = [
        {"manifest_id": number, "image_id": name, "image_path": f"/in/{name}", "table_path": ""}
        | {"row_group": -1, "row": -1, "size": 1, "modified_ns": 1}
        for number, name in enumerate(names)
    ]
    write_table(
        storage.join(folder.manifest, "part-000000000000"), pa.Table.from_pylist(entries, schema=MANIFEST_SCHEMA)
    )
    for number, part in enumerate(parts):
        write_table(str(location / f"{RUN}_{number:06}.parquet"), pa.Table.from_pylist(part, schema=CAPTIONS_SCHEMA))
        ids = pa.table({"manifest_id": pa.array([names.index(one["image_id"]) for one in part], pa.int64())})
        write_table(storage.join(folder.done, f"{RUN}_{number:06}"), ids)
    folder.write_run(IDENTITY | {"state": "running"})
    return folder


def rows(folder: CaptionsFolder) -> dict[str, tuple[str, str, str]]:
    """Return status, caption and duplicate_of of each image, and check that each has one row."""
    all_rows = [one for part in folder.parts() for one in read_table(part).to_pylist()]
    assert len({one["image_id"] for one in all_rows}) == len(all_rows)
    return {one["image_id"]: (one["status"], one["caption"], one["duplicate_of"]) for one in all_rows}


def done_names(folder: CaptionsFolder) -> list[str]:
    names = read_table(storage.list_work_tables(folder.manifest)[0])["image_id"].to_pylist()
    return [names[number] for number in folder.done_ids()]


# ---- duplicates


def test_a_waiting_duplicate_gets_the_caption_of_its_original(tmp_path: Path) -> None:
    folder = write_folder(
        tmp_path, [row("a", content="x"), row("b", content="y")], [row("c", "duplicate", content="x")]
    )

    assert folder.resolve_duplicates() == 0

    assert rows(folder) == {"a": ("ok", "says x", ""), "b": ("ok", "says y", ""), "c": ("duplicate", "says x", "a")}
    assert read_table(folder.parts()[1]).schema == CAPTIONS_SCHEMA
    twin = read_table(folder.parts()[1]).to_pylist()[0]
    assert (twin["captions"], twin["confidence"], twin["num_tokens"]) == (["says x"], 0.5, 2)
    folder.verify_row_counts()


@pytest.mark.parametrize(
    "parts",
    [
        [[row("b", content="x")], [row("a", "duplicate", content="x"), row("c", "duplicate", content="x")]],
        [[row("c", content="x"), row("a", "duplicate", content="x")], [row("b", "duplicate", content="x")]],
        [[row("a", content="x"), row("b", content="x")], [row("c", content="x")]],
        [[row("a", "duplicate", content="x", duplicate_of="b"), row("b", content="x"), row("c", content="x")]],
        [
            [
                row("c", "duplicate", content="x", duplicate_of="gone"),
                row("a", "duplicate", content="x"),
                row("b", content="x"),
            ]
        ],
    ],
)
def test_the_first_image_of_the_manifest_is_the_original_in_any_captioning_order(
    tmp_path: Path, parts: list[list[dict[str, Any]]]
) -> None:
    folder = write_folder(tmp_path, *parts, manifest="abc")

    folder.resolve_duplicates()

    wanted = {"a": ("ok", "says x", ""), "b": ("duplicate", "says x", "a"), "c": ("duplicate", "says x", "a")}
    assert rows(folder) == wanted
    before = [Path(part).stat().st_mtime_ns for part in folder.parts()]
    assert folder.resolve_duplicates() == 0
    assert [Path(part).stat().st_mtime_ns for part in folder.parts()] == before


def test_a_duplicate_without_an_original_is_deleted_to_be_captioned(tmp_path: Path) -> None:
    folder = write_folder(
        tmp_path,
        [row("a", content="x"), row("b", "duplicate", content="y"), row("c", "duplicate", content="y")],
        [row("d", "duplicate", content="z")],
    )

    assert folder.resolve_duplicates() == 3

    assert set(rows(folder)) == {"a"}
    assert done_names(folder) == ["a"]


def test_a_duplicate_of_an_image_that_killed_its_process_is_not_retried(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, [row("a", "failed", content="x"), row("b", "duplicate", content="x")])

    assert folder.resolve_duplicates() == 0

    assert rows(folder) == {"a": ("failed", "", ""), "b": ("failed", "", "")}
    assert [one["error_code"] for one in read_table(folder.parts()[0]).to_pylist()] == ["internal", "internal"]


def test_failed_images_without_a_hash_are_not_duplicates(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, [row("a", "failed"), row("b", "failed"), row("c", content="x")])
    before = rows(folder)

    assert folder.resolve_duplicates() == 0

    assert rows(folder) == before


# ---- deleted rows


def test_only_failed_rows_are_deleted(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, [row("a"), row("b", "failed")], [row("c", "failed")], [row("d")])

    assert folder.delete_failed_rows() == 2

    assert set(rows(folder)) == {"a", "d"}
    assert done_names(folder) == ["a", "d"]
    assert not storage.exists(storage.join(folder.work, "forget"))


def test_a_deletion_interrupted_by_a_crash_is_completed(tmp_path: Path) -> None:
    for crash_after in range(3):
        folder = write_folder(tmp_path / str(crash_after), [row("a"), row("b")], [row("c"), row("d")])
        journal = pa.table({"manifest_id": pa.array([1, 2], pa.int64()), "image_id": ["b", "c"]})
        write_table(storage.join(folder.work, "forget"), journal)
        if crash_after >= 1:  # one part is rewritten
            write_table(folder.parts()[0], pa.Table.from_pylist([row("a")], schema=CAPTIONS_SCHEMA))
        if crash_after >= 2:  # both, and one file of done
            write_table(folder.parts()[1], pa.Table.from_pylist([row("d")], schema=CAPTIONS_SCHEMA))
            write_table(storage.list_work_tables(folder.done)[0], pa.table({"manifest_id": pa.array([0], pa.int64())}))

        folder.recover()

        assert set(rows(folder)) == {"a", "d"}
        assert done_names(folder) == ["a", "d"]


def test_a_part_that_is_not_recorded_as_done_is_ignored(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, [row("a")], [row("b")], [row("c")])
    done = storage.list_work_tables(folder.done)
    storage.move(done[1], f"{done[1]}.pending")
    Path(done[2]).unlink()

    folder.recover()

    assert set(rows(folder)) == {"a"}
    assert done_names(folder) == ["a"]
    assert len(list(Path(folder.done).iterdir())) == 1


def test_a_done_record_without_its_part_is_ignored(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, [row("a")], [row("b")])
    Path(folder.parts()[1]).unlink()

    folder.recover()

    assert done_names(folder) == ["a"]


@pytest.mark.parametrize("kind", ["part", "note"])
def test_files_emptied_by_a_power_cut_are_discarded(tmp_path: Path, kind: str) -> None:
    folder = write_folder(tmp_path, [row("a")], [row("b")])
    Path((folder.parts() if kind == "part" else storage.list_work_tables(folder.done))[1]).write_bytes(b"")

    folder.recover()

    assert set(rows(folder)) == {"a"}
    assert done_names(folder) == ["a"]


def test_foreign_files_are_kept_and_those_of_killed_writers_are_removed(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, [row("a")])
    for name in ("merged.parquet", "notes.txt", ".hidden"):
        (tmp_path / name).write_bytes(b"mine")
    (tmp_path / f".{RUN}_000007.parquet.0123abcd").write_bytes(b"half")
    Path(folder.done, f".{RUN}_000000.0123abcd").write_bytes(b"half")

    folder.recover()

    assert {path.name for path in tmp_path.iterdir()} == {
        f"{RUN}_000000.parquet",
        "merged.parquet",
        "notes.txt",
        ".hidden",
        "_imcap",
    }
    assert [path.name for path in Path(folder.done).iterdir()] == [f"{RUN}_000000"]


def copy_part(folder: CaptionsFolder, name: str, *, to: str, rows: list[dict[str, Any]] | None = None) -> None:
    """Copy a part and its done record, or older ones, like a synchronisation tool."""
    record = storage.join(folder.done, to.removesuffix(".parquet"))
    shutil.copy(storage.join(folder.location, name), storage.join(folder.location, to))
    shutil.copy(storage.join(folder.done, name.removesuffix(".parquet")), record)
    if rows is not None:
        names = read_table(storage.list_work_tables(folder.manifest)[0])["image_id"].to_pylist()
        write_table(storage.join(folder.location, to), pa.Table.from_pylist(rows, schema=CAPTIONS_SCHEMA))
        ids = pa.table({"manifest_id": pa.array([names.index(one["image_id"]) for one in rows], pa.int64())})
        write_table(record, ids)


@pytest.mark.parametrize("to", [f"{RUN}_000007.parquet", f"{OTHER}_000001.parquet"])
def test_a_copy_of_a_part_and_its_done_record_is_removed(tmp_path: Path, to: str) -> None:
    folder = write_folder(tmp_path, [row("a", content="x"), row("b", content="y")], [row("c", content="z")])
    before = rows(folder)
    copy_part(folder, f"{RUN}_000000.parquet", to=to)
    copy_part(folder, f"{RUN}_000001.parquet", to=f"{OTHER}_000002.parquet")

    assert folder.recover() == 2

    assert rows(folder) == before
    assert folder.done_ids().tolist() == [0, 1, 2]
    assert {path.name for path in tmp_path.glob("*.parquet")} == {f"{RUN}_000000.parquet", f"{RUN}_000001.parquet"}
    folder.verify_row_counts()
    assert folder.recover() == 0


def test_a_copy_without_a_part_name_is_kept_and_does_not_count(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, [row("a", content="x"), row("b", content="y")])
    before = rows(folder)
    copy_part(folder, f"{RUN}_000000.parquet", to=f"{RUN}_000000 (1).parquet")

    folder.recover()

    assert rows(folder) == before
    assert folder.done_ids().tolist() == [0, 1]
    assert folder.count_rows()[0] == {"ok": 2}
    assert (tmp_path / f"{RUN}_000000 (1).parquet").exists()


def test_duplicates_in_an_older_copy_are_resolved(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, [row("a", content="x")], [row("b", "duplicate", content="x", duplicate_of="a")])
    older = f"{'0' * 32}_000000.parquet"  # its name comes first
    copy_part(folder, f"{RUN}_000001.parquet", to=older, rows=[row("b", "duplicate", content="x")])

    assert folder.recover() == 1
    folder.resolve_duplicates()

    assert rows(folder) == {"a": ("ok", "says x", ""), "b": ("duplicate", "says x", "a")}


@pytest.mark.parametrize(
    ("older", "left"),
    [
        ([row("a", content="x"), row("b", content="z"), row("c")], {"e", "f"}),  # of all of a part, and more
        ([row("c", "failed")], {"a", "b", "e", "f"}),  # was captioned since
        ([row("b", content="x"), row("c", content="x")], {"e", "f"}),  # some of each
    ],
)
def test_images_of_overlapping_parts_are_captioned_again(
    tmp_path: Path, older: list[dict[str, Any]], left: set[str]
) -> None:
    parts = [row("a", content="x"), row("b", content="y")], [row("c", content="z"), row("d")], [row("e"), row("f")]
    folder = write_folder(tmp_path, *parts)
    copy_part(folder, f"{RUN}_000000.parquet", to=f"{OTHER}_000000.parquet", rows=older)

    assert folder.recover() in (2, 3)

    assert set(rows(folder)) == left
    assert sorted(rows(folder)) == sorted(done_names(folder))
    assert folder.recover() == 0


def test_a_kill_while_copies_are_removed_loses_nothing(tmp_path: Path) -> None:
    number, is_over = 0, False
    while not is_over:
        number += 1
        folder = write_folder(tmp_path / str(number), [row("a", content="x")], [row("b")])
        copy_part(folder, f"{RUN}_000000.parquet", to=f"{OTHER}_000000.parquet")
        with killed_at_step(number, when="before") as steps:
            folder.recover()
        is_over = len(steps) < number

        folder.recover()

        assert rows(folder) == {"a": ("ok", "says x", ""), "b": ("ok", "says b", "")}
        assert sorted(done_names(folder)) == ["a", "b"]
    assert number == 3


def test_a_kill_while_overlapping_parts_are_removed_leaves_none_of_them(tmp_path: Path) -> None:
    number, is_over = 0, False
    while not is_over:
        number += 1
        folder = write_folder(tmp_path / str(number), [row("a", content="x"), row("b", content="y")], [row("c")])
        older = [row("a", content="z"), row("c")]
        copy_part(folder, f"{RUN}_000000.parquet", to=f"{OTHER}_000000.parquet", rows=older)
        with killed_at_step(number, when="before") as steps:
            folder.recover()
        is_over = len(steps) < number

        folder.recover()

        assert rows(folder) == {}
        assert not len(folder.done_ids())
    assert number > 6


def test_a_copy_of_a_manifest_file_is_removed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in "ab":
        (tmp_path / "in" / f"{name}.jpg").write_bytes(b"1")
    folder = write_folder(tmp_path / "out", [row("a.jpg"), row("b.jpg")])
    storage.remove(folder.manifest)
    build_manifest(str(tmp_path / "in"), folder.manifest)
    (original,) = storage.list_work_tables(folder.manifest)
    shutil.copy(original, f"{original} (conflicted copy)")

    folder.recover()

    assert storage.list_work_tables(folder.manifest) == [original]
    folder.verify_row_counts()


def test_a_kill_while_the_files_of_an_earlier_version_are_renamed_loses_nothing(tmp_path: Path) -> None:
    number, is_over = 0, False
    while not is_over:
        number += 1
        folder = write_folder(tmp_path / str(number), [row("a")], [row("b")], [row("c")])
        names = [storage.list_work_tables(folder.manifest)[0], *storage.list_work_tables(folder.done)]
        for path in names:
            storage.move(path, f"{path}.parquet")
        pending = storage.join(folder.done, f"{OTHER}_000000.pending.parquet")
        storage.write_bytes(pending, b"")
        write_table(storage.join(folder.work, "forget.parquet"), pa.table({"manifest_id": [1], "image_id": ["b"]}))
        storage.write_bytes(storage.join(folder.work, "heartbeat.json"), b"{}")
        with killed_at_step(number, when="before") as steps:
            folder.recover()
        is_over = len(steps) < number

        folder.recover()

        assert rows(folder) == {"a": ("ok", "says a", ""), "c": ("ok", "says c", "")}
        assert sorted(done_names(folder)) == ["a", "c"]
        assert {path.name for path in Path(folder.work).rglob("*") if "." in path.name} == {"run.json"}
    assert number > 8


def test_a_part_that_is_not_recorded_does_not_resolve_duplicates(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, [row("a", content="x"), row("b", "duplicate", content="x")])
    stray = tmp_path / f"{OTHER}_000000.parquet"
    write_table(str(stray), pa.Table.from_pylist([row("b", content="x")], schema=CAPTIONS_SCHEMA))

    assert folder.resolve_duplicates() == 0
    stray.unlink()

    assert rows(folder) == {"a": ("ok", "says x", ""), "b": ("duplicate", "says x", "a")}


def test_a_run_killed_right_after_its_start_does_not_block_the_next(tmp_path: Path) -> None:
    folder = CaptionsFolder(str(tmp_path))
    Lease.acquire(folder.work)
    Path(folder.work, ".run.json.0123abcd").write_bytes(b"{")

    folder.require_identity(IDENTITY)


def test_a_killed_output_check_does_not_block_the_next_run(tmp_path: Path) -> None:
    (tmp_path / ".imcap.0123abcd").touch()

    CaptionsFolder(str(tmp_path)).require_identity(IDENTITY)


def test_the_first_of_two_concurrent_replacements_stops_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{number}.jpg" for number in range(4)]
    write_folder(tmp_path, [row(name) for name in names])
    new = write_folder(Path(CaptionsFolder(str(tmp_path)).next().location), *([row(name)] for name in names))
    for path in [*new.parts(), *storage.list_work_tables(new.done)]:
        Path(path).rename(path.replace(RUN, OTHER))
    new.write_run(IDENTITY | {"model_fingerprint": "b" * 64, "state": "complete"})
    steps = {name: getattr(storage, name) for name in ("move", "remove", "write_bytes")}
    num_steps, stall_at = 0, 0

    def stalls(name: str, *arguments: Any) -> None:
        """Let a second run do the complete replacement at this step."""
        nonlocal num_steps
        num_steps += 1
        if num_steps == stall_at:
            for original, step in steps.items():
                monkeypatch.setattr(storage, original, step)
            CaptionsFolder(str(tmp_path)).finish_replacement()
        steps[name](*arguments)

    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for stall_at in range(2, 20):
        for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
            path.unlink()
        for path, data in before.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        num_steps = 0
        for name in steps:
            monkeypatch.setattr(storage, name, partial(stalls, name))

        with suppress(ImcapError, FileNotFoundError):
            CaptionsFolder(str(tmp_path)).replace_by_next()

        folder = CaptionsFolder(str(tmp_path))
        folder.recover()
        assert rows(folder) == {name: ("ok", f"says {name}", "") for name in names}, stall_at
        assert (folder.read_run() or {})["model_fingerprint"] == "b" * 64
        folder.verify_row_counts()
        assert num_steps >= min(stall_at, 12)


def test_rows_of_changed_images_are_deleted_and_the_manifest_is_updated(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        (source / name).write_bytes(b"old")
    folder = write_folder(tmp_path / "out", [row("a.jpg"), row("b.jpg"), row("c.jpg")])
    storage.remove(folder.manifest)
    build_manifest(str(source), folder.manifest)
    (source / "b.jpg").write_bytes(b"newer")

    summary = build_manifest(str(source), folder.manifest)
    assert folder.delete_changed_rows(summary.changed) == 1

    assert set(rows(folder)) == {"a.jpg", "c.jpg"}
    assert folder.done_ids().tolist() == [0, 2]
    assert build_manifest(str(source), folder.manifest).changed.num_rows == 0
    sizes = read_table(storage.list_work_tables(folder.manifest)[0], ["image_id", "size"]).to_pydict()
    assert sizes == {"image_id": ["a.jpg", "b.jpg", "c.jpg"], "size": [3, 5, 3]}


# ---- row counts


def test_rows_are_counted_by_status_and_failures_by_code_and_other_files_are_ignored(tmp_path: Path) -> None:
    all_rows = [row("a", content="x"), row("b", "duplicate", content="x", duplicate_of="a"), row("c", "failed")]
    folder = write_folder(tmp_path, all_rows[:2], all_rows[2:])
    pq.write_table(pa.table({"other": [1]}), tmp_path / "0.parquet")
    pq.write_table(read_table(folder.parts()[0]), tmp_path / "merged.parquet")

    assert folder.count_rows() == ({"ok": 1, "duplicate": 1, "failed": 1}, {"internal": 1})


@pytest.mark.parametrize(
    ("parts", "manifest", "message"),
    [
        ([[row("a")]], "ab", "1 have no row"),
        ([[row("a")], [row("a"), row("b")]], "ab", "1 have several"),
        ([[row("a"), row("b")]], "ab", ""),
    ],
)
def test_inconsistent_row_counts_are_an_error(
    tmp_path: Path, parts: list[list[dict[str, Any]]], manifest: str, message: str
) -> None:
    folder = write_folder(tmp_path, *parts, manifest=manifest)

    if message:
        with pytest.raises(ImcapError, match=message):
            folder.verify_row_counts()
    else:
        folder.verify_row_counts()


def test_a_row_without_an_image_is_an_error(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, [row("a")], manifest="a")
    write_table(folder.parts()[0], pa.Table.from_pylist([row("a"), row("z")], schema=CAPTIONS_SCHEMA))

    with pytest.raises(ImcapError, match="1 rows have no image"):
        folder.verify_row_counts()


# ---- leases and identity


def test_only_the_latest_run_can_write(tmp_path: Path) -> None:
    folder = CaptionsFolder(str(tmp_path))

    first, second = Lease.acquire(folder.work), Lease.acquire(folder.work)

    assert not first.is_held()
    assert second.is_held()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_fingerprint", "b" * 64, r"another model \(aaaaaaaaaaaa\.\.\., now bbbbbbbbbbbb\.\.\.\)"),
        ("precision", "int8", r"another precision \(float32, now int8\)"),
        ("search", {"beam_size": 9}, "another search settings"),
        ("input", "/elsewhere", r"another input \(/in, now /elsewhere\)"),
    ],
)
def test_the_error_for_a_folder_of_another_run_names_the_difference(
    tmp_path: Path, key: str, value: object, message: str
) -> None:
    folder = write_folder(tmp_path, [row("a")])
    folder.require_identity(IDENTITY)

    with pytest.raises(OutputError, match=message):
        folder.require_identity(IDENTITY | {key: value})


def test_a_folder_of_an_earlier_version_was_made_in_float32(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, [row("a")])
    folder.write_run({name: value for name, value in IDENTITY.items() if name != "precision"})

    folder.require_identity(IDENTITY)

    with pytest.raises(OutputError, match=r"another precision \(float32, now int8\)"):
        folder.require_identity(IDENTITY | {"precision": "int8"})


def test_a_corrupt_run_file_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, [row("a")])
    (tmp_path / "_imcap" / "run.json").write_text('{"input": "/i')

    with pytest.raises(OutputError, match="run.json is damaged"):
        folder.require_identity(IDENTITY)


# ---- replacement


def replacing(tmp_path: Path) -> CaptionsFolder:
    """A folder with a finished new run that has not replaced the old one."""
    folder = write_folder(tmp_path, [row("a"), row("b")], [row("c")])
    new = write_folder(Path(folder.next().location), [row("a", content="x")], [row("d", content="y")])
    for path in [*new.parts(), *storage.list_work_tables(new.done)]:
        storage.move(path, path.replace(RUN, OTHER))
    new.write_run(IDENTITY | {"state": "complete", "model": "new"})
    return folder


@pytest.mark.parametrize(
    "crash", ["none", "one part moved", "old parts removed", "done copied", "recorded as complete"]
)
def test_a_replacement_completes_after_an_interruption_at_any_step(tmp_path: Path, crash: str) -> None:
    folder = replacing(tmp_path)
    new = folder.next()
    if crash != "none":
        storage.move(new.parts()[0], str(tmp_path / f"{OTHER}_000000.parquet"))
    if crash in ("old parts removed", "done copied", "recorded as complete"):
        storage.move(new.parts()[0], str(tmp_path / f"{OTHER}_000001.parquet"))
        for path in tmp_path.glob(f"{RUN}_*.parquet"):
            path.unlink()
    if crash in ("done copied", "recorded as complete"):
        for kind in ("done", "manifest"):
            storage.remove(storage.join(folder.work, kind))
            for path in storage.list_work_tables(storage.join(new.work, kind)):
                target = storage.join(folder.work, kind, Path(path).name)
                storage.write_bytes(target, storage.read_bytes(path))
    if crash == "recorded as complete":
        folder.write_run(new.read_run() or {})
        Path(new.work, "run.json").unlink()

    folder.recover()

    assert rows(folder) == {"a": ("ok", "says x", ""), "d": ("ok", "says y", "")}
    assert (folder.read_run() or {})["model"] == "new"
    folder.verify_row_counts()
    assert np.array_equal(folder.done_ids(), [0, 1])


class Killed(BaseException):
    """The end of a process."""


@contextmanager
def killed_at_step(number: int, *, when: str) -> Iterator[list[str]]:
    """End the block before or after its step of this number, or when a store has copied a part but not yet removed the
    first; gives the steps."""
    originals = {name: getattr(storage, name) for name in ("move", "remove", "write_bytes")}
    steps: list[str] = []

    def step(name: str, *arguments: Any) -> None:
        steps.append(name)
        if len(steps) < number:
            originals[name](*arguments)
            return
        if when == "after":
            originals[name](*arguments)
        elif when == "copied" and name == "move":
            shutil.copy(*arguments)
        elif when == "copied" and name == "remove" and Path(arguments[0]).is_dir():  # half of a folder
            for path in sorted(path for path in Path(arguments[0]).rglob("*") if path.is_file())[::2]:
                path.unlink()
        raise Killed

    with pytest.MonkeyPatch.context() as patch, suppress(Killed):
        for name in originals:
            patch.setattr(storage, name, partial(step, name))
        yield steps


OLD_CAPTIONS = {"a": "says a", "b": "says b", "c": "says c"}
NEW_CAPTIONS = {"a": "says x", "d": "says y"}


@pytest.mark.parametrize("when", ["before", "after", "copied"])
def test_readers_never_see_two_generations_if_a_replacement_is_killed_at_any_step(tmp_path: Path, when: str) -> None:
    num_steps, refused = 99, 0
    number = 0
    while (number := number + 1) <= num_steps:
        location = tmp_path / str(number)
        folder = replacing(location)
        folder.write_run((folder.read_run() or {}) | {"state": "complete"})
        with killed_at_step(number, when=when) as steps:
            folder.replace_by_next()
        num_steps = len(steps) if len(steps) < number else num_steps

        state = (folder.read_run() or {})["state"]
        in_folder = [one for path in storage.list_parquet(str(location)) for one in read_table(path).to_pylist()]
        actual = {one["image_id"]: one["caption"] for one in in_folder}
        if state == "complete":
            assert len(in_folder) == len(actual), number
            assert actual in (OLD_CAPTIONS, NEW_CAPTIONS), number
        try:
            rows_read = open_captions(str(location)).to_table().to_pylist()
        except InputError as error:
            assert re.search("may hold rows of two runs.*the same command finishes it", str(error))
            refused += 1
        else:
            assert state == "complete"
            assert {one["image_id"]: one["caption"] for one in rows_read} == actual
        status = read_status(str(location))
        assert isinstance(status, CaptioningStatus)
        assert (status.num_done, status.num_images) == (2, 2), number
        assert status.state in ("replacing", "complete")
        if status.state == "complete":
            assert actual == NEW_CAPTIONS

        folder.recover()

        assert rows(folder) == {"a": ("ok", "says x", ""), "d": ("ok", "says y", "")}
        folder.verify_row_counts()
        assert (folder.read_run() or {})["state"] == "complete"
        assert open_captions(str(location)).count_rows() == 2
    assert refused > 10


def test_readers_refuse_a_replacement_interrupted_in_an_earlier_version(tmp_path: Path) -> None:
    folder = replacing(tmp_path)
    folder.write_run(IDENTITY | {"state": "complete"})
    new = folder.next()
    storage.move(new.parts()[0], str(tmp_path / f"{OTHER}_000000.parquet"))

    for command in ("report", "evaluate", "export"):
        arguments = {"evaluate": [str(tmp_path)], "export": [str(tmp_path / "o"), "--to", "jsonl"]}.get(command, [])
        result = CliRunner().invoke(main, [command, str(tmp_path), *arguments])
        assert result.exit_code == 2
    with pytest.raises(InputError, match="may hold rows of two runs"):
        open_captions(str(tmp_path))
    with pytest.raises(InputError, match="may hold rows of two runs"):
        open_captions(str(tmp_path / f"{OTHER}_000000.parquet"))


def test_an_unfinished_replacement_leaves_the_old_output_unchanged(tmp_path: Path) -> None:
    folder = replacing(tmp_path)
    folder.next().write_run(IDENTITY | {"state": "failed"})

    folder.recover()

    assert set(rows(folder)) == {"a", "b", "c"}
    assert open_captions(str(tmp_path)).count_rows() == 3
    assert folder.next().is_of(IDENTITY)


def test_parts_are_readable_by_all_users(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, [row("a", content="x")], [row("b", "duplicate", content="x"), row("c")])

    folder.resolve_duplicates()

    assert pq.read_table(tmp_path, schema=CAPTIONS_SCHEMA).num_rows == 3


@given(
    sorted_ids=st.lists(st.integers(-3, 9)).map(sorted),
    ids=st.lists(st.integers(-5, 12)),
)
def test_ids_are_found_among_sorted_ids(sorted_ids: list[int], ids: list[int]) -> None:
    actual = contains_any(np.array(sorted_ids, np.int64), np.array(ids, np.int64))

    assert actual == bool(set(sorted_ids) & set(ids))


def test_a_run_that_finds_a_corrupt_run_file_in_its_output_says_what_to_do(tmp_path: Path) -> None:
    folder = CaptionsFolder(str(tmp_path))
    storage.write_bytes(storage.join(folder.work, "run.json"), b"{")

    for read in (folder.read_run, partial(folder.require_identity, IDENTITY), partial(folder.is_of, IDENTITY)):
        with pytest.raises(OutputError, match=r"run\.json is damaged: .*; choose another OUTPUT, or remove this one"):
            read()
