"""Randomly damaged files of all formats quickly give a picture or an ImageError that is not internal."""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imcap_ray.data.image_decoding import decode_image
from imcap_ray.errors import IMAGE_ERROR_CODES, ImageError
from tests.malformed_images import OK, encode, malformed_images, photo

SIZE = 48
MAX_PIXELS = 1_000_000
MAX_SECONDS = 5.0  # of computing; the slowest of 60,000 took 0.1

VALID_FILES = [data for _, data, code in malformed_images() if code == OK and len(data) < 8000]
VALID_FILES += [encode(photo(480, 360), "JPEG"), encode(photo(480, 360), "JPEG", progressive=True)]  # reduced

# What lengths, offsets and counts are set to.
EXTREMES = [
    number.to_bytes(size, order, signed=number < 0)
    for size in (1, 2, 4, 8)
    for number in (0, 1, -1, 2 ** (8 * size - 1) - 1, -(2 ** (8 * size - 1)))
    for order in ("little", "big")
]


class Damage(NamedTuple):
    place: float
    """In the data, or in its first 200 bytes, where the formats have their headers; 0 to 1."""
    in_header: bool
    kind: str
    data: bytes
    length: int


DAMAGE = st.builds(
    Damage,
    place=st.floats(0, 1, exclude_max=True),
    in_header=st.booleans(),
    kind=st.sampled_from(["flip", "overwrite", "insert", "delete", "repeat", "zero", "truncate"]),
    data=st.sampled_from(EXTREMES) | st.binary(min_size=1, max_size=8),
    length=st.integers(1, 400),
)


def damaged(file: bytes, damages: list[Damage]) -> bytes:
    data = bytearray(file)
    for damage in damages:
        at = int(damage.place * (min(len(data), 200) if damage.in_header else len(data)))
        end = at + damage.length
        match damage.kind:
            case "flip" if data:
                data[at] ^= 1 << damage.length % 8
            case "overwrite":
                data[at : at + len(damage.data)] = damage.data
            case "insert":
                data[at:at] = damage.data
            case "delete":
                del data[at:end]
            case "repeat":
                data[at:at] = data[at:end]
            case "zero":
                data[at:end] = bytes(len(data[at:end]))
            case "truncate":
                del data[at:]
    return bytes(data)


def check(data: bytes) -> None:
    start = time.process_time()
    try:
        image = decode_image(data, image_size=SIZE, max_pixels=MAX_PIXELS)
    except ImageError as error:
        assert error.code in IMAGE_ERROR_CODES
        assert error.code != "internal", error.message
        assert error.message.isprintable() and len(error.message) < 300
    else:
        assert image.pixels.shape == (3, SIZE, SIZE) and image.pixels.dtype == np.uint8
        assert 0 < image.width * image.height <= MAX_PIXELS
        assert image.format
    assert time.process_time() - start < MAX_SECONDS


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(file=st.sampled_from(VALID_FILES), damages=st.lists(DAMAGE, min_size=1, max_size=6))
def test_a_corrupt_file_gives_a_picture_or_an_image_error(file: bytes, damages: list[Damage]) -> None:
    check(damaged(file, damages))


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(
    first=st.sampled_from(VALID_FILES),
    second=st.sampled_from(VALID_FILES),
    cut=st.floats(0, 1),
    join=st.floats(0, 1),
)
def test_two_files_joined_give_a_picture_or_an_image_error(
    first: bytes, second: bytes, cut: float, join: float
) -> None:
    check(first[: int(cut * len(first))] + second[int(join * len(second)) :])


@pytest.mark.parametrize("number", EXTREMES, ids=lambda number: number.hex())
def test_a_header_with_an_extreme_number_gives_a_picture_or_an_image_error(number: bytes) -> None:
    for file in VALID_FILES[::6]:
        for at in range(0, min(len(file), 64), 4):
            check(file[:at] + number + file[at + len(number) :])


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(signature=st.sampled_from([b"", *(data[:16] for data in VALID_FILES)]), data=st.binary(max_size=300))
def test_random_bytes_give_a_picture_or_an_image_error(signature: bytes, data: bytes) -> None:
    check(signature + data)
