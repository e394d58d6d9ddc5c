"""Counts of what is done, as they come -> how fast it goes, how long it will take, and when a line of that is due.

Prints nothing, and knows nothing of what is counted.
"""

from __future__ import annotations

from collections import deque
from statistics import linear_regression
from typing import Final

RATE_SECONDS: Final = 120
"""What the rate is measured over: long enough for batches that take seconds, short enough to follow a change."""

_MIN_CHANGES: Final = 8  # kept however old they are: a slow machine's batches may take half a minute each

_MIN_SECONDS: Final = 3  # a rate out of less is chance

LINE_INTERVALS: Final = ((60, 10), (600, 60), (3600, 180), (float("inf"), 900))
"""Until so many seconds after the start, a line every so many seconds: 31 in the first hour, then four an hour."""


class LineSchedule:
    """When a line of progress is due in a log, so that a long run's log stays one that is read."""

    def __init__(self, start: float) -> None:
        self._start = start
        self._last = start

    def is_due(self, now: float) -> bool:
        """Whether it is time for a line; whoever asks says one if it is.

        Args:
            now: seconds by the same clock as the start.
        """
        interval = next(interval for until, interval in LINE_INTERVALS if self._last - self._start < until)
        if now - self._last < interval:
            return False
        self._last = now
        return True


class Pace:
    """The speed of something that is counted, of late.

    Counting begins with the first results: what comes before them, as the start of Ray and the loading of models, says
    nothing of the speed. Results come in batches, and several actors may finish theirs together, so the rate is the
    slope of a line through the moments at which the count has changed.
    """

    def __init__(self) -> None:
        self._changes: deque[tuple[float, int]] = deque()

    def note(self, now: float, done: int) -> None:
        """So many are done at this moment, in seconds of any clock. A count that falls begins anew."""
        if self._changes and done < self._changes[-1][1]:
            self._changes.clear()
        if done and (not self._changes or done > self._changes[-1][1]):
            self._changes.append((now, done))
        while len(self._changes) > _MIN_CHANGES and self._changes[0][0] < now - RATE_SECONDS:
            self._changes.popleft()

    def rate(self, now: float) -> float | None:
        """How many are done in a second; None while that cannot be told."""
        points = list(self._changes)
        moments = [moment for moment, _ in points]
        longest_gap = max((after - before for before, after in zip(moments, moments[1:], strict=False)), default=0.0)
        if points and now - moments[-1] > longest_gap:  # a silence like none before it belongs to the speed
            points.append((now, points[-1][1]))
        if len(points) < 3 or points[-1][0] - points[0][0] < _MIN_SECONDS:
            return None
        return max(0.0, linear_regression(*zip(*points, strict=True)).slope)

    def seconds_left(self, now: float, total: int) -> float | None:
        """How long it will take until `total` are done; None while that cannot be told."""
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
