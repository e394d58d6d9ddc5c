"""`imcap demo`."""

from __future__ import annotations

from pathlib import Path

import click

from imcap_ray.cli.caption import run_captioning
from imcap_ray.cli.console import describe_guess, print_line, progress_reporter
from imcap_ray.config import CaptioningConfig, ResourcesConfig
from imcap_ray.data.schemas import UNFAMILIAR


@click.command()
@click.argument("out", default="imcap-demo")
def demo(out: str) -> None:
    """Caption sample photographs with the package's model; write Parquet files and report.html to OUT."""
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
    config = CaptioningConfig(input=str(photographs), output=captions, max_failure_rate=0.0)
    run_captioning(config, ResourcesConfig(address="local"), reporter=progress_reporter())
    rows = {row["image_id"]: row for row in open_captions(captions).to_table().to_pylist()}
    for sample in sorted(samples, key=lambda sample: -rows[sample.file_name]["familiarity"]):
        row = rows[sample.file_name]
        guess = f"  {describe_guess(row['familiarity'])}" if row["familiarity"] < UNFAMILIAR else ""
        print_line(f"{sample.file_name:24} {row['caption']}  ({row['confidence']:.2f}){guess}")
    report = str(Path(out, "report.html"))
    write_captions_report(captions, report)
    print_line(f"open {report} in a browser")
