"""`imcap caption`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from imcap_ray import storage
from imcap_ray.cli.console import describe_counts, print_line, progress_reporter
from imcap_ray.cli.options import (
    cluster_options,
    column_options,
    id_column_option,
    image_column_option,
    model_options,
    output_options,
    outside_option,
)
from imcap_ray.config import DEFAULT_MODEL
from imcap_ray.errors import InputError
from imcap_ray.runs.rate import format_duration

if TYPE_CHECKING:
    from imcap_ray.distributed.captioning import CaptioningPlan, CaptioningSummary
    from imcap_ray.runs.progress_reporter import ProgressReporter


@click.command()
@click.argument("input")
@click.argument("output", required=False)
@model_options
@click.option("--recursive/--no-recursive", default=True, help="Folders below INPUT too.")
@click.option("--limit", type=click.IntRange(1), help="Only the first N images.")
@click.option("--num-actors", type=click.IntRange(1), help="Processes with a model. Default: one per GPU, or per core.")
@click.option("--batch-size", type=click.IntRange(1), help="Images an actor takes at a time.")
@click.option("--overwrite", is_flag=True, help="Start again; the old rows are removed when the new ones are complete.")
@click.option("--retry-failed", is_flag=True, help="Caption the images that failed before once more.")
@click.option(
    "--max-failure-rate",
    type=click.FloatRange(0, 1),
    default=0.1,
    show_default=True,
    help="Share of images that may fail before the exit code is 3.",
)
@click.option("--dry-run", is_flag=True, help="Check everything, say what would be done, and stop there.")
@image_column_option
@id_column_option
@outside_option
@cluster_options
@output_options
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
    if options["dry_run"]:
        _print_plan(plan(input, output, options), options)
        return
    summary = run_captioning(input, output, options, reporter=progress_reporter(quiet=options["quiet"]))
    _print_summary(summary, options)


def _print_caption(image: str, options: dict[str, Any]) -> None:
    from imcap_ray.errors import ImageError
    from imcap_ray.models.caption import no_memory
    from imcap_ray.models.captioner import load_captioner

    storage.refuse_secrets(image)
    if storage.is_folder(image):
        raise InputError(f"{image} is a folder: say where the captions go, imcap caption {image} OUTPUT")
    captioner = load_captioner(options["models"], search=_search(options), encoder_weights=options["encoder_weights"])
    if options["gpus_per_worker"]:
        captioner.require_gpu()
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
            print_line(one.text)


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
    reporter: ProgressReporter,
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
        reporter=reporter,
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
        "columns": column_options(options),
        "allow_outside_paths": options["allow_outside_paths"],
    }
    return arguments, models


def _print_plan(plan: CaptioningPlan, options: dict[str, Any]) -> None:
    from dataclasses import asdict

    if options["as_json"]:
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
        print_line(f"{work}; no run into this output tells a speed yet, one with --limit 1000 would")
    else:
        speed = f"{plan.images_per_second:.1f} images/s, as the last run there"
        print_line(f"{work}; about {format_duration(plan.seconds)}{more} at {speed}")


def _print_summary(summary: CaptioningSummary, options: dict[str, Any]) -> None:
    from dataclasses import asdict

    if options["as_json"]:
        click.echo(json.dumps(asdict(summary)))
        return
    if options["quiet"]:
        return
    counts = describe_counts(summary.counts, summary.error_counts)
    if summary.num_new:
        speed = f"{summary.images_per_second:.1f} images/s in {format_duration(summary.seconds)}; {summary.bound}"
    else:
        speed = "nothing to do, all were done before"
    print_line(f"{summary.output}: {counts}; {speed}", err=True)
