"""The report in a real browser: headless Chromium. Skipped with a reason if there is none."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from imcap_ray.data.schemas import CAPTIONS_SCHEMA
from imcap_ray.reports.html_report import HumanCaptions, write_report
from imcap_ray.reports.model_section import ModelOfRun
from imcap_ray.scoring.evaluation_report import EvaluationReport, Protocol
from imcap_ray.scoring.metrics import Scores
from tests.browser import Page, browser, find_chromium
from tests.small_data import jpeg

pytestmark = [
    pytest.mark.skipif(find_chromium() is None, reason="no chromium here: apt-get install chromium"),
    pytest.mark.timeout(600),
]

HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"
NUM_IMAGES = 30


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser() as page:
        yield page


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    rows = [_row(number) for number in range(NUM_IMAGES)]
    words = ["two", "dogs", "run"]
    scores = Scores(0.6, 0.4, 0.3, 0.2, 0.5, 0.6, num_images=NUM_IMAGES, length_ratio=1.0, num_distinct_captions=9)
    evaluation = EvaluationReport(
        protocol=Protocol("ptb", (5, 5), NUM_IMAGES, split="test", notes=HOSTILE, nltk_version="3.9"),
        scores=scores,
        intervals={"cider_d": (0.5, 0.7), "bleu_4": (0.1, 0.3)},
        floor_caption=HOSTILE,
        floor=scores,
        human=scores,
    )
    human = HumanCaptions(
        references={row["image_id"]: [f"reference of {row['image_id']} {HOSTILE}"] * 5 for row in rows},
        image_scores={row["image_id"]: (7 * number % NUM_IMAGES) / 20 for number, row in enumerate(rows)},
        evaluation=evaluation,
    )
    model = ModelOfRun(
        history=[{"phase": "cross_entropy", "train_loss": 4.0 - e / 5, "cider_d": 0.1 * e} for e in range(6)],
        attend=lambda image, caption: [(word, np.eye(4)[n].reshape(2, 2)) for n, word in enumerate(words)],
    )
    write_report(
        pa.Table.from_pylist(rows, schema=CAPTIONS_SCHEMA),
        path,
        load_images=lambda rows: (jpeg(int(row["image_id"][:2])) for row in rows),
        human=human,
        model=model,
        num_attended=2,
        run={"model": "a/model", HOSTILE: HOSTILE},
    )
    return path


def _row(number: int) -> dict[str, Any]:
    is_failed = number % 10 == 9
    return {
        "image_id": f"{number:02}{HOSTILE if number == 3 else ''}.jpg",
        "image_path": "",
        "caption": "" if is_failed else f"caption {number} {HOSTILE}",
        "captions": [] if is_failed else [f"caption {number} {HOSTILE}", "another one"],
        "confidence": float("nan") if is_failed else (number % 10) / 10,
        "familiarity": float("nan") if is_failed else (11 * number % NUM_IMAGES) / NUM_IMAGES,
        "logprob": -1.0,
        "num_tokens": 3,
        "status": "failed" if is_failed else "ok",
        "error_code": "truncated" if is_failed else "",
        "error_message": HOSTILE if is_failed else "",
        "width": 80,
        "height": 60,
        "format": "JPEG",
        "sha256": "",
        "duplicate_of": "",
    }


def shown(page: Page) -> list[str]:
    """The first two letters of the image ids of the visible cards, in their order."""
    visible: list[str] = page.evaluate(
        "Array.from(document.querySelectorAll('.card:not([hidden]) .foot .id'), (id) => id.textContent.slice(0, 2))"
    )
    return visible


def choose(page: Page, control: str, value: str, event: str = "input") -> None:
    page.evaluate(
        f"{{ const c = document.getElementById('{control}'); c.value = '{value}';"
        f" c.dispatchEvent(new Event('{event}', {{bubbles: true}})); }}"
    )


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_the_page_fits_its_window_and_is_rendered(page: Page, report: Path, width: int, scheme: str) -> None:
    page.open(report, width=width, scheme=scheme, mobile=width < 500)

    assert page.evaluate("document.documentElement.scrollWidth") <= width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(22, 24, 27)") == (scheme == "dark")
    path = report.with_name(f"{width}-{scheme}.png")
    page.screenshot(path)
    colours = len(Image.open(io.BytesIO(path.read_bytes())).convert("RGB").getcolors(maxcolors=2**24) or [])
    assert colours > 50, f"see {path}"
    if "IMCAP_SCREENSHOTS" in os.environ:
        Path(os.environ["IMCAP_SCREENSHOTS"], path.name).write_bytes(path.read_bytes())


def test_text_has_enough_contrast_with_its_background(page: Page, report: Path) -> None:
    # Contrast as WCAG 2.1 defines it, 1.4.3: 4.5 for text.
    contrast = """
      (() => {
        const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
        const linear = (v) => (v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
        const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
        const ground = (element) => {
          for (; element; element = element.parentElement) {
            const colour = rgb(getComputedStyle(element).backgroundColor);
            if (colour.length < 4 || colour[3] > 0) return colour;
          }
          return [255, 255, 255];
        };
        let worst = [99, ""];
        for (const element of document.body.querySelectorAll("*:not(script):not(option)")) {
          const text = Array.from(element.childNodes, (n) => (n.nodeType === 3 ? n.data.trim() : "")).join("");
          if (!text || element.closest("[hidden], svg")) continue;
          const [a, b] = [luminance(rgb(getComputedStyle(element).color)), luminance(ground(element))];
          const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
          if (ratio < worst[0]) worst = [ratio, `${element.className} ${text.slice(0, 40)}`];
        }
        return worst;
      })()"""
    for scheme in ("light", "dark"):
        page.open(report, scheme=scheme)
        ratio, where = page.evaluate(contrast)
        assert ratio >= 4.5, f"{scheme}: {where}"


def test_no_data_is_executed_and_nothing_is_loaded(page: Page, report: Path) -> None:
    page.events.clear()

    page.open(report)

    assert page.evaluate("document.title") == "Image captions"
    assert page.evaluate("document.querySelectorAll('script').length") == 1
    loaded = {
        event["params"]["request"]["url"].partition(":")[0] for event in _events(page, "Network.requestWillBeSent")
    }
    assert loaded == {"file", "data"}
    assert _events(page, "Log.entryAdded") == _events(page, "Runtime.exceptionThrown") == []


def _events(page: Page, method: str) -> list[dict[str, Any]]:
    return [event for event in page.events if event.get("method") == method]


def test_the_worst_captions_come_first_and_the_order_can_be_changed(page: Page, report: Path) -> None:
    page.open(report)

    by_score = sorted(range(NUM_IMAGES), key=lambda number: 7 * number % NUM_IMAGES)
    assert shown(page) == [f"{number:02}" for number in by_score]
    choose(page, "order", "lowest", "change")
    assert [int(number) % 10 for number in shown(page)[:27]] == sorted(list(range(9)) * 3)
    assert all(number.endswith("9") for number in shown(page)[27:])  # the failed ones, which have no confidence
    choose(page, "order", "least_familiar", "change")
    assert shown(page)[:3] == ["00", "11", "22"]
    choose(page, "order", "most_familiar", "change")
    assert shown(page)[:2] == ["08", "27"]  # 11 * 8 % 30 = 28 and 11 * 27 % 30 = 27; 19 has 29, but it failed
    choose(page, "order", "image_id", "change")
    assert shown(page) == [f"{number:02}" for number in range(NUM_IMAGES)]
    choose(page, "order", "status", "change")
    assert shown(page) == sorted(shown(page), key=lambda number: (not number.endswith("9"), number))
    assert shown(page)[0] == "09"


def test_cards_are_filtered_by_status_familiarity_score_confidence_and_words(page: Page, report: Path) -> None:
    page.open(report)
    choose(page, "order", "image_id", "change")

    choose(page, "status", "failed", "change")
    assert shown(page) == ["09", "19", "29"]
    choose(page, "status", "", "change")
    choose(page, "likeness", "unlike", "change")
    assert shown(page) == ["00", "11"]
    choose(page, "likeness", "", "change")
    choose(page, "confidence-from", "0.75")
    assert shown(page) == ["08", "18", "28"]
    choose(page, "score-to", "0.75")
    assert shown(page) == ["18"]  # 7 * 18 % 30 = 6: 0.3; the others have 1.3 and 0.8
    choose(page, "confidence-from", "")
    choose(page, "score-to", "")
    choose(page, "search", "CAPTION 12")
    assert shown(page) == ["12"]
    assert page.evaluate("document.getElementById('shown').textContent") == "1 of 30 cards"
    choose(page, "search", "zebra")
    assert page.evaluate("getComputedStyle(document.getElementById('nothing')).display") != "none"


def test_every_control_is_reachable_by_tab_and_shows_its_focus(page: Page, report: Path) -> None:
    page.open(report)

    reached = []
    for _ in range(20):
        page.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", reached[-1]

    assert reached[0] == "skip"
    controls = ["order", "status", "likeness", "score-from", "score-to", "confidence-from", "confidence-to", "search"]
    assert [name for name in reached if name in controls] == controls


def test_a_link_to_a_collapsed_section_expands_it(page: Page, report: Path) -> None:
    page.open(report)
    assert not page.evaluate("document.getElementById('attention').open")

    page.evaluate("document.querySelector('nav a[href=\"#attention\"]').click()")
    deadline = time.monotonic() + 10
    while not page.evaluate("document.getElementById('attention').open"):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_long_gallery_shows_its_first_cards_until_all_are_requested(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "long.html"
    rows = [_row(number) | {"image_id": f"{number:02}.jpg"} for number in range(70)]
    table = pa.Table.from_pylist(rows, schema=CAPTIONS_SCHEMA)
    write_report(table, path, load_images=lambda rows: (jpeg(1) for _ in rows))

    page.open(path)

    assert len(shown(page)) == 60
    assert page.evaluate("document.getElementById('shown').textContent") == "70 of 70 cards"
    page.evaluate("document.getElementById('more').click()")
    assert len(shown(page)) == 70
    assert page.evaluate("document.getElementById('more').hidden")


def test_printing_opens_every_folded_section(page: Page, report: Path) -> None:
    page.open(report)
    assert page.evaluate("document.querySelectorAll('details[id]:not([open])').length") == 3

    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")

    assert page.evaluate("document.querySelectorAll('details:not([open])').length") == 0
