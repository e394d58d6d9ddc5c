"""Rows of captions -> JSON lines and CSV."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from typing import Final

from imcap_ray import storage
from imcap_ray.data.schemas import CaptionRow
from imcap_ray.exports.captions_rows import COLUMNS

# A spreadsheet takes a cell that begins with one of these for a formula (owasp.org, "CSV Injection"). Matches at the
# beginning of a cell, and where a cell begins for a spreadsheet with another separator than the comma.
_FORMULA: Final = re.compile("(?:^|(?<=[;\t\r\n]))(?='*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20])")


def to_json_line(row: Mapping[str, object]) -> bytes:
    """A row as one line of JSON, without the line end."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode()


def write_jsonl(rows: Iterator[CaptionRow], output: str) -> None:
    """Write one JSON object per line."""
    with storage.replacing(output) as file:
        for row in rows:
            file.write(to_json_line(row) + b"\n")


def write_csv(rows: Iterator[CaptionRow], output: str) -> None:
    """Write CSV, with `guard_cell` applied to text that a spreadsheet would run.

    The file begins with a byte order mark, because without one Excel does not recognise UTF-8.
    """
    with storage.replacing(output) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        writer = csv.DictWriter(text, COLUMNS)
        writer.writeheader()
        for row in rows:
            cells = {**row, "captions": json.dumps(row["captions"], ensure_ascii=False)}
            writer.writerow({name: guard_cell(cell) if isinstance(cell, str) else cell for name, cell in cells.items()})
        text.detach()


def guard_cell(text: str) -> str:
    """The text with an apostrophe before everything that a spreadsheet would run as a formula: at the beginning, and
    after semicolons, tabs and line ends, at which some spreadsheets split a file whose cells are separated by commas.

    Apostrophes before a formula get one more, so that removing one from each such position restores the text.
    """
    return _FORMULA.sub("'", text)
