"""A data set -> its contents and its problems. Knows no model and no Ray.

These problems make a data set unusable for training, and give `imcap check` exit code 3:

    no_split        no training images, or no validation images
    missing         more than 10 % of the captioned images have no file
    unreadable      more than 10 % of the files cannot be read or are not images
    leak            an image in two splits, by its name, its file or its bytes
    near_leak       more than 1 % of the validation or test images are near duplicates of images in another split, and
                    the data name the splits; otherwise near duplicates are put into one split
    encoding        more than 1 % of the captions show that a text was read in the wrong encoding

All other problems are warnings.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from statistics import median
from typing import Final, TypedDict, TypeVar

import pyarrow as pa

from imcap_ray import storage
from imcap_ray.config import AUTO, Recipe
from imcap_ray.data.datasets import DATASET_SCHEMA, SPLITS, TRAIN, VALIDATION, CaptionedImages
from imcap_ray.data.datasets.dataset import DatasetRow, examples
from imcap_ray.data.image_decoding import decode_image
from imcap_ray.data.image_formats import is_image_name
from imcap_ray.data.image_reading import read_rows, root_of
from imcap_ray.data.manifest import image_columns_of
from imcap_ray.data.near_duplicates import Fingerprint, find_near_duplicates, fingerprint
from imcap_ray.data.schemas import ManifestRow
from imcap_ray.errors import DatasetError, ImageError, InputError
from imcap_ray.text.escaping import printable
from imcap_ray.text.mojibake import ENCODING_FAULTS
from imcap_ray.text.tokenizers import MIN_ENGLISH_WORDS, choose_tokenizer, share_of_english, tokenize_words
from imcap_ray.web import is_web

MAX_BAD_IMAGES: Final = 0.1
"""Share of images that may be missing or unreadable; also the default of `imcap caption --max-failure-rate`."""

MAX_NEAR_LEAKS: Final = 0.01
"""Share of the images of a split."""

MAX_BAD_CAPTIONS: Final = 0.01

MAX_UNKNOWN_TOKENS: Final = 0.1
"""Share of a split's tokens that may be missing from the training vocabulary without a warning."""

FEW_VALIDATION_IMAGES: Final = 50
"""Scores on fewer validation images depend so much on chance that the choice of the best epoch does too."""

# Common in English captions, where a fifth of the words are these, and rare in other languages.
MAX_COMPARED_IMAGES: Final = 50_000
"""Among more images, near duplicates are not put into one split, because one process would have to read all images."""

MAX_MOVED_IMAGES: Final = 0.5
"""Share of the training images that may move to the splits of their near duplicates."""

SMALLEST_SIDE: Final = 64
"""An image with fewer pixels on a side shows little of what a caption describes."""

# Of a note by the reader of the data set.
_NO_CAPTION: Final = re.compile("images? ha(s|ve) no caption")

# Codes of findings, the most severe first. A `note` is a problem that the reader of the data set found.
_SEVERITY: Final = (
    *("no_split", "missing", "unreadable", "leak", "near_leak", "encoding", "note", "without_captions", "odd_names"),
    *(
        "few_validation",
        "unlike_train",
        "outliers",
        "language",
        "num_captions",
        "unknown_words",
        "repeated",
        "repeated_captions",
        "short",
        "small",
        "long",
    ),
)

_NUM_EXAMPLES: Final = 3

_IMAGES_PER_BATCH: Final = 256

FINGERPRINT_SIZE: Final = 32
"""Pixels on a side that images are decoded to. A large JPEG is then decoded completely, at an eighth of its size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A kind of problem."""

    code: str
    count: int
    text: str
    """Text that follows the count: "validation images are also in train, byte for byte"."""
    examples: list[str] = field(default_factory=list)
    """The first few cases."""
    spoils: bool = False
    """Whether it makes the data set unusable for training."""


class ImageCaptions(TypedDict):
    """Number of captions of an image."""

    fewest: int
    median: float
    most: int


TokenCounts = TypedDict("TokenCounts", {"shortest": int, "median": float, "95 %": int, "longest": int})
"""Number of tokens of a caption."""


class CaptionFacts(TypedDict):
    """Numbers of captions and of their tokens."""

    count: int
    per_image: ImageCaptions
    tokens: TokenCounts


class VocabularyFacts(TypedDict):
    """The training vocabulary, and the share of the other splits' tokens that it has."""

    tokenizer: str
    min_count: int
    tokens: int
    tokens_of_train: int
    coverage: dict[str, float]


class ImageFacts(TypedDict, total=False):
    """Numbers of images, their formats and sizes; empty if none was decoded."""

    read: int
    unreadable: int
    formats: dict[str, int]
    smallest: list[int]
    """Width and height."""
    median: list[int]
    largest: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataCheck:
    """Contents and problems of a data set, the most severe problem first."""

    location: str
    format: str
    splits: dict[str, int]
    """Number of images by split."""
    captions: CaptionFacts
    vocabulary: VocabularyFacts
    images: ImageFacts
    findings: list[Finding]
    columns: str = ""
    """Columns of Parquet tables that the data were read from, for people."""

    @property
    def spoils(self) -> bool:
        """Whether a problem makes the data set unusable for training."""
        return any(finding.spoils for finding in self.findings)

    def to_mapping(self) -> dict[str, object]:
        """The check as dictionaries and lists, for JSON."""
        return {**asdict(self), "spoils": self.spoils}

    def with_findings(self, findings: Iterable[Finding]) -> DataCheck:
        """This check with more problems."""
        return replace(self, findings=sorted([*self.findings, *findings], key=_severity))

    def to_text(self) -> str:
        """The check for people: contents, then problems, the most severe first."""
        lines = [f"{self.location}: {self.format}", *(f"  {line}" for line in self._facts())]
        if self.columns:
            lines.insert(1, f"  {self.columns}")
        for title, spoils in (("makes the data unusable for training:", True), ("warnings:", False)):
            chosen = [finding for finding in self.findings if finding.spoils == spoils]
            if chosen:
                lines += ["", title, *(f"{finding.count:9,} {_with_examples(finding)}" for finding in chosen)]
        num_spoiling = sum(finding.spoils for finding in self.findings)
        if num_spoiling:
            end = f"unusable for training: {num_spoiling} serious problem{'s' * (num_spoiling != 1)}"
        else:
            end = "usable for training: no serious problems"
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
    """Find the problems of a data set.

    Args:
        recipe: its vocabulary and maximum caption length are those that captions are compared with.
        decode: whether to read and decode every image, on all cores: 1 ms for a small photograph, 10 to 20 for a large
            one.
        on_progress: called with the number of images done and the number of all images.
    """
    files = _list_files(dataset)
    inspected = _inspect_existing(dataset, files, on_progress) if decode else []
    dataset, inspected = _keep_duplicates_together(dataset, inspected)
    rows: list[DatasetRow] = dataset.table.to_pylist()
    if recipe.vocabulary.tokenizer == AUTO:
        tokenizer, _ = choose_tokenizer(caption for row in rows for caption in row["captions"])
        recipe = replace(recipe, vocabulary=replace(recipe.vocabulary, tokenizer=tokenizer))
    tokens = _count_tokens(rows, recipe.vocabulary.tokenizer)
    images: ImageFacts = {}
    findings = [*_check_splits(dataset), *_check_files(dataset, rows, files), *_check_captions(rows, tokens, recipe)]
    if inspected:
        images = _measure_images(inspected)
        findings += _check_images(inspected)
    findings += map(_from_note, dataset.notes)
    # Images without captions are counted twice: by the reader, those that the data name, and here, those in the same
    # folders. The larger number is kept.
    without = [finding for finding in findings if finding.code == "without_captions" or _NO_CAPTION.match(finding.text)]
    for finding in sorted(without, key=lambda finding: finding.count)[:-1]:
        findings.remove(finding)
    return DataCheck(
        location=dataset.location,
        format=dataset.format,
        splits=dataset.count_splits(),
        captions=_measure_captions(rows, tokens),
        vocabulary=_measure_vocabulary(tokens, recipe),
        images=images,
        findings=sorted(findings, key=_severity),
        columns=dataset.columns_note,
    )


def require_usable(
    dataset: CaptionedImages,
    *,
    recipe: Recipe,
    decode: bool,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Raise DatasetError if `check_dataset` finds that the data set is unusable for training."""
    check = check_dataset(dataset, recipe=recipe, decode=decode, on_progress=on_progress)
    if check.spoils:
        problems = [f"{finding.count:,} {_with_examples(finding)}" for finding in check.findings if finding.spoils]
        raise DatasetError(
            f"{dataset.location} is unusable for training, see `imcap check`: {'; '.join(problems)}; "
            "--allow-unusable trains anyway"
        )


def keep_duplicates_together(
    dataset: CaptionedImages, *, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> CaptionedImages:
    """Put near duplicates into one split, if the data do not name the splits.

    It is the test split if one of them is there, otherwise the validation split. So an image that is for testing by its
    name, as `imcap evaluate` sees it, is never trained on. Nothing changes if there are too many images to compare, or
    if too many would move.
    """
    if dataset.has_official_splits or dataset.table.num_rows > MAX_COMPARED_IMAGES:
        return dataset
    return _keep_duplicates_together(dataset, _inspect_existing(dataset, _list_files(dataset), on_progress))[0]


def _keep_duplicates_together(
    dataset: CaptionedImages, images: list[_InspectedImage]
) -> tuple[CaptionedImages, list[_InspectedImage]]:
    if dataset.has_official_splits or dataset.table.num_rows > MAX_COMPARED_IMAGES:
        return dataset, images
    moved: dict[str, str] = {}
    num_from_train = 0
    for group in _group_duplicates(images):
        split = max((image.split for image in group), key=SPLITS.index)
        moved |= {image.image_id: split for image in group if image.split != split}
        num_from_train += sum(image.split == TRAIN != split for image in group)
    if not moved or num_from_train > MAX_MOVED_IMAGES * dataset.count_splits().get(TRAIN, 0):
        return dataset, images
    table = dataset.table
    ids, splits = table["image_id"].to_pylist(), table["split"].to_pylist()
    number = table.schema.get_field_index("split")
    column = pa.array([moved.get(image_id, split) for image_id, split in zip(ids, splits, strict=True)], pa.string())
    subject = "images are" if len(moved) > 1 else "image is"
    note = f"{len(moved):,} {subject} in the split of a near duplicate: {examples(moved, len(moved))}"
    return (
        replace(dataset, table=table.set_column(number, "split", column), notes=[*dataset.notes, note]),
        [replace(image, split=moved.get(image.image_id, image.split)) for image in images],
    )


def _group_duplicates(images: Sequence[_InspectedImage]) -> Iterator[list[_InspectedImage]]:
    """Groups of two or more images that are the same, byte for byte or visually."""
    by_hash: dict[str, list[_InspectedImage]] = defaultdict(list)
    for image in images:
        if not image.error_code:
            by_hash[image.sha256].append(image)
    same = [*by_hash.values()]
    near = find_near_duplicates([group[0].fingerprint for group in same])
    yield from ([image for number in group for image in same[number]] for group in near)
    in_near = {number for group in near for number in group}
    yield from (group for number, group in enumerate(same) if len(group) > 1 and number not in in_near)


def require_readable(location: str, *, num_failed: int, num_images: int) -> None:
    """Raise DatasetError if too many of a data set's images cannot be read."""
    if num_failed > MAX_BAD_IMAGES * num_images:
        raise DatasetError(
            f"{location}: {num_failed:,} of {num_images:,} images are missing or cannot be read, more than "
            f"{MAX_BAD_IMAGES:.0%}: --allow-unusable trains on the others"
        )


def _severity(finding: Finding) -> tuple[bool, int, int]:
    return not finding.spoils, _SEVERITY.index(finding.code), -finding.count


# ---- files
def _list_files(dataset: CaptionedImages) -> dict[str, set[str]]:
    """Names of the files in each folder of the data set's images."""
    folders = {storage.parent(path) for path in _paths(dataset) if path not in dataset.packed}
    return {folder: _names_in(folder) for folder in folders}


def _paths(dataset: CaptionedImages) -> list[str]:
    return [path for table in (dataset.table, dataset.left_out) for path in table["image_path"].to_pylist() if path]


def _names_in(folder: str) -> set[str]:
    try:
        return {file.name for file in storage.list_files(folder, recursive=False)}
    except (InputError, OSError, ValueError):  # missing, unreadable, or not a valid name
        return set()


def _exists(dataset: CaptionedImages, path: str, files: Mapping[str, set[str]]) -> bool:
    if path in dataset.packed or is_web(path):  # of a web address, only reading shows whether it exists
        return True
    return path.rpartition("/")[2] in files[storage.parent(path)]


def _check_splits(dataset: CaptionedImages) -> Iterator[Finding]:
    names = [f"{leak.image} ({leak.split} and {leak.other})" for leak in dataset.leaks]
    yield from _findings(
        "leak", names, "image is assigned to two splits", "images are assigned to two splits", spoils=True
    )
    counts = dataset.count_splits()
    for split in (TRAIN, VALIDATION):
        if split not in counts:
            yield Finding(code="no_split", count=0, text=f"{split} images, which a training needs", spoils=True)
    if 0 < (number := counts.get(VALIDATION, 0)) < FEW_VALIDATION_IMAGES:
        text = f"validation images, fewer than {FEW_VALIDATION_IMAGES}: which epoch is the best depends on chance"
        yield from _findings("few_validation", [], text.replace("images", "image", 1), text, count=number)


def _check_files(
    dataset: CaptionedImages, rows: Sequence[DatasetRow], files: Mapping[str, set[str]]
) -> Iterator[Finding]:
    captioned: list[DatasetRow] = [*rows, *dataset.left_out.to_pylist()]
    missing = [row for row in captioned if not row["image_path"] or not _exists(dataset, row["image_path"], files)]
    if missing:
        num_in_splits = sum(row["split"] != "" for row in missing)
        num_captions = sum(len(row["captions"]) for row in missing)
        names = [row["image_id"] for row in missing]
        yield from _findings(
            "missing",
            names,
            f"captioned image has no file ({num_captions:,} captions)",
            f"captioned images have no file ({num_captions:,} captions{_shared_beginning(names, captioned)})",
            spoils=num_in_splits > MAX_BAD_IMAGES * len(rows),
        )
    known = {os.path.normpath(path) for path in _paths(dataset)}
    images = (f"{folder}/{name}" for folder in sorted(files) for name in sorted(files[folder]) if is_image_name(name))
    without = [path.rpartition("/")[2] for path in images if os.path.normpath(path) not in known]
    yield from _findings("without_captions", without, "image file has no caption", "image files have no caption")
    unusual = [row["image_id"] for row in captioned if not (is_image_name(path := row["image_path"]) or is_web(path))]
    if len(unusual) < len(captioned) / 2:  # otherwise this data set names all images so
        yield from _findings(
            "odd_names",
            unusual,
            "captioned image has no image extension",
            "captioned images have no image extension",
        )


def _shared_beginning(missing: Sequence[str], captioned: Sequence[DatasetRow]) -> str:
    """A remark if the names of the missing images have the same first letter, because they come from another set."""
    letter, count = Counter(name[:1] for name in missing).most_common(1)[0]
    num_with_letter = sum(row["image_id"].startswith(letter) for row in captioned)
    if count < 10 or count < 0.9 * len(missing) or num_with_letter > count:
        return ""
    return f"; {count:,} of them begin with {letter!r}, and no others do"


# ---- pixels
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class _InspectedImage:
    """Facts about one image."""

    image_id: str
    split: str
    error_code: str = ""
    sha256: str = ""
    fingerprint: Fingerprint = Fingerprint(b"", b"")
    width: int = 0
    height: int = 0
    format: str = ""


def _inspect_existing(
    dataset: CaptionedImages, files: Mapping[str, set[str]], on_progress: Callable[[int, int], None]
) -> list[_InspectedImage]:
    rows: list[DatasetRow] = dataset.table.to_pylist()
    existing = [row for row in rows if row["image_path"] and _exists(dataset, row["image_path"], files)]
    return list(map_images(dataset, existing, _inspect, on_progress))


def map_images(
    dataset: CaptionedImages,
    rows: Sequence[DatasetRow],
    function: Callable[[DatasetRow, bytes | ImageError], Result],
    on_progress: Callable[[int, int], None],
) -> Iterator[Result]:
    """Read the images of some rows on all cores, and apply a function to each row and its bytes; in any order.

    Args:
        function: called in threads, with the bytes or the reason why there are none.
        on_progress: called with the number of images done and the number of all images.
    """
    manifest = dataset.manifest(pa.Table.from_pylist(rows, schema=DATASET_SCHEMA))
    root = root_of(manifest) if rows else ""
    image_columns = image_columns_of(manifest)
    files: list[ManifestRow] = [row for row in manifest.to_pylist() if not row["table_path"]]
    packed: list[ManifestRow] = [row for row in manifest.to_pylist() if row["table_path"]]

    def apply_to_file(row: ManifestRow) -> Result:
        return apply(next(read_rows([row], root)))

    def apply(image: tuple[ManifestRow, bytes | ImageError]) -> Result:
        row, data = image
        return function(rows[row["manifest_id"]], data)

    read_packed = read_rows(packed, root, image_columns=image_columns)
    # In threads, because Pillow and hashlib release the interpreter's lock, and stores have latency.
    with ThreadPoolExecutor(_num_cores()) as pool:
        num_done = 0
        for apply_to, images in ((apply_to_file, iter(files)), (apply, read_packed)):
            while chunk := list(islice(images, _IMAGES_PER_BATCH)):
                yield from pool.map(apply_to, chunk)
                num_done += len(chunk)
                on_progress(num_done, len(rows))


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _inspect(row: DatasetRow, data: bytes | ImageError) -> _InspectedImage:
    try:
        if isinstance(data, ImageError):
            raise data
        image = decode_image(data, image_size=FINGERPRINT_SIZE)
    except ImageError as error:
        return _InspectedImage(row["image_id"], row["split"], error.code)
    return _InspectedImage(
        row["image_id"],
        row["split"],
        sha256=image.sha256,
        fingerprint=fingerprint(image.pixels),
        width=image.width,
        height=image.height,
        format=image.format,
    )


def _check_images(images: Sequence[_InspectedImage]) -> Iterator[Finding]:
    failed: dict[str, list[str]] = defaultdict(list)
    for image in images:
        if image.error_code:
            failed[image.error_code].append(image.image_id)
    spoils = sum(map(len, failed.values())) > MAX_BAD_IMAGES * len(images)
    for code, names in failed.items():
        yield from _findings(
            "unreadable", names, f"image cannot be read ({code})", f"images cannot be read ({code})", spoils=spoils
        )

    readable = [image for image in images if not image.error_code]
    by_hash: dict[str, list[_InspectedImage]] = defaultdict(list)
    for image in readable:
        by_hash[image.sha256].append(image)
    yield from _check_duplicates(by_hash.values(), "leak", "byte for byte", {})
    firsts = [group[0] for group in by_hash.values()]
    near_duplicates = find_near_duplicates([image.fingerprint for image in firsts])
    groups = [[firsts[number] for number in group] for group in near_duplicates]
    split_sizes = Counter(image.split for image in readable)
    yield from _check_duplicates(groups, "near_leak", "visually", split_sizes)

    small = [image.image_id for image in readable if min(image.width, image.height) < SMALLEST_SIDE]
    sides = f"a side of fewer than {SMALLEST_SIDE} pixels"
    yield from _findings("small", small, f"image has {sides}", f"images have {sides}")


def _check_duplicates(
    groups: Iterable[Sequence[_InspectedImage]], code: str, how: str, split_sizes: Mapping[str, int]
) -> Iterator[Finding]:
    """Find images of the same group that are in two splits, or twice in one split.

    Args:
        how: in which way images of a group are the same, for people.
        split_sizes: numbers of images by split, if a share of leaks is tolerated.
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
        rest = f"also in {other}, {how}"
        yield from _findings(code, names, f"{split} image is {rest}", f"{split} images are {rest}", spoils=spoils)
    for split, names in repeated.items():
        rest = f"the same as another of {split}, {how}"
        yield from _findings("repeated", names, f"{split} image is {rest}", f"{split} images are {rest}")


def _measure_images(images: Sequence[_InspectedImage]) -> ImageFacts:
    readable = [image for image in images if not image.error_code]
    sizes = sorted((image.width * image.height, image.width, image.height) for image in readable)
    facts: ImageFacts = {
        "read": len(readable),
        "unreadable": len(images) - len(readable),
        "formats": dict(Counter(image.format for image in readable).most_common()),
    }
    if sizes:
        facts["smallest"], facts["median"], facts["largest"] = (
            [width, height] for _, width, height in (sizes[0], sizes[len(sizes) // 2], sizes[-1])
        )
    return facts


def _describe_images(images: ImageFacts) -> str:
    if not images["read"]:
        return "no image could be read"
    formats = ", ".join(f"{count:,} {name}" for name, count in images["formats"].items())
    smallest, median_size, largest = (
        " x ".join(map(str, size)) for size in (images["smallest"], images["median"], images["largest"])
    )
    sizes = f"all {smallest}" if smallest == largest else f"{smallest} to {largest}, median {median_size}"
    return f"{images['read']:,} image files read: {formats}; {sizes} pixels"


# ---- captions
@dataclass(frozen=True, slots=True)
class _Tokens:
    """The tokens of all captions."""

    lengths: list[int]
    """Number of tokens of each caption."""
    by_split: dict[str, Counter[str]]
    """Count of each token, by split."""


def _count_tokens(rows: Sequence[DatasetRow], tokenizer: str) -> _Tokens:
    lengths: list[int] = []
    by_split: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        for caption in row["captions"]:
            tokens = tokenize_words(caption, tokenizer)
            lengths.append(len(tokens))
            by_split[row["split"]].update(tokens)
    return _Tokens(lengths, by_split)


def _measure_captions(rows: Sequence[DatasetRow], tokens: _Tokens) -> CaptionFacts:
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


def _measure_vocabulary(tokens: _Tokens, recipe: Recipe) -> VocabularyFacts:
    known = _training_vocabulary(tokens, recipe)
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


def _training_vocabulary(tokens: _Tokens, recipe: Recipe) -> set[str]:
    counts = tokens.by_split.get(TRAIN, Counter())
    return {token for token, count in counts.items() if count >= recipe.vocabulary.min_count}


def _check_captions(rows: Sequence[DatasetRow], tokens: _Tokens, recipe: Recipe) -> Iterator[Finding]:
    captions = [(row["image_id"], caption) for row in rows for caption in row["captions"]]
    for fault in ENCODING_FAULTS:
        cases = [f"{piece} in {image_id}" for image_id, caption in captions if (piece := fault.find(caption))]
        spoils = fault.is_wrong_encoding and len(cases) > MAX_BAD_CAPTIONS * len(captions)
        yield from _findings(
            "encoding", cases, f"caption has {fault.name}", f"captions have {fault.name}", spoils=spoils
        )
    yield from _check_language(tokens, recipe.vocabulary.tokenizer)
    known = _training_vocabulary(tokens, recipe)
    for split, counts in tokens.by_split.items():
        unknown = Counter({token: count for token, count in counts.items() if token not in known})
        if split != TRAIN and unknown.total() > MAX_UNKNOWN_TOKENS * counts.total():
            text = f"of {counts.total():,} words of {split} are not in the training vocabulary"
            names = [token for token, _ in unknown.most_common(_NUM_EXAMPLES)]
            yield from _findings("unknown_words", names, text, text, count=unknown.total())
    longest = recipe.training.max_caption_length
    num_long = sum(length > longest for length in tokens.lengths)
    cut = f"cut to {longest} tokens in training"
    yield from _findings("long", [], f"caption is {cut}", f"captions are {cut}", count=num_long)
    num_short = sum(length < 2 for length in tokens.lengths)
    few = "fewer than two tokens"
    yield from _findings("short", [], f"caption has {few}", f"captions have {few}", count=num_short)
    usual, num_usual = Counter(len(row["captions"]) for row in rows).most_common(1)[0]
    unusual = [row["image_id"] for row in rows if len(row["captions"]) != usual]
    if num_usual > 0.9 * len(rows):
        number = f"more or fewer than {usual} captions"
        yield from _findings("num_captions", unusual, f"image has {number}", f"images have {number}")
    repeated = [row["image_id"] for row in rows if len(set(row["captions"])) < len(row["captions"])]
    twice = "the same caption twice"
    yield from _findings("repeated_captions", repeated, f"image has {twice}", f"images have {twice}")


def _check_language(tokens: _Tokens, tokenizer: str) -> Iterator[Finding]:
    """Suggest the tokenizer for other languages if common English words are rare."""
    all_tokens = sum(tokens.by_split.values(), Counter())
    if tokenizer == "ptb" and share_of_english(all_tokens) < MIN_ENGLISH_WORDS:
        rest = "to be in another language than English: --set vocabulary.tokenizer=unicode is made for those"
        yield from _findings(
            "language", [], f"caption seems {rest}", f"captions seem {rest}", count=len(tokens.lengths)
        )


def _describe_captions(captions: CaptionFacts) -> str:
    per_image, tokens = captions["per_image"], captions["tokens"]
    fewest, most = per_image["fewest"], per_image["most"]
    each = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    return (
        f"{captions['count']:,} captions, {each} an image, of {tokens['shortest']} to {tokens['longest']} tokens, "
        f"median {tokens['median']:g}"
    )


def _describe_vocabulary(vocabulary: VocabularyFacts) -> Iterator[str]:
    if vocabulary["tokens"]:
        coverage = vocabulary["coverage"].items()
        shares = ", ".join(f"{100 * share:.1f} % of the words of {split}" for split, share in coverage)
        yield (
            f"{vocabulary['tokens']:,} of {vocabulary['tokens_of_train']:,} training words occur "
            f"{vocabulary['min_count']} times or more ({vocabulary['tokenizer']})"
            + (f"; they are {shares}" if shares else "")
        )


# ---- common
def _findings(
    code: str, names: Sequence[str], one: str, many: str, *, count: int | None = None, spoils: bool = False
) -> list[Finding]:
    """A finding if there are any names, or if `count` is not 0; `one` or `many` follows the number."""
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
    """The finding of a note by the reader of the data set, which begins with a count if it has one."""
    number, _, text = note.partition(" ")
    count = number.replace(",", "")
    return (
        Finding(code="note", count=int(count), text=text)
        if count.isdigit()
        else Finding(code="note", count=0, text=note)
    )
