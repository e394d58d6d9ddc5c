"""`imcap model`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import click

from imcap_ray import storage
from imcap_ray.cli.console import print_line


@click.command()
@click.argument("model", required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def model(model: str | None, as_json: bool) -> None:
    """Describe a model: architecture, vocabulary, preprocessing, scores and size. Default: the bundled model.

    \b
    imcap model
    imcap model runs/mine --json
    """
    from dataclasses import asdict

    from imcap_ray.config import to_mapping
    from imcap_ray.models.model_folder import WEIGHTS_FILE, read_model_folder

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
