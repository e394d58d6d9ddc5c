"""Settings of the memory allocator for worker processes."""

from __future__ import annotations

from typing import Final

_KEPT_BYTES: Final = 2**30

KEEP_FREED_MEMORY: Final = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TRIM_THRESHOLD_": str(_KEPT_BYTES),
    "MALLOC_MMAP_THRESHOLD_": str(_KEPT_BYTES),
}
"""Environment variables that make glibc keep freed memory, up to 1 GiB, instead of returning it to the system at once.

A CNN on a CPU allocates and frees a feature map for every layer, and the system has to provide the pages again each
time. Per image, EfficientNet-lite2 takes 76 ms of CPU time without these settings and 47 with them (float32, one
thread, 16 images, torch 2.14). With batch normalisation folded it is 51 and 36, and a `MirroredEfficientNetLite`, which
reuses its maps, takes 30 and 29. Decoding gains too: 2.6 ms an image instead of 3.0 for small JPEGs, and 215 instead of
277 for progressive ones of 48 megapixels.

There is one arena because Ray Data and Ray Train compute in threads, and the arenas of threads other than the first
never keep more than 64 MiB: two actors on two cores caption 47 images a second with one arena, and 38 with the
thresholds alone. glibc reads the variables when a process starts, see
`imcap_ray.distributed.cluster.connection.runtime_environment`.
"""
