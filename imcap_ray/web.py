"""http and https addresses -> bytes, with the standard library. A web server lists no files, and takes none."""

from __future__ import annotations

import errno
import os
import re
import ssl
import time
from functools import lru_cache
from http.client import HTTPException
from typing import Final
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import HTTPSHandler, OpenerDirector, build_opener

TIMEOUT_SECONDS: Final = 10.0
"""Maximum time without a connection, or without a byte."""

_MAX_SECONDS: Final = 300.0
"""Maximum time for a file, because a server may send a byte every few seconds."""

_ATTEMPTS: Final = 3

FIRST_WAIT_SECONDS: Final = 0.5

_READ_BYTES: Final = 2**18

_MISSING: Final = (404, 410)

_FORBIDDEN: Final = (401, 403, 451)

_BUSY: Final = (429, 500, 502, 503, 504)
"""HTTP statuses after which another attempt is useful."""

_KEPT: Final = "!#$%&'()*+,/:;=?@[]~"
"""Characters of an address that are not escaped, besides letters and digits."""


def is_web(location: str) -> bool:
    """Whether a location is the address of a web server."""
    return re.match("https?://", location, re.IGNORECASE) is not None


def read(address: str, *, max_bytes: int | None = None) -> bytes:
    """The content of a file.

    Args:
        max_bytes: maximum size; a larger file is an error.

    Raises:
        FileNotFoundError: the server has no such file.
        PermissionError: the server does not allow it.
        OSError: any other error, after retries if the server is busy.
    """
    for attempt in range(_ATTEMPTS):
        try:
            return _read_once(address, max_bytes)
        except HTTPError as error:
            error.close()
            if error.code in _MISSING:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), address) from None
            if error.code in _FORBIDDEN:
                raise PermissionError(errno.EACCES, "not allowed to read", address) from None
            if error.code not in _BUSY or attempt == _ATTEMPTS - 1:
                raise OSError(f"the server answered with HTTP status {error.code}") from None
        except URLError as error:
            raise OSError(str(error.reason)) from None
        except (HTTPException, ValueError) as error:
            raise OSError(f"{type(error).__name__}: {error}") from None
        time.sleep(FIRST_WAIT_SECONDS * 2**attempt)
    raise AssertionError("the last attempt returns or raises")


def _read_once(address: str, max_bytes: int | None) -> bytes:
    deadline = time.monotonic() + _MAX_SECONDS
    data = bytearray()
    with _opener().open(quote(address, safe=_KEPT), timeout=TIMEOUT_SECONDS) as response:
        while chunk := response.read1(_READ_BYTES):
            data += chunk
            if max_bytes is not None and len(data) > max_bytes:
                raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), address)
            if time.monotonic() > deadline:
                raise TimeoutError(f"not complete after {_MAX_SECONDS:g} seconds")
        expected = response.headers.get("Content-Length", "")
    if expected.isdigit() and len(data) < int(expected):
        raise ConnectionError(f"the connection ended after {len(data):,} of {int(expected):,} bytes")
    return bytes(data)


@lru_cache(maxsize=1)
def _opener() -> OpenerDirector:
    opener = build_opener(HTTPSHandler(context=ssl.create_default_context()))
    opener.addheaders = [("User-Agent", "imcap_ray")]
    return opener
