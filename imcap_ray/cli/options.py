"""Options that several commands share."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from imcap_ray.config import AUTO, DEFAULT_MODEL, PRECISIONS, CaptioningConfig, ResourcesConfig
from imcap_ray.data.field_names import CAPTION_NAMES, IMAGE_NAMES

if TYPE_CHECKING:
    from imcap_ray.data.columns import ColumnOptions

Command = TypeVar("Command", bound=Callable[..., Any])


class WorkerCount(click.ParamType):  # type: ignore[type-arg]
    """The number of training workers: N, or MIN-MAX if it may change."""

    name = "N|MIN-MAX"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | tuple[int, int]:
        """N, or the pair of MIN-MAX."""
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", str(value))
        least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= least <= most:
            self.fail(f"expected a number of at least 1, or a range such as 1-4, got {value}", param, ctx)
        return (least, most) if match and match[2] else least


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
    click.option("--address", help="Ray cluster: HOST:PORT or auto. Default: RAY_ADDRESS, otherwise this machine."),
    click.option(
        "--gpus-per-worker", type=click.FloatRange(0), metavar="N", help="GPUs per process. Default: 1 if any."
    ),
    click.option(
        "-v", "--verbose", is_flag=True, callback=_note_verbose, help="Show Ray's own messages and tracebacks."
    ),
)


def _parse_model_options(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> tuple[tuple[str, str], ...]:
    """KEY=VALUE, each key once."""
    pairs = [value.partition("=") for value in values]
    for value, (name, separator, _) in zip(values, pairs, strict=True):
        if not separator or not name.isidentifier():
            raise click.BadParameter(f"expected KEY=VALUE with a name as KEY, got {value!r}")
        if [key for key, _, _ in pairs].count(name) > 1:
            raise click.BadParameter(f"{name} is given more than once")
    return tuple((name, value) for name, _, value in pairs)


model_option = click.option(
    "--model",
    "models",
    multiple=True,
    help=f"Model folder (repeat for an ensemble), hf:OWNER/NAME, or MODULE:FACTORY. Default: {DEFAULT_MODEL}.",
)

model_option_option = click.option(
    "--model-option",
    "model_options",
    multiple=True,
    metavar="KEY=VALUE",
    callback=_parse_model_options,
    help="For the factory of such a captioner.",
)

precision_option = click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default=AUTO,
    help="Of the computation. Default: as the model folder says; see imcap quantize.",
)

model_options = _options(
    model_option,
    model_option_option,
    precision_option,
    click.option("--encoder-weights", type=click.Path(), help="The CNN's weights, instead of a download."),
    click.option("--beam-size", type=click.IntRange(1), metavar="N", help="Beam width; 1 is greedy search."),
    click.option("--max-length", type=click.IntRange(1), metavar="N", help="Longest caption, in words."),
    click.option(
        "--length-penalty", type=click.FloatRange(0), metavar="P", help="Exponent of the length normalization."
    ),
    click.option("--num-captions", type=click.IntRange(1), metavar="N", help="Captions per image, the best first."),
)

outside_option = click.option(
    "--allow-outside-paths", is_flag=True, help="Tables may name files elsewhere, also by URL."
)

image_column_option = click.option("--image-column", metavar="NAME", help="Parquet column with the images.")

id_column_option = click.option("--id-column", metavar="NAME", help="Parquet column with the image ids.")

dataset_column_options = _options(
    click.option(
        "--image-column",
        metavar="NAME",
        help=f"Column of a Parquet, CSV or TSV table with the images. Usual names in CSV and TSV: {IMAGE_NAMES}.",
    ),
    click.option(
        "--caption-column",
        metavar="NAME",
        help=f"Column of such a table with the captions. Usual names: {CAPTION_NAMES}.",
    ),
    id_column_option,
)


def column_options(options: Mapping[str, Any]) -> ColumnOptions:
    """The columns that the user named."""
    from imcap_ray.data.columns import ColumnOptions

    return ColumnOptions(
        image=options.get("image_column"), caption=options.get("caption_column"), id=options.get("id_column")
    )


def captioning_config(input: str, output: str, options: Mapping[str, Any]) -> CaptioningConfig:
    """The config of a captioning, from the values of its options."""
    names = {field.name for field in dataclasses.fields(CaptioningConfig)} & options.keys() - {"models"}
    values = {name: options[name] for name in names}
    return CaptioningConfig(input=input, output=output, models=tuple(options["models"]), **values)


def resources_config(options: Mapping[str, Any]) -> ResourcesConfig:
    """What a command runs on, from the values of its options."""
    names = {field.name for field in dataclasses.fields(ResourcesConfig)} & options.keys()
    return ResourcesConfig(**{name: options[name] for name in names})


output_options = _options(
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout."),
    click.option("-q", "--quiet", is_flag=True, help="Print errors only."),
)

split_option = click.option(
    "--split",
    type=click.Choice(["train", "validation", "test", "all"]),
    help="Default: the split that was captioned; test if several were.",
)

tokenizer_option = click.option(
    "--tokenizer",
    type=click.Choice([AUTO, "ptb", "unicode", "arabic", "jieba", "seed"]),
    default=AUTO,
    show_default=True,
    help="How captions are split into words: ptb for English; unicode for other languages (Chinese by character); "
    "arabic with normalised letters; jieba for Chinese words (needs imcap_ray[chinese]); seed as in the Keras "
    "tutorials. auto: ptb or unicode, by the language of the references.",
)


def parse_size(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, int]:
    """WIDTHxHEIGHT in pixels."""
    match = re.fullmatch(r"(\d+)x(\d+)", value)
    if not match or not all(0 < int(side) <= 10_000 for side in match.groups()):
        raise click.BadParameter(f"expected WIDTHxHEIGHT in pixels, got {value!r}")
    return int(match[1]), int(match[2])
