"""Options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from imcap_ray.config import DEFAULT_MODEL

if TYPE_CHECKING:
    from imcap_ray.data.columns import ColumnOptions

Command = TypeVar("Command", bound=Callable[..., Any])


class WorkerCount(click.ParamType):  # type: ignore[type-arg]
    """How many workers a training has: N, or MIN-MAX where their number may change."""

    name = "N|MIN-MAX"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | tuple[int, int]:
        """N, or the pair of MIN-MAX."""
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", str(value))
        least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 1 <= least <= most:
            self.fail(f"expected a number of at least 1, or two as in 1-4, got {value}", param, ctx)
        return (least, most) if found and found[2] else least


VERBOSE_KEY = "imcap.verbose"
"""Where a command's contexts keep that -v was given."""


def _note_verbose(ctx: click.Context, parameter: click.Parameter, value: bool) -> bool:
    ctx.meta[VERBOSE_KEY] = value
    return value


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


cluster_options = _options(
    click.option("--address", help="A running Ray: HOST:PORT or auto. Default: RAY_ADDRESS, else this machine alone."),
    click.option(
        "--gpus-per-worker", type=click.FloatRange(0), help="GPUs of each process. Default: 1 where there are any."
    ),
    click.option(
        "-v", "--verbose", is_flag=True, callback=_note_verbose, help="Ray's own messages and tracebacks too."
    ),
)

model_options = _options(
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

outside_option = click.option(
    "--allow-outside-paths",
    is_flag=True,
    help="Paths in tables and lists may lead out of the folder of the data; else they are refused.",
)

image_column_option = click.option(
    "--image-column",
    metavar="NAME",
    help="Parquet: the column of images (bytes, paths, or structs of both). Default: by its name and values.",
)

_caption_column_option = click.option(
    "--caption-column", metavar="NAME", help="Parquet: the column of captions (text, or lists of it). Default: by name."
)

id_column_option = click.option(
    "--id-column", metavar="NAME", help="Parquet: the column of image ids. Default: by its name."
)

dataset_column_options = _options(image_column_option, _caption_column_option, id_column_option)


def column_options(options: Mapping[str, Any]) -> ColumnOptions:
    """The columns that the user named."""
    from imcap_ray.data.columns import ColumnOptions

    return ColumnOptions(
        image=options.get("image_column"), caption=options.get("caption_column"), id=options.get("id_column")
    )


output_options = _options(
    click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout and nothing else there."),
    click.option("-q", "--quiet", is_flag=True, help="Errors only."),
)

split_option = click.option(
    "--split", type=click.Choice(["train", "validation", "test"]), help="Default: the one the captions are of."
)

tokenizer_option = click.option(
    "--tokenizer",
    type=click.Choice(["ptb", "unicode", "seed"]),
    default="ptb",
    show_default=True,
    help="What counts as a word: ptb for English, unicode for other languages, seed as the Keras tutorials clean it.",
)


def parse_size(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, int]:
    """WIDTHxHEIGHT in pixels."""
    match = re.fullmatch(r"(\d+)x(\d+)", value)
    if not match or not all(0 < int(side) <= 10_000 for side in match.groups()):
        raise click.BadParameter(f"expected WIDTHxHEIGHT in pixels, got {value!r}")
    return int(match[1]), int(match[2])
