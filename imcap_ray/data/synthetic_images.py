"""Generated photographs and tables of them, for benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def write_photographs(folder: str, count: int, size: tuple[int, int], *, quality: int = 85) -> None:
    """Write `count` different JPEGs of `size` (width, height) that take as long to decode as photographs.

    They are colour noise whose amplitude decreases with the frequency, as in natural images (Field 1987), with an
    exponent of 1.2.
    """
    width, height = size
    generator = np.random.default_rng(0)
    margin = 64
    fields = _pink_noise(generator, height + margin, width + margin)
    for number in range(count):
        top, left = generator.integers(margin, size=2)
        pixels = fields[top : top + height, left : left + width]
        if number % 2:
            pixels = pixels[:, ::-1]
        path = Path(folder, f"{number // 1000:04}", f"{number:07}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        # Positions repeat, so that a comment makes each file different.
        Image.fromarray(np.ascontiguousarray(pixels)).save(path, "JPEG", quality=quality, comment=f"{number}")


def _pink_noise(generator: np.random.Generator, height: int, width: int) -> np.ndarray[Any, Any]:
    """Pixels of pink noise, uint8 (height, width, 3)."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = np.inf
    channels = []
    brightness = generator.standard_normal((height, width))
    for _ in range(3):
        noise = brightness + 0.3 * generator.standard_normal((height, width))  # channels are correlated
        field = np.fft.irfft2(np.fft.rfft2(noise) / frequency**1.2, s=(height, width))
        channels.append(128 + 50 * field / field.std())
    pixels: np.ndarray[Any, Any] = np.clip(np.stack(channels, axis=-1), 0, 255).astype(np.uint8)
    return pixels


def write_table(folder: str, path: str, *, rows_per_group: int = 256) -> None:
    """Write the files of a folder as one Parquet table of image bytes."""
    schema = pa.schema([("image_id", pa.string()), ("image", pa.binary())])
    files = sorted(file for file in Path(folder).rglob("*") if file.is_file())
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, len(files), rows_per_group):
            rows = [
                {"image_id": str(file.relative_to(folder)), "image": file.read_bytes()}
                for file in files[start : start + rows_per_group]
            ]
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
