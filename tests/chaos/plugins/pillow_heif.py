"""A buggy stand-in for the HEIC decoder, under its module name: it crashes or hangs."""

from __future__ import annotations

import ctypes
import os
import signal

from PIL import Image, ImageFile

GREED = 6 * 2**30
"""Bytes that an image requests; none of them is ever touched."""


class _Image(ImageFile.ImageFile):
    format = "HEIF"

    def _open(self) -> None:
        data = self.fp.read()
        if b"SEGFAULT" in data:
            os.kill(os.getpid(), signal.SIGSEGV)
        if b"ENDLESS" in data:
            ctypes.PyDLL(None).sleep(3600)  # holds Python's lock, so that no other thread of this process can run
        if b"GREEDY" in data:
            hoard = bytearray(GREED)
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory runs out
            del hoard
        raise SyntaxError("no image")


def register_heif_opener() -> None:
    Image.register_open("HEIF", _Image, lambda prefix: prefix[4:8] == b"ftyp")
