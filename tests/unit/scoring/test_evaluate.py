"""Which captions are scored against which references, and which scores would be misleading."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from imcap_ray.cli.main import main
from imcap_ray.data.datasets import DATASET_SCHEMA, CaptionedImages, load_dataset
from imcap_ray.data.manifest import build_manifest
from imcap_ray.errors import DatasetError, InputError
from imcap_ray.scoring.evaluate import evaluate_captions, read_captions
from imcap_ray.scoring.evaluation_report import SHARES, CoveragePoint, evaluate, rank
from tests.small_data import jpeg, write_flickr8k, write_tar

REFERENCES = {
    "train/a.jpg": ("train", ["a dog runs in the grass", "the dog runs"]),
    "train/b.jpg": ("train", ["a man holds a ball", "the man has a red ball"]),
    "test/c.jpg": ("test", ["two cats sit on a wall", "cats on a wall"]),
    "test/d.jpg": ("test", ["a child jumps in the water", "the child jumps"]),
}
PERFECT = {image_id: captions[0] for image_id, (_, captions) in REFERENCES.items()}


@pytest.fixture
def references() -> CaptionedImages:
    rows = [
        {"image_id": image_id, "image_path": image_id, "split": split, "captions": captions}
        for image_id, (split, captions) in REFERENCES.items()
    ]
    return CaptionedImages("the data set", "Parquet", pa.Table.from_pylist(rows, schema=DATASET_SCHEMA))


def write(path: Path, captions: Mapping[str, str | None]) -> str:
    pq.write_table(pa.table({"image_id": list(captions), "caption": list(captions.values())}), path)
    return str(path)


def of_split(split: str) -> dict[str, str]:
    return {image_id: caption for image_id, caption in PERFECT.items() if REFERENCES[image_id][0] == split}


def test_captions_of_one_split_are_scored_against_it(tmp_path: Path, references: CaptionedImages) -> None:
    report = evaluate_captions(write(tmp_path / "a.parquet", of_split("test")), references)

    assert (report.protocol.split, report.protocol.num_images) == ("test", 2)
    assert report.protocol.notes.startswith("CIDEr-D of 2 images depends much on which they are")
    assert report.scores.bleu_4 == pytest.approx(1.0)


def test_the_most_confident_captions_are_scored_separately(tmp_path: Path, references: CaptionedImages) -> None:
    captions = of_split("test") | {"test/c.jpg": "a man"}
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"image_id": list(captions), "caption": list(captions.values()), "confidence": [0.2, 0.7]}), path
    )

    report = evaluate_captions(str(path), references)

    assert list(captions) == ["test/c.jpg", "test/d.jpg"]
    half = next(point for point in report.confidence_curve if point.share == 0.5)
    assert (half.min_confidence, report.confidence_curve[0].min_confidence) == pytest.approx((0.7, 0.2))
    assert half.bleu_4 == pytest.approx(1.0) and half.cider_d > report.scores.cider_d
    assert report.confidence_curve[0].cider_d == pytest.approx(report.scores.cider_d)
    assert "the 50% most confident captions (confidence 0.700 and more): CIDEr-D" in report.to_text()


def test_captions_without_confidences_have_no_curve(tmp_path: Path, references: CaptionedImages) -> None:
    report = evaluate_captions(write(tmp_path / "a.parquet", PERFECT), references)

    assert report.confidence_curve == report.familiarity_curve == report.confidence_and_familiarity_curve == ()


def write_ranked(path: Path, confidences: Sequence[float | None], familiarities: Sequence[float | None] | None) -> str:
    """Captions of all images, of which those of the first two are wrong. None: a table without familiarity."""
    captions = PERFECT | {"train/a.jpg": "a", "train/b.jpg": "a"}
    columns: dict[str, list[object]] = {"image_id": [*captions], "caption": [*captions.values()]}
    columns["confidence"] = [*confidences]
    if familiarities is not None:
        columns["familiarity"] = [*familiarities]
    pq.write_table(pa.table(columns), path)
    return str(path)


def half_of(curve: Sequence[CoveragePoint]) -> CoveragePoint:
    return next(point for point in curve if point.share == 0.5)


def test_the_most_familiar_captions_are_scored_separately(tmp_path: Path, references: CaptionedImages) -> None:
    captions = write_ranked(tmp_path / "a.parquet", [0.9, 0.8, 0.1, 0.2], [0.3, 0.1, 0.6, 0.7])

    report = evaluate_captions(captions, references, split="all")

    half = half_of(report.familiarity_curve)
    assert half.bleu_4 == pytest.approx(1.0)
    assert (half.min_familiarity, half.min_confidence) == (0.6, 0)
    assert half_of(report.confidence_curve).bleu_4 == 0
    assert half_of(report.confidence_curve).min_familiarity == 0
    assert "the 50% most familiar captions (familiarity 0.600 and more): CIDEr-D" in report.to_text()


def test_captions_above_a_threshold_of_each_are_scored_separately(tmp_path: Path, references: CaptionedImages) -> None:
    # The first has the highest confidence, and the second the highest familiarity.
    captions = write_ranked(tmp_path / "a.parquet", [0.9, 0.1, 0.5, 0.6], [0.1, 0.9, 0.7, 0.5])

    report = evaluate_captions(captions, references, split="all")

    half = half_of(report.confidence_and_familiarity_curve)
    assert half.bleu_4 == pytest.approx(1.0)
    assert (half.min_confidence, half.min_familiarity) == (0.5, 0.5)
    assert (
        "the 50% most confident and familiar captions (confidence 0.500 and familiarity 0.500 and more): CIDEr-D"
        in report.to_text()
    )


def test_an_image_without_familiarity_counts_as_least_familiar(tmp_path: Path, references: CaptionedImages) -> None:
    captions = write_ranked(tmp_path / "a.parquet", [0.9, 0.8, 0.7, 0.6], [math.nan, None, 0.01, 0.02])

    curve = evaluate_captions(captions, references, split="all").familiarity_curve

    assert half_of(curve).bleu_4 == pytest.approx(1.0)
    assert (half_of(curve).min_familiarity, curve[0].min_familiarity) == (0.01, 0)


@pytest.mark.parametrize("familiarities", [None, [None] * 4, [math.nan] * 4])
def test_captions_without_familiarity_are_ranked_by_confidence_alone(
    tmp_path: Path, references: CaptionedImages, familiarities: list[float | None] | None
) -> None:
    captions = write_ranked(tmp_path / "a.parquet", [0.1, 0.2, 0.3, 0.4], familiarities)

    report = evaluate_captions(captions, references, split="all")

    assert half_of(report.confidence_curve).bleu_4 == pytest.approx(1.0)
    assert report.familiarity_curve == report.confidence_and_familiarity_curve == ()
    assert "familiar" not in report.to_text() and "familiar" not in report.to_markdown()


def test_the_curves_are_in_json_and_in_markdown(tmp_path: Path, references: CaptionedImages) -> None:
    captions = write_ranked(tmp_path / "a.parquet", [0.9, 0.1, 0.5, 0.6], [0.1, 0.9, 0.7, 0.5])

    report = evaluate_captions(captions, references, split="all")

    values = json.loads(report.to_json())
    for name in ("confidence_curve", "familiarity_curve", "confidence_and_familiarity_curve"):
        assert [point["share"] for point in values[name]] == list(SHARES)
        assert values[name][0]["cider_d"] == pytest.approx(report.scores.cider_d)
    header, _, *rows = report.to_markdown().splitlines()[-len(SHARES) - 2 :]
    assert header == (
        "| captions kept | CIDEr-D of the most confident | CIDEr-D of the most familiar "
        "| CIDEr-D of the most confident and familiar |"
    )
    assert rows[0] == f"| 100% |{f' {report.scores.cider_d:.3f} |' * 3}"
    assert rows[5].startswith("| 50% | ") and len({row.count("|") for row in rows}) == 1


def test_the_first_in_a_ranking_by_two_values_are_above_a_threshold_of_each() -> None:
    confidences, familiarities = np.random.default_rng(0).random((2, 101))
    order = rank(confidences, familiarities)

    for num_kept in range(1, 102):
        kept = order[:num_kept]
        is_above = (confidences >= confidences[kept].min()) & (familiarities >= familiarities[kept].min())
        assert sorted(np.flatnonzero(is_above)) == sorted(kept)


def test_a_score_on_training_images_has_a_note(tmp_path: Path, references: CaptionedImages) -> None:
    report = evaluate_captions(write(tmp_path / "a.parquet", of_split("train")), references)

    assert "training split" in report.protocol.notes


def test_the_test_split_is_scored_if_training_images_were_captioned_too(
    tmp_path: Path, references: CaptionedImages
) -> None:
    captions = write(tmp_path / "a.parquet", PERFECT)

    report = evaluate_captions(captions, references)
    all_images = evaluate_captions(captions, references, split="all")

    assert (report.protocol.split, report.protocol.num_images) == ("test", 2)
    assert "of the captioned images, 2 of 4 are training images; only the test split is scored" in report.to_text()
    assert (all_images.protocol.split, all_images.protocol.num_images) == ("", 4)
    assert "2 of 4 are training images, so the scores are no measure" in all_images.protocol.notes


def test_all_images_are_scored_if_the_splits_are_only_ours(tmp_path: Path, references: CaptionedImages) -> None:
    ours = replace(references, has_official_splits=False)

    report = evaluate_captions(write(tmp_path / "a.parquet", PERFECT), ours)

    assert (report.protocol.split, report.protocol.num_images) == ("", 4)
    assert "2 of 4 are training images of a model that was trained on these data" in report.protocol.notes


def test_many_images_have_no_remark_on_their_number(tmp_path: Path) -> None:
    texts = {f"{number}.jpg": [f"a dog {number}", f"the dog {number}"] for number in range(100)}
    rows = [
        {"image_id": image_id, "image_path": "", "split": "test", "captions": captions}
        for image_id, captions in texts.items()
    ]
    data = CaptionedImages("the data set", "Parquet", pa.Table.from_pylist(rows, schema=DATASET_SCHEMA))

    report = evaluate_captions(write(tmp_path / "a.parquet", {name: both[0] for name, both in texts.items()}), data)

    assert report.protocol.notes == ""


def test_failed_images_without_references_do_not_stop_the_evaluation(
    tmp_path: Path, references: CaptionedImages
) -> None:
    captions = write(tmp_path / "a.parquet", of_split("test") | {"broken.jpg": None, "notes.heic": ""})

    report = evaluate_captions(captions, references)

    assert report.protocol.num_images == 2
    assert "2 captioned images have no references" in report.protocol.notes


def test_captions_and_references_in_the_wrong_order_are_recognised(tmp_path: Path) -> None:
    data = write_flickr8k(tmp_path / "data", num_train=2, num_validation=1, num_test=1)
    (tmp_path / "captions" / "_imcap").mkdir(parents=True)
    (tmp_path / "captions" / "_imcap" / "run.json").write_text("{}")
    captions = tmp_path / "captions"
    table = {"image_id": ["0003_photo.jpg"], "caption": ["a dog"], "image_path": [str(data / "a.jpg")]}
    pq.write_table(pa.table(table), captions / "a.parquet")

    result = CliRunner().invoke(main, ["evaluate", str(data), str(captions)])

    assert result.exit_code == 2
    [line] = result.stderr.splitlines()
    assert f"imcap evaluate {captions} {data}" in line
    assert CliRunner().invoke(main, ["evaluate", str(captions), str(data)]).exit_code == 0


def test_a_split_can_be_chosen_from_captions_of_all(tmp_path: Path, references: CaptionedImages) -> None:
    captions = write(tmp_path / "a.parquet", PERFECT)

    report = evaluate_captions(captions, references, split="test")

    assert (report.protocol.split, report.protocol.num_images) == ("test", 2)
    assert report.scores == evaluate_captions(write(tmp_path / "b.parquet", of_split("test")), references).scores


def test_captions_from_a_folder_above_are_matched_by_file_name(tmp_path: Path, references: CaptionedImages) -> None:
    above = {f"Photographs/{image_id}": caption for image_id, caption in of_split("test").items()}
    in_subfolder = CaptionedImages(
        "the data set",
        "Parquet",
        references.table.set_column(0, "image_id", pa.array(["a.jpg", "b.jpg", "c.jpg", "d.jpg"])),
    )

    assert evaluate_captions(write(tmp_path / "a.parquet", above), in_subfolder).scores.bleu_1 == pytest.approx(1.0)


def test_captions_of_one_folder_of_the_data_are_matched_with_it(tmp_path: Path, references: CaptionedImages) -> None:
    captions = tmp_path / "captions"
    (captions / "_imcap").mkdir(parents=True)
    (captions / "_imcap" / "run.json").write_text(json.dumps({"input": str(tmp_path / "data" / "test")}))
    below = {image_id.removeprefix("test/"): caption for image_id, caption in of_split("test").items()}
    write(captions / "a.parquet", below)

    report = evaluate_captions(str(captions), replace(references, location=str(tmp_path / "data")))

    assert (report.protocol.split, report.protocol.num_images) == ("test", 2)
    assert report.scores.bleu_1 == pytest.approx(1.0)
    with pytest.raises(DatasetError, match="does not match"):
        evaluate_captions(str(captions), replace(references, location=str(tmp_path / "other")))


def test_the_order_of_the_rows_does_not_matter(tmp_path: Path, references: CaptionedImages) -> None:
    reports = [
        evaluate_captions(write(tmp_path / f"{number}.parquet", captions), references, split="test")
        for number, captions in enumerate((PERFECT, dict(reversed(PERFECT.items()))))
    ]

    assert reports[0].to_json() == reports[1].to_json()


def test_a_missing_caption_is_refused(tmp_path: Path, references: CaptionedImages) -> None:
    captions = write(tmp_path / "a.parquet", {"test/d.jpg": "a child"})

    with pytest.raises(
        DatasetError, match="captions for 1 of the 2 test images of the data set, test/c.jpg is missing"
    ):
        evaluate_captions(captions, references)


def test_two_sets_of_captions_are_compared_on_the_same_images(tmp_path: Path, references: CaptionedImages) -> None:
    ours = write(tmp_path / "a.parquet", of_split("test"))
    theirs = write(tmp_path / "b.parquet", PERFECT | {"test/c.jpg": "a bird"})

    comparison = evaluate_captions(ours, references, against=theirs).comparison

    assert comparison is not None
    assert (comparison.name, comparison.scores.num_images) == (theirs, 2)
    assert comparison.differences["bleu_1"] > 0
    with pytest.raises(DatasetError, match=r"c\.parquet has captions for 1 of the 2 images that .*a\.parquet is"):
        evaluate_captions(ours, references, against=write(tmp_path / "c.parquet", {"test/d.jpg": "a child"}))


def test_a_comparison_names_the_speed_of_both_runs_if_both_are_known(
    tmp_path: Path, references: CaptionedImages
) -> None:
    runs = {"fast": 44.25, "slow": 3.0, "short": None}
    for name, speed in runs.items():
        (tmp_path / name / "_imcap").mkdir(parents=True)
        write(tmp_path / name / "a.parquet", of_split("test"))
        (tmp_path / name / "_imcap" / "run.json").write_text(json.dumps({"images_per_second": speed}))
    fast, slow, short = (str(tmp_path / name) for name in runs)

    notes = evaluate_captions(fast, references, against=slow).protocol.notes

    assert f"{fast} was captioned at 44.2 images/s; {slow} was captioned at 3.0 images/s" in notes
    assert "images/s" not in evaluate_captions(fast, references, against=short).protocol.notes
    assert "images/s" not in evaluate_captions(fast, references).protocol.notes


def test_a_failed_image_is_scored_as_an_empty_caption(tmp_path: Path, references: CaptionedImages) -> None:
    captions = of_split("test") | {"test/c.jpg": None}

    report = evaluate_captions(write(tmp_path / "a.parquet", captions), references)

    assert report.protocol.num_images == 2
    assert report.scores.bleu_1 < 1


def test_captions_of_other_images_are_refused(tmp_path: Path, references: CaptionedImages) -> None:
    captions = write(tmp_path / "a.parquet", PERFECT | {"stranger.jpg": "a dog"})

    with pytest.raises(
        DatasetError,
        match="does not match the data set: 1 of 5 captioned images have no references there, .*stranger.jpg",
    ):
        evaluate_captions(captions, references)


def test_a_file_name_of_two_captioned_images_matches_none(tmp_path: Path, references: CaptionedImages) -> None:
    captions = write(tmp_path / "a.parquet", {"x/test/c.jpg": "a dog", "y/test/c.jpg": "a cat"})

    with pytest.raises(DatasetError, match="2 of 2 captioned images have no references"):
        evaluate_captions(captions, references)


def test_a_file_name_that_two_images_of_the_data_have_matches_none(tmp_path: Path, references: CaptionedImages) -> None:
    ids = pa.array(["a.jpg", "b.jpg", "c.jpg", "other/c.jpg"])
    data = CaptionedImages("the data set", "Parquet", references.table.set_column(0, "image_id", ids))
    captions = write(tmp_path / "a.parquet", {"in/a.jpg": "a dog", "in/b.jpg": "a cat", "in/c.jpg": "a child"})

    with pytest.raises(DatasetError, match="1 of 3 captioned images have no references there, the first is in/c.jpg"):
        evaluate_captions(captions, data)


def test_captions_in_a_folder_do_not_match_an_image_of_the_same_name_above_it(
    tmp_path: Path, references: CaptionedImages
) -> None:
    ids = pa.array(["c.jpg", "d.jpg", "test/c.jpg", "test/d.jpg"])
    data = CaptionedImages(str(tmp_path), "Parquet", references.table.set_column(0, "image_id", ids))
    captions = tmp_path / "captions"
    (captions / "_imcap").mkdir(parents=True)
    (captions / "_imcap" / "run.json").write_text(json.dumps({"input": str(tmp_path / "test")}))
    below = {image_id.removeprefix("test/"): caption for image_id, caption in of_split("test").items()}
    write(captions / "a.parquet", below)

    report = evaluate_captions(str(captions), data)

    assert report.protocol.split == "test"
    assert report.scores.bleu_1 == pytest.approx(1.0)


def test_captioned_images_without_references_are_counted_when_a_split_is_named(
    tmp_path: Path, references: CaptionedImages
) -> None:
    captions = write(tmp_path / "a.parquet", PERFECT | {"stranger.jpg": "a dog", "other.jpg": "a cat"})

    report = evaluate_captions(captions, references, split="test")

    assert "2 captioned images have no references" in report.protocol.notes


def test_a_split_without_images_is_refused(tmp_path: Path, references: CaptionedImages) -> None:
    with pytest.raises(DatasetError, match="has no validation images: it has 2 train, 2 test"):
        evaluate_captions(write(tmp_path / "a.parquet", PERFECT), references, split="validation")


def test_repeated_ids_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image_id": ["a", "b", "a"], "caption": ["x", "y", "z"]}), path)

    with pytest.raises(DatasetError, match="1 image ids occur more than once"):
        read_captions(str(path))


def test_ids_can_be_numbers_and_captions_can_be_missing(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image_id": [1, 2], "caption": ["x", None]}), path)

    assert read_captions(str(path)).to_pylist() == [
        {"image_id": "1", "caption": "x", "confidence": None, "familiarity": None, "is_existing": False},
        {"image_id": "2", "caption": "", "confidence": None, "familiarity": None, "is_existing": False},
    ]


def test_missing_captions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such captions"):
        read_captions(str(tmp_path / "nowhere"))


def test_captions_of_a_tar_are_scored_against_it_for_any_member_names(tmp_path: Path) -> None:
    names = [f"2023.05.{day:02}.{kind}" for day in range(3) for kind in ("jpg", "txt")]
    names += ["k.left.jpg", "k.right.jpg", "k.txt", "a.jpg", "a.txt", "a.jpg", "a.txt", "alone.jpg"]
    members = [
        (name, jpeg(number) if "jpg" in name else f"a dog {number}".encode()) for number, name in enumerate(names)
    ]
    tar = str(write_tar(tmp_path / "a.tar", members))
    build_manifest(tar, str(tmp_path / "manifest"))
    image_ids = pq.read_table(tmp_path / "manifest")["image_id"].to_pylist()

    report = evaluate_captions(write(tmp_path / "c.parquet", dict.fromkeys(image_ids, "a dog")), load_dataset(tar))

    assert report.protocol.num_images == len(image_ids) - 1 == 7
    assert "1 captioned image has no references" in report.protocol.notes


def test_captions_that_existed_before_are_not_scored(tmp_path: Path) -> None:
    references = tmp_path / "references.jsonl"
    references.write_text("".join(f'{{"file_name": "{name}.jpg", "caption": "a dog runs"}}\n' for name in "abc"))
    table = {"image_id": ["a.jpg", "b.jpg", "c.jpg"], "caption": ["a dog runs", "a cat", "a dog runs"]}
    sources = ["model", "existing", "model"]
    pq.write_table(pa.table(table | {"caption_source": sources}), tmp_path / "captions.parquet")
    dataset = load_dataset(str(references))

    report = evaluate_captions(str(tmp_path / "captions.parquet"), dataset, split="all")

    assert report.protocol.num_images == 2
    assert "1 image whose caption is not the model's" in report.protocol.notes
    pq.write_table(pa.table(table | {"caption_source": ["existing"] * 3}), tmp_path / "captions.parquet")
    with pytest.raises(DatasetError, match="no caption by a model to score"):
        evaluate_captions(str(tmp_path / "captions.parquet"), dataset, split="all")


def test_chinese_is_scored_by_characters_or_words_and_the_report_names_the_segmenter() -> None:
    captions = {"a.jpg": "一只狗在奔跑", "b.jpg": "女人在海水里"}
    references = {"a.jpg": ["一只狗在草地上奔跑。"], "b.jpg": ["穿着泳装的女人在海水里。"]}

    characters = evaluate(captions, references, tokenizer="unicode")
    words = evaluate(captions, references, tokenizer="jieba")

    assert words.scores.bleu_4 < characters.scores.bleu_4  # fewer n-grams of words match
    assert f"tokenizer jieba (rjieba {version('rjieba')})" in words.to_text()
    assert "rjieba" not in characters.to_text()
