"""The table of image formats is consistent, and Pillow has the readers that it names."""

from __future__ import annotations

from collections import Counter

import pytest
from PIL import Image

from imcap_ray.data.image_formats import FORMATS, IMAGE_EXTENSIONS, ImageFormat, file_extension, identify, is_image_name


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
