"""Images that kill the process which decodes them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0heicmif1"


def test_images_that_kill_their_decoder_are_found_and_the_rest_go_on(
    photographs: Path, model_dir: Path, tmp_path: Path, read: Callable[[Path], list[dict[str, Any]]]
) -> None:
    poison = {
        "010-crash.heic": (HEIC + b"SEGFAULT" * 9, "internal"),
        "011-crash.heic": (HEIC + b"SEGFAULT" * 8, "internal"),
        "090-greedy.heic": (HEIC + b"GREEDY" * 9, "out_of_memory"),
    }
    for name, (data, _) in poison.items():
        (photographs / name).write_bytes(data)
    command = [sys.executable, "-m", "imcap_ray", "caption", str(photographs), str(tmp_path / "out"), "--json"]
    plugins = str(Path(__file__).parent / "plugins")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([plugins, os.environ.get("PYTHONPATH", "")])}

    done = subprocess.run(
        [*command, "--model", str(model_dir)], capture_output=True, text=True, timeout=280, check=False, env=environment
    )

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["counts"] == {"ok": 120, "failed": 3}
    rows = {row["image_id"]: row for row in read(tmp_path / "out")}
    assert len(rows) == 123
    assert {name: rows[name]["error_code"] for name in poison} == {name: code for name, (_, code) in poison.items()}
