"""The weights that a phase starts from, and the ones it ends with."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import safetensors.torch
import torch

from imcap_ray import storage
from imcap_ray.config import Recipe
from imcap_ray.distributed.checkpoints import choose_best
from imcap_ray.errors import ImcapError
from imcap_ray.models.encoder_weights import FINETUNED, EncoderWeights
from imcap_ray.models.encoders import Encoder
from imcap_ray.models.model_folder import average_weights, select_tensors
from imcap_ray.runs.training_run import RUN_FOLDER, WEIGHTS_FILE
from imcap_ray.training.phases import FINETUNE, SCORE, kind_of, phases


def start_weights_file(work: str, phase: str) -> str:
    """Path of the weights that a phase starts from."""
    return storage.join(work, f"start_of_{phase}.safetensors")


def _end_file(work: str, phase: str) -> str:
    return storage.join(work, f"end_of_{phase}.safetensors")


def start_of_phase(
    phase: str, history: list[dict[str, Any]], work: str, *, recipe: Recipe, echo: Callable[[str], None]
) -> str | None:
    """The file of the weights that a phase starts from; None where it starts from nothing.

    These are the best so far, but for a phase that fine-tunes once more, which starts where the first did, and for what
    follows several such, which starts from the mean of the best of each. A phase that has begun finds its CNN there
    again. Where the file is gone or damaged, it is made from the newest checkpoint: that has the same CNN, or the one
    trained up to there, and the decoder is the checkpoint's in any case.

    Raises:
        ImcapError: weights cannot be read.
    """
    place = start_weights_file(work, phase)
    if not history or history[0]["phase"] == phase:  # the first phase: what it starts from is the user's
        return place if storage.exists(place) else None
    has_begun = history[-1]["phase"] == phase
    if has_begun and _is_readable(place):
        return place
    run, before = storage.join(work, RUN_FOLDER), history[-1]["phase"]
    finetunings = [one for one in phases(recipe) if kind_of(one) == FINETUNE]
    if has_begun:
        _, newest = choose_best(run, echo=echo)
        weights = read_weights(storage.join(newest.location, WEIGHTS_FILE))
        echo(f"{place} was gone or damaged, and is made anew from epoch {newest.epoch}")
    elif before in finetunings and len(finetunings) > 1:
        best, _ = choose_best(run, phase=before, echo=echo)
        end = read_weights(storage.join(best.location, WEIGHTS_FILE))
        storage.write_bytes(_end_file(work, before), safetensors.torch.save(end))  # its checkpoint will make room
        if phase in finetunings:
            weights = read_weights(start_weights_file(work, finetunings[0]))
            source = f"where {finetunings[0]} started"
        else:
            weights = average_weights([read_weights(_end_file(work, one)) for one in finetunings])
            source = f"the mean of {len(finetunings)} such"
        echo(f"{before} ends with epoch {best.epoch}, CIDEr-D {best.history[-1][SCORE]:.3f}; {phase} from {source}")
    else:
        best, _ = choose_best(run, echo=echo)
        weights = read_weights(storage.join(best.location, WEIGHTS_FILE))
        echo(f"{phase} from epoch {best.epoch}, CIDEr-D {best.history[-1][SCORE]:.3f}")
    storage.write_bytes(place, safetensors.torch.save(weights))
    return place


def _is_readable(weights_file: str) -> bool:
    try:
        read_weights(weights_file)
    except ImcapError:
        return False
    return True


def read_weights(location: str) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file; ImcapError if it is missing or damaged."""
    try:
        return safetensors.torch.load(storage.read_bytes(location))
    except (OSError, safetensors.SafetensorError) as error:
        raise ImcapError(f"{location} is gone or damaged, and the training cannot go on without it: {error}") from error


def with_cnn_weights(encoder: Encoder, weights: Mapping[str, torch.Tensor]) -> Encoder:
    """The encoder with the CNN that is among these weights; itself where there is none."""
    cnn = select_tensors("encoder.", weights)
    if not cnn:
        return encoder
    finetuned = copy.deepcopy(encoder)
    finetuned.cnn.load_state_dict(cnn)
    digest = hashlib.sha256()
    for name in sorted(cnn):  # in float16, as a model folder keeps them: the same CNN has the same hash ever after
        tensor = cnn[name].half() if cnn[name].is_floating_point() else cnn[name]
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    finetuned.weights = EncoderWeights(source=FINETUNED, sha256=digest.hexdigest())
    return finetuned
