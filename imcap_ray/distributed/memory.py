"""How worker processes ask the system for memory, and what they keep. Knows nothing of what fills it."""

from __future__ import annotations

from typing import Final

_KEPT_BYTES: Final = 2**30

KEEP_FREED_MEMORY: Final = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TRIM_THRESHOLD_": str(_KEPT_BYTES),
    "MALLOC_MMAP_THRESHOLD_": str(_KEPT_BYTES),
}
"""Environment variables: glibc keeps what is freed, up to 1 GiB, instead of giving it back to the system at once.

A CNN on a CPU allocates and frees its feature maps layer by layer. Getting their pages again and again takes a third of
the time: EfficientNet-lite2 in float32, one thread, 16 images: 29 ms of user and 16 ms of system time an image without
this, 27 and 0.6 with it (torch 2.14). One arena, because Ray Data and Ray Train compute in threads, and in the arenas
that other threads than the first one get nothing over 64 MiB is kept, whatever the thresholds: two actors on two cores
caption 47 images a second with it, 38 with the thresholds alone. Decoding gains too: 2.6 ms an image instead of 3.0 for
small JPEGs, 215 instead of 277 for progressive ones of 48 megapixels. glibc reads these when a process starts: see
`imcap_ray.distributed.cluster.runtime_environment`.
"""
