"""Counts over time -> the speed, the time left, and when a line of progress is due.

Prints nothing, and does not know what is counted.
"""

from __future__ import annotations

from collections import deque
from statistics import linear_regression
from typing import Final

RATE_SECONDS: Final = 120
"""Time over which the speed is measured: long enough for batches that take seconds, short enough to follow a change."""

MIN_IMAGES: Final = 200
"""Images without which the mean speed of a run, and what limits it, are chance."""

_MIN_CHANGES: Final = 8  # kept however old they are: a slow machine's batches may take half a minute each

_MIN_SECONDS: Final = 3  # a speed over less time is chance

LINE_INTERVALS: Final = ((60, 10), (600, 60), (3600, 180), (float("inf"), 900))
"""Pairs: until N seconds after the start, a line every M seconds. 31 in the first hour, then four an hour."""


class LineSchedule:
    """Decides when a line of progress is due in a log, so that a long run has a short log."""

    def __init__(self, start: float) -> None:
        self._start = start
        self._last = start

    def is_due(self, now: float) -> bool:
        """Whether a line is due; the caller writes one if it is.

        Args:
            now: seconds by the same clock as the start.
        """
        interval = next(interval for until, interval in LINE_INTERVALS if self._last - self._start < until)
        if now - self._last < interval:
            return False
        self._last = now
        return True


class Pace:
    """The speed of something that is counted: the current one, and the mean of the whole run.

    Measuring begins with the first results, because the start of Ray and the loading of models before them have nothing
    to do with the speed. Results come in batches, and several actors may finish theirs together, so the rate is the
    slope of a line through the moments at which the count has changed.
    """

    def __init__(self) -> None:
        self._changes: deque[tuple[float, int]] = deque()
        self._counted = 0
        self._seconds = 0.0

    def note(self, now: float, done: int) -> None:
        """Record how many are done at this moment, in seconds of any clock. A count that falls starts again."""
        if self._changes and done < self._changes[-1][1]:
            self._changes.clear()
        if done and (not self._changes or done > self._changes[-1][1]):
            if self._changes:
                self._counted += done - self._changes[-1][1]
                self._seconds += now - self._changes[-1][0]
            self._changes.append((now, done))
        while len(self._changes) > _MIN_CHANGES and self._changes[0][0] < now - RATE_SECONDS:
            self._changes.popleft()

    def rate(self, now: float) -> float | None:
        """How many are done per second; None while that is unknown."""
        points = list(self._changes)
        moments = [moment for moment, _ in points]
        longest_gap = max((after - before for before, after in zip(moments, moments[1:], strict=False)), default=0.0)
        if points and now - moments[-1] > longest_gap:  # the longest silence so far counts
            points.append((now, points[-1][1]))
        if len(points) < 3 or points[-1][0] - points[0][0] < _MIN_SECONDS:
            return None
        return max(0.0, linear_regression(*zip(*points, strict=True)).slope)

    def mean_rate(self) -> float | None:
        """How many were done per second between the first results and the last; None if that time is too short."""
        return self._counted / self._seconds if self._seconds >= _MIN_SECONDS else None

    def seconds_left(self, now: float, total: int) -> float | None:
        """Seconds until `total` are done; None while that is unknown."""
        rate = self.rate(now)
        if not rate:
            return None
        last, done = self._changes[-1]
        return max(0.0, (total - done) / rate - (now - last))


def format_duration(seconds: float) -> str:
    """Seconds as hours and minutes, or minutes and seconds."""
    minutes, rest = divmod(int(max(0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
