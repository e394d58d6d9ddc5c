"""Hashes of images -> which of them have come before. Lets a run caption the same bytes once.

Its process starts beside all others, and imports little.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rbloom import Bloom

from imcap_ray import storage

if TYPE_CHECKING:
    from imcap_ray.runs.captioning_run import CaptioningRun

FALSE_POSITIVE_RATE: Final = 1e-6
"""29 bits an image: 360 MB for 100 million. An image taken for a duplicate by mistake is found at the end of the run
to have no twin, and captioned then."""

REMEMBERED_ANSWERS: Final = 100_000
"""Images whose answer is kept for a task that is repeated; more than are in flight anywhere."""


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class ImageIndex:
    """The hashes that a run has met. Made anew from the rows that are written if its process dies."""

    def __init__(self, output: str, num_images: int) -> None:
        self._met = Bloom(max(num_images, 1), FALSE_POSITIVE_RATE, hash_func=_to_int)
        self._answers: OrderedDict[int, bool] = OrderedDict()
        if storage.list_parquet(output):
            self._met.update(_read_digests(output))

    def have_come_before(self, manifest_ids: list[int], hashes: list[str]) -> list[bool]:
        """For each image, whether another with its hash was asked for before. Asked again, it answers the same."""
        return [self._has_come_before(*image) for image in zip(manifest_ids, hashes, strict=True)]

    def _has_come_before(self, manifest_id: int, sha256: str) -> bool:
        if manifest_id not in self._answers:
            digest = bytes.fromhex(sha256)
            self._answers[manifest_id] = digest in self._met
            self._met.add(digest)
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
            # Reading millions of hashes from a store takes long; Ray Data would take a pipeline that waits for it for
            # one that is stuck.
            ray.get(index.__ray_ready__.remote())
        yield index
    finally:
        ray.kill(index)


def _read_digests(output: str) -> Iterator[bytes]:
    import pyarrow.compute as pc

    from imcap_ray.data.schemas import DUPLICATE
    from imcap_ray.runs.captions_folder import CaptionsFolder

    # Those that wait for a twin do not tell that there is one.
    waits = (pc.field("status") == DUPLICATE) & (pc.field("duplicate_of") == "")
    for batch in CaptionsFolder(output).read_parts(["sha256"], ~waits):
        yield from (bytes.fromhex(digest) for digest in batch["sha256"].to_pylist() if digest)


def _to_int(digest: bytes) -> int:
    return int.from_bytes(digest[:16], "big", signed=True)
