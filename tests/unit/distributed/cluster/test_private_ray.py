"""How long a private Ray can take to start, and what happens if it does not start. No Ray is started."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import ray

from imcap_ray.distributed.cluster import private_ray
from imcap_ray.distributed.cluster.private_ray import START_TIMEOUT_VARIABLE, initialize, start, start_timeout
from imcap_ray.errors import InputError, RayStartError


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """An empty folder whose path leaves room for the names of Ray's sockets."""
    with TemporaryDirectory(prefix="imt", dir="/tmp") as folder:
        yield Path(folder)


@pytest.mark.parametrize("text", ["soon", "0", "-1", "inf", "nan"])
def test_an_invalid_time_limit_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(START_TIMEOUT_VARIABLE, text)

    with pytest.raises(InputError, match=f"{START_TIMEOUT_VARIABLE} must be a number of seconds above 0, got '{text}'"):
        start_timeout()


def test_a_ray_that_does_not_start_is_retried_once_or_until_the_time_limit_of_the_user(
    monkeypatch: pytest.MonkeyPatch, short_folder: Path
) -> None:
    attempts: list[float] = []
    folders: list[Path] = []

    def fail(**_: object) -> None:
        attempts.append(time.monotonic())
        folders.append(Path(os.environ["RAY_TMPDIR"]))
        raise OSError("[Errno 28] No space left on device.")

    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.setattr(private_ray, "PAUSE_SECONDS", 0.1)
    monkeypatch.setenv("RAY_TMPDIR", str(short_folder))
    monkeypatch.delenv(START_TIMEOUT_VARIABLE, raising=False)

    with pytest.raises(RayStartError, match="after 2 attempts: .* No space left on device; to keep trying"):
        start(num_cpus=1, verbose=False)
    assert len(attempts) == 2
    assert [folder.parent for folder in folders] == [short_folder, short_folder]
    assert os.environ["RAY_TMPDIR"] == str(short_folder)

    monkeypatch.setenv(START_TIMEOUT_VARIABLE, "2")
    started = time.monotonic()
    with pytest.raises(RayStartError):
        start(num_cpus=1, verbose=False)
    assert time.monotonic() - started >= 2
    assert len(attempts) - 2 > 2
    assert list(short_folder.iterdir()) == []


def test_an_interruption_waits_until_ray_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    has_ended = []

    def init(**_: object) -> None:
        time.sleep(0.3)
        has_ended.append(True)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(private_ray.Future, "result", interrupted)

    with pytest.raises(KeyboardInterrupt):
        initialize(verbose=False, address="local")
    assert has_ended == [True]
