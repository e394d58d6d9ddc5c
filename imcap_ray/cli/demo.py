"""`imcap demo`."""

from __future__ import annotations

from pathlib import Path

import click

from imcap_ray.cli.caption import run_captioning
from imcap_ray.cli.console import print_line, progress_reporter


@click.command()
@click.argument("out", default="imcap-demo")
def demo(out: str) -> None:
    """Caption the sample photographs with the model that comes with the package; OUT gets Parquet and report.html."""
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
    options = dict.fromkeys(
        (
            "encoder_weights",
            "beam_size",
            "max_length",
            "length_penalty",
            "num_captions",
            "limit",
            "num_actors",
            "batch_size",
            "gpus_per_worker",
        )
    )
    options |= {
        "models": (),
        "overwrite": False,
        "retry_failed": False,
        "allow_outside_paths": False,
        "recursive": True,
        "max_failure_rate": 0.0,
        "address": "local",
        "verbose": False,
        "quiet": False,
    }
    summary = run_captioning(str(photographs), captions, options, reporter=progress_reporter())
    rows = {row["image_id"]: row for row in open_captions(captions).to_table().to_pylist()}
    for sample in samples:
        row = rows[sample.file_name]
        print_line(f"{sample.file_name:24} {row['caption']}  ({row['confidence']:.2f})")
    report_path = write_captions_report(captions, str(Path(out, "report.html"))).path
    print_line(f"{summary.output}: {summary.num_images} rows of Parquet; {report_path}: the report")
