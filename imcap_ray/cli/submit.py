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
from imcap_ray.cli.options import resources_config
from imcap_ray.config import DEFAULT_MODEL
from imcap_ray.errors import ImcapError, InputError


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--address", help="The cluster's dashboard, http://HOST:8265. Default: RAY_API_SERVER_ADDRESS.")
@click.option("--submission-id", help="A name for the job.")
@click.option("--no-wait", is_flag=True, help="Submit the job and return.")
@click.option("--dry-run", is_flag=True, help="Check everything on the cluster and print the plan of caption or train.")
@click.option("--follow", metavar="ID", help="Follow a job that was submitted before, instead of COMMAND.")
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

    The job needs neither the connection nor the terminal. A lost connection is restored, and --follow attaches again.
    A captioner of your own (--model MODULE:FACTORY) is sent with the job, unless it is an installed package.

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
    need, parameters = None, {}
    if command:
        # So that wrong usage, and inputs that this machine knows to be missing, are found here and not in the job.
        parent = click.get_current_context().parent
        assert parent and isinstance(parent.command, click.Group)
        with parent.command.commands[command[0]].make_context(command[0], list(arguments), parent=parent) as context:
            parameters = dict(context.params)
        _refuse_missing_inputs(command[0], parameters)
        _refuse_relative_paths(command[0], parameters)
        need = _required_resources(command[0], parameters)
    from imcap_ray.distributed.cluster import jobs
    from imcap_ray.distributed.cluster.captioner_code import captioner_code

    common = {
        "address": options["address"],
        "on_interrupt": options["on_interrupt"],
        # Ray colours the lines of a job's log.
        "echo": lambda line: print_line(COLOURS.sub("", line)),
    }
    if options["follow"]:
        sys.exit(jobs.follow(options["follow"], **common))
    common |= {"submission_id": options["submission_id"], "wait": not options["no_wait"], "need": need}
    sys.exit(jobs.submit([command[0], *arguments], code=captioner_code(parameters.get("models", ())), **common))


_INPUTS = {
    "caption": {"INPUT": "input", "--model": "models", "--existing": "existing"},
    "train": {"DATA": "data", "--start-from": "start_from"},
    "evaluate": {"CAPTIONS": "captions", "REFERENCES": "references", "--against": "against"},
    "report": {"CAPTIONS": "captions", "--references": "references", "--against": "against"},
}
"""Parameters of a command that name its inputs, by the name that the user knows."""

_OUTPUTS = {
    "caption": {"OUTPUT": "output"},
    "train": {"MODEL": "model", "--features": "features"},
    "evaluate": {"--save": "save"},
    "report": {"--output": "output"},
    "demo": {"OUT": "out"},
}
"""Parameters of a command that name what it writes, by the name that the user knows."""

_OPTIONS_WITHOUT_PATHS = (
    *("--set", "--split", "--tokenizer"),
    *("--image-column", "--caption-column", "--id-column", "--model-option"),
)
"""Options whose values are no paths, although a file or folder may have the same name."""

_PROBE_SECONDS = 5.0


def _refuse_missing_inputs(command: str, parameters: Mapping[str, Any]) -> None:
    """Raise InputError for a URI at which this machine sees nothing, or from which no model can be loaded.

    A URI that this machine may not read, or that does not answer in time, is left to the job, as are paths.
    """
    for name, location in _locations(_INPUTS.get(command, {}), parameters):
        if not storage.is_uri(location):
            continue
        exists = _exists(location)
        if exists is False:
            raise InputError(f"no such {name}: {location}")
        if exists and name in ("--model", "--start-from"):
            from imcap_ray.models.model_folder import read_model_folder

            read_model_folder(location)


def _refuse_relative_paths(command: str, parameters: Mapping[str, Any]) -> None:
    """Raise InputError for a path that is still relative, because the job runs in another folder, which is not kept."""
    from imcap_ray.models.plugin import is_plugin_name

    names = _INPUTS.get(command, {}) | {"--encoder-weights": "encoder_weights"} | _OUTPUTS[command]
    for name, location in _locations(names, parameters):
        is_known = location == DEFAULT_MODEL or (name == "--model" and is_plugin_name(location))
        if not (storage.is_uri(location) or os.path.isabs(location) or is_known):
            raise InputError(
                f"{name} of a job must be an absolute path on the cluster or a URI, got {location}: the job runs in "
                "another folder, which is not kept"
            )


def _locations(names: Mapping[str, str], parameters: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The name of each path or URI that the user has given for one of these parameters, and the location."""
    for name, parameter in names.items():
        value = parameters.get(parameter) or ()
        for location in (value,) if isinstance(value, str) else value:
            yield name, location


def _exists(location: str) -> bool | None:
    """Whether the location exists; None if the store does not answer within seconds, or refuses to."""
    answers: list[bool] = []

    def probe() -> None:
        with contextlib.suppress(OSError, ImcapError):
            answers.append(storage.exists(location))

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS)
    return answers[0] if answers else None


def _required_resources(command: str, parameters: Mapping[str, Any]) -> tuple[str, float, float] | None:
    """The option that sets how much a command needs at once, and its CPUs and GPUs; None if no option does."""
    resources = resources_config(parameters)
    gpus = resources.gpus_per_worker or 0.0
    if command == "caption" and (actors := resources.num_actors):
        return f"--num-actors {actors}", actors + 2, actors * gpus
    if command == "train" and (workers := resources.num_workers):
        least = workers[0] if isinstance(workers, tuple) else workers
        return f"--num-workers {least}", least + 1, least * gpus
    return None


def _with_absolute_paths(words: Sequence[str]) -> Iterator[str]:
    """The words of a command, with paths that exist here, or that contain a slash, made absolute.

    The job runs in another folder. An option may be joined to its value by "=".
    """
    for before, word in pairwise(["", *words]):
        option, separator, value = word.partition("=") if word.startswith("-") else ("", "", word)
        if "--model" in (before, option) and value:
            yield f"{option}{separator}{_absolute_model(value)}"
        elif (
            before in _OPTIONS_WITHOUT_PATHS
            or option in _OPTIONS_WITHOUT_PATHS
            or storage.is_uri(value)
            or not (os.path.exists(value) or "/" in value)
        ):
            yield word
        else:
            yield f"{option}{separator}{os.path.abspath(os.path.expanduser(value))}"


def _absolute_model(name: str) -> str:
    """The name of a model with an absolute path, if it has one here. Another one may be a captioner of the cluster."""
    from imcap_ray.models.captioner_spec import absolute_model

    return absolute_model(name) if "/" in name or os.path.exists(name) or name.startswith("hf:") else name
