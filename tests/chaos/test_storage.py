"""Captioning runs on full disks and on object stores that fail or disappear."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.dataset as pads
import pytest

from imcap_ray import storage
from tests.flaky_s3 import S3Store
from tests.hang_guard import HANG_SECONDS

Read = Callable[[Path], list[dict[str, Any]]]


def imcap(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "imcap_ray", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS, check=False, **options)


def one_line(text: str) -> str:
    """Return the error line, which must be the only line, without a traceback."""
    assert "Traceback" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("imcap:")]
    return line


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 KB, which `mount -o remount,size=...` makes larger."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"NOT TESTED: a full disk, because tmpfs cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_one_clear_error_and_the_same_command_resumes(
    photographs: Path, model_dir: Path, small_disk: Path, read: Read
) -> None:
    (small_disk / "ballast").write_bytes(bytes(560 * 1024))
    command = ["caption", photographs, small_disk / "out", "--model", model_dir]

    full = imcap(*command)
    on_full = read(small_disk / "out")
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    more_room = imcap(*command)

    assert full.returncode == 1, full.stderr
    assert "No space left on device" in one_line(full.stderr)
    assert "the same command resumes" in one_line(full.stderr)
    assert len(on_full) < 120
    assert more_room.returncode == 0, more_room.stderr
    assert [row["image_id"] for row in read(small_disk / "out")] == sorted(path.name for path in photographs.iterdir())


def copy_to(uri: str, folder: Path) -> None:
    for path in folder.iterdir():
        storage.write_bytes(storage.join(uri, path.name), path.read_bytes())


def rows_at(uri: str) -> list[dict[str, Any]]:
    filesystem, _ = storage.resolve(uri)
    parts = [storage.resolve(part)[1] for part in storage.list_parquet(uri)]
    return pads.dataset(parts, filesystem=filesystem).to_table().to_pylist() if parts else []


@pytest.mark.slow
def test_a_killed_run_on_an_unreliable_store_loses_nothing(photographs: Path, model_dir: Path, s3: S3Store) -> None:
    copy_to(f"{s3.uri}/in", photographs)
    command = ["caption", f"{s3.uri}/in", f"{s3.uri}/out", "--model", model_dir]
    s3.proxy.every = 7
    process = subprocess.Popen(
        [sys.executable, "-m", "imcap_ray", *map(str, command)],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not storage.list_parquet(f"{s3.uri}/out"):
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = storage.list_parquet(f"{s3.uri}/out")

    again = imcap(*command)
    rows = rows_at(f"{s3.uri}/out")
    overwritten = imcap(*command, "--beam-size", "1", "--overwrite")
    new_rows = rows_at(f"{s3.uri}/out")

    s3.proxy.every = None
    assert (again.returncode, overwritten.returncode) == (0, 0), again.stderr + overwritten.stderr
    assert s3.proxy.num_faults > 30
    expected = {path.name: "ok" for path in photographs.iterdir()}
    for table in (rows, new_rows):
        assert {row["image_id"]: row["status"] for row in table} == expected
        assert len(table) == 120
    assert json.loads(storage.read_bytes(f"{s3.uri}/out/_imcap/run.json"))["search"]["beam_size"] == 1
    assert before


def test_a_store_that_disappears_is_one_clear_error_and_the_same_command_resumes(
    photographs: Path, model_dir: Path, s3: S3Store
) -> None:
    copy_to(f"{s3.uri}/in", photographs)
    command = ["caption", f"{s3.uri}/in", f"{s3.uri}/out", "--model", model_dir]
    process = subprocess.Popen(
        [sys.executable, "-m", "imcap_ray", *map(str, command)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"AWS_MAX_ATTEMPTS": "3"},
    )
    while process.poll() is None and not storage.exists(f"{s3.uri}/out/_imcap/owner"):
        time.sleep(0.1)
    s3.proxy.is_down = True
    _, lost = process.communicate(timeout=HANG_SECONDS)
    s3.proxy.is_down = False

    again = imcap(*command)

    assert process.returncode == 1, lost
    assert "the same command resumes" in one_line(lost)
    assert again.returncode == 0, again.stderr
    rows = rows_at(f"{s3.uri}/out")
    assert {row["image_id"]: row["status"] for row in rows} == dict.fromkeys(
        (path.name for path in photographs.iterdir()), "ok"
    )


def test_a_store_that_does_not_decode_chunks_stores_captions_and_exports_unchanged(
    photographs: Path, model_dir: Path, s3: S3Store
) -> None:
    s3.proxy.decodes_chunks = False
    environment = {name: value for name, value in os.environ.items() if name != "AWS_REQUEST_CHECKSUM_CALCULATION"}
    out, lines = f"{s3.uri}/out", f"{s3.uri}/captions.jsonl"

    captioned = imcap("caption", photographs, out, "--model", model_dir, "--limit", 8, env=environment)
    exported = imcap("export", out, lines, "--to", "jsonl", env=environment)

    assert (captioned.returncode, exported.returncode) == (0, 0), captioned.stderr + exported.stderr
    assert {row["status"] for row in rows_at(out)} == {"ok"}
    assert len([json.loads(line) for line in storage.read_bytes(lines).splitlines()]) == 8
