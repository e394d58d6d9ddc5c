"""Generated malformed, corrupt and mislabelled image files: (name, bytes, expected error code or "ok")."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, PngImagePlugin

OK = "ok"


def photo(width: int = 96, height: int = 64) -> Image.Image:
    """A smooth picture without symmetry: red grows to the right, green downwards, with a blue blob."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    blob = np.exp(-((x - 0.7) ** 2 + (y - 0.3) ** 2) / 0.02)
    waves = 20 * np.sin(40 * x * y)
    rgb = np.stack([230 * x + waves, 230 * y + waves, 255 * blob], axis=-1)
    return Image.fromarray(rgb.clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def encode_frames(format: str) -> bytes:
    """An animation or several pages: the photo, and then the photo upside down."""
    return encode(photo(), format, save_all=True, append_images=[photo().rotate(180)])


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int, bit_depth: int = 8, colour_type: int = 2) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)


def exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


JPEG_END = b"\xff\xd9"


def grey_tiff(levels: npt.NDArray[np.float64], bits: int, *, white_is_zero: bool, order: str = "<") -> bytes:
    """Uncompressed, of 12, 16 or 32 bits (32 are floats), from levels of 0 (black) to 1."""
    height, width = levels.shape
    stored = 1 - levels if white_is_zero else levels
    if bits == 32:
        pixels = stored.astype(f"{order}f4").tobytes()
    else:
        numbers = np.rint(stored * (2**bits - 1)).astype(np.uint16)
        pixels = numbers.astype(f"{order}u2").tobytes() if bits == 16 else _packed_12_bits(numbers)
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, 0 if white_is_zero else 1), (273, 134)]
    tags += [(277, 1), (278, height), (279, len(pixels)), (339, 3 if bits == 32 else 1)]
    entries = [struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0) for tag, value in tags]
    signature = b"II*\0" if order == "<" else b"MM\0*"
    directory = struct.pack(f"{order}IH", 8, len(tags)) + b"".join(entries) + bytes(4)
    return signature + directory + pixels


def _packed_12_bits(numbers: npt.NDArray[np.uint16]) -> bytes:
    bits = (numbers[:, :, None] >> np.arange(11, -1, -1)) & 1
    return np.packbits(bits.astype(np.uint8).reshape(len(numbers), -1), axis=1).tobytes()


def jpeg_with_segment(jpeg: bytes, marker: int, data: bytes) -> bytes:
    return jpeg[:2] + _segment(marker, data) + jpeg[2:]


def jpeg_of_scans(num_scans: int, width: int = 96, height: int = 64) -> bytes:
    """A grey progressive JPEG of one scan for its brightness, and many scans of a few bytes that add nothing."""
    blocks = -(-width // 8) * -(-height // 8)
    start = b"\xff\xd8" + _segment(0xDB, bytes([0, *[1] * 64]))
    start += _segment(0xC2, struct.pack(">BHHB", 8, height, width, 1) + bytes([1, 0x11, 0]))
    start += _segment(0xC4, bytes([0x00, 1, *[0] * 15, 0]))  # of one bit: no change of brightness
    start += _segment(0xC4, bytes([0x10, 1, *[0] * 15, 0xE0]))  # of one bit: nothing in the next 32,767 blocks or less
    first = _segment(0xDA, bytes([1, 1, 0, 0, 0, 0])) + bytes(-(-blocks // 8))
    bits = "0".ljust(15, "1") * -(-blocks // 32767)
    later = int(bits.ljust(-(-len(bits) // 8) * 8, "1"), 2).to_bytes(-(-len(bits) // 8), "big")
    scan = _segment(0xDA, bytes([1, 1, 0, 1, 63, 0])) + later.replace(b"\xff", b"\xff\0")
    return start + first + scan * (num_scans - 1) + JPEG_END


def _segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def tiff_of_strips(num_strips: int) -> bytes:
    """A TIFF one pixel wide with one pixel per strip, where all strips are the same byte."""
    tags = [(256, 3, 1, 1), (257, 4, 1, num_strips), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    tags += [(273, 4, num_strips, 200), (277, 3, 1, 1), (278, 3, 1, 1), (279, 4, num_strips, 200 + 4 * num_strips)]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    directory = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    return directory.ljust(200, b"\0") + struct.pack("<I", 8) * num_strips + struct.pack("<I", 1) * num_strips


@cache
def malformed_images() -> list[tuple[str, bytes, str]]:
    return [*_readable(), *_not_images(), *_unsupported(), *_cut(), *_damaged(), *_too_large()]


def _readable() -> list[tuple[str, bytes, str]]:
    rgb = photo()
    jpeg = encode(rgb, "JPEG")
    alpha = rgb.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(rgb.size))
    palette = rgb.quantize(16)
    grey = rgb.convert("L")
    grey_16 = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    floats = Image.fromarray(np.asarray(grey).astype(np.float32) / 255)
    holes = np.asarray(floats).copy()
    holes[3, 3], holes[4, 4] = np.nan, np.inf
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Comment", "a picture " * 50, zip=True)
    cmyk = rgb.convert("CMYK")
    levels = np.linspace(0, 1, 32 * 32).reshape(32, 32)
    video = b"\0\0\0\x18ftypmp42\0\0\0\0isommp42" + b"\xff\xda" + bytes(5000)
    made = {
        "jpeg": jpeg,
        "jpeg_progressive": encode(rgb, "JPEG", progressive=True),
        "jpeg_444": encode(rgb, "JPEG", subsampling=0),
        "jpeg_restart_markers": encode(rgb, "JPEG", restart_marker_rows=1),
        "jpeg_grey": encode(grey, "JPEG"),
        "jpeg_cmyk": encode(cmyk, "JPEG"),
        "jpeg_ycck": _ycck(encode(cmyk, "JPEG")),
        "jpeg_arithmetic_coded": _patched(jpeg, jpeg.index(b"\xff\xc0"), b"\xff\xc9"),  # any bytes are a picture then
        "jpeg_rgb_not_ycbcr": encode(rgb, "JPEG", keep_rgb=True),
        "jpeg_quality_1": encode(rgb, "JPEG", quality=1),
        **{f"jpeg_orientation_{number}": encode(rgb, "JPEG", exif=exif(number)) for number in range(1, 9)},
        "jpeg_orientation_0": encode(rgb, "JPEG", exif=exif(0)),
        "jpeg_orientation_99": encode(rgb, "JPEG", exif=exif(99)),
        "jpeg_exif_rubbish": encode(rgb, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\xff\xff\xff\xff"),
        "jpeg_exif_cut": encode(rgb, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x03\x01\x12\0\x03"),
        "jpeg_exif_not_tiff": encode(rgb, "JPEG", exif=b"Exif\0\0hello"),
        "jpeg_icc_rubbish": encode(rgb, "JPEG", icc_profile=b"not a profile"),
        "jpeg_malformed_mpf": jpeg_with_segment(jpeg, 0xE2, b"MPF\0rubbish"),
        "jpeg_text_after_end": jpeg + b"and then some text",
        "jpeg_zeros_after_end": jpeg + bytes(5000),
        "jpeg_text_before_end_mark": jpeg[:-2] + b"text" + JPEG_END,
        "jpeg_zeros_before_end_mark": jpeg[:-2] + bytes(5000) + JPEG_END,
        "jpeg_fill_bytes_before_end_mark": jpeg[:-2] + b"\xff" * 500 + JPEG_END,
        "jpeg_video_after_end": jpeg + video,
        "jpeg_100_scans": jpeg_of_scans(100),
        "jpeg_marks_of_scans_after_end": jpeg + b"\xff\xda\0\2" * 1000,
        "jpeg_marks_of_scans_in_a_comment": jpeg_with_segment(jpeg, 0xFE, b"\xff\xda\0\2" * 1000),
        "jpeg_with_thumbnail": _jpeg_with_thumbnail(jpeg),
        "jpeg_with_thumbnail_video_after_end": _jpeg_with_thumbnail(jpeg) + video,
        "jpeg_1x1": encode(rgb.resize((1, 1)), "JPEG"),
        "jpeg_one_row": encode(rgb.resize((2000, 1)), "JPEG"),
        "mpo_two_pictures": encode_frames("MPO"),
        "png": encode(rgb, "PNG"),
        "png_interlaced_1x1": encode(rgb.resize((1, 1)), "PNG"),
        "png_grey_1_bit": encode(rgb.convert("1"), "PNG"),
        "png_grey_16_bit": encode(grey_16, "PNG"),
        "png_rgb_16_bit": _png_rgb_16_bit(rgb),
        "png_grey_alpha": encode(alpha.convert("LA"), "PNG"),
        "png_palette": encode(palette, "PNG"),
        "png_palette_one_clear_colour": encode(palette, "PNG", transparency=3),
        "png_palette_alpha": encode(palette, "PNG", transparency=bytes(range(0, 160, 10))),
        "png_rgb_clear_colour": encode(rgb, "PNG", transparency=(0, 0, 0)),
        "png_grey_clear_colour": encode(grey, "PNG", transparency=0),
        "png_rgba": encode(alpha, "PNG"),
        "png_wholly_clear": encode(Image.new("RGBA", (20, 20), (0, 0, 0, 0)), "PNG"),
        "png_rotated": encode(rgb, "PNG", exif=exif(8)),
        "png_texts": encode(rgb, "PNG", pnginfo=texts),
        "png_long_text": _png_with_chunk(encode(rgb, "PNG"), _png_text(2_000_000)),
        "png_large_colour_profile": encode(rgb, "PNG", icc_profile=bytes(3_000_000)),
        "png_animated": encode_frames("PNG"),
        "png_invalid_animation": _png_with_chunk(encode(rgb, "PNG"), png_chunk(b"acTL", bytes(8))),
        "png_bytes_after_end": encode(rgb, "PNG") + b"\0rubbish",
        "gif": encode(rgb, "GIF"),
        "gif_clear_colour": encode(palette, "GIF", transparency=0),
        "gif_animated": encode_frames("GIF"),
        "gif_without_trailer": encode(rgb, "GIF")[:-1],
        "webp": encode(rgb, "WEBP"),
        "webp_lossless_alpha": encode(alpha, "WEBP", lossless=True),
        "webp_animated": encode_frames("WEBP"),
        "avif": encode(rgb, "AVIF"),
        "avif_alpha": encode(alpha, "AVIF"),
        "avif_animated": encode_frames("AVIF"),
        "avif_rotated": encode(rgb, "AVIF", exif=exif(6)),
        "bmp": encode(rgb, "BMP"),
        "bmp_1_bit": encode(rgb.convert("1"), "BMP"),
        "bmp_alpha": encode(alpha, "BMP"),
        "tiff": encode(rgb, "TIFF"),
        "tiff_lzw": encode(rgb, "TIFF", compression="tiff_lzw"),
        "tiff_jpeg": encode(rgb, "TIFF", compression="jpeg"),
        "tiff_group4": encode(rgb.convert("1"), "TIFF", compression="group4"),
        "tiff_cmyk": encode(cmyk, "TIFF"),
        "tiff_ycbcr": encode(rgb.convert("YCbCr"), "TIFF"),
        "tiff_16_bit": encode(grey_16, "TIFF"),
        "tiff_12_bit": grey_tiff(levels, 12, white_is_zero=False),
        "tiff_16_bit_white_is_zero": grey_tiff(levels, 16, white_is_zero=True),
        "tiff_32_bit": encode(Image.fromarray(np.asarray(grey_16).astype(np.int32)), "TIFF"),
        "tiff_floats": encode(floats, "TIFF"),
        "tiff_floats_with_nan": encode(Image.fromarray(holes), "TIFF"),
        "tiff_floats_all_equal": encode(Image.new("F", (9, 9), -3.0), "TIFF"),
        "tiff_many_pages": encode_frames("TIFF"),
        "tiff_rotated": encode(rgb, "TIFF", exif=exif(5)),
        "jpeg2000": encode(rgb, "JPEG2000"),
        "ico": encode(rgb.resize((32, 32)), "ICO"),
        "icns": encode(alpha.resize((128, 128)), "ICNS"),
        "ppm": encode(rgb, "PPM"),
        "ppm_16_bit": b"P5 2 2 65535\n" + struct.pack(">4H", 0, 30000, 40000, 65535),
        "pcx": encode(rgb, "PCX"),
        "sgi": encode(rgb, "SGI"),
        "dds": encode(alpha, "DDS"),
        "qoi": encode(rgb, "QOI"),
        "xbm": encode(rgb.convert("1"), "XBM"),
        "xpm": b'/* XPM */\nstatic char *x[] = {\n"2 1 2 1",\n"a c #ff0000",\n"b c #0000ff",\n"ab"\n};\n',
        "psd": b"8BPS\0\1" + struct.pack(">6xHIIHH14x", 3, 5, 4, 8, 3) + bytes(60),
        "tga_with_footer": encode(rgb, "TGA"),
    }
    return [(name, data, OK) for name, data in made.items()]


def _not_images() -> list[tuple[str, bytes, str]]:
    noise = np.random.default_rng(7).bytes(5000)
    made = {
        "text": b"this is no picture\n" * 20,
        "html_error_page": b"<!DOCTYPE html><html><body>404 <svg></svg></body></html>",
        "json": b'{"error": "forbidden"}',
        "git_lfs_pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
        "zeros": bytes(4096),
        "noise": noise,
        "one_byte": b"\xff",
        "one_newline": b"\n",
        "zip": b"PK\x03\x04" + noise[:200],
        "zip_of_a_jpeg": _zip(encode(photo(), "JPEG")),
        "elf": b"\x7fELF" + noise[:200],
        "gzip": zlib.compress(b"hello" * 100, wbits=31),
        "video": b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + noise,
        "wave_sound": b"RIFF\x24\0\0\0WAVEfmt " + noise[:100],
        "utf16_text": "not a picture".encode("utf-16"),
    }
    return [("empty", b"", "empty_file"), *((name, data, "not_an_image") for name, data in made.items())]


def _unsupported() -> list[tuple[str, bytes, str]]:
    preview_first = encode(photo(), "TIFF", tiffinfo={254: 1})
    tiff_of_doubles = encode(Image.new("F", (8, 8)), "TIFF", tiffinfo={})
    made = {
        "heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(300),
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "svg_with_xml_header": b"\xef\xbb\xbf<?xml version='1.0'?>\n<svg/>",
        "pdf": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj",
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
        "eps": encode(photo(), "EPS"),
        "raw_canon_cr2": b"II*\0\x10\0\0\0CR\x02\0" + bytes(100),
        "raw_canon_cr3": b"\0\0\0\x18ftypcrx \0\0\0\1crx isom" + bytes(100),
        "raw_fujifilm": b"FUJIFILMCCD-RAW 0201" + bytes(100),
        "raw_olympus": b"IIRO\x08\0\0\0" + bytes(100),
        "raw_with_preview_first": preview_first,
        "jpeg_xl": b"\xff\x0a" + bytes(100),
        "jpeg_xl_boxed": b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(100),
        "photoshop_psb": b"8BPS\0\2" + bytes(100),
        "gimp": b"gimp xcf v011\0" + bytes(100),
        "open_exr": b"v/1\1\2\0\0\0" + bytes(100),
        "radiance": b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 1 +X 1\n",
        "windows_metafile": b"\xd7\xcd\xc6\x9a" + bytes(100),
        "tiff_64_bit_floats": _patched_tiff(tiff_of_doubles, 258, 64),
        "tiff_unknown_compression": _patched_tiff(encode(photo(), "TIFF"), 259, 34712),
        "bmp_unknown_compression": _patched(encode(photo(), "BMP"), 30, b"\x09\0\0\0"),
        "dds_unknown_pixels": _patched(encode(photo(), "DDS"), 80, b"\4\0\0\0WHAT"),
    }
    return [(name, data, "unsupported_format") for name, data in made.items()]


def _cut() -> list[tuple[str, bytes, str]]:
    big = photo(800, 600)
    jpeg = encode(photo(), "JPEG")
    png = encode(photo(), "PNG")
    end = png_chunk(b"IEND", b"")
    alpha = photo(128, 128)
    alpha.putalpha(Image.linear_gradient("L").resize(alpha.size))
    icons = {"ico": encode(photo(64, 64), "ICO"), "ico_bmp": encode(photo(64, 64), "ICO", bitmap_format="bmp")}
    others = {
        **icons,
        "icns": encode(alpha, "ICNS"),
        "jpeg2000": encode(photo(), "JPEG2000"),
        "jpeg2000_without_boxes": encode(photo(), "JPEG2000", no_jp2=True),
    }
    jpegs = {
        "jpeg": jpeg,
        "jpeg_grey": encode(photo().convert("L"), "JPEG"),
        "jpeg_cmyk": encode(photo().convert("CMYK"), "JPEG"),
        "jpeg_restart_markers": encode(photo(), "JPEG", restart_marker_rows=1),
        "jpeg_optimized": encode(photo(), "JPEG", optimize=True),
        "jpeg_large": encode(big, "JPEG", quality=95),
    }
    progressive = {
        "jpeg_progressive": encode(photo(), "JPEG", progressive=True),
        "jpeg_large_progressive": encode(big, "JPEG", quality=95, progressive=True),
    }
    half = {
        "jpeg_half": jpeg,
        "jpeg_progressive_half": encode(photo(), "JPEG", progressive=True),
        "jpeg_large_half": encode(big, "JPEG", quality=95),
        "jpeg_large_progressive_half": encode(big, "JPEG", quality=95, progressive=True),
        "png_half": png,
        "png_palette_half": encode(photo().quantize(16), "PNG"),
        "gif_half": encode(photo(), "GIF"),
        "webp_half": encode(photo(), "WEBP"),
        "webp_lossless_half": encode(photo(), "WEBP", lossless=True),
        "avif_half": encode(photo(), "AVIF"),
        "bmp_half": encode(photo(), "BMP"),
        "tiff_half": encode(photo(), "TIFF"),
        "tiff_lzw_half": encode(photo(), "TIFF", compression="tiff_lzw"),
        "ppm_half": encode(photo(), "PPM"),
    }
    made = {
        "jpeg_signature_only": jpeg[:3],
        "jpeg_header_only": jpeg[: jpeg.index(b"\xff\xda") + 12],
        "jpeg_cut_in_header": jpeg[:100],
        "jpeg_cut_and_filled_with_zeros": jpeg[: len(jpeg) // 2] + bytes(100_000),
        "png_signature_only": png[:8],
        "jpeg_without_end_mark": jpeg[:-2],
        "jpeg_segment_longer_than_file": b"\xff\xd8\xff\xe0\xff\xff" + bytes(range(200)),
        "png_too_few_pixels": png_header(64, 64) + png_chunk(b"IDAT", zlib.compress(bytes(100))) + end,
        "gif_header_only": encode(photo(), "GIF")[:13],
        "jpeg_with_thumbnail_cut_and_filled": _jpeg_with_thumbnail(jpeg)[: -len(jpeg) // 4] + bytes(100_000),
        "jpeg_cut_at_restart_with_end_mark": _cut_at_restart_mark(encode(photo(), "JPEG", restart_marker_blocks=3)),
    }
    made |= {name: data[: len(data) // 2] for name, data in half.items()}
    made |= {
        f"{name}_{percent}": data[: len(data) * percent // 100] for name, data in others.items() for percent in (30, 60)
    }
    made |= {
        f"{name}_90": others[name][: len(others[name]) * 9 // 10] for name in ("jpeg2000", "jpeg2000_without_boxes")
    }
    for name, data in (jpegs | progressive).items():
        made[f"{name}_half_with_end_mark"] = data[: len(data) // 2] + JPEG_END
        made[f"{name}_most_with_end_mark"] = data[: len(data) * 9 // 10] + JPEG_END
    for name, data in jpegs.items():
        made[f"{name}_half_zeros_end_mark"] = data[: len(data) // 2] + bytes(5000) + JPEG_END
        made[f"{name}_half_many_zeros_end_mark"] = data[: len(data) // 2] + bytes(100_000) + JPEG_END
    return [(name, data, "truncated") for name, data in made.items()]


def _damaged() -> list[tuple[str, bytes, str]]:
    png = encode(photo(), "PNG")
    webp = encode(photo(), "WEBP", lossless=True)
    end = png_chunk(b"IEND", b"")
    made = {
        "png_wrong_header_checksum": _patched(png, 29, b"\0\0\0\0"),
        "png_pixels_not_compressed": png_header(8, 8) + png_chunk(b"IDAT", b"not zlib at all") + end,
        "png_without_pixels": png_header(64, 64) + end,
        "png_zero_width": png_header(0, 8) + png_chunk(b"IDAT", zlib.compress(b"\0")) + end,
        "webp_rubbish_inside": webp[:40] + bytes(len(webp) - 40),
        "psd_without_its_palette": b"8BPS\0\1" + struct.pack(">6xHIIHH14x", 1, 5, 4, 8, 2) + bytes(60),
        "jpeg_zero_size": _jpeg_of_size(0, 0),
        "gif_zero_size": b"GIF89a\0\0\0\0\0\0\0,\0\0\0\0\0\0\0\0\0\2\0;" + bytes(20) + b";",
    }
    return [(name, data, "not_an_image") for name, data in made.items()]


def _too_large() -> list[tuple[str, bytes, str]]:
    png = encode(photo(), "PNG")
    jpeg = encode(photo(), "JPEG")
    gif = encode(photo(), "GIF")
    made = {
        "bomb_png": png_header(60_000, 60_000) + png_chunk(b"IDAT", zlib.compress(bytes(1000))),
        "bomb_png_tiny": png_header(30_000, 30_000) + png_chunk(b"IDAT", b""),
        "bomb_png_1_bit": png_header(20_000, 20_000, 1, 0) + png_chunk(b"IDAT", zlib.compress(bytes(9))),
        "bomb_jpeg": _jpeg_of_size(65_000, 65_000),
        "bomb_gif": b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + encode(photo(), "GIF")[10:],
        "bomb_bmp": _patched(encode(photo(), "BMP"), 18, struct.pack("<ii", 40_000, 40_000)),
        "bomb_tiff": _patched_tiff(_patched_tiff(encode(photo(), "TIFF"), 256, 60_000), 257, 60_000),
        "bomb_ppm": b"P6 50000 50000 255\n",
        "bomb_png_text": _png_with_chunk(png, _png_text(50_000_000)),
        "bomb_png_texts": _png_with_chunk(png, 5 * _png_text(15_000_000)),
        "jpeg_101_scans": jpeg_of_scans(101),
        "jpeg_exif_in_many_parts": jpeg[:2] + _segment(0xE1, b"Exif\0\0abcd") * 100_000 + jpeg[2:],
        "jpeg_fill_bytes": jpeg[:2] + b"\xff" * 100_000 + jpeg[2:],
        "png_many_texts": png[:33] + png_chunk(b"tEXt", b"a\0b") * 100_000 + png[33:],
        "png_many_profiles": png[:33]
        + png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(15_000_000))) * 100
        + png[33:],
        "gif_many_comments": gif[:781] + b"!\xfe\1a\0" * 100_000 + gif[781:],
        "ppm_many_comments": b"P3 900 900 255\n" + b"#\n" * 100_000,
        "icns_many_icons": b"icns" + struct.pack(">I", 800_008) + b"abcd\0\0\0\x08" * 100_000,
        "tiff_many_strips": tiff_of_strips(200_001),
        "bomb_png_colour_profile": encode(photo(), "PNG", icc_profile=bytes(50_000_000)),
    }
    return [(name, data, "too_large") for name, data in made.items()]


def _ycck(cmyk_jpeg: bytes) -> bytes:
    """The same numbers, declared to be YCbCr and black, as Photoshop writes them."""
    return _patched(cmyk_jpeg, cmyk_jpeg.index(b"Adobe") + 11, b"\2")


def _png_rgb_16_bit(image: Image.Image) -> bytes:
    rows = np.asarray(image).astype(">u2") * 257
    pixels = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
    header = png_header(*image.size, bit_depth=16)
    return header + png_chunk(b"IDAT", zlib.compress(pixels)) + png_chunk(b"IEND", b"")


def _zip(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("photo.jpg", data)
    return file.getvalue()


def _png_with_chunk(png: bytes, chunk: bytes) -> bytes:
    return png[:33] + chunk + png[33:]


def _png_text(length: int) -> bytes:
    return png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(length)))


def _jpeg_with_thumbnail(jpeg: bytes) -> bytes:
    """A JPEG as cameras write it: with a small JPEG, including its end marker, in the EXIF data."""
    return jpeg_with_segment(jpeg, 0xE1, exif(1).tobytes() + encode(photo(32, 20), "JPEG"))


def _cut_at_restart_mark(jpeg: bytes) -> bytes:
    return jpeg[: jpeg.index(b"\xff\xd3")] + JPEG_END


def _patched(data: bytes, position: int, patch: bytes) -> bytes:
    return data[:position] + patch + data[position + len(patch) :]


def _jpeg_of_size(width: int, height: int) -> bytes:
    jpeg = encode(photo(), "JPEG")
    return _patched(jpeg, jpeg.index(b"\xff\xc0") + 5, struct.pack(">HH", height, width))


def _patched_tiff(tiff: bytes, tag: int, value: int) -> bytes:
    """Replace all values of a tag in the first directory of a little-endian TIFF."""
    directory = struct.unpack_from("<I", tiff, 4)[0]
    for entry in range(struct.unpack_from("<H", tiff, directory)[0]):
        position = directory + 2 + 12 * entry
        entry_tag, kind, count = struct.unpack_from("<HHI", tiff, position)
        if entry_tag == tag:
            packed = struct.pack("<HHII", entry_tag, 3 if count == 1 else kind, 1, value)
            return _patched(tiff, position, packed)
    raise LookupError(tag)
