"""The command line: arguments -> one function -> its printed result. Imports torch and Ray only inside a command."""

from __future__ import annotations

import contextlib
import errno
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

import click

from imcap_ray import __version__, storage
from imcap_ray.cli.bench import bench
from imcap_ray.cli.caption import caption
from imcap_ray.cli.check import check
from imcap_ray.cli.console import print_line
from imcap_ray.cli.demo import demo
from imcap_ray.cli.evaluate import evaluate
from imcap_ray.cli.export import export
from imcap_ray.cli.model import model
from imcap_ray.cli.options import VERBOSE_KEY
from imcap_ray.cli.quantize import quantize
from imcap_ray.cli.report import report
from imcap_ray.cli.status import status
from imcap_ray.cli.submit import submit
from imcap_ray.cli.suggest import suggest
from imcap_ray.cli.train import train
from imcap_ray.errors import INTERRUPTED, ImcapError, InputError


class CommandGroup(click.Group):
    """Prints errors of the package in one line and sets the exit code; any other error is a bug with a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        termination = _Termination()
        signal.signal(signal.SIGTERM, termination)
        try:
            with termination.translated():
                return super().invoke(ctx)
        except ImcapError as error:
            print_line(f"imcap: {storage.hide_secrets(str(error))}", err=True)
            if ctx.meta.get(VERBOSE_KEY) and error.__cause__:
                text = "".join(traceback.format_exception(error.__cause__))
                for line in storage.hide_secrets(text).splitlines():
                    print_line(line, err=True)
            ctx.exit(error.exit_code)
        except OSError as error:  # a full disk, a store that cannot be reached
            if error.errno == errno.EPIPE:  # the reader of our output has closed it; click handles that
                raise
            print_line(f"imcap: stopped by an error: {storage.hide_secrets(str(error))}", err=True)
            ctx.exit(ImcapError.exit_code)
        except ModuleNotFoundError as error:  # on a cluster with another image or environment
            if (error.name or "").startswith("imcap_ray"):
                raise
            print_line(
                f"imcap: {sys.executable} has no module {error.name}: install the dependencies of imcap_ray", err=True
            )
            ctx.exit(InputError.exit_code)
        except KeyboardInterrupt:
            click.echo("imcap: interrupted; what is written is kept, the same command resumes", err=True)
            ctx.exit(INTERRUPTED)


_REPEAT_SECONDS = 1.0


def _is_interrupted(error: BaseException | None) -> bool:
    """Whether the error is an interruption, or was raised while one was handled."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


class _Termination:
    """Handles SIGTERM like Ctrl-C, while the command runs."""

    def __init__(self) -> None:
        self._is_running = True
        self._was_received = False

    def __call__(self, number: int, frame: object) -> None:
        if not self._is_running or _is_interrupted(sys.exc_info()[1]):  # the process is about to end anyway
            return
        if not self._was_received:
            # Python drops an exception that is raised in a destructor, or in a hook that follows a fork.
            threading.Thread(target=self._repeat, daemon=True).start()
        self._was_received = True
        watch = sys.modules.get("imcap_ray.distributed.cluster.gcs_watch")
        if watch:  # Ray's processes may have received the signal too, and end before the command does
            watch.exit_code = INTERRUPTED  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    def _repeat(self) -> None:
        while self._is_running:
            time.sleep(_REPEAT_SECONDS)
            if self._is_running:
                # To the main thread itself: it may be in a system call that only a signal of its own ends.
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    @contextlib.contextmanager
    def translated(self) -> Iterator[None]:
        """A block in which any error after SIGTERM is an interruption, because Ray may have ended with it."""
        try:
            yield
        except Exception as error:
            if self._was_received:
                raise KeyboardInterrupt from error
            raise
        finally:
            self._is_running = False


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="imcap")
def main() -> None:
    """Caption photographs, train captioners on your own, score them; on a laptop or a Ray cluster.

    \b
    imcap demo                              try it
    imcap caption ~/Pictures captions/      one Parquet row for every image
    imcap train flickr8k/ runs/mine         a model of your own
    imcap evaluate captions/ flickr8k/      scores against human captions
    imcap export captions/ OUT --to jsonl   a format that other tools read
    imcap check flickr8k/                   problems of a data set
    """


for _command in (
    bench,
    caption,
    check,
    demo,
    evaluate,
    export,
    model,
    quantize,
    report,
    status,
    submit,
    suggest,
    train,
):
    main.add_command(_command)
