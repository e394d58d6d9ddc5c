"""Copies of a picture are found among many others, as by pairwise comparison."""

from __future__ import annotations

import io
import os

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from imcap_ray.data.image_decoding import decode_image
from imcap_ray.data.near_duplicates import HASH_BYTES, MAX_DISTANCE, Fingerprint, find_near_duplicates, fingerprint
from tests.malformed_images import photo
from tests.small_data import jpeg


def look(data: bytes) -> Fingerprint:
    return fingerprint(decode_image(data, image_size=32).pixels)


def saved(image: Image.Image, format: str, **options: int) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    "copy",
    [
        saved(photo(400, 300), "JPEG", quality=40),
        saved(photo(400, 300), "PNG"),
        saved(photo(400, 300).resize((150, 90)), "JPEG"),
        saved(photo(400, 300).convert("L"), "PNG"),
        saved(ImageEnhance.Brightness(photo(400, 300)).enhance(0.9), "WEBP"),
    ],
    ids=["quality", "format", "size", "grey", "brightness"],
)
def test_a_reencoded_copy_is_a_near_duplicate(copy: bytes) -> None:
    others = [look(jpeg(number)) for number in range(60)]

    groups = find_near_duplicates([look(saved(photo(400, 300), "JPEG", quality=95)), *others, look(copy)])

    assert groups == [[0, 61]]


def test_a_mirrored_picture_is_not_a_near_duplicate() -> None:
    mirrored = photo(400, 300).transpose(Image.Transpose.FLIP_LEFT_RIGHT)

    assert find_near_duplicates([look(saved(photo(400, 300), "PNG")), look(saved(mirrored, "PNG"))]) == []


def test_exactly_the_pairs_within_the_distance_are_found() -> None:
    """Compare the bands with pairwise comparison, on random hashes with some bits flipped."""
    random = np.random.default_rng(0)
    thumbnail = os.urandom(256)  # identical for all, so that only the hash decides
    looks: list[Fingerprint] = []
    for _ in range(40):
        bits = random.integers(0, 2, 8 * HASH_BYTES, dtype=np.uint8)
        for num_turned in (0, MAX_DISTANCE, MAX_DISTANCE + 1):
            turned = bits.copy()
            turned[random.permutation(len(bits))[:num_turned]] ^= 1
            looks.append(Fingerprint(np.packbits(turned).tobytes(), thumbnail))
    hashes = [np.unpackbits(np.frombuffer(one, np.uint8)) for one, _ in looks]
    expected = [[n, n + 1] for n in range(0, len(looks), 3)]  # the third of each is too far away
    for n in range(0, len(looks), 3):
        if (hashes[n + 1] != hashes[n + 2]).sum() <= MAX_DISTANCE:
            expected[n // 3].append(n + 2)

    assert find_near_duplicates(looks) == expected


def test_pictures_with_the_same_hash_are_one_group() -> None:
    same = look(jpeg(1))

    assert find_near_duplicates([same] * 3000) == [list(range(3000))]


def test_no_or_one_picture_has_no_near_duplicates() -> None:
    assert find_near_duplicates([]) == find_near_duplicates([look(jpeg(1))]) == []
