"""Captions of two captioners next to each other, with their differences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from imcap_ray.cli.main import main
from imcap_ray.data.schemas import CAPTIONS_SCHEMA
from imcap_ray.reports.comparison import Part, mark_differences, measure_difference
from tests.unit.reports.test_html_report import Page, failed, ok

ARABIC = "رجل يركب دراجة حمراء", "رجل يركب دراجة زرقاء"


def marked(caption: str, other: str) -> tuple[list[str], list[str]]:
    """The marked parts of both captions."""
    own, others = mark_differences(caption, other)
    return [part.text for part in own if part.differs], [part.text for part in others if part.differs]


@pytest.mark.parametrize(
    ("caption", "other", "expected"),
    [
        ("a dog runs on grass", "a brown dog runs", (["on grass"], ["brown"])),
        ("a dog runs on grass", "a cat sits on grass", (["dog runs"], ["cat sits"])),
        ("A dog, running.", "a dog running", ([], [])),
        ("dogs", "", (["dogs"], [])),
        (*ARABIC, (["حمراء"], ["زرقاء"])),
        ("一只狗在草地上", "两只狗在草地上", (["一"], ["两"])),
    ],
)
def test_words_that_differ_are_marked(caption: str, other: str, expected: tuple[list[str], list[str]]) -> None:
    assert marked(caption, other) == expected


@given(st.text(), st.text())
def test_the_parts_of_a_caption_are_the_caption(caption: str, other: str) -> None:
    for parts, whole in zip(mark_differences(caption, other), (caption, other), strict=True):
        assert "".join(part.text for part in parts) == whole


@given(st.text())
def test_a_caption_does_not_differ_from_itself(caption: str) -> None:
    assert mark_differences(caption, caption)[0] == [Part(caption, False)]
    assert measure_difference(caption, caption) == 0


def test_captions_without_a_common_word_differ_most() -> None:
    assert measure_difference("a dog", "two cats") == 1
    assert 0 < measure_difference("a dog", "a cat") < 1


def write(folder: Path, *rows: dict[str, Any], model: str | None = None) -> Path:
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=CAPTIONS_SCHEMA), folder / "captions.parquet")
    if model:
        (folder / "_imcap").mkdir()
        (folder / "_imcap" / "run.json").write_text(json.dumps({"model": model}))
    return folder


def report(captions: Path, *options: object) -> tuple[Result, Page]:
    done = CliRunner().invoke(main, ["report", str(captions), *map(str, options)])
    assert done.exit_code == 0, done.output
    return done, Page(captions / "report.html")


def test_a_report_shows_both_captions_and_names_images_that_only_one_has_captioned(tmp_path: Path) -> None:
    ours = write(
        tmp_path / "ours",
        ok("1.jpg", "a dog runs"),
        ok("2.jpg", ARABIC[0]),
        ok("3.jpg", "a bird"),
        failed("4.jpg"),
        model="runs/mine",
    )
    theirs = write(
        tmp_path / "theirs",
        ok("sub/1.jpg", "a dog runs", confidence=0.25),
        ok("2.jpg", ARABIC[1], confidence=float("nan")),
        ok("4.jpg", "<b>a cat</b>"),
        ok("5.jpg", "a horse"),
        model="hf:owner/name",
    )

    done, page = report(ours, "--against", theirs)

    assert "captioned only by runs/mine: 1 image, the first is 3.jpg" in done.stderr
    assert "captioned only by hf:owner/name: 2 images, the first is 4.jpg" in done.stderr
    cards = page.with_class("card")
    assert [card["data-difference"] for card in cards] == ["0.0", "0.25", "", ""]
    assert [text for tag, text in page.texts if tag == "mark"] == ["حمراء", "زرقاء"]
    assert "<bdi>رجل يركب دراجة <mark>زرقاء</mark></bdi>" in page.source
    texts = " ".join(text for _, text in page.texts)
    assert "1 of the 2 images that both have captioned have captions with different words" in texts
    assert "<b>a cat</b>" in texts and "0.25 confidence" in texts
    assert texts.count("hf:owner/name") == 1 + 1 + 3  # in the header, the list of images, and on cards
    assert page.all("option")[0]["value"] == "most_different"


def test_two_runs_of_one_model_are_labelled_by_their_folders(tmp_path: Path) -> None:
    one = write(tmp_path / "one", ok("1.jpg"), model="m")
    two = write(tmp_path / "two", ok("1.jpg"), model="m")

    _, page = report(one, "--against", two)

    assert ("bdi", f"m ({one})") in page.texts and ("bdi", f"m ({two})") in page.texts


def test_captions_of_other_images_are_refused(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one", ok("1.jpg")), write(tmp_path / "two", ok("2.jpg"))

    done = CliRunner().invoke(main, ["report", str(one), "--against", str(two)])

    assert done.exit_code == 2 and "have no captioned image in common" in done.output


def test_a_sample_contains_the_most_different_captions(tmp_path: Path) -> None:
    ours = write(tmp_path / "ours", *(ok(f"{number:02}.jpg", "a dog runs") for number in range(40)))
    others = [ok(f"{number:02}.jpg", "two cats" if number == 33 else "a dog runs") for number in range(40)]
    theirs = write(tmp_path / "theirs", *others)

    _, page = report(ours, "--against", theirs, "--max-images", 8)

    assert "1.0" in [card["data-difference"] for card in page.with_class("card")]


def test_other_captions_of_a_job_must_have_an_absolute_path() -> None:
    done = CliRunner().invoke(main, ["submit", "report", "/captions", "--against", "before"])

    assert done.exit_code == 2 and "--against of a job must be an absolute path" in done.output
