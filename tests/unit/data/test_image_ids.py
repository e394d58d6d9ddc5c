"""Images can be listed repeatedly with ids, paths, bytes and captions of any type and length."""

from __future__ import annotations

import base64
import datetime
import decimal
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imcap_ray import storage
from imcap_ray.data.datasets import load_dataset
from imcap_ray.data.image_reading import read_rows
from imcap_ray.data.manifest import build_manifest, largest_row_group
from imcap_ray.data.parquet_files import read_table, write_table
from imcap_ray.errors import DatasetError, ImageError
from tests.malformed_images import encode, photo
from tests.small_data import captions_of, jpeg

UUIDS = [uuid.uuid5(uuid.NAMESPACE_URL, str(number)) for number in range(4)]
IMAGES = [jpeg(number, width=20, height=20) for number in range(4)]
HEX = [one.hex for one in UUIDS]
POSITIONS = [f"t.parquet#{number}" for number in range(4)]


def manifest_rows(folder: Path) -> list[dict[str, Any]]:
    return [row for part in storage.list_work_tables(str(folder)) for row in read_table(part).to_pylist()]


def write_ids(folder: Path, ids: pa.Array, *, column: str = "id", **columns: Any) -> Path:
    captions = [captions_of(number)[0] for number in range(len(ids))]
    table = pa.table({"image": IMAGES[: len(ids)], "caption": captions, column: ids, **columns})
    pq.write_table(table, folder / "t.parquet", row_group_size=3)
    return folder / "t.parquet"


BYTES = [one.bytes for one in UUIDS]
TEXTS = ["a.jpg", "caf\u00e9.jpg", "c", "d"]
NUMBERS = [30, 10, 20, 40]
FIXED_BYTES = max(map(len, IMAGES))


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (pa.array(BYTES, pa.binary()), HEX),
        (pa.array(BYTES, pa.binary(16)), HEX),
        (pa.array(BYTES, pa.large_binary()), HEX),
        (pa.array(BYTES, pa.uuid()), HEX),
        (pa.array(BYTES, pa.binary()).dictionary_encode(), HEX),
        (pa.array([b"0123456789abcde\xff", b"0123456789abcdef", b"\x00", b"\xff"]), None),
        (pa.array([text.encode() for text in TEXTS], pa.binary()), TEXTS),
        (pa.array(TEXTS, pa.large_string()), TEXTS),
        (pa.array(TEXTS, pa.string_view()), TEXTS),
        (pa.array(TEXTS).dictionary_encode(), TEXTS),
        (pa.array([b"a\xff", b"b", b"c", b"d"]).view(pa.string()), ["a\\xff", "b", "c", "d"]),
        (pa.array(NUMBERS, pa.uint64()), ["30", "10", "20", "40"]),
        (pa.array([1.5, 2, 3, 4]), ["1.5", "2", "3", "4"]),
        (pa.array([decimal.Decimal(f"{number}.50") for number in NUMBERS]), [f"{number}.50" for number in NUMBERS]),
        (pa.array([datetime.date(2024, 1, day) for day in range(1, 5)]), [f"2024-01-0{day}" for day in range(1, 5)]),
        (pa.array([{"a": number} for number in NUMBERS]), POSITIONS),
        (pa.array([[number] for number in NUMBERS]), POSITIONS),
        (pa.array([[("a", number)] for number in NUMBERS], pa.map_(pa.string(), pa.int64())), POSITIONS),
    ],
    ids=lambda value: str(value.type)[:40] if isinstance(value, pa.Array) else "",
)
def test_ids_of_any_type_identify_the_images_in_every_command(
    tmp_path: Path, ids: pa.Array, expected: list[str] | None
) -> None:
    path = write_ids(tmp_path, ids)
    expected = expected or [b"0123456789abcde\xff".hex(), "0123456789abcdef", "00", "ff"]

    for _ in range(2):  # a run and its resumption
        summary = build_manifest(str(path), str(tmp_path / "manifest"))
        assert (summary.num_images, summary.changed.num_rows) == (4, 0)
    dataset = load_dataset(str(path))

    rows = manifest_rows(tmp_path / "manifest")
    assert [row["image_id"] for row in rows] == expected
    assert [data for _, data in read_rows(rows, None)] == IMAGES
    assert sorted(dataset.table["image_id"].to_pylist()) == sorted(expected)
    is_said = [note for note in (*summary.notes, *dataset.notes) if "id (" in note]
    assert len(is_said) == (2 if expected == POSITIONS else 0)


def test_an_id_column_of_structs_is_skipped_for_the_next_one(tmp_path: Path) -> None:
    path = write_ids(tmp_path, pa.array([{"a": 1}] * 4), column="image_id", key=pa.array(TEXTS))

    summary = build_manifest(str(path), str(tmp_path / "manifest"))

    assert [row["image_id"] for row in manifest_rows(tmp_path / "manifest")] == TEXTS
    assert summary.notes == (f"{path}: images from column image (bytes), ids from column key",)


def test_captions_without_images_can_have_byte_ids_but_not_structs(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image_id": BYTES, "caption": ["a dog"] * 4}), path)
    assert sorted(load_dataset(str(path)).table["image_id"].to_pylist()) == sorted(HEX)

    pq.write_table(pa.table({"image_id": [{"a": 1}], "caption": ["a dog"]}), path)
    with pytest.raises(DatasetError, match="expected a column of images .* or image_id"):
        load_dataset(str(path))


# ---- types of columns


@pytest.mark.parametrize(
    ("image_type", "text_type", "captions_type"),
    [
        (pa.binary_view(), pa.string_view(), pa.list_(pa.string_view())),
        (pa.large_binary(), pa.large_string(), pa.large_list(pa.large_string())),
        (pa.binary(), pa.dictionary(pa.int8(), pa.string()), pa.list_(pa.dictionary(pa.int32(), pa.string()))),
        (pa.dictionary(pa.int32(), pa.binary()), pa.dictionary(pa.uint32(), pa.string()), pa.list_(pa.string(), 2)),
        (pa.binary(FIXED_BYTES), pa.string_view(), pa.list_(pa.string_view(), 2)),
    ],
    ids=["views", "large", "categoricals", "categorical bytes", "fixed sizes"],
)
@pytest.mark.parametrize("kind", ["bytes", "struct", "path"])
def test_images_ids_paths_and_captions_have_any_arrow_type(
    tmp_path: Path, image_type: pa.DataType, text_type: pa.DataType, captions_type: pa.DataType, kind: str
) -> None:
    images = [data.ljust(FIXED_BYTES, b"\0") for data in IMAGES]
    names = [f"{number}.jpg" for number in range(4)]
    for name, data in zip(names, images, strict=True):
        (tmp_path / name).write_bytes(data)
    struct = pa.struct([("bytes", image_type), ("path", text_type)])
    image = {
        "bytes": pa.array(images, image_type),
        "struct": pa.array([{"bytes": images[0], "path": "0.jpg"}, *({"path": name} for name in names[1:])], struct),
        "path": pa.array(names, text_type),
    }[kind]
    table = {
        "id": pa.array(TEXTS, text_type),
        "image": image,
        "split": pa.array(["train"] * 3 + ["test"], text_type),
        "captions": pa.array([captions_of(number)[:2] for number in range(4)], captions_type),
    }
    pq.write_table(pa.table(table), tmp_path / "t.parquet")

    build_manifest(str(tmp_path / "t.parquet"), str(tmp_path / "manifest"))
    dataset = load_dataset(str(tmp_path / "t.parquet"))

    rows = manifest_rows(tmp_path / "manifest")
    assert [row["image_id"] for row in rows] == TEXTS
    read = {row["image_id"]: data for row, data in read_rows(rows, None, image_columns=["image"])}
    assert read == dict(zip(TEXTS, images, strict=True))
    assert dataset.references() == {name: captions_of(number)[:2] for number, name in enumerate(TEXTS)}
    assert dataset.describe_splits() == "3 train, 1 test"
    of_dataset = read_rows(dataset.manifest(dataset.table).to_pylist(), None, image_columns=dataset.image_columns)
    assert {row["image_id"]: data for row, data in of_dataset} == read


def test_one_caption_per_row_can_be_a_categorical(tmp_path: Path) -> None:
    table = {"id": TEXTS, "image": IMAGES, "caption": pa.array(["a dog", "a cat"] * 2).dictionary_encode()}
    pq.write_table(pa.table(table), tmp_path / "t.parquet")

    assert load_dataset(str(tmp_path)).references()["d"] == ["a cat"]


def test_hashes_of_a_fixed_length_are_not_images(tmp_path: Path) -> None:
    write_ids(tmp_path, pa.array(TEXTS), data=pa.array(BYTES, pa.binary(16)), content=pa.array(IMAGES, pa.binary()))
    table = read_table(str(tmp_path / "t.parquet")).drop_columns(["image"])
    pq.write_table(table, tmp_path / "t.parquet")

    build_manifest(str(tmp_path / "t.parquet"), str(tmp_path / "manifest"))

    rows = manifest_rows(tmp_path / "manifest")
    assert [data for _, data in read_rows(rows, None, image_columns=["content"])] == IMAGES


def as_text(data: bytes, form: str) -> str:
    encoded = base64.urlsafe_b64encode(data) if form == "url-safe" else base64.b64encode(data)
    match form:
        case "lines":
            encoded = base64.encodebytes(data)
        case "without padding":
            encoded = encoded.rstrip(b"=")
        case "data URI":
            encoded = b"data:image/jpeg;base64," + encoded
    return encoded.decode()


@pytest.mark.parametrize("form", ["base64", "lines", "url-safe", "without padding", "data URI"])
def test_images_in_base64_are_images_and_not_paths(tmp_path: Path, form: str) -> None:
    data = [*IMAGES[:3], *(encode(photo(), format) for format in ("PNG", "WEBP", "BMP"))]
    texts = [as_text(image, form) for image in data]
    names = [f"t.parquet#{number}" for number in range(len(data))]
    pq.write_table(pa.table({"image": texts, "caption": ["a dog"] * len(data)}), tmp_path / "t.parquet")

    for _ in range(2):  # a run and its resumption
        summary = build_manifest(str(tmp_path / "t.parquet"), str(tmp_path / "manifest"))
        assert (summary.num_images, summary.changed.num_rows) == (len(data), 0)
    dataset = load_dataset(str(tmp_path))

    note = "images from column image (base64), ids are table names and row numbers"
    assert summary.notes == (f"{tmp_path}/t.parquet: {note}",)
    rows = manifest_rows(tmp_path / "manifest")
    assert [row["image_id"] for row in rows] == names
    assert [image for _, image in read_rows(rows, None, image_columns=["image"])] == data
    assert sorted(dataset.references()) == names
    of_dataset = read_rows(dataset.manifest(dataset.table).to_pylist(), None, image_columns=dataset.image_columns)
    assert {row["image_id"]: image for row, image in of_dataset} == dict(zip(names, data, strict=True))


def test_a_column_can_hold_paths_and_base64(tmp_path: Path) -> None:
    path = "f" * 80
    (tmp_path / "a.jpg").write_bytes(IMAGES[0])
    (tmp_path / path).write_bytes(IMAGES[1])
    column = ["a.jpg", path, as_text(IMAGES[2], "base64"), as_text(IMAGES[3], "data URI")[:-1]]
    pq.write_table(pa.table({"image": column}), tmp_path / "t.parquet")

    build_manifest(str(tmp_path / "t.parquet"), str(tmp_path / "manifest"))

    rows = manifest_rows(tmp_path / "manifest")
    assert [row["image_id"] for row in rows] == ["a.jpg", path, "t.parquet#2", "t.parquet#3"]
    assert [row["image_path"] for row in rows] == [f"{tmp_path}/a.jpg", f"{tmp_path}/{path}", "", ""]
    images = [image for _, image in read_rows(rows, None, image_columns=["image"])]
    assert images[:3] == IMAGES[:3]


# ---- long ids

LONG = "x" * 5000
DATA_URI = "data:image/jpeg;base64," + "/9j/4AAQSkZJRg//" * 20_000


def test_an_id_of_any_length_is_recognised(tmp_path: Path) -> None:
    path = write_ids(tmp_path, pa.array(["a", LONG, "b", f"{LONG}y"]))

    for _ in range(2):
        summary = build_manifest(str(path), str(tmp_path / "manifest"))
        assert (summary.num_images, summary.changed.num_rows) == (4, 0)

    assert [row["image_id"] for row in manifest_rows(tmp_path / "manifest")] == ["a", LONG, "b", f"{LONG}y"]


def test_a_manifest_without_statistics_is_read_like_one_with_them(tmp_path: Path) -> None:
    path = write_ids(tmp_path, pa.array(TEXTS))
    build_manifest(str(path), str(tmp_path / "manifest"))
    [part] = storage.list_work_tables(str(tmp_path / "manifest"))
    pq.write_table(read_table(part), part, write_statistics=False)

    assert build_manifest(str(path), str(tmp_path / "manifest")).changed.num_rows == 0
    assert [row["image_id"] for row in manifest_rows(tmp_path / "manifest")] == TEXTS
    assert largest_row_group(str(tmp_path / "manifest")) == 3


@pytest.mark.parametrize("content", ["data:image/svg+xml,%3Csvg" + "%20" * 10_000, "data:,a", "y" * 10_000])
def test_image_content_in_a_path_column_is_a_short_row_with_a_clear_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.jpg").write_bytes(IMAGES[0])
    columns = {"path": [content, "a.jpg", content], "caption": ["a dog"] * 3}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")

    for _ in range(2):
        summary = build_manifest(str(tmp_path / "t.parquet"), str(tmp_path / "manifest"))
        assert (summary.num_images, summary.changed.num_rows) == (3, 0)

    rows = manifest_rows(tmp_path / "manifest")
    assert [row["image_id"] for row in rows] == ["t.parquet#0", "a.jpg", "t.parquet#2"]
    assert max(len(row["image_path"]) for row in rows) < 500
    answers = [data for _, data in read_rows(rows, None)]
    assert answers[1] == IMAGES[0]
    assert isinstance(answers[0], ImageError) and isinstance(answers[2], ImageError)
    if content.startswith("data:"):
        assert answers[0].code == "unsupported_format"
        assert "expected the path of a file, got a data URI" in answers[0].message
    assert len(answers[0].message) < 600
    assert set(load_dataset(str(tmp_path / "t.parquet")).table["image_id"].to_pylist()) == {
        row["image_id"] for row in rows
    }


def test_a_data_uri_in_a_hugging_face_struct_is_such_a_row_too(tmp_path: Path) -> None:
    images = [{"bytes": None, "path": DATA_URI}, {"bytes": IMAGES[1], "path": "b.jpg"}]
    pq.write_table(pa.table({"image": images}), tmp_path / "t.parquet")

    build_manifest(str(tmp_path / "t.parquet"), str(tmp_path / "manifest"))

    rows = manifest_rows(tmp_path / "manifest")
    assert [row["image_id"] for row in rows] == ["t.parquet#0", "b.jpg"]
    codes = [data.code if isinstance(data, ImageError) else data for _, data in read_rows(rows, None)]
    assert sorted(codes, key=str) == sorted(["unsupported_format", IMAGES[1]], key=str)


def test_a_path_that_is_not_utf8_is_a_missing_image(tmp_path: Path) -> None:
    paths = pa.array([b"caf\xe9.jpg", b"a.jpg"]).view(pa.string())
    (tmp_path / "a.jpg").write_bytes(IMAGES[0])
    pq.write_table(pa.table({"path": paths}), tmp_path / "t.parquet")

    build_manifest(str(tmp_path / "t.parquet"), str(tmp_path / "manifest"))

    rows = manifest_rows(tmp_path / "manifest")
    assert [row["image_id"] for row in rows] == ["caf\\xe9.jpg", "a.jpg"]
    codes = [data.code if isinstance(data, ImageError) else "ok" for _, data in read_rows(rows, None)]
    assert codes == ["missing", "ok"]


def test_an_output_of_an_earlier_version_with_a_long_id_is_resumed(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(IMAGES[0])
    pq.write_table(pa.table({"path": ["a.jpg"]}), tmp_path / "t.parquet")
    build_manifest(str(tmp_path / "t.parquet"), str(tmp_path / "manifest"))
    [part] = storage.list_work_tables(str(tmp_path / "manifest"))
    before = read_table(part)
    old = before.to_pylist()[0] | {"manifest_id": 1, "image_id": DATA_URI, "image_path": f"{tmp_path}/{DATA_URI}"}
    write_table(part, pa.concat_tables([before, pa.Table.from_pylist([old], schema=before.schema)]))

    assert build_manifest(str(tmp_path / "t.parquet"), str(tmp_path / "manifest")).changed.num_rows == 0
    assert len(manifest_rows(tmp_path / "manifest")) == 2


def test_a_run_reports_once_that_ids_are_not_used(tmp_path: Path) -> None:
    path = write_ids(tmp_path, pa.array([{"a": 1}] * 4))

    notes = build_manifest(str(path), str(tmp_path / "manifest")).notes

    assert len([note for note in notes if "id (struct<a: int64>)" in note]) == 1
