"""A data set -> what it holds and what is wrong with it: the data doctor. Knows no model and no Ray.

What would spoil a training, and makes `imcap check` end with exit code 3:

    no_split        no training images, or no validation images
    missing         more than 10 % of the captioned images have no file
    unreadable      more than 10 % of the files cannot be read or are no image
    leak            an image in two splits, by its name, its file or its bytes
    near_leak       more than 1 % of the validation or test images look the same as one of another split
    encoding        more than 1 % of the captions show that a text was read in the wrong encoding

All else is worth a look.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from statistics import median
from typing import Any, Final

import pyarrow as pa

from imcap_ray import storage
from imcap_ray.config import Recipe
from imcap_ray.data.datasets import DATASET_SCHEMA, SPLITS, TRAIN, VALIDATION, CaptionedImages
from imcap_ray.data.image_decoding import decode_image
from imcap_ray.data.image_formats import is_image_name
from imcap_ray.data.image_reading import read_rows, root_of
from imcap_ray.data.manifest import image_columns_of
from imcap_ray.data.near_duplicates import describe_look, find_lookalikes
from imcap_ray.errors import ImageError, InputError
from imcap_ray.text.escaping import printable
from imcap_ray.text.mojibake import FAULTS
from imcap_ray.text.tokenizers import tokenize

MAX_BAD_IMAGES: Final = 0.1
"""Share of images that may be missing or unreadable; what `imcap caption` lets fail, too."""

MAX_NEAR_LEAKS: Final = 0.01
"""Share of the images of a split."""

MAX_BAD_CAPTIONS: Final = 0.01

MAX_UNKNOWN_TOKENS: Final = 0.1
"""Share of a split's tokens that the training vocabulary need not know; more is told."""

SMALLEST_SIDE: Final = 64
"""Fewer pixels than this on a side show little of what a caption tells."""

# A note is what was odd when the captions were read.
_NO_CAPTION: Final = re.compile("images? ha(s|ve) no caption")

_WORST_FIRST: Final = (
    *("no_split", "missing", "unreadable", "leak", "near_leak", "encoding", "note", "without_captions", "odd_names"),
    *("num_captions", "unknown_words", "repeated", "repeated_captions", "short", "small", "long"),
)

_NUM_EXAMPLES: Final = 3

_IMAGES_AT_A_TIME: Final = 256

LOOK_SIZE: Final = 32
"""Pixels on a side that images are decoded to. A large JPEG is then read at an eighth of its size, and whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One kind of thing that is wrong, or odd."""

    code: str
    count: int
    text: str
    """What stands behind the count: "validation images are byte for byte in train too"."""
    examples: list[str] = field(default_factory=list)
    """The first few."""
    spoils: bool = False
    """Whether a training would be spoilt by it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataCheck:
    """What a data set holds, and what is wrong with it, the worst first."""

    location: str
    format: str
    splits: dict[str, int]
    """Images by split."""
    captions: dict[str, Any]
    """How many there are, for each image and of which length in tokens."""
    vocabulary: dict[str, Any]
    """The training vocabulary, and the share of the other splits' tokens that it knows."""
    images: dict[str, Any]
    """How many were read, their formats and sizes; empty if none was decoded."""
    findings: list[Finding]
    columns: str = ""
    """From which columns of Parquet tables the data are."""

    @property
    def spoils(self) -> bool:
        """Whether anything found would spoil a training."""
        return any(finding.spoils for finding in self.findings)

    def to_mapping(self) -> dict[str, Any]:
        """The check as plain dictionaries and lists, ready for JSON."""
        return {**asdict(self), "spoils": self.spoils}

    def to_text(self) -> str:
        """The check for people: what there is, then what is wrong, the worst first."""
        lines = [f"{self.location}: {self.format}", *(f"  {line}" for line in self._facts())]
        if self.columns:
            lines.insert(1, f"  {self.columns}")
        for title, spoils in (("would spoil a training:", True), ("worth a look:", False)):
            chosen = [finding for finding in self.findings if finding.spoils == spoils]
            if chosen:
                lines += ["", title, *(f"{finding.count:9,} {_with_examples(finding)}" for finding in chosen)]
        num_spoiling = sum(finding.spoils for finding in self.findings)
        if num_spoiling:
            end = f"not fit to train on: {num_spoiling} thing{'s' * (num_spoiling != 1)} would spoil a training"
        else:
            end = "nothing found that would spoil a training"
        return "\n".join([*lines, "", end])

    def _facts(self) -> Iterator[str]:
        counts = ", ".join(f"{count:,} {name}" for name, count in self.splits.items()) or "no"
        yield f"{counts} images; {_describe_captions(self.captions)}"
        if self.images:
            yield _describe_images(self.images)
        yield from _describe_vocabulary(self.vocabulary)


def check_dataset(
    dataset: CaptionedImages,
    *,
    recipe: Recipe,
    decode: bool = True,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> DataCheck:
    """Look for whatever is wrong with a data set.

    Args:
        recipe: whose vocabulary and longest caption the captions are judged by.
        decode: read and decode every image, on all cores: 1 ms for a small photograph, 10 or 20 for a large one.
        on_progress: called with the numbers of images done and of all.
    """
    rows = dataset.table.to_pylist()
    files = _list_files(dataset)
    tokens = _count_tokens(rows, recipe.vocabulary.tokenizer)
    images: dict[str, Any] = {}
    findings = [*_check_splits(dataset), *_check_files(dataset, rows, files), *_check_captions(rows, tokens, recipe)]
    if decode:
        there = [row for row in rows if row["image_path"] and _is_there(dataset, row["image_path"], files)]
        seen = list(_look_at_all(dataset, there, on_progress))
        images = _measure_images(seen) if seen else {}
        findings += _check_images(seen)
    findings += map(_from_note, dataset.notes)
    # Both count images without captions: the reader those that the data name, this module those in the same folders.
    without = [one for one in findings if one.code == "without_captions" or _NO_CAPTION.match(one.text)]
    for finding in sorted(without, key=lambda one: one.count)[:-1]:
        findings.remove(finding)
    return DataCheck(
        location=dataset.location,
        format=dataset.format,
        splits=dataset.count_splits(),
        captions=_measure_captions(rows, tokens),
        vocabulary=_measure_vocabulary(tokens, recipe),
        images=images,
        findings=sorted(findings, key=_badness),
        columns=dataset.columns_note,
    )


def _badness(finding: Finding) -> tuple[bool, int, int]:
    return not finding.spoils, _WORST_FIRST.index(finding.code), -finding.count


# ---- files
def _list_files(dataset: CaptionedImages) -> dict[str, set[str]]:
    """Names of the files in each folder that an image of the data set should be in."""
    folders = {storage.parent(path) for path in _paths(dataset) if path not in dataset.packed}
    return {folder: _names_in(folder) for folder in folders}


def _paths(dataset: CaptionedImages) -> list[str]:
    return [path for table in (dataset.table, dataset.left_out) for path in table["image_path"].to_pylist() if path]


def _names_in(folder: str) -> set[str]:
    try:
        return {file.name for file in storage.list_files(folder, recursive=False)}
    except (InputError, OSError, ValueError):  # not there, not to be read, or no name that a file can have
        return set()


def _is_there(dataset: CaptionedImages, path: str, files: Mapping[str, set[str]]) -> bool:
    return path in dataset.packed or path.rpartition("/")[2] in files[storage.parent(path)]


def _check_splits(dataset: CaptionedImages) -> Iterator[Finding]:
    names = [f"{leak.image} ({leak.split} and {leak.other})" for leak in dataset.leaks]
    yield from _found(
        "leak", names, "image is said to be in two splits", "images are said to be in two splits", spoils=True
    )
    counts = dataset.count_splits()
    for split in (TRAIN, VALIDATION):
        if split not in counts:
            yield Finding(code="no_split", count=0, text=f"{split} images: a training needs some", spoils=True)


def _check_files(
    dataset: CaptionedImages, rows: list[dict[str, Any]], files: Mapping[str, set[str]]
) -> Iterator[Finding]:
    captioned = [*rows, *dataset.left_out.to_pylist()]  # a row that names no file has none: nothing can be learnt of it
    missing = [row for row in captioned if not row["image_path"] or not _is_there(dataset, row["image_path"], files)]
    if missing:
        num_in_splits = sum(row["split"] != "" for row in missing)
        num_captions = sum(len(row["captions"]) for row in missing)
        names = [row["image_id"] for row in missing]
        yield from _found(
            "missing",
            names,
            f"captioned image has no file ({num_captions:,} captions)",
            f"captioned images have no file ({num_captions:,} captions{_shared_beginning(names, captioned)})",
            spoils=num_in_splits > MAX_BAD_IMAGES * len(rows),
        )
    known = {os.path.normpath(path) for path in _paths(dataset)}
    found = (f"{folder}/{name}" for folder in sorted(files) for name in sorted(files[folder]) if is_image_name(name))
    without = [path.rpartition("/")[2] for path in found if os.path.normpath(path) not in known]
    yield from _found("without_captions", without, "image file has no caption", "image files have no caption")
    odd = [row["image_id"] for row in captioned if not is_image_name(row["image_path"])]
    if len(odd) < len(captioned) / 2:  # else it is how images are named here
        ending = "does not end like an image's"
        yield from _found(
            "odd_names", odd, f"captioned name {ending}", f"captioned names {ending.replace('does', 'do')}"
        )


def _shared_beginning(missing: Sequence[str], captioned: Sequence[Mapping[str, Any]]) -> str:
    """Whether the missing are of one kind by their names, as when the captions of another set were added."""
    letter, count = Counter(name[:1] for name in missing).most_common(1)[0]
    num_with_letter = sum(row["image_id"].startswith(letter) for row in captioned)
    if count < 10 or count < 0.9 * len(missing) or num_with_letter > count:
        return ""
    return f"; {count:,} of them begin with {letter!r}, as no other does"


# ---- pixels
@dataclass(frozen=True, slots=True)
class _Seen:
    """What was seen of one image."""

    image_id: str
    split: str
    error_code: str = ""
    sha256: str = ""
    look: tuple[bytes, bytes] = (b"", b"")
    width: int = 0
    height: int = 0
    format: str = ""


def _look_at_all(
    dataset: CaptionedImages, rows: list[dict[str, Any]], on_progress: Callable[[int, int], None]
) -> Iterator[_Seen]:
    places = dataset.manifest(pa.Table.from_pylist(rows, schema=DATASET_SCHEMA))
    root = root_of(places) if rows else ""
    image_columns = image_columns_of(places)
    files = [place for place in places.to_pylist() if not place["table_path"]]
    packed = [place for place in places.to_pylist() if place["table_path"]]

    def look_at_file(place: dict[str, Any]) -> _Seen:
        return look_at(next(read_rows([place], root)))

    def look_at(found: tuple[dict[str, Any], bytes | ImageError]) -> _Seen:
        return _look_at(rows[found[0]["manifest_id"]], found[1])

    read_packed = read_rows(packed, root, image_columns=image_columns)
    # Threads, for Pillow decodes and hashlib hashes without the interpreter's lock; stores take time to answer, too.
    with ThreadPoolExecutor(_num_cores()) as pool:
        num_done = 0
        for look, images in ((look_at_file, iter(files)), (look_at, read_packed)):
            while chunk := list(islice(images, _IMAGES_AT_A_TIME)):
                yield from pool.map(look, chunk)
                num_done += len(chunk)
                on_progress(num_done, len(rows))


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _look_at(row: Mapping[str, Any], data: bytes | ImageError) -> _Seen:
    try:
        if isinstance(data, ImageError):
            raise data
        image = decode_image(data, image_size=LOOK_SIZE)
    except ImageError as error:
        return _Seen(row["image_id"], row["split"], error.code)
    return _Seen(
        row["image_id"],
        row["split"],
        sha256=image.sha256,
        look=describe_look(image.pixels),
        width=image.width,
        height=image.height,
        format=image.format,
    )


def _check_images(seen: Sequence[_Seen]) -> Iterator[Finding]:
    failed: dict[str, list[str]] = defaultdict(list)
    for image in seen:
        if image.error_code:
            failed[image.error_code].append(image.image_id)
    spoils = sum(map(len, failed.values())) > MAX_BAD_IMAGES * len(seen)
    for code, names in failed.items():
        yield from _found(
            "unreadable", names, f"image cannot be read ({code})", f"images cannot be read ({code})", spoils=spoils
        )

    readable = [image for image in seen if not image.error_code]
    by_hash: dict[str, list[_Seen]] = defaultdict(list)
    for image in readable:
        by_hash[image.sha256].append(image)
    yield from _check_twins(by_hash.values(), "leak", "byte for byte", {})
    firsts = [group[0] for group in by_hash.values()]
    groups = [[firsts[number] for number in group] for group in find_lookalikes([image.look for image in firsts])]
    split_sizes = Counter(image.split for image in readable)
    yield from _check_twins(groups, "near_leak", "to the eye", split_sizes)

    small = [image.image_id for image in readable if min(image.width, image.height) < SMALLEST_SIDE]
    sides = f"a side of fewer than {SMALLEST_SIDE} pixels"
    yield from _found("small", small, f"image has {sides}", f"images have {sides}")


def _check_twins(
    groups: Iterable[Sequence[_Seen]], code: str, how: str, split_sizes: Mapping[str, int]
) -> Iterator[Finding]:
    """Images of a group are the same: which of them are in two splits, and which are in one split twice.

    Args:
        split_sizes: images by split, where some leaks are tolerated.
    """
    leaks: dict[tuple[str, str], list[str]] = defaultdict(list)
    repeated: dict[str, list[str]] = defaultdict(list)
    for group in groups:
        firsts: dict[str, str] = {}
        for image in sorted(group, key=lambda image: SPLITS.index(image.split)):
            others = [(split, name) for split, name in firsts.items() if split != image.split]
            if others:
                split, name = others[0]
                leaks[image.split, split].append(f"{image.image_id} = {name}")
            elif image.split in firsts:
                repeated[image.split].append(f"{image.image_id} = {firsts[image.split]}")
            firsts.setdefault(image.split, image.image_id)
    for (split, other), names in leaks.items():
        spoils = len(names) > MAX_NEAR_LEAKS * split_sizes.get(split, 0)
        rest = f"in {other} too, {how}"
        yield from _found(code, names, f"{split} image is {rest}", f"{split} images are {rest}", spoils=spoils)
    for split, names in repeated.items():
        rest = f"the same as another of {split}, {how}"
        yield from _found("repeated", names, f"{split} image is {rest}", f"{split} images are {rest}")


def _measure_images(seen: Sequence[_Seen]) -> dict[str, Any]:
    readable = [image for image in seen if not image.error_code]
    sizes = sorted((image.width * image.height, image.width, image.height) for image in readable)
    facts: dict[str, Any] = {"read": len(readable), "unreadable": len(seen) - len(readable)}
    facts["formats"] = dict(Counter(image.format for image in readable).most_common())
    if sizes:
        chosen = {"smallest": sizes[0], "median": sizes[len(sizes) // 2], "largest": sizes[-1]}
        facts |= {name: [width, height] for name, (_, width, height) in chosen.items()}
    return facts


def _describe_images(images: Mapping[str, Any]) -> str:
    if not images["read"]:
        return "no image could be read"
    formats = ", ".join(f"{count:,} {name}" for name, count in images["formats"].items())
    smallest, middle, largest = (" x ".join(map(str, images[name])) for name in ("smallest", "median", "largest"))
    sizes = f"all {smallest}" if smallest == largest else f"{smallest} to {largest}, median {middle}"
    return f"{images['read']:,} image files read: {formats}; {sizes} pixels"


# ---- captions
@dataclass(frozen=True, slots=True)
class _Tokens:
    """The tokens of all captions, counted."""

    lengths: list[int]
    """Of each caption."""
    by_split: dict[str, Counter[str]]


def _count_tokens(rows: list[dict[str, Any]], tokenizer: str) -> _Tokens:
    lengths: list[int] = []
    by_split: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        for caption in row["captions"]:
            tokens = tokenize(caption, tokenizer)
            lengths.append(len(tokens))
            by_split[row["split"]].update(tokens)
    return _Tokens(lengths, by_split)


def _measure_captions(rows: list[dict[str, Any]], tokens: _Tokens) -> dict[str, Any]:
    per_image = sorted(len(row["captions"]) for row in rows)
    lengths = sorted(tokens.lengths)
    return {
        "count": len(lengths),
        "per_image": {"fewest": per_image[0], "median": median(per_image), "most": per_image[-1]},
        "tokens": {
            "shortest": lengths[0],
            "median": median(lengths),
            "95 %": lengths[int(0.95 * (len(lengths) - 1))],
            "longest": lengths[-1],
        },
    }


def _measure_vocabulary(tokens: _Tokens, recipe: Recipe) -> dict[str, Any]:
    known = _known(tokens, recipe)
    coverage = {
        split: sum(count for token, count in counts.items() if token in known) / max(1, counts.total())
        for split, counts in tokens.by_split.items()
        if split != TRAIN
    }
    return {
        "tokenizer": recipe.vocabulary.tokenizer,
        "min_count": recipe.vocabulary.min_count,
        "tokens": len(known),
        "tokens_of_train": len(tokens.by_split.get(TRAIN, ())),
        "coverage": {split: coverage[split] for split in SPLITS if split in coverage},
    }


def _known(tokens: _Tokens, recipe: Recipe) -> set[str]:
    counts = tokens.by_split.get(TRAIN, Counter())
    return {token for token, count in counts.items() if count >= recipe.vocabulary.min_count}


def _check_captions(rows: list[dict[str, Any]], tokens: _Tokens, recipe: Recipe) -> Iterator[Finding]:
    captions = [(row["image_id"], caption) for row in rows for caption in row["captions"]]
    for what, (find, is_wrong_encoding) in FAULTS.items():
        found = [f"{piece} in {image_id}" for image_id, caption in captions if (piece := find(caption))]
        spoils = is_wrong_encoding and len(found) > MAX_BAD_CAPTIONS * len(captions)
        yield from _found("encoding", found, f"caption has {what}", f"captions have {what}", spoils=spoils)
    known = _known(tokens, recipe)
    for split, counts in tokens.by_split.items():
        unknown = Counter({token: count for token, count in counts.items() if token not in known})
        if split != TRAIN and unknown.total() > MAX_UNKNOWN_TOKENS * counts.total():
            text = f"of {counts.total():,} words of {split} are not in the training vocabulary"
            names = [token for token, _ in unknown.most_common(_NUM_EXAMPLES)]
            yield from _found("unknown_words", names, text, text, count=unknown.total())
    longest = recipe.training.max_caption_length
    num_long = sum(length > longest for length in tokens.lengths)
    cut = f"cut to {longest} tokens in training"
    yield from _found("long", [], f"caption is {cut}", f"captions are {cut}", count=num_long)
    num_short = sum(length < 2 for length in tokens.lengths)
    few = "fewer than two tokens"
    yield from _found("short", [], f"caption has {few}", f"captions have {few}", count=num_short)
    usual, num_usual = Counter(len(row["captions"]) for row in rows).most_common(1)[0]
    unusual = [row["image_id"] for row in rows if len(row["captions"]) != usual]
    if num_usual > 0.9 * len(rows):
        number = f"more or fewer than {usual} captions"
        yield from _found("num_captions", unusual, f"image has {number}", f"images have {number}")
    repeated = [row["image_id"] for row in rows if len(set(row["captions"])) < len(row["captions"])]
    twice = "the same caption twice"
    yield from _found("repeated_captions", repeated, f"image has {twice}", f"images have {twice}")


def _describe_captions(captions: Mapping[str, Any]) -> str:
    per_image, tokens = captions["per_image"], captions["tokens"]
    fewest, most = per_image["fewest"], per_image["most"]
    each = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    return (
        f"{captions['count']:,} captions, {each} an image, of {tokens['shortest']} to {tokens['longest']} tokens, "
        f"median {tokens['median']:g}"
    )


def _describe_vocabulary(vocabulary: Mapping[str, Any]) -> Iterator[str]:
    if vocabulary["tokens"]:
        coverage = vocabulary["coverage"].items()
        shares = ", ".join(f"{100 * share:.1f} % of the words of {split}" for split, share in coverage)
        yield (
            f"{vocabulary['tokens']:,} of {vocabulary['tokens_of_train']:,} training words stand there "
            f"{vocabulary['min_count']} times or more ({vocabulary['tokenizer']})"
            + (f"; they are {shares}" if shares else "")
        )


# ---- common
def _found(
    code: str, names: Sequence[str], one: str, many: str, *, count: int | None = None, spoils: bool = False
) -> list[Finding]:
    """A finding of these names, or of so many things, if there are any; `one` or `many` stands behind the number."""
    number = len(names) if count is None else count
    if not number:
        return []
    text = one if number == 1 else many
    return [Finding(code=code, count=number, text=text, examples=list(names[:_NUM_EXAMPLES]), spoils=spoils)]


def _with_examples(finding: Finding) -> str:
    if not finding.examples:
        return finding.text
    more = ", ..." if finding.count > len(finding.examples) else ""
    return f"{finding.text}: {', '.join(map(printable, finding.examples))}{more}"


def _from_note(note: str) -> Finding:
    """What was noticed while reading, which begins with its number, if it has one."""
    number, _, text = note.partition(" ")
    count = number.replace(",", "")
    return (
        Finding(code="note", count=int(count), text=text)
        if count.isdigit()
        else Finding(code="note", count=0, text=note)
    )
