"""Parquet files: opened wherever they are, and written so that readers see a complete file or none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from imcap_ray import storage


@contextmanager
def open_parquet(location: str, *, buffer_bytes: int = 0) -> Iterator[pq.ParquetFile]:
    """An open Parquet file.

    Args:
        buffer_bytes: read this much of a column at a time; 0: read the entire column of a row group.
    """
    filesystem, path = storage.resolve(location)
    with filesystem.open_input_file(path) as stream, pq.ParquetFile(stream, buffer_size=buffer_bytes) as file:
        yield file


def read_metadata(location: str) -> pq.FileMetaData:
    """The metadata of a Parquet file."""
    with open_parquet(location) as file:
        return file.metadata


def read_schema(location: str) -> pa.Schema:
    """The schema of a Parquet file."""
    with open_parquet(location) as file:
        return file.schema_arrow


def read_table(location: str, columns: list[str] | None = None) -> pa.Table:
    """The rows of a Parquet file."""
    filesystem, path = storage.resolve(location)
    with filesystem.open_input_file(path) as stream:
        return pq.read_table(stream, columns=columns)


def write_table(location: str, table: pa.Table) -> None:
    """Write a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    storage.write_bytes(location, sink.getvalue().to_pybytes())
