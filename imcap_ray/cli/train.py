"""`imcap train`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from imcap_ray import storage
from imcap_ray.cli.console import print_line, progress_reporter, stdout_for_results
from imcap_ray.cli.options import (
    WorkerCount,
    cluster_options,
    dataset_column_options,
    output_options,
    outside_option,
)
from imcap_ray.config import DEFAULT_MODEL, DEFAULT_RECIPE, ResourcesConfig, TrainingRunConfig
from imcap_ray.distributed.cluster.ray_environment import set_ray_environment
from imcap_ray.runs.rate import format_duration

if TYPE_CHECKING:
    from imcap_ray.distributed.training.training_plan import TrainingPlan


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
    help=f"Continue with this model: a folder, or {DEFAULT_MODEL} (the bundled one). It keeps its CNN, its decoder and "
    "its vocabulary, to which the new words of DATA are added, and its image size unless preprocessing.image_size is "
    "set. Given several times, the models' weights are averaged.",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of the weights, the order of images and the dropout."
)
@click.option(
    "--num-workers",
    type=WorkerCount(),
    help="Data-parallel processes. Default: one per GPU, or one. MIN-MAX: as many as the cluster has room for at any "
    "time; autoscaling adds no CPUs for them.",
)
@click.option("--encoder-weights", type=click.Path(), help="File with the CNN's weights, if they cannot be downloaded.")
@click.option("--features", help="Folder for cached features. Default: _features next to MODEL.")
@click.option("--allow-unusable", is_flag=True, help="Train on data that `imcap check` calls unusable.")
@click.option(
    "--dry-run", is_flag=True, help="Check everything, also every image, and print the plan. Nothing is written."
)
@dataset_column_options
@outside_option
@cluster_options
@output_options
def train(data: str, model: str, **options: Any) -> None:
    """Train on the captioned images of DATA and write the model folder MODEL.

    The format of DATA is recognised: Flickr8k or Flickr30k as distributed or from Kaggle, Karpathy's or COCO's JSON,
    Hugging Face's metadata.jsonl, images with .txt files next to them, WebDataset tars, or Parquet with captions and
    images or their paths. If a training is interrupted, the same command resumes after its last finished epoch. With a
    larger training.epochs it continues a finished training.

    MODEL/_training contains the metrics of every epoch, in metrics.jsonl and for `tensorboard --logdir MODEL`. If
    mlflow is installed and MLFLOW_TRACKING_URI is set, they are logged there too, in one run even if the training
    resumes.

    \b
    imcap train flickr8k/ runs/mine
    imcap train flickr8k/ runs/seed --recipe vgg16-lstm
    imcap train flickr8k/ runs/short --set training.epochs=3 --num-workers 2
    imcap train flickr8k/ runs/mine --dry-run
    imcap train s3://bucket/flickr8k s3://bucket/runs/mine --num-workers 2-8
    imcap train holidays/ runs/holidays --start-from flickr8k-lite2
    """
    config, resources = _build_configs(data, model, options)
    _run(config, resources, options)


def _build_configs(data: str, model: str, options: dict[str, Any]) -> tuple[TrainingRunConfig, ResourcesConfig]:
    from imcap_ray.config import load_recipe, parse_override
    from imcap_ray.models.decoders import find_decoder

    recipe = load_recipe(options["recipe"], dict(parse_override(text) for text in options["overrides"]))
    find_decoder(recipe.decoder)  # before data are read and Ray starts
    config = TrainingRunConfig(
        data=data,
        model=model,
        recipe=recipe,
        recipe_name=options["recipe"],
        recipe_options=options["overrides"],
        start_from=options["start_from"],
        seed=options["seed"],
        encoder_weights=options["encoder_weights"],
        image_column=options["image_column"],
        caption_column=options["caption_column"],
        id_column=options["id_column"],
        allow_outside_paths=options["allow_outside_paths"],
        allow_unusable=options["allow_unusable"],
    )
    resources = ResourcesConfig(
        address=options["address"],
        num_workers=options["num_workers"],
        gpus_per_worker=options["gpus_per_worker"],
        features=options["features"],
    )
    return config, resources


def _run(config: TrainingRunConfig, resources: ResourcesConfig, options: dict[str, Any]) -> None:
    from dataclasses import asdict

    set_ray_environment(options["address"], verbose=options["verbose"])
    from imcap_ray.distributed.cluster.connection import connect, refuse_relative_paths_in_job
    from imcap_ray.distributed.cluster.preflight import require_visible
    from imcap_ray.distributed.training.trainer import train as run_training
    from imcap_ray.distributed.training.training_plan import load_data, prepare_training

    written = {"MODEL": config.model} | ({"--features": resources.features} if resources.features else {})
    refuse_relative_paths_in_job(written)
    reporter = progress_reporter(quiet=options["quiet"])
    dataset = load_data(config, decode=options["dry_run"], on_progress=reporter.report_images)
    reporter.report(f"{dataset.location}: {dataset.format}, {dataset.describe_splits()}")
    if dataset.columns_note:
        reporter.report(f"{dataset.location}: {dataset.columns_note}")
    plan = result = None
    with stdout_for_results():
        cluster = connect(resources.address, verbose=options["verbose"])
        written.setdefault("--features", storage.parent(storage.absolute(config.model)))
        require_visible(
            cluster,
            reads=[("DATA", dataset.location)],
            writes={name: storage.absolute(location) for name, location in written.items()},
        )
        if options["dry_run"]:
            for note in dataset.notes:
                reporter.report(f"{dataset.location}: {note}")
            prepared = prepare_training(config, resources, data=dataset, cluster=cluster)
            if prepared.tokenizer_note:
                reporter.report(prepared.tokenizer_note)
            plan = prepared.plan()
        else:
            result = run_training(config, resources, data=dataset, cluster=cluster, reporter=reporter)
    if options["as_json"]:
        outcome: Any = plan or result
        click.echo(json.dumps(asdict(outcome)))
    elif plan:
        _print_plan(plan)
    elif result:
        reporter.report(
            f"{result.model}: kept epoch {result.metrics['epoch']} of {result.num_epochs}, validation CIDEr-D "
            f"{result.metrics['cider_d']:.3f}, BLEU-4 {100 * result.metrics['bleu_4']:.1f}; "
            f"{format_duration(result.seconds)}"
        )


def _print_plan(plan: TrainingPlan) -> None:
    images = ", ".join(f"{count:,} {split}" for split, count in plan.num_images.items())
    print_line(f"would train {plan.model} on {plan.data}: {images} images, {plan.num_captions:,} training captions")
    phases = [(phase.replace("_", " "), count) for phase, count in plan.num_epochs.items()]
    epochs = ", then ".join(f"{count} epochs of {phase}" for phase, count in phases)
    workers = plan.num_workers + (f" with {plan.gpus_per_worker:g} GPU each" if plan.gpus_per_worker else "")
    print_line(f"at most {epochs}; {plan.num_epochs_done} done; {plan.batch_size} images per batch, {workers}")
    if plan.seconds is None:
        print_line("the duration is unknown until the first epoch is done")
    else:
        print_line(
            f"at most about {format_duration(plan.seconds)}, if the remaining epochs take as long as the last one"
        )
