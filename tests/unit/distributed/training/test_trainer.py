"""Output of a training, start weights of its phases, and the arguments it refuses; without Ray."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from imcap_ray import storage
from imcap_ray.config import Recipe, ResourcesConfig, TrainingRunConfig, load_recipe
from imcap_ray.data.datasets import CaptionedImages, load_dataset
from imcap_ray.data.parquet_files import write_table
from imcap_ray.distributed import features
from imcap_ray.distributed.cluster.connection import ClusterResources
from imcap_ray.distributed.features import FeatureCache
from imcap_ray.distributed.training.checkpoints import checkpoint_name
from imcap_ray.distributed.training.phase_start import start_of_phase, with_new_words
from imcap_ray.distributed.training.trainer import _Training
from imcap_ray.distributed.training.training_inputs import feature_folder, fix_validation
from imcap_ray.distributed.training.training_plan import PreparedTraining, Workers, load_data, prepare_training
from imcap_ray.distributed.training.worker_group import watch_room
from imcap_ray.errors import DatasetError, ImcapError, InputError, OutputError
from imcap_ray.models.decoders import build_decoder
from imcap_ray.models.model_folder import read_model_folder
from imcap_ray.models.model_weights import select_tensors
from imcap_ray.runs.checksums import write_checksums
from imcap_ray.runs.feature_folder import FeatureFolder
from imcap_ray.runs.progress_reporter import ProgressReporter
from imcap_ray.runs.training_run import EpochMetrics, read_validation_ids, write_metrics
from imcap_ray.text.tokenizers import tokenize
from imcap_ray.text.vocabulary import Vocabulary
from tests import small_data

CLUSTER = ClusterResources(is_local=False, cpus=6, gpus=2, nodes=1, physical_cores=6)


def test_a_cluster_that_is_too_small_is_reported_once_per_occurrence() -> None:
    available: dict[str, float] = {}
    lines: list[str] = []
    workers = Workers(min_count=2, max_count=8, is_elastic=True, gpus=1.0)
    check = watch_room(workers, lines.append, get_resources=lambda: available)

    for cpus, gpus in ((3, 2), (2, 2), (2, 1), (9, 8), (3, 1), (3, 2)):
        available.update(CPU=cpus, GPU=gpus)
        check()

    assert lines == [
        "waiting for room for 2 workers: 3 CPUs needed, 2 there",
        "waiting for room for 2 workers: 2 GPUs needed, 1 there",
    ]


# ---- start weights of phases


@pytest.mark.parametrize("name", ["attention", "lstm"])
def test_a_model_to_start_from_keeps_its_words_and_learns_those_of_the_data(name: str, tmp_path: Path) -> None:
    flickr8k = small_data.write_flickr8k(tmp_path / "flickr8k", num_train=4, num_validation=2)
    start_model = read_model_folder(small_data.write_model_folder(tmp_path / "start", decoder=name))
    with (flickr8k / "Flickr8k.token.txt").open("a") as file:
        file.writelines(f"0000_photo.jpg#{number}\ta viaduct in the grass\n" for number in range(5, 9))
    recipe = load_recipe("lite2-attention", {"vocabulary.min_count": 4, "decoder.name": name})

    prepared = prepare(flickr8k, tmp_path / "model", recipe=recipe, start_from=(start_model.location,))
    decoder = build_decoder(
        prepared.recipe.decoder,
        num_channels=prepared.encoder.num_channels,
        vocabulary_size=len(prepared.vocabulary),
    )
    weights = with_new_words(start_model.tensors, decoder)

    assert prepared.vocabulary.tokens[: len(start_model.vocabulary)] == start_model.vocabulary.tokens
    assert "viaduct" in prepared.vocabulary.tokens
    decoder.load_state_dict(select_tensors("decoder.", weights))
    assert weights.keys() == start_model.tensors.keys()
    assert all(torch.equal(weights[name][: len(old)], old) for name, old in start_model.tensors.items() if old.ndim)


def test_a_training_that_was_begun_with_a_tokenizer_resumes_with_it(tmp_path: Path) -> None:
    flickr8k = small_data.write_flickr8k(tmp_path / "flickr8k", num_train=4, num_validation=2)
    token_file = flickr8k / "Flickr8k.token.txt"
    token_file.write_text(re.sub(r"\t.*", "\t\u7ea2\u72d7", token_file.read_text()))
    begun(flickr8k, tmp_path / "before", ("cross_entropy", 0.1), **{"vocabulary.tokenizer": "ptb"})

    new = prepare(flickr8k, tmp_path / "new")
    before = prepare(flickr8k, tmp_path / "before", recipe=load_recipe("lite2-attention", small_data.TINY_TRAINING))

    assert (new.recipe.vocabulary.tokenizer, before.recipe.vocabulary.tokenizer) == ("unicode", "ptb")
    assert new.tokenizer_note.startswith("tokenizer unicode: 100% of the letters are of scripts without spaces")
    assert before.tokenizer_note == ""


@pytest.mark.parametrize(("caption", "tokenizer"), [("a dog", "ptb"), ("\u7ea2\u72d7", "unicode")])
def test_a_model_to_start_from_keeps_its_tokenizer_unless_the_captions_are_in_another_language(
    tmp_path: Path, caption: str, tokenizer: str
) -> None:
    flickr8k = small_data.write_flickr8k(tmp_path / "flickr8k", num_train=4, num_validation=2)
    token_file = flickr8k / "Flickr8k.token.txt"
    token_file.write_text(re.sub(r"\t.*", f"\t{caption}", token_file.read_text()))
    start = str(small_data.write_model_folder(tmp_path / "start"))

    prepared = prepare(flickr8k, tmp_path / "model", start_from=(start,))

    assert prepared.recipe.vocabulary.tokenizer == prepared.vocabulary.tokenizer == tokenizer
    assert set(tokenize(caption, tokenizer)) <= set(prepared.vocabulary.tokens)


PHASES = ("cross_entropy", "finetune", "self_critical")
TWICE = ("cross_entropy", "finetune", "finetune", "finetune_2", "finetune_2", "self_critical")


def write_epochs(work: str, *scores: float, phases: Sequence[str] = PHASES) -> list[dict[str, Any]]:
    """Write a checkpoint after an epoch of each phase, whose weights are its number; return the last history."""
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
    place = start_of_phase(phase, history, work, recipe=recipe, report=lines.append)
    weights = safetensors.torch.load(storage.read_bytes(place)) if place else {}
    return {name: float(tensor) for name, tensor in weights.items()}, lines


def test_a_phase_starts_from_the_best_epoch_before_it(tmp_path: Path) -> None:
    history = write_epochs(str(tmp_path), 0.4, 0.2, 0.3)

    weights, [line] = start("self_critical_2", history, str(tmp_path))
    assert weights == {"decoder.w": 1}
    assert "self_critical_2" in line and "epoch 1, CIDEr-D 0.400" in line


def test_repeated_fine_tuning_restarts_from_the_same_epoch_and_the_next_phase_starts_from_the_mean(
    tmp_path: Path,
) -> None:
    work = str(tmp_path)
    start("finetune", write_epochs(work, 0.1, phases=TWICE), work)

    first, lines = start("finetune_2", write_epochs(work, 0.1, 0.5, 0.4, phases=TWICE), work)
    assert first == {"decoder.w": 1}
    assert len(lines) == 1 and "epoch 2, CIDEr-D 0.500" in lines[0]
    history = write_epochs(work, 0.1, 0.5, 0.4, 0.3, 0.2, phases=TWICE)
    storage.remove(storage.join(work, "ray", checkpoint_name(2)))  # as when later ones are better
    mean, lines = start("self_critical", history, work)
    assert mean == {"decoder.w": 3, "encoder.w": 3}, "the mean of epochs two and four, the best of each"
    assert len(lines) == 1 and "epoch 4, CIDEr-D 0.300" in lines[0]
    history = write_epochs(work, 0.1, 0.5, 0.4, 0.3, 0.2, 0.6, phases=TWICE)
    assert start("self_critical", history, work) == (mean, [])


def test_fine_tuning_without_a_unique_start_is_refused(tmp_path: Path) -> None:
    data = load_dataset(str(small_data.write_flickr8k(tmp_path / "flickr8k", num_train=4, num_validation=2)))
    recipe = load_recipe("lite2-finetuned", {"training.epochs": 0, "finetune.repetitions": 2})

    with pytest.raises(InputError, match=r"finetune\.repetitions 2 .* training\.epochs is 0: give --start"):
        prepare(data, tmp_path / "model", recipe=recipe)


def test_a_resumed_phase_starts_from_the_same_weights_again(tmp_path: Path) -> None:
    phases = ("cross_entropy", "self_critical", "self_critical_2")
    before = write_epochs(str(tmp_path), 0.3, 0.4, phases=phases)
    first, _ = start("self_critical_2", before, str(tmp_path))
    history = write_epochs(str(tmp_path), 0.3, 0.4, 0.5, phases=phases)

    assert start("self_critical_2", history, str(tmp_path)) == (first, [])
    assert first == {"decoder.w": 2, "encoder.w": 2}


@pytest.mark.parametrize("damage", ["gone", "cut short"])
def test_lost_start_weights_are_restored_with_the_cnn_of_the_newest_checkpoint(tmp_path: Path, damage: str) -> None:
    history = write_epochs(str(tmp_path), 0.5, 0.4, 0.3)
    place = tmp_path / "start_of_self_critical.safetensors"
    if damage == "cut short":
        place.write_bytes(b"half of ")

    weights, lines = start("self_critical", history, str(tmp_path))

    assert weights == {"decoder.w": 3, "encoder.w": 3}
    assert len(lines) == 1 and str(place) in lines[0] and "epoch 3" in lines[0]


def test_a_first_phase_starts_only_from_weights_given_by_the_user(tmp_path: Path) -> None:
    assert start("cross_entropy", [], str(tmp_path)) == ({}, [])
    assert start("cross_entropy", write_epochs(str(tmp_path), 0.1), str(tmp_path)) == ({}, [])


# ---- validation images


@pytest.fixture
def images(tmp_path: Path) -> CaptionedImages:
    return load_dataset(str(small_data.write_flickr8k(tmp_path / "flickr8k", num_train=4, num_validation=5)))


def fix(data: CaptionedImages, work: Path, history: list[dict[str, Any]], *failed: int) -> list[str]:
    """Return the images that are scored if those of these numbers cannot be read."""
    failures = [
        {"image_id": f"{4 + number:04}_photo.jpg", "error_code": "missing", "error_message": "no such file"}
        for number in failed
    ]
    fix_validation(data, FeatureCache("", (1, 1, 1), 5, failures), str(work), history, report=lambda line: None)
    return [image_id[:4] for image_id in read_validation_ids(str(work)) or []]


def test_validation_images_readable_at_the_start_are_scored_in_all_epochs(
    images: CaptionedImages, tmp_path: Path
) -> None:
    history = [{"num_images": 4}]

    assert fix(images, tmp_path, [], 1) == ["0004", "0006", "0007", "0008"]
    assert fix(images, tmp_path, history, 1) == ["0004", "0006", "0007", "0008"]
    assert fix(images, tmp_path, history) == ["0004", "0006", "0007", "0008"], (
        "an image that is available again stays excluded"
    )
    with pytest.raises(
        ImcapError,
        match=r"^2 validation images cannot be read \(0006_photo.jpg: no such file \(missing\); 0008_.*: all epochs",
    ):
        fix(images, tmp_path, history, 1, 2, 4)


def test_a_training_of_a_version_without_recorded_validation_images_resumes_with_the_same_number(
    images: CaptionedImages, tmp_path: Path
) -> None:
    with pytest.raises(ImcapError, match="3 validation images can be read, but the epochs so far were scored on 5"):
        fix(images, tmp_path, [{"num_images": 5}], 1, 2)

    assert fix(images, tmp_path, [{"num_images": 5}]) == ["0004", "0005", "0006", "0007", "0008"]


# ---- refused arguments


@pytest.fixture(scope="module")
def flickr8k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data.write_flickr8k(tmp_path_factory.mktemp("data") / "flickr8k", num_train=4, num_validation=2)


def prepare(
    data: Path | CaptionedImages,
    model: Path,
    *,
    recipe: Recipe | None = None,
    column: str | None = None,
    features: Path | None = None,
    start_from: tuple[str, ...] = (),
    **resources: Any,
) -> PreparedTraining:
    location = data.location if isinstance(data, CaptionedImages) else str(data)
    config = TrainingRunConfig(
        data=location,
        model=str(model),
        recipe=recipe or load_recipe("lite2-attention", small_data.TINY_TRAINING),
        image_column=column,
        start_from=start_from,
    )
    options = ResourcesConfig(features=str(features) if features else None, **resources)
    return prepare_training(config, options, data=load_data(config), cluster=CLUSTER)


@pytest.mark.parametrize("num_workers", [2, (1, 2)])
def test_two_workers_on_one_gpu_are_refused(flickr8k: Path, tmp_path: Path, num_workers: Any) -> None:
    with pytest.raises(InputError, match="--gpus-per-worker 0.5 would put several of 2 workers on one GPU"):
        prepare(flickr8k, tmp_path / "model", gpus_per_worker=0.5, num_workers=num_workers)


def test_a_fractional_gpu_is_allowed_for_one_worker(flickr8k: Path, tmp_path: Path) -> None:
    assert prepare(flickr8k, tmp_path / "model", gpus_per_worker=0.5).workers.max_count == 1
    assert prepare(flickr8k, tmp_path / "model").workers.max_count == CLUSTER.gpus


def test_a_training_killed_right_after_its_start_begins_again(flickr8k: Path, tmp_path: Path) -> None:
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
def test_the_error_for_corrupt_settings_names_them_and_a_remedy(flickr8k: Path, tmp_path: Path, content: str) -> None:
    place = tmp_path / "model" / "_training" / "settings.json"
    place.parent.mkdir(parents=True)
    place.write_bytes(content.encode("latin-1"))

    with pytest.raises(OutputError, match=r"settings\.json is corrupt, .* choose another"):
        prepare(flickr8k, place.parent.parent)


def begun(data: Path, model: Path, *epochs: tuple[str, float], **settings: Any) -> Recipe:
    """Write what a training with these epochs, as pairs of phase and score, leaves; return its recipe."""
    recipe = load_recipe("lite2-attention", small_data.TINY_TRAINING | settings)
    write_settings(model, prepare(data, model, recipe=recipe).settings)
    history = [
        {"epoch": number, "phase": phase, "cider_d": score, "seconds": 1.0}
        for number, (phase, score) in enumerate(epochs, start=1)
    ]
    write_metrics(str(model / "_training"), cast("list[EpochMetrics]", history))
    return recipe


def longer(recipe: Recipe, **settings: int) -> Recipe:
    return replace(recipe, training=replace(recipe.training, **settings))


@pytest.mark.parametrize("num_done", [0, 1, 2])
def test_a_training_may_get_more_epochs_and_nothing_less(flickr8k: Path, tmp_path: Path, num_done: int) -> None:
    done = [("cross_entropy", 0.1 * number) for number in range(num_done)]
    recipe = begun(flickr8k, tmp_path / "model", *done, **{"training.epochs": 2})
    (tmp_path / "model" / "config.json").touch()

    plan = prepare(flickr8k, tmp_path / "model", recipe=longer(recipe, epochs=5)).plan()

    assert (plan.num_epochs, plan.num_epochs_done) == ({"cross_entropy": 5}, num_done)
    with pytest.raises(OutputError, match=r"another training.epochs \(2, now 1\): choose another folder"):
        prepare(flickr8k, tmp_path / "model", recipe=longer(recipe, epochs=1))
    with pytest.raises(OutputError, match=r"another training.batch_size \(\d+, now 3\): choose another folder"):
        prepare(flickr8k, tmp_path / "model", recipe=longer(recipe, epochs=5, batch_size=3))


def test_a_phase_that_is_over_gets_no_more_epochs(flickr8k: Path, tmp_path: Path) -> None:
    settings = {"training.epochs": 1, "finetune.epochs": 2, "finetune.first_layer": "cnn.blocks.5"}
    done = [("cross_entropy", 0.1), ("finetune", 0.2)]
    recipe = begun(flickr8k, tmp_path / "model", *done, **settings)

    prepare(flickr8k, tmp_path / "model", recipe=replace(recipe, finetune=replace(recipe.finetune, epochs=9)))
    with pytest.raises(OutputError, match=r"training.epochs \(1, now 2\) comes too late, because the finetune phase"):
        prepare(flickr8k, tmp_path / "model", recipe=longer(recipe, epochs=2))


def test_more_epochs_need_more_patience_if_the_score_no_longer_improved(flickr8k: Path, tmp_path: Path) -> None:
    done = [("cross_entropy", score) for score in (0.3, 0.2, 0.1)]
    recipe = begun(flickr8k, tmp_path / "model", *done, **{"training.epochs": 9, "training.patience": 2})

    with pytest.raises(OutputError, match=r"stopped after 3 epochs without a better score: set training.patience=0"):
        prepare(flickr8k, tmp_path / "model", recipe=longer(recipe, epochs=20))
    prepare(flickr8k, tmp_path / "model", recipe=longer(recipe, epochs=20, patience=0))
    prepare(flickr8k, tmp_path / "model", recipe=longer(recipe, patience=4))
    with pytest.raises(OutputError, match=r"another training.patience \(2, now 1\)"):
        prepare(flickr8k, tmp_path / "model", recipe=longer(recipe, patience=1))


def test_a_training_begun_before_a_setting_existed_resumes_with_its_default(flickr8k: Path, tmp_path: Path) -> None:
    recipe = begun(flickr8k, tmp_path / "model", ("cross_entropy", 0.1))
    location = tmp_path / "model" / "_training" / "settings.json"
    settings = json.loads(location.read_text())
    del settings["recipe"]["self_critical"]["bleu_weight"]
    location.write_text(json.dumps(settings))

    prepare(flickr8k, tmp_path / "model", recipe=recipe)
    with pytest.raises(OutputError, match=r"another training.batch_size \(\d+, now 3\): choose another folder"):
        prepare(flickr8k, tmp_path / "model", recipe=longer(recipe, batch_size=3))

    settings["recipe"]["training"]["forgotten"] = 1
    location.write_text(json.dumps(settings))
    with pytest.raises(OutputError, match=r"another training.forgotten \(1, now none\): choose"):
        prepare(flickr8k, tmp_path / "model", recipe=recipe)


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


def write_settings(model: Path, settings: dict[str, Any]) -> None:
    (model / "_training").mkdir(parents=True, exist_ok=True)
    (model / "_training" / "settings.json").write_text(json.dumps(settings))


def test_a_training_resumes_only_with_the_same_image_column(two_columns: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_settings(model, prepare(two_columns, model).settings)

    prepare(two_columns, model)
    prepare(two_columns, model, column="image_path")
    with pytest.raises(OutputError, match=r"with another image_columns \(.*image_path.*, now .*thumbnail.*\): choose"):
        prepare(two_columns, model, column="thumbnail")


def test_a_training_of_the_previous_version_resumes_only_with_its_column(two_columns: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    settings = prepare(two_columns, model).settings
    del settings["image_columns"]
    write_settings(model, settings)

    with pytest.raises(
        OutputError, match=r"from column thumbnail, and would now read them from image_path: give --image-column thumb"
    ):
        prepare(two_columns, model)
    prepare(two_columns, model, column="thumbnail")

    write_settings(model, settings | {"image_column": "image_path"})
    prepare(two_columns, model)


def test_naming_the_default_column_uses_the_same_cache(two_columns: Path, tmp_path: Path) -> None:
    by_default, named, other = (
        {
            feature_folder(prepare(two_columns, tmp_path / "model", column=column), split).location
            for split in ("train", "validation")
        }
        for column in (None, "image_path", "thumbnail")
    )

    assert by_default == named
    assert len(by_default | other) == 4


def test_features_are_next_to_the_model_or_in_the_given_folder(flickr8k: Path, tmp_path: Path) -> None:
    assert prepare(flickr8k, tmp_path / "runs" / "model").features == str(tmp_path / "runs" / "_features")
    assert prepare(flickr8k, tmp_path / "model", features=tmp_path / "mine").features == str(tmp_path / "mine")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="--features must be a folder, got a file"):
        prepare(flickr8k, tmp_path / "model", features=tmp_path / "file")


def test_start_weights_are_not_replaced_by_weights_that_cannot_be_read(tmp_path: Path) -> None:
    history = write_epochs(str(tmp_path), 0.5, 0.4, 0.3)
    start_file = tmp_path / "start_of_self_critical.safetensors"
    start_file.write_bytes(b"half of ")
    newest = storage.join(str(tmp_path), "ray", checkpoint_name(3))
    storage.write_bytes(storage.join(newest, "model.safetensors"), b"no tensors")
    write_checksums(newest, ["model.safetensors", "history.json"])

    with pytest.raises(ImcapError, match=rf"{newest}/model\.safetensors is missing or corrupt"):
        start("self_critical", history, str(tmp_path))
    assert start_file.read_bytes() == b"half of "


def test_a_training_uses_both_feature_folders_before_it_encodes_and_until_it_ends(
    flickr8k: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = _Training.begin(prepare(flickr8k, tmp_path / "model"), CLUSTER, ProgressReporter(lambda line: None))
    in_use_when_encoding: list[list[str]] = []

    def complete(manifest: pa.Table, use: FeatureFolder, **options: Any) -> FeatureCache:
        """Record the folders in use when a split would be encoded."""
        assert use is training.feature_folders[-1], "it is kept alive before it encodes"
        in_use_when_encoding.append(in_use(training.prepared.features))
        return FeatureCache(use.location, (1, 1, 1), manifest.num_rows, [], use=use)

    monkeypatch.setattr(features, "complete_cache", complete)

    caches = training.cache_features()

    train, validation = (caches[split].folder for split in ("train", "validation"))
    assert in_use_when_encoding == [[train], sorted([train, validation])]
    assert in_use(training.prepared.features) == sorted([train, validation])
    training.leave()
    assert in_use(training.prepared.features) == []


def test_a_training_that_resumes_keeps_the_vocabulary_of_its_weights(flickr8k: Path, tmp_path: Path) -> None:
    prepared = prepare(flickr8k, tmp_path / "model")
    write_epochs(prepared.work, 0.5)
    earlier = Vocabulary(["'stop", "dog"])
    storage.write_bytes(storage.join(prepared.work, "vocabulary.json"), earlier.to_json().encode())

    training = _Training.begin(prepared, CLUSTER, ProgressReporter(None))

    assert training.prepared.vocabulary.tokens == earlier.tokens != prepared.vocabulary.tokens


# ---- unusable data


def test_a_training_refuses_data_that_check_calls_unusable(tmp_path: Path) -> None:
    flickr8k = small_data.write_flickr8k(tmp_path / "data", num_train=4, num_validation=2)
    first, second = sorted((flickr8k / "Flicker8k_Dataset").iterdir())[:2]
    config = TrainingRunConfig(data=str(flickr8k), model=str(tmp_path / "model"), recipe=Recipe())
    assert load_data(config, decode=True).table.num_rows == 8
    first.unlink()

    with pytest.raises(DatasetError, match=r"unusable for training.*: 2 captioned images have no file .*0000_photo"):
        load_data(config)
    assert load_data(replace(config, allow_unusable=True)).table.num_rows == 8
    first.write_bytes(small_data.jpeg(1))
    second.write_bytes(b"no image")
    assert load_data(config).table.num_rows == 8, "only the dry run reads every image before the training does"
    with pytest.raises(DatasetError, match="1 image cannot be read"):
        load_data(config, decode=True)


def test_a_training_that_has_finished_an_epoch_resumes_although_images_are_missing(tmp_path: Path) -> None:
    flickr8k = small_data.write_flickr8k(tmp_path / "data", num_train=4, num_validation=2)
    for path in (flickr8k / "Flicker8k_Dataset").iterdir():
        path.unlink()
    config = TrainingRunConfig(data=str(flickr8k), model=str(tmp_path / "model"), recipe=Recipe())
    (tmp_path / "model" / "_training").mkdir(parents=True)
    write_metrics(str(tmp_path / "model" / "_training"), [{"epoch": 1, "cider_d": 0.5}])

    assert load_data(config).table.num_rows == 8


def test_a_training_keeps_the_splits_with_which_it_began(tmp_path: Path) -> None:
    """Those of an earlier version are by the names alone, without regard to near duplicates."""
    for number in range(60):
        (tmp_path / "data" / f"{number}.jpg").parent.mkdir(exist_ok=True)
        (tmp_path / "data" / f"{number}.jpg").write_bytes(small_data.jpeg(number // 2))
        (tmp_path / "data" / f"{number}.txt").write_text("a dog runs on the grass")
    config = TrainingRunConfig(data=str(tmp_path / "data"), model=str(tmp_path / "model"), recipe=Recipe())
    by_name = load_dataset(config.data).table

    new = load_data(config).table
    write_table(str(tmp_path / "model" / "_training" / "captions.parquet"), by_name)
    resumed = load_data(replace(config, allow_unusable=True)).table

    assert new["split"].to_pylist() != by_name["split"].to_pylist()
    assert resumed.equals(by_name)


@pytest.mark.parametrize("allow_unusable", [False, True])
def test_images_that_cannot_be_read_count_neither_as_usable_nor_as_trained_on(
    flickr8k: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allow_unusable: bool
) -> None:
    def complete(manifest: pa.Table, use: FeatureFolder, **options: Any) -> FeatureCache:
        """A cache in which the first image of the split could not be read."""
        failure = {"image_id": manifest["image_id"][0].as_py(), "error_code": "truncated", "error_message": "half"}
        return FeatureCache(use.location, (1, 1, 1), manifest.num_rows, [failure], use=use)

    monkeypatch.setattr(features, "complete_cache", complete)
    lines: list[str] = []
    prepared = prepare(flickr8k, tmp_path / "model")
    prepared = replace(prepared, config=replace(prepared.config, allow_unusable=allow_unusable))
    training = _Training.begin(prepared, CLUSTER, ProgressReporter(lines.append))

    if not allow_unusable:
        with pytest.raises(DatasetError, match=r"2 of 6 images .* cannot be read, more than 10%: --allow-unusable"):
            training.cache_features()
        return
    training.write_inputs(training.cache_features())
    assert re.search(r"on 3 images,", lines[-1])


def in_use(folder: str) -> list[str]:
    """The folders of features below this one that have a live user."""
    folders = []
    for path in Path(folder).iterdir():
        other = FeatureFolder(str(path))
        other.beat()
        folders += [other.location] if other.live_others() else []
        other.leave()
    return sorted(folders)
