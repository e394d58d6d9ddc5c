from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from imcap_ray.runs.rate import LineSchedule, Pace


def moments_of_lines(seconds: int, *, start: float = 1000.0) -> list[float]:
    """Return when lines are due in a run that checks once a second."""
    schedule = LineSchedule(start)
    return [second for second in range(1, seconds + 1) if schedule.is_due(start + second)]


def test_lines_are_due_every_ten_seconds_then_every_minute_then_every_three() -> None:
    lines = moments_of_lines(1200)

    assert lines[:6] == [10, 20, 30, 40, 50, 60]
    assert lines[6:15] == [120, 180, 240, 300, 360, 420, 480, 540, 600]
    assert lines[15:] == [780, 960, 1140]


@pytest.mark.parametrize("seconds", [9, 60, 600, 1800, 3600])
def test_a_run_of_up_to_an_hour_has_at_most_31_lines(seconds: int) -> None:
    assert len(moments_of_lines(seconds)) <= 31


def test_a_day_has_fewer_than_130_lines() -> None:
    assert len(moments_of_lines(24 * 3600)) < 130


def test_a_late_check_gets_one_line_and_not_the_missed_ones() -> None:
    schedule = LineSchedule(0.0)

    assert [schedule.is_due(moment) for moment in (45.0, 46.0, 54.9, 55.0)] == [True, False, False, True]


def run_of(*, actors: int, batch: int, batch_seconds: float, stagger: float, startup: float) -> Callable[[float], int]:
    """Return the count over time of actors of the same speed; the last starts `stagger` seconds after the first."""

    def done(second: float) -> int:
        started = [second - startup - stagger * number / actors for number in range(actors)]
        return sum(batch * max(0, int(working // batch_seconds)) for working in started)

    return done


def runs() -> Iterator[dict[str, float]]:
    for actors in (1, 2, 4, 16):
        for batch_seconds in (0.3, 2.0, 7.0, 14.0):
            for stagger in (0.0, 0.4, 3.0):
                for startup in (5.0, 40.0):
                    yield {"actors": actors, "batch_seconds": batch_seconds, "stagger": stagger, "startup": startup}


@pytest.mark.parametrize("settings", list(runs()), ids=str)
def test_the_time_left_is_right_within_a_fifth_a_minute_after_the_first_results(settings: dict[str, float]) -> None:
    done = run_of(batch=32, **settings)  # type: ignore[arg-type]
    first = next(second for second in range(1000) if done(second))
    total = done(first + 900)
    end = next(second for second in range(first, first + 901) if done(second) >= total)
    pace = Pace()
    for second in range(first + 840):
        pace.note(second, done(second))
        if second >= first + 60 and second % 20 == 0:
            assert pace.seconds_left(second, total) == pytest.approx(end - second, rel=0.2)


def test_there_is_no_estimate_before_the_third_result() -> None:
    pace = Pace()
    assert pace.rate(100.0) is None

    pace.note(100.0, 32)
    pace.note(101.0, 64)

    assert pace.rate(101.0) is None
    assert pace.seconds_left(101.0, 1000) is None


def test_a_change_of_speed_is_followed_within_the_window() -> None:
    pace = Pace()
    for second in range(1, 301):
        pace.note(second, 10 * second)
    for second in range(301, 451):
        pace.note(second, 3000 + 2 * (second - 300))

    assert pace.rate(450.0) == pytest.approx(2.0, rel=0.01)


def test_the_speed_decreases_during_a_standstill() -> None:
    pace = Pace()
    for second in range(1, 61):
        pace.note(second, 10 * second)

    speeds = [pace.rate(moment) or 0.0 for moment in (60.0, 120.0, 600.0)]

    assert speeds[0] == pytest.approx(10.0)
    assert speeds[0] > speeds[1] > speeds[2]
    assert speeds[2] < 2.0


def test_a_decreasing_count_restarts_the_estimate() -> None:
    pace = Pace()
    for second in range(1, 61):
        pace.note(second, 100 * second)

    for second in range(61, 81):
        pace.note(second, second - 60)

    assert pace.rate(80.0) == pytest.approx(1.0)


def test_the_mean_speed_leaves_out_the_start_and_the_time_after_the_last_result() -> None:
    pace = Pace()
    for second in range(100):
        pace.note(second, 0 if second < 40 else min(300, 10 * (second - 39)))

    assert pace.mean_rate() == pytest.approx(10)


def test_the_mean_speed_includes_the_counts_before_a_lost_counter_started_again() -> None:
    pace = Pace()
    for second in range(10):
        pace.note(second, 10 * (second + 1))
    for second in range(50, 60):
        pace.note(second, 20 * (second - 49))

    assert pace.mean_rate() == pytest.approx(15)
