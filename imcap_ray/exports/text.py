"""Rows -> JSON lines and CSV."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from imcap_ray import storage
from imcap_ray.exports.captions_rows import COLUMNS, Row

# A spreadsheet takes a cell that begins with one of these for a formula (owasp.org, "CSV Injection").
# Where a cell begins, or does for a spreadsheet whose separator is another than the comma.
_FORMULA: Final = re.compile("(?:^|(?<=[;\t\r\n]))(?='*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20])")


# --- one file of text
def to_json_line(row: Mapping[str, Any]) -> bytes:
    """A row as one line of JSON, without its line end."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode()


def write_jsonl(rows: Iterator[Row], output: str) -> None:
    """Write one JSON object per line."""
    with storage.replacing(output) as file:
        for row in rows:
            file.write(to_json_line(row) + b"\n")


def write_csv(rows: Iterator[Row], output: str) -> None:
    """Write CSV, with text that a spreadsheet would run guarded by `guard_cell`."""
    with storage.replacing(output) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        writer = csv.DictWriter(text, COLUMNS)
        writer.writeheader()
        for row in rows:
            row["captions"] = json.dumps(row["captions"], ensure_ascii=False)
            writer.writerow({name: guard_cell(cell) if isinstance(cell, str) else cell for name, cell in row.items()})
        text.detach()


def guard_cell(text: str) -> str:
    """The text with an apostrophe before whatever a spreadsheet would run as a formula: at its beginning, and after
    semicolons, tabs and line ends, at which some split a file whose cells are separated by commas.

    Text that has apostrophes before a formula already gets one more: who takes one away from each such place has the
    text again.
    """
    return _FORMULA.sub("'", text)
