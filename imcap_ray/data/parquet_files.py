"""Parquet files: opened wherever they are, and written so that readers see a complete file or none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from imcap_ray import storage


class PlainParquetFile(pq.ParquetFile):  # type: ignore[misc]
    """A Parquet file whose columns have the types of `_plain_type`, whatever types its writer used for the values."""

    @property
    def schema_arrow(self) -> pa.Schema:
        """The schema with plain types."""
        schema = super().schema_arrow
        fields = [field.with_type(_plain_type(field.type)) for field in schema]
        return pa.schema(fields, metadata=schema.metadata)

    def read_row_group(self, *args: Any, **options: Any) -> pa.Table:
        """The rows of a row group with plain types."""
        return _plain(super().read_row_group(*args, **options))

    def iter_batches(self, *args: Any, **options: Any) -> Iterator[pa.RecordBatch]:
        """The rows in batches with plain types."""
        return map(_plain, super().iter_batches(*args, **options))


def _plain(rows: Any) -> Any:
    columns = [values.cast(_plain_type(values.type)) for values in rows.columns]
    return type(rows).from_arrays(columns, names=rows.schema.names)


def _plain_type(kind: pa.DataType) -> pa.DataType:
    """The type without dictionaries (pandas' and polars' categoricals), views and fixed lengths of lists."""
    if pa.types.is_dictionary(kind):
        return _plain_type(kind.value_type)
    if pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_binary_view(kind):
        return pa.large_binary()
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_plain_type(field.type)) for field in kind])
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        return pa.list_(kind.value_field.with_type(_plain_type(kind.value_type)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_plain_type(kind.value_type)))
    return kind


@contextmanager
def open_parquet(location: str, *, buffer_bytes: int = 0) -> Iterator[pq.ParquetFile]:
    """An open Parquet file, with columns of plain types: no dictionaries, views, or lists of a fixed length.

    Args:
        buffer_bytes: read this much of a column at a time; 0: read the entire column of a row group.
    """
    with storage.open_file(location) as stream, PlainParquetFile(stream, buffer_size=buffer_bytes) as file:
        yield file


def read_metadata(location: str) -> pq.FileMetaData:
    """The metadata of a Parquet file."""
    with open_parquet(location) as file:
        return file.metadata


def read_schema(location: str) -> pa.Schema:
    """The schema of a Parquet file, with plain types, see `open_parquet`."""
    with open_parquet(location) as file:
        return file.schema_arrow


def read_table(location: str, columns: list[str] | None = None) -> pa.Table:
    """The rows of a Parquet file."""
    with storage.open_file(location) as stream:
        return pq.read_table(stream, columns=columns)


def write_table(location: str, table: pa.Table) -> None:
    """Write a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    storage.write_bytes(location, sink.getvalue().to_pybytes())
