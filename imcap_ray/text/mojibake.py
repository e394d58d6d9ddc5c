"""A caption -> letters that show that a text was read in the wrong encoding, or copied from a page's source."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, NamedTuple

_FOREIGN: Final = re.compile("[\x80-\U0010ffff]{2,}")

_CONTROLS: Final = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")

_ENTITY: Final = re.compile(r"&(#\d+|#x[0-9a-fA-F]+|amp|quot|apos|lt|gt|nbsp);")


def find_mojibake(caption: str) -> str:
    """The first letters that are UTF-8 read as Windows-1252 or latin-1, "Ã©" for "é"; "" if there are none.

    Such letters become valid UTF-8 when they are encoded as they were read. Other letters hardly ever do.
    """
    for match in _FOREIGN.finditer(caption):
        try:
            b"".join(_encode_as_read(letter) for letter in match[0]).decode("utf-8")
        except UnicodeError:
            continue
        return match[0]
    return ""


def _encode_as_read(letter: str) -> bytes:
    try:
        return letter.encode("cp1252")
    except UnicodeEncodeError:
        return letter.encode("latin-1")  # Windows-1252 does not define five bytes


def _first_match(pattern: re.Pattern[str]) -> Callable[[str], str]:
    return lambda caption: match[0] if (match := pattern.search(caption)) else ""


class EncodingFault(NamedTuple):
    """A kind of letters that a caption should not have."""

    name: str
    find: Callable[[str], str]
    """The first such letters in a caption; "" if there are none."""
    is_wrong_encoding: bool
    """Whether they show that a file was read in the wrong encoding."""


ENCODING_FAULTS: Final = (
    EncodingFault("letters of UTF-8 that was read as latin-1", find_mojibake, True),
    EncodingFault("replacement characters for lost letters", lambda text: "\ufffd" * ("\ufffd" in text), True),
    EncodingFault("control characters", _first_match(_CONTROLS), True),
    EncodingFault("HTML entities", _first_match(_ENTITY), False),
)
