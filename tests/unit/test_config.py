"""Settings round-trip, and a value out of range is refused with its name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from imcap_ray.config import (
    DEFAULT_RECIPE,
    DecoderConfig,
    EncoderConfig,
    FinetuneConfig,
    PreprocessingConfig,
    Recipe,
    SearchConfig,
    SelfCriticalConfig,
    TrainingConfig,
    VocabularyConfig,
    from_mapping,
    load_recipe,
    parse_override,
    recipe_names,
    to_mapping,
)
from imcap_ray.errors import ConfigError

SECTIONS = [
    EncoderConfig,
    PreprocessingConfig,
    VocabularyConfig,
    DecoderConfig,
    SearchConfig,
    TrainingConfig,
    FinetuneConfig,
    SelfCriticalConfig,
]


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (EncoderConfig, {"layer": "fc1"}, "encoder.layer must be 'grid' or 'penultimate', got 'fc1'"),
        (PreprocessingConfig, {"image_size": 31}, "preprocessing.image_size must be 32 to 2048, got 31"),
        (PreprocessingConfig, {"mean": (1.0, 2.0)}, r"preprocessing.mean must be three numbers, got \(1.0, 2.0\)"),
        (PreprocessingConfig, {"std": (1.0, 0.0, 1.0)}, "preprocessing.std must be above 0"),
        (VocabularyConfig, {"min_count": 0}, "vocabulary.min_count must be at least 1, got 0"),
        (DecoderConfig, {"dropout": 1.0}, r"decoder.dropout must be in \[0, 1\), got 1.0"),
        (DecoderConfig, {"hidden_size": 0}, "decoder.hidden_size must be at least 1, got 0"),
        (SearchConfig, {"beam_size": 0}, "search.beam_size must be at least 1, got 0"),
        (SearchConfig, {"max_length": 0}, "search.max_length must be at least 1, got 0"),
        (SearchConfig, {"length_penalty": -0.1}, "search.length_penalty must be at least 0, got -0.1"),
        (
            SearchConfig,
            {"beam_size": 2, "num_captions": 3},
            r"search.num_captions must be 1 to search.beam_size \(2\), got 3",
        ),
        (TrainingConfig, {"optimizer": "sgd"}, "training.optimizer must be 'adam' or 'adamw', got 'sgd'"),
        (TrainingConfig, {"schedule": "step"}, "training.schedule must be 'cosine' or 'constant', got 'step'"),
        (TrainingConfig, {"epochs": -1}, "training.epochs must be at least 0, got -1"),
        (FinetuneConfig, {"epochs": -1}, "finetune.epochs must be at least 0, got -1"),
        (FinetuneConfig, {"encoder_learning_rate": 0.0}, "finetune.encoder_learning_rate must be above 0, got 0.0"),
        (FinetuneConfig, {"min_crop_area": 0.0}, r"finetune.min_crop_area must be in \(0, 1\], got 0.0"),
        (SelfCriticalConfig, {"num_samples": 1}, "self_critical.num_samples must be at least 2, got 1"),
        (SelfCriticalConfig, {"bleu_weight": -1.0}, "self_critical.bleu_weight must be at least 0, got -1.0"),
        (SelfCriticalConfig, {"temperature": 0.0}, "self_critical.temperature must be above 0, got 0.0"),
        (SelfCriticalConfig, {"learning_rate": -1.0}, "self_critical.learning_rate must be above 0, got -1.0"),
        (TrainingConfig, {"warmup_steps": -1}, "training.warmup_steps must be at least 0, got -1"),
        (TrainingConfig, {"ema_decay": 1.0}, r"training.ema_decay must be in \[0, 1\), got 1.0"),
        (TrainingConfig, {"learning_rate": 0.0}, "training.learning_rate must be above 0, got 0.0"),
        (TrainingConfig, {"learning_rate": float("nan")}, "training.learning_rate must be above 0, got nan"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_name(section: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        section(**values)


def test_num_heads_is_not_checked_for_an_lstm() -> None:
    assert DecoderConfig(name="lstm", hidden_size=10, num_heads=4).hidden_size == 10


@pytest.mark.parametrize("section", [*SECTIONS, Recipe])
def test_settings_are_immutable_and_round_trip_through_json(section: Any) -> None:
    config = section()

    assert from_mapping(section, json.loads(json.dumps(to_mapping(config)))) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, dataclasses.fields(config)[0].name, None)


def test_a_mapping_contains_plain_lists_at_every_depth() -> None:
    recipe = Recipe(preprocessing=PreprocessingConfig(mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.0)))

    mapping = to_mapping(recipe)

    assert mapping["preprocessing"]["mean"] == [1.0, 2.0, 3.0]
    assert from_mapping(Recipe, mapping) == recipe


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"training": {"epoch": 1}}, "unknown setting training.epoch: expected one of epochs, batch_size"),
        ({"trainig": {}}, "unknown setting trainig: expected one of encoder, preprocessing"),
        ({"training": 5}, "training must be a section, got 5"),
        ({"training": {"epochs": "5"}}, "training.epochs must be int, got '5'"),
        ({"training": {"epochs": 5.0}}, "training.epochs must be int, got 5.0"),
        ({"training": {"epochs": True}}, "training.epochs must be int, got True"),
        ({"training": {"flip": 1}}, "training.flip must be bool, got 1"),
        ({"training": {"learning_rate": "fast"}}, "training.learning_rate must be float, got 'fast'"),
        ({"training": {"learning_rate": [1.0]}}, r"training.learning_rate must be float, got \[1.0\]"),
        ({"preprocessing": {"mean": ["a", "b", "c"]}}, r"preprocessing.mean must be .*, got \['a', 'b', 'c'\]"),
        ({"preprocessing": {"mean": [1, 2]}}, "preprocessing.mean must be three numbers"),
    ],
)
def test_an_unknown_name_or_a_wrong_type_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_mapping(Recipe, values)


def test_an_integer_is_accepted_as_a_float() -> None:
    recipe = from_mapping(Recipe, {"training": {"learning_rate": 1}, "preprocessing": {"mean": [1, 2, 3]}})

    assert recipe.training.learning_rate == 1.0
    assert recipe.preprocessing.mean == (1.0, 2.0, 3.0)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_of_the_package_is_valid(name: str) -> None:
    assert isinstance(load_recipe(name), Recipe)


def test_the_default_recipe_differs_from_the_defaults_only_in_training() -> None:
    recipe = load_recipe(DEFAULT_RECIPE)

    assert dataclasses.replace(recipe, training=TrainingConfig()) == Recipe()


def test_the_seed_recipe_matches_the_seed_project() -> None:
    recipe = load_recipe("vgg16-lstm")

    assert (recipe.encoder.name, recipe.encoder.layer) == ("vgg16", "penultimate")
    assert (recipe.training.epochs, recipe.training.batch_size, recipe.training.optimizer) == (100, 32, "adam")
    assert (recipe.vocabulary.tokenizer, recipe.search.beam_size) == ("seed", 1)


def test_an_override_takes_precedence_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[training]\nepochs = 7\nflip = true\n")

    recipe = load_recipe(str(path), {"training.epochs": 3, "search.beam_size": 2})

    assert (recipe.training.epochs, recipe.training.flip, recipe.search.beam_size) == (3, True, 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[training", "is not valid TOML"),
        (b'[encoder]\nname = "\xff"', "cannot be read"),
        (b"training = 5", "training must be a section, got 5"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(content)

    with pytest.raises(ConfigError, match=message):
        load_recipe(str(path), {"training.epochs": 3})


def test_the_error_for_an_unknown_recipe_lists_the_available_ones() -> None:
    with pytest.raises(ConfigError, match=f"no recipe 'lite3': expected one of {', '.join(recipe_names())}"):
        load_recipe("lite3")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("training.epochs=5", ("training.epochs", 5)),
        ("training.learning_rate=1e-3", ("training.learning_rate", 1e-3)),
        ("training.flip=true", ("training.flip", True)),
        ("encoder.name=vgg16", ("encoder.name", "vgg16")),
        ('encoder.name="vgg16"', ("encoder.name", "vgg16")),
        ("encoder.name=timm:a=b", ("encoder.name", "timm:a=b")),
        ("preprocessing.mean=[1, 2, 3]", ("preprocessing.mean", [1, 2, 3])),
        ("encoder.name=", ("encoder.name", "")),
    ],
)
def test_an_override_is_a_dotted_name_and_a_toml_value(text: str, expected: tuple[str, Any]) -> None:
    assert parse_override(text) == expected


@pytest.mark.parametrize("text", ["epochs=5", "training.epochs", "", "5"])
def test_a_malformed_override_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--set takes SECTION.NAME=VALUE, for example training.epochs=5, got"):
        parse_override(text)


def test_an_override_of_an_unknown_setting_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown setting training.epoch"):
        load_recipe(DEFAULT_RECIPE, dict([parse_override("training.epoch=5")]))
    with pytest.raises(ConfigError, match="unknown setting speed"):
        load_recipe(DEFAULT_RECIPE, dict([parse_override("speed.num_actors=5")]))


def test_a_phase_without_epochs_is_skipped_but_not_all_of_them() -> None:
    recipe = load_recipe("lite2-attention", {"training.epochs": 0, "self_critical.epochs": 1})
    assert recipe.training.epochs == 0

    with pytest.raises(ConfigError, match="training.epochs must be at least 1 where no phase has any, got 0"):
        load_recipe("lite2-attention", {"training.epochs": 0})


def test_repeated_fine_tuning_without_a_following_phase_is_refused() -> None:
    finetune = load_recipe("lite2-finetuned", {"finetune.repetitions": 2}).finetune
    assert finetune.repetitions == 2

    with pytest.raises(ConfigError, match=r"finetune\.repetitions must be 1 where self_critical\.epochs is 0, got 2"):
        load_recipe("lite2-finetuned", {"finetune.repetitions": 2, "self_critical.epochs": 0})
