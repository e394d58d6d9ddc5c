"""Image captioning that starts on a laptop and ends on a Ray cluster."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imcap_ray.errors import ImageError as ImageError
    from imcap_ray.errors import ImcapError as ImcapError
    from imcap_ray.models.caption import Caption as Caption
    from imcap_ray.models.captioner import Captioner as Captioner
    from imcap_ray.models.plugin import CaptionerPlugin as CaptionerPlugin

__version__ = "0.1.0"

_HOMES = {
    "Caption": "models.caption",
    "Captioner": "models.captioner",
    "CaptionerPlugin": "models.plugin",
    "ImageError": "errors",
    "ImcapError": "errors",
}

__all__ = ["Caption", "Captioner", "CaptionerPlugin", "ImageError", "ImcapError"]  # noqa: F822


def __getattr__(name: str) -> Any:
    # Imported when asked for: torch takes seconds, and `imcap --help` needs none of it.
    if name in _HOMES:
        return getattr(import_module(f"imcap_ray.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
