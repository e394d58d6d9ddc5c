"""`imcap status`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from imcap_ray.cli.console import describe_counts, print_line
from imcap_ray.runs.rate import format_duration

if TYPE_CHECKING:
    from imcap_ray.runs.status import CaptioningStatus, TrainingStatus


@click.command()
@click.argument("output")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def status(output: str, as_json: bool) -> None:
    """Show the progress of the captioning or training run that writes to OUTPUT, from its files, without Ray.

    \b
    imcap status s3://bucket/captions
    imcap status runs/mine --json
    """
    from dataclasses import asdict

    from imcap_ray.runs.status import CaptioningStatus, read_status

    progress = read_status(output)
    if as_json:
        click.echo(json.dumps(asdict(progress)))
        return
    lines = _describe_captioning(progress) if isinstance(progress, CaptioningStatus) else _describe_training(progress)
    for line in lines:
        print_line(line)


_STATES = {
    "silent": "no heartbeat for {}: it was killed or its machine is lost; the same command resumes",
    "interrupted": "interrupted; the same command resumes",
    "failed": "stopped by an error; the same command resumes",
    "replacing": "all new rows are written and are replacing the old ones; if the run was killed, the same command "
    "finishes it",
}


def _describe_captioning(status: CaptioningStatus) -> list[str]:
    state = _STATES.get(status.state, status.state).format(format_duration(status.last_sign_seconds or 0))
    if status.is_replacing and status.state != "replacing":
        state = f"{state} (--overwrite; the old rows are kept until it is complete)"
    share = f" ({status.num_done / status.num_images:.0%})" if status.num_images else ""
    progress = f"{status.num_done:,} of {status.num_images:,} images{share}"
    if status.images_per_second is not None:
        progress += f", {status.images_per_second:.1f} images/s"
    if status.seconds_left is not None:
        progress += f", {format_duration(status.seconds_left)} left"
    lines = [f"{status.output}: {state}", progress]
    if status.waiting:
        lines.append(status.waiting)
    if status.counts:
        lines.append(describe_counts(status.counts, status.error_counts))
    if status.num_existing:
        plural = "s" * (status.num_existing != 1)
        lines.append(f"{status.num_existing:,} existing caption{plural} kept (caption_source is existing)")
    if status.num_unfamiliar:
        subject = "image is" if status.num_unfamiliar == 1 else "images are"
        lines.append(f"{status.num_unfamiliar:,} captioned {subject} unlike what the model has learned from")
    if status.state == "running":
        lines.append(f"last heartbeat {format_duration(status.last_sign_seconds or 0)} ago; started {status.started}")
    return lines


def _describe_training(status: TrainingStatus) -> list[str]:
    age = format_duration(status.last_sign_seconds or 0)
    state = _STATES.get(status.state, status.state).format(age)
    if status.state == "starting":
        state = "no epoch has ended yet"
    lines = [f"{status.model}: {state}"]
    if status.num_epochs_done:
        left = f", {format_duration(status.seconds_left)} left at most" if status.seconds_left is not None else ""
        lines.append(f"{status.num_epochs_done} of {status.num_epochs} epochs, {status.phase} phase{left}")
        lines.append(f"best: epoch {status.best_epoch}, validation CIDEr-D {status.best_cider_d:.3f}")
    if status.state in ("starting", "running"):
        lines.append(f"last heartbeat {age} ago")
    return lines
