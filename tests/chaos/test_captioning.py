"""The chaos benchmark as a user runs it, with two seeds: one on this machine alone, one on a simulated cluster."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from imcap_ray.distributed.captioning import BATCH_SIZE

NUM_IMAGES = 2000
BENCHMARK = Path(__file__).parents[2] / "jobs" / "benchmark.py"


@pytest.mark.timeout(900)
def test_every_image_is_one_row_whatever_dies() -> None:
    command = [
        sys.executable,
        str(BENCHMARK),
        "chaos",
        "--first-seed",
        "1",
        "--seeds",
        "2",
        "--images",
        str(NUM_IMAGES),
        "--json",
    ]

    done = subprocess.run(command, capture_output=True, text=True, timeout=880, check=False)

    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["rows_expected"] == 2 * NUM_IMAGES
    assert sum(result["faults"].values()) >= 2, done.stderr
    for what in ("rows_lost", "rows_duplicated", "rows_wrong", "broken_files_read"):
        assert result[what] == 0, done.stderr
    # What was noted as done is not computed again. An image more for each that a repeated task was in the middle of.
    recomputed = result["captions_computed"] - result["captions_needed"]
    assert recomputed <= result["captions_in_flight"] + BATCH_SIZE * sum(result["faults"].values()), done.stderr
