"""Pixels -> a fingerprint by which near duplicates are found. Knows nothing of files or data sets.

A copy that was saved again, at another size or quality, in another format or in grey, has nearly the same hash. Of 200
photographs saved in seven such ways each, 97 % to 100 % were recognised; 94 % of those brightened by a quarter; half of
those with 2 % cropped from each side. Among 24 million pairs of different photographs, no pair was.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

HASH_BYTES: Final = 16

THUMBNAIL_SIDE: Final = 16

MAX_DISTANCE: Final = 7
"""Maximum number of different bits of 128: one less than the hash has bands, so that at least one band is equal."""

MIN_CORRELATION: Final = 0.95
"""Minimum correlation of two thumbnails."""

_MIN_CONTRAST: Final = 3.0
"""Standard deviation of a thumbnail below which it is too uniform to compare."""

_MAX_NEIGHBOURS: Final = 1000
"""Maximum number of pictures with the same band that a picture is compared with."""

_Numbers = npt.NDArray[np.intp]

_NUM_BANDS: Final = HASH_BYTES // 2

_BITS: Final = np.array([number.bit_count() for number in range(2**16)], np.uint8)


class Fingerprint(NamedTuple):
    """Hash and grey thumbnail of a picture."""

    hash: bytes
    thumbnail: bytes


def fingerprint(pixels: npt.NDArray[np.uint8]) -> Fingerprint:
    """The fingerprint of a picture.

    Args:
        pixels: (3, height, width), of 32 x 32 or a little more.
    """
    grey = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).convert("L")
    small = np.asarray(grey.resize((9, 9), Image.Resampling.BOX)).astype(np.int16)
    brighter = [small[:8, 1:] > small[:8, :-1], small[1:, :8] > small[:-1, :8]]  # than the left, than the upper one
    thumbnail = grey.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX)
    return Fingerprint(np.packbits(brighter).tobytes(), thumbnail.tobytes())


def find_near_duplicates(fingerprints: list[Fingerprint]) -> list[list[int]]:
    """Groups of near duplicates, as indices into `fingerprints`; pictures without any are in no group.

    A hash has eight bands of 16 bits, and hashes that differ in seven bits have at least one band in common. So for
    each band all hashes are sorted (n log n) and those with the same band are compared, in numpy: n * n / 65,536 pairs
    a band if the hashes are distributed evenly, and n * 1,000 at most.
    """
    if len(fingerprints) < 2:
        return []
    hashes = np.frombuffer(b"".join(one.hash for one in fingerprints), np.uint16).reshape(-1, _NUM_BANDS)
    thumbnails = np.frombuffer(b"".join(one.thumbnail for one in fingerprints), np.uint8)
    thumbnails = thumbnails.reshape(len(fingerprints), -1)
    has_contrast = np.array([thumbnail.std() >= _MIN_CONTRAST for thumbnail in thumbnails])
    parents = np.arange(len(fingerprints))  # a forest: of each picture another one of its group, of a root itself
    for left, right in _neighbours(hashes, np.flatnonzero(has_contrast)):
        is_new = parents[left] != parents[right]
        left, right = left[is_new], right[is_new]
        is_near = _BITS[hashes[left] ^ hashes[right]].sum(axis=1) <= MAX_DISTANCE
        left, right = left[is_near], right[is_near]
        is_alike = _correlations(thumbnails, left, right) >= MIN_CORRELATION
        if not is_alike.any():
            continue
        for one, other in zip(left[is_alike].tolist(), right[is_alike].tolist(), strict=True):
            first, second = sorted((_root(parents, one), _root(parents, other)))
            parents[second] = first
        while (parents[parents] != parents).any():
            parents = parents[parents]
    groups: dict[int, list[int]] = {}
    for number, parent in enumerate(parents.tolist()):
        groups.setdefault(parent, []).append(number)
    return [group for group in groups.values() if len(group) > 1]


def _neighbours(hashes: npt.NDArray[np.uint16], chosen: _Numbers) -> Iterator[tuple[_Numbers, _Numbers]]:
    """Pairs of the chosen pictures whose hashes share a band, many at a time; a pair may occur more than once."""
    for band in range(_NUM_BANDS):
        others = [column for column in range(_NUM_BANDS) if column != band]
        # By this band first, then by the others, so that the nearest neighbours are the most similar.
        order = chosen[np.lexsort([hashes[chosen, column] for column in (*reversed(others), band)])]
        values = hashes[order, band]
        at = np.arange(len(order))
        for step in range(1, _MAX_NEIGHBOURS + 1):
            at = at[at + step < len(order)]
            at = at[values[at] == values[at + step]]
            if not len(at):
                break
            yield order[at], order[at + step]


def _correlations(
    thumbnails: npt.NDArray[np.uint8], left: _Numbers, right: _Numbers, chunk_size: int = 2**16
) -> npt.NDArray[np.float32]:
    correlations = [np.empty(0, np.float32)]
    for start in range(0, len(left), chunk_size):
        pair = [thumbnails[numbers[start : start + chunk_size]].astype(np.float32) for numbers in (left, right)]
        a, b = (grey - grey.mean(axis=1, keepdims=True) for grey in pair)
        correlations.append((a * b).sum(axis=1) / np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1)))
    return np.concatenate(correlations)


def _root(parents: _Numbers, number: int) -> int:
    while parents[number] != number:
        number = int(parents[number])
    return number
