"""The model that `run.json` names -> its training history, and a way to ask where it looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from imcap_ray.errors import ImcapError, ModelError
from imcap_ray.reports.cards import Attend

if TYPE_CHECKING:
    from imcap_ray.models.torch_captioner import TorchCaptioner


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOfRun:
    """What is known of the model that made some captions."""

    history: Sequence[Mapping[str, Any]] = ()
    """Metrics of each epoch of its training: `phase`, `train_loss`, `cider_d`. Empty if they are not known."""
    attend: Attend | None = None
    """Where the model looks; None if it cannot be asked."""
    note: str = ""
    """Why it cannot be asked."""


def read_model_of_run(run: Mapping[str, Any], *, with_attention: bool) -> ModelOfRun:
    """Read the model of a run if it can be found and is the same; otherwise return a note with the reason."""
    from imcap_ray.models.model_folder import read_model_folder
    from imcap_ray.models.plugin import is_plugin_name
    from imcap_ray.models.torch_captioner import build_torch_captioner

    name = run.get("model")
    if not name or not isinstance(name, str):
        return ModelOfRun()
    if is_plugin_name(name):  # it is not imported: the captions may be from somebody else
        return ModelOfRun(note=f"{name} is no model folder, so it is unknown where it looks" if with_attention else "")
    try:
        folder = read_model_folder(name)
        if run.get("model_fingerprint") not in (None, *folder.fingerprints):
            raise ModelError(f"{name} is not the model that made these captions any more: its fingerprint differs")
        history = folder.metrics.get("history") or ()
        if not (isinstance(history, list | tuple) and all(isinstance(row, Mapping) for row in history)):
            raise ModelError(f"{name}: the history in metrics.json is damaged: expected a list of objects")
        if not with_attention:
            return ModelOfRun(history=history)
        if folder.decoder.name != "attention":
            return ModelOfRun(history=history, note=f"{name} has a decoder without attention")
        return ModelOfRun(history=history, attend=_attend_with(build_torch_captioner(folder)))
    except (ImcapError, OSError) as error:
        return ModelOfRun(note=str(error) if with_attention else "")


def _attend_with(captioner: TorchCaptioner) -> Attend:
    def attend(image: bytes, caption: str) -> list[tuple[str, np.ndarray[Any, Any]]]:
        return [(attended.word, attended.weights) for attended in captioner.attend(image, caption)]

    return attend
