"""Which progress lines a log gets, with a simulated clock."""

from __future__ import annotations

import pytest

from imcap_ray.runs.progress_reporter import ProgressReporter


class Clock:
    def __init__(self) -> None:
        self.now = 5000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def reporter(clock: Clock, lines: list[str]) -> ProgressReporter:
    return ProgressReporter(lines.append, clock=clock)


def report_captioning(reporter: ProgressReporter, clock: Clock, *, seconds: int, startup: int) -> None:
    """Simulate a run: Ray starts, 20 images/s are captioned, and the last parts are written."""
    total = 20 * (seconds - startup)
    for second in range(seconds + 60):
        clock.now = 5000.0 + second
        reporter.report_images(min(total, 20 * max(0, second - startup)), total)


@pytest.mark.parametrize("seconds", [30, 300, 1800, 3600])
def test_an_hour_is_at_most_31_lines_and_the_end_is_reported_once(
    seconds: int, reporter: ProgressReporter, clock: Clock, lines: list[str]
) -> None:
    report_captioning(reporter, clock, seconds=seconds, startup=15)

    assert 0 < len(lines) <= 31
    assert len(set(lines)) == len(lines)
    assert sum(line.startswith(f"{20 * (seconds - 15):,} of") for line in lines) <= 1


def test_the_time_left_does_not_count_the_start(reporter: ProgressReporter, clock: Clock, lines: list[str]) -> None:
    report_captioning(reporter, clock, seconds=600, startup=50)

    assert lines[:3] == [
        "20 of 11,000 images",
        "220 of 11,000 images, 20.0 images/s, 8 min 59 s left",
        "1,420 of 11,000 images, 20.0 images/s, 7 min 59 s left",
    ]


def test_two_tasks_have_separate_speeds(reporter: ProgressReporter, clock: Clock, lines: list[str]) -> None:
    for second in range(120):
        clock.now = 5000.0 + second
        name, done = ("train", second) if second < 50 else ("validation", 2 * (second - 50))
        reporter.report_images(done, 50 if name == "train" else 200, f"features of {name} images")

    assert lines[0] == "features of train images: 10 of 50 images, 1.0 images/s, 40 s left"
    assert lines[-1] == "features of validation images: 22 of 200 images, 2.0 images/s, 1 min 29 s left"


def test_a_terminal_shows_every_count_in_place_of_the_previous_one(clock: Clock) -> None:
    written: list[str] = []
    rewritten: list[str] = []
    reporter = ProgressReporter(written.append, rewrite=rewritten.append, clock=clock)

    report_captioning(reporter, clock, seconds=60, startup=10)

    assert written == []
    assert len(rewritten) == 109  # one a second from the first image on
    assert rewritten[-1].startswith("1,000 of 1,000 images")


def test_without_a_writer_nothing_is_reported(clock: Clock) -> None:
    rewritten: list[str] = []
    reporter = ProgressReporter(None, rewrite=rewritten.append, clock=clock)

    report_captioning(reporter, clock, seconds=60, startup=10)
    reporter.report("a line")

    assert rewritten == []
