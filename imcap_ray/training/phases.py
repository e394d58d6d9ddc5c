"""A recipe -> its phases and their epochs."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from imcap_ray.config import Recipe, TrainingConfig
from imcap_ray.runs.training_run import History

CROSS_ENTROPY: Final = "cross_entropy"

FINETUNE: Final = "finetune"

SELF_CRITICAL: Final = "self_critical"

SCORE: Final = "cider_d"
"""The metric that decides when a phase stops and which epoch is the best."""


def phases(recipe: Recipe) -> dict[str, TrainingConfig]:
    """The phases of a training in their order, with their settings. Repetitions are `finetune`, `finetune_2`, ..."""
    settings = {}
    for kind, config, smoothing, repetitions in (
        (CROSS_ENTROPY, recipe.training, recipe.training.label_smoothing, 1),
        (FINETUNE, recipe.finetune, recipe.training.label_smoothing, recipe.finetune.repetitions),
        (SELF_CRITICAL, recipe.self_critical, 0.0, recipe.self_critical.repetitions),
    ):
        for number in range(1, repetitions + 1 if config.epochs else 1):
            settings[kind if number == 1 else f"{kind}_{number}"] = replace(
                recipe.training,
                epochs=config.epochs,
                learning_rate=config.learning_rate,
                patience=config.patience,
                label_smoothing=smoothing,
            )
    return settings


def kind_of(phase: str) -> str:
    """The kind of a phase: `CROSS_ENTROPY`, `FINETUNE` or `SELF_CRITICAL`."""
    return next(kind for kind in (CROSS_ENTROPY, FINETUNE, SELF_CRITICAL) if phase.startswith(kind))


def reads_pixels(phase: str) -> bool:
    """Whether a phase is trained on photographs, with a new view of each at every step, instead of cached features.

    The decoder has memorised the features of its training images by then, so captions sampled for these say little
    about captions of other images.
    """
    return kind_of(phase) in (FINETUNE, SELF_CRITICAL)


def num_epochs(recipe: Recipe) -> int:
    """The maximum number of epochs of a training, over all phases."""
    return sum(settings.epochs for settings in phases(recipe).values())


def next_phase(history: History, recipe: Recipe) -> str | None:
    """The phase of the next epoch; None if the training is complete.

    A phase ends after its number of epochs, or if the last `patience` epochs brought no better score.
    """
    for phase, settings in phases(recipe).items():
        scores = [row[SCORE] for row in history if row["phase"] == phase]
        patience = settings.patience
        is_stuck = 0 < patience < len(scores) and max(scores[-patience:]) <= max(scores[:-patience])
        if len(scores) < settings.epochs and not is_stuck:
            return phase
    return None
