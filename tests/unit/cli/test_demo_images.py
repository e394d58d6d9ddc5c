from __future__ import annotations

import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from PIL import Image

from imcap_ray.cli import demo_images
from imcap_ray.cli.demo_images import sample_photographs
from imcap_ray.errors import InputError


def test_there_are_at_least_six_photographs_that_pillow_can_read() -> None:
    photographs = sample_photographs()

    assert len(photographs) >= 6
    for photograph in photographs:
        with Image.open(photograph.path) as image:
            image.load()
            assert min(image.size) >= 300


def test_every_photograph_names_its_author_and_free_terms() -> None:
    for photograph in sample_photographs():
        assert photograph.path.name == photograph.file_name
        assert photograph.title
        assert photograph.author
        assert photograph.licence in {"CC0", "public domain"}


def test_file_names_are_unique_and_sorted() -> None:
    names = [photograph.file_name for photograph in sample_photographs()]

    assert names == sorted(set(names))


def test_finding_the_photographs_does_not_import_scikit_image() -> None:
    program = """
import sys
from imcap_ray.cli.demo_images import sample_photographs

sample_photographs()
print("skimage" in sys.modules)
"""

    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)

    assert run.stdout.strip() == "False"


def test_a_missing_package_is_an_input_error_that_names_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(demo_images, "find_spec", lambda name: None)

    with pytest.raises(InputError) as error:
        sample_photographs()

    assert str(error.value) == "the sample photographs come with scikit-image: pip install 'imcap_ray[demo]'"


def test_a_package_without_the_photographs_is_an_input_error_that_names_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spec = ModuleSpec("skimage", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(demo_images, "find_spec", lambda name: spec)

    with pytest.raises(InputError, match=r"astronaut\.png"):
        sample_photographs()
