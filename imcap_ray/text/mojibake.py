"""A caption -> the letters in it that tell of a text read in the wrong encoding, or taken from a page as it stood."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Final

_FOREIGN: Final = re.compile("[\x80-\U0010ffff]{2,}")

_CONTROLS: Final = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")

_ENTITY: Final = re.compile(r"&(#\d+|#x[0-9a-fA-F]+|amp|quot|apos|lt|gt|nbsp);")


def find_mojibake(caption: str) -> str:
    """The first letters that are UTF-8 read as Windows-1252 or latin-1, "Ã©" for "é"; "" if there are none.

    Such letters are UTF-8 again when they are written as they were read. Others hardly ever are.
    """
    for found in _FOREIGN.finditer(caption):
        try:
            b"".join(_as_read(letter) for letter in found[0]).decode("utf-8")
        except UnicodeError:
            continue
        return found[0]
    return ""


def _as_read(letter: str) -> bytes:
    try:
        return letter.encode("cp1252")
    except UnicodeEncodeError:
        return letter.encode("latin-1")  # Windows-1252 leaves five bytes without a letter


def _first_match(pattern: re.Pattern[str]) -> Callable[[str], str]:
    return lambda caption: found[0] if (found := pattern.search(caption)) else ""


# What to call it, how to find it, and whether a file was read in the wrong encoding where it is.
FAULTS: Final[Mapping[str, tuple[Callable[[str], str], bool]]] = {
    "letters of UTF-8 that was read as latin-1": (find_mojibake, True),
    "replacement characters, for letters that are lost": (lambda caption: "\ufffd" * ("\ufffd" in caption), True),
    "control characters": (_first_match(_CONTROLS), True),
    "HTML entities": (_first_match(_ENTITY), False),
}
