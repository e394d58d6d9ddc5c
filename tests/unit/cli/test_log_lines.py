"""What a command says of its progress when nobody looks at a terminal, by a clock of the test's own."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import click
import pytest
from click.testing import CliRunner

from imcap_ray.cli import console, main, options
from imcap_ray.errors import ImcapError


class Clock:
    def __init__(self) -> None:
        self.now = 5000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(console, "time", found)
    return found


def log_of_a_captioning(clock: Clock, capfd: pytest.CaptureFixture[str], *, seconds: int, startup: int) -> list[str]:
    """The lines of a run in which Ray starts, 20 images/s are captioned, and the last parts are written."""
    total = 20 * (seconds - startup)
    _, show = console.progress_printers({"quiet": False})
    for second in range(seconds + 60):
        clock.now = 5000.0 + second
        show(min(total, 20 * max(0, second - startup)), total)
    return capfd.readouterr().err.splitlines()


@pytest.mark.parametrize("seconds", [30, 300, 1800, 3600])
def test_an_hour_is_at_most_31_lines_and_the_end_is_told_once(
    seconds: int, clock: Clock, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = log_of_a_captioning(clock, capfd, seconds=seconds, startup=15)

    assert 0 < len(lines) <= 31
    assert len(set(lines)) == len(lines)
    assert sum(line.startswith(f"{20 * (seconds - 15):,} of") for line in lines) <= 1


def test_the_time_left_does_not_count_the_start(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    lines = log_of_a_captioning(clock, capfd, seconds=600, startup=50)

    assert lines[:3] == [
        "20 of 11,000 images",
        "220 of 11,000 images, 20.0 images/s, 8 min 59 s left",
        "1,420 of 11,000 images, 20.0 images/s, 7 min 59 s left",
    ]


def test_the_features_of_two_splits_are_told_apart(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    _, show = console.progress_printers({"quiet": False})
    for second in range(120):
        clock.now = 5000.0 + second
        name, done = ("train", second) if second < 50 else ("validation", 2 * (second - 50))
        show(done, 50 if name == "train" else 200, f"features of {name} images")

    lines = capfd.readouterr().err.splitlines()

    assert lines[0] == "features of train images: 10 of 50 images, 1.0 images/s, 40 s left"
    assert lines[-1] == "features of validation images: 22 of 200 images, 2.0 images/s, 1 min 29 s left"


def test_of_a_hundred_short_epochs_a_log_tells_now_and_then_one(clock: Clock) -> None:
    told: list[str] = []
    say_epoch = console.epoch_printer(told.append)
    for epoch in range(1, 101):
        clock.now += 36  # an hour in all
        say_epoch(f"epoch {epoch}")

    assert told[:3] == ["epoch 1", "epoch 2", "epoch 4"]
    assert len(told) < 31


def test_of_long_epochs_a_log_tells_each(clock: Clock) -> None:
    told: list[str] = []
    say_epoch = console.epoch_printer(told.append)
    for epoch in range(1, 19):
        clock.now += 199
        say_epoch(f"epoch {epoch}")

    assert len(told) == 18


@click.command()
@options.cluster_options
def stumble(**options: Any) -> None:
    try:
        raise RuntimeError("out of a process of Ray's")
    except RuntimeError as error:
        raise ImcapError("stopped by an error: it stumbled") from error


@pytest.mark.parametrize(("words", "has_traceback"), [([], False), (["-v"], True)])
def test_an_error_is_our_one_line_first_and_its_traceback_only_with_v(words: list[str], has_traceback: bool) -> None:
    group = main._Group(commands={"stumble": stumble})

    result = CliRunner().invoke(group, ["stumble", *words])

    assert result.exit_code == 1
    first, *rest = result.stderr.splitlines()
    assert first == "imcap: stopped by an error: it stumbled"
    assert ("RuntimeError: out of a process of Ray's" in rest) == has_traceback
    assert bool(rest) == has_traceback
