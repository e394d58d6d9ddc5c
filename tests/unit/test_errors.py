"""Exit codes by class, and pickling of ImageError."""

from __future__ import annotations

import pickle

import pytest

from imcap_ray import errors
from imcap_ray.errors import IMAGE_ERROR_CODES, FailureBudgetError, ImageError, ImcapError, InputError

ALL = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]


def test_every_error_is_an_imcap_error() -> None:
    assert len(ALL) == 13
    assert all(issubclass(error, ImcapError) for error in ALL)


@pytest.mark.parametrize("error", ALL)
def test_the_exit_code_depends_on_whether_work_began(error: type[ImcapError]) -> None:
    expected = 2 if issubclass(error, InputError) else 3 if error is FailureBudgetError else 1

    assert error.exit_code == expected


@pytest.mark.parametrize("code", IMAGE_ERROR_CODES)
def test_an_image_error_survives_pickling(code: str) -> None:
    error = pickle.loads(pickle.dumps(ImageError(code, "no such file: a.jpg")))

    assert (type(error), error.code, error.message, str(error)) == (
        ImageError,
        code,
        "no such file: a.jpg",
        "no such file: a.jpg",
    )


def test_an_unknown_error_code_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown image error code 'broken'"):
        ImageError("broken", "")
