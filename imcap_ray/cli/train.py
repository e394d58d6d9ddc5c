"""`imcap train`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from imcap_ray import storage
from imcap_ray.cli.console import print_line, progress_reporter
from imcap_ray.cli.options import (
    WorkerCount,
    cluster_options,
    column_options,
    dataset_column_options,
    output_options,
    outside_option,
)
from imcap_ray.config import DEFAULT_MODEL, DEFAULT_RECIPE
from imcap_ray.distributed.ray_environment import set_ray_environment
from imcap_ray.runs.rate import format_duration

if TYPE_CHECKING:
    from imcap_ray.distributed.training_plan import TrainingPlan


def _print_training_plan(plan: TrainingPlan, options: dict[str, Any]) -> None:
    from dataclasses import asdict

    if options["as_json"]:
        click.echo(json.dumps(asdict(plan)))
        return
    images = ", ".join(f"{count:,} {split}" for split, count in plan.num_images.items())
    print_line(
        f"would train {plan.model} on {plan.data}: {images} images, {plan.num_captions:,} captions to learn from"
    )
    epochs = ", then ".join(f"{count} of {phase.replace('_', ' ')}" for phase, count in plan.num_epochs.items())
    workers = plan.num_workers + (f" with {plan.gpus_per_worker:g} GPU each" if plan.gpus_per_worker else "")
    print_line(
        f"epochs, at most: {epochs}; {plan.num_epochs_done} are done; {plan.batch_size} images a batch, {workers}"
    )
    if plan.seconds is None:
        print_line("how long an epoch takes shows only when the first is done")
    else:
        print_line(
            f"about {format_duration(plan.seconds)} at most, if the epochs that are left take what the last one took"
        )


@click.command()
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
    type=WorkerCount(),
    help="Data-parallel processes. Default: one per GPU, or one. MIN-MAX: as many as there is room for by then; "
    "no autoscaler is asked for CPUs.",
)
@click.option("--encoder-weights", type=click.Path(), help="The CNN's weights, where they cannot be downloaded.")
@click.option("--features", help="Folder for cached features. Default: _features beside MODEL.")
@click.option("--dry-run", is_flag=True, help="Check everything and say what would be done; nothing is written.")
@dataset_column_options
@outside_option
@cluster_options
@output_options
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

    set_ray_environment(options["address"], verbose=options["verbose"])
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
    dataset = load_dataset(data, columns=column_options(options), allow_outside_paths=options["allow_outside_paths"])
    for split in (TRAIN, VALIDATION):
        dataset.split(split)
    reporter = progress_reporter(quiet=options["quiet"])
    reporter.report(f"{dataset.location}: {dataset.format}, {dataset.describe_splits()}")
    if dataset.columns_note:
        reporter.report(f"{dataset.location}: {dataset.columns_note}")
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
        reporter=reporter,
    )
    if options["as_json"]:
        click.echo(json.dumps(asdict(result)))
    else:
        reporter.report(
            f"{result.model}: epoch {result.metrics['epoch']} of {result.num_epochs} kept, validation CIDEr-D "
            f"{result.metrics['cider_d']:.3f}, BLEU-4 {100 * result.metrics['bleu_4']:.1f}; "
            f"{format_duration(result.seconds)}"
        )
