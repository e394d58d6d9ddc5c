from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from imcap_ray.config import Recipe, ResourcesConfig, TrainingRunConfig, load_recipe
from imcap_ray.data.datasets import load_dataset
from imcap_ray.distributed.cluster.connection import ClusterResources
from imcap_ray.distributed.training.trainer import TrainingResult, train
from imcap_ray.distributed.training.training_plan import load_data, prepare_training
from imcap_ray.errors import ClusterError, ImcapError, OutputError
from imcap_ray.models.captioner import Captioner
from imcap_ray.models.model_folder import read_model_folder
from imcap_ray.runs.lease import Lease
from imcap_ray.runs.progress_reporter import ProgressReporter
from imcap_ray.runs.training_run import VALIDATION_ADVICE
from tests import small_data

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:ray.*"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

SMALL = small_data.TINY_TRAINING | {
    "decoder.dropout": 0.0,
    "training.learning_rate": 1e-2,
    "training.warmup_steps": 0,
    "training.ema_decay": 0.0,
}


def small_recipe(**training: object) -> Recipe:
    return load_recipe("lite2-attention", SMALL | {f"training.{name}": value for name, value in training.items()})


@pytest.fixture
def tiny_flickr8k(tmp_path: Path) -> Path:
    return small_data.write_flickr8k(tmp_path / "flickr8k", num_train=12, num_validation=4)


class EpochReporter(ProgressReporter):
    """Calls a function after each epoch, and prints other lines."""

    def __init__(self, on_epoch: Callable[[str], None], write: Callable[[str], None] | None = None) -> None:
        super().__init__(write)
        self._on_epoch = on_epoch

    def report(self, line: str) -> None:
        if line.startswith("epoch "):
            self._on_epoch(line)
        else:
            super().report(line)


@pytest.fixture
def run(local_ray: ClusterResources, tiny_flickr8k: Path, tmp_path: Path) -> Callable[..., TrainingResult]:
    def run(
        name: str = "model",
        recipe: Recipe | None = None,
        *,
        reporter: ProgressReporter | None = None,
        num_workers: int | None = None,
        features: str = str(tmp_path / "features"),
        **options: Any,
    ) -> TrainingResult:
        config = make_config(tiny_flickr8k, tmp_path / name, recipe=recipe or small_recipe(epochs=2), **options)
        return train(
            config,
            ResourcesConfig(num_workers=num_workers, features=features),
            data=load_data(config),
            cluster=local_ray,
            reporter=reporter or ProgressReporter(None),
        )

    return run


def make_config(data: Path, model: Path, **options: Any) -> TrainingRunConfig:
    return TrainingRunConfig(data=str(data), model=str(model), **{"recipe_name": "small"} | options)


@pytest.mark.slow
def test_three_phases_with_two_workers_end_in_one_model_that_captions(
    run: Callable[..., TrainingResult], local_ray: ClusterResources, tiny_flickr8k: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(
        "lite2-attention",
        SMALL
        | {
            "training.epochs": 1,
            "finetune.epochs": 2,
            "finetune.repetitions": 2,
            "finetune.first_layer": "cnn.blocks.5",
            "self_critical.epochs": 2,
            "self_critical.repetitions": 2,
        },
    )

    result = run(recipe=recipe, num_workers=2)

    history = [json.loads(line) for line in (tmp_path / "model/_training/metrics.jsonl").read_text().splitlines()]
    twice = [phase for phase in ("finetune", "finetune_2", "self_critical", "self_critical_2") for _ in range(2)]
    assert [row["phase"] for row in history] == ["cross_entropy", *twice]
    assert [row["epoch"] for row in history] == list(range(1, 10))
    assert ["train_reward" in row for row in history] == [*5 * [False], *4 * [True]]
    assert result.num_epochs == 9
    folder = read_model_folder(tmp_path / "model")
    best = max(history, key=lambda row: (row["cider_d"], row["epoch"]))
    is_finetuned = best["phase"] != "cross_entropy"
    assert (folder.encoder_weights.source == "fine-tuned") == is_finetuned
    assert any(name.startswith("encoder.") for name in folder.tensors) == is_finetuned
    assert folder.metrics["validation"] == result.metrics == best
    assert folder.metrics["history"] == history
    assert result.metrics["num_images"] == len(load_dataset(str(tiny_flickr8k)).split("validation"))
    captioner = Captioner.load(tmp_path / "model")
    image = next(path for path in tiny_flickr8k.rglob("*.jpg") if path.stat().st_size)
    assert captioner.caption([image])[0] == captioner.caption([image.read_bytes()])[0]
    assert not [path for path in (tmp_path / "model").iterdir() if path.suffix in {".pt", ".pkl", ".pth", ".bin"}]
    again = run(recipe=recipe, num_workers=2)
    assert again.metrics == result.metrics


def test_a_training_continues_from_a_model_and_keeps_its_cnn(
    run: Callable[..., TrainingResult], local_ray: ClusterResources, tiny_flickr8k: Path, tmp_path: Path
) -> None:
    history = [{"epoch": epoch, "phase": "finetune", "cider_d": 0.1 * epoch} for epoch in range(1, 6)]
    small_data.write_model_folder(tmp_path / "model", metrics={"cider_d": 0.5, "history": history})
    folder = read_model_folder(tmp_path / "model")
    assert folder.preprocessing.image_size
    size = 2 * folder.preprocessing.image_size
    onward = load_recipe(
        "self-critical",
        {
            "training.batch_size": 4,
            "training.warmup_steps": 0,
            "training.ema_decay": 0.0,
            "self_critical.epochs": 1,
            "self_critical.learning_rate": 1e-2,
            "self_critical.temperature": 1.0,
            "preprocessing.image_size": size,
        },
    )
    run("onward", recipe=onward, recipe_name="self-critical", start_from=(str(tmp_path / "model"),))

    trained_on = read_model_folder(tmp_path / "onward")
    assert [row["epoch"] for row in trained_on.metrics["history"]] == [1, 2, 3, 4, 5, 1]
    assert trained_on.vocabulary.tokens == folder.vocabulary.tokens
    assert trained_on.decoder == replace(folder.decoder, dropout=onward.decoder.dropout)
    assert trained_on.preprocessing == replace(folder.preprocessing, image_size=size)
    changed = [name for name, tensor in trained_on.tensors.items() if not torch.equal(tensor, folder.tensors[name])]
    assert changed
    assert all(name.startswith("decoder.") for name in changed), "the CNN is unchanged"
    assert trained_on.tensors.keys() == folder.tensors.keys()
    config = make_config(
        tiny_flickr8k,
        tmp_path / "further",
        recipe=load_recipe("lite2-attention"),
        start_from=(str(tmp_path / "onward"),),
    )
    prepared = prepare_training(config, ResourcesConfig(), data=load_data(config), cluster=local_ray)
    assert prepared.recipe.preprocessing == trained_on.preprocessing, "a recipe without a size takes the model's"
    assert prepared.encoder.weights == trained_on.encoder_weights, "the same CNN has the same hash"
    with pytest.raises(OutputError, match="another .*start_from"):
        run("onward", recipe=onward, recipe_name="self-critical", start_from=("flickr8k-lite2",))


@pytest.mark.slow
def test_a_model_learns_to_caption_in_another_language(local_ray: ClusterResources, tmp_path: Path) -> None:
    sentence = "赤い犬が草の上を走る"
    rows = []
    for number in range(12):
        image = {"bytes": small_data.jpeg(number), "path": f"犬{number}.jpg"}
        split = "validation" if number < 3 else "train"
        rows.append({"image": image, "captions": [f"{sentence}。"], "split": split})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "犬.parquet", row_group_size=5)

    config = make_config(
        tmp_path / "犬.parquet",
        tmp_path / "モデル",
        recipe=load_recipe(
            "lite2-attention",
            SMALL
            | {
                "training.batch_size": 1,
                "training.epochs": 16,
                "training.patience": 0,  # every image has the same caption, and CIDEr-D is 0
                "finetune.epochs": 1,  # reads the photographs themselves
                "finetune.first_layer": "cnn.blocks.5",
            },
        ),
    )
    lines: list[str] = []
    train(config, ResourcesConfig(), data=load_data(config), cluster=local_ray, reporter=ProgressReporter(lines.append))

    assert [line for line in lines if line.startswith("tokenizer unicode: 100% of the letters")]
    [caption] = Captioner.load(tmp_path / "モデル").caption([small_data.jpeg(1)])
    assert caption.text == sentence
    assert read_model_folder(tmp_path / "モデル").metrics["validation"]["bleu_4"] == pytest.approx(1.0)
    assert (tmp_path / "モデル" / "README.md").read_text().count("`unicode`") == 2, "vocabulary and protocol"


def test_the_same_command_keeps_finished_work_and_another_command_is_refused(
    run: Callable[..., TrainingResult], tmp_path: Path
) -> None:
    first = run(seed=3)
    weights = (tmp_path / "model" / "model.safetensors").read_bytes()

    again = run(seed=3)
    with pytest.raises(OutputError, match=r"another training.batch_size \(.*, now 5\), seed \(3, now 4\): choose"):
        run(recipe=small_recipe(epochs=2, batch_size=5), seed=4)
    os.truncate(tmp_path / "model" / "_training" / "settings.json", 100)
    with pytest.raises(OutputError, match=r"settings\.json is corrupt"):
        run(seed=3)

    assert again.metrics == first.metrics
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == weights


@pytest.mark.slow
def test_a_finished_training_continues_with_more_epochs(run: Callable[..., TrainingResult], tmp_path: Path) -> None:
    metrics = tmp_path / "model" / "_training" / "metrics.jsonl"
    run(recipe=small_recipe(epochs=1, patience=0))
    first = metrics.read_text()

    result = run(recipe=small_recipe(epochs=3, patience=0))

    assert result.num_epochs == 3
    assert metrics.read_text().startswith(first)
    assert len(read_model_folder(tmp_path / "model").metrics["history"]) == 3


@pytest.mark.parametrize("phase", ["cross_entropy", pytest.param("finetune", marks=pytest.mark.slow)])
def test_a_model_knows_the_familiarity_of_images_by_the_features_of_its_own_cnn(
    local_ray: ClusterResources, tmp_path: Path, phase: str
) -> None:
    data = small_data.write_flickr8k(tmp_path / "flickr8k", num_train=40, num_validation=24)
    only_finetune = {
        "finetune.epochs": 1,
        "finetune.first_layer": "cnn.blocks.5",
        "finetune.encoder_learning_rate": 2e-3,
    }
    epochs = {"training.epochs": 1} if phase == "cross_entropy" else {"training.epochs": 0} | only_finetune
    recipe = load_recipe("lite2-attention", SMALL | epochs)
    config = make_config(data, tmp_path / "model", recipe=recipe)
    resources = ResourcesConfig(features=str(tmp_path / "features"))

    train(config, resources, data=load_data(config), cluster=local_ray, reporter=ProgressReporter(None))

    captioner = Captioner.load(tmp_path / "model")
    [familiarity] = captioner.familiarity
    names = (data / "Flickr_8k.devImages.txt").read_text().split()
    pixels = np.stack([captioner.read_pixels(data / "Flicker8k_Dataset" / name) for name in names])
    values = familiarity.of(captioner.encode(pixels).mean(1).numpy())
    # Each validation image has a rank of its own, apart from the rounding of the stored weights.
    assert np.sort(values) == pytest.approx(np.arange(1, 25) / 25, abs=0.1)
    assert not (tmp_path / "model" / "_training" / "familiarity").exists()


def test_a_training_that_lost_its_lease_stops_and_writes_no_more(
    run: Callable[..., TrainingResult], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    metrics, num_epochs = model / "_training" / "metrics.jsonl", []

    def begin_another(line: str) -> None:
        if line.startswith("epoch 1:"):
            Lease.acquire(str(model / "_training"))
            num_epochs.append(len(metrics.read_text().splitlines()))

    with pytest.raises(ImcapError, match=f"another run has taken over {model}: this one must not write there"):
        run(recipe=small_recipe(epochs=1000, patience=0), num_workers=2, reporter=EpochReporter(begin_another))

    assert not (model / "config.json").exists()
    assert len(metrics.read_text().splitlines()) <= num_epochs[0] + 1  # one may have been on its way


def epochs_of(model: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (model / "_training" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_images_that_disappear_between_phases_are_named_and_validation_does_not_shrink(
    run: Callable[..., TrainingResult], tiny_flickr8k: Path, tmp_path: Path
) -> None:
    options = SMALL | {"training.epochs": 1, "finetune.epochs": 1, "finetune.first_layer": "cnn.blocks.5"}
    recipe = load_recipe("lite2-attention", options)
    images, away = tiny_flickr8k / "Flicker8k_Dataset", tmp_path / "away"
    away.mkdir()
    lines: list[str] = []

    def take_away(line: str) -> None:
        for number in (5, 12, 13):  # one to learn from, and two of the four that are scored
            (images / f"{number:04}_photo.jpg").rename(away / f"{number:04}_photo.jpg")

    with pytest.raises(
        ImcapError, match=r"2 validation images cannot be read \(0012_photo.jpg: .*missing.*0013"
    ) as found:
        run(recipe=recipe, reporter=EpochReporter(take_away, lines.append))
    assert VALIDATION_ADVICE in str(found.value)
    assert any(
        re.match(r"finetune: 1 training image cannot be read \(0005_photo.jpg: .*left out", line) for line in lines
    )
    assert [row["phase"] for row in epochs_of(tmp_path / "model")] == ["cross_entropy"]

    for number in (12, 13):
        (away / f"{number:04}_photo.jpg").rename(images / f"{number:04}_photo.jpg")
    run(recipe=recipe)
    assert [row["num_images"] for row in epochs_of(tmp_path / "model")] == [4, 4]


def test_a_non_finite_loss_ends_the_training_with_what_to_lower(
    run: Callable[..., TrainingResult], tmp_path: Path
) -> None:
    recipe = small_recipe(epochs=3, learning_rate=1e38)

    with pytest.raises(
        ImcapError, match=r"^the loss is not finite at step 2 of epoch 1; lower training\.learning_rate"
    ):
        run(recipe=recipe, num_workers=2)

    assert not (tmp_path / "model" / "config.json").exists()
    assert not list((tmp_path / "model" / "_training").rglob("epoch_*"))


def test_a_feature_folder_can_be_relative_and_changed_images_are_encoded_again(
    run: Callable[..., TrainingResult], tiny_flickr8k: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines: list[str] = []
    first = run("first", recipe=small_recipe(epochs=1), features="cache")
    for number in range(12):
        (tiny_flickr8k / "Flicker8k_Dataset" / f"{number:04}_photo.jpg").write_bytes(small_data.jpeg(100 + number))

    second = run("second", recipe=small_recipe(epochs=1), features="cache", reporter=ProgressReporter(lines.append))

    assert list((tmp_path / "cache").glob("*/*.parquet"))
    assert second.metrics["train_loss"] != first.metrics["train_loss"]
    assert "train images: 12 images changed since encoding: encoded again" in lines


def test_more_workers_than_the_cluster_has_room_for_are_refused_immediately(run: Callable[..., TrainingResult]) -> None:
    with pytest.raises(ClusterError, match="--num-workers 90 needs 91 CPUs"):
        run(recipe=small_recipe(batch_size=90), num_workers=90)
