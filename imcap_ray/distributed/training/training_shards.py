"""A worker's shards of Ray Data's datasets -> batches of features or pixels.

I images, R regions, F channels, S pixels a side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import pyarrow as pa
import ray.train
import torch
from torch import Tensor

from imcap_ray.data.datasets import TRAIN, VALIDATION
from imcap_ray.distributed.pipeline.failure_log import describe_failures
from imcap_ray.runs.training_run import VALIDATION_ADVICE
from imcap_ray.training.loop import BatchSource, ImageBatch
from imcap_ray.training.phases import reads_pixels
from imcap_ray.training.team import Team

SHUFFLE_BUFFER_IMAGES: Final = 1024

RESIDENT_SHARE: Final = 0.4
"""Share of a node's available memory, including the file cache, that the shards of its workers may occupy."""


@dataclass(frozen=True, slots=True)
class ShardFormat:
    """The column of a shard that a phase reads."""

    column: str
    dtype: type[np.generic]
    shapes: Mapping[str, tuple[int, ...]]
    """Shape of an image's values, by split."""

    @classmethod
    def of_phase(cls, phase: str, shapes: Mapping[str, tuple[int, ...]]) -> ShardFormat:
        """Pixels (3, S, S) or cached features (views, R, F)."""
        return cls("pixels", np.uint8, shapes) if reads_pixels(phase) else cls("features", np.float16, shapes)

    def to_tensor(self, rows: pa.Table, split: str) -> Tensor:
        """The values of all rows."""
        arrays = [np.frombuffer(value.as_buffer(), self.dtype) for value in rows[self.column]]
        return torch.from_numpy(np.stack(arrays).reshape(-1, *self.shapes[split]))

    def fits_in_memory(self, num_images: int, available_bytes: float) -> bool:
        """Whether this many training images fit into a worker's share of its node's memory."""
        size_bytes = num_images * int(np.prod(self.shapes[TRAIN])) * np.dtype(self.dtype).itemsize
        return size_bytes <= RESIDENT_SHARE * available_bytes

    def fits_on_every_node(self, num_images: int, available_bytes: float, team: Team) -> bool:
        """Whether the training images of every worker fit into its node's memory; the same answer on all workers.

        Nodes may differ, but all workers must read their shards equally often, because Ray begins to read an epoch when
        every worker asks for it.
        """
        return team.agree(self.fits_in_memory(num_images, available_bytes))


def keep_shard(shard: ShardFormat) -> BatchSource:
    """Read this worker's training images once and keep them in memory.

    While Ray Data streams, its scheduler keeps half a core busy (Ray 2.60), a quarter of a machine with two cores.
    """
    parts = list(_read_shard(TRAIN, shard, batch_size=256))
    num_images = sum(len(part) for part, _ in parts)
    images = torch.empty(num_images, *shard.shapes[TRAIN], dtype=parts[0][0].dtype if parts else torch.uint8)
    image_ids: list[str] = []
    while parts:  # free each part once it is copied, so that the peak is little more than the complete shard
        part, part_ids = parts.pop(0)
        images[len(image_ids) : len(image_ids) + len(part)] = part
        image_ids += part_ids
    return partial(_shuffle, images, image_ids)


def _shuffle(images: Tensor, image_ids: list[str], *, batch_size: int, seed: int) -> Iterator[ImageBatch]:
    if not image_ids:
        return
    # Sort by name first, because a cache that was encoded again has the same images in another order.
    by_name = torch.tensor(sorted(range(len(image_ids)), key=image_ids.__getitem__), dtype=torch.long)
    order = torch.randperm(len(image_ids), generator=torch.Generator().manual_seed(seed))
    for chosen in torch.split(by_name[order], batch_size):
        yield images[chosen], [image_ids[number] for number in chosen.tolist()]


def stream_shard(shard: ShardFormat) -> BatchSource:
    """Read this worker's training images again in every epoch, because they do not fit into memory."""

    def stream(*, batch_size: int, seed: int) -> Iterator[ImageBatch]:
        return _read_shard(
            TRAIN,
            shard,
            batch_size=batch_size,
            local_shuffle_buffer_size=SHUFFLE_BUFFER_IMAGES,
            local_shuffle_seed=seed,
        )

    return stream


def _read_shard(split: str, shard: ShardFormat, **options: Any) -> Iterator[ImageBatch]:
    for rows in ray.train.get_dataset_shard(split).iter_batches(batch_format="pyarrow", **options):
        yield shard.to_tensor(rows, split), rows["image_id"].to_pylist()


def read_validation(
    shard: ShardFormat, expected: Set[str], is_own: Callable[[int], bool]
) -> tuple[list[ImageBatch], str]:
    """Read this worker's batches of the validation images.

    Args:
        expected: the images that every epoch is scored on; others are left out.
        is_own: whether the batch with this number is this worker's.

    Returns:
        The batches, and a message that names the images of all batches that cannot be read; "" if there are none.
    """
    batches: list[ImageBatch] = []
    missing = dict.fromkeys(sorted(expected), "missing")
    dataset = ray.train.get_dataset_shard(VALIDATION)
    for number, rows in enumerate(dataset.iter_batches(batch_format="pyarrow", batch_size=64)):
        is_good = [image_id in expected for image_id in rows["image_id"].to_pylist()]
        if "error_message" in rows.column_names:
            for position, row in enumerate(rows.select(["image_id", "error_code", "error_message"]).to_pylist()):
                if row["error_code"] and is_good[position]:
                    is_good[position] = False
                    missing[row["image_id"]] = f"{row['error_message']} ({row['error_code']})"
        if not all(is_good):
            rows = rows.filter(pa.array(is_good))
        image_ids = rows["image_id"].to_pylist()
        for image_id in image_ids:
            missing.pop(image_id, None)
        if is_own(number) and image_ids:
            batches.append((shard.to_tensor(rows, VALIDATION), image_ids))
    if not missing:
        return batches, ""
    return batches, f"{describe_failures(len(missing), 'validation', [*missing.items()])}: {VALIDATION_ADVICE}"
