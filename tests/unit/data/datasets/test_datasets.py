"""Every format gives the same table, and every problem in it is reported."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imcap_ray.data.datasets import DATASET_SCHEMA, SPLITS, CaptionedImages, load_dataset, split_of
from imcap_ray.errors import DatasetError
from tests.small_data import ODD_KEY, captions_of, jpeg


@pytest.fixture
def flickr8k(tmp_path: Path, make_flickr8k: Callable[..., Path]) -> Path:
    return make_flickr8k(tmp_path / "flickr8k")


def load(location: object) -> CaptionedImages:
    """Load a data set and check the invariants of its table."""
    dataset = load_dataset(str(location))
    assert dataset.table.schema == DATASET_SCHEMA
    rows = dataset.table.to_pylist()
    assert len({row["image_id"] for row in rows}) == len(rows)
    assert all(row["captions"] for row in rows)
    assert {row["split"] for row in rows} <= set(SPLITS)
    return dataset


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")


# ---- Flickr8k as distributed


def test_flickr8k_is_recognised_with_its_official_splits(flickr8k: Path) -> None:
    dataset = load(flickr8k)

    assert dataset.format == "Flickr8k as distributed"
    assert dataset.describe_splits() == "8 train, 2 validation, 2 test"
    assert dataset.split("test")["image_id"].to_pylist() == ["0010_photo.jpg", "0011_photo.jpg"]
    assert dataset.table["split"].to_pylist() == ["train"] * 8 + ["validation"] * 2 + ["test"] * 2
    assert dataset.references("validation")["0008_photo.jpg"] == captions_of(8)
    for row in dataset.table.to_pylist():
        assert row["image_path"] == f"{flickr8k}/Flicker8k_Dataset/{row['image_id']}"
        assert Path(row["image_path"]).is_file()


def test_the_key_without_an_image_is_skipped_and_counted(flickr8k: Path) -> None:
    dataset = load(flickr8k)

    assert ODD_KEY not in dataset.references()
    assert dataset.left_out["image_id"].to_pylist() == [ODD_KEY]
    assert dataset.notes == [f"1 captioned image is in no split: {ODD_KEY}"]


def test_malformed_lines_are_counted(flickr8k: Path) -> None:
    append(flickr8k / "Flickr8k.token.txt", "no tab\nno_number.jpg\tcaption\n0000_photo.jpg#7\t  \n\n")

    dataset = load(flickr8k)

    assert "2 lines are not `name#number<TAB>caption`: line 66, line 67" in dataset.notes
    assert "1 caption is blank: line 68" in dataset.notes
    assert len(dataset.references()["0000_photo.jpg"]) == 5


def test_a_line_with_a_second_tab_is_counted_and_its_caption_is_kept(flickr8k: Path) -> None:
    append(flickr8k / "Flickr8k.token.txt", "0000_photo.jpg#7\tA dog\tin the grass .\n")

    dataset = load(flickr8k)

    assert "1 line has more than one tab: line 66" in dataset.notes
    assert dataset.references()["0000_photo.jpg"][-1] == "A dog in the grass ."


def test_windows_line_ends_and_byte_order_marks_are_not_part_of_a_caption(flickr8k: Path) -> None:
    token_file = flickr8k / "Flickr8k.token.txt"
    expected = load(flickr8k).references()
    token_file.write_bytes(b"\xef\xbb\xbf" + token_file.read_bytes().replace(b"\n", b"\r\n"))

    assert load(flickr8k).references() == expected


def test_without_split_lists_each_image_is_assigned_a_split(flickr8k: Path) -> None:
    for path in flickr8k.glob("Flickr_8k.*Images.txt"):
        path.unlink()

    rows = load(flickr8k).table.to_pylist()

    assert len(rows) == 13
    assert all(row["split"] == split_of(row["image_id"]) for row in rows)


def test_an_image_of_a_split_list_without_a_caption_is_counted(flickr8k: Path) -> None:
    append(flickr8k / "Flickr_8k.testImages.txt", "z.jpg\nlost.jpg\n")

    dataset = load(flickr8k)

    assert dataset.describe_splits() == "8 train, 2 validation, 2 test"
    assert "2 images of the splits have no caption: z.jpg, lost.jpg" in dataset.notes


def test_images_without_a_file_are_counted_and_kept(flickr8k: Path) -> None:
    (flickr8k / "Flicker8k_Dataset" / "0003_photo.jpg").unlink()

    assert load(flickr8k).notes[-1] == "1 of 12 images have no file: 0003_photo.jpg"
    for path in (flickr8k / "Flicker8k_Dataset").iterdir():
        path.unlink()
    dataset = load(flickr8k)
    assert "12 images" in dataset.notes[-1]
    assert len(dataset.references()) == 12


def test_an_image_in_two_split_lists_is_refused(flickr8k: Path) -> None:
    append(flickr8k / "Flickr_8k.testImages.txt", "0003_photo.jpg\n")

    with pytest.raises(DatasetError, match=r"0003_photo.jpg is in two splits, test and train|train and test"):
        load_dataset(str(flickr8k))


def test_a_data_set_without_captions_is_refused(flickr8k: Path) -> None:
    for path in flickr8k.glob("Flickr_8k.*Images.txt"):
        path.unlink()
    (flickr8k / "Flickr8k.token.txt").write_text("")

    with pytest.raises(DatasetError, match="Flickr8k as distributed, without a single caption"):
        load_dataset(str(flickr8k))


@pytest.mark.parametrize("name", ["Flickr8k_Dataset", "Images", "images"])
def test_the_image_folder_can_have_another_name(flickr8k: Path, name: str) -> None:
    (flickr8k / "Flicker8k_Dataset").rename(flickr8k / name)

    assert Path(load(flickr8k).table["image_path"][0].as_py()).parent.name == name


# ---- Kaggle


def write_kaggle(folder: Path, text: str) -> Path:
    (folder / "Images").mkdir()
    (folder / "captions.txt").write_text(text, encoding="utf-8")
    return folder


def test_the_kaggle_format_is_recognised(tmp_path: Path) -> None:
    write_kaggle(
        tmp_path,
        'image,caption\na.jpg,A dog .\nb.jpg,"A cat , asleep ."\na.jpg,A dog, again .\nb.jpg,"He says ""hi"" ."\n',
    )

    dataset = load(tmp_path)

    assert dataset.format == "Flickr8k in Kaggle's form"
    assert dataset.references() == {
        "a.jpg": ["A dog .", "A dog, again ."],
        "b.jpg": ["A cat , asleep .", 'He says "hi" .'],
    }
    assert dataset.table["image_path"].to_pylist() == [f"{tmp_path}/Images/a.jpg", f"{tmp_path}/Images/b.jpg"]
    splits, missing = dataset.notes
    assert "no official splits" in splits
    assert "2 images" in missing


def test_malformed_lines_of_the_kaggle_format_are_counted(tmp_path: Path) -> None:
    dataset = load(write_kaggle(tmp_path, "image,caption\na.jpg,A dog\nb.jpg\nc.jpg, \n\n"))

    assert dataset.notes[0] == "2 lines are not `image,caption`: line 3, line 4"
    assert list(dataset.references()) == ["a.jpg"]


def test_an_unclosed_quote_affects_no_other_line(tmp_path: Path) -> None:
    dataset = load(write_kaggle(tmp_path, 'image,caption\na.jpg,"A dog\nb.jpg,A cat\nc.jpg,"A cow, asleep"\n'))

    assert dataset.references() == {"a.jpg": ["A dog"], "b.jpg": ["A cat"], "c.jpg": ["A cow, asleep"]}


def test_official_split_lists_next_to_kaggle_captions_are_used(tmp_path: Path) -> None:
    write_kaggle(tmp_path, "image,caption\na.jpg,A dog\nb.jpg,A cat\nc.jpg,A cow\n")
    (tmp_path / "Flickr_8k.trainImages.txt").write_text("a.jpg\n")
    (tmp_path / "val.txt").write_text("b\r\n")  # without the ending, as some lists are
    (tmp_path / "test.txt").write_text("something else altogether\n")

    dataset = load(tmp_path)

    assert [(row["image_id"], row["split"]) for row in dataset.table.to_pylist()] == [
        ("a.jpg", "train"),
        ("b.jpg", "validation"),
    ]
    assert "1 list of a split names none of the images: test.txt" in dataset.notes
    assert "1 captioned image is in no split: c.jpg" in dataset.notes


def test_a_split_per_caption_is_refused_and_names_an_image(tmp_path: Path) -> None:
    write_kaggle(tmp_path, "image,caption,split\na.jpg,A dog, with a ball,train\nb.jpg,x,val\na.jpg,A puppy,test\n")

    with pytest.raises(DatasetError, match="a.jpg is in two splits, train and test"):
        load_dataset(str(tmp_path))


# ---- Parquet


def write_parquet(path: Path, columns: dict[str, Any]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_parquet_with_paths_splits_and_lists_of_captions(tmp_path: Path) -> None:
    columns = {
        "image_path": ["a.jpg", f"{tmp_path}/b.jpg", "deep/c.jpg"],
        "captions": [["x", " y "], ["z"], ["w"]],
        "split": ["train", "validation", "test"],
    }
    path = write_parquet(tmp_path / "data.parquet", columns)

    dataset = load(path)

    assert dataset.format == "Parquet"
    assert dataset.describe_splits() == "1 train, 1 validation, 1 test"
    assert dataset.references()["a.jpg"] == ["x", "y"]
    assert dataset.table["image_path"].to_pylist() == [
        f"{tmp_path}/{name}" for name in ("a.jpg", "b.jpg", "deep/c.jpg")
    ]


def test_parquet_with_one_row_per_caption(tmp_path: Path) -> None:
    write_parquet(tmp_path / "1.parquet", {"image_id": ["a", "a", "b"], "caption": ["x", "y", "z"]})
    write_parquet(tmp_path / "2.parquet", {"image_id": ["b", "c"], "caption": ["w", "v"]})
    write_parquet(tmp_path / "_metadata.parquet", {"other": [1]})

    dataset = load(tmp_path)

    assert dataset.references() == {"a": ["x", "y"], "b": ["z", "w"], "c": ["v"]}
    assert all(row["split"] == split_of(row["image_id"]) for row in dataset.table.to_pylist())


def test_parquet_ids_can_be_numbers_and_text_can_be_large(tmp_path: Path) -> None:
    captions = pa.array([["x"], ["y"]], pa.large_list(pa.large_string()))

    dataset = load(write_parquet(tmp_path / "a.parquet", {"image_id": [7, 8], "captions": captions}))

    assert dataset.references() == {"7": ["x"], "8": ["y"]}


def test_parquet_rows_without_an_image_or_a_caption_are_counted(tmp_path: Path) -> None:
    columns = {"image_id": ["a", "b", None, "c", "d"], "captions": [["x"], [], ["y"], None, [None, " "]]}

    dataset = load(write_parquet(tmp_path / "a.parquet", columns))

    assert dataset.references() == {"a": ["x"]}
    assert dataset.notes[0] == "4 rows have no image or no caption: row 1, row 2, row 3, ..."


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image_id": ["a", "a"], "caption": ["x", "y"], "split": ["train", "test"]}, "a is in two splits, train and"),
        ({"image_id": ["a"], "caption": ["x"], "split": ["odd"]}, "split must be train, validation, test, got 'odd'"),
        ({"image_id": ["a"], "words": ["x"]}, "expected a column of images .* of captions .*; got image_id, words"),
        ({"picture": ["a"], "caption": ["x"]}, "expected a column of images .* of captions .*; got picture, caption"),
        ({"image_id": [["a"]], "caption": [{"text": "x"}]}, "ids must be text, numbers or bytes, which image_id .list"),
        ({"image_id": ["a"], "caption": [""]}, "Parquet, without a single caption"),
    ],
)
def test_parquet_that_is_not_a_data_set_is_refused(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        load_dataset(str(write_parquet(tmp_path / "a.parquet", columns)))


def test_one_file_with_two_ids_in_two_splits_is_refused(tmp_path: Path) -> None:
    columns = {"image_id": ["a", "b"], "image_path": ["x.jpg"] * 2, "caption": ["x", "y"], "split": ["train", "test"]}

    with pytest.raises(DatasetError, match="x.jpg is in two splits, train and test"):
        load_dataset(str(write_parquet(tmp_path / "a.parquet", columns)))


def test_common_split_names_are_recognised(tmp_path: Path) -> None:
    columns = {"image_id": ["a", "b", "c"], "caption": ["x", "y", "z"], "split": ["restval", "Dev", "test"]}

    dataset = load(write_parquet(tmp_path / "a.parquet", columns))

    assert dataset.describe_splits() == "1 train, 1 validation, 1 test"


def test_corrupt_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")

    with pytest.raises(DatasetError, match=f"{tmp_path}/a.parquet is not readable Parquet"):
        load_dataset(str(tmp_path))


# ---- images outside the data


@pytest.mark.parametrize(("on_disk", "in_text"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_a_name_can_be_in_another_unicode_normal_form(tmp_path: Path, on_disk: Any, in_text: Any) -> None:
    names = ["café.jpg", "犬.jpg", "plain.jpg", "gone é.jpg"]
    for name in names[:3]:
        (tmp_path / unicodedata.normalize(on_disk, name)).write_bytes(jpeg(0))
    columns = {"image_path": [unicodedata.normalize(in_text, name) for name in names], "caption": ["x"] * 4}
    write_parquet(tmp_path / "a.parquet", columns)

    dataset = load(tmp_path)

    paths = dataset.table["image_path"].to_pylist()
    assert [Path(path).exists() for path in paths] == [True, True, True, False]
    assert dataset.table["image_id"].to_pylist() == columns["image_path"]
    assert any(note.startswith("1 file name") and "Unicode" in note for note in dataset.notes)


def write_naming(folder: Path, form: str, path: str) -> Path:
    """Write a data set in this format whose second image is at `path`; return the folder of the first."""
    if form == "Flickr8k":
        (folder / "Images").mkdir(parents=True)
        (folder / "Flickr8k.token.txt").write_text(f"a.jpg#0\tA dog .\n{path}#0\tA cat .\n")
    elif form == "Kaggle":
        folder.mkdir()
        write_kaggle(folder, f"image,caption\na.jpg,A dog .\n{path},A cat .\n")
    else:
        folder.mkdir()
        write_parquet(folder / "1.parquet", {"image_path": ["a.jpg"], "caption": ["A dog ."]})
        write_parquet(folder / "2.parquet", {"image_path": [path], "caption": ["A cat ."]})
    return folder


@pytest.mark.parametrize("form", ["Flickr8k", "Kaggle", "Parquet"])
@pytest.mark.parametrize("path", ["/elsewhere/b.jpg", "../../b.jpg", "deep/../../../b.jpg"])
def test_a_name_that_leads_out_of_the_data_is_refused_unless_allowed(tmp_path: Path, form: str, path: str) -> None:
    data = write_naming(tmp_path / "data", form, path)

    with pytest.raises(DatasetError) as caught:
        load_dataset(str(data))
    for words in (f"{data}, image {path!r}: ", f" leads out of {data};", "--allow-outside-paths"):
        assert words in str(caught.value)
    dataset = load_dataset(str(data), allow_outside_paths=True)
    assert dataset.table.num_rows == 2


@pytest.mark.parametrize("path", ["s3://bucket/b.jpg", "file:///elsewhere/b.jpg", "file:///data/%2e%2e/b.jpg"])
def test_an_outside_uri_is_refused_unless_allowed(tmp_path: Path, path: str) -> None:
    data = write_naming(tmp_path / "data", "Parquet", path)

    with pytest.raises(DatasetError, match="--allow-outside-paths"):
        load_dataset(str(data / "2.parquet"))
    assert load_dataset(str(data), allow_outside_paths=True).table["image_path"].to_pylist()[1] == path


@pytest.mark.parametrize("form", ["Flickr8k", "Kaggle"])
def test_a_name_can_point_to_another_folder_of_the_data(tmp_path: Path, form: str) -> None:
    data = write_naming(tmp_path / "data", form, "../more/b.jpg")

    assert load_dataset(str(data)).table.num_rows == 2


def test_a_signed_url_is_refused_and_not_repeated(tmp_path: Path) -> None:
    data = write_naming(tmp_path / "data", "Parquet", "https://host/b.jpg?Signature=planted")

    with pytest.raises(DatasetError, match="holds a secret") as caught:
        load_dataset(str(data), allow_outside_paths=True)
    assert "planted" not in str(caught.value)


# ---- any format


def test_a_missing_or_unrecognised_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=f"no such data set: {tmp_path}/nowhere"):
        load_dataset(f"{tmp_path}/nowhere")
    (tmp_path / "photo.jpg").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"expected one of: Flickr8k as distributed .*Parquet"):
        load_dataset(str(tmp_path))


def test_the_error_for_an_unknown_split_lists_the_available_ones(tmp_path: Path) -> None:
    columns = {"image_id": ["a", "b"], "caption": ["x", "y"], "split": ["train", "train"]}
    dataset = load(write_parquet(tmp_path / "a.parquet", columns))

    with pytest.raises(DatasetError, match="has no test images: it has 2 train"):
        dataset.split("test")


def test_the_split_of_a_name_never_changes() -> None:
    """Different numbers would move images between training and test in a new version."""
    assert [number for number in range(60) if split_of(f"{number}.jpg") == "validation"] == [18, 27, 59]
    assert [number for number in range(60) if split_of(f"{number}.jpg") == "test"] == [14, 40, 43, 50]


def test_about_a_twentieth_each_is_kept_for_validation_and_test() -> None:
    counts = Counter(split_of(f"{number}.jpg") for number in range(4000))

    assert set(counts) == set(SPLITS)
    assert 160 <= counts["validation"] <= 240
    assert 160 <= counts["test"] <= 240
