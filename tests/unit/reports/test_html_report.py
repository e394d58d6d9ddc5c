from __future__ import annotations

import base64
import hashlib
import os
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from imcap_ray.cli.main import main
from imcap_ray.data.schemas import CAPTIONS_SCHEMA
from imcap_ray.errors import ConfigError, ImageError, InputError, ModelError
from imcap_ray.reports.cards import CHANGED, LoadImages
from imcap_ray.reports.charts import histogram_of_lengths
from imcap_ray.reports.html_report import HumanCaptions, write_report
from imcap_ray.reports.model_section import ModelOfRun
from imcap_ray.runs.captioned_images import CaptionedImageSource
from imcap_ray.scoring.evaluation_report import SHARES, CoveragePoint, EvaluationReport, Protocol
from imcap_ray.scoring.metrics import Scores

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>'

Row = dict[str, Any]


def ok(image_id: str, caption: str = "a dog runs", **columns: Any) -> Row:
    row = dict.fromkeys(CAPTIONS_SCHEMA.names, "") | {
        "image_id": image_id,
        "caption": caption,
        "captions": [caption],
        "confidence": 0.5,
        "familiarity": 0.5,
        "logprob": -2.0,
        "num_tokens": 4,
        "status": "ok",
        "width": 40,
        "height": 30,
        "format": "JPEG",
    }
    return row | columns


def failed(image_id: str, code: str = "truncated", message: str = "image file is truncated") -> Row:
    unknown = dict.fromkeys(["confidence", "familiarity", "logprob"], float("nan"))
    nothing = {"captions": [], **unknown, "num_tokens": 0}
    no_image = {"width": 0, "height": 0, "format": ""}
    error = {"status": "failed", "error_code": code, "error_message": message}
    return ok(image_id, "", **nothing, **no_image, **error)


def table(*rows: Row) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=CAPTIONS_SCHEMA)


def encoded(image: Image.Image, format: str = "JPEG", **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


RED = encoded(Image.new("RGB", (40, 30), "red"))


class Page(HTMLParser):
    """A parsed report: tags with their attributes, and the text within each tag."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(self.source)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in {"meta", "link", "img", "input", "br"}:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self._open[-1], data.strip()))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def with_class(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for _, attributes in self.tags if name in (attributes.get("class") or "").split()]

    @property
    def sections(self) -> list[str]:
        """Ids of the sections in order: those of the headings, or of the details that contain them."""
        return [
            attributes["id"] or "" for tag, attributes in self.tags if tag in ("h2", "details") and "id" in attributes
        ]

    @property
    def text(self) -> str:
        visible = " ".join(text for tag, text in self.texts if tag not in {"script", "style"})
        return re.sub(r"\s+", " ", visible)

    @property
    def policy(self) -> str:
        metas = self.all("meta")
        [policy] = [m["content"] for m in metas if m.get("http-equiv") == "Content-Security-Policy"]
        assert policy is not None
        return policy


Report = Callable[..., Page]
LoadImage = Callable[[Row], bytes | ImageError]


def each(load_image: LoadImage) -> LoadImages:
    """Turn a function of one row into an argument of `write_report`."""
    return lambda rows: map(load_image, rows)


@pytest.fixture
def report(tmp_path: Path) -> Report:
    def make(*rows: Row, load_image: LoadImage = lambda row: RED, **options: Any) -> Page:
        """Write a report and read it. Options are those of `write_report` and the fields of its two dataclasses."""
        of_human = {field: options.pop(field) for field in HumanCaptions.__slots__ if field in options}
        of_model = {field: options.pop(field) for field in ModelOfRun.__slots__ if field in options}
        human, model = HumanCaptions(**of_human), ModelOfRun(**of_model)
        path = tmp_path / "report.html"
        write_report(table(*rows), path, load_images=each(load_image), human=human, model=model, **options)
        return Page(path)

    return make


def thumbnails(page: Page) -> list[Image.Image]:
    sources = [attributes["src"] or "" for attributes in page.all("img")]
    prefix = "data:image/jpeg;base64,"
    assert all(source.startswith(prefix) for source in sources)
    return [Image.open(BytesIO(base64.b64decode(source.removeprefix(prefix)))) for source in sources]


SCORES = Scores(
    bleu_1=0.6123,
    bleu_2=0.43,
    bleu_3=0.295,
    bleu_4=0.2,
    rouge_l=0.45,
    cider_d=0.5,
    num_images=9,
    length_ratio=1.0,
    num_distinct_captions=8,
)
EVALUATION = EvaluationReport(
    protocol=Protocol(
        tokenizer="ptb",
        references_per_image=(5, 5),
        num_images=9,
        split="test",
        notes="beam 3",
        nltk_version="3.9",
    ),
    scores=SCORES,
    intervals={"bleu_1": (0.6, 0.62), "cider_d": (0.4, 0.6)},
    floor_caption="a man in a red shirt",
    floor=replace(SCORES, bleu_1=0.41, cider_d=0.03),
    human=None,
)
HISTORY = [
    {"epoch": epoch, "phase": "cross_entropy" if epoch < 4 else "self_critical", "train_loss": loss, "cider_d": cider_d}
    for epoch, loss, cider_d in [(1, 4.5, 0.2), (2, 3.25, 0.5), (3, 3.0, 0.4), (4, -0.02, 0.6), (5, -0.05, 0.55)]
]


def attend_one_region(image: bytes, caption: str) -> list[tuple[str, np.ndarray[Any, Any]]]:
    """Attend to the first region for the first word, the second for the second, and so on."""
    return [(word, np.eye(9)[number].reshape(3, 3)) for number, word in enumerate(caption.split())]


GOLDEN = Path(__file__).with_name("golden_report.html")


def without_binary_data(page: str) -> str:
    """Return the page without data that depends on the version of Pillow, and without style and script."""
    page = re.sub(r"(data:image/\w+;base64,)[A-Za-z0-9+/=]+", r"\1...", page)
    page = re.sub(r"<(style|script)>.*?</\1>", r"<\1>...</\1>", page, flags=re.DOTALL)
    page = re.sub(r"sha256-[A-Za-z0-9+/=]+", "sha256-...", page)
    return "\n".join(line.rstrip() for line in page.splitlines() if line.strip()) + "\n"


def test_a_report_with_all_sections_equals_the_golden_file(report: Report) -> None:
    """With IMCAP_WRITE_GOLDEN=1 this test writes the file again. Read the difference before you commit it."""
    points = tuple(CoveragePoint(share, 1 - share, 0.3 - share / 10, 1.0 - share / 2) for share in SHARES)
    page = report(
        ok("dogs/rex.jpg", "a dog runs on grass", confidence=0.634, captions=["a dog runs on grass", "a brown dog"]),
        ok("a man.jpg", "a man in a red shirt", confidence=float("nan"), captions=None),
        ok("coffee.jpg", "a dog on the floor", confidence=0.38, familiarity=0.004),
        ok("copy of rex.jpg", "a dog runs on grass", status="duplicate", duplicate_of="dogs/rex.jpg"),
        failed("1.jpg", "missing", "no such file"),
        failed("2.jpg"),
        failed("3.jpg"),
        load_image=lambda row: ImageError("changed", "") if row["image_id"] == "a man.jpg" else RED,
        references={"dogs/rex.jpg": ["a brown dog", "a running dog"], "a man.jpg": ["somebody"]},
        image_scores={"dogs/rex.jpg": 1.25, "a man.jpg": 0.0},
        evaluation=replace(EVALUATION, confidence_curve=points, human=replace(SCORES, bleu_1=0.7)),
        history=HISTORY,
        attend=attend_one_region,
        num_attended=1,
        run={
            "model": "resnet50-attention",
            "model_fingerprint": "3fb1c2",
            "images_per_second": 1234.5,
            "settings": {"search": {"beam_size": 3}, "models": ["a", "b"]},
        },
    )

    written = without_binary_data(page.source)
    if "IMCAP_WRITE_GOLDEN" in os.environ:
        GOLDEN.write_text(written, encoding="utf-8")
    assert written == GOLDEN.read_text(encoding="utf-8")


def test_captions_come_first_then_scores_failures_and_charts_and_the_rest_is_collapsed(report: Report) -> None:
    options = {"history": HISTORY, "attend": attend_one_region, "num_attended": 1}
    run = {"model": "m", "model_fingerprint": "0123456789abcdef"}

    page = report(ok("1.jpg"), failed("2.jpg"), evaluation=EVALUATION, run=run, **options)

    assert page.sections == ["captions", "scores", "failures", "charts", "training", "attention", "provenance"]
    folded = [attributes for attributes in page.all("details") if "id" in attributes]
    assert [attributes["id"] for attributes in folded] == page.sections[4:]
    assert all("open" not in attributes for attributes in folded)
    assert [attributes["href"] for attributes in page.all("a")][1:] == [f"#{name}" for name in page.sections]
    assert page.text.index("0123456789abcdef") > page.text.index("Provenance")


def test_a_page_has_no_empty_sections(report: Report) -> None:
    assert report(ok("1.jpg")).sections == ["captions", "charts"]
    assert report(failed("1.jpg")).sections == ["captions", "failures"]


@pytest.mark.parametrize(("human", "num_rows"), [(None, 2), (replace(SCORES, bleu_1=0.7), 3)])
def test_human_agreement_is_a_row_of_the_scores_if_it_is_known(
    report: Report, human: Scores | None, num_rows: int
) -> None:
    page = report(ok("1.jpg"), evaluation=replace(EVALUATION, human=human))

    assert len([row for row in page.all("th") if row.get("scope") == "row"]) == num_rows
    assert ("70.0" in page.text) == (human is not None)


def test_every_control_has_a_label(report: Report) -> None:
    page = report(ok("1.jpg"), image_scores={"1.jpg": 0.4})

    assert len(page.all("label")) == len(page.all("select")) + len(page.all("input")) == 8


def test_a_failed_image_is_a_card_with_its_code_and_message_and_is_not_loaded(report: Report) -> None:
    loaded: list[str] = []

    def load_image(row: Row) -> bytes:
        loaded.append(row["image_id"])
        return RED

    page = report(ok("good.jpg"), failed("bad.jpg", "not_an_image", "this is a letter"), load_image=load_image)

    assert loaded == ["good.jpg"]
    assert len(page.with_class("card")) == 2
    assert len(page.with_class("failed")) == 1
    for text in ("bad.jpg", "not_an_image", "this is a letter"):
        assert text in page.text


def test_html_in_captions_and_names_is_text_and_not_markup(report: Report) -> None:
    hostile = ok(HOSTILE, HOSTILE, captions=[HOSTILE, f"{HOSTILE} again"], format=HOSTILE, duplicate_of=HOSTILE)
    page = report(
        *[hostile] * 30,
        failed(HOSTILE, HOSTILE, HOSTILE),
        references={HOSTILE: [HOSTILE]},
        evaluation=replace(EVALUATION, floor_caption=HOSTILE, protocol=replace(EVALUATION.protocol, notes=HOSTILE)),
        score_note=HOSTILE,
        note=HOSTILE,
        run={"model": HOSTILE, "nested": {HOSTILE: HOSTILE}},
        history=[{"phase": HOSTILE, "train_loss": 1.0, "cider_d": 0.1}] * 2,
        attend=lambda image, caption: [(HOSTILE, np.eye(2))],
        num_attended=1,
    )

    assert len(page.all("script")) == 1
    assert all("onerror" not in attributes for _, attributes in page.tags)
    assert len(page.all("img")) == 30
    assert HOSTILE in page.text


@pytest.mark.parametrize(
    "name",
    [
        "{{ 7 * 7 }}{% for x in y %}",
        "'><svg/onload=alert(1)>",
        "` onerror=alert(1) x=`",
        "</script></style></title><!--",
        "javascript:alert(1)",
        "&lt;b&gt;",
        "two\nlines\tand\x1b[2J\x00 gpj.\u202egnp",
    ],
)
def test_a_hostile_name_is_the_same_name_on_the_page(report: Report, name: str) -> None:
    page = report(ok(name, name, captions=[name, "x"]), failed("2.jpg", message=name), references={name: [name]})

    assert [attributes["alt"] for attributes in page.all("img")] == [f"Photograph {name}"]
    assert page.text.count(re.sub(r"\s+", " ", name)) >= 4
    assert len(page.all("script")) == 1
    assert not [tag for tag, attributes in page.tags if tag == "svg" and "onload" in attributes]


def test_the_page_loads_nothing_from_a_network(report: Report) -> None:
    page = report(ok("1.jpg"), failed("2.jpg"), run={"model": "m"}, references={"1.jpg": ["a dog"]})

    assert not re.search(r"https?:|//[\w.-]+\.\w+/|@import|url\(", page.source)
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
        assert "style" not in attributes


def test_the_content_security_policy_allows_this_style_and_script_and_data_images_only(
    report: Report,
) -> None:
    page = report(ok("1.jpg"))

    directives = dict(directive.strip().split(" ", 1) for directive in page.policy.split(";"))

    [style] = re.findall(r"<style>(.*?)</style>", page.source, re.DOTALL)
    [script] = re.findall(r"<script>(.*?)</script>", page.source, re.DOTALL)
    assert directives == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": _hash_source(style),
        "script-src": _hash_source(script),
        "base-uri": "'none'",
        "form-action": "'none'",
    }


def _hash_source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_thumbnails_are_jpegs_of_256_pixels_at_most(report: Report) -> None:
    page = report(ok("wide.png"), load_image=lambda row: encoded(Image.new("RGB", (1000, 500)), "PNG"))

    [thumbnail] = thumbnails(page)

    assert thumbnail.format == "JPEG"
    assert thumbnail.size == (256, 128)


def test_thumbnails_are_upright_as_exif_requires(report: Report) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    sideways = encoded(Image.new("RGB", (400, 200)), exif=exif)

    [thumbnail] = thumbnails(report(ok("phone.jpg"), load_image=lambda row: sideways))

    assert thumbnail.size == (128, 256)


def test_transparent_areas_are_white_in_a_thumbnail(report: Report) -> None:
    glass = encoded(Image.new("RGBA", (20, 20), (0, 0, 0, 0)), "PNG")

    [thumbnail] = thumbnails(report(ok("logo.png"), load_image=lambda row: glass))

    assert thumbnail.getpixel((10, 10)) == (255, 255, 255)


def _raises(error: Exception) -> Callable[[Row], bytes]:
    def load_image(row: Row) -> bytes:
        raise error

    return load_image


@pytest.mark.parametrize(
    "load_image",
    [
        lambda row: b"",
        lambda row: b"Dear Sir or Madam",
        lambda row: RED[:200],
        lambda row: ImageError("missing", "gone since"),
    ],
)
def test_the_caption_of_an_unreadable_photograph_is_still_shown(report: Report, load_image: LoadImage) -> None:
    page = report(ok("1.jpg", "a dog runs"), load_image=load_image)

    assert page.all("img") == []
    assert "no picture a dog runs" in page.text


def test_a_caption_of_more_than_a_fifth_of_twenty_images_is_a_warning(report: Report) -> None:
    rows = [ok(f"{i:02}.jpg", "a man in a red shirt" if i < 5 else f"caption {i}") for i in range(20)]

    page = report(*rows)

    assert len(page.with_class("warning")) == 1
    assert re.search("25 % of .* “ a man in a red shirt ”", page.text)
    assert "a man in a red shirt 5 25.0 %" in page.text


@pytest.mark.parametrize(("num_same", "num_images"), [(4, 20), (19, 19)])
def test_a_fifth_or_too_few_images_give_no_warning(report: Report, num_same: int, num_images: int) -> None:
    rows = [ok(f"{i:02}.jpg", "a man" if i < num_same else f"caption {i}") for i in range(num_images)]

    assert not report(*rows).with_class("warning")


def test_the_confidence_curve_shows_the_scores_of_all_half_and_a_tenth_of_the_images(report: Report) -> None:
    points = tuple(CoveragePoint(share, 1 - share, 0.3 - share / 10, 1.0 - share / 2) for share in SHARES)

    page = report(ok("1.jpg"), evaluation=replace(EVALUATION, confidence_curve=points))

    circles = page.all("circle")
    assert len(circles) == len(SHARES)
    heights = [float(circle["cy"] or "") for circle in circles]
    assert heights == sorted(heights, reverse=True)
    assert [text.strip() for tag, text in page.texts if tag == "text"][:6] == [
        *("0.500", "100%"),
        *("0.750", "50%"),
        *("0.950", "10%"),
    ]
    assert re.search("half .*0.500.* CIDEr-D 0.750 and BLEU-4 25.0", page.text)


def test_without_confidences_there_is_no_curve(report: Report) -> None:
    assert report(ok("1.jpg"), evaluation=EVALUATION).all("polyline") == []


def test_the_histogram_has_a_bar_for_every_length_and_one_for_the_longest(report: Report) -> None:
    lengths = [3, 3, 7, 30, 31, 90]
    page = report(*[ok(f"{i}.jpg", " ".join(["dog"] * n)) for i, n in enumerate(lengths)])

    bars = dict(re.findall(r"(\d+\+?) words: (\d+) images", page.text))

    assert {words: int(count) for words, count in bars.items() if count != "0"} == {"3": 2, "7": 1, "30+": 3}
    assert "3 to 90, median 7" in page.text


@pytest.mark.parametrize("caption", ["", "dog", " ".join(["dog"] * 70)])
def test_the_histogram_of_a_single_length_is_drawn(report: Report, caption: str) -> None:
    page = report(ok("1.jpg", caption, familiarity=None))

    assert sum(float(bar["height"] or 0) for bar in page.all("rect") if bar.get("x")) == 120


def test_cards_come_in_the_order_of_image_ids(report: Report) -> None:
    page = report(ok("c.jpg"), failed("b.jpg"), ok("a.jpg"))

    assert [text for _, text in page.texts if text.endswith(".jpg")] == ["a.jpg", "b.jpg", "c.jpg"]


def test_cards_have_the_attributes_for_sorting_and_filtering(report: Report) -> None:
    page = report(ok("1.jpg", confidence=0.25), failed("2.jpg"), ok("3.jpg", confidence=None))

    cards = page.with_class("card")

    assert [card["data-status"] for card in cards] == ["ok", "failed", "ok"]
    assert [card["data-confidence"] for card in cards] == ["0.25", "", ""]
    assert [option["value"] for option in page.all("option")][-6:] == ["", "ok", "failed", "", "unlike", "like"]


def test_scores_are_on_the_cards_and_are_the_default_order(report: Report) -> None:
    page = report(ok("a/1.jpg"), ok("2.jpg"), failed("3.jpg"), image_scores={"1.jpg": 0.4, "2.jpg": 1.25, "3.jpg": 0.0})

    cards = {card["data-status"]: card["data-score"] for card in page.with_class("card")}
    assert [card["data-score"] for card in page.with_class("card")] == ["1.25", "0.0", "0.4"], cards
    assert "1.25 CIDEr-D" in page.text
    assert page.all("option")[0]["value"] == "worst"


def test_without_scores_the_least_confident_come_first(report: Report) -> None:
    page = report(ok("1.jpg"))

    assert [option["value"] for option in page.all("option")][:2] == ["lowest", "highest"]
    assert "CIDEr-D" not in page.text
    assert all("data-score" not in card for card in page.with_class("card"))


def test_each_card_has_its_familiarity_and_the_captions_of_unfamiliar_images_are_marked(report: Report) -> None:
    # 0.05 in 32 bits is not below 0.05.
    page = report(ok("1.jpg", "a dog runs", familiarity=0.049), ok("2.jpg", "a cat", familiarity=0.05), failed("3.jpg"))

    assert "a dog runs unlike the training images 0.50 confidence 0.05 familiarity" in page.text
    assert "a cat 0.50 confidence 0.05 familiarity" in page.text
    assert len(page.with_class("caption")) == 2 and page.text.count("familiarity 1.jpg") == 1


def test_cards_can_be_sorted_and_filtered_by_familiarity(report: Report) -> None:
    page = report(ok("1.jpg", familiarity=0.03125), ok("2.jpg", familiarity=0.75), failed("3.jpg"))

    cards = page.with_class("card")
    assert [card["data-familiarity"] for card in cards] == ["0.03125", "0.75", ""]
    assert [card["data-likeness"] for card in cards] == ["unlike", "like", ""]
    options = [option["value"] for option in page.all("option")]
    assert {"least_familiar", "most_familiar", "unlike", "like"} <= set(options)


def test_a_line_counts_the_captioned_images_that_are_unlike_the_training_images(report: Report) -> None:
    rows = [ok(f"{i}.jpg", familiarity=i / 10) for i in range(8)]

    text = report(*rows, ok("twin.jpg", familiarity=0.01, status="duplicate"), failed("x.jpg"), max_images=0).text
    assert "2 of 9 captioned images are unlike what the model has learned from (familiarity below 0.05)" in text
    assert "0 of 7 captioned images are unlike what the model has learned from ." in report(*rows[1:]).text


def cells_of_map(page: Page) -> list[tuple[str, int, float, bool]]:
    """Return the title, number of images, opacity and mark of each cell of the map of familiarity."""
    rects = [rect for rect in page.all("rect") if "fill-opacity" in rect]
    titles = re.findall(r"(familiarity [\d.]+ to [\d.]+, confidence [\d.]+ to [\d.]+): ([\d,]+) images?", page.text)
    return [
        (title, int(count.replace(",", "")), float(rect["fill-opacity"] or ""), rect.get("class") == "unfamiliar")
        for (title, count), rect in zip(titles, rects, strict=True)
    ]


def test_the_map_has_a_cell_for_each_familiarity_and_confidence_the_darker_the_more_images(report: Report) -> None:
    rows = [ok(f"{i}.jpg", familiarity=0.049, confidence=0.42) for i in range(3)]

    page = report(*rows, ok("x.jpg", familiarity=1.0, confidence=0.42), ok("y.jpg", confidence=None), failed("z.jpg"))

    many, one = cells_of_map(page)
    assert many == ("familiarity 0.00 to 0.05, confidence 0.40 to 0.45", 3, 1.0, True)
    assert one[:2] == ("familiarity 0.95 to 1.00, confidence 0.40 to 0.45", 1)
    assert 0 < one[2] < 1 and not one[3]


def test_the_map_counts_all_images_in_a_bounded_number_of_cells(report: Report) -> None:
    numbers = random.Random(0)
    rows = [ok(f"{i}.jpg", familiarity=numbers.random(), confidence=numbers.random()) for i in range(5000)]

    page = report(*rows, max_images=0)

    cells = cells_of_map(page)
    assert len(cells) == 400 and sum(count for _, count, _, _ in cells) == 5000
    assert len(page.source) < 150_000


@pytest.mark.parametrize("unknown", [None, float("nan")])
def test_without_familiarity_the_page_does_not_mention_it(report: Report, unknown: float | None) -> None:
    page = report(*[ok(f"{i}.jpg", familiarity=unknown) for i in range(30)], failed("x.jpg"), max_images=20)

    visible = without_binary_data(page.source)
    assert not re.search("familiar|unlike|likeness", visible)


def test_without_confidences_there_is_no_map(report: Report) -> None:
    page = report(ok("1.jpg", familiarity=0.01, confidence=None))

    assert cells_of_map(page) == [] and "1 of 1 captioned images are unlike" in page.text


def test_references_are_also_matched_by_file_name(report: Report) -> None:
    page = report(ok("photographs/1.jpg"), references={"1.jpg": ["a brown dog"]})

    assert "Human caption a brown dog" in page.text


def test_references_of_an_ambiguous_file_name_are_shown_with_neither_captioned_image(report: Report) -> None:
    references = {"001.jpg": ["a brown dog"], "2.jpg": ["a cat"]}
    scores = {"001.jpg": 1.25, "2.jpg": 2.5}

    page = report(ok("a/001.jpg"), ok("b/001.jpg"), ok("b/2.jpg"), references=references, image_scores=scores)

    assert "a brown dog" not in page.text and "Human caption a cat" in page.text
    assert [card["data-score"] for card in page.with_class("card")] == ["", "", "2.5"]
    assert "2 of the 3 images have no references" in page.text


def test_references_with_the_same_file_name_are_shown_only_with_their_own_image(report: Report) -> None:
    references = {"001.jpg": ["a brown dog"], "a/001.jpg": ["a cat"]}

    page = report(ok("a/001.jpg"), ok("b/001.jpg"), references=references)

    assert "a brown dog" not in page.text and page.text.count("Human caption a cat") == 1
    assert "1 of the 2 images have no references" in page.text


def test_a_photograph_changed_since_captioning_is_not_shown_with_its_old_caption(tmp_path: Path) -> None:
    rows = []
    for number, name in enumerate(["changed.jpg", "same.jpg", "twin.jpg", "unknown.jpg"]):
        path = tmp_path / "in" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data := encoded(Image.new("RGB", (40, 30), (50 * number, 90, 200))))
        rows.append(ok(name, image_path=str(path), sha256=hashlib.sha256(data).hexdigest(), confidence=0.1 * number))
    rows[2] |= {"status": "duplicate", "duplicate_of": "same.jpg"}
    rows[3]["sha256"] = ""  # of an output that has no hashes
    for name in ("changed.jpg", "twin.jpg"):
        (tmp_path / "in" / name).write_bytes(RED)
    pq.write_table(table(*rows), tmp_path / "captions.parquet")
    attended: list[bytes] = []

    def attend(image: bytes, caption: str) -> list[tuple[str, np.ndarray[Any, Any]]]:
        attended.append(image)
        return [("dog", np.ones((2, 2)))]

    images = CaptionedImageSource(str(tmp_path / "captions.parquet"), allow_outside_paths=True)
    path = tmp_path / "report.html"
    write_report(table(*rows), path, load_images=images.load, model=ModelOfRun(attend=attend), num_attended=4)

    page = Page(path)
    assert page.text.count(CHANGED) == 2
    assert [image["alt"] for image in page.all("img")] == ["Photograph same.jpg", "Photograph unknown.jpg"]
    assert attended and RED not in attended

    (tmp_path / "in" / "same.jpg").unlink()
    result = CliRunner().invoke(main, ["report", str(tmp_path / "captions.parquet"), "--allow-outside-paths"])
    assert result.exit_code == 0
    assert "not shown: 2 photographs changed since captioning, the first is changed.jpg" in result.output
    assert "1 photograph cannot be shown, the first is same.jpg" in result.output


def test_the_training_of_the_model_is_drawn_phase_by_phase(report: Report) -> None:
    page = report(ok("1.jpg"), history=HISTORY)

    losses, scores = [svg["aria-label"] or "" for svg in page.all("svg") if "epoch" in (svg.get("aria-label") or "")]
    assert re.findall(r"(-?\d\.\d+) in epoch (\d)", losses) == [
        ("4.500", "1"),
        ("3.000", "3"),
        ("-0.020", "4"),
        ("-0.050", "5"),
    ]
    assert re.findall(r"(\d\.\d+) in epoch (\d)", scores) == [("0.600", "4")]
    assert len(page.all("polyline")) == 4
    assert len(page.all("circle")) == 10


def test_captions_of_right_to_left_scripts_are_aligned_and_listed_from_right_to_left(report: Report) -> None:
    arabic = "\u0643\u0644\u0628 \u0623\u0633\u0648\u062f"

    page = report(ok("1.jpg", arabic), ok("2.jpg"), attend=attend_one_region, num_attended=2)

    directions = [(kind, attributes.get("dir")) for kind in ("p", "div") for attributes in page.all(kind)
                  if attributes.get("class") in ("caption", "words-attended")]  # fmt: skip
    assert directions == [("p", "rtl"), ("p", None), ("div", "rtl"), ("div", None)]


def test_lengths_of_captions_without_spaces_are_counted_in_characters() -> None:
    chinese = histogram_of_lengths(Counter({"\u4e00\u53ea\u72d7": 1}))

    assert chinese is not None
    assert (chinese.shortest, chinese.longest) == (3, 3)


@pytest.mark.parametrize("history", [[], HISTORY[:1], [{"epoch": 1}, {"epoch": 2, "cider_d": "much"}]])
def test_an_unknown_training_is_not_drawn(report: Report, history: list[dict[str, Any]]) -> None:
    assert "training" not in report(ok("1.jpg"), history=history).sections


def test_attended_regions_are_light_and_the_others_dark(report: Report) -> None:
    page = report(ok("1.jpg", "a dog"), attend=attend_one_region, num_attended=1)

    heats = [attributes["href"] or "" for attributes in page.all("image")][1:]
    first, second = [
        np.asarray(Image.open(BytesIO(base64.b64decode(heat.removeprefix("data:image/png;base64,"))))) for heat in heats
    ]
    assert first[0, 0, 3] < 30 < 180 < first[-1, -1, 3]
    assert second[0, 12, 3] < 30 < 180 < second[-1, -1, 3]
    assert [text for tag, text in page.texts if tag == "bdi"][-4:] == ["a dog", "1.jpg", "a", "dog"]


def test_attention_is_shown_for_the_least_and_the_most_confident(report: Report) -> None:
    seen: list[str] = []

    def attend(image: bytes, caption: str) -> list[tuple[str, np.ndarray[Any, Any]]]:
        seen.append(caption)
        return attend_one_region(image, caption)

    rows = [ok(f"{n}.jpg", f"caption {n}", confidence=(7 * n % 10) / 10) for n in range(10)]
    report(*rows, failed("x.jpg"), attend=attend, num_attended=3)

    assert seen == ["caption 0", "caption 2", "caption 7"]  # 0.0, 0.4 and 0.9


def test_without_attention_a_line_states_the_reason(report: Report) -> None:
    def attend(image: bytes, caption: str) -> list[tuple[str, np.ndarray[Any, Any]]]:
        raise ModelError("the regions are no square grid")

    assert "attention" not in report(ok("1.jpg"), attend=attend).sections
    for options, reason in (
        ({"attend": attend, "num_attended": 2}, "the regions are no square grid"),
        (
            {"attend": attend_one_region, "num_attended": 2, "load_image": lambda row: ImageError("missing", "gone")},
            "none of the chosen photographs is available",
        ),
        ({"note": HOSTILE}, HOSTILE),
    ):
        page = report(ok("1.jpg"), **options)
        assert reason in page.text and "attention" not in page.sections


def shown(page: Any) -> set[int]:
    """Return the numbers of the photographs on the page, from their file names."""
    return {int(name) for name in re.findall(r"Photograph (\d+)\.jpg", page.source)}


def test_beyond_max_images_the_worst_all_failures_and_an_even_sample_of_the_rest_are_shown(report: Report) -> None:
    rows = [failed(f"{i:03}.jpg") if i % 50 == 0 else ok(f"{i:03}.jpg") for i in range(200)]
    for position, confidence in ((61, 0.01), (62, 0.02), (63, 0.03)):
        rows[position]["confidence"] = confidence
    scores = {row["image_id"]: 2.0 for row in rows} | {"151.jpg": 0.0, "152.jpg": 0.1, "153.jpg": 0.2}

    page = report(*rows, max_images=20, image_scores=scores)

    statuses = Counter(card["data-status"] for card in page.with_class("card"))
    assert statuses == {"failed": 4, "ok": 16}
    assert {61, 62, 63, 151, 152, 153} <= shown(page)
    assert sum(i > 100 for i in shown(page) - {151, 152, 153}) >= 4
    assert re.search("20 of 200 images.* 4 of the 4 failed images", page.text)
    assert "98.0 %" in page.text


def test_without_scores_a_sample_contains_the_least_confident_and_others(report: Report) -> None:
    rows = [ok(f"{i:03}.jpg") for i in range(200)]
    rows[77]["confidence"] = 0.001

    page = report(*rows, max_images=10)

    assert 77 in shown(page) and len(shown(page)) == 10
    assert "10 of 200 images" in page.text and "lowest scores" not in page.text


def test_a_sample_has_unfamiliar_images_from_everywhere(report: Report) -> None:
    rows = [ok(f"{i:03}.jpg", familiarity=0.01 if 100 <= i < 130 else 0.5) for i in range(400)]

    page = report(*rows, max_images=20)

    cards = page.with_class("card")
    assert [card["data-likeness"] for card in cards].count("unlike") >= 5
    assert any(i >= 120 for i in shown(page) if i < 130)
    assert "some that are unlike the training images" in page.text and len(cards) == 20


def test_many_failures_leave_room_for_photographs(report: Report) -> None:
    rows = [ok(f"{i:03}.jpg") if i % 2 else failed(f"{i:03}.jpg") for i in range(200)]

    page = report(*rows, max_images=20)

    assert Counter(card["data-status"] for card in page.with_class("card")) == {"ok": 15, "failed": 5}
    assert "5 of the 100 failed images" in page.text


def test_failures_fill_the_places_that_photographs_leave(report: Report) -> None:
    page = report(*[failed(f"{i:03}.jpg") for i in range(50)], ok("x.jpg"), max_images=20)

    assert Counter(card["data-status"] for card in page.with_class("card")) == {"ok": 1, "failed": 19}


@pytest.mark.parametrize("num_images", [1, 19, 20])
def test_up_to_max_images_every_image_is_shown_and_no_sample_is_mentioned(report: Report, num_images: int) -> None:
    page = report(*[ok(f"{i:02}.jpg") for i in range(num_images)], max_images=20)

    assert len(page.with_class("card")) == num_images
    assert all(attributes.get("id") != "sampled" for attributes in page.all("p"))


@pytest.mark.parametrize(("rows", "reason"), [([], "no images"), ([ok("1.jpg")], "without photographs")])
def test_without_cards_the_page_states_the_reason_and_has_no_controls(
    report: Report, rows: list[Row], reason: str
) -> None:
    page = report(*rows, max_images=0)

    assert reason in page.text
    assert page.all("form") == page.all("script") == page.with_class("card") == []


def test_a_thousand_photographs_stay_under_20_megabytes(tmp_path: Path) -> None:
    # Noise is the hardest thing to compress, and every card has long texts.
    noise = encoded(Image.frombytes("RGB", (256, 256), random.Random(0).randbytes(256 * 256 * 3)), "PNG")
    rows = [ok(f"{'folder/' * 12}{i:04}.jpg", f"a dog number {i} " + "runs " * 15) for i in range(20)]
    references = {row["image_id"]: ["a brown dog runs over the wet grass of a large field"] * 5 for row in rows}
    human = HumanCaptions(references=references)
    few, more = tmp_path / "few.html", tmp_path / "more.html"

    write_report(table(*rows[:10]), few, load_images=each(lambda row: noise), human=human)
    write_report(table(*rows), more, load_images=each(lambda row: noise), human=human)

    bytes_per_image = (more.stat().st_size - few.stat().st_size) / 10
    assert few.stat().st_size + 1000 * bytes_per_image <= 20_000_000


def test_a_long_error_message_is_truncated(report: Report) -> None:
    page = report(failed("1.jpg", message="x" * 100_000))

    assert len(page.source) < 50_000


def test_a_dataset_of_parquet_files_gives_the_same_page_as_a_table(tmp_path: Path) -> None:
    rows = [failed(f"{i:02}.jpg") if i % 7 == 0 else ok(f"{i:02}.jpg", f"a dog {i % 3}") for i in range(40)]
    (tmp_path / "captions").mkdir()
    for part in range(4):
        pq.write_table(table(*rows[part * 10 : part * 10 + 10]), tmp_path / "captions" / f"{part}.parquet")
    streamed, whole = tmp_path / "streamed.html", tmp_path / "whole.html"

    dataset = ds.dataset(tmp_path / "captions", format="parquet")
    write_report(dataset, streamed, load_images=each(lambda row: RED), max_images=10)
    write_report(table(*rows), whole, load_images=each(lambda row: RED), max_images=10)

    assert streamed.read_bytes() == whole.read_bytes()


def test_an_unrelated_table_is_an_input_error_that_names_the_columns(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="lacks the columns .*caption"):
        write_report(pa.table({"image_id": ["1.jpg"]}), tmp_path / "r.html", load_images=each(lambda row: RED))


def test_a_negative_max_images_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_images must be at least 0, got -1"):
        write_report(table(ok("1.jpg")), tmp_path / "r.html", load_images=each(lambda row: RED), max_images=-1)


def test_a_failed_report_keeps_the_earlier_one_and_leaves_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("the earlier report")

    with pytest.raises(RuntimeError, match="a bug"):
        write_report(table(ok("1.jpg")), path, load_images=each(_raises(RuntimeError("a bug"))))

    assert path.read_text() == "the earlier report"
    assert list(tmp_path.iterdir()) == [path]


def test_the_folder_of_the_report_is_created(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "report.html"

    write_report(table(ok("1.jpg")), path, load_images=each(lambda row: RED))

    assert path.is_file()


def test_without_cards_nothing_is_folded_because_no_script_opens_the_section_of_a_link(report: Report) -> None:
    options = {"history": HISTORY, "attend": attend_one_region, "num_attended": 1, "run": {"model": "m"}}

    folded = [attributes for attributes in report(ok("1.jpg"), max_images=0, **options).all("details")]
    assert {attributes["id"] for attributes in folded} >= {"training", "provenance"}
    assert all("open" in attributes for attributes in folded)
    assert not any("open" in attributes for attributes in report(ok("1.jpg"), **options).all("details"))


def test_the_header_counts_images_by_status(report: Report) -> None:
    rows = [ok(f"{i}.jpg") for i in range(6)]

    page = report(*rows, failed("x.jpg"), ok("y.jpg", status="duplicate", duplicate_of="0.jpg"))

    assert "images 8 captioned 6 75.0 % duplicates 1 12.5 % failed 1 12.5 %" in page.text


def test_failures_are_counted_by_code_and_the_most_frequent_is_first(report: Report) -> None:
    page = report(failed("1.jpg", "missing", "no such file"), failed("2.jpg"), failed("3.jpg"), ok("4.jpg"))

    table = page.text[page.text.index("First message") :]
    assert re.search("^First message Images truncated image file is truncated 2 missing no such file 1", table)


def test_the_other_captions_of_an_image_are_listed_once(report: Report) -> None:
    page = report(ok("1.jpg", "a dog", captions=["a dog", "a brown dog", "an animal"]))

    assert "2 more captions a brown dog an animal" in page.text
    assert [page.text.count(caption) for caption in ("a brown dog", "an animal")] == [1, 1]


def test_existing_captions_are_marked(report: Report) -> None:
    page = report(ok("0.jpg", "a dog runs", caption_source="existing"), ok("1.jpg", "a cat sits"))

    assert page.text.count("existing caption, not the model's") == 1
