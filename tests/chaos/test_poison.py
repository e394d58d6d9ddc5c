"""Images that kill the process that decodes them or never finish decoding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.hang_guard import TIMEOUT_SECONDS
from tests.malformed_images import encode, photo

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0heicmif1"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "table"])
def test_images_that_kill_their_decoder_become_failed_rows_and_the_rest_are_captioned(
    kind: str, model_dir: Path, tmp_path: Path, read: Callable[[Path], list[dict[str, Any]]]
) -> None:
    images = {f"{number:03}.jpg": encode(photo(40 + number % 20, 50 + number // 20), "JPEG") for number in range(400)}
    poison = {
        "010-crash.heic": (HEIC + b"SEGFAULT" * 9, "internal"),
        "011-crash.heic": (HEIC + b"SEGFAULT" * 8, "internal"),
        "290-greedy.heic": (HEIC + b"GREEDY" * 9, "out_of_memory"),
    }
    images |= {name: data for name, (data, _) in poison.items()}
    input = tmp_path / ("in" if kind == "folder" else "in.parquet")
    if kind == "folder":
        input.mkdir()
        for name, data in images.items():
            (input / name).write_bytes(data)
    else:  # one row group, so that a task has more than a block of it
        names = sorted(images)
        pq.write_table(pa.table({"id": names, "image": [images[name] for name in names]}), input)

    done = caption(input, tmp_path / "out", model_dir)

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["counts"] == {"ok": 400, "failed": 3}
    rows = {row["image_id"]: row for row in read(tmp_path / "out")}
    assert len(rows) == 403
    assert {name: rows[name]["error_code"] for name in poison} == {name: code for name, (_, code) in poison.items()}


def test_an_image_that_never_finishes_decoding_becomes_a_failed_row_and_the_others_are_captioned(
    model_dir: Path, tmp_path: Path, read: Callable[[Path], list[dict[str, Any]]]
) -> None:
    input = tmp_path / "in"
    input.mkdir()
    for number in range(40):
        (input / f"{number:03}.jpg").write_bytes(encode(photo(40 + number, 50), "JPEG"))
    (input / "020-endless.heic").write_bytes(HEIC + b"ENDLESS")

    done = caption(input, tmp_path / "out", model_dir, IMCAP_DECODE_SECONDS="5")

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["counts"] == {"ok": 40, "failed": 1}
    rows = {row["image_id"]: row for row in read(tmp_path / "out")}
    assert len(rows) == 41
    endless = rows["020-endless.heic"]
    assert (endless["error_code"], endless["error_message"]) == ("too_large", "decoding took longer than 5 s")


def caption(input: Path, output: Path, model: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `imcap caption` on a private Ray, with the buggy plugin for HEIC images."""
    plugins = str(Path(__file__).parent / "plugins")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([plugins, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "imcap_ray", "caption", str(input), str(output), "--json", "--model", str(model)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS["chaos"] - 50,
        check=False,
        env=environment | variables,
    )
