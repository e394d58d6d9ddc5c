"""`imcap demo`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from imcap_ray.cli.caption import run_captioning
from imcap_ray.cli.console import describe_guess, print_line, progress_reporter
from imcap_ray.cli.options import model_option, model_option_option
from imcap_ray.config import CaptioningConfig, ResourcesConfig
from imcap_ray.data.schemas import UNFAMILIAR


@click.command()
@click.argument("out", default="imcap-demo")
@model_option
@model_option_option
def demo(out: str, models: tuple[str, ...], model_options: tuple[tuple[str, str], ...]) -> None:
    """Caption sample photographs; write Parquet files and report.html to OUT."""
    import shutil

    from imcap_ray.cli.demo_images import sample_photographs
    from imcap_ray.reports.captions_report import write_captions_report
    from imcap_ray.runs.captions_table import open_captions

    photographs = Path(out, "photographs")
    photographs.mkdir(parents=True, exist_ok=True)
    samples = sample_photographs()
    for sample in samples:
        shutil.copyfile(sample.path, photographs / sample.file_name)
    captions = str(Path(out, "captions"))
    config = CaptioningConfig(
        input=str(photographs), output=captions, models=models, model_options=model_options, max_failure_rate=0.0
    )
    run_captioning(config, ResourcesConfig(address="local"), reporter=progress_reporter())
    rows = {row["image_id"]: row for row in open_captions(captions).to_table().to_pylist()}
    # The most familiar first; NaN, if a captioner does not know, would leave the order to chance.
    for row in sorted((rows[sample.file_name] for sample in samples), key=_unfamiliarity):
        guess = f"  {describe_guess(row['familiarity'])}" if row["familiarity"] < UNFAMILIAR else ""
        print_line(f"{row['image_id']:24} {row['caption']}  {_describe_confidence(row)}{guess}")
    report = str(Path(out, "report.html"))
    write_captions_report(captions, report)
    print_line(f"open {report} in a browser")


def _unfamiliarity(row: Mapping[str, Any]) -> float:
    return 0.0 if math.isnan(row["familiarity"]) else -row["familiarity"]


def _describe_confidence(row: Mapping[str, Any]) -> str:
    return "" if math.isnan(row["confidence"]) else f"({row['confidence']:.2f})"
