"""The commands as a user runs them, in processes of their own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest

from tests import small_data
from tests.hang_guard import HANG_SECONDS
from tests.malformed_images import encode, photo


@pytest.fixture
def flickr8k(tmp_path: Path) -> Path:
    return small_data.write_flickr8k(tmp_path / "flickr8k", num_train=4, num_validation=3, num_test=0)


@pytest.fixture
def photographs(tmp_path: Path, flickr8k: Path) -> Path:
    """The validation images of `flickr8k`, in a subfolder."""
    folder = tmp_path / "photographs"
    for name in (flickr8k / "Flickr_8k.devImages.txt").read_text().split():
        (folder / "below").mkdir(parents=True, exist_ok=True)
        shutil.copy(flickr8k / "Flicker8k_Dataset" / name, folder / "below" / name)
    return folder


def imcap(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "imcap_ray", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS, check=False, **options)


def rows(output: Path) -> list[dict[str, Any]]:
    all_rows: list[dict[str, Any]] = (
        pads.dataset([str(path) for path in output.glob("*.parquet")]).to_table().to_pylist()
    )
    return sorted(all_rows, key=lambda row: row["image_id"])


def test_caption_evaluate_and_report(flickr8k: Path, photographs: Path, model_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "captions"

    captioned = imcap("caption", photographs, output, "--model", model_dir, "--num-captions", 2, "--json")
    scored = imcap("evaluate", output, flickr8k)
    reported = imcap("report", output, "--references", flickr8k)

    assert captioned.returncode == 0, captioned.stderr
    summary = json.loads(captioned.stdout)
    assert (summary["num_images"], summary["counts"]) == (3, {"ok": 3})
    assert [row["image_id"] for row in rows(output)] == sorted(
        str(path.relative_to(photographs)) for path in photographs.rglob("*.jpg")
    )
    assert all(row["captions"][0] == row["caption"] and len(row["captions"]) == 2 for row in rows(output))
    assert scored.returncode == 0, scored.stderr
    assert "CIDEr-D" in scored.stdout
    scores = json.loads((output / "_imcap" / "scores.json").read_text())
    assert scores["protocol"]["num_images"] == 3
    assert scores["protocol"]["split"] == "validation"
    assert (output / "_imcap" / "scores.md").read_text().count("|") > 20
    assert reported.returncode == 0, reported.stderr
    page = (output / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 3 + 3  # the cards, and where the model looks
    assert "Where the model looks" in page


OUR_LINES = (
    r"captioning [\d,]+ of [\d,]+ images with \d+ actors?",
    r"[\d,]+ of [\d,]+ images(, [\d.]+ images/s)?(, [\dhmins ]+ left)?",
    r"familiarity: unknown \(.+ trained on very few images\)",
    r"\S+: 3 ok; [\dhmins ]+ in all; the run was too short to know what limits its speed",
)


def test_a_log_is_short_and_contains_only_our_lines(photographs: Path, model_dir: Path, tmp_path: Path) -> None:
    done = imcap("caption", photographs, tmp_path / "captions", "--model", model_dir)

    # No switch of Ray silences the line in which it reports the level of its log.
    rays = [line for line in done.stderr.splitlines() if "RAY_BACKEND_LOG_LEVEL" in line]
    lines = [line for line in done.stderr.splitlines() if line not in rays]
    assert (done.returncode, done.stdout) == (0, "")
    assert len(rays) <= 1
    assert [line for line in lines if not any(re.fullmatch(ours, line) for ours in OUR_LINES)] == []
    assert re.fullmatch(OUR_LINES[0], lines[0])
    assert re.fullmatch(OUR_LINES[-1], lines[-1])
    assert len(lines) <= 4, "the last image is reported once"


WITHOUT_RAY = """
import sys
import ray

def fail(**options):
    raise Exception("The current node timed out.\\n  GCS is overloaded.")

ray.init = fail
from imcap_ray.cli.main import main

main(sys.argv[1:])
"""


def test_a_ray_that_does_not_start_is_a_one_line_error(photographs: Path, model_dir: Path, tmp_path: Path) -> None:
    words = ["caption", photographs, tmp_path / "captions", "--model", model_dir]

    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_RAY, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "imcap: Ray does not start on this machine, after 2 attempts: The current node timed out. GCS is overloaded; "
        "to keep trying for longer, set IMCAP_RAY_START_TIMEOUT_SECONDS\n"
    )


PLANTED = "planted0wJalrXUtnFEMI"
"""Stands in the environment of a command, and nowhere else afterwards."""

HOSTILE_NAMES = (
    "\x1b[2J\x1b]0;owned\x07.jpg",
    "two\nlines\r.jpg",
    "<script>alert(1)<∕script>.jpg",
    '"><img src=x onerror=alert(1)>.jpg',
    "]](http:..x) | `id` $(touch pwned) {{ 7 * 7 }}.jpg",
    "gpj.\u202egnp.\x9b31m.jpg",
)


def contents(folder: Path) -> Iterator[str]:
    """Return the content of all files of a folder, with tables and their metadata decompressed."""
    for path in folder.rglob("*"):
        if path.suffix == ".parquet":
            table = pads.dataset(str(path)).to_table()
            yield f"{table.to_pylist()} {table.schema.to_string(truncate_metadata=False)}"
        if path.is_file():
            yield path.read_bytes().decode("latin-1")


def test_hostile_names_and_secrets_reach_neither_terminal_nor_files(
    flickr8k: Path, photographs: Path, model_dir: Path, tmp_path: Path
) -> None:
    for number, name in enumerate(HOSTILE_NAMES):
        (photographs / name).write_bytes(encode(photo(40 + number, 40), "JPEG") if number % 2 else b"no image")
    names = (
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "RAY_AUTH_TOKEN",
        "HF_TOKEN",
        "PASSWORD",
    )
    environment = {**os.environ, **dict.fromkeys(names, PLANTED)}
    output, options = tmp_path / "captions", {"env": environment, "cwd": tmp_path}

    commands = [
        imcap("caption", photographs, output, "--model", model_dir, "--max-failure-rate", 1, "-v", **options),
        imcap("caption", photographs, output, "--model", model_dir, "--json", "--max-failure-rate", 0, **options),
        imcap("evaluate", output, flickr8k, "--split", "validation", **options),
        imcap("report", output, **options),
    ]

    assert [done.returncode for done in commands] == [0, 3, 0, 0], [done.stderr for done in commands]
    assert {row["image_id"] for row in rows(output)} > set(HOSTILE_NAMES)
    for done in commands:
        assert not set("\x1b\x07\r\x9b\u202e") & set(done.stdout)
        assert PLANTED not in done.stdout + done.stderr
    for done in commands[1:]:  # the first one lets Ray speak
        assert not set("\x1b\x07\r\x9b\u202e") & set(done.stderr)
    assert not [text for text in contents(output) if PLANTED in text]
    page = (output / "report.html").read_text()
    assert page.count("<script") == 1
    assert "<img src=x" not in page
    assert not (tmp_path / "pwned").exists()


def test_a_table_that_names_outside_files_is_refused_unless_allowed(
    photographs: Path, model_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "table").mkdir()
    (image,) = list(photographs.rglob("*.jpg"))[:1]
    paths = [str(image), f"../{image.relative_to(tmp_path)}", f"file://{image}"]
    pq.write_table(pa.table({"path": paths}), tmp_path / "table" / "list.parquet")
    command = ["caption", tmp_path / "table" / "list.parquet", tmp_path / "captions", "--model", model_dir]

    refused = imcap(*command)
    allowed = imcap(*command, "--allow-outside-paths", "--json")

    assert refused.returncode == 2
    assert f"list.parquet, row 0: the path '{image}' leads out of {tmp_path}/table;" in refused.stderr
    assert allowed.returncode == 0, allowed.stderr
    assert json.loads(allowed.stdout)["counts"] == {"ok": 1, "duplicate": 2}  # one image, named three times


def test_the_demo_captions_the_samples_with_the_bundled_model(tmp_path: Path) -> None:
    pytest.importorskip("skimage", reason="the sample photographs come with scikit-image")

    done = imcap("demo", tmp_path / "demo")

    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    captioned = rows(tmp_path / "demo" / "captions")
    assert len(captioned) >= 6
    for row in captioned:
        assert row["status"] == "ok"
        assert any(line.startswith(row["image_id"]) and row["caption"] in line for line in lines)
    page = (tmp_path / "demo" / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == len(captioned) + 4  # the cards, and where the model looks


@pytest.mark.parametrize(
    "kind", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)], ids=["Ctrl-C", "SIGTERM"]
)
def test_an_interrupted_run_leaves_an_output_that_the_same_command_finishes(
    model_dir: Path, tmp_path: Path, kind: signal.Signals
) -> None:
    photographs, output = tmp_path / "photographs", tmp_path / "captions"
    photographs.mkdir()
    for number in range(600):
        (photographs / f"{number:03}.jpg").write_bytes(encode(photo(40 + number % 300, 40 + number // 300), "JPEG"))
    command = [sys.executable, "-m", "imcap_ray", "caption", str(photographs), str(output), "--model", str(model_dir)]

    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Where the tests run in the background of a shell, Ctrl-C is ignored and children inherit that.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + HANG_SECONDS
    while not list(output.glob("*.parquet")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, kind)
    _, stderr = process.communicate(timeout=HANG_SECONDS)
    interrupted = process.returncode
    state = json.loads((output / "_imcap" / "run.json").read_text())["state"]
    again = imcap("caption", photographs, output, "--model", model_dir)

    assert interrupted == 130, stderr
    assert stderr.splitlines()[-1].startswith("imcap: interrupted")
    assert "Traceback" not in stderr and "***" not in stderr
    assert state == "interrupted"
    assert again.returncode == 0, again.stderr
    assert [row["image_id"] for row in rows(output)] == [f"{number:03}.jpg" for number in range(600)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["caption", "nowhere", "out"], "no such input"),
        (["caption", "photographs", "out", "--model", "nowhere"], "no such model: nowhere"),
        (["caption", "photographs", "out", "--num-actors", "500"], "--num-actors 500 needs 502 CPUs"),
        (["caption", "photographs", "out", "--address", "127.0.0.1:9"], "cannot join the cluster at 127.0.0.1:9"),
        (["train", "photographs", "out"], "holds no captioned images"),
        (["train", "flickr8k", "out", "--recipe", "nothing"], "no recipe 'nothing'"),
        (["train", "flickr8k", "out", "--num-workers", "30"], "--num-workers 30 needs 31 CPUs"),
    ],
)
def test_a_usage_error_is_one_line_before_any_work(
    words: list[str], message: str, flickr8k: Path, photographs: Path, tmp_path: Path
) -> None:
    done = imcap(*words, cwd=tmp_path)

    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("imcap: ")]) == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_too_many_failed_images_are_exit_code_3(photographs: Path, model_dir: Path, tmp_path: Path) -> None:
    (photographs / "empty.jpg").write_bytes(b"")
    (photographs / "text.jpg").write_text("no image")

    done = imcap("caption", photographs, tmp_path / "captions", "--model", model_dir, "--json")

    assert done.returncode == 3, done.stderr
    assert "2 of 5 images failed" in done.stderr
    assert json.loads(done.stdout)["error_counts"] == {"empty_file": 1, "not_an_image": 1}
    assert {row["error_code"] for row in rows(tmp_path / "captions")} == {"", "empty_file", "not_an_image"}
