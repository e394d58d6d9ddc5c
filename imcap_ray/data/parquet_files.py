"""Whole Parquet files: read, and write so that readers see all of a file or none of it."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from imcap_ray import storage


def read_table(location: str, columns: list[str] | None = None) -> pa.Table:
    """A Parquet file as a whole."""
    filesystem, path = storage.resolve(location)
    with filesystem.open_input_file(path) as stream:
        return pq.read_table(stream, columns=columns)


def write_table(location: str, table: pa.Table) -> None:
    """Write a Parquet file that readers see whole or not at all."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    storage.write_bytes(location, sink.getvalue().to_pybytes())
