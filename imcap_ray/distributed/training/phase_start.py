"""The weights that a phase of a training starts from."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence

import safetensors.torch
import torch
from torch import Tensor

from imcap_ray import storage
from imcap_ray.config import Recipe
from imcap_ray.distributed.training.checkpoints import choose_best
from imcap_ray.errors import ImcapError
from imcap_ray.models.decoders import Decoder
from imcap_ray.models.encoder_weights import FINETUNED, EncoderWeights
from imcap_ray.models.encoders import Encoder
from imcap_ray.models.model_weights import average_weights, select_tensors
from imcap_ray.runs.training_run import RUN_FOLDER, WEIGHTS_FILE, History
from imcap_ray.training.phases import FINETUNE, SCORE, kind_of, phases


def start_weights_file(work: str, phase: str) -> str:
    """Path of the weights that a phase starts from."""
    return storage.join(work, f"start_of_{phase}.safetensors")


def _end_weights_file(work: str, phase: str) -> str:
    return storage.join(work, f"end_of_{phase}.safetensors")


def start_of_phase(
    phase: str, history: History, work: str, *, recipe: Recipe, report: Callable[[str], None]
) -> str | None:
    """Write the weights that a phase starts from, and return the path; None if it starts from random weights.

    A phase starts from the best weights so far, with two exceptions: repeated fine-tunings all start where the first
    one did, and the phase after them starts from the average of each one's best weights.

    A phase that has begun reads its file again, because that has the CNN of its features. If the file is missing or
    corrupt, it is restored from the newest checkpoint, which has the same CNN, or a CNN that is trained in this phase;
    the decoder is the checkpoint's in any case.

    Raises:
        ImcapError: weights cannot be read.
    """
    location = start_weights_file(work, phase)
    if not history or history[0]["phase"] == phase:  # the first phase starts from weights that the user names, if any
        return location if storage.exists(location) else None
    if history[-1]["phase"] == phase:
        if not _is_readable(location):
            _, newest = choose_best(storage.join(work, RUN_FOLDER), report=report)
            weights = read_weights(storage.join(newest.location, WEIGHTS_FILE))
            storage.write_bytes(location, safetensors.torch.save(weights))
            report(f"{location} was missing or corrupt, and is restored from epoch {newest.epoch}")
        return location
    finetunings = [other for other in phases(recipe) if kind_of(other) == FINETUNE]
    if history[-1]["phase"] in finetunings and len(finetunings) > 1:
        weights = _end_finetuning(phase, history, work, finetunings, report=report)
    else:
        best, _ = choose_best(storage.join(work, RUN_FOLDER), report=report)
        weights = read_weights(storage.join(best.location, WEIGHTS_FILE))
        report(f"{phase} starts from epoch {best.epoch}, CIDEr-D {best.history[-1][SCORE]:.3f}")
    storage.write_bytes(location, safetensors.torch.save(weights))
    return location


def _end_finetuning(
    phase: str, history: History, work: str, finetunings: Sequence[str], *, report: Callable[[str], None]
) -> dict[str, Tensor]:
    """Keep the best weights of a fine-tuning that has ended; the weights that the phase after it starts from."""
    ended = history[-1]["phase"]
    best, _ = choose_best(storage.join(work, RUN_FOLDER), phase=ended, report=report)
    weights = read_weights(storage.join(best.location, WEIGHTS_FILE))
    # The checkpoint itself will be removed when later ones are better.
    storage.write_bytes(_end_weights_file(work, ended), safetensors.torch.save(weights))
    if phase in finetunings:
        weights = read_weights(start_weights_file(work, finetunings[0]))
        source = f"the weights that {finetunings[0]} started from"
    else:
        weights = average_weights([read_weights(_end_weights_file(work, other)) for other in finetunings])
        source = f"the average of {len(finetunings)} fine-tunings"
    report(f"{ended} ends with epoch {best.epoch}, CIDEr-D {best.history[-1][SCORE]:.3f}; {phase} starts from {source}")
    return weights


def _is_readable(weights_file: str) -> bool:
    try:
        read_weights(weights_file)
    except ImcapError:
        return False
    return True


def read_weights(location: str) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file; ImcapError if it is missing or corrupt."""
    try:
        return safetensors.torch.load(storage.read_bytes(location))
    except (OSError, safetensors.SafetensorError) as error:
        raise ImcapError(
            f"{location} is missing or corrupt, and the training cannot resume without it: {error}"
        ) from error


def with_cnn_weights(encoder: Encoder, weights: Mapping[str, Tensor]) -> Encoder:
    """The encoder with the CNN's weights among these; the encoder itself if there are none."""
    cnn = select_tensors("encoder.", weights)
    if not cnn:
        return encoder
    finetuned = copy.deepcopy(encoder)
    finetuned.cnn.load_state_dict(cnn)
    digest = hashlib.sha256()
    for name in sorted(cnn):  # in float16, like a model folder, so that the same CNN always has the same hash
        tensor = cnn[name].half() if cnn[name].is_floating_point() else cnn[name]
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    finetuned.weights = EncoderWeights(source=FINETUNED, sha256=digest.hexdigest())
    return finetuned


def with_new_words(weights: Mapping[str, Tensor], decoder: Decoder) -> dict[str, Tensor]:
    """Weights of a model for a decoder with more words, whose rows for the new words are the decoder's own."""
    extended = dict(weights)
    for name, initial in decoder.state_dict().items():
        trained = weights[f"decoder.{name}"]
        extended[f"decoder.{name}"] = torch.cat([trained, initial[len(trained) :]]) if initial.ndim else trained
    return extended
