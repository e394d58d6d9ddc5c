"""Text files of names and captions -> captioned images: Flickr8k, Flickr30k, Kaggle's versions, any such CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from typing import Final

from imcap_ray import storage
from imcap_ray.data.datasets.dataset import (
    SPLIT_NAMES,
    SPLITS,
    CaptionedImages,
    Collector,
    DatasetFormat,
    Source,
    find_image_folder,
)
from imcap_ray.data.datasets.fields import ID_FIELDS, IMAGE_FIELDS, add_record, has_caption_field
from imcap_ray.data.image_formats import IMAGE_EXTENSIONS, extension_of
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

_EXTENSIONS: Final = (".txt", ".csv", ".tsv", ".token")

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


def read_text_files(source: Source) -> CaptionedImages | None:
    """Read lines `name#number<TAB>caption`, or a table with `,` `|` `;` or tabs between image and caption.

    The official splits come from lists next to the file (`Flickr_8k.trainImages.txt`, `train.txt`) or from a column
    `split`.
    """
    name = next((name for name in _NAMES if name in source.files), "")
    if source.is_file and source.location.endswith(_EXTENSIONS):
        name = source.files[0]
    if not name:
        return None
    format_name = _NAMES.get(name.rpartition("/")[2], "a text file of captions")
    collector = Collector(source, format_name, terms=_TERMS.get(format_name, ""))
    text = collector.read_text(name)
    lines = split_lines(text)
    if name.endswith(("token.txt", ".token")) or any(_TOKEN_LINE.match(line) for line in lines[:100]):
        _read_token_lines(collector, lines)
    else:
        _read_table(collector, text, lines)
    _read_split_lists(collector)
    return collector.to_dataset(folder=find_image_folder(source.base, (), collector.captions))


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


def _read_table(collector: Collector, text: str, lines: Sequence[str]) -> None:
    first_number, first_line = next(((n, line) for n, line in enumerate(lines, 1) if line.strip()), (0, ""))
    separator, header, has_header = _find_header(first_line)
    caption_column = next(number for number, name in enumerate(header) if has_caption_field([name]))
    expected = separator.join(header)
    for number, fields in _records(text, lines, separator, len(header)):
        if not any(field.strip() for field in fields) or (has_header and number == first_number):
            continue
        num_extra = len(fields) - len(header)
        if num_extra > 0:  # a separator without quotes belongs to the caption
            end = caption_column + num_extra + 1
            fields = [*fields[:caption_column], separator.join(fields[caption_column:end]), *fields[end:]]
        fields = [field.strip() for field in fields]
        # Without a header, this alone distinguishes a name and a caption from a line of any text.
        is_name = has_header or extension_of(fields[0]) in IMAGE_EXTENSIONS
        if num_extra < 0 or not fields[caption_column] or not is_name:
            collector.add_problem(f"line is not `{expected}`", f"lines are not `{expected}`", f"line {number}")
            continue
        record = {name: field for name, field in zip(header, fields, strict=True) if field}
        add_record(collector, record, where=f"line {number}", locate=lambda name: (name, None, ""))


def _find_header(line: str) -> tuple[str, list[str], bool]:
    """Separator and names of the columns, and whether the names are those in the first line or the usual ones."""
    for separator in ("|", "\t", ",", ";"):
        names = [name.strip().strip('"').lower() for name in line.split(separator)]
        names = ["image" if name in ID_FIELDS and not set(IMAGE_FIELDS) & set(names) else name for name in names]
        if len(names) > 1 and has_caption_field(names) and set(IMAGE_FIELDS) & set(names):
            return separator, names, True
    separator = next((mark for mark in ("|", "\t") if mark in line), ",")
    return separator, ["image", "number", "caption"] if separator == "|" else ["image", "caption"], False


def _records(text: str, lines: Sequence[str], separator: str, num_columns: int) -> Iterator[tuple[int, list[str]]]:
    """The fields of each record, with a number for people.

    If the file is not valid CSV with the same number of fields throughout, each line is read separately, so that an
    unclosed quote costs one line and not the rest of the file.
    """
    if separator == "|":  # never quoted
        yield from ((number, line.split("|")) for number, line in enumerate(lines, 1))
        return
    try:
        records = list(csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True))
    except csv.Error:
        records = []
    if records and all(len(fields) in (0, num_columns) for fields in records):
        yield from enumerate(records, 1)
        return
    for number, line in enumerate(lines, 1):
        try:
            yield number, next(csv.reader([line], delimiter=separator), [])
        except csv.Error:  # longer than a field may be, or with a zero byte
            yield number, line.split(separator)


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
