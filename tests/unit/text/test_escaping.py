"""File names and captions are never interpreted by a terminal or by Markdown."""

from __future__ import annotations

import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imcap_ray.text.escaping import markdown, markdown_code, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a dog.jpg", "a dog.jpg"),
        ("Ärger 犬 👩\u200d🚀 \u00a0", "Ärger 犬 👩\u200d🚀 \u00a0"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("two\nlines\r\t", r"two\nlines\r\t"),
        ("\x9b31m\x7f\x00", r"\x9b31m\x7f\x00"),
        ("gpj.\u202egnp", r"gpj.\u202egnp"),
        (os.fsdecode(b"caf\xe9"), r"caf\udce9"),
        ("C:\\x", "C:\\x"),
    ],
)
def test_terminal_output_contains_no_control_characters(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text())
def test_printed_text_is_one_line_that_any_terminal_can_encode(text: str) -> None:
    shown = printable(text)

    assert shown.splitlines() in ([], [shown])
    assert all(letter.isprintable() or ord(letter) > 0x9F for letter in shown)
    shown.encode()


@given(st.text(alphabet="ab\\`*_[]()<>|~&#!\n"))
def test_escaped_markdown_contains_no_markup(text: str) -> None:
    unescaped = re.sub(r"\\[!-/:-@\[-`{-~]", "", markdown(text))

    assert not set("\\`*[]<>|~&#\n") & set(unescaped)
    assert not re.search(r"(?<!\w)_|_(?!\w)", unescaped)


def test_text_without_markup_is_not_escaped() -> None:
    for text in ("efficientnet_lite2", "Flickr8k as distributed: 6,000 images (2013)", "package==0.1.0 - x"):
        assert markdown(text) == text
    assert markdown("_x_ | <script>") == r"\_x\_ \| \<script\>"


@pytest.mark.parametrize(
    ("text", "code"), [("recipe", "`recipe`"), ("a`b", "`` a`b ``"), ("a``|`", "``` a``\\|` ```"), ("a\nb", "`a\\nb`")]
)
def test_a_code_span_ends_where_it_should(text: str, code: str) -> None:
    assert markdown_code(text) == code
