"""`imcap model`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import click

from imcap_ray import storage
from imcap_ray.cli.console import print_line
from imcap_ray.cli.options import model_option_option
from imcap_ray.errors import ImcapError, InputError


@click.command()
@click.argument("model", required=False)
@click.argument("checked", required=False, metavar="")
@model_option_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def model(model: str | None, checked: str | None, model_options: tuple[tuple[str, str], ...], as_json: bool) -> None:
    """Describe a model: architecture, vocabulary, preprocessing, scores and size. Default: the bundled model.

    With `check`, load any captioner that `imcap caption --model` takes, let it caption odd images, and report what is
    wrong with it. Exit code 1: something is.

    \b
    imcap model
    imcap model runs/mine --json
    imcap model check brightness:Brightness
    """
    if model == "check":
        _check(checked, dict(model_options), as_json=as_json)
        return
    if checked or model_options:
        raise InputError("imcap model describes one model folder; other captioners: imcap model check NAME")
    from dataclasses import asdict

    from imcap_ray.config import to_mapping
    from imcap_ray.models.model_files import WEIGHTS_FILE
    from imcap_ray.models.model_folder import read_model_folder

    folder = read_model_folder(model)
    facts = {
        "location": folder.location,
        "fingerprint": folder.fingerprint_in(folder.precision),
        "encoder": to_mapping(folder.encoder),
        "encoder_weights": asdict(folder.encoder_weights),
        "preprocessing": to_mapping(folder.preprocessing),
        "decoder": to_mapping(folder.decoder),
        "parameters": sum(tensor.numel() for tensor in folder.tensors.values()),
        "size_bytes": storage.describe_file(storage.join(folder.location, WEIGHTS_FILE)).size,
        "vocabulary": {"tokens": len(folder.vocabulary), "tokenizer": folder.vocabulary.tokenizer},
        "search": to_mapping(folder.search),
        "precision": folder.precision,
        "int8": "available" if folder.int8 else "not available: see imcap quantize",
        "familiarity": "known" if folder.familiarity else "unknown: this model cannot tell unfamiliar images",
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
        print_line(f"{name + ':':17}{value:,}" if isinstance(value, int) else f"{name + ':':17}{value}")
    for line in _describe_scores(folder.metrics):
        print_line(line)


def _check(name: str | None, options: Mapping[str, str], *, as_json: bool) -> None:
    """Print the faults of a captioner; exit code 1 if it has some."""
    from dataclasses import asdict

    from imcap_ray.models.captioner_check import check_captioner
    from imcap_ray.models.captioner_spec import absolute_model

    if not name:
        raise InputError("imcap model check takes the name of a captioner, such as runs/mine or MODULE:FACTORY")
    check = check_captioner(absolute_model(name), options)
    if as_json:
        click.echo(json.dumps(asdict(check)))
    else:
        for fault in check.faults:
            print_line(f"{name}: {fault}")
        if not check.faults:
            milliseconds, megabytes = 1000 * check.seconds_per_image, check.peak_bytes / 1e6
            print_line(f"{name}: no fault; {milliseconds:,.1f} ms per image, {megabytes:,.0f} MB of memory")
    if check.faults:
        sys.exit(ImcapError.exit_code)


def _describe_scores(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Yield the scores that the training measured, and why `imcap evaluate` may give others."""
    from imcap_ray.scoring.metrics import SCORE_FORMATS

    epoch = metrics.get("validation")
    values = epoch if isinstance(epoch, dict) else {}
    scores = ", ".join(
        f"{label} {factor * values[name]:{form}}"
        for name, (label, factor, form) in SCORE_FORMATS.items()
        if isinstance(values.get(name), float)
    )
    if not scores:
        yield f"{'scores:':17}unknown"
        return
    yield f"{'scores:':17}{scores}, on {values.get('num_images', '?')} validation images"
    yield (
        f"{'':17}measured by `imcap train`, with weights in float32; those in the folder are rounded, so the scores of "
        "`imcap evaluate` may differ slightly"
    )
