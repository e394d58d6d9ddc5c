"""Lines, progress and durations -> the terminal or a log."""

from __future__ import annotations

import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from imcap_ray.runs.rate import LineSchedule, Pace
from imcap_ray.text.escaping import printable

if TYPE_CHECKING:
    from imcap_ray.data.datasets import CaptionedImages
    from imcap_ray.distributed.progress import Progress

CLEAR_LINE = "\r\033[K"

COLOURS = re.compile("\033\\[[0-9;]*m")


def print_line(line: str, *, err: bool = False) -> None:
    """Print one line, in which names and captions out of files may stand."""
    # On a terminal it takes the place of the progress line.
    prefix = CLEAR_LINE if err and sys.stderr.isatty() else ""
    click.echo(prefix + printable(line), err=err)


def captioning_printers(options: dict[str, Any]) -> tuple[Callable[[str], None], Callable[[Progress, int], None]]:
    """How to say a line, and how to show progress: a line that changes on a terminal, else lines ever more seldom."""
    say, show = progress_printers(options)
    return say, lambda progress, total: show(progress.num_images, total)


def progress_printers(options: dict[str, Any]) -> tuple[Callable[[str], None], Callable[..., None]]:
    """The same, shown by the number of images that are done, of all, and what is done with them if that needs words."""
    if options["quiet"]:
        return (lambda line: None), (lambda done, total, what="": None)
    on_terminal = sys.stderr.isatty()
    schedule = LineSchedule(time.monotonic())
    paces: dict[str, Pace] = defaultdict(Pace)
    finished = set()

    def say(line: str) -> None:
        print_line(line, err=True)

    def show(done: int, total: int, what: str = "") -> None:
        now, pace = time.monotonic(), paces[what]
        pace.note(now, done)
        # What comes after the last image may take a while, and is told by the next line.
        if not done or (not on_terminal and (what in finished or not schedule.is_due(now))):
            return
        if done >= total:
            finished.add(what)
        line = f"{what}{': ' if what else ''}{done:,} of {total:,} images"
        rate, left = pace.rate(now), pace.seconds_left(now, total) if done < total else None
        if rate is not None:
            line += f", {rate:.1f} images/s"
        if left is not None:
            line += f", {format_duration(left)} left"
        click.echo(f"{CLEAR_LINE}{line}" if on_terminal else line, err=True, nl=not on_terminal)

    return say, show


def epoch_printer(say: Callable[[str], None]) -> Callable[[str], None]:
    """How to say the line of an epoch: all on a terminal; in a log, one where a line of progress is due."""
    schedule = LineSchedule(time.monotonic())

    def say_epoch(line: str) -> None:
        if sys.stderr.isatty() or schedule.is_due(time.monotonic()):
            say(line)

    return say_epoch


def format_duration(seconds: float) -> str:
    """Seconds as hours and minutes, or minutes and seconds."""
    minutes, rest = divmod(int(max(0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def describe_counts(counts: dict[str, int], error_counts: dict[str, int]) -> str:
    """Rows by status, and failed ones by error code, in one line."""
    by_status = ", ".join(f"{count:,} {status}" for status, count in sorted(counts.items(), reverse=True))
    errors = ", ".join(f"{count:,} {code}" for code, count in error_counts.items())
    return f"{by_status} ({errors})" if errors else by_status


def print_dataset(dataset: CaptionedImages) -> None:
    """Say as what a data set was recognised, and what its reader noticed."""
    print_line(f"{dataset.location}: {dataset.format}, {dataset.describe_splits()}", err=True)
    if dataset.columns_note:
        print_line(f"{dataset.location}: {dataset.columns_note}", err=True)
    for note in dataset.notes:
        print_line(f"{dataset.location}: {note}", err=True)
