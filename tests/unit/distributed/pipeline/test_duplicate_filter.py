from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from imcap_ray.distributed.pipeline.duplicate_filter import ImageIndex
from tests.unit.runs.test_captions_folder import HASHES, row, write_folder

Index = ImageIndex.__ray_metadata__.modified_class  # the class itself, without an actor around it


def test_only_the_first_of_identical_hashes_is_new(tmp_path: Path) -> None:
    index = Index(str(tmp_path), 10)

    assert index.are_repeated([0, 1, 2], [HASHES["x"], HASHES["y"], HASHES["x"]]) == [False, False, True]
    assert index.are_repeated([3, 4], [HASHES["y"], HASHES["z"]]) == [True, False]


def test_a_repeated_task_gets_the_same_answer(tmp_path: Path) -> None:
    index = Index(str(tmp_path), 10)
    first = index.are_repeated([5, 6], [HASHES["x"], HASHES["x"]])

    assert index.are_repeated([5, 6], [HASHES["x"], HASHES["x"]]) == first == [False, True]


def test_a_rebuilt_index_contains_written_images_and_no_waiting_ones(tmp_path: Path) -> None:
    write_folder(tmp_path, [row("a", content="x"), row("b", "duplicate", content="y"), row("c", "failed")])

    index = Index(str(tmp_path), 10)

    assert index.are_repeated([7, 8], [HASHES["x"], HASHES["y"]]) == [True, False]


def test_different_images_are_never_duplicates(tmp_path: Path) -> None:
    index = Index(str(tmp_path), 20_000)
    ids = list(range(20_000))

    assert not any(
        index.are_repeated(ids, [sha256(bytes([number % 256, number // 256])).hexdigest() for number in ids])
    )
