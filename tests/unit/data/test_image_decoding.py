"""Any bytes give the correct picture or an ImageError with the correct code."""

from __future__ import annotations

import hashlib
import io
import re
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile

from imcap_ray.data.image_decoding import DecodedImage, decode_image
from imcap_ray.data.image_errors import image_error_from_os_error
from imcap_ray.errors import IMAGE_ERROR_CODES, ImageError
from tests.malformed_images import (
    JPEG_END,
    OK,
    encode,
    encode_frames,
    exif,
    grey_tiff,
    jpeg_of_scans,
    malformed_images,
    photo,
    png_chunk,
    png_header,
)

SIZE = 48

# How a picture with each EXIF orientation is stored: the inverse of what the orientation asks for.
STORED_AS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def decode(data: bytes, image_size: int = SIZE, **options: int) -> DecodedImage:
    return decode_image(data, image_size=image_size, **options)


def error_of(data: bytes, **options: int) -> ImageError:
    with pytest.raises(ImageError) as caught:
        decode(data, **options)
    return caught.value


def channels_first(image: Image.Image) -> npt.NDArray[np.uint8]:
    return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def mean_difference(a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8]) -> float:
    return float(np.abs(a.astype(float) - b.astype(float)).mean())


def stored_with_orientation(upright: Image.Image, orientation: int, format: str) -> bytes:
    transpose = STORED_AS[orientation]
    stored = upright if transpose is None else upright.transpose(transpose)
    return encode(stored, format, exif=exif(orientation))


def note_sizes_before_resizing(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return a list that receives the size at which each picture is decoded."""
    sizes = []
    resize = Image.Image.resize

    def noting_resize(image: Image.Image, *args: Any, **options: Any) -> Image.Image:
        sizes.append(image.size)
        return resize(image, *args, **options)

    monkeypatch.setattr(Image.Image, "resize", noting_resize)
    return sizes


# --- every kind of file has its status ---


@pytest.mark.parametrize(
    ("data", "expected"), [pytest.param(data, code, id=name) for name, data, code in malformed_images()]
)
def test_each_malformed_file_has_its_error_code(data: bytes, expected: str) -> None:
    try:
        image = decode(data)
    except ImageError as error:
        assert error.code == expected, error.message
        assert 10 < len(error.message) < 300 and error.message.isprintable()
    else:
        assert expected == OK
        assert image.pixels.shape == (3, SIZE, SIZE)
        assert image.pixels.dtype == np.uint8 and image.pixels.flags.c_contiguous
        assert image.pixels.flags.writeable  # torch.from_numpy warns of arrays that are not
        assert image.sha256 == hashlib.sha256(data).hexdigest()


def test_the_malformed_files_have_unique_names_and_cover_all_error_codes_of_bytes() -> None:
    names = [name for name, _, _ in malformed_images()]
    assert len(set(names)) == len(names) >= 60
    not_from_bytes = {"missing", "permission_denied", "read_error", "changed", "out_of_memory", "timeout", "internal"}
    assert {code for _, _, code in malformed_images()} - {OK} == set(IMAGE_ERROR_CODES) - not_from_bytes


def test_messages_contain_what_was_received() -> None:
    assert "'<!DOCTYPE html>" in error_of(b"<!DOCTYPE html> not found").message
    assert "PDF" in error_of(b"%PDF-1.7").message
    assert "300 x 200 = 60,000" in error_of(encode(photo(300, 200), "PNG"), max_pixels=59_999).message


def test_the_error_for_heic_without_its_plugin_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    error = error_of(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(300))
    assert error.code == "unsupported_format"
    assert "pillow_heif" in error.message


# --- the picture is the right one ---


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "QOI"])
def test_a_picture_of_the_target_size_is_unchanged(format: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    image = decode(encode(Image.fromarray(noise), format))
    np.testing.assert_array_equal(image.pixels, noise.transpose(2, 0, 1))


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 100}])
@pytest.mark.parametrize("size", [1, 5, SIZE, 101])
def test_a_jpeg_of_the_target_size_is_as_pillow_decodes_it(mode: str, options: dict[str, Any], size: int) -> None:
    data = encode(photo(size, size).convert(mode), "JPEG", **options)
    np.testing.assert_array_equal(decode(data, size).pixels, channels_first(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("size", [(1401, 1003), (577, 405), (300, 211), (900, 130)])
def test_a_jpeg_decoded_at_a_reduced_scale_is_as_pillow_decodes_it(
    mode: str, progressive: bool, size: tuple[int, int]
) -> None:
    data = encode(photo(*size).convert(mode), "JPEG", progressive=progressive)
    expected = Image.open(io.BytesIO(data))
    expected.draft(None, (2 * SIZE, 2 * SIZE))
    expected = expected.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(decode(data).pixels, channels_first(expected))


@pytest.mark.parametrize(
    "name",
    [
        *("jpeg_text_after_end", "jpeg_zeros_after_end", "jpeg_video_after_end", "jpeg_with_thumbnail"),
        *("jpeg_marks_of_scans_after_end", "jpeg_marks_of_scans_in_a_comment"),
        *("jpeg_text_before_end_mark", "jpeg_zeros_before_end_mark", "jpeg_fill_bytes_before_end_mark"),
    ],
)
def test_extra_bytes_do_not_change_the_picture(name: str) -> None:
    [data] = [data for odd_name, data, _ in malformed_images() if odd_name == name]
    np.testing.assert_array_equal(decode(data).pixels, decode(encode(photo(), "JPEG")).pixels)


def test_the_picture_is_resized_without_cropping() -> None:
    data = encode(photo(200, 100), "PNG")
    image = decode(data)
    squashed = photo(200, 100).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    assert (image.width, image.height, image.format) == (200, 100, "png")
    np.testing.assert_array_equal(image.pixels, channels_first(squashed))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_all_orientations_give_the_same_upright_picture(orientation: int, format: str) -> None:
    upright = photo(SIZE, SIZE)
    transpose = STORED_AS[orientation]
    stored = upright if transpose is None else upright.transpose(transpose)
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(stored, format, exif=exif(orientation), **options)
    np.testing.assert_array_equal(decode(data).pixels, channels_first(upright))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_rotated_photograph_is_measured_upright(orientation: int) -> None:
    upright = photo(640, 400)
    image = decode(stored_with_orientation(upright, orientation, "JPEG"))
    assert (image.width, image.height) == (640, 400)
    assert mean_difference(image.pixels, decode(encode(upright, "PNG")).pixels) < 3


def test_transparency_is_composited_on_white() -> None:
    clear = encode(Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 0)), "PNG")
    half = encode(Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 128)), "PNG")
    half_grey = encode(Image.new("LA", (SIZE, SIZE), (0, 128)), "PNG")
    assert (decode(clear).pixels == 255).all()
    assert (decode(half).pixels == 127).all()
    assert (decode(half_grey).pixels == 127).all()


@pytest.mark.parametrize("clear_colour", [0, bytes([0] + [255] * 15)], ids=["colour", "alpha_table"])
def test_a_transparent_palette_colour_becomes_white(clear_colour: int | bytes) -> None:
    palette = Image.new("P", (SIZE, SIZE), 0)
    palette.putpalette([10, 20, 30] + [1, 2, 3] * 15)
    assert (decode(encode(palette, "PNG", transparency=clear_colour)).pixels == 255).all()


def test_an_opaque_alpha_channel_changes_nothing() -> None:
    opaque = photo(SIZE, SIZE)
    opaque.putalpha(255)
    np.testing.assert_array_equal(decode(encode(opaque, "PNG")).pixels, channels_first(photo(SIZE, SIZE)))


def damaged_chunk(kind: bytes) -> bytes:
    return png_chunk(kind, b"Comment\0somewhere else")[:-1] + b"?"


@pytest.mark.parametrize("kind", [b"tEXt", b"iCCP", b"pHYs", b"eXIf", b"tIME", b"prVt"])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_png_with_damaged_metadata_has_all_its_pixels(kind: bytes, is_first: bool) -> None:
    png = encode(photo(SIZE, SIZE), "PNG")
    position = 33 if is_first else len(png) - 12  # after the header, or before the end
    data = png[:position] + damaged_chunk(kind) + png[position:]

    decoded = decode(data)

    np.testing.assert_array_equal(decoded.pixels, channels_first(photo(SIZE, SIZE)))
    assert decoded.sha256 == hashlib.sha256(data).hexdigest()


def test_a_png_with_damaged_metadata_and_damaged_pixels_is_refused() -> None:
    png = encode(photo(SIZE, SIZE), "PNG")
    pixels = png.index(b"IDAT")
    data = png[:33] + damaged_chunk(b"tEXt") + png[33:pixels] + b"IDAT" + bytes(40) + png[pixels + 44 :]

    assert error_of(data).code == "not_an_image"


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_mid_grey_of_16_bits_is_mid_grey(format: str) -> None:
    pixels = decode(encode(Image.new("I;16", (SIZE, SIZE), 32768), format)).pixels
    assert set(np.unique(pixels)) <= {127, 128}


def test_colours_of_16_bits_equal_those_of_8_bits() -> None:
    [data] = [data for name, data, _ in malformed_images() if name == "png_rgb_16_bit"]
    np.testing.assert_array_equal(decode(data, 64).pixels, decode(encode(photo(), "PNG"), 64).pixels)


def test_grey_levels_are_the_same_in_8_bits_16_bits_and_floats() -> None:
    grey = np.asarray(photo(SIZE, SIZE).convert("L"))
    versions = [grey.astype(np.uint16) * 257, grey.astype(np.int32) * 257, grey.astype(np.float32) / 255]
    versions += [grey.astype(np.float32), grey.astype(np.int32)]
    for version in versions:
        pixels = decode(encode(Image.fromarray(version), "TIFF")).pixels
        np.testing.assert_array_equal(pixels, np.broadcast_to(grey, (3, SIZE, SIZE)))


@pytest.mark.parametrize("white_is_zero", [False, True])
@pytest.mark.parametrize("bits", [12, 16, 32])
@pytest.mark.parametrize("order", ["<", ">"])
def test_grey_levels_of_a_tiff_are_right_or_it_is_refused(order: str, bits: int, white_is_zero: bool) -> None:
    levels = np.add.outer(np.arange(SIZE), np.arange(SIZE)) / (2 * SIZE - 2)
    data = grey_tiff(levels, bits, white_is_zero=white_is_zero, order=order)
    not_read_by_pillow = [(">", 12, False), (">", 12, True), ("<", 12, True), (">", 16, True)]
    if (order, bits, white_is_zero) in not_read_by_pillow:
        assert error_of(data).code == "unsupported_format"
    else:
        assert np.abs(decode(data).pixels - 255 * levels).max() <= 0.51


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_ten_or_twelve_bits_in_sixteen_are_not_black(format: str, dtype: type) -> None:
    levels = np.add.outer(np.arange(SIZE), np.arange(SIZE)) / (2 * SIZE - 2)
    if format != "TIFF" and dtype is not np.uint16:
        pytest.skip("the format has no such numbers")

    pixels = decode(encode(Image.fromarray(np.rint(694 * levels).astype(dtype)), format)).pixels

    assert np.abs(pixels - 255 * levels).max() <= 0.75


def test_a_dark_picture_of_sixteen_bits_stays_dark() -> None:
    grey = np.full((SIZE, SIZE), 20 * 257, np.uint16)
    np.testing.assert_array_equal(decode(encode(Image.fromarray(grey), "PNG")).pixels, 20)


def test_values_beyond_any_known_range_are_stretched() -> None:
    depths = np.linspace(-1000.0, 90_000.0, SIZE * SIZE, dtype=np.float32).reshape(SIZE, SIZE)
    pixels = decode(encode(Image.fromarray(depths), "TIFF")).pixels
    assert (pixels.min(), pixels.max()) == (0, 255)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "AVIF", "TIFF", "MPO"])
def test_an_animation_gives_its_first_frame(format: str) -> None:
    image = decode(encode_frames(format))
    expected = decode(encode(photo(), "PNG")).pixels
    assert mean_difference(image.pixels, expected) < 8  # an upside-down photo is 80 away
    assert (image.width, image.height) == photo().size


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "F"])
def test_white_is_white_in_every_mode(mode: str) -> None:
    white = Image.new("RGB", (SIZE, SIZE), "white").convert(mode)
    assert (decode(encode(white, "TIFF")).pixels == 255).all()


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("size", [(1400, 1000), (500, 375), (1500, 110), (110, 1500)])
def test_decoding_at_a_reduced_scale_is_close_to_a_full_decode(
    mode: str, progressive: bool, size: tuple[int, int]
) -> None:
    data = encode(photo(*size).convert(mode), "JPEG", progressive=progressive)
    full = Image.open(io.BytesIO(data)).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    image = decode(data)
    assert (image.width, image.height) == size
    assert mean_difference(image.pixels, channels_first(full)) < 1


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("size", [(1400, 1000), (500, 375), (1500, 110), (96, 95), (40, 30)])
def test_a_jpeg_is_decoded_no_larger_than_needed_and_no_smaller_than_twice_the_target(
    orientation: int, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encode(photo(*size), "JPEG", exif=exif(orientation))
    decoded_sizes = note_sizes_before_resizing(monkeypatch)
    decode(data)
    [decoded_size] = decoded_sizes
    if min(size) >= 2 * 2 * SIZE:
        assert decoded_size < size
        assert 2 * SIZE <= min(decoded_size) < 2 * 2 * SIZE + 1
    else:
        assert decoded_size == size


def test_a_photograph_from_a_phone_is_decoded_at_a_quarter_and_looks_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    smooth = np.asarray(photo(500, 375).resize((4000, 3000))).astype(np.int16)
    grain = np.random.default_rng(0).normal(0, 6, (375, 500, 1)).astype(np.int16)
    picture = Image.fromarray((smooth + np.tile(grain, (8, 8, 1))).clip(0, 255).astype(np.uint8))
    data = encode(picture, "JPEG", quality=90)
    decoded_sizes = note_sizes_before_resizing(monkeypatch)

    reduced = decode(data, 224).pixels.astype(int)
    with monkeypatch.context() as patch:
        patch.setattr(JpegImageFile, "draft", lambda *_: None)
        full = decode(data, 224).pixels.astype(int)

    assert decoded_sizes == [(1000, 750), (4000, 3000)]
    assert np.abs(reduced - full).mean() < 0.6  # of 255, with the grain; 0.15 for a smooth picture
    assert np.abs(reduced - full).max() <= 4


# --- no half pictures ---

CUT_FILES = {
    "jpeg": encode(photo(), "JPEG"),
    "jpeg_progressive": encode(photo(), "JPEG", progressive=True),
    "jpeg_decoded_at_an_eighth": encode(photo(900, 800), "JPEG"),
    "jpeg_progressive_decoded_at_an_eighth": encode(photo(900, 800), "JPEG", progressive=True),
    "png": encode(photo(), "PNG"),
    "gif": encode(photo(), "GIF"),
    "webp": encode(photo(), "WEBP"),
    "webp_lossless": encode(photo(), "WEBP", lossless=True),
    "avif": encode(photo(), "AVIF"),
    "bmp": encode(photo(), "BMP"),
    "tiff_lzw": encode(photo(), "TIFF", compression="tiff_lzw"),
}


@pytest.mark.parametrize("name", CUT_FILES)
def test_a_truncated_file_gives_the_complete_picture_or_an_error(name: str) -> None:
    data = CUT_FILES[name]
    whole = decode(data).pixels
    step = max(1, len(data) // 60)
    for length in {*range(1, 40), *range(40, len(data), step), *range(len(data) - 9, len(data))}:
        try:
            pixels = decode(data[:length]).pixels
        except ImageError as error:
            if 16 <= length < len(data) - 9:  # less is no complete header, more can lack only an end marker
                assert error.code == "truncated", (length, error.message)
        else:
            np.testing.assert_array_equal(pixels, whole, err_msg=f"cut to {length} of {len(data)}")


@pytest.mark.parametrize("name", [name for name in CUT_FILES if name.startswith("jpeg")])
def test_a_jpeg_that_ends_within_a_scan_is_truncated_even_with_an_end_marker(name: str) -> None:
    data = CUT_FILES[name]
    scans = list(re.finditer(rb"\xff\xda.*?(?=\xff[^\0])", data, re.DOTALL))
    assert (len(scans) > 1) == ("progressive" in name)
    for scan in scans:
        header_length = 2 + scan[0][3]
        for part in np.linspace(0.01, 0.9, 10):
            length = scan.start() + header_length + int(part * (len(scan[0]) - header_length))
            error = error_of(data[:length] + JPEG_END)
            assert error.code == "truncated", (length, error.message)


def test_a_partial_picture_is_an_error_even_if_another_library_allows_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for name in ("jpeg", "png", "gif"):
        assert error_of(CUT_FILES[name][: len(CUT_FILES[name]) // 2]).code == "truncated"


# --- limits and surprises ---


def test_too_many_pixels_are_refused_even_if_pillow_has_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert error_of(png_header(60_000, 60_000) + b"\0\0\0\0IDAT").code == "too_large"
    assert Image.MAX_IMAGE_PIXELS is None


def test_pictures_that_pillow_only_warns_about_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert decode(encode(photo(40, 30), "PNG")).width == 40


@pytest.mark.parametrize(
    ("data", "part"),
    [
        pytest.param(jpeg_of_scans(50_000, 8000, 8000), "100 scans", id="jpeg_scans"),
        pytest.param(b"\xff\xd8" + b"\xff\xe1\0\x0cExif\0\0abcd" * 2_000_000, "20,000 parts", id="jpeg_exif"),
        pytest.param(b"P3 900 900 255\n" + b"#\n" * 5_000_000, "10,000 comments", id="ppm_comments"),
    ],
)
def test_a_small_file_that_would_take_minutes_is_refused_immediately(data: bytes, part: str) -> None:
    start = time.process_time()

    error = error_of(data)

    assert time.process_time() - start < 2
    assert error.code == "too_large" and part in error.message


def test_images_of_up_to_max_pixels_are_decoded() -> None:
    data = encode(photo(30, 20), "PNG")
    assert decode(data, max_pixels=600).width == 30
    assert error_of(data, max_pixels=599).code == "too_large"


def test_running_out_of_memory_is_an_error_of_that_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "resize", no_memory)
    assert error_of(CUT_FILES["png"]).code == "out_of_memory"


def test_an_unexpected_error_is_internal_and_has_a_stable_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(image: Image.Image, *_: object, **__: object) -> None:
        raise ZeroDivisionError(f"bad {object()} in {image!r}\n at 0x7fe61c2b5a90 {'x' * 1000}")

    monkeypatch.setattr(Image.Image, "resize", fail)
    errors = [error_of(CUT_FILES["png"]) for _ in range(2)]
    assert errors[0].code == "internal"
    assert errors[0].message == errors[1].message
    assert "0x" not in errors[0].message and len(errors[0].message) < 250


def test_only_warnings_of_the_image_reader_are_ignored() -> None:
    warned = [data for name, data, _ in malformed_images() if name in ("jpeg_exif_cut", "png_invalid_animation")]
    decoding_has_begun = threading.Event()

    def decode_all() -> None:
        for _ in range(20):
            for data in warned:
                decode(data)
                decoding_has_begun.set()

    with ThreadPoolExecutor(3) as pool, warnings.catch_warnings():
        warnings.simplefilter("error")
        futures = [pool.submit(decode_all) for _ in range(3)]
        decoding_has_begun.wait()
        for _ in range(100):
            with pytest.raises(UserWarning, match="of the test"):
                warnings.warn("of the test", stacklevel=1)
        for future in futures:
            future.result()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (FileNotFoundError(2, "No such file or directory"), "missing"),
        (PermissionError(13, "Permission denied"), "permission_denied"),
        (IsADirectoryError(21, "Is a directory"), "read_error"),
        (OSError(5, "Input/output error"), "read_error"),
        (OSError("connection reset by <Socket at 0x7f3d>"), "read_error"),
        (TimeoutError(), "read_error"),
        (OSError(12, "Cannot allocate memory"), "out_of_memory"),
    ],
)
def test_a_file_that_cannot_be_read_has_its_code_and_its_path(error: OSError, code: str) -> None:
    image_error = image_error_from_os_error(error, "photos/1.jpg")
    assert image_error.code == code
    assert "photos/1.jpg" in image_error.message
    assert "0x" not in image_error.message
