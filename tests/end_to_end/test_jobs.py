"""The commands as Ray jobs on a head that `ray start --head` started, with token authentication."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.dataset as pads
import pytest
import yaml

from imcap_ray import storage
from imcap_ray.models.model_folder import read_model_folder
from imcap_ray.runs.captions_table import open_captions
from tests import small_data
from tests.documented import shown_commands
from tests.flaky_s3 import make_bucket, s3_environment
from tests.hang_guard import TIMEOUT_SECONDS
from tests.ray_head import TOKEN, running_head

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Head:
    dashboard: str

    def run(self, *words: object) -> subprocess.CompletedProcess[str]:
        """Run a program of this environment as a user with the token."""
        program, *arguments = map(str, words)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        # `ray job submit` sends its token only if RAY_AUTH_MODE is set; `imcap submit` detects that it must.
        environment |= {"RAY_AUTH_TOKEN": TOKEN} | ({"RAY_AUTH_MODE": "token"} if program == "ray" else {})
        command = [str(Path(sys.executable).parent / program), *arguments]
        return subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS["end_to_end"] - 50,
            cwd=ROOT,
            check=False,
        )


@pytest.fixture(scope="module")
def head(s3_endpoint: str) -> Iterator[Head]:
    """A cluster with access to an S3 store. This process has access too."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_environment(s3_endpoint).items():
            patch.setenv(name, value)
        with running_head(num_cpus=4) as (_, dashboard, _):
            yield Head(dashboard)


@pytest.fixture
def flickr8k(tmp_path: Path) -> Path:
    return small_data.write_flickr8k(tmp_path / "flickr8k", num_train=6, num_validation=3, num_test=0)


@pytest.mark.slow
def test_the_documented_commands_that_name_a_bucket_run_one_after_the_other(
    head: Head, s3_endpoint: str, tmp_path: Path
) -> None:
    """Except trainings: the store of these tests refuses their checkpoints, which are uploaded in several parts."""
    make_bucket(s3_endpoint, "bucket")
    flickr8k = small_data.write_flickr8k(tmp_path / "flickr8k", num_train=6, num_validation=3, num_test=0)
    for file in flickr8k.rglob("*.*"):
        storage.write_bytes(f"s3://bucket/flickr8k/{file.relative_to(flickr8k)}", file.read_bytes())
        if file.suffix == ".jpg":
            storage.write_bytes(f"s3://bucket/images/{file.name}", file.read_bytes())
    lines = [shown.line for shown in shown_commands() if "s3://bucket" in shown.line and "train" not in shown.line]
    assert len(lines) == 6

    for line in sorted(lines, key=lambda line: ("--dry-run" not in line, "evaluate" in line, "status" in line)):
        variables = [word for word in shlex.split(line) if word.startswith("RAY_")]
        words = [word for word in shlex.split(line) if word not in variables]
        if words[0] == "ray":
            words[3:3] = ["--address", head.dashboard]
        elif "--address" in words:
            words[words.index("--address") + 1] = head.dashboard
        elif words[1] == "submit":
            words[2:2] = ["--address", head.dashboard]
        done = head.run(*words)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    rows = open_captions("s3://bucket/captions").to_table().to_pylist()
    assert len(rows) == 9 and {row["status"] for row in rows} == {"ok"}


@pytest.mark.slow
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


def shown(start: str) -> list[str]:
    """The words of the only documented command that starts like this."""
    (line,) = [shown.line for shown in shown_commands() if shown.line.startswith(start)]
    return shlex.split(line)


def test_the_documented_command_that_follows_a_job_returns_its_exit_code(
    head: Head, flickr8k: Path, model_dir: Path, tmp_path: Path
) -> None:
    words = shown("imcap submit --follow")
    output = tmp_path / "captions"
    submit = ["imcap", "submit", "--address", head.dashboard, "--submission-id", words[-1], "--no-wait"]

    submitted = head.run(*submit, "caption", flickr8k / "Flicker8k_Dataset", output, "--model", model_dir)
    followed = head.run(*words[:2], "--address", head.dashboard, *words[2:])

    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert followed.returncode == 0, followed.stdout + followed.stderr
    assert "9 ok" in followed.stdout
    assert open_captions(str(output)).count_rows() == 9


@pytest.mark.slow
def test_the_documented_command_that_submits_a_training_trains(head: Head, flickr8k: Path, tmp_path: Path) -> None:
    words = shown("imcap submit --address http://127.0.0.1:8265 train")
    substitutes = {"http://127.0.0.1:8265": head.dashboard, "/mnt/flickr8k": str(flickr8k), "/mnt/runs/mine": "model"}
    words = [substitutes.get(word, word) for word in words]
    assert words[-2:] == [str(flickr8k), "model"]
    words[-1] = str(tmp_path / "model")

    planned = head.run(*words[:2], "--dry-run", *words[2:])
    done = head.run(*words, "--set", "training.epochs=1")

    assert planned.returncode == 0, planned.stdout + planned.stderr
    assert f"would train {words[-1]} on {flickr8k}: 6 train, 3 validation images" in planned.stdout
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_model_folder(tmp_path / "model").metrics["validation"]["num_images"] == 3


def test_imcap_submit_returns_the_exit_code_of_the_command(head: Head, flickr8k: Path, tmp_path: Path) -> None:
    done = head.run("imcap", "submit", "--address", head.dashboard, "caption", tmp_path / "nowhere", tmp_path / "out")

    assert done.returncode == 2, done.stdout + done.stderr
    assert "no such input" in done.stdout


def test_a_kubernetes_job_with_a_wrong_input_is_stopped_and_has_not_failed(head: Head, tmp_path: Path) -> None:
    """KubeRay starts a new cluster for a job whose status is FAILED, and none for STOPPED."""
    spec = yaml.safe_load((ROOT / "jobs" / "rayjob.yaml").read_text())["spec"]
    entrypoint = spec["entrypoint"].replace("s3://bucket/images", str(tmp_path / "nowhere"))
    entrypoint = entrypoint.replace("s3://bucket/captions", str(tmp_path / "out"))
    words = ["job", "submit", "--address", head.dashboard, "--submission-id", spec["jobId"], "--"]

    submitted = head.run("ray", *words, *shlex.split(entrypoint))
    status = head.run("ray", "job", "status", "--address", head.dashboard, spec["jobId"])

    assert "exit code 2: not retried" in submitted.stdout, submitted.stdout + submitted.stderr
    assert "STOPPED" in status.stdout.upper(), status.stdout + status.stderr


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

    assert done.returncode == 1  # Ray's client returns 1 for any exit code of the command
    assert "OUTPUT must be an absolute path or a URI inside a Ray job" in done.stdout + done.stderr
