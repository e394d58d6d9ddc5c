"""Text files of names and captions -> captioned images: Flickr8k, Flickr30k, Kaggle's versions, any such CSV or TSV."""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Final, NamedTuple

from imcap_ray import storage
from imcap_ray.data.columns import BY_NAME, ColumnOptions
from imcap_ray.data.datasets.dataset import (
    SPLIT_NAMES,
    SPLITS,
    CaptionedImages,
    Collector,
    DatasetFormat,
    Source,
    find_image_folder,
    image_folders,
    plain_names,
)
from imcap_ray.data.datasets.fields import add_record, fields_of_columns, is_caption_field, is_image_field
from imcap_ray.data.field_names import CAPTION_FIELDS, CAPTION_NAMES, ID_FIELDS, IMAGE_FIELDS, IMAGE_NAMES
from imcap_ray.data.image_formats import IMAGE_EXTENSIONS, extension_of, is_image_name, readable_names
from imcap_ray.errors import DatasetError
from imcap_ray.text.encodings import split_lines

_FLICKR8K: Final = "Flickr8k as distributed"

_FLICKR30K: Final = "Flickr30k as distributed"

_KAGGLE: Final = "Flickr8k in Kaggle's form"

# If there are several of these files, the first one is used.
_NAMES: Final = {
    "Flickr8k.token.txt": _FLICKR8K,
    "results_20130124.token": _FLICKR30K,
    "results.csv": _FLICKR30K,
    "captions.txt": _KAGGLE,
    "captions.csv": "CSV",
}

_TABLE_EXTENSIONS: Final = (".csv", ".tsv")

_EXTENSIONS: Final = (*_TABLE_EXTENSIONS, ".txt", ".token")

_SEPARATORS: Final = ("|", "\t", ",", ";")

_LONGEST_SHOWN: Final = 80

_TERMS_8K: Final = (
    "M. Hodosh, P. Young, J. Hockenmaier (2013), Framing Image Description as a Ranking Task, JAIR 47, 853-899. The "
    "photographs belong to their photographers; the collection is for non-commercial research."
)

_TERMS_30K: Final = (
    "P. Young, A. Lai, M. Hodosh, J. Hockenmaier (2014), From image descriptions to visual denotations, TACL 2, 67-78. "
    "The photographs belong to their photographers; the collection is for non-commercial research."
)

_TERMS: Final = {_FLICKR8K: _TERMS_8K, _KAGGLE: _TERMS_8K, _FLICKR30K: _TERMS_30K}

_TOKEN_LINE: Final = re.compile(r"[^\t|]*#\d+\t")

_SPLIT_LIST: Final = re.compile(r"(?:[\w-]*\.)?(train|validation|valid|val|dev|test)(?:_?images)?\.txt", re.IGNORECASE)


class _Header(NamedTuple):
    """Columns of a text table."""

    separator: str
    names: list[str]
    """As the first line names them; the usual ones if it names none."""
    fields: list[str]
    """The field that each column holds, see `fields_of_columns`."""
    is_first_line: bool

    def number_of_captions(self) -> int:
        """Number of the first column of captions."""
        return next(number for number, field in enumerate(self.fields) if is_caption_field(field))

    def describe(self) -> str:
        """For people, the columns that the data are read from."""
        by_field = dict(zip(self.fields, self.names, strict=True))
        image = next(by_field[field] for field in IMAGE_FIELDS if field in by_field)
        numbered = [name for field, name in by_field.items() if is_caption_field(field)]
        captions = [by_field[field] for field in CAPTION_FIELDS if field in by_field][:1] or numbered
        return f"images from column {image}, captions from column {', '.join(captions)}"


def read_text_files(source: Source) -> CaptionedImages | None:
    """Read lines `name#number<TAB>caption`, or a table with `,` `|` `;` or tabs between image and caption.

    The official splits come from lists next to the file (`Flickr_8k.trainImages.txt`, `train.txt`) or from a column
    `split`.
    """
    name = next((name for name in _NAMES if name in source.files), "")
    if source.is_file and source.location.lower().endswith(_EXTENSIONS):
        name = source.files[0]
    return _read_file(source, name) if name else None


def read_only_table(source: Source) -> CaptionedImages | None:
    """Read the only CSV or TSV of a folder, or the only one with captions. Its name may be any.

    Raises:
        DatasetError: several have captions.
    """
    names = [name for name in source.files if name.lower().endswith(_TABLE_EXTENSIONS) and not name.startswith(".")]
    if len(names) > 1:
        names = [name for name in names if _names_columns(source, name)]
    if len(names) > 1:
        raise DatasetError(
            f"{source.location} holds several tables of captions, {', '.join(sorted(names))}: give one of these files"
        )
    return _read_file(source, names[0]) if names else None


def _names_columns(source: Source, name: str) -> bool:
    """Whether the first line of a file names a column of images and one of captions."""
    lines = split_lines(Collector(source, "").read_text(name))
    line = next((line for line in lines if line.strip()), "")
    return _find_header(line, source.columns).is_first_line


def _read_file(source: Source, name: str) -> CaptionedImages:
    columns_note = ""
    format_name = _NAMES.get(name.rpartition("/")[2], "a text file of captions")
    collector = Collector(source, format_name, terms=_TERMS.get(format_name, ""))
    text = collector.read_text(name)
    lines = split_lines(text)
    if name.endswith(("token.txt", ".token")) or any(_TOKEN_LINE.match(line) for line in lines[:100]):
        _read_token_lines(collector, lines)
    else:
        columns_note = _read_table(collector, text, lines, storage.join(source.base, name))
    _read_split_lists(collector)
    dataset = collector.to_dataset(folder=find_image_folder(source.base, (), collector.captions))
    columns = replace(source.columns, id=None) if columns_note else BY_NAME
    return replace(dataset, columns=columns, columns_note=columns_note)


def _read_token_lines(collector: Collector, lines: Sequence[str]) -> None:
    for number, line in enumerate(lines, 1):
        key, tab, caption = line.partition("\t")
        image_id, hash_sign, _ = key.rpartition("#")
        if tab and hash_sign:
            if "\t" in caption:
                collector.add_problem("line has more than one tab", "lines have more than one tab", f"line {number}")
            collector.add(image_id, [caption], where=f"line {number}")
        elif line.strip():
            collector.add_problem(
                "line is not `name#number<TAB>caption`", "lines are not `name#number<TAB>caption`", f"line {number}"
            )


def _read_table(collector: Collector, text: str, lines: Sequence[str], location: str) -> str:
    """Read a table; returns a description of the columns, "" if the first line does not name them.

    Raises:
        DatasetError: the first line does not name the columns, and no line is an image's name and a caption.
    """
    first_number, first_line = next(((n, line) for n, line in enumerate(lines, 1) if line.strip()), (0, ""))
    header = _find_header(first_line, collector.source.columns)
    caption_column = header.number_of_captions()
    expected = header.separator.join(header.names)
    records: list[tuple[str, dict[str, str]]] = []
    for number, fields in _records(text, lines, header.separator, len(header.names)):
        if not any(field.strip() for field in fields) or (header.is_first_line and number == first_number):
            continue
        num_extra = len(fields) - len(header.names)
        if num_extra > 0:  # a separator without quotes belongs to the caption
            end = caption_column + num_extra + 1
            fields = [*fields[:caption_column], header.separator.join(fields[caption_column:end]), *fields[end:]]
        fields = [field.strip() for field in fields]
        # Without a header, this alone distinguishes a name and a caption from a line of any text.
        is_name = header.is_first_line or extension_of(fields[0]) in IMAGE_EXTENSIONS
        if num_extra < 0 or not fields[caption_column] or not is_name:
            collector.add_problem(f"line is not `{expected}`", f"lines are not `{expected}`", f"line {number}")
            continue
        values = {name: value for name, value in zip(header.fields, fields, strict=True) if value}
        records.append((f"line {number}", values))
    if not header.is_first_line and (not records or collector.source.columns.given()):
        raise _header_error(location, collector.source.columns, first_line)
    images = (value for _, record in records for field, value in record.items() if is_image_field(field))
    names = _complete_names(collector, images)
    for where, record in records:
        add_record(collector, record, where=where, locate=lambda name: (names.get(name, name), None, ""))
    return header.describe() if header.is_first_line else ""


def _find_header(line: str, columns: ColumnOptions) -> _Header:
    """The columns by the names in the first line, or the usual columns if it does not name images and captions."""
    for separator in _SEPARATORS:
        names = [name.strip() for name in _split(line, separator)]
        fields = fields_of_columns(names, columns)
        if columns.image is None and not any(map(is_image_field, fields)):
            fields = ["image" if field in ID_FIELDS else field for field in fields]
        if any(map(is_image_field, fields)) and any(map(is_caption_field, fields)):
            return _Header(separator, names, fields, True)
    separator = next((mark for mark in ("|", "\t") if mark in line), ",")
    names = ["image", "number", "caption"] if separator == "|" else ["image", "caption"]
    return _Header(separator, names, names, False)


def _split(line: str, separator: str) -> list[str]:
    if separator == "|":  # never quoted
        return line.split("|")
    try:
        return next(csv.reader([line], delimiter=separator), [])
    except csv.Error:  # longer than a field may be, or with a zero byte
        return line.split(separator)


def _header_error(location: str, columns: ColumnOptions, line: str) -> DatasetError:
    image = f"--image-column {columns.image}" if columns.image else f"{IMAGE_NAMES}, or give --image-column"
    caption = f"--caption-column {columns.caption}" if columns.caption else f"{CAPTION_NAMES}, or give --caption-column"
    return DatasetError(
        f"{location} is not a table of captions: expected a first line that names a column of images ({image}) and one "
        f"of captions ({caption}), or lines `image,caption`; the first line is {line[:_LONGEST_SHOWN].strip()!r}"
    )


def _complete_names(collector: Collector, names: Iterable[str]) -> dict[str, str]:
    """The file names of images that a table names without their extension; ambiguous ones are counted."""
    incomplete = {unicodedata.normalize("NFC", name): name for name in plain_names(names) if not is_image_name(name)}
    folders = {name[: name.rfind("/") + 1] for name in incomplete}
    for base in image_folders(collector.source.base) if folders else ():
        matches: dict[str, list[str]] = defaultdict(list)
        for folder in sorted(name for name in folders if storage.is_folder(storage.join(base, name))):
            for file in storage.list_files(storage.join(base, folder), recursive=False):
                name = incomplete.get(unicodedata.normalize("NFC", folder + file.name.rpartition(".")[0]))
                if name is not None and is_image_name(file.name):
                    matches[name].append(folder + file.name)
        choices = {name: readable_names(files) for name, files in matches.items()}
        for name in (name for name, files in choices.items() if len(files) > 1):
            collector.add_problem("name matches several image files", "names match several image files", name)
        if choices:
            return {name: files[0] for name, files in choices.items() if len(files) == 1}
    return {}


def _records(text: str, lines: Sequence[str], separator: str, num_columns: int) -> Iterator[tuple[int, list[str]]]:
    """The fields of each record, with a number for people.

    If the file is not valid CSV with the same number of fields throughout, each line is read separately, so that an
    unclosed quote costs one line and not the rest of the file.
    """
    if separator == "|":
        yield from ((number, _split(line, separator)) for number, line in enumerate(lines, 1))
        return
    try:
        records = list(csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True))
    except csv.Error:
        records = []
    if records and all(len(fields) in (0, num_columns) for fields in records):
        yield from enumerate(records, 1)
        return
    yield from ((number, _split(line, separator)) for number, line in enumerate(lines, 1))


def _read_split_lists(collector: Collector) -> None:
    source = collector.source
    neighbours = [file.name for file in storage.list_files(source.base, recursive=False)] if source.is_file else ()
    # Some lists leave the extension out.
    by_stem = {image_id.rpartition(".")[0]: image_id for image_id in collector.captions}
    lists = [match for name in neighbours or source.files if (match := _SPLIT_LIST.fullmatch(name))]
    # In the order of the splits, because it becomes that of the rows, by which a resumed training recognises its data.
    for match in sorted(lists, key=lambda match: SPLITS.index(SPLIT_NAMES[match[1].lower()])):
        name = match[0]
        if source.is_file and name in source.files:
            continue
        listed = dict.fromkeys(line.strip() for line in split_lines(collector.read_text(name)) if line.strip())
        image_ids = [line if line in collector.captions else by_stem.get(line, line) for line in listed]
        if not any(image_id in collector.captions for image_id in image_ids):
            collector.add_problem(
                "list of a split names none of the images", "lists of splits name none of the images", name
            )
            continue
        for image_id in image_ids:
            collector.assign_split(image_id, match[1])


FORMAT: Final = DatasetFormat(
    description="Flickr8k as distributed (Flickr8k.token.txt next to the image folder), Kaggle's version (captions.txt "
    "next to Images/), Flickr30k (results.csv or results_20130124.token)",
    read=read_text_files,
)

ONLY_TABLE: Final = DatasetFormat(
    description=f"a single CSV or TSV whose first line names a column of images ({IMAGE_NAMES}; another with "
    f"--image-column) and one of captions ({CAPTION_NAMES}; another with --caption-column)",
    read=read_only_table,
)
