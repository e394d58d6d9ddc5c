"""The command line: arguments -> one function -> its result in print. Imports torch and Ray only inside a command."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from imcap_ray import __version__, storage
from imcap_ray.config import DEFAULT_MODEL, DEFAULT_RECIPE
from imcap_ray.errors import INTERRUPTED, DatasetError, ImageError, ImcapError, InputError
from imcap_ray.runs.rate import LineSchedule, Pace
from imcap_ray.text.escaping import printable

if TYPE_CHECKING:
    from imcap_ray.data.columns import ColumnOptions
    from imcap_ray.data.datasets import CaptionedImages
    from imcap_ray.distributed.captioning import CaptioningPlan, CaptioningSummary
    from imcap_ray.distributed.progress import Progress
    from imcap_ray.distributed.training_plan import TrainingPlan
    from imcap_ray.runs.status import CaptioningStatus, TrainingStatus

Command = TypeVar("Command", bound=Callable[..., Any])

SPOILT = 3
"""`imcap check` has found what would spoil a training."""


class _Workers(click.ParamType):  # type: ignore[type-arg]
    """How many workers a training has: N, or MIN-MAX where their number may change."""

    name = "N|MIN-MAX"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | tuple[int, int]:
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", str(value))
        least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 1 <= least <= most:
            self.fail(f"expected a number of at least 1, or two as in 1-4, got {value}", param, ctx)
        return (least, most) if found and found[2] else least


class _Group(click.Group):
    """Turns our errors into one line and an exit code; anything else is a bug and keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        termination = _Termination()
        signal.signal(signal.SIGTERM, termination)
        try:
            with termination.translated():
                return super().invoke(ctx)
        except ImcapError as error:
            _say(f"imcap: {storage.hide_secrets(str(error))}", err=True)
            if ctx.meta.get(_VERBOSE) and error.__cause__:
                text = "".join(traceback.format_exception(error.__cause__))
                for line in storage.hide_secrets(text).splitlines():
                    _say(line, err=True)
            ctx.exit(error.exit_code)
        except OSError as error:  # a disk that is full, a store that is gone
            if error.errno == errno.EPIPE:  # who read our output has heard enough: click's affair
                raise
            _say(f"imcap: stopped by an error: {storage.hide_secrets(str(error))}", err=True)
            ctx.exit(ImcapError.exit_code)
        except ModuleNotFoundError as error:  # on a cluster whose image or environment is not ours
            if (error.name or "").startswith("imcap_ray"):
                raise
            _say(
                f"imcap: {sys.executable} has no module {error.name}: install there what imcap_ray depends on", err=True
            )
            ctx.exit(InputError.exit_code)
        except KeyboardInterrupt:
            click.echo("imcap: interrupted; what is written is kept, the same command resumes", err=True)
            ctx.exit(INTERRUPTED)


_VERBOSE = "imcap.verbose"
"""Where a command's contexts keep that -v was given."""


def _note_verbose(ctx: click.Context, parameter: click.Parameter, value: bool) -> bool:
    ctx.meta[_VERBOSE] = value
    return value


_CLEAR_LINE = "\r\033[K"
_COLOURS = re.compile("\033\\[[0-9;]*m")


def _say(line: str, *, err: bool = False) -> None:
    """Print one line, in which names and captions out of files may stand."""
    # On a terminal it takes the place of the progress line.
    prefix = _CLEAR_LINE if err and sys.stderr.isatty() else ""
    click.echo(prefix + printable(line), err=err)


_REPEAT_SECONDS = 1.0


def _is_interrupted(error: BaseException | None) -> bool:
    """Whether an interruption is being handled: it, or what was raised while it was."""
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
        watch = sys.modules.get("imcap_ray.distributed.gcs_watch")
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
        """A block in which any error after SIGTERM is an interruption: it may be how Ray ended."""
        try:
            yield
        except Exception as error:
            if self._was_received:
                raise KeyboardInterrupt from error
            raise
        finally:
            self._is_running = False


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="imcap")
def main() -> None:
    """Caption photographs, train captioners on your own, score them; on a laptop or a Ray cluster.

    \b
    imcap demo                              see it work
    imcap caption ~/Pictures captions/      one Parquet row for every image
    imcap train flickr8k/ runs/mine         a model of your own
    imcap evaluate captions/ flickr8k/      a score that can be trusted
    imcap export captions/ OUT --to jsonl   what other tools read
    imcap check flickr8k/                   what is wrong with a data set
    """


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_cluster_options = _options(
    click.option("--address", help="A running Ray: HOST:PORT or auto. Default: RAY_ADDRESS, else this machine alone."),
    click.option(
        "--gpus-per-worker", type=click.FloatRange(0), help="GPUs of each process. Default: 1 where there are any."
    ),
    click.option(
        "-v", "--verbose", is_flag=True, callback=_note_verbose, help="Ray's own messages and tracebacks too."
    ),
)
_model_options = _options(
    click.option(
        "--model",
        "models",
        multiple=True,
        help=f"Model folder, path or URI. Default: {DEFAULT_MODEL}, the package's. Several caption together.",
    ),
    click.option("--encoder-weights", type=click.Path(), help="The CNN's weights, where they cannot be downloaded."),
    click.option("--beam-size", type=click.IntRange(1), help="Partial captions kept at every position; 1: greedy."),
    click.option("--max-length", type=click.IntRange(1), help="Longest caption, in words."),
    click.option(
        "--length-penalty", type=click.FloatRange(0), help="0: the most probable caption; 1: by its tokens' mean."
    ),
    click.option("--num-captions", type=click.IntRange(1), help="Captions of each image, the best first."),
)
_outside_option = click.option(
    "--allow-outside-paths",
    is_flag=True,
    help="Paths in tables and lists may lead out of the folder of the data; else they are refused.",
)
_image_column_option = click.option(
    "--image-column",
    metavar="NAME",
    help="Parquet: the column of images (bytes, paths, or structs of both). Default: by its name and values.",
)
_caption_column_option = click.option(
    "--caption-column", metavar="NAME", help="Parquet: the column of captions (text, or lists of it). Default: by name."
)
_id_column_option = click.option(
    "--id-column", metavar="NAME", help="Parquet: the column of image ids. Default: by its name."
)
_dataset_column_options = _options(_image_column_option, _caption_column_option, _id_column_option)


def _columns(options: Mapping[str, Any]) -> ColumnOptions:
    from imcap_ray.data.columns import ColumnOptions

    return ColumnOptions(
        image=options.get("image_column"), caption=options.get("caption_column"), id=options.get("id_column")
    )


_output_options = _options(
    click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout and nothing else there."),
    click.option("-q", "--quiet", is_flag=True, help="Errors only."),
)


@main.command()
@click.argument("input")
@click.argument("output", required=False)
@_model_options
@click.option("--recursive/--no-recursive", default=True, help="Folders below INPUT too.")
@click.option("--limit", type=click.IntRange(1), help="Only the first so many images.")
@click.option("--num-actors", type=click.IntRange(1), help="Processes with a model. Default: one per GPU, or per core.")
@click.option("--batch-size", type=click.IntRange(1), help="Images an actor takes at a time.")
@click.option("--overwrite", is_flag=True, help="Start anew; the old rows go when the new ones are complete.")
@click.option("--retry-failed", is_flag=True, help="Caption the images that failed before once more.")
@click.option(
    "--max-failure-rate",
    type=click.FloatRange(0, 1),
    default=0.1,
    show_default=True,
    help="Share of images that may fail before the exit code is 3.",
)
@click.option("--dry-run", is_flag=True, help="Check everything, say what would be done, and stop there.")
@_image_column_option
@_id_column_option
@_outside_option
@_cluster_options
@_output_options
def caption(input: str, output: str | None, **options: Any) -> None:
    """Caption the images of INPUT (a folder, Parquet, WebDataset tars, or one image) into Parquet files in OUTPUT.

    Every image becomes exactly one row: its caption, or the reason why there is none. Run again, the same command
    goes on where it stopped. For one image without OUTPUT the caption is printed.

    \b
    imcap caption ~/Pictures captions/
    imcap caption photographs.parquet captions/ --model runs/mine --beam-size 5
    imcap caption one.jpg

    A row of OUTPUT/*.parquet: image_id (the path below INPUT, the table's id, the tar's key), image_path ("" for what
    lies in tables and tars), caption, captions (the --num-captions best), confidence (exp of the mean token
    log-probability), logprob, num_tokens, status (ok, failed, duplicate), error_code and error_message, width, height,
    format, sha256, duplicate_of. Exit codes: 0 done; 1 failed, the same command resumes; 2 wrong usage or input, found
    before work began; 3 done, but more images failed than --max-failure-rate allows; 130 interrupted.

    When things break, the same command goes on:

    \b
    an image is broken, missing, too      a row with its code: missing, permission_denied,
    large, or no image                    empty_file, not_an_image, truncated, too_large,
                                          unsupported_format, read_error, changed
    an image kills its process            found by trying it alone, twice: a row with internal
                                          or out_of_memory
    memory runs out for a batch           half as many images at a time; the summary says it
    a task, an actor or a node dies       Ray runs its blocks again
    the driver dies, Ctrl-C, a power cut  what is noted as done is not computed again
    the disk is full, the store is gone   one line, exit code 1; a store that fails now and then
                                          is asked again for about 25 s (AWS_MAX_ATTEMPTS)
    the same bytes under several names    captioned once, copied to the others
    new images, files that have changed   captioned; by size and time, which a store is not asked
                                          for what a table of paths names in it
    new tables with names that others     refused, unless images were known by table and row from
    have for their images                 the beginning: choose another OUTPUT, or --overwrite
    another model, input or search        refused, with the difference named, or --overwrite
    some images failed                    --retry-failed takes them once more
    a node joins a cluster                it is taken up, unless --num-actors says how many
    a node is gone for good               the others continue; after a wait at worst, see below
    other jobs hold the cluster's CPUs    it waits, reports that, and starts when CPUs are free
    two runs write to one OUTPUT          the later one takes over, the earlier one stops

    OUTPUT/*.parquet can be read at any moment: parts appear when they are complete. While a run goes on a duplicate may
    lack its caption, and a part from before a crash may be taken back by the next run; at the end of --overwrite the
    folder holds new and old parts for as long as it takes to move them. The state in OUTPUT/_imcap/run.json is then
    "replacing", and imcap's other commands refuse the folder. It is "complete" when all is settled; heartbeat.json
    there is written every 30 s until then.

    Memory by the image: 16 bytes for each that is done on the driver, 8 in Ray's filter, and 29 bits for the hashes of
    all (360 MB for 100 million); duplicates are settled by DuckDB in 1 GB, on disk beyond that. A folder of image files
    that also holds tars or tables is listed twice and takes 12 bytes more for each file. Not bounded: the ids of a
    Parquet input or tars, held once on the driver, and the images that have changed or --retry-failed takes again.

    A run takes the CPUs that no other job holds when it starts. If actors hold all CPUs, nothing can be decoded: after
    40 s (5 min if a node died at work) the run releases its actors and continues with half as many when CPUs are free.
    On a cluster with an autoscaler it waits for new nodes, at most for Ray Data's limit
    (RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S, half an hour).

    Falls short: a decoder that never returns is waited for; GPU memory that runs out was tried with
    torch's errors raised on a CPU; S3 was tried against a server on one machine, not AWS, and several hosts as network
    namespaces of one machine. On a GPU the CNN computes in float16, which was never tried on one: by its rounding one
    caption in 77 is another than on a CPU.
    """
    if output is None:
        _print_caption(input, options)
        return
    say, progress_line = _voice(options)
    if options["dry_run"]:
        _print_plan(plan(input, output, options), options)
        return
    summary = run_captioning(input, output, options, say=say, on_progress=progress_line)
    _print_summary(summary, options)


def _print_caption(image: str, options: dict[str, Any]) -> None:
    from imcap_ray.errors import ImageError
    from imcap_ray.models.caption import no_memory
    from imcap_ray.models.captioner import load_captioner

    storage.refuse_secrets(image)
    if storage.is_folder(image):
        raise InputError(f"{image} is a folder: say where the captions go, imcap caption {image} OUTPUT")
    captioner = load_captioner(options["models"], search=_search(options), encoder_weights=options["encoder_weights"])
    try:
        captions = captioner.caption_pixels(captioner.read_pixels(image)[None])[0] or no_memory()
        if isinstance(captions, ImageError):
            raise captions
    except ImageError as error:
        raise InputError(f"{image}: {error.message} ({error.code})") from error
    if options["as_json"]:
        found = [{"caption": one.text, "confidence": one.confidence} for one in captions]
        click.echo(json.dumps({**found[0], "captions": found}))
    else:
        for one in captions:
            _say(one.text)


def _search(options: dict[str, Any]) -> Any:
    """The model's search settings with those of the command line, or None to leave them as they are."""
    from imcap_ray.models.captioner import override_search
    from imcap_ray.models.model_folder import read_model_folder

    names = ("beam_size", "max_length", "length_penalty", "num_captions")
    if all(options.get(name) is None for name in names):
        return None
    first = options["models"][0] if options["models"] else None
    return override_search(read_model_folder(first).search, **{name: options.get(name) for name in names})


def run_captioning(
    input: str,
    output: str,
    options: dict[str, Any],
    *,
    say: Callable[[str], None],
    on_progress: Callable[[Progress, int], None],
) -> CaptioningSummary:
    """Connect, load, caption: what `imcap caption` and `imcap demo` share."""
    arguments, models = _prepare_captioning(input, output, options)
    from imcap_ray.distributed.captioning import caption_images

    return caption_images(
        **arguments,
        model_name=", ".join(models) or DEFAULT_MODEL,
        batch_size=options["batch_size"],
        retry_failed=options["retry_failed"],
        max_failure_rate=options["max_failure_rate"],
        echo=say,
        on_progress=on_progress,
    )


def plan(input: str, output: str, options: dict[str, Any]) -> CaptioningPlan:
    """Connect, load, and say what would be done."""
    arguments, _ = _prepare_captioning(input, output, options)
    from imcap_ray.distributed.captioning import plan_captioning

    return plan_captioning(**arguments)


def _prepare_captioning(input: str, output: str, options: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The arguments that a captioning and its plan share, with a cluster that sees all of them; and the models."""
    from functools import partial

    from imcap_ray.distributed.captioning import connect_and_load, load_captioner
    from imcap_ray.distributed.cluster import is_ray_job, refuse_relative_paths_in_job
    from imcap_ray.distributed.preflight import ADVICE, require_visible

    refuse_relative_paths_in_job({"OUTPUT": output})
    input, output = storage.absolute(input), storage.absolute(output)
    if not storage.exists(input):
        where = f" on the cluster: {input}: {ADVICE}" if is_ray_job() else f": {input}"
        raise InputError(f"no such input{where}")
    models = [model if model == DEFAULT_MODEL else storage.absolute(model) for model in options["models"]]
    weights = options["encoder_weights"] and storage.absolute(options["encoder_weights"])
    resources, captioner = connect_and_load(
        lambda: load_captioner(models, search=_search(options), encoder_weights=weights),
        options["address"],
        num_actors=options["num_actors"],
        verbose=options["verbose"],
    )
    reads = [("INPUT", input), *(("--model", model) for model in models if model != DEFAULT_MODEL)]
    if weights:
        reads.append(("--encoder-weights", weights))
    require_visible(resources, reads=reads, writes={"OUTPUT": output})
    arguments = {
        "input": input,
        "output": output,
        "load_captioner": partial(load_captioner, models, search=captioner.search, encoder_weights=weights),
        "captioner": captioner,
        "resources": resources,
        "num_actors": options["num_actors"],
        "gpus_per_actor": options["gpus_per_worker"],
        "recursive": options["recursive"],
        "limit": options["limit"],
        "overwrite": options["overwrite"],
        "columns": _columns(options),
        "allow_outside_paths": options["allow_outside_paths"],
    }
    return arguments, models


def _print_plan(plan: CaptioningPlan, options: dict[str, Any]) -> None:
    from dataclasses import asdict

    if options["as_json"]:
        click.echo(json.dumps(asdict(plan)))
        return
    more = "" if plan.is_counted else " at least"
    _say(f"would caption {plan.input} into {plan.output}: {plan.num_images:,} images{more}, {plan.num_done:,} are done")
    for note in plan.notes:
        _say(note)
    work = f"{plan.num_blocks:,} block{'s' * (plan.num_blocks != 1)}"
    work += f", {plan.num_actors} actor{'s' * (plan.num_actors != 1)}"
    if plan.gpus_per_actor:
        work += f" with {plan.gpus_per_actor:g} GPU each"
    if plan.seconds is None:
        _say(f"{work}; no run into this output tells a speed yet, one with --limit 1000 would")
    else:
        speed = f"{plan.images_per_second:.1f} images/s, as the last run there"
        _say(f"{work}; about {_duration(plan.seconds)}{more} at {speed}")


def _print_training_plan(plan: TrainingPlan, options: dict[str, Any]) -> None:
    from dataclasses import asdict

    if options["as_json"]:
        click.echo(json.dumps(asdict(plan)))
        return
    images = ", ".join(f"{count:,} {split}" for split, count in plan.num_images.items())
    _say(f"would train {plan.model} on {plan.data}: {images} images, {plan.num_captions:,} captions to learn from")
    epochs = ", then ".join(f"{count} of {phase.replace('_', ' ')}" for phase, count in plan.num_epochs.items())
    workers = plan.num_workers + (f" with {plan.gpus_per_worker:g} GPU each" if plan.gpus_per_worker else "")
    _say(f"epochs, at most: {epochs}; {plan.num_epochs_done} are done; {plan.batch_size} images a batch, {workers}")
    if plan.seconds is None:
        _say("how long an epoch takes shows only when the first is done")
    else:
        _say(f"about {_duration(plan.seconds)} at most, if the epochs that are left take what the last one took")


def _voice(options: dict[str, Any]) -> tuple[Callable[[str], None], Callable[[Progress, int], None]]:
    """How to say a line, and how to show progress: a line that changes on a terminal, else lines ever more seldom."""
    say, show = _counting_voice(options)
    return say, lambda progress, total: show(progress.num_images, total)


def _counting_voice(options: dict[str, Any]) -> tuple[Callable[[str], None], Callable[..., None]]:
    """The same, shown by the number of images that are done, of all, and what is done with them if that needs words."""
    if options["quiet"]:
        return (lambda line: None), (lambda done, total, what="": None)
    on_terminal = sys.stderr.isatty()
    schedule = LineSchedule(time.monotonic())
    paces: dict[str, Pace] = defaultdict(Pace)
    finished = set()

    def say(line: str) -> None:
        _say(line, err=True)

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
            line += f", {_duration(left)} left"
        click.echo(f"{_CLEAR_LINE}{line}" if on_terminal else line, err=True, nl=not on_terminal)

    return say, show


def _epoch_voice(say: Callable[[str], None]) -> Callable[[str], None]:
    """How to say the line of an epoch: all on a terminal; in a log, one where a line of progress is due."""
    schedule = LineSchedule(time.monotonic())

    def say_epoch(line: str) -> None:
        if sys.stderr.isatty() or schedule.is_due(time.monotonic()):
            say(line)

    return say_epoch


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(max(0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _print_summary(summary: CaptioningSummary, options: dict[str, Any]) -> None:
    from dataclasses import asdict

    if options["as_json"]:
        click.echo(json.dumps(asdict(summary)))
        return
    if options["quiet"]:
        return
    counts = _describe_counts(summary.counts, summary.error_counts)
    if summary.num_new:
        speed = f"{summary.images_per_second:.1f} images/s in {_duration(summary.seconds)}; {summary.bound}"
    else:
        speed = "nothing to do, all were done before"
    _say(f"{summary.output}: {counts}; {speed}", err=True)


def _describe_counts(counts: dict[str, int], error_counts: dict[str, int]) -> str:
    by_status = ", ".join(f"{count:,} {status}" for status, count in sorted(counts.items(), reverse=True))
    errors = ", ".join(f"{count:,} {code}" for code, count in error_counts.items())
    return f"{by_status} ({errors})" if errors else by_status


@main.command()
@click.argument("data")
@click.argument("model")
@click.option("--recipe", default=DEFAULT_RECIPE, show_default=True, help="A recipe's name, or a TOML file.")
@click.option(
    "--set", "overrides", multiple=True, metavar="SECTION.NAME=VALUE", help="Override a setting of the recipe."
)
@click.option(
    "--start-from",
    metavar="MODEL",
    multiple=True,
    help=f"Train this model on: a folder, or {DEFAULT_MODEL}, the package's. Its CNN, words and decoder stay, and the "
    "size of its images unless preprocessing.image_size is set. Of several, trained from one with several seeds, the "
    "mean of their weights.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the weights, the order and the dropout.")
@click.option(
    "--num-workers",
    type=_Workers(),
    help="Data-parallel processes. Default: one per GPU, or one. MIN-MAX: as many as there is room for by then; "
    "no autoscaler is asked for CPUs.",
)
@click.option("--encoder-weights", type=click.Path(), help="The CNN's weights, where they cannot be downloaded.")
@click.option("--features", help="Folder for cached features. Default: _features beside MODEL.")
@click.option("--dry-run", is_flag=True, help="Check everything and say what would be done; nothing is written.")
@_dataset_column_options
@_outside_option
@_cluster_options
@_output_options
def train(data: str, model: str, **options: Any) -> None:
    """Train on the captioned images of DATA and write the model folder MODEL.

    DATA is recognised by looking: Flickr8k or Flickr30k as distributed or in Kaggle's form, Karpathy's or COCO's JSON,
    Hugging Face's metadata.jsonl, images with .txt files beside them, WebDataset tars, or Parquet with captions and the
    images or their paths. Run again, the same command goes on after the last finished epoch.

    MODEL/_training has the metrics of every epoch, in metrics.jsonl and for `tensorboard --logdir MODEL`. Where mlflow
    is installed and MLFLOW_TRACKING_URI is set, they go there too, in one run however often this is run again.

    \b
    imcap train flickr8k/ runs/mine
    imcap train flickr8k/ runs/seed --recipe vgg16-lstm
    imcap train flickr8k/ runs/short --set training.epochs=3 --num-workers 2
    imcap train flickr8k/ runs/mine --dry-run
    imcap train s3://bucket/flickr8k s3://bucket/runs/mine --num-workers 2-8
    imcap train holidays/ runs/holidays --start-from flickr8k-lite2
    """
    from dataclasses import asdict

    from imcap_ray.config import load_recipe, parse_override
    from imcap_ray.data.datasets import TRAIN, VALIDATION, load_dataset
    from imcap_ray.distributed.cluster import connect, refuse_relative_paths_in_job
    from imcap_ray.distributed.preflight import require_visible
    from imcap_ray.distributed.trainer import train as run_training
    from imcap_ray.distributed.training_plan import prepare_training

    refuse_relative_paths_in_job(
        {"MODEL": model} | ({"--features": options["features"]} if options["features"] else {})
    )
    recipe = load_recipe(options["recipe"], dict(parse_override(text) for text in options["overrides"]))
    dataset = load_dataset(data, columns=_columns(options), allow_outside_paths=options["allow_outside_paths"])
    for split in (TRAIN, VALIDATION):
        dataset.split(split)
    say, show = _counting_voice(options)
    say(f"{dataset.location}: {dataset.format}, {dataset.describe_splits()}")
    if dataset.columns_note:
        say(f"{dataset.location}: {dataset.columns_note}")
    resources = connect(options["address"], verbose=options["verbose"])
    written = {"MODEL": model, "--features": options["features"] or storage.parent(storage.absolute(model))}
    require_visible(
        resources,
        reads=[("DATA", dataset.location)],
        writes={name: storage.absolute(place) for name, place in written.items()},
    )
    arguments: dict[str, Any] = {"recipe": recipe, "resources": resources} | {
        name: options[name] for name in ("start_from", "num_workers", "gpus_per_worker", "seed", "encoder_weights")
    }
    if options["dry_run"]:
        _print_training_plan(prepare_training(dataset, model, **arguments).plan(), options)
        return
    result = run_training(
        dataset,
        model,
        **arguments,
        recipe_name=options["recipe"],
        recipe_options=options["overrides"],
        features=options["features"],
        echo=say,
        echo_epoch=_epoch_voice(say),
        on_features=lambda split, progress, total: show(progress.num_images, total, f"{split} split"),
    )
    if options["as_json"]:
        click.echo(json.dumps(asdict(result)))
    else:
        say(
            f"{result.model}: epoch {result.metrics['epoch']} of {result.num_epochs} kept, validation CIDEr-D "
            f"{result.metrics['cider_d']:.3f}, BLEU-4 {100 * result.metrics['bleu_4']:.1f}; {_duration(result.seconds)}"
        )


@main.command()
@click.argument("data")
@click.option("--decode/--no-decode", default=True, help="Read every image; without it only names and captions.")
@click.option("--recipe", default=DEFAULT_RECIPE, show_default=True, help="Whose vocabulary the captions are for.")
@click.option(
    "--set", "overrides", multiple=True, metavar="SECTION.NAME=VALUE", help="Override a setting of the recipe."
)
@_dataset_column_options
@_outside_option
@_output_options
def check(data: str, **options: Any) -> None:
    """Tell what the captioned images of DATA hold, what is wrong with them, and what leaks between splits.

    Exit code 3 says that a training would be spoilt: there are no training or validation images; more than 10 % of the
    images are missing or unreadable; an image is in two splits with the same bytes, or more than 1 % of a split look
    the same as images of another; more than 1 % of the captions were read in the wrong encoding.

    \b
    imcap check flickr8k/
    imcap check coco/annotations/captions_val2017.json --no-decode
    """
    from imcap_ray.config import load_recipe, parse_override
    from imcap_ray.data.dataset_check import check_dataset
    from imcap_ray.data.datasets import load_dataset

    recipe = load_recipe(options["recipe"], dict(parse_override(text) for text in options["overrides"]))
    dataset = load_dataset(
        data,
        columns=_columns(options),
        allow_outside_paths=options["allow_outside_paths"],
        look_for_files=False,
        refuse_leaks=False,
    )
    _, show = _counting_voice(options)
    found = check_dataset(
        dataset,
        recipe=recipe,
        decode=options["decode"],
        on_progress=show,
    )
    if sys.stderr.isatty() and options["decode"] and not options["quiet"]:
        click.echo(_CLEAR_LINE, err=True, nl=False)
    if options["as_json"]:
        click.echo(json.dumps(found.to_mapping()))
    elif not options["quiet"]:
        for line in found.to_text().splitlines():
            _say(line)
    if found.spoils:
        sys.exit(SPOILT)


_split_option = click.option(
    "--split", type=click.Choice(["train", "validation", "test"]), help="Default: the one the captions are of."
)
_tokenizer_option = click.option(
    "--tokenizer",
    type=click.Choice(["ptb", "unicode", "seed"]),
    default="ptb",
    show_default=True,
    help="What counts as a word: ptb for English, unicode for other languages, seed as the Keras tutorials clean it.",
)


@main.command()
@click.argument("captions")
@click.argument("references")
@_split_option
@_tokenizer_option
@click.option("--against", metavar="CAPTIONS", help="Other captions of the same images: is the difference real?")
@click.option(
    "--save",
    help="Folder for scores.json, scores.md, and scores.parquet with each image's. Default: _imcap in CAPTIONS, if "
    "that is a folder.",
)
@_dataset_column_options
@_outside_option
@_output_options
def evaluate(captions: str, references: str, **options: Any) -> None:
    """Score CAPTIONS (a captions folder or Parquet) against the captions of the data set REFERENCES.

    \b
    imcap evaluate captions/ flickr8k/
    imcap evaluate captions/ flickr8k/ --against captions-before/
    """
    import pyarrow as pa

    from imcap_ray.data.datasets import load_dataset
    from imcap_ray.data.parquet_files import write_table
    from imcap_ray.scoring.evaluate import evaluate_captions

    dataset = load_dataset(references, columns=_columns(options), allow_outside_paths=options["allow_outside_paths"])
    report = evaluate_captions(
        captions, dataset, split=options["split"], tokenizer=options["tokenizer"], against=options["against"]
    )
    if not options["quiet"]:
        _introduce(dataset)
    folder = options["save"] or (storage.join(captions, "_imcap") if storage.is_folder(captions) else None)
    if folder:
        storage.write_bytes(storage.join(folder, "scores.json"), report.to_json().encode())
        storage.write_bytes(storage.join(folder, "scores.md"), report.to_markdown().encode())
        write_table(storage.join(folder, "scores.parquet"), pa.table(dict(report.image_scores)))
    if options["as_json"]:
        click.echo(json.dumps(json.loads(report.to_json()), indent=2))  # without a letter that a terminal would obey
    elif not options["quiet"]:
        for line in report.to_text().splitlines():
            _say(line)


@main.command()
@click.argument("captions")
@click.option("--references", help="A data set whose captions stand beside ours.")
@_split_option
@_tokenizer_option
@click.option("--output", help="The HTML file, path or URI. Default: report.html in CAPTIONS, or beside that file.")
@click.option("--max-images", type=click.IntRange(0), default=1000, show_default=True, help="Photographs shown.")
@click.option(
    "--attention",
    "num_attended",
    type=click.IntRange(0, 100),
    default=4,
    show_default=True,
    help="Photographs with where the model looked at each word, if the model of the captions can be loaded.",
)
@_dataset_column_options
@_outside_option
def report(captions: str, output: str | None, **options: Any) -> None:
    """Write one self-contained HTML file: photographs, captions, scores, failures.

    \b
    imcap report captions/
    imcap report captions/ --references flickr8k/      captions beside people's, the worst first
    """
    columns = _columns(options)
    options = {name: value for name, value in options.items() if not name.endswith("_column")}
    _say(write_captions_report(captions, output, reference_columns=columns, **options))


def write_captions_report(
    captions: str,
    output: str | None,
    *,
    references: str | None = None,
    reference_columns: ColumnOptions | None = None,
    split: str | None = None,
    tokenizer: str = "ptb",
    max_images: int = 1000,
    num_attended: int = 4,
    allow_outside_paths: bool = False,
) -> str:
    """Write the report of a captions folder or file; where it is.

    Photographs are taken from where `image_placer` lets them be, and from the references' folder. Captions that cannot
    be scored stand beside the references without scores, unless a split is named.
    """
    from imcap_ray.data.columns import BY_NAME
    from imcap_ray.data.datasets import load_dataset
    from imcap_ray.reports.html_report import write_report
    from imcap_ray.reports.model_section import read_model_of_run
    from imcap_ray.runs.captioned_images import CaptionedImageSource
    from imcap_ray.runs.captions_table import folder_of, open_captions, read_run
    from imcap_ray.scoring.evaluate import captioned_folder, evaluate_captions

    table = open_captions(captions)
    output = output or storage.join(folder_of(captions), "report.html")
    if storage.is_folder(output):
        raise InputError(
            f"--output {output} is a folder: give the name of the page, as {output.rstrip('/')}/report.html"
        )
    dataset = None
    if references:
        dataset = load_dataset(
            references, columns=reference_columns or BY_NAME, allow_outside_paths=allow_outside_paths
        )
    images = CaptionedImageSource(
        captions, folders=[dataset.location] if dataset else [], allow_outside_paths=allow_outside_paths
    )
    not_shown: dict[str, str] = {}
    changed: set[str] = set()

    def load_images(rows: Sequence[dict[str, Any]]) -> Iterator[bytes | ImageError]:
        for row, data in zip(rows, images.load(rows), strict=True):
            if isinstance(data, ImageError) and data.code == "changed":
                changed.add(row["image_id"])
            elif isinstance(data, ImageError):
                not_shown[row["image_id"]] = data.message
            yield data

    scores, score_note = None, ""
    if dataset:
        try:
            scores = evaluate_captions(captions, dataset, split=split, tokenizer=tokenizer)
        except DatasetError as error:
            if split:
                raise
            score_note = str(error)
            _say(f"without scores: {score_note}", err=True)
        _introduce(dataset)
    columns = scores.image_scores if scores else {}
    folder = captioned_folder(captions, dataset) if dataset else ""

    def below(values: Mapping[str, Any]) -> dict[str, Any]:
        """The values by the ids that their images have in the captions; those of the captioned folder come first."""
        inside = {name.removeprefix(folder): value for name, value in values.items() if name.startswith(folder)}
        return {name: value for name, value in values.items() if not name.startswith(folder)} | inside

    run = read_run(captions) or {}
    model = read_model_of_run(run, with_attention=num_attended > 0)
    write_report(
        table,
        output,
        load_images=load_images,
        references=below(dataset.references()) if dataset else None,
        evaluation=json.loads(scores.to_json()) if scores else None,
        image_scores=below(dict(zip(columns["image_id"], map(float, columns["cider_d"]), strict=True)))
        if scores
        else None,
        history=model.history,
        run=run,
        attend=model.attend,
        num_attended=num_attended,
        attention_note=model.note,
        score_note=score_note,
        max_images=max_images,
    )
    if changed:
        photographs = f"{len(changed):,} photograph{'s' * (len(changed) != 1)}"
        _say(f"not shown: {photographs} changed since captioning, the first is {min(changed)}", err=True)
    if not_shown:
        first = min(not_shown)
        photographs = f"photograph{'s' * (len(not_shown) != 1)}"
        _say(f"{len(not_shown):,} {photographs} cannot be shown, the first is {first}: {not_shown[first]}", err=True)
    return output


def _introduce(dataset: CaptionedImages) -> None:
    """Say as what a data set was recognised, and what its reader noticed."""
    _say(f"{dataset.location}: {dataset.format}, {dataset.describe_splits()}", err=True)
    if dataset.columns_note:
        _say(f"{dataset.location}: {dataset.columns_note}", err=True)
    for note in dataset.notes:
        _say(f"{dataset.location}: {note}", err=True)


@main.command()
@click.argument("captions")
@click.argument("output", metavar="OUT")
@click.option(
    "--to",
    "format",
    required=True,
    type=click.Choice(["coco", "jsonl", "csv", "sidecar", "hf", "webdataset"]),
    help="What OUT is to be.",
)
@click.option("--min-confidence", type=click.FloatRange(0, 1), help="Leave out captions with less confidence.")
@click.option(
    "--existing",
    type=click.Choice(["skip", "overwrite", "append"]),
    help="sidecar: leave a .txt that is there alone, replace it, or add a line to it. Default: skip.",
)
@click.option(
    "--shard-size",
    type=click.IntRange(1),
    help="hf, webdataset: images in a file. Default: 10000; a file of 1 GB is full in any case.",
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier export.")
@_outside_option
@_output_options
def export(captions: str, output: str, **options: Any) -> None:
    """Turn the captions of CAPTIONS (a captions folder or Parquet) into what other tools read.

    
    coco        annotations for pycocotools' COCO(OUT), and OUT_results.json for its loadRes
    jsonl       one JSON object a line
    csv         the same as a table; text that a spreadsheet would run (=...) gets a ' before it
    sidecar     a .txt for each image, in the folder OUT under the image's path below the input
    hf          Parquet with images and captions in the folder OUT, for datasets.load_dataset(OUT)
    webdataset  tar files with image, .txt and .json in the folder OUT

    Rows without a caption are left out and counted.

    
    imcap export captions/ captions.jsonl --to jsonl --min-confidence 0.3
    imcap export captions/ ~/Pictures --to sidecar          the .txt beside the images
    imcap export captions/ shards/ --to webdataset
    """
    from dataclasses import asdict

    from imcap_ray.exports.export import export_captions
    from imcap_ray.exports.shards import SHARD_IMAGES
    from imcap_ray.runs.captioned_images import CaptionedImageSource
    from imcap_ray.runs.captions_table import read_run, refuse_replacement

    format = options["format"]
    for option, formats in (("existing", ["sidecar"]), ("shard_size", ["hf", "webdataset"])):
        if options[option] is not None and format not in formats:
            raise InputError(f"--{option.replace('_', '-')} is for {' and '.join(formats)}, not for {format}")
    say, show = _counting_voice(options)
    refuse_replacement(captions)
    if (read_run(captions) or {}).get("state", "complete") != "complete":
        say(f"{captions}: the run that writes these captions is not complete; what is there is exported")
    summary = export_captions(
        captions,
        output,
        format=format,
        images=CaptionedImageSource(captions, allow_outside_paths=options["allow_outside_paths"]),
        min_confidence=options["min_confidence"],
        existing=options["existing"] or "skip",
        shard_images=options["shard_size"] or SHARD_IMAGES,
        overwrite=options["overwrite"],
        on_progress=show,
    )
    if options["as_json"]:
        click.echo(json.dumps(asdict(summary)))
        return
    for image in summary.images_without:
        say(f"left out: {image}")
    if summary.left_out_without_image > len(summary.images_without):
        say(f"left out: {summary.left_out_without_image - len(summary.images_without):,} more")
    say(summary.describe())


@main.command()
@click.argument("model", required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def model(model: str | None, as_json: bool) -> None:
    """What a model folder is: architecture, vocabulary, preprocessing, scores, size. Default: the package's own.

    \b
    imcap model
    imcap model runs/mine --json
    """
    from dataclasses import asdict

    from imcap_ray.config import to_mapping
    from imcap_ray.models.model_folder import read_model_folder

    folder = read_model_folder(model)
    facts = {
        "location": folder.location,
        "fingerprint": folder.fingerprint,
        "encoder": to_mapping(folder.encoder),
        "encoder_weights": asdict(folder.encoder_weights),
        "preprocessing": to_mapping(folder.preprocessing),
        "decoder": to_mapping(folder.decoder),
        "parameters": sum(tensor.numel() for tensor in folder.tensors.values()),
        "vocabulary": {"tokens": len(folder.vocabulary), "tokenizer": folder.vocabulary.tokenizer},
        "search": to_mapping(folder.search),
        "metrics": folder.metrics,
    }
    if as_json:
        click.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(
                f"{key} {item}" for key, item in value.items() if not isinstance(item, dict | list)
            ) or json.dumps(value)
        _say(f"{name + ':':17}{value:,}" if isinstance(value, int) else f"{name + ':':17}{value}")


@main.command()
@click.argument("out", default="imcap-demo")
def demo(out: str) -> None:
    """Caption the sample photographs with the model that comes with the package; OUT gets Parquet and report.html."""
    import shutil

    from imcap_ray.runs.captions_table import open_captions
    from imcap_ray.samples import sample_photographs

    photographs = Path(out, "photographs")
    photographs.mkdir(parents=True, exist_ok=True)
    samples = sample_photographs()
    for sample in samples:
        shutil.copyfile(sample.path, photographs / sample.file_name)
    captions = str(Path(out, "captions"))
    options = dict.fromkeys(
        (
            "encoder_weights",
            "beam_size",
            "max_length",
            "length_penalty",
            "num_captions",
            "limit",
            "num_actors",
            "batch_size",
            "gpus_per_worker",
        )
    )
    options |= {
        "models": (),
        "overwrite": False,
        "retry_failed": False,
        "allow_outside_paths": False,
        "recursive": True,
        "max_failure_rate": 0.0,
        "address": "local",
        "verbose": False,
        "quiet": False,
    }
    say, show = _voice(options)
    summary = run_captioning(str(photographs), captions, options, say=say, on_progress=show)
    rows = {row["image_id"]: row for row in open_captions(captions).to_table().to_pylist()}
    for sample in samples:
        row = rows[sample.file_name]
        _say(f"{sample.file_name:24} {row['caption']}  ({row['confidence']:.2f})")
    report_path = write_captions_report(captions, str(Path(out, "report.html")))
    _say(f"{summary.output}: {summary.num_images} rows of Parquet; {report_path}: the report")


def _size(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", value)
    if not match or not all(0 < int(side) <= 10_000 for side in match.groups()):
        raise click.BadParameter(f"expected WIDTHxHEIGHT in pixels, got {value!r}")
    return int(match[1]), int(match[2])


@main.command()
@click.argument("input", required=False)
@click.option("--model", "models", multiple=True, help=f"Model folder. Default: {DEFAULT_MODEL}, the package's.")
@click.option("--images", type=click.IntRange(64), default=1000, show_default=True, help="Images that are made.")
@click.option("--size", callback=_size, default="500x375", show_default=True, help="Of the images that are made.")
@click.option("--num-actors", type=click.IntRange(1), help="Processes with a model. Default: one per GPU, or per core.")
@click.option("--batch-size", type=click.IntRange(1), help="Images an actor takes at a time.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def bench(input: str | None, **options: Any) -> None:
    """Images per second on this machine: what its cores or its GPU could do at best, and what `imcap caption` does.

    The images are those of INPUT, a folder or Parquet, or else made for it: noise that is as much work as photographs.
    Nothing is left behind. `jobs/benchmark.py` has more: other ways to caption, training, millions of images.

    \b
    imcap bench
    imcap bench ~/Pictures --model runs/mine
    imcap bench --size 4000x3000 --images 300
    """
    from tempfile import TemporaryDirectory

    from imcap_ray.data.synthetic_images import write_photographs
    from imcap_ray.distributed.benchmark import compare_with_limit, describe_machine

    with TemporaryDirectory(prefix="imcap-bench-") as folder:
        if input is None:
            write_photographs(input := f"{folder}/photographs", options["images"], options["size"])
        found = compare_with_limit(
            input,
            f"{folder}/captions",
            models=options["models"],
            num_actors=options["num_actors"],
            batch_size=options["batch_size"],
        )
    if options["as_json"]:
        click.echo(json.dumps({"machine": describe_machine()} | found.to_dict()))
        return
    _say(", ".join(f"{name} {value}" for name, value in describe_machine().items()))
    for line in found.lines():
        _say(line)


@main.command()
@click.argument("output")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def status(output: str, as_json: bool) -> None:
    """How far the captioning or the training is whose OUTPUT this is; read from its files, from anywhere.

    \b
    imcap status s3://bucket/captions
    imcap status runs/mine --json
    """
    from dataclasses import asdict

    from imcap_ray.runs.status import CaptioningStatus, read_status

    found = read_status(output)
    if as_json:
        click.echo(json.dumps(asdict(found)))
        return
    for line in _describe_captioning(found) if isinstance(found, CaptioningStatus) else _describe_training(found):
        _say(line)


_STATES = {
    "silent": "no sign of life for {}: it was killed or its machine is gone; the same command resumes",
    "interrupted": "interrupted; the same command resumes",
    "failed": "stopped by an error; the same command resumes",
    "replacing": "all new rows are written and are replacing the old ones; if the run was killed, the same command "
    "finishes it",
}


def _describe_captioning(status: CaptioningStatus) -> list[str]:
    state = _STATES.get(status.state, status.state).format(_duration(status.last_sign_seconds or 0))
    if status.is_replacing and status.state != "replacing":
        state = f"{state} (--overwrite; the old rows stand until it is complete)"
    share = f" ({status.num_done / status.num_images:.0%})" if status.num_images else ""
    progress = f"{status.num_done:,} of {status.num_images:,} images{share}"
    if status.images_per_second is not None:
        progress += f", {status.images_per_second:.1f} images/s"
    if status.seconds_left is not None:
        progress += f", {_duration(status.seconds_left)} left"
    lines = [f"{status.output}: {state}", progress]
    if status.waiting:
        lines.append(status.waiting)
    if status.counts:
        lines.append(_describe_counts(status.counts, status.error_counts))
    if status.state == "running":
        lines.append(f"last sign of life {_duration(status.last_sign_seconds or 0)} ago; started {status.started}")
    return lines


def _describe_training(status: TrainingStatus) -> list[str]:
    age = _duration(status.last_sign_seconds or 0)
    state = _STATES.get(status.state, status.state).format(age)
    if status.state == "starting":
        state = "no epoch has ended yet"
    lines = [f"{status.model}: {state}"]
    if status.num_epochs_done:
        left = f", {_duration(status.seconds_left)} left at most" if status.seconds_left is not None else ""
        lines.append(f"{status.num_epochs_done} of {status.num_epochs} epochs, {status.phase} phase{left}")
        lines.append(f"best: epoch {status.best_epoch}, validation CIDEr-D {status.best_cider_d:.3f}")
    if status.state in ("starting", "running"):
        lines.append(f"last sign of life {age} ago")
    return lines


@main.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--address", help="The cluster's dashboard, http://HOST:8265. Default: RAY_API_SERVER_ADDRESS.")
@click.option("--submission-id", help="A name for the job.")
@click.option("--no-wait", is_flag=True, help="Submit the job and return.")
@click.option("--dry-run", is_flag=True, help="Check everything on the cluster, say what caption or train would do.")
@click.option("--follow", metavar="ID", help="Follow a job that was submitted before, in the place of COMMAND.")
@click.option(
    "--on-interrupt",
    type=click.Choice(["stop", "detach"]),
    default="stop",
    show_default=True,
    help="What Ctrl-C does: stop the job, or leave it running.",
)
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def submit(command: tuple[str, ...], **options: Any) -> None:
    """Run an imcap COMMAND as a Ray job on a cluster, follow it, and return its exit code.

    A connection that breaks is made again. The job does not need it, nor the terminal: --follow shows it anew.

    \b
    imcap submit caption s3://bucket/images s3://bucket/captions
    imcap submit --address http://127.0.0.1:8265 train /mnt/flickr8k /mnt/runs/mine
    imcap submit --follow imcap-caption-0123abcd
    """
    for word in command:
        storage.refuse_secrets(word.partition("=")[2] if word.startswith("-") else word)
    if bool(command) == bool(options["follow"]):
        raise InputError("imcap submit takes a command (caption, train, ...), or --follow with the ID of a job")
    if command and command[0] not in ("caption", "train", "evaluate", "report", "demo"):
        raise InputError(f"imcap submit runs caption, train, evaluate, report or demo, got {command[0]!r}")
    if options["dry_run"] and command[:1] not in (("caption",), ("train",)):
        raise InputError(f"imcap submit --dry-run plans caption and train, got {' '.join(command[:1]) or '--follow'}")
    arguments = [*_with_absolute_paths(command[1:])] + ["--dry-run"] * options["dry_run"]
    need = None
    if command:
        # Wrong usage is found here, and not in the job; and what this machine sees is not there.
        parent = click.get_current_context().parent
        with main.commands[command[0]].make_context(command[0], list(arguments), parent=parent) as context:
            parameters = dict(context.params)
        _refuse_what_is_not_there(command[0], parameters)
        need = _need(command[0], parameters)
    from imcap_ray.distributed import jobs

    common = {
        "address": options["address"],
        "on_interrupt": options["on_interrupt"],
        # Ray colours the lines of a job's log.
        "echo": lambda line: _say(_COLOURS.sub("", line)),
    }
    if options["follow"]:
        sys.exit(jobs.follow(options["follow"], **common))
    common |= {"submission_id": options["submission_id"], "wait": not options["no_wait"], "need": need}
    sys.exit(jobs.submit([command[0], *arguments], **common))


_READ = {
    "caption": {"INPUT": "input", "--model": "models"},
    "train": {"DATA": "data", "--start-from": "start_from"},
    "evaluate": {"CAPTIONS": "captions", "REFERENCES": "references", "--against": "against"},
    "report": {"CAPTIONS": "captions", "--references": "references"},
}
"""What a command reads, by the name that the user knows and that of the parameter."""

_NO_PATHS = (
    *("--set", "--split", "--tokenizer"),
    *("--image-column", "--caption-column", "--id-column"),
)
"""Options of commands whose values are no paths, though a file or folder may be called the same."""

_LOOK_SECONDS = 5.0


def _refuse_what_is_not_there(command: str, parameters: Mapping[str, Any]) -> None:
    """Raise InputError for a URI of which this machine sees that nothing is there, or that a model does not load from.
    What it may not see, or gets no answer of in time, is left to the job, as are paths of the cluster's own."""
    for name, parameter in _READ.get(command, {}).items():
        found = parameters[parameter] or ()
        for location in (found,) if isinstance(found, str) else found:
            if not storage.is_uri(location):
                continue
            is_there = _look(location)
            if is_there is False:
                raise InputError(f"no such {name}: {location}")
            if is_there and name in ("--model", "--start-from"):
                from imcap_ray.models.model_folder import read_model_folder

                read_model_folder(location)


def _look(location: str) -> bool | None:
    """Whether something is there; None where the store does not say, or not in seconds."""
    answers: list[bool] = []

    def ask() -> None:
        with contextlib.suppress(OSError, ImcapError):
            answers.append(storage.exists(location))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_LOOK_SECONDS)
    return answers[0] if answers else None


def _need(command: str, parameters: Mapping[str, Any]) -> tuple[str, float, float] | None:
    """The setting that says how much a command needs at once, and the CPUs and GPUs; None where that is left open."""
    gpus = parameters.get("gpus_per_worker") or 0.0
    if command == "caption" and (actors := parameters["num_actors"]):
        return f"--num-actors {actors}", actors + 2, actors * gpus
    if command == "train" and (workers := parameters["num_workers"]):
        least = workers[0] if isinstance(workers, tuple) else workers
        return f"--num-workers {least}", least + 1, least * gpus
    return None


def _with_absolute_paths(words: Sequence[str]) -> Iterator[str]:
    """The words of a command, with paths that exist here, or are written as such, made absolute: the job runs in
    another folder. An option may be joined to its value by "="; the value of one of `_NO_PATHS` is no path."""
    for before, word in pairwise(["", *words]):
        option, joint, value = word.partition("=") if word.startswith("-") else ("", "", word)
        if (
            before in _NO_PATHS
            or option in _NO_PATHS
            or storage.is_uri(value)
            or not (os.path.exists(value) or "/" in value)
        ):
            yield word
        else:
            yield f"{option}{joint}{os.path.abspath(value)}"
