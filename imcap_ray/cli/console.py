"""Lines and progress -> the terminal or a log."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from imcap_ray.runs.progress_reporter import ProgressReporter
from imcap_ray.text.escaping import printable

if TYPE_CHECKING:
    from imcap_ray.data.datasets import CaptionedImages

CLEAR_LINE = "\r\033[K"

COLOURS = re.compile("\033\\[[0-9;]*m")


def print_line(line: str, *, err: bool = False) -> None:
    """Print one line, which may contain names and captions from files."""
    # On a terminal it replaces the progress line.
    prefix = CLEAR_LINE if err and sys.stderr.isatty() else ""
    click.echo(prefix + printable(line), err=err)


@contextlib.contextmanager
def stdout_for_results() -> Iterator[None]:
    """While the block runs, send what libraries print on stdout to stderr: Ray reports dead processes there."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def progress_reporter(*, quiet: bool = False) -> ProgressReporter:
    """A reporter that prints to stderr, or nowhere if `quiet`."""
    if quiet:
        return ProgressReporter(None)
    return ProgressReporter(
        lambda line: print_line(line, err=True), rewrite=_print_replaceable if sys.stderr.isatty() else None
    )


def _print_replaceable(line: str) -> None:
    click.echo(CLEAR_LINE + printable(line), err=True, nl=False)


def describe_counts(counts: dict[str, int], error_counts: dict[str, int]) -> str:
    """One line with the number of rows by status, and of failed ones by error code."""
    by_status = ", ".join(f"{count:,} {status}" for status, count in sorted(counts.items(), reverse=True))
    errors = ", ".join(f"{count:,} {code}" for code, count in error_counts.items())
    return f"{by_status} ({errors})" if errors else by_status


def describe_guess(familiarity: float) -> str:
    """What to think of the caption of an unfamiliar image."""
    return f"a guess: unlike the training images (familiarity {familiarity:.2f})"


def print_dataset(dataset: CaptionedImages) -> None:
    """Print the format of a data set, its splits, and the notes of its reader."""
    print_line(f"{dataset.location}: {dataset.format}, {dataset.describe_splits()}", err=True)
    if dataset.columns_note:
        print_line(f"{dataset.location}: {dataset.columns_note}", err=True)
    for note in dataset.notes:
        print_line(f"{dataset.location}: {note}", err=True)
