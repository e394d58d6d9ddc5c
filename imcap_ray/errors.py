"""The errors of the package. Every failure that is not a bug is an `ImcapError`.

ImcapError            exit code 1: the run failed; what was written is kept, the same command resumes
  InputError          exit code 2: wrong usage or wrong input, found before work began
    ConfigError       a setting out of range, an unknown name in a recipe
    DatasetError      captioned images that cannot be read as such
    ModelError        a model folder or CNN weights that cannot be loaded
    OutputError       an output folder that something else made
    ClusterError      a cluster that cannot be reached or is too small
  InputChangedError   the input changed while it was listed: the same command lists it again
  RayStartError       a private Ray that does not start: the machine is busy, or a disk is full
  StalledError        the run makes no progress
    FullClusterError  because the cluster has no free resources
  FailureBudgetError  exit code 3: the run finished, too many images failed
  ImageError          one image that cannot be captioned; becomes a row, never stops a run
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

INTERRUPTED: Final = 130
"""Exit code of a command that Ctrl-C or SIGTERM ended; the same command resumes."""


class ImcapError(Exception):
    """The run failed; what was written is kept and the same command resumes."""

    exit_code: int = 1


class InputError(ImcapError):
    """Wrong usage or wrong input, found before work began."""

    exit_code = 2


class ConfigError(InputError):
    """A setting out of its range, or a name that does not exist."""


class DatasetError(InputError):
    """Captioned images, or references, that cannot be read as such."""


class ModelError(InputError):
    """A model folder, or a CNN's weights, that cannot be loaded."""


class OutputError(InputError):
    """An output that exists and that something else made, or whose record is corrupt."""


class ClusterError(InputError):
    """A cluster that cannot be reached or is too small."""


class InputChangedError(ImcapError):
    """The input changed while it was listed; the same command lists it again."""


class FailureBudgetError(ImcapError):
    """The run finished, and more images failed than `--max-failure-rate` allows."""

    exit_code = 3


class RayStartError(ImcapError):
    """Ray's processes do not start on this machine; if it is busy, they may the next time."""


class StalledError(ImcapError):
    """The run has made no progress for as long as Ray Data waits."""


class FullClusterError(StalledError):
    """The run has released its actors, because the cluster has no free resources for its tasks."""


IMAGE_ERROR_CODES: Final = (
    "missing",
    "permission_denied",
    "empty_file",
    "not_an_image",
    "truncated",
    "too_large",
    "unsupported_format",
    "read_error",
    "changed",
    "out_of_memory",
    "timeout",
    "internal",
)


class ImageError(ImcapError):
    """One image that cannot be captioned: `code` is one of `IMAGE_ERROR_CODES`, the text is for people."""

    def __init__(self, code: str, message: str) -> None:
        if code not in IMAGE_ERROR_CODES:
            raise ValueError(f"unknown image error code {code!r}, expected one of {IMAGE_ERROR_CODES}")
        super().__init__(message)
        self.code = code
        self.message = message

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str]]:
        return type(self), (self.code, self.message)


@contextmanager
def translate_errors(*kinds: type[Exception], to: type[ImcapError], message: str) -> Iterator[None]:
    """Raise exceptions of these kinds, which libraries raise, as `to`: "message: text of the exception"."""
    try:
        yield
    except kinds as error:
        raise to(f"{message}: {error}") from error
