"""Bytes of a text file in any usual encoding -> text. Knows nothing of captions."""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass, field
from typing import Final

_LINE_END: Final = re.compile(r"\r\n?|\n")

_BYTE_LINE_END: Final = re.compile(rb"(\r\n?|\n)")


@dataclass(frozen=True, slots=True)
class DecodedText:
    """A file's text, and problems with its encoding."""

    text: str
    encoding: str = "UTF-8"
    """`UTF-8`, `UTF-8 with BOM` or `UTF-16`; lines that are not valid UTF-8 are read as Windows-1252."""
    windows_lines: list[int] = field(default_factory=list)
    """Numbers, from 1, of the lines that were read as Windows-1252, which includes the letters of latin-1."""


def decode_text(data: bytes) -> DecodedText:
    """The text of a file. Never fails: invalid bytes become the replacement character."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return DecodedText(data.decode("utf-16", "replace"), "UTF-16")
    beginning = data[:4096]
    if beginning.count(0) > len(beginning) // 4:  # every other byte is 0 if most letters are Latin
        is_little = beginning[1::2].count(0) > beginning[::2].count(0)
        return DecodedText(data.decode("utf-16-le" if is_little else "utf-16-be", "replace"), "UTF-16")
    has_mark = data.startswith(codecs.BOM_UTF8)
    if has_mark:
        data = data[len(codecs.BOM_UTF8) :]
    encoding = "UTF-8 with BOM" if has_mark else "UTF-8"
    try:
        return DecodedText(data.decode("utf-8"), encoding)
    except UnicodeDecodeError:
        pass
    pieces, windows_lines = [], []
    for number, piece in enumerate(_BYTE_LINE_END.split(data)):  # lines and, between them, their ends
        try:
            pieces.append(piece.decode("utf-8"))
        except UnicodeDecodeError:
            pieces.append(piece.decode("cp1252", "replace"))
            windows_lines.append(number // 2 + 1)
    return DecodedText("".join(pieces), encoding, windows_lines)


def split_lines(text: str) -> list[str]:
    """The lines, without line ends. Unlike `str.splitlines`, only at line feeds and carriage returns."""
    return _LINE_END.split(text)
