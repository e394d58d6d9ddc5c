"""The commands as Ray jobs on a head started by `ray start --head`, one that asks for a token."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.dataset as pads
import pytest

from imcap_ray.captioner import read_model_folder
from tests import small_data
from tests.ray_head import TOKEN, running_head

pytestmark = pytest.mark.timeout(400)

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Head:
    dashboard: str

    def run(self, *words: object) -> subprocess.CompletedProcess[str]:
        """A program of this environment, as a user with the token runs it."""
        program, *arguments = map(str, words)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        # `ray job submit` shows its token only when told to; `imcap submit` finds out by itself.
        environment |= {"RAY_AUTH_TOKEN": TOKEN} | ({"RAY_AUTH_MODE": "token"} if program == "ray" else {})
        command = [str(Path(sys.executable).parent / program), *arguments]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=350, cwd=ROOT, check=False
        )


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with running_head(num_cpus=4) as (_, dashboard, _):
        yield Head(dashboard)


@pytest.fixture
def flickr8k(tmp_path: Path) -> Path:
    return small_data.write_flickr8k(tmp_path / "flickr8k", num_train=6, num_validation=3, num_test=0)


def test_imcap_submit_captions_on_the_cluster(head: Head, flickr8k: Path, model_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "captions"
    words = ["caption", flickr8k / "Flicker8k_Dataset", output, "--model", model_dir]

    done = head.run("imcap", "submit", "--address", head.dashboard, *words)

    assert done.returncode == 0, done.stdout + done.stderr
    assert pads.dataset([str(path) for path in output.glob("*.parquet")]).count_rows() == 9


def test_imcap_submit_dry_run_plans_on_the_cluster(head: Head, flickr8k: Path, model_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "captions"
    words = ["caption", flickr8k / "Flicker8k_Dataset", output, "--model", model_dir]

    done = head.run("imcap", "submit", "--address", head.dashboard, "--dry-run", *words)

    assert done.returncode == 0, done.stdout + done.stderr
    assert f"would caption {words[1]} into {output}: 9 images, 0 are done" in done.stdout
    assert "1 block, 1 actor" in done.stdout
    assert not output.exists()


def test_imcap_submit_returns_the_commands_exit_code(head: Head, flickr8k: Path, tmp_path: Path) -> None:
    done = head.run("imcap", "submit", "--address", head.dashboard, "caption", tmp_path / "nowhere", tmp_path / "out")

    assert done.returncode == 2, done.stdout + done.stderr
    assert "no such input" in done.stdout


def test_ray_job_submit_trains(head: Head, flickr8k: Path, tmp_path: Path) -> None:
    sets = {
        "encoder.name": "efficientnet_lite0",
        "preprocessing.image_size": 64,
        "decoder.hidden_size": 16,
        "decoder.num_heads": 2,
        "vocabulary.min_count": 1,
        "training.epochs": 2,
    }
    words = ["job", "submit", "--address", head.dashboard, "--working-dir", ".", "--", "python", "jobs/train.py"]
    words += [str(flickr8k), str(tmp_path / "model")]
    for name, value in sets.items():
        words += ["--set", f"{name}={value}"]

    done = head.run("ray", *words)

    assert done.returncode == 0, done.stdout + done.stderr
    assert read_model_folder(tmp_path / "model").metrics["validation"]["num_images"] == 3


def test_a_relative_output_in_a_job_is_refused(head: Head, flickr8k: Path) -> None:
    words = ["job", "submit", "--address", head.dashboard, "--working-dir", "jobs", "--", "python", "caption.py"]

    done = head.run("ray", *words, flickr8k / "Flicker8k_Dataset", "captions")

    assert done.returncode == 1  # Ray's client says 1 whatever the command said
    assert "OUTPUT must be an absolute path or a URI inside a Ray job" in done.stdout + done.stderr
