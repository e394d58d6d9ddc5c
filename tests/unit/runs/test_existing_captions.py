"""Runs that keep captions which images have already, without Ray: the test writes the rows of the others."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from imcap_ray.cli.main import main
from imcap_ray.config import CaptioningConfig, SearchConfig
from imcap_ray.errors import DatasetError, InputError, OutputError
from imcap_ray.runs import captions_folder
from imcap_ray.runs.captioning_run import CaptioningRun, CaptioningSummary, run_identity
from imcap_ray.runs.captions_table import open_captions
from imcap_ray.runs.existing_captions import ExistingCaptions
from imcap_ray.runs.progress_reporter import ProgressReporter
from imcap_ray.runs.status import CaptioningStatus, read_status
from tests.small_data import jpeg
from tests.unit.runs.test_captioning_run import write_rows


@pytest.fixture
def config(tmp_path: Path) -> CaptioningConfig:
    for number, name in enumerate(("a.jpg", "b.jpg", "below/a.jpg", "below/c.jpg")):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))
    return CaptioningConfig(
        input=str(tmp_path / "in"), output=str(tmp_path / "out"), existing=str(tmp_path / "texts.jsonl")
    )


def write_existing(config: CaptioningConfig, captions: Mapping[str, Sequence[str]]) -> None:
    assert config.existing
    lines = [json.dumps({"file_name": name, "captions": texts}) for name, texts in captions.items()]
    Path(config.existing).write_text("\n".join(lines))


def caption(config: CaptioningConfig, lines: list[str] | None = None) -> CaptioningSummary:
    existing = ExistingCaptions.read(config.existing) if config.existing else None
    identity = run_identity(config.input, fingerprint="a", search=SearchConfig(), existing=existing)
    reporter = ProgressReporter(None if lines is None else lines.append)
    with CaptioningRun.open(config, identity, reporter=reporter) as run:
        run.list_images(existing)
        while run.num_pending:
            write_rows(run)
            run.resolve_duplicates()
        return run.finish("by nothing")


def captions_of(config: CaptioningConfig) -> dict[str, list[str]]:
    """Return all captions of each image, and check that each image has one row."""
    rows: list[dict[str, Any]] = open_captions(config.output).to_table().to_pylist()
    assert len({row["image_id"] for row in rows}) == len(rows)
    return {row["image_id"]: row["captions"] for row in rows}


MODEL = {name: [f"says {name}"] for name in ("a.jpg", "b.jpg", "below/a.jpg", "below/c.jpg")}


def test_images_with_captions_are_not_captioned_again(config: CaptioningConfig) -> None:
    write_existing(config, {"b.jpg": ["one", "two"], "below/a.jpg": ["three"], "a.jpg": ["", " "]})

    summary = caption(config)

    assert captions_of(config) == MODEL | {"b.jpg": ["one", "two"], "below/a.jpg": ["three"]}
    assert (summary.num_images, summary.num_new, summary.num_existing) == (4, 4, 2)
    rows = open_captions(config.output).to_table().to_pylist()
    (row,) = [row for row in rows if row["image_id"] == "b.jpg"]
    assert (row["caption"], row["status"], row["caption_source"]) == ("one", "ok", "existing")
    assert math.isnan(row["confidence"]) and math.isnan(row["familiarity"])


def test_captions_of_images_that_are_not_in_the_input_are_named(config: CaptioningConfig) -> None:
    write_existing(config, {"b.jpg": ["one"], "z.jpg": ["two"]})
    lines: list[str] = []

    caption(config, lines)

    assert any(
        line.endswith("1 other image with captions there is not among those of this run: z.jpg") for line in lines
    )


def test_text_files_next_to_images_match_by_path(config: CaptioningConfig) -> None:
    below = Path(config.input) / "below"
    (below / "a.txt").write_text("one\ntwo\n")

    caption(replace(config, existing=str(below)))

    assert captions_of(config) == MODEL | {"below/a.jpg": ["one", "two"]}


def write_in(format: str, location: Path, captions: Mapping[str, str]) -> None:
    """Write captions of images in a format of `load_dataset`."""
    names, texts = list(captions), list(captions.values())
    if format == "parquet":
        pq.write_table(pa.table({"image_id": names, "caption": texts}), location)
    elif format == "csv":
        location.write_text("".join(f"{name},{text}\n" for name, text in [("image", "caption"), *captions.items()]))
    else:
        images = [{"id": number, "file_name": name} for number, name in enumerate(names)]
        annotations = [{"id": number, "image_id": number, "caption": text} for number, text in enumerate(texts)]
        location.write_text(json.dumps({"images": images, "annotations": annotations}))


@pytest.mark.parametrize("format", ["parquet", "csv", "json"])
def test_captions_are_read_in_the_formats_of_data_sets(format: str, config: CaptioningConfig, tmp_path: Path) -> None:
    write_in(format, tmp_path / f"texts.{format}", {"b.jpg": "one", "below/a.jpg": "two"})

    caption(replace(config, existing=str(tmp_path / f"texts.{format}")))

    assert captions_of(config) == MODEL | {"b.jpg": ["one"], "below/a.jpg": ["two"]}


def test_an_earlier_output_is_kept(config: CaptioningConfig, tmp_path: Path) -> None:
    write_existing(config, {"b.jpg": ["one", "two"]})
    caption(config)

    later = replace(config, existing=config.output, output=str(tmp_path / "later"))
    assert caption(later).num_existing == 4
    assert captions_of(later) == captions_of(config) == MODEL | {"b.jpg": ["one", "two"]}


def test_text_files_without_images_are_refused_in_a_line(config: CaptioningConfig, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "b.txt").write_text("one")

    with pytest.raises(DatasetError, match="texts has text files but no images: put them next to the images they cap"):
        caption(replace(config, existing=str(tmp_path / "texts")))
    assert not Path(config.output).exists()


def test_a_copy_of_an_image_with_a_caption_is_captioned_by_the_model(config: CaptioningConfig) -> None:
    (Path(config.input) / "copy.jpg").write_bytes((Path(config.input) / "b.jpg").read_bytes())
    write_existing(config, {"b.jpg": ["one"]})

    caption(config)

    assert captions_of(config) == MODEL | {"b.jpg": ["one"], "copy.jpg": ["says copy.jpg"]}


def test_a_limit_grows_over_images_with_captions(config: CaptioningConfig) -> None:
    write_existing(config, {"a.jpg": ["one"], "below/c.jpg": ["two"]})

    assert caption(replace(config, limit=2)).num_existing == 1
    assert caption(config).num_existing == 2
    assert captions_of(config) == MODEL | {"a.jpg": ["one"], "below/c.jpg": ["two"]}


def test_the_status_counts_existing_captions(config: CaptioningConfig) -> None:
    write_existing(config, {"b.jpg": ["one"], "below/a.jpg": ["two"]})
    caption(config)

    status = read_status(config.output)
    assert isinstance(status, CaptioningStatus) and status.num_existing == 2
    assert (
        "2 existing captions kept (caption_source is existing)"
        in CliRunner().invoke(main, ["status", config.output]).output
    )


def test_file_names_match_if_no_id_does(config: CaptioningConfig) -> None:
    write_existing(config, {"elsewhere/c.jpg": ["one"]})

    caption(config)

    assert captions_of(config) == MODEL | {"below/c.jpg": ["one"]}


def test_a_file_name_of_two_images_is_refused(config: CaptioningConfig) -> None:
    write_existing(config, {"elsewhere/a.jpg": ["one"]})

    with pytest.raises(InputError, match=r"'elsewhere/a.jpg' of .* may be 'a.jpg' or 'below/a.jpg' of the input"):
        caption(config)
    assert not Path(config.output).exists()


def test_other_existing_captions_are_another_run(config: CaptioningConfig) -> None:
    write_existing(config, {"b.jpg": ["one"]})
    caption(config)
    write_existing(config, {"b.jpg": ["two"]})

    with pytest.raises(OutputError, match="another set of existing captions"):
        caption(config)
    with pytest.raises(OutputError, match=r"another set of existing captions \(.*, now none\)"):
        caption(replace(config, existing=None))
    caption(replace(config, overwrite=True))
    assert captions_of(config) == MODEL | {"b.jpg": ["two"]}


@pytest.mark.parametrize("num_writes", [1, 2])
def test_a_kill_while_existing_captions_are_written_is_resumed(
    num_writes: int, config: CaptioningConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_existing(config, {"b.jpg": ["one"], "below/a.jpg": ["two"]})
    write, calls = captions_folder.write_table, []

    def write_or_die(*arguments: Any) -> None:
        write(*arguments)
        calls.append(arguments)
        if len(calls) == num_writes:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(captions_folder, "write_table", write_or_die)
        with pytest.raises(KeyboardInterrupt):
            caption(config)

    assert caption(config).num_existing == 2
    assert captions_of(config) == MODEL | {"b.jpg": ["one"], "below/a.jpg": ["two"]}


def test_a_changed_image_keeps_its_existing_caption(config: CaptioningConfig) -> None:
    write_existing(config, {"b.jpg": ["one"]})
    caption(config)
    (Path(config.input) / "b.jpg").write_bytes(jpeg(9))

    caption(config)

    assert captions_of(config) == MODEL | {"b.jpg": ["one"]}
