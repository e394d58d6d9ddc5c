"""What a command does, and how many images are done -> lines on a terminal or in a log."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable

from imcap_ray.runs.rate import LineSchedule, Pace, format_duration


class ProgressReporter:
    """Reports the progress of one command.

    On a terminal every line of images replaces the one before. In a log such lines appear less and less often, see
    `LineSchedule`.

    Args:
        write: prints a line. None: nothing is reported.
        rewrite: prints a line of images that the next line replaces. None: the output is a log.
        clock: the time in seconds, from any starting point.
    """

    def __init__(
        self,
        write: Callable[[str], None] | None,
        *,
        rewrite: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._write = write
        self._rewrite = rewrite if write else None
        self._clock = clock
        self._image_lines = LineSchedule(clock())
        self._paces: dict[str, Pace] = defaultdict(Pace)
        self._finished: set[str] = set()

    def report(self, line: str) -> None:
        """Print a line."""
        if self._write:
            self._write(line)

    def report_images(self, done: int, total: int, task: str = "") -> None:
        """Report how many images are done; to be called about once a second.

        Args:
            task: what is done with the images, where a command does several things with images.
        """
        now, pace = self._clock(), self._paces[task]
        pace.note(now, done)
        write = self._rewrite or self._write
        if not done or write is None:
            return
        # Work that follows the last image may take a while: in a log, the last image is reported once.
        if not self._rewrite and (task in self._finished or not self._image_lines.is_due(now)):
            return
        if done >= total:
            self._finished.add(task)
        line = f"{task}{': ' if task else ''}{done:,} of {total:,} images"
        rate, seconds_left = self.rate(task), pace.seconds_left(now, total) if done < total else None
        if rate is not None:
            line += f", {rate:.1f} images/s"
        if seconds_left is not None:
            line += f", {format_duration(seconds_left)} left"
        write(line)

    def rate(self, task: str = "") -> float | None:
        """Images per second; None while that is unknown."""
        return self._paces[task].rate(self._clock())

    def mean_rate(self, task: str = "") -> float | None:
        """Images per second between the first results and the last; None if that time is too short."""
        return self._paces[task].mean_rate()
