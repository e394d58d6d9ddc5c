"""Hashes of images -> which of them are repeated, so that a run captions the same bytes once.

Imports little, because its process starts at the same time as all others.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rbloom import Bloom

from imcap_ray import storage

if TYPE_CHECKING:
    from imcap_ray.runs.captioning_run import CaptioningRun

FALSE_POSITIVE_RATE: Final = 1e-6
"""29 bits per image: 360 MB for 100 million. An image that is taken for a duplicate by mistake has no twin at the end
of the run, and is captioned then."""

REMEMBERED_ANSWERS: Final = 100_000
"""Images whose answer is kept for a task that is repeated: more than are ever in flight."""


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class ImageIndex:
    """The hashes that a run has read. If its process dies, they are read again from the rows that are written."""

    def __init__(self, output: str, num_images: int) -> None:
        self._hashes = Bloom(max(num_images, 1), FALSE_POSITIVE_RATE, hash_func=_to_int)
        self._answers: OrderedDict[int, bool] = OrderedDict()
        if storage.list_work_tables(output):
            self._hashes.update(_read_digests(output))

    def are_repeated(self, manifest_ids: list[int], hashes: list[str]) -> list[bool]:
        """Whether an image of the same hash came before, for each image. The same image gets the same answer again."""
        return [self._is_repeated(*image) for image in zip(manifest_ids, hashes, strict=True)]

    def _is_repeated(self, manifest_id: int, sha256: str) -> bool:
        if manifest_id not in self._answers:
            digest = bytes.fromhex(sha256)
            self._answers[manifest_id] = digest in self._hashes
            self._hashes.add(digest)
            if len(self._answers) > REMEMBERED_ANSWERS:
                self._answers.popitem(last=False)
        return self._answers[manifest_id]


@contextmanager
def image_index(run: CaptioningRun, *, enabled: bool = True) -> Iterator[Any]:
    """An index of the images that a run has written, in a process beside the driver, or None if it is not `enabled`.

    The process ends with the block. The handles that a pipeline holds would keep it alive as long as the driver.
    """
    if not enabled:
        yield None
        return
    # On this node, so that the loss of any other does not matter.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    index = ImageIndex.options(scheduling_strategy=here).remote(  # type: ignore[attr-defined]
        run.folder.location, run.num_images
    )
    try:
        if run.num_done:
            # Reading millions of hashes from a store takes long, and Ray Data would think that a pipeline is stuck
            # which waits for it.
            ray.get(index.__ray_ready__.remote())
        yield index
    finally:
        with suppress(RayError):  # the cluster itself may be lost
            ray.kill(index)


def _read_digests(output: str) -> Iterator[bytes]:
    import pyarrow.compute as pc

    from imcap_ray.data.schemas import DUPLICATE
    from imcap_ray.runs.captions_folder import CaptionsFolder

    # Rows that wait for the caption of a twin do not count: the twin may not exist.
    waits = (pc.field("status") == DUPLICATE) & (pc.field("duplicate_of") == "")
    for batch in CaptionsFolder(output).read_parts(["sha256"], ~waits):
        yield from (bytes.fromhex(digest) for digest in batch["sha256"].to_pylist() if digest)


def _to_int(digest: bytes) -> int:
    return int.from_bytes(digest[:16], "big", signed=True)
