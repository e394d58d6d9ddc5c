"""Blocks of Ray Data -> Parquet files that appear complete or not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from ray.data.block import BlockAccessor
from ray.data.datasource import BlockBasedFileDatasink, FilenameProvider

from imcap_ray import storage


class ParquetParts(BlockBasedFileDatasink):
    """Parquet files of one schema that a reader never sees half-written.

    Ray's own Parquet writer opens the final path and fills it, so that a reader or a crash may meet a file without its
    footer, and an upload that fails halfway is published when it is closed. Here a part appears when it is complete.
    Every file has the key-value metadata of the schema. Columns outside the schema are left out: Ray has recorded
    `manifest_id` as done by then.

    Args:
        folder: where the parts are written.
        extension: of their names: `.parquet`, or nothing.
        min_rows_per_file: rows are collected until a file has this many.
        check: called before a part appears; raises if this run may not write any more.
    """

    def __init__(
        self, folder: str, *, extension: str, schema: pa.Schema, min_rows_per_file: int, check: Callable[[], None]
    ) -> None:
        super().__init__(
            folder,
            min_rows_per_file=min_rows_per_file,
            file_format="parquet",
            filename_provider=FilenameProvider(file_format="parquet"),
            filesystem=storage.resolve(folder)[0] if storage.is_uri(folder) else None,
        )
        self._folder = folder
        self._extension = extension
        self._schema = schema
        self._check = check

    def write_block(self, block: BlockAccessor, block_index: int, ctx: Any) -> None:
        """Write a part, completely or not at all."""
        part = pa.BufferOutputStream()
        self.write_block_to_file(block, part)
        name = self.filename_provider.get_filename_for_task(ctx.kwargs["write_uuid"], ctx.task_idx)
        name = name.removesuffix(".parquet") + self._extension
        self._check()
        storage.write_bytes(storage.join(self._folder, name), memoryview(part.getvalue()))

    def write_block_to_file(self, block: BlockAccessor, file: pa.NativeFile) -> None:
        """Write the rows with the columns of the schema."""
        table = block.to_arrow().select(self._schema.names)
        pq.write_table(table.cast(self._schema), file, compression="zstd")
