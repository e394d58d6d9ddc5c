"""How long a private Ray may take to start, and what happens when it does not. No Ray is started."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import ray

from imcap_ray.distributed.cluster import private_ray
from imcap_ray.distributed.cluster.private_ray import START_TIMEOUT_VARIABLE, initialize, start, start_timeout
from imcap_ray.errors import InputError, RayStartError


@pytest.mark.parametrize("text", ["soon", "0", "-1", "inf", "nan"])
def test_an_invalid_time_limit_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(START_TIMEOUT_VARIABLE, text)

    with pytest.raises(InputError, match=f"{START_TIMEOUT_VARIABLE} must be a number of seconds above 0, got '{text}'"):
        start_timeout()


def test_a_ray_that_does_not_start_is_retried_once_or_until_the_time_limit_of_the_user(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    attempts: list[float] = []

    def fail(**_: object) -> None:
        attempts.append(time.monotonic())
        raise OSError("[Errno 28] No space left on device.")

    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.setattr(private_ray, "PAUSE_SECONDS", 0.1)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv(START_TIMEOUT_VARIABLE, raising=False)

    with pytest.raises(RayStartError, match="after 2 attempts: .* No space left on device; to keep trying"):
        start(num_cpus=1, verbose=False)
    assert len(attempts) == 2

    monkeypatch.setenv(START_TIMEOUT_VARIABLE, "1")
    with pytest.raises(RayStartError):
        start(num_cpus=1, verbose=False)
    assert attempts[-1] - attempts[2] >= 0.8
    assert list(tmp_path.iterdir()) == []


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
