"""The folder of a private Ray: who can enter it, and when it is removed."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from imcap_ray.distributed.cluster.private_folder import PrivateFolder, remove_abandoned

HOLD_FOLDER = """
import sys
from imcap_ray.distributed.cluster.private_folder import PrivateFolder
print(PrivateFolder().path, flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a short name, for the limit of sockets' paths."""
    short = Path(f"/tmp/imf{os.getpid()}")
    short.symlink_to(tmp_path)
    monkeypatch.setenv("RAY_TMPDIR", str(short))
    yield short
    short.unlink()


def start_holder() -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD_FOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    return process, Path(process.stdout.readline().strip())


def test_only_its_user_can_enter_the_folder_and_it_is_removed(base: Path) -> None:
    folder = PrivateFolder()
    path = Path(folder.path)
    (path / "ray" / "session").mkdir(parents=True)

    assert path.parent == base
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    folder.remove()
    folder.remove()
    assert list(base.iterdir()) == []


def test_the_folder_of_a_killed_process_is_removed_and_that_of_a_running_one_is_kept(base: Path) -> None:
    killed, abandoned = start_holder()
    living, used = start_holder()
    (abandoned / "ray").mkdir()
    killed.kill()
    killed.communicate()
    (base / "imcap-ray-elses").mkdir()  # without a lock file it is nobody's that we know
    (base / "imcap-ray-link").symlink_to(used)

    folder = PrivateFolder()
    left = {path.name for path in base.iterdir()}

    living.communicate("end\n")
    folder.remove()
    assert left == {used.name, Path(folder.path).name, "imcap-ray-elses", "imcap-ray-link"}


def test_a_folder_being_created_is_not_treated_as_abandoned(base: Path) -> None:
    (base / "imcap-ray-new").mkdir()
    (base / "imcap-ray-new" / "owner.lock.new").touch()

    remove_abandoned(str(base))

    assert (base / "imcap-ray-new").exists()


def test_the_folder_is_in_tmp_if_socket_paths_would_be_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("long" * 20)
    deep.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(deep))

    folder = PrivateFolder()

    assert Path(folder.path).parent == Path("/tmp")
    folder.remove()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="finds processes in /proc")
def test_only_processes_started_for_the_folder_are_killed(base: Path) -> None:
    folder = PrivateFolder()
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    of_folder = subprocess.Popen([*sleep, f"--log-dir={folder.path}/ray/logs"])
    of_another = subprocess.Popen([*sleep, f"--log-dir={folder.path}x/ray/logs"])
    of_a_reader = subprocess.Popen([*sleep, f"{folder.path}/ray/logs"])
    time.sleep(0.3)

    folder.end_processes()

    assert of_folder.wait(timeout=10) == -signal.SIGKILL
    for untouched in (of_another, of_a_reader):
        assert untouched.poll() is None
        untouched.kill()
        untouched.wait()
    folder.remove()
