"""The table of image formats is consistent, and Pillow has the readers that it names."""

from __future__ import annotations

import sys
from collections import Counter
from types import ModuleType

import pytest
from PIL import Image

from imcap_ray.data.image_formats import (
    FORMATS,
    IMAGE_EXTENSIONS,
    ImageFormat,
    file_extension,
    identify,
    identify_unreadable,
    is_image_name,
    readers,
)


def test_each_name_extension_and_signature_belongs_to_one_format() -> None:
    for values in (
        [name for one in FORMATS for name in (one.name, *one.other_names)],
        [extension for one in FORMATS for extension in one.extensions],
        [signature for one in FORMATS for signature in one.signatures],
    ):
        assert Counter(values).most_common(1)[0][1] == 1


@pytest.mark.parametrize("image_format", FORMATS, ids=lambda image_format: image_format.name)
def test_a_format_is_read_by_pillow_or_described_as_unreadable(image_format: ImageFormat) -> None:
    Image.init()

    assert image_format.reader in Image.OPEN or image_format.unreadable
    assert bool(image_format.package) <= bool(image_format.reader)


def test_exported_files_are_listed_as_images_again() -> None:
    exported = {file_extension(one.name) for one in FORMATS if one.reader and one.extensions}

    assert exported <= IMAGE_EXTENSIONS
    assert file_extension("mpo") == file_extension("jpeg") == "jpg"
    assert is_image_name("a/b.JPEG") and not is_image_name("a/.b.jpg") and not is_image_name("jpg")


def test_a_signature_identifies_its_format() -> None:
    for one in FORMATS:
        for offset, magic in one.signatures if one.reader else ():
            assert identify(bytes(offset) + magic + bytes(40)) is one


def test_a_signature_of_an_unreadable_format_identifies_it_and_no_readable_one() -> None:
    for one in FORMATS:
        for offset, magic in () if one.reader else one.signatures:
            data = bytes(offset) + magic + bytes(40)
            assert identify_unreadable(data) is one
            assert identify(data) is None
    svg = identify_unreadable(b'<svg width="9"/>')
    assert svg is not None and svg.name == "svg"


def test_a_signature_of_a_readable_format_is_no_unreadable_one() -> None:
    for one in FORMATS:
        for offset, magic in one.signatures if one.reader else ():
            assert identify_unreadable(bytes(offset) + magic + bytes(40)) is None


def test_a_package_whose_compiled_part_is_missing_counts_as_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def register() -> None:
        raise ImportError("libheif.so.1: cannot open shared object file")

    package = ModuleType("pillow_heif")
    package.register_heif_opener = register  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pillow_heif", package)

    assert "HEIF" not in readers(bytes(4) + b"ftypheic" + bytes(40))
