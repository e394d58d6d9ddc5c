"""WebDataset tars -> their files, and which of them belong together. Knows neither captions nor listings of images.

The position of a member is the number of the 512-byte block at which its content begins; its header is in the block
before.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import tarfile
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, count
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np

from imcap_ray import storage

if TYPE_CHECKING:
    from typing_extensions import Self

_BUFFER_BYTES: Final = 2**20
"""Read at once while listing, so that small members over a network need no request each."""

DAMAGED: Final = (tarfile.TarError, OSError, EOFError)
"""Exceptions of `list_files` for a tar that cannot be read completely."""

_MAX_HEADER_BYTES: Final = 16 * 2**20
"""Maximum size of a header that extends another one, with a long name for instance; tarfile reads it at once."""

_EXTENDS_A_HEADER: Final = frozenset(
    {
        *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
        *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    }
)

_MALFORMED: Final = (ValueError, ArithmeticError, LookupError, TypeError, RecursionError)
"""Exceptions of tarfile for invalid headers, next to its own errors."""

_DIGEST_BYTES: Final = 12


class _CheckedTarInfo(tarfile.TarInfo):
    """A header. Raises `ReadError` where tarfile itself would end the listing silently, read backwards, or use up the
    memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """The header in a block.

        Raises:
            ReadError: it is malformed or incomplete.
            HeaderError: the tar ends here.
        """
        try:
            member = super().frombuf(buf, encoding, errors)
        except (tarfile.EmptyHeaderError, tarfile.EOFHeaderError):  # type: ignore[attr-defined]
            raise
        except (tarfile.HeaderError, *_MALFORMED) as error:
            raise tarfile.ReadError(str(error)) from error
        if member.size < 0:
            raise tarfile.ReadError(f"a header has a negative size: {member.size:,}")
        if member.type in _EXTENDS_A_HEADER and member.size > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"an extended header has {member.size:,} bytes, expected at most 16 MiB")
        return member

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> Self:
        """The next header of a tar, with those that extend it; see `frombuf` for exceptions."""
        try:
            return super().fromtarfile(tarfile)
        except _MALFORMED as error:
            raise _malformed(error) from error


def _malformed(error: BaseException) -> tarfile.ReadError:
    return tarfile.ReadError(f"a header is malformed: {error or type(error).__name__}")


@contextmanager
def open_tar(location: str) -> Iterator[tarfile.TarFile]:
    """An uncompressed tar, to be read from start to end."""
    with (
        storage.open_file(location) as file,
        io.BufferedReader(cast(Any, file), _BUFFER_BYTES) as buffered,
        tarfile.open(fileobj=buffered, mode="r:", tarinfo=_CheckedTarInfo) as tar,
    ):
        yield tar


def list_files(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The regular files of a tar, in its order. Raises one of `DAMAGED` if it ends early or a header is malformed."""
    members, end = iter(tar), 0
    while True:
        try:
            member = next(members, None)
        except _MALFORMED as error:  # for an impossible offset
            raise _malformed(error) from error
        if member is None:
            return
        # The size in an extended header replaces the one that `frombuf` has checked.
        if member.size < 0 or member.offset_data <= end:
            raise tarfile.ReadError(f"the header of {member.name!r} has a negative size or points backwards")
        end = member.offset_data
        if member.isreg() and not member.issparse():
            yield member


def block_of(member: tarfile.TarInfo) -> int:
    """Number of the block at which a member's content begins."""
    return member.offset_data // tarfile.BLOCKSIZE


def split_name(name: str) -> tuple[str, str]:
    """A member's key and extensions, split at the first dot of the file's name, as in WebDataset; a hidden file's key
    is "". The key does not contain the "./" that `tar -C folder .` puts before all names."""
    name = name.removeprefix("./")
    folder, slash, file_name = name.rpartition("/")
    stem, _, extension = file_name.partition(".")
    return f"{folder}{slash}{stem}" if stem else "", extension.lower()


def printable_name(member: tarfile.TarInfo) -> str:
    """The name of a member as valid Unicode, without a leading "./"."""
    return member.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace").removeprefix("./")


@dataclass(slots=True)
class Pairing:
    """Texts of a tar and the images they belong to, as indices into two lists of names.

    Order alone decides nothing: a text that may belong to either of two images belongs to none.
    """

    texts: list[list[list[int]]]
    """For each image its texts in groups: the first group with a caption is used."""
    unpaired: list[int] = field(default_factory=list)
    """Texts that belong to no image."""
    ambiguous: list[int] = field(default_factory=list)
    """Texts whose name is in the tar more or less often than their image's name."""


def pair_members(images: Sequence[str], texts: Sequence[str]) -> Pairing:
    """Pair the images and texts of one tar by their names, as WebDataset does in unambiguous cases.

    A text belongs to the image with the same name up to the last dot (`2023.05.00.jpg`, `2023.05.00.txt`), or if the
    text's name continues the image's (`k.jpg`, `k.caption.txt`). An image without such a text gets one whose name the
    image's continues (`k.left.jpg`, `k.right.jpg`, `k.txt`). If a key, which is the name up to the first dot, has a
    single image and no such texts (`k.image.jpg`, `k.caption.txt`), all texts of the key belong to it, unless other
    names in the tar are equal up to a later dot. If names are repeated, the first text of a name belongs to the first
    image, the second to the second, and so on.
    """
    groups: dict[str, _Group] = defaultdict(_Group)
    for number, name in enumerate(images):
        groups[split_name(name)[0]].images[name.removeprefix("./")].append(number)
    for number, name in enumerate(texts):
        groups[split_name(name)[0]].texts[name.removeprefix("./")].append(number)
    pairing = Pairing([[] for _ in images])
    has_later_dots = any(group.has_equal_names_beyond(key) for key, group in groups.items())
    for group in groups.values():
        _pair_group(group, pairing, is_key_enough=not has_later_dots)
    return pairing


class _Group:
    """The members with one key: their indices by name."""

    def __init__(self) -> None:
        self.images: dict[str, list[int]] = defaultdict(list)
        self.texts: dict[str, list[int]] = defaultdict(list)

    def has_equal_names_beyond(self, key: str) -> bool:
        """Whether an image and a text have the same name up to a dot that is not the first."""
        return any(stem != key for stem in {*map(_stem, self.images)} & {*map(_stem, self.texts)})


def _stem(name: str) -> str:
    """The name up to the last dot of the file's name."""
    folder, slash, file_name = name.rpartition("/")
    return f"{folder}{slash}{file_name.rpartition('.')[0]}"


def _pair_group(group: _Group, pairing: Pairing, *, is_key_enough: bool) -> None:
    stems = {_stem(name) for name in group.images}
    texts_of: dict[str, list[str]] = defaultdict(list)  # stem -> the texts of exactly that stem
    for text in group.texts:
        texts_of[_stem(text)].append(text)
    others = {stem: texts for stem, texts in texts_of.items() if stem not in stems}
    longer: dict[str, list[str]] = defaultdict(list)  # image's stem -> the texts whose stems continue it
    for stem, beginnings in _beginnings(others, stems):
        for beginning in beginnings:
            longer[beginning] += others[stem]
    shorter = dict(_beginnings(stems, others.keys()))
    order = {text: number for number, text in enumerate(group.texts)}
    paired: dict[str, list[str]] = defaultdict(list)  # text -> its images
    is_only = len(group.images) == 1
    for image, numbers in group.images.items():
        stem = _stem(image)
        own = texts_of.get(stem, []) + sorted(longer.get(stem, []), key=order.__getitem__)
        common = sorted((text for beginning in shorter[stem] for text in others[beginning]), key=order.__getitem__)
        if not own and not common and is_only and is_key_enough:
            own = list(group.texts)
        for text in (*own, *common):
            paired[text].append(image)
        for level in (own, common):
            matching = [group.texts[text] for text in level if len(group.texts[text]) == len(numbers)]
            for position, number in enumerate(numbers if matching else ()):
                pairing.texts[number].append([positions[position] for positions in matching])
    for text, positions in group.texts.items():
        if any(len(group.images[image]) != len(positions) for image in paired[text]):
            pairing.ambiguous += positions
        elif not paired[text]:
            pairing.unpaired += positions


def _beginnings(names: Iterable[str], known: Collection[str]) -> Iterator[tuple[str, list[str]]]:
    """Each name, with the known names that it continues after a dot."""
    lengths = {*map(len, known)}
    for name in names:
        dots = (match.start() for match in re.finditer(r"\.", name))
        yield name, [name[:dot] for dot in dots if dot in lengths and name[:dot] in known]


class ImageIds:
    """Chooses ids for the images of tars, in the order of the tars' names.

    An image's id is its key. If an earlier tar has the same key, the tar's name precedes it; a second image with the
    same key has its file's name as id. So the ids of a folder's images stay the same when tars are appended.
    """

    def __init__(self) -> None:
        self._known: set[bytes] = set()
        self._tar = ""
        self._keys: set[str] = set()

    def choose(self, tar_name: str, member: tarfile.TarInfo) -> str:
        """The id of an image in this tar, given by its name below the input."""
        if tar_name != self._tar:
            self._tar, self._keys = tar_name, set()
        name = printable_name(member)
        key, _ = split_name(name)
        own = name if key in self._keys else key
        self._keys.add(key)
        stem = tar_name.removesuffix(".tar")
        at_block = f"{stem}/{own}#{block_of(member)}"
        repeated = (f"{at_block}#{number}" for number in count(2))  # only for names that are chosen to collide
        candidates = chain((own, f"{stem}/{own}", at_block), repeated)
        chosen = next(candidate for candidate in candidates if digest(candidate) not in self._known)
        self._known.add(digest(chosen))
        return chosen


class IdSet:
    """A fixed set of ids, in 12 bytes each."""

    def __init__(self, ids: Iterable[str]) -> None:
        digests = bytearray()
        for image_id in ids:
            digests += digest(image_id)
        self._digests = np.ndarray(len(digests) // _DIGEST_BYTES, f"S{_DIGEST_BYTES}", digests)
        self._digests.sort()

    def __contains__(self, image_id: str) -> bool:
        wanted = np.bytes_(digest(image_id).rstrip(b"\0"))  # numpy drops zeros at the end
        position = int(np.searchsorted(self._digests, wanted))
        return position < len(self._digests) and bool(self._digests[position] == wanted)


def digest(image_id: str) -> bytes:
    """Twelve bytes that represent an id of any length: among 100 million ids, a collision by chance is negligible."""
    return hashlib.blake2b(image_id.encode(), digest_size=_DIGEST_BYTES).digest()


def read_files(
    location: str, blocks: Iterable[int], *, max_bytes: int
) -> Iterator[tuple[int, bytes | OSError | tarfile.TarError]]:
    """The contents of some members of a tar, with their blocks; an error for a member that cannot be read or is larger
    than `max_bytes`.

    Raises:
        OSError: the tar itself cannot be read.
    """
    with storage.open_file(location) as file:
        for block in blocks:
            start = block * tarfile.BLOCKSIZE
            header = file.read_at(tarfile.BLOCKSIZE, start - tarfile.BLOCKSIZE)
            try:
                size = _CheckedTarInfo.frombuf(header, tarfile.ENCODING, "surrogateescape").size
            except tarfile.TarError as error:
                yield block, error
                continue
            if size > max_bytes:
                yield block, OSError(errno.EFBIG, os.strerror(errno.EFBIG), location)
                continue
            content = file.read_at(size, start)
            truncated = tarfile.ReadError(f"ends after {len(content):,} of {size:,} bytes")
            yield block, bytes(content) if len(content) == size else truncated
