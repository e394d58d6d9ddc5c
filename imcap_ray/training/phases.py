"""A recipe -> its phases and their epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from imcap_ray.config import Recipe, TrainingConfig

CROSS_ENTROPY: Final = "cross_entropy"

FINETUNE: Final = "finetune"

SELF_CRITICAL: Final = "self_critical"

SCORE: Final = "cider_d"
"""What a training is stopped by, and its best epoch chosen by."""


def phases(recipe: Recipe) -> dict[str, TrainingConfig]:
    """The phases of a training in their order, with the settings of each: `finetune`, and `finetune_2` if repeated."""
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
    """Which kind a phase is of, `CROSS_ENTROPY`, `FINETUNE` or `SELF_CRITICAL`."""
    return next(kind for kind in (CROSS_ENTROPY, FINETUNE, SELF_CRITICAL) if phase.startswith(kind))


def reads_pixels(phase: str) -> bool:
    """Whether a phase is trained on photographs, another view of each at every step, or else on cached features.

    A decoder knows the features of its training images by heart in the end, and what it draws for those tells little
    of what it would draw for others.
    """
    return kind_of(phase) in (FINETUNE, SELF_CRITICAL)


def num_epochs(recipe: Recipe) -> int:
    """The most epochs that a training has, over all phases."""
    return sum(settings.epochs for settings in phases(recipe).values())


def next_phase(history: Sequence[Mapping[str, Any]], recipe: Recipe) -> str | None:
    """The phase of the next epoch after these, given each one's `phase` and score; None when the training is done.

    A phase ends after its epochs, or when the last `patience` of them brought no better score.
    """
    for phase, settings in phases(recipe).items():
        scores = [row[SCORE] for row in history if row["phase"] == phase]
        patience = settings.patience
        is_stuck = 0 < patience < len(scores) and max(scores[-patience:]) <= max(scores[:-patience])
        if len(scores) < settings.epochs and not is_stuck:
            return phase
    return None
