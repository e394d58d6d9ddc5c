"""A command and its private Ray: each ends when the other does, and neither leaves anything behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.malformed_images import encode, photo

ROOT = Path(__file__).parents[2]
NUM_IMAGES = 600


@dataclass(frozen=True)
class Command:
    """`imcap caption` on 600 small photographs, with a folder of its own for Ray."""

    words: list[str]
    output: Path
    temporary: Path

    def start(self, **variables: str) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {"RAY_TMPDIR": str(self.temporary), "PYTHONPATH": str(ROOT), **variables}
        return subprocess.Popen(self.words, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)

    def state(self) -> str:
        return str(json.loads((self.output / "_imcap" / "run.json").read_text())["state"])

    def folders(self) -> list[Path]:
        return list(self.temporary.glob("imcap-ray-*"))


@pytest.fixture
def command(tmp_path: Path, model_dir: Path) -> Iterator[Command]:
    photographs, output = tmp_path / "photographs", tmp_path / "captions"
    photographs.mkdir()
    for number in range(NUM_IMAGES):
        (photographs / f"{number:03}.jpg").write_bytes(encode(photo(20 + number % 50, 20 + number // 50), "JPEG"))
    temporary = Path(tempfile.mkdtemp(prefix="imt", dir="/tmp"))
    words = [sys.executable, "-m", "imcap_ray", "caption", str(photographs), str(output), "--model", str(model_dir)]
    yield Command(words, output, temporary)
    shutil.rmtree(temporary, ignore_errors=True)


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str], *, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=30)
        time.sleep(0.05)


def children(pid: int, name: str) -> list[int]:
    """Ids of the child processes that run this program."""
    pids = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            status = (process / "status").read_text()
            program = (process / "cmdline").read_bytes().split(b"\0")[0]
        except OSError:
            continue
        if f"\nPPid:\t{pid}\n" in status and program.endswith(name.encode()):
            pids.append(int(process.name))
    return pids


def end(process: subprocess.Popen[str], *, seconds: float = 90) -> str:
    """Wait for the end of the process and return its stderr."""
    try:
        return process.communicate(timeout=seconds)[1]
    finally:
        process.kill()


def test_a_run_whose_gcs_dies_ends_with_one_line_and_is_marked_failed(command: Command) -> None:
    process = command.start()
    wait_until(lambda: list(command.output.glob("*.parquet")), process)
    [gcs] = children(process.pid, "gcs_server")

    os.kill(gcs, signal.SIGKILL)
    stderr = end(process, seconds=40)

    assert process.returncode == 1, stderr
    [line] = [line for line in stderr.splitlines() if line.startswith("imcap: ")]
    assert line.startswith("imcap: Ray's head at ")
    assert line.endswith(" has stopped answering; what is written is kept, the same command resumes")
    assert "Traceback" not in stderr
    assert command.state() == "failed"
    assert command.folders() == []


MOMENTS = {
    "Ray is about to start": lambda command, process: command.folders(),
    "Ray starts": lambda command, process: children(process.pid, "gcs_server"),
    "Ray has started": lambda command, process: children(process.pid, "raylet"),
    "images are listed": lambda command, process: (command.output / "_imcap" / "run.json").exists(),
    "images are captioned": lambda command, process: list(command.output.glob("*.parquet")),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_sigterm_is_an_interruption_at_any_time(command: Command, moment: str) -> None:
    process = command.start()
    wait_until(lambda: MOMENTS[moment](command, process), process)

    process.send_signal(signal.SIGTERM)
    stderr = end(process)

    assert process.returncode == 130, stderr
    assert stderr.splitlines()[-1].startswith("imcap: interrupted")
    assert "Traceback" not in stderr
    assert command.folders() == []
    if moment == "images are captioned":
        assert command.state() == "interrupted"


def test_the_folder_of_a_running_private_ray_is_accessible_only_to_its_user(command: Command) -> None:
    process = command.start()
    wait_until(lambda: children(process.pid, "raylet"), process)
    modes = [stat.S_IMODE(folder.stat().st_mode) for folder in command.folders()]
    sockets = [path for folder in command.folders() for path in folder.glob("ray/session_2*/sockets")]

    process.send_signal(signal.SIGTERM)
    end(process)

    assert modes == [0o700]
    assert len(sockets) == 1


def test_files_left_by_a_killed_run_are_removed_by_the_next(command: Command) -> None:
    killed = command.start()
    wait_until(lambda: children(killed.pid, "raylet"), killed)
    killed.kill()
    killed.communicate()
    [left] = command.folders()

    process = command.start()
    wait_until(lambda: children(process.pid, "raylet"), process)
    process.send_signal(signal.SIGTERM)
    end(process)

    assert not left.exists()
    assert command.folders() == []
