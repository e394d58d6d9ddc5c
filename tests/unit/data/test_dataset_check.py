"""Problems that make a data set unusable for training are found and named; a valid data set passes."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from imcap_ray.cli.main import main
from imcap_ray.config import Recipe, load_recipe
from imcap_ray.data.dataset_check import DataCheck, Finding, check_dataset, keep_duplicates_together
from imcap_ray.data.datasets import load_dataset
from imcap_ray.text.mojibake import find_mojibake
from tests.malformed_images import photo
from tests.small_data import ODD_KEY, captions_of, jpeg, write_flickr8k, write_tar


@pytest.fixture
def flickr8k(tmp_path: Path, make_flickr8k: Callable[..., Path]) -> Path:
    return make_flickr8k(tmp_path / "flickr8k", num_train=12, num_validation=4, num_test=4)


def check(data: Path, **options: Any) -> DataCheck:
    return check_dataset(
        load_dataset(str(data), count_missing_files=False, refuse_leaks=False), recipe=Recipe(), **options
    )


def image(data: Path, number: int) -> Path:
    return data / "Flicker8k_Dataset" / f"{number:04}_photo.jpg"


def test_a_data_set_whose_images_have_no_files_is_unusable(tmp_path: Path) -> None:
    table = pa.table({"image_id": ["a", "b"], "caption": ["a dog", "a cat"], "split": ["train", "validation"]})
    pq.write_table(table, tmp_path / "captions.parquet")

    checked = find(check(tmp_path / "captions.parquet"), "missing")

    assert (checked.count, checked.spoils) == (2, True)


def test_a_file_name_cannot_forge_a_line(flickr8k: Path) -> None:
    (image(flickr8k, 0).parent / "x\nusable for training.jpg").write_bytes(b"no image")

    text = check(flickr8k).to_text()

    assert "x\\nusable" in text
    assert not [line for line in text.splitlines() if line.startswith("usable") and line.endswith(".jpg")]


def find(checked: DataCheck, code: str) -> Finding:
    (finding,) = [finding for finding in checked.findings if finding.code == code]
    return finding


def imcap(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


# ---- description


def test_a_valid_data_set_is_described_and_passes(flickr8k: Path) -> None:
    checked = check(flickr8k)

    assert not checked.spoils
    assert checked.splits == {"train": 12, "validation": 4, "test": 4}
    assert checked.captions["count"] == 100
    assert checked.captions["per_image"] == {"fewest": 5, "median": 5, "most": 5}
    assert checked.captions["tokens"]["longest"] == 7
    assert checked.images == {
        "read": 20,
        "unreadable": 0,
        "formats": {"jpeg": 20},
        "smallest": [80, 60],
        "median": [80, 60],
        "largest": [80, 60],
    }
    assert {finding.code for finding in checked.findings} == {"missing", "odd_names", "note", "small", "few_validation"}


def test_coverage_is_the_share_of_tokens_frequent_enough_in_training(flickr8k: Path) -> None:
    token_file = flickr8k / "Flickr8k.token.txt"
    token_file.write_text(token_file.read_text() + "0012_photo.jpg#5\tunheard of words\n")

    checked = check(flickr8k).vocabulary

    assert checked["coverage"]["test"] == 1
    assert checked["coverage"]["validation"] == pytest.approx(1 - 3 / (20 * 7 + 3))
    rare = load_recipe("lite2-attention", {"vocabulary.min_count": 10_000})
    dataset = load_dataset(str(flickr8k))
    assert check_dataset(dataset, recipe=rare, decode=False).vocabulary["coverage"]["test"] == 0


def test_without_decoding_no_image_is_read(flickr8k: Path) -> None:
    for number in range(20):
        image(flickr8k, number).write_bytes(b"no image")

    checked = check(flickr8k, decode=False)

    assert checked.images == {}
    assert not checked.spoils
    assert check(flickr8k).spoils


def test_progress_ends_at_the_number_of_images(flickr8k: Path) -> None:
    seen: list[tuple[int, int]] = []

    check(flickr8k, on_progress=lambda done, total: seen.append((done, total)))

    assert seen[-1] == (20, 20)


# ---- leaks


def test_identical_images_in_two_splits_make_a_data_set_unusable(flickr8k: Path) -> None:
    shutil.copy(image(flickr8k, 3), image(flickr8k, 12))
    shutil.copy(image(flickr8k, 4), image(flickr8k, 16))
    shutil.copy(image(flickr8k, 5), image(flickr8k, 6))

    checked = check(flickr8k)

    leaks = [finding for finding in checked.findings if finding.code == "leak"]
    assert all(finding.spoils for finding in leaks)
    assert {(leak.text, *leak.examples) for leak in leaks} == {
        ("validation image is also in train, byte for byte", "0012_photo.jpg = 0003_photo.jpg"),
        ("test image is also in train, byte for byte", "0016_photo.jpg = 0004_photo.jpg"),
    }
    repeated = find(checked, "repeated")
    assert (repeated.spoils, repeated.examples) == (False, ["0006_photo.jpg = 0005_photo.jpg"])


def test_a_reencoded_picture_is_a_leak_too(flickr8k: Path) -> None:
    photo(320, 240).save(image(flickr8k, 0), "JPEG", quality=95)
    photo(320, 240).resize((200, 200)).convert("L").save(image(flickr8k, 15), "PNG")

    checked = find(check(flickr8k), "near_leak")

    assert (checked.count, checked.spoils, checked.examples) == (1, True, ["0015_photo.jpg = 0000_photo.jpg"])


def test_images_listed_in_two_splits_are_counted(tmp_path: Path) -> None:
    splits = ["train", "validation", "test", "train", "validation"]
    columns = {"image_id": ["a", "a", "b", "b", "c"], "caption": ["a dog"] * 5, "split": splits}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")

    leak = find(check(tmp_path / "a.parquet"), "leak")

    assert (leak.count, leak.spoils) == (2, True)
    assert leak.examples == ["a (train and validation)", "b (test and train)"]
    assert imcap("check", tmp_path / "a.parquet").exit_code == 3
    assert "(the first of 2; `imcap check` counts them)" in imcap("train", tmp_path, tmp_path / "model").stderr


def folder_of_pairs(folder: Path, *, num_pairs: int) -> Path:
    """Write captioned photographs without official splits, each with a smaller grey copy of it."""
    folder.mkdir()
    for number in range(num_pairs):
        picture = Image.open(io.BytesIO(jpeg(number, width=320, height=240)))
        picture.save(folder / f"{number}.png")
        picture.resize((160, 120)).save(folder / f"copy of {number}.jpg", quality=80)
        for name in (f"{number}", f"copy of {number}"):
            (folder / f"{name}.txt").write_text("a dog runs on the grass")
    return folder


def test_near_duplicates_are_in_one_split_if_the_data_name_no_splits(tmp_path: Path) -> None:
    data = folder_of_pairs(tmp_path / "data", num_pairs=40)
    dataset = load_dataset(str(data))
    before = dict(zip(dataset.table["image_id"].to_pylist(), dataset.table["split"].to_pylist(), strict=True))
    separated = sum(before[f"{number}.png"] != before[f"copy of {number}.jpg"] for number in range(40))
    assert separated > 2, "otherwise the test shows nothing"

    checked = check(data)
    together = keep_duplicates_together(dataset)

    assert not checked.spoils
    assert not [finding for finding in checked.findings if finding.code in ("leak", "near_leak")]
    assert [one for one in checked.findings if one.count == separated and "split of a near duplicate" in one.text]
    after = dict(zip(together.table["image_id"].to_pylist(), together.table["split"].to_pylist(), strict=True))
    assert checked.splits == together.count_splits()
    assert all(after[f"{number}.png"] == after[f"copy of {number}.jpg"] for number in range(40))
    assert all(after[image_id] == "test" for image_id, split in before.items() if split == "test")


def test_near_duplicates_in_official_splits_stay_there(flickr8k: Path) -> None:
    dataset = load_dataset(str(flickr8k))
    shutil.copy(image(flickr8k, 3), image(flickr8k, 12))

    assert keep_duplicates_together(dataset) is dataset


def test_two_names_of_one_file_are_in_one_split_if_the_data_name_no_splits(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
    rows = [
        {"image_id": f"{name}{number}", "image_path": f"{number}.jpg", "caption": "a dog"}
        for number in range(30)
        for name in ("x", "y")
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")

    assert load_dataset(str(tmp_path / "a.parquet")).leaks == []


def test_different_pictures_are_not_a_leak(flickr8k: Path) -> None:
    """Blank pictures are not a leak either."""
    for number, grey in ((0, 100), (12, 101)):
        Image.new("RGB", (80, 60), (grey,) * 3).save(image(flickr8k, number), "JPEG")

    assert not check(flickr8k).spoils


# ---- files


def test_missing_unreadable_and_uncaptioned_images_are_distinguished(flickr8k: Path) -> None:
    image(flickr8k, 0).unlink()
    image(flickr8k, 1).write_bytes(jpeg(1)[:500])
    (flickr8k / "Flicker8k_Dataset" / "new.jpg").write_bytes(jpeg(50))
    (flickr8k / "Flicker8k_Dataset" / "notes.txt").write_text("no image")

    checked = check(flickr8k)

    assert find(checked, "missing").examples == ["0000_photo.jpg", ODD_KEY]
    assert find(checked, "unreadable").text == "image cannot be read (truncated)"
    assert find(checked, "unreadable").examples == ["0001_photo.jpg"]
    assert find(checked, "without_captions").examples == ["new.jpg"]
    assert find(checked, "odd_names").examples == [ODD_KEY]
    assert not checked.spoils


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"<html>404</html>")])
def test_more_than_a_tenth_of_images_missing_makes_a_data_set_unusable(
    flickr8k: Path, damage: Callable[[Path], Any]
) -> None:
    for number in range(2):
        damage(image(flickr8k, number))
    assert not check(flickr8k).spoils
    damage(image(flickr8k, 2))
    assert check(flickr8k).spoils


def test_a_data_set_without_validation_images_is_unusable(flickr8k: Path) -> None:
    (flickr8k / "Flickr_8k.devImages.txt").unlink()

    checked = check(flickr8k, decode=False)

    assert find(checked, "no_split").text.startswith("validation images")
    assert checked.spoils


def test_known_defects_of_public_flickr8k_copies_are_found_and_named(flickr8k: Path) -> None:
    """The copies contain lines of another collection whose names begin with `e`; none of these has a file."""
    names = [f"e{number}.png" for number in range(19)] + ["e17_01jpg"]
    lines = [f"{name}#{k}\tForeign words here ." for name in names for k in range(5)]
    lines[7] += "\tafter a second tab"
    with (flickr8k / "Flickr8k.token.txt").open("a") as file:
        file.write("\n".join(lines) + "\n")
    with (flickr8k / "Flickr_8k.trainImages.txt").open("a") as file:
        file.write("\n".join(names[:2]) + "\n")

    text = check(flickr8k).to_text()

    assert "21 captioned images have no file (105 captions; 20 of them begin with 'e'" in text
    assert "1 line has more than one tab: line 113" in text
    assert f"19 captioned images are in no split: {ODD_KEY}, e2.png" in text
    assert f"2 captioned images have no image extension: {ODD_KEY}, e17_01jpg" in text


def test_images_are_read_directly_from_tars(tmp_path: Path) -> None:
    import tarfile

    for split, number in (("train", 1), ("val", 1)):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            for name, data in ((f"{split}1.jpg", jpeg(number)), (f"{split}1.txt", b"a dog")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))

    checked = check(tmp_path)

    assert checked.images["read"] == 2
    assert find(checked, "leak").examples == ["val1 = train1"]


# ---- captions


@pytest.mark.parametrize("text", ["é", "café", "„Kaffee“", "naïve—really", "犬が走る", "Привет", "Ελλάδα", "€", "😀"])
def test_mojibake_is_detected_and_correct_text_is_not(text: str) -> None:
    assert find_mojibake(f"a {text} b") == ""
    for encoding in ("latin-1", "cp1252"):
        try:
            wrong = text.encode().decode(encoding)
        except UnicodeDecodeError:
            continue
        assert find_mojibake(f"a {wrong} b") != ""


@pytest.mark.parametrize(
    ("caption", "fault", "example", "spoils"),
    [
        ("a cafÃ©", "UTF-8", "Ã©", True),
        ("a caf\ufffd", "replacement characters", "\ufffd", True),
        ("a \x1b[31mdog", "control characters", "\x1b", True),
        ("a dog &amp; a cat", "HTML entities", "&amp;", False),
    ],
)
def test_captions_in_the_wrong_encoding_are_found(
    flickr8k: Path, caption: str, fault: str, example: str, spoils: bool
) -> None:
    with (flickr8k / "Flickr8k.token.txt").open("a", encoding="utf-8") as file:
        file.write(f"0003_photo.jpg#5\t{caption}\n0004_photo.jpg#5\t{caption}\n")

    checked = find(check(flickr8k, decode=False), "encoding")

    assert fault in checked.text
    assert checked.examples == [f"{example} in 0003_photo.jpg", f"{example} in 0004_photo.jpg"]
    assert checked.spoils == spoils  # 2 of 102 are more than 1 %


@pytest.mark.parametrize(
    ("caption", "is_english"),
    [
        ("Ein Hund läuft in einem Park und ein Mann steht an der Wand", False),
        ("een man is aan het fietsen in de stad", False),
        ("犬が走る", False),
        ("A dog runs on the grass", True),
    ],
)
def test_captions_in_other_languages_get_another_tokenizer_or_the_advice_to_use_it(
    tmp_path: Path, caption: str, is_english: bool
) -> None:
    splits = ["train", "train", "validation"]
    pq.write_table(
        pa.table({"image_id": ["a", "b", "c"], "caption": [caption] * 3, "split": splits}), tmp_path / "a.parquet"
    )
    dataset = load_dataset(str(tmp_path / "a.parquet"))
    ptb = load_recipe("lite2-attention", {"vocabulary.tokenizer": "ptb"})

    advice = [one.text for one in check_dataset(dataset, recipe=ptb).findings if one.code == "language"]
    by_itself = check(tmp_path / "a.parquet")

    assert is_english == (not advice)
    assert all("--set vocabulary.tokenizer=unicode" in text for text in advice)
    assert "language" not in [one.code for one in by_itself.findings]
    assert by_itself.vocabulary["tokenizer"] == ("ptb" if is_english else "unicode")


def test_few_validation_images_are_a_warning(
    flickr8k: Path, tmp_path: Path, make_flickr8k: Callable[..., Path]
) -> None:
    few = find(check(flickr8k, decode=False), "few_validation")

    assert (few.count, few.spoils) == (4, False)
    assert few.text.startswith("validation images, fewer than 50")
    many = make_flickr8k(tmp_path / "many", num_train=1, num_validation=50, num_test=0)
    assert "few_validation" not in [one.code for one in check(many, decode=False).findings]


def test_unusual_captions_are_counted(flickr8k: Path) -> None:
    with (flickr8k / "Flickr8k.token.txt").open("a") as file:
        file.write(
            f"0003_photo.jpg#5\t{captions_of(3)[0]}\n0003_photo.jpg#6\tdog .\n0003_photo.jpg#7\t{'very ' * 30}\n"
        )

    checked = check(flickr8k, decode=False)

    assert find(checked, "repeated_captions").examples == ["0003_photo.jpg"]
    assert find(checked, "num_captions").text == "image has more or fewer than 5 captions"
    assert find(checked, "short").count == find(checked, "long").count == 1


# ---- the command


def test_the_command_looks_for_outliers_on_request(tmp_path: Path) -> None:
    data = write_flickr8k(tmp_path / "flickr8k", num_train=100, num_validation=24, num_test=4)
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(image(data, 5))

    plain, result = imcap("check", data), imcap("check", data, "--outliers")

    assert "unlike the others" not in plain.stdout
    assert re.search(r"\d images? (is|are) unlike the others.*: 0005_photo.jpg", result.stdout)
    assert result.exit_code == 0


def test_the_command_prints_the_most_severe_problem_first_and_exits_with_3(flickr8k: Path) -> None:
    assert imcap("check", flickr8k).exit_code == 0
    shutil.copy(image(flickr8k, 3), image(flickr8k, 12))

    result = imcap("check", flickr8k)

    assert (result.exit_code, result.stderr) == (3, "")
    lines = result.stdout.splitlines()
    assert lines[0] == f"{flickr8k}: Flickr8k as distributed"
    problems = [line for line in lines if re.match(r" {4,}\d", line)]
    assert re.match(r" +1 validation image .*0012_photo\.jpg = 0003_photo\.jpg", problems[0])
    assert len(problems) > 1
    assert "unusable" in lines[-1] and "1 serious problem" in lines[-1]


def test_json_is_one_object_with_the_same_exit_code(flickr8k: Path) -> None:
    (flickr8k / "Flickr_8k.devImages.txt").unlink()

    result = imcap("check", flickr8k, "--json", "--no-decode")

    assert result.exit_code == 3
    checked = json.loads(result.stdout)
    assert checked["spoils"] is True
    finding = checked["findings"][0]
    assert finding.pop("text").startswith("validation images")
    assert finding == {"code": "no_split", "count": 0, "examples": [], "spoils": True}
    assert imcap("check", flickr8k, "--quiet", "--no-decode").output == ""


def test_wrong_input_is_exit_code_2(tmp_path: Path) -> None:
    for arguments in ([tmp_path], [tmp_path / "nowhere"], [tmp_path, "--set", "vocabulary.min_count=0"]):
        result = imcap("check", *arguments)
        assert result.exit_code == 2
        assert len(result.stderr.splitlines()) == 1


def test_names_are_printed_escaped(tmp_path: Path) -> None:
    hostile = "\x1b[2J\u202egpj.jpg"
    for name in (hostile, f"2{hostile}"):
        (tmp_path / name).write_bytes(jpeg(1))
    records = [{"file_name": name, "text": f"{hostile} a"} for name in (hostile, f"2{hostile}")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, records)))

    result = imcap("check", tmp_path)

    assert "\\x1b[2J\\u202egpj.jpg" in result.stdout
    assert not {"\x1b", "\u202e"} & set(result.stdout + imcap("check", tmp_path, "--json").stdout)


def test_a_data_set_without_validation_images_is_refused_before_ray_starts(tmp_path: Path) -> None:
    columns = {"image_path": ["a.jpg"], "caption": ["a dog"], "split": ["train"]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")

    result = imcap("train", tmp_path / "a.parquet", tmp_path / "model")

    assert result.exit_code == 2
    assert result.stderr == f"imcap: {tmp_path}/a.parquet has no validation images: it has 1 train\n"


def test_images_in_tables_and_tars_are_checked_like_files(tmp_path: Path) -> None:
    names = [f"{number:03}.jpg" for number in range(20)]
    images = [jpeg(number // 2) if number else b"broken" for number in range(20)]  # pairs of the same bytes
    for name, image in zip(names, images, strict=True):
        (tmp_path / "files").mkdir(exist_ok=True)
        (tmp_path / "files" / name).write_bytes(image)
        (tmp_path / "files" / name).with_suffix(".txt").write_text(f"a caption of {name}")
    write_tar(
        tmp_path / "tars" / "a.tar",
        {path.name: path.read_bytes() for path in sorted((tmp_path / "files").iterdir())},
    )
    (tmp_path / "tables").mkdir()
    structs = [{"bytes": image, "path": name} for name, image in zip(names, images, strict=True)]
    captions = [f"a caption of {name}" for name in names]
    pq.write_table(pa.table({"image": structs, "text": captions}), tmp_path / "tables" / "a.parquet", row_group_size=6)

    checks = [check(tmp_path / form) for form in ("files", "tables", "tars")]

    assert checks[0].images == checks[1].images == checks[2].images
    assert checks[0].images["unreadable"] == 1
    counts = [
        {one.code: one.count for one in checked.findings if one.code in ("unreadable", "leak")} for checked in checks
    ]
    assert counts[0] == counts[1]  # a tar's ids lack the ending, which is another hash and another split
