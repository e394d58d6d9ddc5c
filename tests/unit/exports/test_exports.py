"""Captions in the formats of other tools, read back by those tools."""

from __future__ import annotations

import csv
import gc
import hashlib
import io
import json
import os
import re
import tarfile
import uuid
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random
from typing import Any, get_args
from urllib.parse import unquote

import duckdb
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imcap_ray import storage
from imcap_ray.data.datasets import load_dataset
from imcap_ray.data.manifest import build_manifest
from imcap_ray.data.parquet_files import write_table
from imcap_ray.data.schemas import CAPTIONS_SCHEMA
from imcap_ray.errors import ImcapError, InputError, OutputError
from imcap_ray.exports.captions_rows import COLUMNS, ExportSummary
from imcap_ray.exports.coco import coco_results_name
from imcap_ray.exports.export import ExportOptions, export_captions
from imcap_ray.exports.image_names import ImageNames
from imcap_ray.exports.shards import Format, webdataset_key
from imcap_ray.exports.sidecar import SidecarNames, portable_sidecar_name, sidecar_name
from imcap_ray.exports.text import guard_cell
from imcap_ray.runs.captioned_images import CaptionedImageSource
from tests import small_data

Row = dict[str, Any]

FORMATS = get_args(Format)
FOLDERS = ["sidecar", "hf", "webdataset"]
FILES = ["coco", "jsonl", "csv"]
WITH_IMAGES = ["hf", "webdataset"]

ODD_NAMES = [
    "plain.jpg",
    "two.dots.jpg",
    "sub/plain.jpg",
    "v1.0/plain.jpg",
    "__meta__/plain.jpg",
    "__meta__.jpg",
    ".hidden.jpg",
    "-rf.jpg",
    "=1+1.jpg",
    "100%.jpg",
    "a b\u2028c.jpg",
    "line\nbreak.jpg",
    "no extension",
    "Straße/猫 🐈.JPEG",
    "x" * 120 + "/" + "猫" * 80 + ".jpg",
]
ODD_CAPTIONS = [
    "ein Hund läuft über die Straße",
    "一只猫 🐈",
    '=HYPERLINK("http://x")',
    'he says "hi", and\nleaves',
    "a dog",
]


def row(image_id: str, caption: str = "a dog runs", **columns: Any) -> Row:
    return {
        "image_id": image_id,
        "image_path": "",
        "caption": caption,
        "captions": [caption, "another one"],
        "confidence": 0.5,
        "familiarity": 0.75,
        "logprob": -2.0,
        "num_tokens": 4,
        "status": "ok",
        "error_code": "",
        "error_message": "",
        "width": 80,
        "height": 60,
        "format": "jpeg",
        "sha256": "",
        "duplicate_of": "",
        "caption_source": "model",
    } | columns


FAILED = {"caption": "", "captions": [], "confidence": float("nan"), "status": "failed", "error_code": "truncated"}


def write_captions(folder: Path, *parts: Iterable[Row]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(parts):
        table = pa.Table.from_pylist(list(rows), schema=CAPTIONS_SCHEMA)
        pq.write_table(table, folder / f"part-{number}.parquet")
    return folder


def write_images(folder: Path, names: Iterable[str]) -> list[Row]:
    """Write images and return a row for each, with alternating captions."""
    rows = []
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(small_data.jpeg(number))
        rows.append(row(name, ODD_CAPTIONS[number % len(ODD_CAPTIONS)], image_path=str(path)))
    return rows


def export(
    captions: Path, output: Path | str, format: Any, *, images: CaptionedImageSource | None = None, **options: Any
) -> ExportSummary:
    source = images or CaptionedImageSource(str(captions), allow_outside_paths=True)
    return export_captions(str(captions), str(output), ExportOptions(format=format, **options), images=source)


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# What each tool finds in an export: captions by image id.


def read_coco(output: Path, cache: Path) -> dict[str, str]:
    from pycocotools.coco import COCO

    annotations = COCO(str(output))
    results = annotations.loadRes(coco_results_name(str(output)))
    exported = {}
    for number in annotations.getImgIds():
        (annotation,) = annotations.imgToAnns[number]
        (result,) = results.imgToAnns[number]
        assert annotation["caption"] == result["caption"]
        exported[annotations.imgs[number]["file_name"]] = annotation["caption"]
    assert {(image["width"], image["height"]) for image in annotations.imgs.values()} == {(80, 60)}
    return exported


def read_jsonl(output: Path, cache: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in output.read_bytes().split(b"\n")[:-1]]
    assert all(tuple(exported) == COLUMNS for exported in rows)
    return {exported["image_id"]: exported["caption"] for exported in rows}


def unguarded(cell: str) -> str:
    return re.sub("(?:^|(?<=[;\t\r\n]))'(?='*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20])", "", cell)


def read_csv(output: Path, cache: Path) -> dict[str, str]:
    assert pyarrow.csv.read_csv(output).column_names == duckdb.read_csv(str(output)).columns == list(COLUMNS)
    assert output.read_bytes().startswith("\ufeff".encode())  # without it Excel misreads what is not ASCII
    with output.open(encoding="utf-8-sig", newline="") as file:
        return {unguarded(exported["image_id"]): unguarded(exported["caption"]) for exported in csv.DictReader(file)}


def read_sidecars(output: Path, cache: Path) -> dict[str, str]:
    texts = {name: content.decode() for name, content in files_below(output).items()}
    assert all(text.endswith("\n") and text.count("\n") == 1 for text in texts.values())
    return {name: text[:-1] for name, text in texts.items()}


def read_hf(output: Path, cache: Path) -> dict[str, str]:
    from datasets import load_dataset

    rows = load_dataset(str(output), split="train", cache_dir=str(cache))
    assert all(exported["image"].size == (80, 60) for exported in rows)
    assert all(exported["captions"] == [exported["caption"], "another one"] for exported in rows)
    return {exported["image_id"]: exported["caption"] for exported in rows}


def read_webdataset(output: Path, cache: Path) -> dict[str, str]:
    from webdataset import WebDataset

    shards = [str(path) for path in sorted(output.iterdir())]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its files for the garbage collector to close
        samples = list(WebDataset(shards, shardshuffle=False, empty_check=False).decode("pil"))
        gc.collect()
    assert len({sample["__key__"] for sample in samples}) == len(samples)
    assert all(sample["jpg"].size == (80, 60) and sample["txt"] == sample["json"]["caption"] for sample in samples)
    return {sample["json"]["image_id"]: sample["txt"] for sample in samples}


READERS: dict[str, Callable[[Path, Path], dict[str, str]]] = {
    "coco": read_coco,
    "jsonl": read_jsonl,
    "csv": read_csv,
    "sidecar": read_sidecars,
    "hf": read_hf,
    "webdataset": read_webdataset,
}


@pytest.fixture(autouse=True)
def nothing_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    """Ten images in two parts: seven with a caption, two of these with low confidence, and three without."""
    rows = write_images(tmp_path / "images", [f"{number}.jpg" for number in range(7)])
    rows[5]["confidence"], rows[6]["confidence"] = 0.1, float("nan")
    rows[4]["status"] = "duplicate"
    rows += [row("f.jpg", **FAILED), row("g.jpg", **FAILED)]
    rows += [row("not yet.jpg", **FAILED | {"status": "duplicate", "error_code": ""})]
    return write_captions(tmp_path / "captions", rows[:4], rows[4:])


# ---- every format


@pytest.mark.parametrize("format", FORMATS)
def test_captions_with_a_copied_part_are_refused(format: str, captions: Path, tmp_path: Path) -> None:
    (captions / "part-2.parquet").write_bytes((captions / "part-0.parquet").read_bytes())

    with pytest.raises(InputError, match="image ids must be unique, but '0.jpg'"):
        export(captions, tmp_path / "out", format)

    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", FORMATS)
def test_the_target_tool_reads_each_caption_with_its_image(format: str, tmp_path: Path) -> None:
    rows = write_images(tmp_path / "images", ODD_NAMES)
    folder = write_captions(tmp_path / "captions", rows[::2], rows[1::2])
    expected = {exported["image_id"]: exported["caption"] for exported in rows}
    if format == "sidecar":  # one line, under the sidecar's name
        expected = {sidecar_name(name): caption.replace("\n", " ") for name, caption in expected.items()}

    summary = export(folder, tmp_path / "out", format)

    assert READERS[format](tmp_path / "out", tmp_path / "cache") == expected
    assert (summary.num_exported, summary.describe_left_out()) == (len(rows), "")


@pytest.mark.parametrize("format", FORMATS)
def test_every_row_is_exported_or_counted_as_skipped(format: str, captions: Path, tmp_path: Path) -> None:
    (tmp_path / "images" / "0.jpg").unlink()

    summary = export(captions, tmp_path / "out", format, min_confidence=0.3)

    num_gone = 1 if format in WITH_IMAGES else 0
    assert summary.num_exported == 5 - num_gone
    assert summary.left_out_by_status == {"failed": 2, "duplicate": 1}
    assert summary.left_out_by_confidence == 2
    assert summary.left_out_without_image == num_gone
    expected = {f"{number}{'.txt' if format == 'sidecar' else '.jpg'}" for number in range(num_gone, 5)}
    assert set(READERS[format](tmp_path / "out", tmp_path / "cache")) == expected


def test_images_below_a_familiarity_or_without_one_are_left_out_and_counted(tmp_path: Path) -> None:
    values = [0.3, 0.05, 0.0499, float("nan")]
    folder = write_captions(
        tmp_path / "captions", [row(f"{number}.jpg", familiarity=value) for number, value in enumerate(values)]
    )

    summary = export(folder, tmp_path / "out", "jsonl", min_familiarity=0.05)

    assert [json.loads(line)["image_id"] for line in (tmp_path / "out").read_text().splitlines()] == ["0.jpg", "1.jpg"]
    assert summary.describe_left_out() == "2 below --min-familiarity"


def test_captions_of_earlier_versions_are_exported_without_later_columns(tmp_path: Path) -> None:
    folder = write_captions(tmp_path / "captions", [row("a.jpg")])
    (part,) = folder.glob("*.parquet")
    pq.write_table(pq.read_table(part).drop_columns(["familiarity", "caption_source"]), part)

    export(folder, tmp_path / "out", "jsonl")

    assert json.loads((tmp_path / "out").read_text()) == {name: row("a.jpg")[name] for name in COLUMNS} | {
        "familiarity": None,
        "caption_source": "",
    }


def test_existing_captions_are_exported_whatever_the_least_confidence(tmp_path: Path) -> None:
    unknown = {"confidence": float("nan"), "familiarity": float("nan")}
    rows = [row("a.jpg", "mine", caption_source="existing", **unknown), row("b.jpg", **unknown)]
    folder = write_captions(tmp_path / "captions", rows)

    export(folder, tmp_path / "out", "jsonl", min_confidence=0.3, min_familiarity=0.3)

    exported = json.loads((tmp_path / "out").read_text())
    assert (exported["captions"], exported["caption_source"]) == (["mine", "another one"], "existing")


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_leaves_out_images_that_are_no_longer_in_the_input(
    format: str, captions: Path, tmp_path: Path
) -> None:
    (tmp_path / "images" / "0.jpg").unlink()
    removed = pa.table({"image_id": ["0.jpg", "never captioned.jpg"]})
    write_table(str(captions / "_imcap" / "removed"), removed)  # as the next captioning run records it

    summary = export(captions, tmp_path / "out", format)

    assert (summary.left_out_not_in_input, summary.left_out_without_image) == (1, 0)
    assert "1 no longer in the input" in summary.describe_left_out()
    names = set(READERS[format](tmp_path / "out", tmp_path / "cache"))
    assert names == {f"{number}{'.txt' if format == 'sidecar' else '.jpg'}" for number in range(1, 7)}


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_captions_give_the_same_bytes(format: str, captions: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        export(captions, tmp_path / name / "out", format)

    assert files_below(tmp_path / "a") == files_below(tmp_path / "b")


@pytest.mark.parametrize("format", FORMATS)
def test_an_existing_export_is_replaced_only_with_overwrite(format: str, captions: Path, tmp_path: Path) -> None:
    export(captions, tmp_path / "out" / "x", format)
    before = files_below(tmp_path / "out")
    write_captions(captions, [row("0.jpg", "something new", image_path=str(tmp_path / "images" / "0.jpg"))], [])

    if format == "sidecar":
        assert export(captions, tmp_path / "out" / "x", format).num_kept == 1
    else:
        with pytest.raises(OutputError, match="--overwrite"):
            export(captions, tmp_path / "out" / "x", format)
    assert files_below(tmp_path / "out") == before

    replace = {"existing": "overwrite"} if format == "sidecar" else {"overwrite": True}
    export(captions, tmp_path / "out" / "x", format, **replace)
    exported = READERS[format](tmp_path / "out" / "x", tmp_path / "cache")
    assert exported["0.txt" if format == "sidecar" else "0.jpg"] == "something new"
    assert format == "sidecar" or len(exported) == 1


@pytest.mark.parametrize("format", FORMATS)
def test_an_export_is_written_to_a_uri(format: str, captions: Path, tmp_path: Path) -> None:
    remote = f"memory://bucket-{uuid.uuid4().hex}/some"

    export(captions, f"{remote}/out", format)
    export(captions, tmp_path / "some" / "out", format)

    exported = {file.name: storage.read_bytes(file.location) for file in storage.list_files(remote)}
    assert exported == files_below(tmp_path / "some")


@pytest.mark.parametrize("format", FORMATS)
def test_corrupt_captions_leave_the_existing_export_unchanged(format: str, captions: Path, tmp_path: Path) -> None:
    export(captions, tmp_path / "out" / "x", format)
    before = files_below(tmp_path / "out")
    part = captions / "part-1.parquet"
    content = part.read_bytes()
    part.write_bytes(content[:4] + b"\xff" * (len(content) // 2) + content[4 + len(content) // 2 :])

    options = {"existing": "overwrite"} if format == "sidecar" else {"overwrite": True}
    with pytest.raises((InputError, OSError)):
        export(captions, tmp_path / "out" / "x", format, **options)

    assert files_below(tmp_path / "out") == before


@pytest.mark.parametrize("format", FORMATS)
def test_an_export_without_rows_is_an_error_and_writes_no_file(format: str, captions: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no caption to export: 1 duplicate, 2 failed, 7 below --min-confidence"):
        export(captions, tmp_path / "out", format, min_confidence=0.99)

    assert not (tmp_path / "out").exists()


def test_an_exported_confidence_passes_as_min_confidence(tmp_path: Path) -> None:
    random = Random(0)
    rows = [row(f"{number}.jpg", confidence=round(random.random(), 1 + number % 9)) for number in range(200)]
    folder = write_captions(tmp_path / "captions", rows)
    export(folder, tmp_path / "all", "jsonl")
    shown = [json.loads(line)["confidence"] for line in (tmp_path / "all").read_text().splitlines()]

    for confidence in shown[:9]:
        summary = export(folder, tmp_path / "some", "jsonl", min_confidence=confidence, overwrite=True)
        assert summary.num_exported == sum(other >= confidence for other in shown)
    assert shown[::9] == [one["confidence"] for one in rows][::9]


@pytest.mark.parametrize("format", ["coco", "sidecar", "hf", "webdataset"])
def test_an_id_shared_by_two_images_is_refused(format: str, tmp_path: Path) -> None:
    rows = write_images(tmp_path / "images", ["a.jpg", "b.jpg"])
    folder = write_captions(tmp_path / "captions", rows, rows[1:])

    with pytest.raises(InputError, match=r"'b\.jpg' occurs more than once"):
        export(folder, tmp_path / "out", format)

    assert not (tmp_path / "out").exists()


# ---- unsuitable captions tables and outputs


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table({"x": [1]}), "no captions table"),
        (pa.table({"image_id": ["a"], "caption": ["b"]}), "lacks the columns image_path, captions, confidence"),
        (
            pa.Table.from_pylist([row("a.jpg")], CAPTIONS_SCHEMA).set_column(3, "captions", pa.array([1.5])),
            "cannot be read as a captions table",
        ),
        (
            pa.Table.from_pylist([row("a.jpg")], CAPTIONS_SCHEMA).set_column(2, "caption", pa.array([b"\xff"])),
            "cannot be read as a captions table",
        ),
        (
            pa.Table.from_pylist([row("a.jpg")], CAPTIONS_SCHEMA).set_column(
                CAPTIONS_SCHEMA.get_field_index("format"), "format", pa.array([b"\xff"]).view(pa.string())
            ),
            "cannot be read as a captions table",
        ),
        (pa.Table.from_pylist([row("")], CAPTIONS_SCHEMA), "a row with a caption has no image_id"),
        (
            pa.Table.from_pylist([row("a") | {"image_id": None}], CAPTIONS_SCHEMA),
            "a row with a caption has no image_id",
        ),
        (CAPTIONS_SCHEMA.empty_table(), "no caption to export: it is empty"),
    ],
)
def test_an_unsuitable_captions_table_is_refused(table: pa.Table, message: str, tmp_path: Path) -> None:
    pq.write_table(table, tmp_path / "captions.parquet")

    with pytest.raises(InputError, match=message):
        export(tmp_path / "captions.parquet", tmp_path / "out", "jsonl")

    assert not (tmp_path / "out").exists()


def test_wider_column_types_are_read(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([row("a.jpg")], CAPTIONS_SCHEMA)
    wide = {pa.string(): pa.large_string(), pa.int32(): pa.int64(), pa.float32(): pa.float64()}
    columns = [pa.field(column.name, wide.get(column.type, column.type)) for column in table.schema]
    pq.write_table(table.cast(pa.schema(columns)), tmp_path / "captions.parquet")

    export(tmp_path / "captions.parquet", tmp_path / "out", "jsonl")

    assert json.loads((tmp_path / "out").read_text()) == {name: row("a.jpg")[name] for name in COLUMNS}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["", "part-0.parquet", "below/out"])
def test_an_export_does_not_overwrite_its_captions(format: str, name: str, captions: Path) -> None:
    before = files_below(captions)

    with pytest.raises(OutputError, match="is inside CAPTIONS"):
        export(captions, captions / name, format, overwrite=format != "sidecar")

    assert files_below(captions) == before


@pytest.mark.parametrize("format", FILES)
def test_a_single_file_is_not_written_over_a_folder(format: str, captions: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is a folder"):
        export(captions, tmp_path / "images", format, overwrite=True)


@pytest.mark.parametrize("format", FOLDERS)
def test_a_folder_is_not_written_over_a_file(format: str, captions: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")

    with pytest.raises(OutputError, match="is a file"):
        export(captions, tmp_path / "out", format)


@pytest.mark.parametrize("format", WITH_IMAGES)
def test_a_folder_with_other_files_is_never_replaced(format: str, captions: Path, tmp_path: Path) -> None:
    before = files_below(tmp_path / "images")

    with pytest.raises(OutputError, match=r"no export to \w+ has written \(0.jpg\)"):
        export(captions, tmp_path / "images", format, overwrite=True)

    assert files_below(tmp_path / "images") == before


# ---- single text files

anything = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
non_blank = anything.filter(lambda text: text.strip() != "")
seconds_in_all = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@seconds_in_all
@given(rows=st.dictionaries(anything, non_blank, min_size=1, max_size=5))
def test_any_text_survives_json_lines_csv_and_coco(
    rows: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("text")
    write_captions(folder / "captions", [row(name, caption) for name, caption in rows.items()])

    for format in FILES:
        export(folder / "captions", folder / format, format)

    assert read_jsonl(folder / "jsonl", folder) == rows
    assert read_csv(folder / "csv", folder) == rows
    coco = json.loads((folder / "coco").read_text(encoding="utf-8"))
    assert [image["file_name"] for image in coco["images"]] == list(rows)
    assert [annotation["caption"] for annotation in coco["annotations"]] == list(rows.values())


def test_json_lines_contain_the_row_and_no_invalid_json_numbers(tmp_path: Path) -> None:
    unknown = {"confidence": float("nan"), "familiarity": float("nan"), "logprob": float("-inf")}
    folder = write_captions(tmp_path / "captions", [row("a.jpg", **unknown), row("b.jpg", confidence=0.3)])

    export(folder, tmp_path / "out.jsonl", "jsonl")

    first, second = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert first == {name: row("a.jpg")[name] for name in COLUMNS} | dict.fromkeys(unknown)
    assert second["confidence"] == 0.3


@given(text=st.text(alphabet="'=+-@\t\r\n＝a1;"))
def test_no_text_cell_starts_like_a_formula_and_the_text_can_be_restored(text: str) -> None:
    for part in re.split("[;\t\r\n]", guard_cell(text)):  # at any separator of cells
        assert not re.match("[=+\\-@\t\r\n＝＋－＠]", part)
    assert unguarded(guard_cell(text)) == text


def test_csv_follows_rfc_4180_and_numbers_are_numbers(tmp_path: Path) -> None:
    folder = write_captions(tmp_path / "captions", [row("a.jpg", 'says "hi", leaves', logprob=-1.5)])

    export(folder, tmp_path / "out.csv", "csv")

    head, line, end = (tmp_path / "out.csv").read_bytes().split(b"\r\n")
    assert head.decode("utf-8-sig") == ",".join(COLUMNS)
    assert line.startswith(
        b'a.jpg,,"says ""hi"", leaves","[""says \\""hi\\"", leaves"", ""another one""]",0.5,0.75,-1.5,4,ok'
    )
    assert end == b""


@pytest.mark.parametrize("style", ["val2014/COCO_val2014_{:012d}.jpg", "{:012d}.jpg", "{:012d}"])
def test_coco_images_keep_their_numeric_ids(style: str, tmp_path: Path) -> None:
    numbers = [391895, 7, 522418]
    folder = write_captions(tmp_path / "captions", [row(style.format(number)) for number in numbers])

    export(folder, tmp_path / "out.json", "coco")

    results = json.loads((tmp_path / "out_results.json").read_text())
    assert [result["image_id"] for result in results] == numbers


@pytest.mark.parametrize("other", ["a/000000000007.jpg", "photo.jpg"])
def test_ids_are_numbered_in_order_if_not_all_are_coco_numbers(other: str, tmp_path: Path) -> None:
    folder = write_captions(tmp_path / "captions", [row("000000000007.jpg"), row(other)])

    export(folder, tmp_path / "out.json", "coco")

    images = json.loads((tmp_path / "out.json").read_text())["images"]
    assert {image["id"]: image["file_name"] for image in images} == {1: "000000000007.jpg", 2: other}


def test_the_file_name_is_the_image_path_if_the_id_is_not_a_path(tmp_path: Path) -> None:
    rows = [row("17", image_path="/images/a.jpg"), row("sub/b.jpg", image_path="/images/sub/b.jpg"), row("c#3")]

    export(write_captions(tmp_path / "captions", rows), tmp_path / "out.json", "coco")

    images = json.loads((tmp_path / "out.json").read_text())["images"]
    assert [image["file_name"] for image in images] == ["/images/a.jpg", "sub/b.jpg", "c#3"]


# ---- one text file per image


@pytest.fixture
def one(tmp_path: Path) -> Path:
    return write_captions(tmp_path / "captions", [row("sub/a.jpg", "a dog")])


@pytest.fixture
def sidecar(tmp_path: Path) -> Path:
    (tmp_path / "out" / "sub").mkdir(parents=True)
    return tmp_path / "out" / "sub" / "a.txt"


@pytest.mark.parametrize("content", [b"", b"made by hand", "für Hand\r\n".encode("utf-16"), b"a dog\n"])
def test_an_existing_sidecar_is_kept(content: bytes, one: Path, sidecar: Path, tmp_path: Path) -> None:
    sidecar.write_bytes(content)

    summary = export(one, tmp_path / "out", "sidecar")

    assert sidecar.read_bytes() == content
    assert (summary.num_exported, summary.num_kept) == (0, 1)


def test_a_sidecar_is_replaced_on_request(one: Path, sidecar: Path, tmp_path: Path) -> None:
    sidecar.write_text("made by hand")

    assert export(one, tmp_path / "out", "sidecar", existing="overwrite").num_exported == 1
    assert sidecar.read_text() == "a dog\n"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, b"a dog\n"),
        (b"", b"a dog\n"),
        (b"by hand", b"by hand\na dog\n"),
        (b"by hand\r\n", b"by hand\r\na dog\n"),
        (b"\xef\xbb\xbfa dog\r\nby hand", b"\xef\xbb\xbfa dog\r\nby hand"),
        (b"a dog and a cat\n", b"a dog and a cat\na dog\n"),
        ("für Hand".encode("latin-1"), "für Hand".encode("latin-1")),
        ("by hand".encode("utf-16-le"), "by hand".encode("utf-16-le")),
    ],
)
def test_a_caption_is_added_to_a_sidecar_once(
    before: bytes | None, after: bytes, one: Path, sidecar: Path, tmp_path: Path
) -> None:
    if before is not None:
        sidecar.write_bytes(before)

    export(one, tmp_path / "out", "sidecar", existing="append")
    assert sidecar.read_bytes() == after

    assert export(one, tmp_path / "out", "sidecar", existing="append").num_exported == 0
    assert sidecar.read_bytes() == after


@pytest.mark.parametrize("existing", ["skip", "append"])
def test_a_sidecar_link_to_a_missing_share_is_kept(existing: str, one: Path, sidecar: Path, tmp_path: Path) -> None:
    sidecar.symlink_to(tmp_path / "unmounted" / "a.txt")

    assert export(one, tmp_path / "out", "sidecar", existing=existing).num_kept == 1
    assert sidecar.is_symlink()


def test_sidecars_are_written_next_to_the_images_if_the_output_is_their_folder(tmp_path: Path) -> None:
    rows = write_images(tmp_path / "images", ["a.jpg", "sub/b.jpeg"])
    before = files_below(tmp_path / "images")

    export(write_captions(tmp_path / "captions", rows), tmp_path / "images", "sidecar")

    after = files_below(tmp_path / "images")
    assert set(after) - set(before) == {"a.txt", "sub/b.txt"}
    assert before.items() <= after.items()


def test_images_that_would_have_the_same_sidecar_get_longer_names(tmp_path: Path) -> None:
    """Also on a file system that ignores case and Unicode form, as those of macOS and SMB."""
    names = {
        "a.jpg": "a.txt",
        "b.jpg": "b.txt",
        "sub/b.jpg": "sub/b.jpg.txt",
        "sub/b.png": "sub/b.png.txt",
        "IMG_1.HEIC": "IMG_1.HEIC.txt",
        "img_1.jpg": "img_1.jpg.txt",
        "\u00e9.jpg": "\u00e9.jpg.txt",
        "e\u0301.png": "e\u0301.png.txt",
        "c.jpg": "c.jpg-HASH.txt",
        "C.jpg": "C.jpg-HASH.txt",
        "d.png": "d.png-HASH.txt",
        "d.gif": "d.gif.txt",
        "d.png.jpg": "d.png.jpg-HASH.txt",
        "x" * 247 + ".jpg": "x" * 247 + ".jpg.txt",
        "x" * 247 + ".png": "x" * 247 + ".png.txt",
        "y" * 251 + ".jpg": "y" * 225 + "%-HASH.txt",
        "y" * 251 + ".png": "y" * 225 + "%-HASH.txt",
    }
    rows = [row(image_id, image_id) for image_id in names]

    summary = export(write_captions(tmp_path / "captions", rows[::2], rows[1::2]), tmp_path / "out", "sidecar")

    sidecars = {content.decode().strip(): name for name, content in files_below(tmp_path / "out").items()}
    hash = re.compile("(?<=%-)[0-9a-f]{24}|(?<=-)[0-9a-f]{8}(?=.txt)")
    assert {image_id: hash.sub("HASH", name) for image_id, name in sidecars.items()} == names
    assert (summary.num_exported, summary.num_renamed) == (17, 15)
    assert set(summary.renamed) == set(sidecars.values()) - {"a.txt", "b.txt"}
    assert "15 with a longer name" in summary.describe()


@settings(max_examples=30, deadline=None)
@given(
    stems=st.lists(st.text("aA\u00e9e\u0301.", min_size=1, max_size=4), max_size=12),
    extensions=st.lists(st.sampled_from(["", ".jpg", ".png"]), min_size=12, max_size=12),
)
def test_sidecars_are_different_files_on_any_file_system(stems: list[str], extensions: list[str]) -> None:
    ids = list({f"{stem.strip('.') or 'a'}{extension}" for stem, extension in zip(stems, extensions, strict=False)})
    with ImageNames() as names:
        names.add(ids, [portable_sidecar_name(image_id) for image_id in ids])
        sidecars = SidecarNames(names)

    assert len({portable_sidecar_name(image_id, sidecars.form(image_id)) for image_id in ids}) == len(ids)


def test_any_number_of_sidecars_can_get_longer_names() -> None:
    """More than are read from the database at a time, while it is changed."""
    ids = [f"{number}.{extension}" for extension in ("jpg", "heic") for number in range(20_000)]
    with ImageNames() as names:
        names.add([*ids, "a.jpg"], [portable_sidecar_name(image_id) for image_id in [*ids, "a.jpg"]])
        sidecars = SidecarNames(names)

    assert {sidecars.form(image_id) for image_id in ids} == {1}
    assert sidecars.form("a.jpg") == 0


def test_exported_sidecars_are_read_as_the_captions_of_their_images(tmp_path: Path) -> None:
    rows = write_images(tmp_path / "images", ["a.jpg", "a.png", "b.jpg", "A.gif"])
    for number, exported in enumerate(rows):
        exported["caption"] = f"caption {number}"

    export(write_captions(tmp_path / "captions", rows), tmp_path / "images", "sidecar")

    dataset = load_dataset(str(tmp_path / "images"), refuse_leaks=False)
    captions = {one["image_id"]: one["captions"] for one in dataset.table.to_pylist()}
    assert captions == {one["image_id"]: [one["caption"]] for one in rows}


@pytest.mark.parametrize(
    "image_id",
    [
        "../a.jpg",
        "/etc/a.jpg",
        "a/../../b.jpg",
        "a/../b.jpg",
        "..",
        ".",
        "a//b.jpg",
        "a/",
        "s3://bucket/a.jpg",
        "a\0.jpg",
    ],
)
def test_no_sidecar_is_written_outside_the_output(image_id: str, tmp_path: Path) -> None:
    folder = write_captions(tmp_path / "captions", [row("good.jpg"), row(image_id)])

    with pytest.raises(InputError, match="is not a path below OUT"):
        export(folder, tmp_path / "deep" / "out", "sidecar", existing="overwrite")

    assert sorted(os.listdir(tmp_path)) == ["captions"]


# ---- images with their captions


@pytest.mark.parametrize("format", WITH_IMAGES)
def test_images_are_split_into_files_of_the_given_size(format: str, captions: Path, tmp_path: Path) -> None:
    export(captions, tmp_path / "out", format, shard_images=3)
    assert len(os.listdir(tmp_path / "out")) == 3
    assert len(READERS[format](tmp_path / "out", tmp_path / "cache")) == 7

    export(captions, tmp_path / "out", format, shard_images=7, overwrite=True)
    assert len(os.listdir(tmp_path / "out")) == 1
    assert len(READERS[format](tmp_path / "out", tmp_path / "cache2")) == 7


@pytest.mark.parametrize("format", WITH_IMAGES)
def test_an_image_that_changed_since_captioning_is_named_and_skipped(format: str, tmp_path: Path) -> None:
    rows = write_images(tmp_path / "images", ["gone.jpg", "changed.jpg", "folder.jpg", "good.jpg"])
    rows[1]["sha256"] = "0" * 64
    for name in ("gone.jpg", "folder.jpg"):
        (tmp_path / "images" / name).unlink()
    (tmp_path / "images" / "folder.jpg").mkdir()

    summary = export(write_captions(tmp_path / "captions", rows), tmp_path / "out", format)

    assert summary.images_without == [
        "gone.jpg (missing)",
        "changed.jpg (changed since it was captioned)",
        f"folder.jpg (cannot read {tmp_path}/images/folder.jpg: Is a directory)",
    ]
    assert (summary.num_exported, summary.left_out_without_image) == (1, 3)
    assert list(READERS[format](tmp_path / "out", tmp_path / "cache")) == ["good.jpg"]


@pytest.mark.parametrize("format", WITH_IMAGES)
def test_a_missing_disk_is_an_error_and_the_earlier_export_is_kept(format: str, captions: Path, tmp_path: Path) -> None:
    export(captions, tmp_path / "out", format)
    before = files_below(tmp_path / "out")
    (tmp_path / "images").rename(tmp_path / "unmounted")

    with pytest.raises(
        ImcapError, match=r"none of the 7 images can be read, the first is 0\.jpg \(missing\)"
    ) as refused:
        export(captions, tmp_path / "out", format, overwrite=True)

    assert refused.value.exit_code == 1
    assert files_below(tmp_path / "out") == before


@pytest.mark.parametrize("format", WITH_IMAGES)
def test_a_missing_input_ends_the_export_even_if_other_images_exist(format: str, tmp_path: Path) -> None:
    rows = write_images(tmp_path / "other", ["a.jpg"]) + write_images(tmp_path / "images", ["b.jpg", "c.jpg"])
    folder = write_captions(tmp_path / "captions", rows)
    run = {"input": str(tmp_path / "images"), "state": "complete"}
    storage.write_bytes(f"{folder}/_imcap/run.json", json.dumps(run).encode())
    (tmp_path / "images").rename(tmp_path / "unmounted")

    with pytest.raises(ImcapError, match="images cannot be read any more: no such file") as refused:
        export(folder, tmp_path / "out", format)

    assert refused.value.exit_code == 1


def test_a_store_that_throttles_many_images_is_probed_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = [row(f"{number}.jpg", image_path=f"memory://throttled/{number}.jpg") for number in range(50)]
    folder = write_captions(tmp_path / "captions", write_images(tmp_path / "images", ["a.jpg"]) + remote)
    read_bytes = storage.read_bytes
    asked: list[str] = []

    def throttled(location: str, **options: Any) -> bytes:
        if location.startswith("memory://"):
            raise OSError("SlowDown")
        return read_bytes(location, **options)

    def is_reachable(location: str) -> bool:
        asked.append(location)
        return True

    monkeypatch.setattr(storage, "read_bytes", throttled)
    monkeypatch.setattr(storage, "is_reachable", is_reachable)

    with pytest.raises(ImcapError, match="50 of 51 images are not in .* because they could not be read"):
        export(folder, tmp_path / "out", "webdataset")

    assert asked == ["memory://throttled/0.jpg", "memory://throttled/49.jpg"]


@pytest.mark.parametrize("format", WITH_IMAGES)
def test_images_of_an_unknown_table_cannot_be_exported(format: str, tmp_path: Path) -> None:
    folder = write_captions(tmp_path / "captions", [row("a.jpg", image_path="")])

    with pytest.raises(InputError, match=r"image 'a\.jpg' was in a table"):
        export(folder, tmp_path / "out", format)


@pytest.mark.parametrize("format", WITH_IMAGES)
@pytest.mark.parametrize("kind", ["table", "tar"])
def test_images_come_from_the_tables_listed_by_the_run(format: str, kind: str, tmp_path: Path) -> None:
    data = {f"{number}.jpg": small_data.jpeg(number) for number in range(5)}
    if kind == "table":
        structs = [{"bytes": image, "path": name} for name, image in data.items()]
        pq.write_table(pa.table({"image": structs}), tmp_path / "in.parquet", row_group_size=2)
    else:
        small_data.write_tar(tmp_path / "in.tar", data)
    source = next(tmp_path.glob("in.*"))
    build_manifest(str(source), str(tmp_path / "captions" / "_imcap" / "manifest"))
    (tmp_path / "captions" / "_imcap" / "run.json").write_text(json.dumps({"input": str(source)}))
    ids = [name if kind == "table" else name.removesuffix(".jpg") for name in data]
    hashes = [hashlib.sha256(image).hexdigest() for image in data.values()]  # by which each gets its own image, or none
    rows = [row(image_id, image_path="", sha256=sha256) for image_id, sha256 in zip(ids, hashes, strict=True)]
    folder = write_captions(tmp_path / "captions", reversed(rows))

    summary = export(folder, tmp_path / "out", format)

    assert summary.num_exported == 5
    assert READERS[format](tmp_path / "out", tmp_path / "cache").keys() == set(ids)


@pytest.mark.parametrize("format", WITH_IMAGES)
def test_no_file_outside_the_input_is_exported(format: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    folder = write_captions(tmp_path / "captions", [row("a.jpg", image_path=str(tmp_path / "secret"))])

    with pytest.raises(InputError, match="leads out of"):
        export(folder, tmp_path / "out", format, images=CaptionedImageSource(str(folder)))

    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("names", [["a.jpg", "a.png"], ["a.jpg", "a"], ["a.jpg", "a.JPG"]])
def test_images_that_differ_only_in_extension_have_different_keys(names: list[str], tmp_path: Path) -> None:
    rows = write_images(tmp_path / "images", names)

    export(write_captions(tmp_path / "captions", rows), tmp_path / "out", "webdataset")

    assert sorted(read_webdataset(tmp_path / "out", tmp_path)) == sorted(names)


def test_members_with_long_names_can_be_extracted(tmp_path: Path) -> None:
    names = ["x" * 251 + ".jpg", "x" * 250 + "y.jpg", "x" * 251 + ".png", "猫" * 84 + ".jpg", "." * 200 + "x.jpg"]
    rows = [row(name, image_path=str(tmp_path / "image")) for name in [*names, f"{'d' * 300}/{'%' * 300}"]]
    (tmp_path / "image").write_bytes(small_data.jpeg())

    export(write_captions(tmp_path / "captions", rows), tmp_path / "out", "webdataset")

    assert sorted(read_webdataset(tmp_path / "out", tmp_path)) == sorted(row["image_id"] for row in rows)
    with tarfile.open(tmp_path / "out" / "captions-00000.tar") as tar:
        tar.extractall(tmp_path / "extracted", filter="data")
    files = [path for path in (tmp_path / "extracted").rglob("*") if path.is_file()]
    assert len(files) == 3 * len(rows)
    assert sorted(json.loads(path.read_bytes())["image_id"] for path in files if path.suffix == ".json") == sorted(
        row["image_id"] for row in rows
    )


@given(names=st.sets(st.text(alphabet="a%.-/猫_", min_size=200, max_size=300), min_size=2, max_size=2))
def test_long_names_have_unique_keys(names: set[str]) -> None:
    keys = {webdataset_key(name, keep_extension=True) for name in names}

    assert len(keys) == 2
    assert all(len(step.encode()) <= 255 for key in keys for step in f"{key}.json".split("/"))


paths = st.lists(st.text(alphabet="a._%/\n\0é-"), min_size=1).map("/".join) | anything


@given(image_id=paths.filter(bool), keep_extension=st.booleans())
def test_webdataset_splits_a_name_after_our_key_and_the_id_of_a_short_name_can_be_restored(
    image_id: str, keep_extension: bool
) -> None:
    from webdataset.tariterators import base_plus_ext

    key = webdataset_key(image_id, keep_extension=keep_extension)

    assert base_plus_ext(f"{key}.jpg") == (key, "jpg")
    assert not re.match(r"__[^/]*__($|/)", f"{key}.jpg"), "webdataset would treat it as metadata"
    assert not key.startswith("/")
    assert not {"..", "."} & set(key.split("/"))
    if "%-" in key:  # shortened: only names longer than about 240 bytes are, and a letter has at most four
        assert len(image_id) >= 60
        assert re.search(r"%-[0-9a-f]{24}(/|$)", key)
    else:
        assert image_id.startswith(unquote(key))
        assert not keep_extension or unquote(key) == image_id


@settings(seconds_in_all, max_examples=5)
@given(image_ids=st.sets(paths.filter(bool), min_size=1, max_size=20))
def test_every_image_is_one_sample_regardless_of_its_name(
    image_ids: set[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("keys")
    (folder / "image").write_bytes(small_data.jpeg())
    rows = [row(image_id, image_path=str(folder / "image")) for image_id in sorted(image_ids)]

    export(write_captions(folder / "captions", rows), folder / "out", "webdataset")

    assert set(read_webdataset(folder / "out", folder)) == image_ids


@pytest.mark.parametrize(
    ("format", "name", "extension"),
    [
        ("jpeg", "a.png", "jpg"),
        ("png", "a", "png"),
        ("", "a.TIFF", "tif"),
        ("unknown", "a", "bin"),
        ("../x", "a", "bin"),
    ],
)
def test_an_image_in_a_tar_gets_the_extension_of_its_format(
    format: str, name: str, extension: str, tmp_path: Path
) -> None:
    rows = write_images(tmp_path / "images", [name])
    folder = write_captions(tmp_path / "captions", [rows[0] | {"format": format}])

    export(folder, tmp_path / "out", "webdataset")

    with tarfile.open(fileobj=io.BytesIO((tmp_path / "out" / "captions-00000.tar").read_bytes())) as tar:
        assert tar.getnames() == [f"a.{extension}", "a.txt", "a.json"]


def test_files_left_by_a_killed_export_are_removed_by_the_next(captions: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".captions-00003.tar.0123abcd").write_bytes(b"half")
    (tmp_path / "out" / "captions-00002.tar").write_bytes(b"old")

    export(captions, tmp_path / "out", "webdataset", overwrite=True)

    assert os.listdir(tmp_path / "out") == ["captions-00000.tar"]


def test_progress_is_reported_while_rows_are_written(tmp_path: Path) -> None:
    folder = str(write_captions(tmp_path / "captions", [row(f"{number}.jpg") for number in range(1000)]))
    reports: list[tuple[int, int]] = []

    export_captions(
        folder,
        str(tmp_path / "out"),
        ExportOptions(format="jsonl"),
        images=CaptionedImageSource(folder),
        on_progress=lambda done, total: reports.append((done, total)),
    )

    assert [total for _, total in reports] == [1000] * len(reports)
    assert 1 < len(reports) <= 10
    assert reports == sorted(reports)
