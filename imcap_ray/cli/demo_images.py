"""The sample photographs of `imcap demo`: names, authors and licences -> files on this machine.

They lie in the data folder of the package scikit-image and are found by path: nothing is downloaded, and
skimage itself, which is slow to import, is not imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from imcap_ray.errors import InputError

# Terms as the docstrings of skimage.data state them, read in 0.26.0; 0.24.0 carries the same six files.
# Its stereo pair of a motorcycle is left out, for its terms are not stated there.
_PHOTOGRAPHS: Final = (
    ("astronaut.png", "Eileen Collins, astronaut", "NASA", "public domain"),
    ("camera.png", "Man with a camera", "Lav Varshney", "CC0"),
    ("chelsea.png", "Chelsea the cat", "Stefan van der Walt", "CC0"),
    ("coffee.png", "Coffee cup", "Rachel Michetti, courtesy of Pikolo Espresso Bar", "CC0"),
    ("hubble_deep_field.jpg", "Hubble eXtreme Deep Field", "NASA", "public domain"),
    ("rocket.jpg", "Falcon 9 carrying DSCOVR", "SpaceX", "public domain"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A photograph that anyone may use, and whom to thank for it."""

    file_name: str
    path: Path
    title: str
    author: str
    licence: str


def sample_photographs() -> list[Sample]:
    """The sample photographs, by file name; an `InputError` says how to get them when they are absent."""
    data_dir = _data_dir()
    samples = [
        Sample(file_name=file_name, path=data_dir / file_name, title=title, author=author, licence=licence)
        for file_name, title, author, licence in _PHOTOGRAPHS
    ]
    for sample in samples:
        if not sample.path.is_file():
            raise InputError(
                f"this scikit-image has no {sample.path}: "
                "pip install --force-reinstall 'scikit-image>=0.24,<0.27' brings it back"
            )
    return samples


def _data_dir() -> Path:
    spec = find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("the sample photographs come with scikit-image: pip install 'imcap_ray[demo]'")
    return Path(spec.submodule_search_locations[0]) / "data"
