"""The model that `run.json` names -> what a report shows of it: its training, and where it looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from imcap_ray.errors import ImcapError, ModelError

if TYPE_CHECKING:
    from imcap_ray.models.captioner import Captioner
    from imcap_ray.reports.html_report import Attend


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOfRun:
    """What can be had of the model that made some captions."""

    history: Sequence[Mapping[str, Any]] = ()
    """Metrics of the epochs of its training; empty where they are not known."""
    captioner: Captioner | None = None
    note: str = ""
    """Why there is no captioner, where one was asked for."""

    @property
    def attend(self) -> Attend | None:
        """Where it looks; None where there is no captioner."""
        captioner = self.captioner
        if captioner is None:
            return None

        def attend(image: bytes, caption: str) -> list[tuple[str, np.ndarray[Any, Any]]]:
            return [(one.word, one.weights) for one in captioner.attend(image, caption)]

        return attend


def read_model_of_run(run: Mapping[str, Any], *, with_attention: bool) -> ModelOfRun:
    """The model of a run, if it is still where it was and is still the same; else a note that says why not."""
    from imcap_ray.models.captioner import Captioner
    from imcap_ray.models.model_folder import read_model_folder

    name = run.get("model")
    if not name or not isinstance(name, str):
        return ModelOfRun()
    try:
        folder = read_model_folder(name)
        if run.get("model_fingerprint") not in (None, folder.fingerprint):
            raise ModelError(f"{name} is another model by now than the one of these captions")
        history = folder.metrics.get("history") or ()
        if not (isinstance(history, list | tuple) and all(isinstance(row, Mapping) for row in history)):
            raise ModelError(f"{name}: the history in metrics.json is damaged: expected a list of objects")
        if not with_attention:
            return ModelOfRun(history=history)
        if folder.decoder.name != "attention":
            return ModelOfRun(history=history, note=f"{name} has a decoder without attention")
        return ModelOfRun(history=history, captioner=Captioner.load(name))
    except (ImcapError, OSError) as error:
        return ModelOfRun(note=str(error) if with_attention else "")
