"""A captioner from outside this package -> an `ImageCaptioner` for the pipeline. Does not import torch."""

from __future__ import annotations

import importlib
import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final, Protocol, TypeAlias, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from imcap_ray.config import PluginSearch
from imcap_ray.data.image_decoding import DecodedImage, decode_prepared
from imcap_ray.errors import ImageError, ImcapError, ModelError
from imcap_ray.models.caption import ActorNeeds, Caption, no_memory

ENTRY_POINT_GROUP: Final = "imcap_ray.captioners"
"""Entry points of installed packages in this group give short names to factories."""

TRANSFORMERS: Final = "hf:"
"""Beginning of the name of a model of the transformers library."""

Options: TypeAlias = tuple[tuple[str, str], ...]
"""Names and values, which a factory gets as keyword arguments. Strings, so that they travel to any process."""

_FACTORY: Final = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")

_MAX_TOKENS: Final = 2**15 - 1
"""Largest number of tokens that a row can hold."""


class CaptionerPlugin(Protocol):
    """The interface of a captioner of your own, which `--model MODULE:FACTORY` names.

    FACTORY is a function, or the class itself. It is called in every process with the strings of `--model-option` as
    keyword arguments, so it must be quick: weights belong into `load`. A captioner may have a method
    `load(gpus: float)`, which is called once in each process that captions, with the GPUs that are reserved for it. If
    it raises, the run stops.
    """

    @property
    def fingerprint(self) -> str:
        """A text that is different for weights or settings that give different captions. Known without `load`."""

    @property
    def batch_size(self) -> int:
        """Maximum number of images that `caption` takes at a time."""

    @property
    def resources(self) -> Mapping[str, float]:
        """What each process needs: "gpus" (default: 1 if there are any), "memory" in bytes (default: not checked)."""

    def prepare(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """Turn an upright RGB image of any size into an array, of the same shape for every image.

        Called in other processes than `caption`, which have no GPU and never call `load`.
        """

    def caption(self, batch: npt.NDArray[np.uint8], num_captions: int) -> Sequence[Sequence[Caption] | ImageError]:
        """Find `num_captions` captions of each image, the best first.

        If it raises, it is called again with each image alone. An image whose captions are an ImageError, or not what
        is expected here, becomes a failed row.

        Args:
            batch: the arrays that `prepare` has made, stacked: (B, ...).
        """


def plugin_names() -> list[str]:
    """The short names of the captioners that installed packages provide."""
    return sorted(entry_points(group=ENTRY_POINT_GROUP).names)


def is_plugin_name(name: str) -> bool:
    """Whether this names a captioner of a library or package, and not a folder, path or URI."""
    if "://" in name:
        return False
    if name.startswith(TRANSFORMERS):
        return True
    return not os.path.exists(name) and (bool(_FACTORY.fullmatch(name)) or name in plugin_names())


def factory_module(name: str) -> str | None:
    """The top-level module of MODULE:FACTORY; None if the captioner is named in another way."""
    is_factory = _FACTORY.fullmatch(name) and not name.startswith(TRANSFORMERS)
    return re.split("[.:]", name)[0] if is_factory else None


def find_entry_point(name: str) -> EntryPoint | None:
    """The entry point of this name, the first if several packages have one; None if no package has."""
    return next(iter(entry_points(group=ENTRY_POINT_GROUP, name=name)), None)


def search_current_folder() -> None:
    """Let Python import from the current folder: `python -m imcap_ray` does, the command `imcap` does not."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def load_plugin(name: str, options: Options = ()) -> CaptionerPlugin:
    """Call the factory of this name with the options.

    Raises:
        ModelError: there is no such factory, it does not take these options, or it does not return a captioner.
    """
    arguments = [name.removeprefix(TRANSFORMERS)] if name.startswith(TRANSFORMERS) else []
    factory = _find_factory(name)
    try:
        inspect.signature(factory).bind(*arguments, **dict(options))
    except TypeError as error:
        raise ModelError(f"{name} does not take these options (--model-option): {error}") from error
    except ValueError:  # a factory in C has no signature
        pass
    try:
        plugin: CaptionerPlugin = factory(*arguments, **dict(options))
        _require_plugin(name, plugin)
    except ImcapError:
        raise
    except Exception as error:
        raise ModelError(f"{name} cannot be loaded: {_describe(error)}") from error
    return plugin


def _find_factory(name: str) -> Callable[..., Any]:
    if name.startswith(TRANSFORMERS):
        from imcap_ray.models.transformers_captioner import TransformersCaptioner

        return TransformersCaptioner
    search_current_folder()
    try:
        if _FACTORY.fullmatch(name):
            module, _, attribute = name.partition(":")
            factory: Any = getattr(importlib.import_module(module), attribute)
        else:
            entry_point = find_entry_point(name)
            if not entry_point:
                raise ModelError(f"no installed package has a captioner named {name}")
            factory = entry_point.load()
    except ImcapError:
        raise
    except Exception as error:
        raise ModelError(f"{name} cannot be imported: {_describe(error)}") from error
    if not callable(factory):
        raise ModelError(f"{name} must be a function or a class, got {type(factory).__name__}")
    return cast("Callable[..., Any]", factory)


def _require_plugin(name: str, plugin: object) -> None:
    """Raise ModelError unless the object is a `CaptionerPlugin`, as far as this is known without captions."""

    def require(condition: bool, member: str, expectation: str, value: object) -> None:
        if not condition:
            raise ModelError(f"{name}: {member} must be {expectation}, got {repr(value)[:100]}")

    for member in ("prepare", "caption", "fingerprint", "batch_size", "resources"):
        # Not of the object, because a fingerprint may take time to compute, and few processes need it.
        if not hasattr(type(plugin), member) and member not in getattr(plugin, "__dict__", {}):
            raise ModelError(
                f"{name} must return a captioner with prepare, caption, fingerprint, batch_size and resources: got "
                f"{type(plugin).__name__} without {member}"
            )
    captioner: Any = plugin
    for member in ("prepare", "caption"):
        require(callable(getattr(captioner, member)), member, "a method", getattr(captioner, member))
    batch_size, resources = captioner.batch_size, captioner.resources
    require(type(batch_size) is int and batch_size >= 1, "batch_size", "an integer of at least 1", batch_size)
    is_mapping = isinstance(resources, Mapping) and resources.keys() <= {"gpus", "memory"}
    are_numbers = is_mapping and all(
        type(value) in (int, float) and 0 <= value < math.inf for value in resources.values()
    )
    require(are_numbers, "resources", "numbers named gpus or memory", resources)


@dataclass(frozen=True, slots=True)
class PluginPreparation:
    """Images as a plug-in prepares them, in any process."""

    name: str
    options: Options
    shape: tuple[int, ...]
    """Shape of the pixels of every image."""

    @classmethod
    def of(cls, name: str, options: Options, plugin: CaptionerPlugin) -> PluginPreparation:
        """That of this plug-in, which prepares a grey image to learn the shape.

        Raises:
            ModelError: it raises, or does not return an array of uint8.
        """
        try:
            pixels = plugin.prepare(Image.new("RGB", (64, 64), "grey"))
        except ImcapError:
            raise
        except Exception as error:
            raise ModelError(f"{name}: prepare raised an error for a grey image: {_describe(error)}") from error
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or not pixels.size:
            raise ModelError(f"{name}: prepare must return an array of uint8, got {_describe_pixels(pixels)}")
        return cls(name, options, pixels.shape)

    def __call__(self, data: bytes) -> DecodedImage:
        """Decode the bytes. Raises ImageError, or ModelError if this process has no such plug-in."""
        plugin = _plugin_of_process(self.name, self.options)

        def prepare(image: Image.Image) -> npt.NDArray[np.uint8]:
            pixels = plugin.prepare(image)
            if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape != self.shape:
                raise ImageError(
                    "internal",
                    f"prepare must return uint8 {self.shape} for every image, got {_describe_pixels(pixels)}",
                )
            return np.ascontiguousarray(pixels)

        return decode_prepared(data, prepare=prepare)


_plugin_of_process = lru_cache(maxsize=2)(load_plugin)


def _describe_pixels(pixels: object) -> str:
    return f"{pixels.dtype} {pixels.shape}" if isinstance(pixels, np.ndarray) else type(pixels).__name__


class PluggedCaptioner:
    """A plug-in as an `ImageCaptioner`. Errors of the plug-in are errors of single images."""

    def __init__(self, name: str, options: Options = (), *, num_captions: int | None = None) -> None:
        """Call the factory, and learn the shape of prepared images. Raises ModelError."""
        self.name = name
        self._plugin = load_plugin(name, options)
        self.preparation = PluginPreparation.of(name, options, self._plugin)
        self.fingerprint = _fingerprint(name, self._plugin, options)
        self.search = PluginSearch(num_captions=num_captions or 1)
        self.needs = ActorNeeds(
            batch_size=self._plugin.batch_size,
            gpus=self._plugin.resources.get("gpus"),
            memory=self._plugin.resources.get("memory", 0),
        )
        self.compute_batch_size = self._plugin.batch_size
        """Images computed together. It is halved whenever memory runs out."""
        self.num_beam_steps = 0
        self._start_error: ImcapError | None = None

    def start(self, *, gpus: float) -> None:
        """Load the weights. If that fails, `caption_pixels` raises the error: for one in the start of an actor, Ray
        would print a traceback."""
        try:
            if load := getattr(self._plugin, "load", None):
                load(gpus)
        except ImcapError as error:
            self._start_error = error
        except Exception as error:
            self._start_error = ImcapError(f"{self.name}: load raised an error: {_describe(error)}")

    def caption_pixels(self, pixels: npt.NDArray[np.uint8]) -> list[list[Caption] | ImageError]:
        """Find the captions of each image, the best first, or the reason why there are none.

        Raises:
            ImcapError: the plug-in could not load its weights, or raises an ImcapError that is no ImageError.
        """
        if self._start_error:
            raise self._start_error
        results: list[list[Caption] | ImageError] = []
        while len(results) < len(pixels):
            results += self._caption(pixels[len(results) : len(results) + self.compute_batch_size])
        return results

    def _caption(self, batch: npt.NDArray[np.uint8]) -> list[list[Caption] | ImageError]:
        try:
            results = self._plugin.caption(batch, self.search.num_captions)
            if not isinstance(results, Sequence) or len(results) != len(batch):
                number = f"{len(results)} results" if isinstance(results, Sequence) else type(results).__name__
                raise ImageError("internal", f"caption must return a list of {len(batch)} results, got {number}")
            return [_checked(result, self.search.num_captions) for result in results]
        except Exception as error:
            if isinstance(error, ImcapError) and not isinstance(error, ImageError):
                raise
            is_memory = isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__
            failure = _image_error(error, is_memory=is_memory)
        if len(batch) == 1:  # not in the except block, where the exception keeps all that was computed alive
            return [failure]
        if is_memory:
            self.compute_batch_size = len(batch) // 2
            return self.caption_pixels(batch)
        return [result for number in range(len(batch)) for result in self._caption(batch[number : number + 1])]


def _fingerprint(name: str, plugin: CaptionerPlugin, options: Options) -> str:
    """That of the plug-in, and the options, in case it forgets one of them."""
    try:
        fingerprint: object = plugin.fingerprint
    except Exception as error:
        raise ModelError(f"{name}: fingerprint raised an error: {_describe(error)}") from error
    if not isinstance(fingerprint, str) or not fingerprint:
        raise ModelError(f"{name}: fingerprint must be a text, got {repr(fingerprint)[:100]}")
    return sha256(repr((fingerprint, sorted(options))).encode()).hexdigest()


def _image_error(error: Exception, *, is_memory: bool) -> ImageError:
    if isinstance(error, ImageError):
        return error
    return no_memory() if is_memory else ImageError("internal", f"the captioner raised an error: {_describe(error)}")


def _checked(result: object, num_captions: int) -> list[Caption] | ImageError:
    """The captions of an image with plain numbers, or an ImageError if they are not what a captioner may return."""
    if isinstance(result, ImageError):
        return result
    if not isinstance(result, Sequence) or isinstance(result, str | bytes):
        return ImageError("internal", f"expected a list of captions, got {type(result).__name__}")
    if len(result) < num_captions:
        return ImageError("internal", f"expected {num_captions} captions, the captioner returned {len(result)}")
    try:
        return [_plain(caption) for caption in result[:num_captions]]
    except (TypeError, ValueError, OverflowError) as error:
        return ImageError("internal", f"the captioner returned a wrong caption: {_describe(error)}")


def _plain(caption: object) -> Caption:
    """The caption with a text and numbers that a row can hold. Raises TypeError or ValueError."""
    if not isinstance(caption, Caption):
        raise TypeError(f"expected a Caption, got {type(caption).__name__}")
    if not isinstance(caption.text, str):
        raise TypeError(f"text must be a string, got {type(caption.text).__name__}")
    caption.text.encode()  # raises UnicodeEncodeError, which is a ValueError
    plain = Caption(caption.text, float(caption.logprob), int(caption.num_tokens), float(caption.familiarity))
    if not (math.isnan(plain.logprob) or -math.inf < plain.logprob <= 0):
        raise ValueError(f"logprob must be at most 0, or NaN if it is unknown, got {plain.logprob}")
    if not 0 <= plain.num_tokens <= _MAX_TOKENS:
        raise ValueError(f"num_tokens must be from 0 to {_MAX_TOKENS:,}, got {plain.num_tokens}")
    if not (math.isnan(plain.familiarity) or 0 <= plain.familiarity <= 1):
        raise ValueError(f"familiarity must be from 0 to 1, or NaN if it is unknown, got {plain.familiarity}")
    return plain


def _describe(error: BaseException) -> str:
    """Type and text of an exception, in one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".removesuffix(": ")
