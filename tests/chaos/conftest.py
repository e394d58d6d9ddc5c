from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.dataset as pads
import pytest

from tests.malformed_images import encode, photo


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """120 different small JPEGs."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for number in range(120):
        (folder / f"{number:03}.jpg").write_bytes(encode(photo(40 + number % 20, 50 + number // 20), "JPEG"))
    return folder


@pytest.fixture
def read() -> Iterator[Callable[[Path], list[dict[str, Any]]]]:
    """Read the rows of an output with a plain Parquet reader, sorted by their ids."""

    def read(output: Path) -> list[dict[str, Any]]:
        parts = [str(path) for path in output.glob("*.parquet")]
        rows: list[dict[str, Any]] = pads.dataset(parts).to_table().to_pylist() if parts else []
        return sorted(rows, key=lambda row: row["image_id"])

    yield read
