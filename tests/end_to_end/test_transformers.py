"""Models of the transformers library from the command line: killed, resumed, scored and exported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.dataset as pads
import pytest

from tests import small_data
from tests.hang_guard import HANG_SECONDS
from tests.tiny_transformers import WRITERS

pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")

NUM_IMAGES = 300


def imcap(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "imcap_ray", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS, check=False)


def rows(output: Path) -> list[dict[str, Any]]:
    table = pads.dataset([str(path) for path in output.glob("*.parquet")]).to_table()
    return sorted(table.to_pylist(), key=lambda row: row["image_id"])


def kill_when_rows_are_written(output: Path, words: list[str]) -> None:
    with subprocess.Popen([sys.executable, "-m", "imcap_ray", *words], stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + HANG_SECONDS
        while not list(output.glob("*.parquet")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    "architecture", [name if name == "blip" else pytest.param(name, marks=pytest.mark.slow) for name in WRITERS]
)
def test_a_killed_run_resumes_and_its_captions_are_scored_and_exported(architecture: str, tmp_path: Path) -> None:
    model = WRITERS[architecture](tmp_path / "model")
    data = small_data.write_flickr8k(tmp_path / "data", num_train=0, num_validation=NUM_IMAGES, num_test=0)
    output = tmp_path / "captions"
    options = ["--model-option", "num_beams=2", "--model-option", "max_new_tokens=8", "--num-actors", "1"]
    words = ["caption", str(data / "Flicker8k_Dataset"), str(output), "--model", f"hf:{model}", *options]

    kill_when_rows_are_written(output, words)
    num_before = len(rows(output))
    resumed = imcap(*words, "--json")
    other = imcap(*words, "--model-option", "precision=bfloat16")

    assert 0 < num_before < NUM_IMAGES
    assert resumed.returncode == 0, resumed.stderr
    summary = json.loads(resumed.stdout)
    assert (summary["counts"], summary["num_new"]) == ({"ok": NUM_IMAGES}, NUM_IMAGES - num_before)
    assert len({row["image_id"] for row in rows(output)}) == len(rows(output)) == NUM_IMAGES
    assert all(0 < row["confidence"] <= 1 and row["num_tokens"] for row in rows(output))
    assert (other.returncode, "another model" in other.stderr) == (2, True)
    scored = imcap("evaluate", output, data)
    exported = imcap("export", output, tmp_path / "captions.jsonl", "--to", "jsonl")
    reported = imcap("report", output, "--references", data)
    assert [done.returncode for done in (scored, exported, reported)] == [0, 0, 0], scored.stderr + exported.stderr
    num_captioned = sum(row["caption"] != "" for row in rows(output))  # an export leaves empty captions out
    assert len((tmp_path / "captions.jsonl").read_text().splitlines()) == num_captioned
