"""Behaviour of a process when the head service of Ray stops responding."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from imcap_ray.distributed.cluster.gcs_watch import PATIENCE_SECONDS, RECONNECT_VARIABLE, patience_seconds

LOSE_HEAD = """
import socket, sys, time
from imcap_ray.distributed.cluster.gcs_watch import GcsWatch, when_lost

listener = socket.create_server(("127.0.0.1", 0))
address = f"127.0.0.1:{listener.getsockname()[1]}"

def note(what):
    open(sys.argv[1], "a").write(what)

watch = GcsWatch(address, is_own=True, is_connected=lambda: True, clean_up=lambda: note("clean-up "))
with when_lost(lambda: note("of another run ")):
    pass
with when_lost(lambda: 1 / 0), when_lost(lambda: note("lost ")):
    time.sleep(2)
    note("answered ")
    listener.close()
    if sys.argv[2] == "stopped":
        watch.stop()
        time.sleep(8)
    else:
        time.sleep(60)
"""


def run(file: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LOSE_HEAD, str(file), *words], capture_output=True, text=True, timeout=50, check=False
    )


def test_a_process_that_lost_the_head_of_ray_cleans_up_and_ends_with_one_line(tmp_path: Path) -> None:
    ended = run(tmp_path / "notes", "watched")

    assert ended.returncode == 1
    assert (tmp_path / "notes").read_text() == "answered lost clean-up "
    [line] = ended.stderr.splitlines()
    assert line.startswith("imcap: Ray's head at 127.0.0.1:")
    assert line.endswith("has stopped answering; what is written is kept, the same command resumes")


def test_a_ray_that_was_shut_down_is_not_reported_as_lost(tmp_path: Path) -> None:
    ended = run(tmp_path / "notes", "stopped")

    assert (ended.returncode, ended.stderr) == (0, "")
    assert (tmp_path / "notes").read_text() == "answered "


@pytest.mark.parametrize(("value", "seconds"), [(None, PATIENCE_SECONDS), ("600", 400.0), ("soon", PATIENCE_SECONDS)])
def test_the_reconnect_timeout_of_the_user_is_respected(
    monkeypatch: pytest.MonkeyPatch, value: str | None, seconds: float
) -> None:
    monkeypatch.delenv(RECONNECT_VARIABLE, raising=False)
    if value:
        monkeypatch.setenv(RECONNECT_VARIABLE, value)

    assert patience_seconds() == seconds
