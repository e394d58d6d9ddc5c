"""`imcap caption`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from imcap_ray import storage
from imcap_ray.cli.console import describe_counts, describe_guess, print_line, progress_reporter, stdout_for_results
from imcap_ray.cli.options import (
    captioning_config,
    cluster_options,
    id_column_option,
    image_column_option,
    model_options,
    output_options,
    outside_option,
    resources_config,
)
from imcap_ray.config import CaptioningConfig, ResourcesConfig
from imcap_ray.data.schemas import FAILED, UNFAMILIAR
from imcap_ray.distributed.cluster.ray_environment import means_own_ray, set_ray_environment
from imcap_ray.errors import InputError
from imcap_ray.runs.progress_reporter import ProgressReporter
from imcap_ray.runs.rate import MIN_IMAGES, format_duration
from imcap_ray.web import is_web

if TYPE_CHECKING:
    from imcap_ray.distributed.captioning import CaptioningPlan
    from imcap_ray.distributed.cluster.connection import ClusterResources
    from imcap_ray.models.caption import ImageCaptioner
    from imcap_ray.runs.captioning_run import CaptioningSummary

_EPILOG = """INPUT is a folder, an image, Parquet or WebDataset tars. Every image becomes exactly one row of
OUTPUT/*.parquet: its caption and confidence, or an error code. The same command again resumes, and captions new and
changed images.

--existing takes text files next to images, JSON lines, COCO's JSON, tables, or an earlier OUTPUT. Images match by path
or id, or by file name if none does. Their rows have status ok, caption_source existing and no confidence. They are not
read, so width, height, format and sha256 are unknown (0 or empty), a broken image keeps its caption, and a copy of such
an image under another name is captioned by the model. About 1 KB of memory each.

Exit codes: 0 done, 1 failed (the same command resumes), 2 wrong usage or input, 3 too many failed images.
See "When things break" in the README.

\b
imcap caption ~/Pictures captions/
imcap caption one.jpg two.jpg"""


@click.command(epilog=_EPILOG)
@click.argument("input")
@click.argument("output", required=False)
@click.argument("more_images", nargs=-1, metavar="")
@model_options
@click.option("--recursive/--no-recursive", default=True, help="Include folders below INPUT.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Caption only the first N images.")
@click.option(
    "--existing",
    metavar="CAPTIONS",
    help="Captions that images have already, as imcap train reads them, or an earlier OUTPUT: kept, and only the rest "
    "is captioned.",
)
@click.option("--num-actors", type=click.IntRange(1), metavar="N", help="Processes. Default: 1 per GPU or core.")
@click.option("--batch-size", type=click.IntRange(1), metavar="N", help="Images an actor takes at a time.")
@click.option(
    "--batch-timeout",
    type=click.FloatRange(0, 86_400, min_open=True),
    metavar="SECONDS",
    help="Longest time for a batch; images that take longer alone fail.",
)
@click.option("--overwrite", is_flag=True, help="Start again; old rows stay until the end.")
@click.option("--retry-failed", is_flag=True, help="Caption images again that failed before.")
@click.option("--prune", is_flag=True, help="Remove rows of images that left INPUT.")
@click.option(
    "--max-failure-rate",
    type=click.FloatRange(0, 1),
    metavar="SHARE",
    default=0.1,
    help="Above: exit code 3. Default: 0.1.",
)
@click.option("--dry-run", is_flag=True, help="Check everything, print the plan, and stop.")
@image_column_option
@id_column_option
@outside_option
@cluster_options
@output_options
def caption(input: str, output: str | None, more_images: tuple[str, ...], **options: Any) -> None:
    """Caption the images of INPUT into Parquet in OUTPUT, or print captions."""
    if output and (more_images or _is_image(output)):
        images, output = [input, output, *more_images], None
        if others := [path for path in images if not _is_image(path)]:
            storage.refuse_secrets(others[0])
            raise InputError(f"expected INPUT and OUTPUT, or only images: {others[0]} is not an image")
    else:
        images = [input]
    config, resources = captioning_config(input, output or "", options), resources_config(options)
    if output is None and config.existing:
        raise InputError("--existing needs an OUTPUT: imcap caption INPUT OUTPUT --existing CAPTIONS")
    if output is None:
        _print_captions(images, config, resources, as_json=options["as_json"])
    elif options["dry_run"]:
        plan = plan_run(config, resources, verbose=options["verbose"])
        _print_plan(plan, as_json=options["as_json"])
    else:
        reporter = progress_reporter(quiet=options["quiet"])
        any_failures = replace(config, max_failure_rate=1.0)  # the summary is printed in any case
        summary = run_captioning(any_failures, resources, reporter=reporter, verbose=options["verbose"])
        _print_summary(summary, as_json=options["as_json"], quiet=options["quiet"])
        summary.require_few_failures(config.max_failure_rate)


def _is_image(path: str) -> bool:
    """Whether a path is that of an image rather than of an OUTPUT, which may not exist yet."""
    from imcap_ray.data.image_formats import is_image_name

    if is_web(path):
        return True
    if not storage.is_uri(path) and os.path.exists(path):
        return os.path.isfile(path)
    return is_image_name(path)


def _print_captions(
    images: Sequence[str], config: CaptioningConfig, resources: ResourcesConfig, *, as_json: bool
) -> None:
    """Print captions of images without a run; each with the image's path if there are several."""
    from imcap_ray.errors import ImageError
    from imcap_ray.models.captioner_spec import CaptionerSpec, absolute_model, caption_files

    for image in images:
        storage.refuse_secrets(image)
        if not is_web(image) and storage.is_folder(image):
            raise InputError(f"{image} is a folder: say where the captions go, imcap caption {image} OUTPUT")
    captioner = CaptionerSpec.of(replace(config, models=tuple(map(absolute_model, config.models))))()
    captioner.start(gpus=resources.gpus_per_worker or 0)
    results = caption_files(captioner, images)
    errors: list[str] = []
    rows: list[dict[str, Any]] = []
    for image, result in zip(images, results, strict=True):
        if isinstance(result, ImageError):
            errors.append(f"{image}: {result.message} ({result.code})")
            rows.append({"image": image, "error_code": result.code, "error_message": result.message})
            continue
        captions = [{"caption": caption.text, "confidence": _known(caption.confidence)} for caption in result]
        familiarity = _known(result[0].familiarity)
        rows.append({"image": image, **captions[0], "familiarity": familiarity, "captions": captions})
        if familiarity is not None and familiarity < UNFAMILIAR:
            print_line(f"{image}: {describe_guess(familiarity)}", err=True)
        if not as_json:
            for caption in result:
                print_line(f"{image}: {caption.text}" if len(images) > 1 else caption.text)
    if as_json and len(images) > 1:
        click.echo(json.dumps({"images": rows}))
    elif as_json and not errors:
        click.echo(json.dumps({name: value for name, value in rows[0].items() if name != "image"}))
    if errors:
        raise InputError("; ".join(errors))


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def run_captioning(
    config: CaptioningConfig, resources: ResourcesConfig, *, reporter: ProgressReporter, verbose: bool = False
) -> CaptioningSummary:
    """Connect, load, caption."""
    with stdout_for_results():
        start = _start(config, resources, verbose=verbose)
    from imcap_ray.distributed.captioning import caption_images
    from imcap_ray.models.captioner_spec import CaptionerSpec

    with stdout_for_results():
        return caption_images(
            start.config,
            resources,
            cluster=start.cluster,
            load_captioner=replace(CaptionerSpec.of(start.config), fingerprint=start.captioner.fingerprint),
            captioner=start.captioner,
            reporter=reporter,
        )


def plan_run(config: CaptioningConfig, resources: ResourcesConfig, *, verbose: bool = False) -> CaptioningPlan:
    """Connect, load, and plan what `run_captioning` would do."""
    with stdout_for_results():
        start = _start(config, resources, verbose=verbose)
        from imcap_ray.distributed.captioning import plan_captioning

        return plan_captioning(start.config, resources, cluster=start.cluster, captioner=start.captioner)


class _Start(NamedTuple):
    config: CaptioningConfig
    """With absolute paths."""
    cluster: ClusterResources
    captioner: ImageCaptioner


def _start(config: CaptioningConfig, resources: ResourcesConfig, *, verbose: bool) -> _Start:
    """Connect to a cluster that can reach everything in the config, and load the captioner."""
    set_ray_environment(resources.address, verbose=verbose)
    from imcap_ray.distributed.captioning import connect_and_load
    from imcap_ray.distributed.cluster.captioner_code import captioner_code
    from imcap_ray.distributed.cluster.connection import is_ray_job, refuse_relative_paths_in_job
    from imcap_ray.distributed.cluster.preflight import ADVICE, require_visible
    from imcap_ray.models.captioner_spec import CaptionerSpec, absolute_model, model_paths
    from imcap_ray.models.plugin import is_plugin_name

    refuse_relative_paths_in_job({"OUTPUT": config.output})
    config = replace(
        config,
        input=storage.absolute(config.input),
        output=storage.absolute(config.output),
        existing=config.existing and storage.absolute(config.existing),
        models=tuple(map(absolute_model, config.models)),
        encoder_weights=config.encoder_weights and storage.absolute(config.encoder_weights),
    )
    if not storage.exists(config.input):
        where = f" on the cluster: {config.input}: {ADVICE}" if is_ray_job() else f": {config.input}"
        raise InputError(f"no such input{where}")
    modules = () if means_own_ray(resources.address) else captioner_code(config.models).modules
    cluster, captioner = connect_and_load(CaptionerSpec.of(config), resources, modules=modules, verbose=verbose)
    reads = [("INPUT", config.input), *(("--model", path) for path in model_paths(config.models))]
    if config.encoder_weights:
        reads.append(("--encoder-weights", config.encoder_weights))
    plugins = [(name, config.model_options) for name in config.models if is_plugin_name(name)]
    require_visible(cluster, reads=reads, writes={"OUTPUT": config.output}, plugins=plugins)
    return _Start(config, cluster, captioner)


def _print_plan(plan: CaptioningPlan, *, as_json: bool) -> None:
    from dataclasses import asdict

    if as_json:
        click.echo(json.dumps(asdict(plan)))
        return
    more = "" if plan.is_counted else " at least"
    print_line(
        f"would caption {plan.input} into {plan.output}: {plan.num_images:,} images{more}, {plan.num_done:,} are done"
    )
    for note in plan.notes:
        print_line(note)
    work = f"{plan.num_blocks:,} block{'s' * (plan.num_blocks != 1)}"
    work += f", {plan.num_actors} actor{'s' * (plan.num_actors != 1)}"
    if plan.gpus_per_actor:
        work += f" with {plan.gpus_per_actor:g} GPU each"
    if plan.seconds is None:
        print_line(f"{work}; the speed is known after a first run of {MIN_IMAGES} images or more, such as --limit 1000")
    else:
        speed = f"{plan.images_per_second:.1f} images/s, as the last run there"
        print_line(f"{work}; about {format_duration(plan.seconds)}{more} at {speed}")


def _print_summary(summary: CaptioningSummary, *, as_json: bool, quiet: bool) -> None:
    from dataclasses import asdict

    if as_json:
        click.echo(json.dumps(asdict(summary)))
        return
    if quiet:
        return
    counts = describe_counts(summary.counts, summary.error_counts)
    if summary.num_new:
        rate = summary.images_per_second
        speed = "" if rate is None else f"{rate:.1f} images/s once the model was loaded, "
        speed += f"{format_duration(summary.seconds)} in all; {summary.bound}"
    else:
        speed = "nothing to do, all were done before"
    if summary.num_existing:
        plural = "s" * (summary.num_existing != 1)
        print_line(f"{summary.num_existing:,} existing caption{plural} kept (caption_source is existing)", err=True)
    for line in _describe_familiarity(summary):
        print_line(line, err=True)
    print_line(f"{summary.output}: {counts}; {speed}", err=True)


def _describe_familiarity(summary: CaptioningSummary) -> Iterator[str]:
    num_captioned = summary.num_images - summary.counts.get(FAILED, 0) - summary.num_existing
    if summary.num_unfamiliar is None and num_captioned:
        yield (
            "familiarity: unknown (another captioner, a model or output of an earlier version, or a model trained on "
            "very few images)"
        )
    elif summary.num_unfamiliar:
        verb = "is" if summary.num_unfamiliar == 1 else "are"
        yield (
            f"{summary.num_unfamiliar:,} of {num_captioned:,} captioned images {verb} unlike what this model has "
            f"learned from (familiarity below {UNFAMILIAR:g}): their captions are guesses; training on your own "
            "images helps: imcap train"
        )
