"""Text from files -> text without effect on a terminal or in Markdown. Templates escape HTML themselves."""

from __future__ import annotations

import json
import re
from typing import Any, Final

# Control characters, lone surrogates, other line ends, and marks that change the direction of text.
_CONTROL: Final = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)

_MARKDOWN: Final = re.compile(r"[\\`*\[\]<>|~&$#]|(?<![^\W_])_|_(?![^\W_])")


def printable(text: str) -> str:
    r"""One line for a terminal, with control characters written as `\x1b` or `\n`."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def markdown(text: str) -> str:
    """Markdown that shows this text, for a line or a table's cell."""
    return _MARKDOWN.sub(r"\\\g<0>", printable(text))


def markdown_code(text: str) -> str:
    """A Markdown code span with this text, for a line or a table's cell."""
    text = printable(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    padding = " " if "`" in text else ""
    return f"{fence}{padding}{text}{padding}{fence}".replace("|", "\\|")


def short_value(value: Any) -> str:
    """A setting as text, for a message; of a hash, the beginning."""
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value)
    is_digest = len(text) == 64 and set(text) <= set("0123456789abcdef")
    return f"{text[:12]}..." if is_digest else text
