"""Names and options -> the captioner of this package or another one. Does not import torch until one is loaded.

flickr8k-lite2, runs/mine    a model of this package, or several that caption together
hf:OWNER/NAME, hf:FOLDER     a model of the transformers library
MODULE:FACTORY               a captioner of your own, see `CaptionerPlugin`
NAME                         an entry point of an installed package in the group `imcap_ray.captioners`
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from imcap_ray import storage
from imcap_ray.config import AUTO, DEFAULT_MODEL, CaptioningConfig
from imcap_ray.data.image_inputs import read_image_bytes
from imcap_ray.errors import ConfigError, ImageError, ModelError
from imcap_ray.models.caption import Caption, ImageCaptioner, no_memory
from imcap_ray.models.plugin import TRANSFORMERS, Options, PluggedCaptioner, is_plugin_name, plugin_names

_SEARCH = ("beam_size", "max_length", "length_penalty", "num_captions")


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionerSpec:
    """Which captioner to load, and with which settings. Calling it loads the captioner, in any process."""

    models: tuple[str, ...] = ()
    options: Options = ()
    encoder_weights: str | None = None
    precision: str = AUTO
    beam_size: int | None = None
    max_length: int | None = None
    length_penalty: float | None = None
    num_captions: int | None = None
    fingerprint: str | None = None
    """That of the captioner, if it is known; one with another fingerprint is refused."""

    @classmethod
    def of(cls, config: CaptioningConfig) -> CaptionerSpec:
        """The captioner of a captioning run."""
        search = {name: getattr(config, name) for name in _SEARCH}
        return cls(
            models=config.models,
            options=config.model_options,
            encoder_weights=config.encoder_weights,
            precision=config.precision,
            **search,
        )

    def __call__(self) -> ImageCaptioner:
        """Load the captioner.

        Raises:
            ModelError: it cannot be loaded.
            ConfigError: it has no such setting.
        """
        plugins = [model for model in self.models if is_plugin_name(model)]
        captioner = self._load_plugin(plugins) if plugins else self._load_folders()
        if self.fingerprint not in (None, captioner.fingerprint):
            raise ModelError(
                f"{', '.join(self.models)} is another model in this process than where the run was started: it has "
                "changed, or differs between nodes"
            )
        return captioner

    def _load_plugin(self, plugins: Sequence[str]) -> ImageCaptioner:
        if len(self.models) > 1:
            raise ConfigError(f"only model folders caption together, and {plugins[0]} is none: give a single --model")
        settings = {"encoder_weights": self.encoder_weights} | {name: getattr(self, name) for name in _SEARCH[:-1]}
        settings["precision"] = None if self.precision == AUTO else self.precision
        for name, value in settings.items():
            if value is not None:
                raise ConfigError(
                    f"--{name.replace('_', '-')} is for model folders: {plugins[0]} takes its settings from "
                    "--model-option KEY=VALUE"
                )
        return PluggedCaptioner(plugins[0], self.options, num_captions=self.num_captions)

    def _load_folders(self) -> ImageCaptioner:
        from imcap_ray.models.captioner import load_captioner, override_search

        if self.options:
            raise ConfigError(
                f"model folders have no options: --model-option {self.options[0][0]} is for other captioners"
            )
        captioner = load_captioner(self.models, encoder_weights=self.encoder_weights, precision=self.precision)
        try:
            captioner.search = override_search(captioner.search, **{name: getattr(self, name) for name in _SEARCH})
        except ConfigError as error:
            message = re.sub("|".join(_SEARCH), lambda match: f"--{match[0].replace('_', '-')}", str(error))
            raise ConfigError(message) from error
        return captioner


def absolute_model(name: str) -> str:
    """The name of a model as it can be used in another folder.

    Raises:
        ModelError: a plain word that is neither a folder nor a captioner's name.
    """
    if name.startswith(TRANSFORMERS) and "://" not in name:
        location = name.removeprefix(TRANSFORMERS)
        return TRANSFORMERS + (storage.absolute(location) if os.path.isdir(location) else location)
    if name == DEFAULT_MODEL or is_plugin_name(name):
        return name
    if re.fullmatch(r"[\w.:-]+", name) and not os.path.exists(name):
        names = ", ".join((DEFAULT_MODEL, *plugin_names()))
        raise ModelError(
            f"no such model: {name}: expected a model folder, hf:OWNER/NAME, MODULE:FACTORY, or one of {names}"
        )
    return storage.absolute(name)


def model_paths(models: Sequence[str]) -> list[str]:
    """The paths and URIs among the absolute names of models."""
    folders = [name.removeprefix(TRANSFORMERS) if name.startswith(f"{TRANSFORMERS}/") else name for name in models]
    return [name for name in folders if name != DEFAULT_MODEL and not is_plugin_name(name)]


def caption_files(captioner: ImageCaptioner, images: Sequence[str]) -> Iterator[list[Caption] | ImageError]:
    """The captions of images (paths, URIs, web addresses), the best first, or the reason why there are none."""
    remaining = iter(images)
    while batch := list(islice(remaining, captioner.compute_batch_size)):
        decoded = [_read_pixels(captioner, image) for image in batch]
        pixels = [one for one in decoded if not isinstance(one, ImageError)]
        captions = iter(captioner.caption_pixels(np.stack(pixels)) if pixels else ())
        yield from (one if isinstance(one, ImageError) else next(captions) or no_memory() for one in decoded)


def _read_pixels(captioner: ImageCaptioner, image: str) -> npt.NDArray[np.uint8] | ImageError:
    try:
        return captioner.preparation(read_image_bytes(image)).pixels
    except ImageError as error:
        return error
