"""The same small data set in each supported format gives the same table."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imcap_ray.data.columns import ColumnOptions
from imcap_ray.data.datasets import DATASET_SCHEMA, SPLITS, CaptionedImages, load_dataset
from imcap_ray.data.image_reading import read_rows, root_of
from imcap_ray.data.manifest import build_manifest, image_columns_of
from imcap_ray.errors import DatasetError, ImageError, InputError
from imcap_ray.scoring.evaluate import evaluate_captions
from tests.small_data import jpeg, write_tar

# name -> split and captions; without an official split, a hash of the name decides.
IMAGES: Final[dict[str, tuple[str, list[str]]]] = {
    "dog.jpg": ("train", ["A dog runs .", "The dog, black and white, runs ."]),
    "cat.jpg": ("train", ["A cat sleeps ."]),
    "café.jpg": ("validation", ["Un café près de la mer .", "Ein „Kaffee“ ."]),
    "ball.png": ("test", ["A | ball ; red .", '"Catch" , he says .']),
}
SHORT: Final = {"train": "train", "validation": "val", "test": "test"}
REFERENCES: Final = {name: captions for name, (_, captions) in IMAGES.items()}


def put_images(folder: Path, names: Any = IMAGES) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        (folder / name).write_bytes(jpeg(number))
    return folder


def write_flickr30k_token(folder: Path) -> None:
    put_images(folder / "flickr30k-images")
    lines = [f"{name}#{k}\t{c}" for name, captions in REFERENCES.items() for k, c in enumerate(captions)]
    (folder / "results_20130124.token").write_text("\n".join(lines), encoding="utf-8")


def write_flickr30k_csv(folder: Path) -> None:
    put_images(folder / "flickr30k_images")
    lines = [f"{name}| {k}| {c}" for name, captions in REFERENCES.items() for k, c in enumerate(captions)]
    text = "\n".join(["image_name| comment_number| comment", *lines])
    (folder / "results.csv").write_text(text, encoding="utf-8")


def write_csv(folder: Path) -> None:
    put_images(folder)
    with (folder / "captions.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "caption", "split"])
        writer.writerows([name, c, split] for name, (split, captions) in IMAGES.items() for c in captions)


def karpathy() -> dict[str, Any]:
    images = [
        {"filename": name, "imgid": number, "split": SHORT[split], "sentences": [{"raw": c} for c in captions]}
        for number, (name, (split, captions)) in enumerate(IMAGES.items())
    ]
    return {"dataset": "flickr8k", "images": images}


def write_karpathy(folder: Path) -> None:
    put_images(folder / "Flicker8k_Dataset")
    (folder / "dataset_flickr8k.json").write_text(json.dumps(karpathy()), encoding="utf-8")


def write_karpathy_coco(folder: Path) -> None:
    document = karpathy()
    for image in document["images"]:
        image["filepath"] = "val2014" if image["split"] == "val" else "train2014"
        put_images(folder / image["filepath"], [image["filename"]])
    (folder / "dataset_coco.json").write_text(json.dumps(document), encoding="utf-8")


def coco(splits: tuple[str, ...] = SPLITS) -> dict[str, Any]:
    chosen = [(name, captions) for name, (split, captions) in IMAGES.items() if split in splits]
    images = [
        {"id": 7 + number, "file_name": name, "width": 80, "height": 60} for number, (name, _) in enumerate(chosen)
    ]
    annotations = [
        {"id": 100 * number + k, "image_id": 7 + number, "caption": caption}
        for number, (_, captions) in enumerate(chosen)
        for k, caption in enumerate(captions)
    ]
    return {"info": {}, "licenses": [], "images": images, "annotations": annotations}


def write_coco(folder: Path) -> None:
    (folder / "annotations").mkdir(parents=True)
    for split in SPLITS:
        name = f"{SHORT[split]}2017"
        (folder / "annotations" / f"captions_{name}.json").write_text(json.dumps(coco((split,))), encoding="utf-8")
        put_images(folder / name, [image for image, (of, _) in IMAGES.items() if of == split])
    (folder / "annotations" / "instances_train2017.json").write_text("not even JSON")


def write_coco_single(folder: Path) -> None:
    put_images(folder / "images")
    (folder / "annotations.json").write_text(json.dumps(coco()), encoding="utf-8")


def write_list(folder: Path) -> None:
    put_images(folder)
    records = [{"file_path": name, "captions": captions, "split": split} for name, (split, captions) in IMAGES.items()]
    (folder / "captions.json").write_text(json.dumps(records), encoding="utf-8")


def write_metadata_jsonl(folder: Path) -> None:
    put_images(folder)
    lines = [json.dumps({"file_name": name, "text": c}) for name, captions in REFERENCES.items() for c in captions]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_metadata_by_split(folder: Path) -> None:
    for split in SPLITS:
        chosen = {name: captions for name, (of, captions) in IMAGES.items() if of == split}
        put_images(folder / split, chosen)
        with (folder / split / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["file_name", "captions"])
            writer.writerows([name, json.dumps(captions)] for name, captions in chosen.items())


def write_sidecars(folder: Path) -> None:
    put_images(folder)
    for name, captions in REFERENCES.items():
        (folder / name).with_suffix(".txt").write_text("\n".join(captions) + "\n", encoding="utf-8")


def write_sidecars_by_split(folder: Path) -> None:
    for name, (split, captions) in IMAGES.items():
        path = put_images(folder / SHORT[split] / "deep", [name]) / name
        path.with_suffix(".json").write_text(json.dumps({"caption": captions}), encoding="utf-8")


def write_webdataset(folder: Path) -> None:
    for split in SPLITS:
        members = {}
        for number, (name, (of, captions)) in enumerate(IMAGES.items()):
            if of == split:
                members[name] = jpeg(number)
                members[f"{name.partition('.')[0]}.txt"] = "\n".join(captions).encode()
        write_tar(folder / f"some-{SHORT[split]}-000.tar", members)


def write_hugging_face_parquet(folder: Path) -> None:
    """Write what `Dataset.push_to_hub` writes: structs of bytes and path, and files for each split."""
    for split in SPLITS:
        chosen = {name: (n, captions) for n, (name, (of, captions)) in enumerate(IMAGES.items()) if of == split}
        images = [{"bytes": jpeg(number), "path": name} for name, (number, _) in chosen.items()]
        columns = {"image": images, "caption": [captions for _, captions in chosen.values()]}
        (folder / "data").mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), folder / "data" / f"{split}-00000-of-00001.parquet", row_group_size=1)
    (folder / "README.md").write_text("a card")


def write_parquet_of_bytes(folder: Path) -> None:
    """Write one row per caption."""
    rows = [
        {"image_id": name, "split": SHORT[split], "jpg": jpeg(number), "TEXT": caption}
        for number, (name, (split, captions)) in enumerate(IMAGES.items())
        for caption in captions
    ]
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "all.parquet", row_group_size=2)


def write_metadata_parquet(folder: Path) -> None:
    put_images(folder)
    pq.write_table(pa.table({"file_name": [*REFERENCES], "text": [*REFERENCES.values()]}), folder / "metadata.parquet")


# Name of the format, and whether it has splits. Ids can have a folder before the name, or lack the extension.
FORMATS: Final[dict[Callable[[Path], None], tuple[str, bool]]] = {
    write_flickr30k_token: ("Flickr30k as distributed", False),
    write_flickr30k_csv: ("Flickr30k as distributed", False),
    write_csv: ("CSV", True),
    write_karpathy: ("Karpathy's JSON", True),
    write_karpathy_coco: ("Karpathy's JSON", True),
    write_coco: ("COCO captions", True),
    write_coco_single: ("COCO captions", False),
    write_list: ("a JSON list of captions", True),
    write_metadata_jsonl: ("Hugging Face's imagefolder", False),
    write_metadata_by_split: ("Hugging Face's imagefolder", True),
    write_sidecars: ("a folder of images with their captions next to them", False),
    write_sidecars_by_split: ("a folder of images with their captions next to them", True),
    write_webdataset: ("WebDataset, 3 tars", True),
    write_hugging_face_parquet: ("Parquet with images", True),
    write_parquet_of_bytes: ("Parquet with images", True),
    write_metadata_parquet: ("Parquet", False),
}
every_format = pytest.mark.parametrize("write", FORMATS, ids=lambda write: write.__name__)


def images_of(dataset: CaptionedImages) -> list[bytes | ImageError]:
    """Read the images, in the order of their ids."""
    rows = dataset.manifest(dataset.table)
    images = read_rows(rows.to_pylist(), root_of(rows), image_columns=image_columns_of(rows))
    by_id = {row["image_id"]: data for row, data in images}
    return [by_id[image_id] for image_id in sorted(by_id)]


def stem(image_id: str) -> str:
    return image_id.rpartition("/")[2].partition(".")[0]


@every_format
def test_every_format_gives_the_same_table(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path / "data")
    name, has_splits = FORMATS[write]

    dataset = load_dataset(str(tmp_path / "data"))

    assert dataset.format == name
    assert dataset.table.schema == DATASET_SCHEMA
    assert {stem(key): by_id for key, by_id in dataset.references().items()} == {
        stem(key): by_id for key, by_id in REFERENCES.items()
    }
    for row in dataset.table.to_pylist():
        if has_splits:
            assert row["split"] == next(s for key, (s, _) in IMAGES.items() if stem(key) == stem(row["image_id"]))
    assert all(isinstance(data, bytes) and data.startswith(b"\xff\xd8") for data in images_of(dataset))
    no_splits = "no official splits: each image's split is a hash of its name"
    assert dataset.notes == [] if has_splits else dataset.notes == [no_splits]


@every_format
def test_no_format_can_name_files_outside_the_data(tmp_path: Path, write: Callable[[Path], None]) -> None:
    """Use the same files, with each mention of one image replaced by a path to a file above the data."""
    data = tmp_path / "data"
    write(data)
    put_images(tmp_path, ["dog.jpg"])
    changed = 0
    for path in [path for path in data.rglob("*") if path.suffix in (".json", ".jsonl", ".csv", ".token")]:
        text = path.read_text(encoding="utf-8")
        changed += "dog.jpg" in text
        path.write_text(text.replace("dog.jpg", "../../../dog.jpg"), encoding="utf-8")
    if write is write_webdataset:
        write_tar(data / "some-train-000.tar", {"../../dog.jpg": jpeg(), "../../dog.txt": b"x"})
        changed = 1
    if not changed:
        return  # sidecars name nothing

    with pytest.raises(DatasetError, match="dog.*leads out of .*--allow-outside-paths"):
        load_dataset(str(data))
    assert load_dataset(str(data), allow_outside_paths=True).table.num_rows > 0


# ---- encodings

ENCODINGS: Final = {
    "utf-8-sig": "1 file is UTF-8 with BOM: ",
    "utf-16": "1 file is UTF-16: ",
    "utf-16-le": "1 file is UTF-16",
}


@pytest.mark.parametrize("encoding", [*ENCODINGS, "cp1252"])
@pytest.mark.parametrize(
    "write",
    [write_flickr30k_token, write_flickr30k_csv, write_csv, write_karpathy, write_coco_single, write_metadata_jsonl],
)
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_no_encoding_or_line_end_changes_a_caption(
    tmp_path: Path, write: Callable[[Path], None], encoding: str, line_end: str
) -> None:
    write(tmp_path)
    expected = load_dataset(str(tmp_path)).references()
    (path,) = [path for path in tmp_path.iterdir() if path.is_file() and path.suffix not in (".jpg", ".png")]
    text = path.read_bytes().decode("utf-8")
    text = json.dumps(json.loads(text), ensure_ascii=False) if path.suffix == ".json" else text
    text = text.replace("\r\n", "\n").replace("\n", line_end)
    path.write_bytes(text.encode(encoding))

    dataset = load_dataset(str(tmp_path))

    assert dataset.references() == expected
    if encoding == "cp1252":
        is_escaped = not any(letter > "\x7f" for letter in text)
        assert is_escaped or any("read as Windows-1252 (latin-1)" in note for note in dataset.notes)
    else:
        assert any(note.startswith(ENCODINGS[encoding]) for note in dataset.notes)


def test_a_line_in_another_encoding_affects_no_other_line(tmp_path: Path) -> None:
    (tmp_path / "captions.csv").write_bytes("image,caption\na.jpg,né\n".encode() + "b.jpg,né\n".encode("latin-1"))

    dataset = load_dataset(str(tmp_path))

    assert dataset.references() == {"a.jpg": ["né"], "b.jpg": ["né"]}
    assert "1 line is not UTF-8 and is read as Windows-1252 (latin-1): captions.csv line 3" in dataset.notes


# ---- problems in each format


def test_the_known_malformed_line_of_flickr30k_is_counted(tmp_path: Path) -> None:
    write_flickr30k_csv(tmp_path)
    with (tmp_path / "results.csv").open("a", encoding="utf-8") as file:
        file.write("\ndog.jpg| 4   A dog runs across the grass .\n")

    dataset = load_dataset(str(tmp_path))

    assert "1 line is not `image_name|comment_number|comment`: line 9" in dataset.notes
    assert len(dataset.references()["dog.jpg"]) == 2


def test_restval_of_karpathy_is_training_data_and_malformed_entries_are_counted(tmp_path: Path) -> None:
    document = karpathy()
    document["images"][0]["split"] = "restval"
    document["images"] += [{"filename": "x.jpg", "split": "train", "sentences": []}, "no object", {"sentences": [{}]}]
    (tmp_path / "dataset.json").write_text(json.dumps(document))

    dataset = load_dataset(str(tmp_path))

    assert dataset.count_splits() == {"train": 2, "validation": 1, "test": 1}
    assert "3 images have no name or no caption: dataset.json images[4], " in "".join(dataset.notes)


def test_coco_without_file_names_can_be_used_as_references(tmp_path: Path) -> None:
    document = coco()
    for image in document["images"]:
        del image["file_name"]
    document["annotations"] += [{"image_id": 99, "caption": "x"}, {"image_id": 7}, None]
    (tmp_path / "references.json").write_text(json.dumps(document))

    dataset = load_dataset(str(tmp_path / "references.json"))

    assert set(dataset.references()) == {"7", "8", "9", "10"}
    assert dataset.table["image_path"].to_pylist() == [""] * 4
    assert dataset.notes[0].startswith("3 annotations have no caption or no known image: references.json annotations")


def test_captions_written_by_pycocotools_are_read(tmp_path: Path) -> None:
    coco_class = pytest.importorskip("pycocotools.coco").COCO
    put_images(tmp_path / "images")
    (tmp_path / "a.json").write_text(json.dumps(coco()))
    loaded = coco_class(str(tmp_path / "a.json")).loadRes(
        [{"image_id": 7, "caption": "a dog"}, {"image_id": 8, "caption": "b"}]
    )
    (tmp_path / "a.json").write_text(json.dumps(loaded.dataset))

    dataset = load_dataset(str(tmp_path))

    assert dataset.references() == {"dog.jpg": ["a dog"], "cat.jpg": ["b"]}
    assert dataset.notes == ["no official splits: each image's split is a hash of its name"]


def test_images_of_coco_without_annotations_are_counted(tmp_path: Path) -> None:
    document = coco()
    document["annotations"] = [one for one in document["annotations"] if one["image_id"] < 9]
    (tmp_path / "captions.json").write_text(json.dumps(document))

    assert "2 images have no caption: café.jpg, ball.png" in load_dataset(str(tmp_path)).notes


def test_a_single_coco_file_finds_its_images_next_to_the_annotations(tmp_path: Path) -> None:
    write_coco(tmp_path)

    dataset = load_dataset(str(tmp_path / "annotations" / "captions_val2017.json"))

    assert dataset.describe_splits() == "1 validation"
    assert dataset.table["image_path"].to_pylist() == [f"{tmp_path}/val2017/café.jpg"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["dataset_a.json", "dataset_b.json"], "several sets of captions, dataset_a.json, dataset_b.json: "),
        (["captions_train2014.json", "captions_val2017.json"], "several sets of captions"),
    ],
)
def test_one_of_several_caption_sets_must_be_named(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        (tmp_path / name).write_text(json.dumps(karpathy() if name.startswith("dataset") else coco()))

    with pytest.raises(DatasetError, match=message):
        load_dataset(str(tmp_path))
    assert load_dataset(str(tmp_path / names[0])).table.num_rows == 4


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("captions.json", "{", "captions.json is not valid JSON: "),
        ("captions.json", "[" * 100_000, "captions.json is not valid JSON: "),
        ("instances.json", '{"images": [], "annotations": [{"bbox": []}]}', "holds no captions: expected Karpathy's"),
        (
            "metadata.jsonl",
            '{"file_name": "a.jpg", "label": 1}\n',
            "metadata.jsonl has no captions: .*got file_name, label",
        ),
        (
            "notes.txt",
            "Dear all,\nthis is no data set, I fear.\n",
            "notes.txt is not a table of captions: expected .* is 'Dear all,'",
        ),
        ("broken.tar", "no tar", "without a single caption; 1 tar is damaged or ends early: broken.tar"),
        ("photo.xyz", "x", "holds no captioned images: expected one of: Flickr8k"),
    ],
)
def test_a_file_without_captions_is_refused_in_one_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)

    with pytest.raises(DatasetError, match=message) as caught:
        load_dataset(str(tmp_path / name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["parquet", "sidecars", "webdataset"])
def test_hive_partitions_name_the_splits(tmp_path: Path, kind: str) -> None:
    for number, split in enumerate(("train", "val", "Test")):
        folder = tmp_path / f"split={split}" / "year=2024"
        folder.mkdir(parents=True)
        if kind == "parquet":
            table = {"Image": [jpeg(number)], "ID": [split], "Caption": ["a dog"]}
            pq.write_table(pa.table(table), folder / "part-0.parquet")
        elif kind == "sidecars":
            (folder / f"{split}.jpg").write_bytes(jpeg(number))
            (folder / f"{split}.txt").write_text("a dog")
        else:
            written_tar(folder / "0.tar", f"{split}.jpg", f"{split}.txt")

    dataset = load_dataset(str(tmp_path))

    assert dataset.describe_splits() == "1 train, 1 validation, 1 test"
    if kind == "parquet":
        assert sorted(dataset.references()) == ["Test", "train", "val"]


def test_the_caption_column_is_found_in_any_case(tmp_path: Path) -> None:
    pq.write_table(pa.table({"Image": [jpeg(1)], "ID": ["a"], "My_Words": ["a dog"]}), tmp_path / "t.parquet")

    dataset = load_dataset(str(tmp_path), columns=ColumnOptions(caption="my_words"))

    assert dataset.references() == {"a": ["a dog"]}


def test_names_in_split_folders_do_not_clash(tmp_path: Path) -> None:
    for split in ("train", "test"):
        put_images(tmp_path / split, ["1.jpg"])
        (tmp_path / split / "metadata.jsonl").write_text(f'{{"file_name": "1.jpg", "text": "{split}"}}\nno JSON\n\n')

    dataset = load_dataset(str(tmp_path))

    assert dataset.references() == {"train/1.jpg": ["train"], "test/1.jpg": ["test"]}
    assert "2 lines are not JSON objects: train/metadata.jsonl line 2, test/metadata.jsonl line 2" in dataset.notes


def test_images_without_captions_and_captions_without_images_are_counted(tmp_path: Path) -> None:
    write_sidecars(tmp_path)
    put_images(tmp_path, ["alone.jpg", "dog.png", "blank.jpg"])
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "README.txt").write_text("what this is")

    dataset = load_dataset(str(tmp_path))

    assert dataset.references()["dog.png"] == dataset.references()["dog.jpg"]
    assert "1 caption file belongs to several images: dog" in dataset.notes
    assert "2 images have no caption: blank.jpg, alone.jpg" in dataset.notes
    assert "1 file has no image next to it: README.txt" in dataset.notes


@pytest.mark.parametrize("caption_file", ["a.txt", "a.txt in a tar", "captions.csv"])
def test_a_camera_raw_file_next_to_its_jpeg_is_not_a_second_image(tmp_path: Path, caption_file: str) -> None:
    name, _, is_packed = caption_file.partition(" ")
    text = b"A dog ." if name == "a.txt" else b"image,caption\na,A dog ."
    members = {"a.jpg": jpeg(1), "a.nef": b"raw " * 20, name: text}
    if is_packed:
        write_tar(tmp_path / "a.tar", members)
    else:
        for name, content in members.items():
            (tmp_path / name).write_bytes(content)

    dataset = load_dataset(str(tmp_path))
    assert list(dataset.references()) == (["a"] if is_packed else ["a.jpg"])
    assert not any("several" in note for note in dataset.notes)


def test_images_with_unknown_names_are_read_with_their_captions(tmp_path: Path) -> None:
    for name in ("IMG_0001", "b.jpg_large", "v1.2/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(jpeg(1))
    for name in ("IMG_0001", "b", "v1.2/c"):
        (tmp_path / f"{name}.txt").write_text("A dog .")

    assert sorted(load_dataset(str(tmp_path)).references()) == ["IMG_0001", "b.jpg_large", "v1.2/c"]


@pytest.mark.parametrize("is_packed", [False, True])
def test_thumbnails_in_hidden_folders_are_not_images_of_a_data_set(tmp_path: Path, is_packed: bool) -> None:
    members = {
        f"{folder}a.{extension}": data
        for folder in ("", "@eaDir/", ".cache/")
        for extension, data in {"jpg": jpeg(1), "txt": b"A dog ."}.items()
    }
    if is_packed:
        write_tar(tmp_path / "a.tar", members)
    else:
        for name, content in members.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(content)

    assert len(load_dataset(str(tmp_path)).references()) == 1


def test_an_image_whose_name_starts_with_an_underscore_is_an_image_in_every_command(tmp_path: Path) -> None:
    write_sidecars(tmp_path / "data")
    put_images(tmp_path / "data", ["_MG_1.jpg", "_MG_2.jpg"])
    (tmp_path / "data" / "_MG_1.txt").write_text("A dog .")
    build_manifest(str(tmp_path / "data"), str(tmp_path / "manifest"))

    dataset = load_dataset(str(tmp_path / "data"))

    captioned = pq.read_table(tmp_path / "manifest")["image_id"].to_pylist()
    assert sorted([*dataset.references(), *dataset.without_captions]) == sorted(captioned)
    assert dataset.references()["_MG_1.jpg"] == ["A dog ."]


# ---- tars


def test_a_key_in_two_tars_is_two_images(tmp_path: Path) -> None:
    for number in range(2):
        members = {"0.jpg": jpeg(number), "0.json": json.dumps({"caption": f"number {number}"}).encode()}
        write_tar(tmp_path / f"{number}.tar", members)

    dataset = load_dataset(str(tmp_path))

    assert dataset.references() == {"0": ["number 0"], "1/0": ["number 1"]}
    assert images_of(dataset) == [jpeg(0), jpeg(1)]


def test_a_truncated_tar_keeps_the_members_before_the_end(tmp_path: Path) -> None:
    members = {"a.jpg": jpeg(1), "a.txt": b"x", "b.txt": b"y", "b.jpg": jpeg(2), "c.jpg": jpeg(3)}
    path = write_tar(tmp_path / "a.tar", members)
    path.write_bytes(path.read_bytes()[: len(jpeg(1)) + 2600])

    dataset = load_dataset(str(path))

    assert dataset.references() == {"a": ["x"]}
    assert any(note.startswith("1 tar is damaged or ends early: a.tar") for note in dataset.notes)


def written_tar(path: Path, *names: str) -> CaptionedImages:
    """Load a tar of these members: images of different bytes, and texts that are "text N"."""
    members = [
        (name, f"text {number}".encode() if name.endswith((".txt", ".json")) else jpeg(number))
        for number, name in enumerate(names)
    ]
    return load_dataset(str(write_tar(path, members)))


def captions_by_image(dataset: CaptionedImages) -> dict[int, list[str]]:
    """Map the number of each captioned image, recognised by its bytes, to its captions."""
    rows = dataset.manifest(dataset.table)
    numbers = {jpeg(number): number for number in range(12)}
    references = dataset.references()
    return {
        numbers[data]: references[row["image_id"]]
        for row, data in read_rows(rows.to_pylist(), root_of(rows))
        if isinstance(data, bytes)
    }


def test_names_with_several_dots_are_paired_by_the_full_name(tmp_path: Path) -> None:
    names = [f"2023.05.{day:02}.{kind}" for day in range(5) for kind in ("jpg", "txt")]

    dataset = written_tar(tmp_path / "a.tar", *names)

    assert captions_by_image(dataset) == {number: [f"text {number + 1}"] for number in range(0, 10, 2)}
    assert dataset.notes == ["no official splits: each image's split is a hash of its name"]


def test_no_image_gets_the_text_of_another_whose_image_is_missing(tmp_path: Path) -> None:
    dataset = written_tar(
        tmp_path / "a.tar", "2023.1.jpg", "2023.2.txt", "2023.3.jpg", "2023.3.txt", "2024.1.jpg", "2024.2.txt"
    )

    assert captions_by_image(dataset) == {2: ["text 3"]}
    assert "2 images have no caption: a.tar, 2023.1.jpg, a.tar, 2024.1.jpg" in dataset.notes
    assert "2 caption files have no image: a.tar, 2023.2.txt, a.tar, 2024.2.txt" in dataset.notes


def test_images_of_one_key_share_its_text_and_keep_their_own(tmp_path: Path) -> None:
    names = ["k.left.jpg", "k.right.jpg", "k.txt", "m.left.jpg", "m.right.jpg", "m.right.txt", "n.img.jpg", "n.cap.txt"]

    dataset = written_tar(tmp_path / "a.tar", *names)

    # The tar's names are equal up to a later dot, so that n.img.jpg and n.cap.txt are not a pair.
    assert captions_by_image(dataset) == {0: ["text 2"], 1: ["text 2"], 4: ["text 5"]}
    assert "1 caption file belongs to several images: a.tar, k.txt" in dataset.notes
    assert "2 images have no caption: a.tar, m.left.jpg, a.tar, n.img.jpg" in dataset.notes


def test_the_parts_of_a_webdataset_sample_can_have_extended_names(tmp_path: Path) -> None:
    dataset = written_tar(
        tmp_path / "a.tar", "0.img.jpg", "0.cap.txt", "1.jpg", "1.caption.txt", "2.jpg", "2.png", "2.txt"
    )

    assert captions_by_image(dataset) == {0: ["text 1"], 2: ["text 3"], 4: ["text 6"], 5: ["text 6"]}


def test_repeated_members_of_a_tar_keep_their_own_texts(tmp_path: Path) -> None:
    dataset = written_tar(tmp_path / "a.tar", "a.jpg", "a.txt", "a.jpg", "a.txt", "b.jpg", "b.jpg", "b.txt", "b.txt")

    assert captions_by_image(dataset) == {0: ["text 1"], 2: ["text 3"], 4: ["text 6"], 5: ["text 7"]}
    assert dataset.notes[0].startswith("4 names are in a tar more than once: a.tar, a.jpg (2 times), ")


@pytest.mark.parametrize(
    ("names", "note"),
    [
        (["a.jpg", "a.txt", "a.jpg"], "1 caption file matches several images: a.tar, a.txt"),
        (["a.jpg", "a.txt", "a.txt"], "2 caption files match several images: a.tar, a.txt, a.tar, a.txt"),
    ],
)
def test_ambiguous_captions_of_repeated_members_are_reported_and_skipped(
    tmp_path: Path, names: list[str], note: str
) -> None:
    dataset = written_tar(tmp_path / "a.tar", *names, "b.jpg", "b.txt")

    assert captions_by_image(dataset) == {3: ["text 4"]}
    assert note in dataset.notes
    assert any("no caption: a.tar, a.jpg" in note for note in dataset.notes)


NAMES: Final = st.lists(
    st.sampled_from(["k", "k.a", "k.b", "k.a.b", "2023.05.00", "2023.05.01", "./k", "d/k", "d.e/k", ".k"]).flatmap(
        lambda stem: st.sampled_from([f"{stem}.jpg", f"{stem}.png", f"{stem}.txt", f"{stem}.json", f"{stem}.bak"])
    ),
    max_size=10,
)


@settings(max_examples=100, deadline=None)
@given(names=NAMES)
def test_every_captioned_image_of_a_tar_is_in_its_data_set(
    tmp_path_factory: pytest.TempPathFactory, names: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("tar")
    try:
        dataset = written_tar(folder / "a.tar", *names)
    except DatasetError:  # without a single caption
        return
    build_manifest(str(folder / "a.tar"), str(folder / "manifest"))

    captioned = pq.read_table(folder / "manifest")["image_id"].to_pylist()

    assert sorted([*dataset.references(), *dataset.without_captions]) == sorted(captioned)
    by_image = captions_by_image(dataset)
    for number, captions in by_image.items():
        # No image has the text of another one's name.
        texts = [int(caption.removeprefix("text ")) for caption in captions]
        stems = {name.rpartition(".")[0].removeprefix("./") for name in names if name.endswith((".jpg", ".png"))}
        own = names[number].rpartition(".")[0].removeprefix("./")
        assert all(names[text].rpartition(".")[0].removeprefix("./") not in stems - {own} for text in texts)


# ---- two images with the same name


def test_captions_of_another_image_with_the_same_name_are_skipped_and_named(tmp_path: Path) -> None:
    document = karpathy()
    second = {**document["images"][0], "filepath": "second", "sentences": [{"raw": "another photograph"}]}
    document["images"][0]["filepath"] = "first"
    document["images"].append(second)
    for folder in ("first", "second"):
        put_images(tmp_path / folder, ["dog.jpg"])
    (tmp_path / "dataset_coco.json").write_text(json.dumps(document), encoding="utf-8")

    dataset = load_dataset(str(tmp_path))

    assert dataset.references()["dog.jpg"] == REFERENCES["dog.jpg"]
    assert (
        "1 name is also that of another image, whose captions are left out: dog.jpg (dataset_coco.json images[4])"
        in (dataset.notes)
    )


# ---- Parquet with images


def test_images_in_tables_have_the_same_ids_as_in_a_captioning_run(tmp_path: Path) -> None:
    for write in (write_hugging_face_parquet, write_webdataset, write_parquet_of_bytes):
        data = tmp_path / write.__name__
        write(data)
        if write is write_parquet_of_bytes:  # whose rows are captions; a run wants a row for each image
            pq.write_table(pq.read_table(data / "all.parquet").take([0, 2, 3, 5]), data / "all.parquet")
        build_manifest(str(data), str(tmp_path / "manifest" / write.__name__))

        captioned = pq.read_table(tmp_path / "manifest" / write.__name__)["image_id"].to_pylist()

        assert sorted(load_dataset(str(data)).references()) == sorted(captioned)


def test_identical_names_next_to_bytes_are_not_used_as_ids(tmp_path: Path) -> None:
    images = [{"bytes": jpeg(number), "path": "image.jpg"} for number in range(2)]
    pq.write_table(pa.table({"image": images, "text": ["x", "y"]}), tmp_path / "a.parquet")

    dataset = load_dataset(str(tmp_path))

    assert dataset.references() == {"a.parquet#0": ["x"], "a.parquet#1": ["y"]}
    assert images_of(dataset) == [jpeg(0), jpeg(1)]


def test_tables_that_describe_tars_are_not_taken_for_the_data(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", {"a.jpg": jpeg(0), "a.txt": b"x"})
    pq.write_table(
        pa.table({"url": ["https://host/a.jpg"], "caption": ["x"], "key": ["a"]}), tmp_path / "00000.parquet"
    )

    dataset = load_dataset(str(tmp_path))

    assert (dataset.format, dataset.references()) == ("WebDataset, 1 tar", {"a": ["x"]})


def test_the_columns_of_a_data_set_are_those_that_a_captioning_run_reads(tmp_path: Path) -> None:
    put_images(tmp_path)
    columns = {
        "thumbnail": [jpeg(number, width=12, height=12) for number in range(4)],
        "phash": [bytes(8)] * 4,
        "image_path": [*IMAGES],
        "text": ["x"] * 4,
        "id": list("abcd"),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")

    dataset = load_dataset(str(tmp_path / "a.parquet"))

    assert (
        dataset.columns_note == "images from column image_path (paths), captions from column text, ids from column id"
    )
    assert images_of(dataset) == [jpeg(number) for number in range(4)]


def test_the_columns_of_a_data_set_can_be_named(tmp_path: Path) -> None:
    columns = {
        "left": [jpeg(0), jpeg(1)],
        "right": [jpeg(2), jpeg(3)],
        "caption": ["no", "no"],
        "title": [["x", "y"], ["z"]],
        "id": ["a", "b"],
        "sku": ["k", "m"],
        "number": [1, 2],
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")

    with pytest.raises(DatasetError, match=r"left \(bytes\) and right \(bytes\): give --image-column"):
        load_dataset(str(tmp_path))
    dataset = load_dataset(str(tmp_path), columns=ColumnOptions(image="right", caption="title", id="sku"))

    assert dataset.references() == {"k": ["x", "y"], "m": ["z"]}
    assert images_of(dataset) == [jpeg(2), jpeg(3)]
    assert dataset.columns_note == "images from column right (bytes), captions from column title, ids from column sku"
    for options, message in (
        (ColumnOptions(image="right", caption="words"), "--caption-column words: .*no such column"),
        (ColumnOptions(image="right", caption="number"), "--caption-column number: expected text .*got int64"),
    ):
        with pytest.raises(DatasetError, match=message):
            load_dataset(str(tmp_path), columns=options)


def test_column_options_require_tables(tmp_path: Path) -> None:
    write_sidecars(tmp_path)

    with pytest.raises(
        DatasetError, match=r"--caption-column title applies only to tables \(.*\), and .* is a folder of images"
    ):
        load_dataset(str(tmp_path), columns=ColumnOptions(caption="title"))


# ---- several formats in one folder


def hugging_face_folder(folder: Path) -> None:
    write_hugging_face_parquet(folder)
    put_images(folder / "assets", ["example.png"])


def tars_with_a_preview(folder: Path) -> None:
    write_webdataset(folder)
    put_images(folder, ["preview.jpg"])


def tars_in_other_folders(folder: Path) -> None:
    write_webdataset(folder / "shards")


def tables_in_other_folders(folder: Path) -> None:
    write_hugging_face_parquet(folder / "deep")


def tables_in_usual_and_other_folders(folder: Path) -> None:
    write_hugging_face_parquet(folder)
    images = {"bytes": jpeg(7), "path": "more.jpg"}
    (folder / "more").mkdir()
    pq.write_table(pa.table({"image": [images], "caption": ["x"], "split": ["train"]}), folder / "more" / "m.parquet")


def sidecars_of_which_some_are_missing(folder: Path) -> None:
    write_sidecars(folder)
    (folder / "dog.txt").unlink()


@pytest.mark.parametrize(
    "write",
    [
        hugging_face_folder,
        tars_with_a_preview,
        tars_in_other_folders,
        tables_in_other_folders,
        tables_in_usual_and_other_folders,
        sidecars_of_which_some_are_missing,
        write_metadata_parquet,
    ],
)
def test_captioning_and_data_set_loading_find_the_same_images(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path / "data")
    build_manifest(str(tmp_path / "data"), str(tmp_path / "manifest"))

    dataset = load_dataset(str(tmp_path / "data"))

    captioned = pq.read_table(tmp_path / "manifest")["image_id"].to_pylist()
    assert sorted([*dataset.references(), *dataset.without_captions]) == sorted(captioned)
    pq.write_table(pa.table({"image_id": captioned, "caption": ["a dog"] * len(captioned)}), tmp_path / "c.parquet")
    report = evaluate_captions(str(tmp_path / "c.parquet"), dataset, split="all")
    assert report.protocol.num_images == len(dataset.references())


@pytest.mark.parametrize(
    ("write", "note"),
    [
        (hugging_face_folder, "1 image file is next to the tables and without a caption: assets/example.png"),
        (tars_with_a_preview, "1 image file is next to the tars and without a caption: preview.jpg"),
    ],
)
def test_a_picture_next_to_tars_and_tables_is_named(tmp_path: Path, write: Callable[[Path], None], note: str) -> None:
    write(tmp_path)

    assert note in load_dataset(str(tmp_path)).notes


@pytest.mark.parametrize("write", [write_webdataset, write_hugging_face_parquet])
@pytest.mark.parametrize("place", ["", "deep"])
def test_captioned_images_of_two_formats_are_refused_by_name(
    tmp_path: Path, write: Callable[[Path], None], place: str
) -> None:
    write_sidecars(tmp_path)
    write(tmp_path / place)

    with pytest.raises(
        DatasetError, match="captioned images of two kinds: 4 with a caption file next to them .*ball.png"
    ):
        load_dataset(str(tmp_path))


def test_an_unrelated_table_next_to_captioned_images_is_ignored(tmp_path: Path) -> None:
    write_sidecars(tmp_path)
    before = load_dataset(str(tmp_path)).references()
    (tmp_path / "logs").mkdir()
    pq.write_table(pa.table({"path": ["train.py", "", "1"], "line": [1, 2, 3]}), tmp_path / "logs" / "log.parquet")

    assert load_dataset(str(tmp_path)).references() == before


def test_images_in_tars_and_in_tables_are_refused_in_every_command(tmp_path: Path) -> None:
    write_webdataset(tmp_path / "data")
    write_hugging_face_parquet(tmp_path / "data")

    with pytest.raises(DatasetError, match="3 tars .*and in 3 Parquet tables"):
        load_dataset(str(tmp_path / "data"))
    with pytest.raises(InputError, match="3 tars .*and in 3 Parquet tables"):
        build_manifest(str(tmp_path / "data"), str(tmp_path / "manifest"))


# ---- text tables


def write_table(
    path: Path, image: str, caption: str, *others: str, separator: str = ",", extensions: bool = True
) -> None:
    """Write one line per caption; the other columns hold numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=separator)
        writer.writerow([*others, image, caption])
        for name, captions in REFERENCES.items():
            shown = name if extensions else stem(name)
            writer.writerows([*"123456"[: len(others)], shown, text] for text in captions)


@pytest.mark.parametrize(
    ("image", "caption", "others"),
    [
        ("filename", "description", []),
        ("img", "label", []),
        ("Image Path", "Caption Text", []),
        ("filename", "title", ["id"]),
        ("FileName", "TITLE", ["", "ID"]),
        ("image_id", "Sentence", ["number"]),
        ("photo", "caption", ["title", "id"]),
    ],
)
@pytest.mark.parametrize(("separator", "ending"), [(",", "csv"), (";", "csv"), ("\t", "TSV")])
@pytest.mark.parametrize("extensions", [True, False])
def test_a_csv_or_tsv_with_any_name_and_common_column_names_is_a_data_set(
    tmp_path: Path, image: str, caption: str, others: list[str], separator: str, ending: str, extensions: bool
) -> None:
    put_images(tmp_path / "images")
    path = tmp_path / f"my table.{ending}"
    write_table(path, image, caption, *others, separator=separator, extensions=extensions)

    for location in (tmp_path, path):
        dataset = load_dataset(str(location))

        assert dataset.references() == REFERENCES
        assert images_of(dataset) == [jpeg(number) for number in (3, 2, 1, 0)]
        assert dataset.notes == ["no official splits: each image's split is a hash of its name"]
        assert dataset.columns_note == f"images from column {image}, captions from column {caption}"


def test_usual_column_names_come_before_less_certain_ones(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("title,label,img,image,caption\nno,no,no.jpg,a.jpg,yes\n")

    assert load_dataset(str(tmp_path)).references() == {"a.jpg": ["yes"]}


def test_the_columns_of_a_text_table_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("image,caption,Second Image,legend\na.jpg,no,b.jpg,yes\n")

    for location in (tmp_path, tmp_path / "a.csv"):
        dataset = load_dataset(str(location), columns=ColumnOptions(image="Second Image", caption="legend"))

        assert dataset.references() == {"b.jpg": ["yes"]}
        assert load_dataset(str(location), columns=ColumnOptions(caption="legend")).references() == {"a.jpg": ["yes"]}
        for options, message in (
            (
                ColumnOptions(caption="words"),
                r"a column of images \(file_name.* one of captions \(--caption-column words",
            ),
            (ColumnOptions(id="legend"), "--id-column legend applies only to Parquet tables, and .* a text file"),
        ):
            with pytest.raises(DatasetError, match=message):
                load_dataset(str(location), columns=options)


def test_metadata_csv_can_have_the_column_names_of_any_csv(tmp_path: Path) -> None:
    put_images(tmp_path)
    write_table(tmp_path / "metadata.csv", "File Name", "description", "legend")

    assert load_dataset(str(tmp_path)).references() == REFERENCES
    assert load_dataset(str(tmp_path), columns=ColumnOptions(caption="legend")).references()["cat.jpg"] == ["1"]


@pytest.mark.parametrize("name", ["table.csv", "captions.txt"])
def test_a_text_table_without_known_columns_is_refused_with_the_names_that_are_known(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("key,legend\n1,a dog\n")

    with pytest.raises(
        DatasetError, match="img.*--image-column.*caption_text.*--caption-column.*'key,legend'"
    ) as error:
        load_dataset(str(tmp_path))
    assert str(error.value).startswith(f"{tmp_path}/{name} is not a table of captions")


def test_one_of_several_text_tables_of_captions_must_be_named(tmp_path: Path) -> None:
    put_images(tmp_path)
    write_table(tmp_path / "a.csv", "filename", "title")
    (tmp_path / "log.csv").write_text("epoch,loss\n1,2\n")
    (tmp_path / "._a.csv").write_bytes(b"\0\5\7")

    assert load_dataset(str(tmp_path)).references() == REFERENCES
    write_table(tmp_path / "b.tsv", "img", "label", separator="\t")
    with pytest.raises(DatasetError, match=r"several tables of captions, a\.csv, b\.tsv: give one of these files"):
        load_dataset(str(tmp_path))


@pytest.mark.parametrize("write", [write_sidecars, tars_in_other_folders, tables_in_other_folders])
def test_a_text_table_next_to_captioned_images_changes_nothing(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path)
    before = load_dataset(str(tmp_path)).references()

    (tmp_path / "classes.csv").write_text("filename,label\ndog.jpg,animal\n")

    assert load_dataset(str(tmp_path)).references() == before


def test_a_name_without_extension_that_matches_several_images_is_counted(tmp_path: Path) -> None:
    put_images(tmp_path, ["a.jpg", "a.png", "b.jpg"])
    (tmp_path / "a.csv").write_text("id,caption\na,x\nb,y\n")

    dataset = load_dataset(str(tmp_path))

    assert dataset.references() == {"a": ["x"], "b.jpg": ["y"]}
    assert "1 name matches several image files: a" in dataset.notes


# ---- files of any content

JSON: Final = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["a.jpg", "train"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["images", "annotations", "sentences", "caption", "raw", "filename", "image_id", "id", "split"]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


def loads_or_is_refused(path: Path) -> CaptionedImages | None:
    try:
        return load_dataset(str(path))
    except InputError:
        return None


@settings(max_examples=150, deadline=None)
@given(document=JSON, ascii_only=st.booleans())
def test_malformed_json_never_gives_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, document: Any, ascii_only: bool
) -> None:
    folder = tmp_path_factory.mktemp("json")
    text = json.dumps(document, ensure_ascii=ascii_only)
    (folder / "captions.json").write_bytes(text.encode("utf-8", "surrogatepass"))

    loads_or_is_refused(folder)


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(
        ["captions.txt", "results.csv", "Flickr8k.token.txt", "metadata.jsonl", "metadata.csv", "a.tar"]
    ),
    data=st.binary(max_size=200)
    | st.lists(
        st.sampled_from(
            [b"a.jpg", b"#0\t", b",", b"|", b'"', b"\n", b"\r", b"\0", b"\xe9", b"x", b"image,caption\n", b"{}"]
        ),
        max_size=20,
    ).map(b"".join),
)
def test_malformed_bytes_never_give_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: bytes
) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    (folder / name).write_bytes(data)

    dataset = loads_or_is_refused(folder)

    if dataset is not None:
        assert all(caption.strip() for by_id in dataset.references().values() for caption in by_id)
