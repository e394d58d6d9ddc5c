"""JSON -> captioned images: Karpathy's splits, COCO's captions, lists of records. Documents are unchecked JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Any, Final

from imcap_ray import storage
from imcap_ray.data.datasets.dataset import (
    CaptionedImages,
    Collector,
    DatasetFormat,
    Source,
    find_image_folder,
    split_in_name,
)
from imcap_ray.data.datasets.fields import Record, add_record, has_caption_field
from imcap_ray.data.field_names import IMAGE_FIELDS
from imcap_ray.errors import DatasetError

_KARPATHY: Final = "Karpathy's JSON"

_COCO: Final = "COCO captions"

_LIST: Final = "a JSON list of captions"

# COCO's large files without captions.
_NO_CAPTIONS: Final = re.compile(r"(instances|person_keypoints|panoptic|stuff|image_info|sentids)_.*")

_NAMED_LIKE_CAPTIONS: Final = re.compile(r"(captions|dataset)[_.-].*|captions?\.json|.*_captions\.json")

MAX_UNNAMED_FILES: Final = 20
"""JSON files that are not named like captions are ignored in a folder with more of them than this."""

_TERMS: Final = {
    _COCO: "If they are COCO's own: X. Chen et al. (2015), Microsoft COCO Captions, arXiv:1504.00325; the "
    "photographs belong to their photographers."
}


def read_json(source: Source) -> CaptionedImages | None:
    """Read one file, or the files of a folder, which are COCO's files by split, such as `captions_train2017.json`."""
    files = _candidates(source)
    if not files:
        return None
    collector = Collector(source, "JSON")
    documents = _read_documents(collector, files)
    kinds = {name: _kind(document) for name, document in documents.items()}
    if not kinds:
        if source.is_file:
            raise DatasetError(
                f"{source.location} holds no captions: expected Karpathy's JSON (images with sentences), COCO's "
                "(images, and annotations with image_id and caption), or a list of records of an image and its captions"
            )
        return None
    _refuse_several_sets(source, kinds)
    for name, kind in kinds.items():
        collector.format, collector.terms = kind, _TERMS.get(kind, "")
        _READERS[kind](collector, documents[name], name)
    return collector.to_dataset()


def _candidates(source: Source) -> list[str]:
    """The files that may hold captions, those named like captions first."""
    if source.is_file:
        return list(source.files) if source.location.endswith(".json") else []
    names = list(source.files)
    annotations = storage.join(source.base, "annotations")
    if storage.is_folder(annotations):
        names += [f"annotations/{file.name}" for file in storage.list_files(annotations, recursive=False)]
    names = [name for name in names if name.endswith(".json") and not _NO_CAPTIONS.fullmatch(_file_name(name))]
    named = [name for name in names if _is_named_like_captions(name)]
    others = [name for name in names if not _is_named_like_captions(name)]
    return named + (others if len(others) <= MAX_UNNAMED_FILES else [])


def _is_named_like_captions(name: str) -> bool:
    return _NAMED_LIKE_CAPTIONS.fullmatch(_file_name(name)) is not None


def _file_name(name: str) -> str:
    return name.rpartition("/")[2]


def _read_documents(collector: Collector, files: Iterable[str]) -> dict[str, object]:
    """The files that hold captions, by name. If some are named like captions, the others are not read."""
    documents: dict[str, object] = {}
    for name in files:
        is_named = _is_named_like_captions(name) or collector.source.is_file
        if documents and not is_named:
            break
        try:
            document = json.loads(collector.read_text(name))
        except (ValueError, RecursionError) as error:
            if is_named:
                location = storage.join(collector.source.base, name)
                raise DatasetError(f"{location} is not valid JSON: {error}") from error
            continue
        if _kind(document):
            documents[name] = document
    return documents


def _kind(document: Any) -> str:
    """The format of a document; "" if it holds no captions."""
    if isinstance(document, list):
        return _LIST if any(has_caption_field(item) for item in _mappings(document[:100])) else ""
    if not isinstance(document, dict):
        return ""
    if any("sentences" in image for image in _mappings(document.get("images"))):
        return _KARPATHY
    return _COCO if any("caption" in item for item in _mappings(document.get("annotations"))) else ""


def _mappings(items: Any) -> Iterable[Record]:
    return (item for item in items if isinstance(item, dict)) if isinstance(items, list) else ()


def _refuse_several_sets(source: Source, kinds: dict[str, str]) -> None:
    """Raise DatasetError for several files, unless they are the splits of one data set."""
    splits = [split_in_name(_file_name(name)) for name in kinds]
    years = {year for name in kinds for year in re.findall(r"20\d\d", _file_name(name))}
    are_splits = len(set(kinds.values())) == 1 and all(splits) and len(set(splits)) == len(splits)
    if len(kinds) > 1 and (not are_splits or len(years) > 1 or _KARPATHY in kinds.values()):
        raise DatasetError(
            f"{source.location} holds several sets of captions, {', '.join(sorted(kinds))}: give one of these files, "
            "or leave only the splits of one set there, such as captions_train2017.json and captions_val2017.json"
        )


def _read_karpathy(collector: Collector, document: Any, name: str) -> None:
    folders: dict[str, str] = {}
    base = collector.source.base
    names_by_folder: dict[str, list[str]] = {}
    for image in _mappings(document["images"]):
        names_by_folder.setdefault(_text(image.get("filepath")), []).append(_text(image.get("filename")))
    for folder, names in names_by_folder.items():
        candidates = (folder, f"images/{folder}") if folder else ()
        folders[folder] = find_image_folder(base, candidates, names)
    for number, image in enumerate(document["images"]):
        where = f"{name} images[{number}]"
        fields = image if isinstance(image, dict) else {}
        image_id = _text(fields.get("filename"))
        captions = [caption for sentence in _mappings(fields.get("sentences")) for caption in _sentence(sentence)]
        if not image_id or not captions:
            collector.add_problem("image has no name or no caption", "images have no name or no caption", where)
            continue
        path = storage.join(folders[_text(fields.get("filepath"))], image_id)
        collector.add(image_id, captions, where=where, path=path, split=_text(fields.get("split")))


def _sentence(sentence: Record) -> list[str]:
    raw, tokens = sentence.get("raw"), sentence.get("tokens")
    if isinstance(raw, str):
        return [raw]
    return [" ".join(map(str, tokens))] if isinstance(tokens, list) else []


def _read_coco(collector: Collector, document: Any, name: str) -> None:
    file_names = {str(image.get("id")): _text(image.get("file_name")) for image in _mappings(document.get("images"))}
    folder = _find_folder_of(collector, name, file_names.values())
    split = split_in_name(_file_name(name))
    captioned = set()
    for number, annotation in enumerate(document["annotations"]):
        where = f"{name} annotations[{number}]"
        fields = annotation if isinstance(annotation, dict) else {}
        key, caption = str(fields.get("image_id")), fields.get("caption")
        if key not in file_names or not isinstance(caption, str):
            collector.add_problem(
                "annotation has no caption or no known image",
                "annotations have no caption or no known image",
                where,
            )
            continue
        captioned.add(key)
        file_name = file_names[key]
        # Without a file name it is still useful as a reference, under its number.
        path = storage.join(folder, file_name) if file_name else ""
        collector.add(file_name or key, [caption], where=where, path=path, split=split)
    for key, file_name in file_names.items():
        if key not in captioned:
            collector.add_problem("image has no caption", "images have no caption", file_name or key)


def _read_list(collector: Collector, document: Any, name: str) -> None:
    names = [_text(item.get(field)) for item in _mappings(document[:5]) for field in IMAGE_FIELDS if item.get(field)]
    folder = _find_folder_of(collector, name, names)
    split = split_in_name(_file_name(name))
    for number, record in enumerate(document):
        add_record(
            collector,
            record,
            where=f"{name} [{number}]",
            locate=lambda image: (image, storage.join(folder, image), split),
        )


def _find_folder_of(collector: Collector, name: str, image_names: Iterable[str]) -> str:
    """The folder of images; for `captions_train2017.json` it is `train2017`, if that exists."""
    same_name = re.findall(r"[a-z]+\d{4}|train|val|test", _file_name(name))
    candidates = [path for folder in same_name for path in (folder, f"images/{folder}")]
    return find_image_folder(collector.source.base, candidates, image_names)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


_READERS: Final[dict[str, Callable[[Collector, Any, str], None]]] = {
    _KARPATHY: _read_karpathy,
    _COCO: _read_coco,
    _LIST: _read_list,
}

FORMAT: Final = DatasetFormat(description="Karpathy's or COCO's JSON", read=read_json)
