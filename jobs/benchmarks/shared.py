"""What several benchmarks use: the --json option, printing a result, and decoding without shortcuts."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import click
import numpy as np
from PIL import Image

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")


def show(result: Mapping[str, Any], as_json: bool) -> None:
    """Print a result as JSON, or name by name."""
    if as_json:
        click.echo(json.dumps(result))
        return
    for name, value in result.items():
        click.echo(f"{name:22} {json.dumps(value) if isinstance(value, dict | list) else value}")


def require_rate(rate: float | None) -> float:
    """The rate of a run, or an error if the run was too short to have a steady one."""
    if rate is None:
        raise click.ClickException("the run was too short for a steady rate: take more --images")
    return rate


def decode_whole(data: bytes, image_size: int) -> np.ndarray[Any, Any]:
    """Decode all pixels of an image with Pillow, then resize: what imcap does in fewer steps for large JPEGs."""
    with Image.open(io.BytesIO(data)) as image:
        squashed = image.convert("RGB").resize((image_size, image_size), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(squashed).transpose(2, 0, 1))
