"""`imcap submit`."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import click

from imcap_ray import storage
from imcap_ray.cli.console import COLOURS, print_line
from imcap_ray.errors import ImcapError, InputError


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
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

    A connection that breaks is made again. The job does not need it, nor the terminal: --follow shows it again.

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
        assert parent and isinstance(parent.command, click.Group)
        with parent.command.commands[command[0]].make_context(command[0], list(arguments), parent=parent) as context:
            parameters = dict(context.params)
        _refuse_what_is_not_there(command[0], parameters)
        need = _need(command[0], parameters)
    from imcap_ray.distributed import jobs

    common = {
        "address": options["address"],
        "on_interrupt": options["on_interrupt"],
        # Ray colours the lines of a job's log.
        "echo": lambda line: print_line(COLOURS.sub("", line)),
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
