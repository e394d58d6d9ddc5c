"""The model that `run.json` names -> what a report shows of it: its training, and where it looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from imcap_ray.config import DEFAULT_MODEL
from imcap_ray.errors import ImcapError, ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOfRun:
    """What can be had of the model that made some captions."""

    history: Sequence[Mapping[str, Any]] = ()
    """Metrics of the epochs of its training; empty where they are not known."""
    captioner: Any = None
    note: str = ""
    """Why there is no captioner, where one was asked for."""

    @property
    def attend(self) -> Any:
        """As `report.Attend`; None where there is no captioner."""
        return None if self.captioner is None else self._attend

    def _attend(self, image: bytes, caption: str) -> list[tuple[str, np.ndarray[Any, Any]]]:
        return [(one.word, one.weights) for one in self.captioner.attend(image, caption)]


def read_model_of_run(run: Mapping[str, Any], *, with_attention: bool) -> ModelOfRun:
    """The model of a run, if it is still where it was and is still the same; else a note that says why not."""
    from imcap_ray.captioner import Captioner, read_model_folder
    from imcap_ray.decoders import AttentionDecoder

    name = run.get("model")
    if not name or not isinstance(name, str):
        return ModelOfRun()
    try:
        location = None if name == DEFAULT_MODEL else name
        folder = read_model_folder(location)
        if run.get("model_fingerprint") not in (None, folder.fingerprint):
            raise ModelError(f"{name} is another model by now than the one of these captions")
        history = folder.metrics.get("history") or ()
        if not with_attention:
            return ModelOfRun(history=history)
        if folder.decoder.name != "attention":
            return ModelOfRun(history=history, note=f"{name} has a decoder without attention")
        captioner = Captioner.load(location)
        assert isinstance(captioner.decoder, AttentionDecoder)
        return ModelOfRun(history=history, captioner=captioner)
    except (ImcapError, OSError) as error:
        return ModelOfRun(note=str(error) if with_attention else "")
