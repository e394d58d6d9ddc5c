"""Models that were trained from the same model -> a model with their average weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from safetensors.torch import save

from imcap_ray.config import FLOAT32, PreprocessingConfig
from imcap_ray.errors import ModelError
from imcap_ray.models.model_folder import ModelFolder
from imcap_ray.models.model_weights import average_weights, select_tensors


def average_models(folders: Sequence[ModelFolder]) -> ModelFolder:
    """Average the weights of models that were trained from the same model.

    Such trainings with different seeds end in the same valley of the loss, and its middle is often better than each of
    them, at the cost of one model (Wortsman et al., Model soups, 2022). The settings, among them the image size, are
    those of the first model.

    Raises:
        ModelError: the models differ in more than their weights.
    """
    first = folders[0]
    if len(folders) == 1:
        return first

    def normalisation(folder: ModelFolder) -> PreprocessingConfig:
        return replace(folder.preprocessing, image_size=None)

    for other in folders[1:]:
        for part, is_same in (
            ("CNN", (other.encoder, normalisation(other)) == (first.encoder, normalisation(first))),
            ("decoder", replace(other.decoder, dropout=0.0) == replace(first.decoder, dropout=0.0)),
            ("vocabulary", other.vocabulary.tokens == first.vocabulary.tokens),
            ("weights' names", other.tensors.keys() == first.tensors.keys()),
            (
                "CNN's weights",
                other.encoder_weights == first.encoder_weights or select_tensors("encoder.", first.tensors),
            ),
        ):
            if not is_same:
                raise ModelError(
                    f"{other.location} and {first.location} cannot be averaged: they differ in their {part}"
                )
    fingerprints = hashlib.sha256("".join(folder.fingerprint for folder in folders).encode())
    return replace(
        first,
        location="the average of " + " and ".join(folder.location for folder in folders),
        weights=save(average_weights([folder.tensors for folder in folders])),
        familiarity=None,  # its features are those of none of the models
        int8=None,
        precision=FLOAT32,
        fingerprint=fingerprints.hexdigest(),
    )
