"""What a training says while it runs, what it starts a phase from, and what it refuses, without Ray."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import safetensors.torch
import torch

from imcap_ray import storage
from imcap_ray.config import load_recipe
from imcap_ray.data.columns import ColumnOptions
from imcap_ray.data.datasets import CaptionedImages, load_dataset
from imcap_ray.distributed import features, trainer
from imcap_ray.distributed.checkpoints import checkpoint_name
from imcap_ray.distributed.cluster import ClusterResources
from imcap_ray.distributed.features import FeatureCache
from imcap_ray.distributed.phase_start import start_of_phase
from imcap_ray.distributed.trainer import fix_validation, watch_room
from imcap_ray.distributed.training_plan import PreparedTraining, prepare_training
from imcap_ray.errors import ImcapError, InputError, OutputError
from imcap_ray.runs.checksums import write_checksums
from imcap_ray.runs.feature_folder import FeatureFolder
from imcap_ray.runs.progress_reporter import ProgressReporter
from imcap_ray.runs.training_run import read_validation_ids
from tests import small_data

RESOURCES = ClusterResources(is_local=False, cpus=6, gpus=2, nodes=1, physical_cores=6)


def test_a_cluster_that_is_too_small_is_told_once_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    there: dict[str, float] = {}
    lines: list[str] = []
    monkeypatch.setattr(ray, "cluster_resources", lambda: dict(there))
    look = watch_room((2, 8), 1.0, lines.append)

    for cpus, gpus in ((3, 2), (2, 2), (2, 1), (9, 8), (3, 1), (3, 2)):
        there.update(CPU=cpus, GPU=gpus)
        look()

    assert lines == [
        "waiting for room for 2 workers: 3 CPUs needed, 2 there",
        "waiting for room for 2 workers: 2 GPUs needed, 1 there",
    ]


# ---- what a phase starts from

PHASES = ("cross_entropy", "finetune", "self_critical")
TWICE = ("cross_entropy", "finetune", "finetune", "finetune_2", "finetune_2", "self_critical")


def write_epochs(work: str, *scores: float, phases: Sequence[str] = PHASES) -> list[dict[str, Any]]:
    """A checkpoint after an epoch of each phase, whose weights are its number; the history of the last."""
    history: list[dict[str, Any]] = []
    for epoch, (phase, score) in enumerate(zip(phases, scores, strict=False), start=1):
        history.append({"phase": phase, "epoch": epoch, "cider_d": score})
        folder = storage.join(work, "ray", checkpoint_name(epoch))
        weights = {"decoder.w": torch.tensor([float(epoch)])}
        if phase != "cross_entropy":
            weights["encoder.w"] = torch.tensor([float(epoch)])
        storage.write_bytes(storage.join(folder, "model.safetensors"), safetensors.torch.save(weights))
        storage.write_bytes(storage.join(folder, "history.json"), json.dumps(history).encode())
        write_checksums(folder, ["model.safetensors", "history.json"])
    return history


def start(phase: str, history: list[dict[str, Any]], work: str) -> tuple[dict[str, float], list[str]]:
    lines: list[str] = []
    recipe = load_recipe("lite2-finetuned", {"finetune.repetitions": 2, "self_critical.repetitions": 2})
    place = start_of_phase(phase, history, work, recipe=recipe, echo=lines.append)
    weights = safetensors.torch.load(storage.read_bytes(place)) if place else {}
    return {name: float(tensor) for name, tensor in weights.items()}, lines


def test_a_phase_starts_from_the_best_epoch_before_it(tmp_path: Path) -> None:
    history = write_epochs(str(tmp_path), 0.4, 0.2, 0.3)

    assert start("self_critical_2", history, str(tmp_path)) == (
        {"decoder.w": 1},
        ["self_critical_2 from epoch 1, CIDEr-D 0.400"],
    )


def test_fine_tuning_once_more_starts_where_it_first_did_and_their_mean_is_what_follows_starts_from(
    tmp_path: Path,
) -> None:
    work = str(tmp_path)
    start("finetune", write_epochs(work, 0.1, phases=TWICE), work)

    first, lines = start("finetune_2", write_epochs(work, 0.1, 0.5, 0.4, phases=TWICE), work)
    assert first == {"decoder.w": 1}
    assert lines == ["finetune ends with epoch 2, CIDEr-D 0.500; finetune_2 from where finetune started"]
    history = write_epochs(work, 0.1, 0.5, 0.4, 0.3, 0.2, phases=TWICE)
    storage.remove(storage.join(work, "ray", checkpoint_name(2)))  # as when later ones are better
    mean, lines = start("self_critical", history, work)
    assert mean == {"decoder.w": 3, "encoder.w": 3}, "of the second epoch and the fourth, the best of each"
    assert lines == ["finetune_2 ends with epoch 4, CIDEr-D 0.300; self_critical from the mean of 2 such"]
    history = write_epochs(work, 0.1, 0.5, 0.4, 0.3, 0.2, 0.6, phases=TWICE)
    assert start("self_critical", history, work) == (mean, [])


def test_fine_tuning_that_has_no_one_start_is_refused(tmp_path: Path) -> None:
    data = load_dataset(str(small_data.write_flickr8k(tmp_path / "flickr8k", num_train=4, num_validation=2)))
    recipe = load_recipe("lite2-finetuned", {"training.epochs": 0, "finetune.repetitions": 2})

    with pytest.raises(InputError, match=r"repetitions 2 must have one start, but training\.epochs is 0: give --start"):
        prepare_training(data, str(tmp_path / "model"), recipe=recipe, resources=RESOURCES)


def test_a_phase_that_has_begun_starts_from_where_it_started(tmp_path: Path) -> None:
    phases = ("cross_entropy", "self_critical", "self_critical_2")
    before = write_epochs(str(tmp_path), 0.3, 0.4, phases=phases)
    first, _ = start("self_critical_2", before, str(tmp_path))
    history = write_epochs(str(tmp_path), 0.3, 0.4, 0.5, phases=phases)

    assert start("self_critical_2", history, str(tmp_path)) == (first, [])
    assert first == {"decoder.w": 2, "encoder.w": 2}


@pytest.mark.parametrize("damage", ["gone", "cut short"])
def test_what_a_phase_started_from_is_made_anew_with_the_cnn_of_its_newest_checkpoint(
    tmp_path: Path, damage: str
) -> None:
    history = write_epochs(str(tmp_path), 0.5, 0.4, 0.3)
    place = tmp_path / "start_of_self_critical.safetensors"
    if damage == "cut short":
        place.write_bytes(b"half of ")

    weights, lines = start("self_critical", history, str(tmp_path))

    assert weights == {"decoder.w": 3, "encoder.w": 3}
    assert lines == [f"{place} was gone or damaged, and is made anew from epoch 3"]


def test_a_first_phase_starts_from_nothing_but_what_the_user_gave(tmp_path: Path) -> None:
    assert start("cross_entropy", [], str(tmp_path)) == ({}, [])
    assert start("cross_entropy", write_epochs(str(tmp_path), 0.1), str(tmp_path)) == ({}, [])


# ---- what is scored


@pytest.fixture
def images(tmp_path: Path) -> CaptionedImages:
    return load_dataset(str(small_data.write_flickr8k(tmp_path / "flickr8k", num_train=4, num_validation=5)))


def fix(data: CaptionedImages, work: Path, history: list[dict[str, Any]], *failed: int) -> list[str]:
    """The images that are scored when those of these numbers cannot be read."""
    failures = [
        {"image_id": f"{4 + number:04}_photo.jpg", "error_code": "missing", "error_message": "no such file"}
        for number in failed
    ]
    fix_validation(data, FeatureCache("", (1, 1, 1), 5, failures), str(work), history, echo=lambda line: None)
    return [image_id[:4] for image_id in read_validation_ids(str(work)) or []]


def test_validation_images_that_can_be_read_at_the_start_are_scored_in_all_epochs(
    images: CaptionedImages, tmp_path: Path
) -> None:
    history = [{"num_images": 4}]

    assert fix(images, tmp_path, [], 1) == ["0004", "0006", "0007", "0008"]
    assert fix(images, tmp_path, history, 1) == ["0004", "0006", "0007", "0008"]
    assert fix(images, tmp_path, history) == ["0004", "0006", "0007", "0008"], "one that has come back stays out"
    with pytest.raises(
        ImcapError,
        match=r"^2 validation images cannot be read \(0006_photo.jpg: no such file \(missing\); 0008_.*: the scores",
    ):
        fix(images, tmp_path, history, 1, 2, 4)


def test_a_training_of_a_version_that_recorded_no_validation_images_resumes_with_as_many(
    images: CaptionedImages, tmp_path: Path
) -> None:
    with pytest.raises(ImcapError, match="3 validation images can be read, but the epochs so far were scored on 5"):
        fix(images, tmp_path, [{"num_images": 5}], 1, 2)

    assert fix(images, tmp_path, [{"num_images": 5}]) == ["0004", "0005", "0006", "0007", "0008"]


# ---- what is refused


@pytest.fixture(scope="module")
def flickr8k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data.write_flickr8k(tmp_path_factory.mktemp("data") / "flickr8k", num_train=4, num_validation=2)


def prepare(data: Path, model: Path, **options: Any) -> PreparedTraining:
    recipe = load_recipe("lite2-attention", small_data.TINY_TRAINING)
    return prepare_training(load_dataset(str(data)), str(model), recipe=recipe, **{"resources": RESOURCES} | options)


@pytest.mark.parametrize("num_workers", [2, (1, 2)])
def test_two_workers_on_one_gpu_are_refused(flickr8k: Path, tmp_path: Path, num_workers: Any) -> None:
    with pytest.raises(InputError, match="--gpus-per-worker 0.5 would put several of 2 workers on one GPU"):
        prepare(flickr8k, tmp_path / "model", gpus_per_worker=0.5, num_workers=num_workers)


def test_a_part_of_a_gpu_is_for_one_worker(flickr8k: Path, tmp_path: Path) -> None:
    assert prepare(flickr8k, tmp_path / "model", gpus_per_worker=0.5).num_workers == 1
    assert prepare(flickr8k, tmp_path / "model").num_workers == RESOURCES.gpus


def test_a_training_that_was_killed_in_its_first_moment_begins_again(flickr8k: Path, tmp_path: Path) -> None:
    work = tmp_path / "model" / "_training"
    work.mkdir(parents=True)
    (work / "owner").write_text("0123456789abcdef")
    (work / ".settings.json.0123abcd").write_text('{"rec')
    (tmp_path / "model" / ".imcap.0123abcd").touch()  # a look for the folder

    prepare(flickr8k, tmp_path / "model")

    (work / "thesis.txt").write_text("all of it")
    with pytest.raises(OutputError, match="exists and is no training of imcap"):
        prepare(flickr8k, tmp_path / "model")


@pytest.mark.parametrize("content", ["[]", "null", '{"recipe": ', "\xff"])
def test_damaged_settings_are_named_with_what_to_do(flickr8k: Path, tmp_path: Path, content: str) -> None:
    place = tmp_path / "model" / "_training" / "settings.json"
    place.parent.mkdir(parents=True)
    place.write_bytes(content.encode("latin-1"))

    with pytest.raises(OutputError, match=r"settings\.json is damaged, .* bring the file back, or choose another"):
        prepare(flickr8k, place.parent.parent)


# ---- the columns of images, and the caches


@pytest.fixture(scope="module")
def two_columns(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table whose images an earlier version read from `thumbnail` (bytes) and this one from `image_path`."""
    folder = tmp_path_factory.mktemp("table")
    rows = []
    for number in range(4):
        (folder / f"{number}.jpg").write_bytes(small_data.jpeg(number))
        split = "train" if number < 3 else "validation"
        thumbnail = small_data.jpeg(number, width=20, height=20)
        rows.append({"image_id": str(number), "image_path": f"{number}.jpg", "thumbnail": thumbnail, "split": split})
    captions = pa.array([small_data.captions_of(number) for number in range(4)])
    pq.write_table(pa.Table.from_pylist(rows).append_column("captions", captions), folder / "t.parquet")
    return folder / "t.parquet"


def prepare_columns(data: Path, model: Path, column: str | None = None) -> PreparedTraining:
    recipe = load_recipe("lite2-attention", small_data.TINY_TRAINING)
    dataset = load_dataset(str(data), columns=ColumnOptions(image=column))
    return prepare_training(dataset, str(model), recipe=recipe, resources=RESOURCES)


def write_settings(model: Path, settings: dict[str, Any]) -> None:
    (model / "_training").mkdir(parents=True, exist_ok=True)
    (model / "_training" / "settings.json").write_text(json.dumps(settings))


def test_a_training_resumes_with_the_images_of_the_same_column_only(two_columns: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_settings(model, prepare_columns(two_columns, model).settings)

    prepare_columns(two_columns, model)
    prepare_columns(two_columns, model, "image_path")
    with pytest.raises(OutputError, match="a training with another image_columns"):
        prepare_columns(two_columns, model, "thumbnail")


def test_a_training_of_the_previous_version_resumes_with_its_column_only(two_columns: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    settings = prepare_columns(two_columns, model).settings
    del settings["image_columns"]
    write_settings(model, settings)

    with pytest.raises(
        OutputError, match=r"from column thumbnail, and would now read them from image_path: give --image-column thumb"
    ):
        prepare_columns(two_columns, model)
    prepare_columns(two_columns, model, "thumbnail")

    write_settings(model, settings | {"image_column": "image_path"})
    prepare_columns(two_columns, model)


def test_naming_the_column_that_is_chosen_anyway_finds_the_same_cache_and_both_splits_stay_in_use(
    two_columns: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uses: list[FeatureFolder] = []
    places: list[str] = []

    def complete(manifest: pa.Table, use: FeatureFolder, **options: Any) -> FeatureCache:
        assert use is uses[-1], "it is kept alive before it encodes"
        places.append(use.location)
        return FeatureCache(use.location, (1, 1, 1), manifest.num_rows, [], use=use)

    monkeypatch.setattr(features, "complete_cache", complete)
    for column in (None, "image_path", "thumbnail"):
        prepared = prepare_columns(two_columns, tmp_path / "model", column)
        trainer._cache(
            prepared.encoder,
            data=prepared.data,
            recipe=prepared.recipe,
            folder=str(tmp_path / "features"),
            resources=RESOURCES,
            gpus=0.0,
            training="",
            reporter=ProgressReporter(None),
            check=lambda: None,
            on_use=uses.append,
        )

    assert places[:2] == places[2:4]
    assert not {*places[:2]} & {*places[4:]}
    assert len(uses) == 6


def test_a_use_that_is_added_meanwhile_is_kept_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "HEARTBEAT_SECONDS", 0.05)
    uses: list[FeatureFolder] = []
    with trainer._alive(str(tmp_path), lambda: None, uses):
        use = FeatureFolder(str(tmp_path / "cache"))
        uses.append(use)
        deadline = time.monotonic() + 20
        while not (tmp_path / "cache" / "_imcap" / "users" / use.name).exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
