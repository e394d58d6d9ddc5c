"""The connected Ray -> the CPUs and GPUs of it that no task or actor holds."""

from __future__ import annotations

from dataclasses import dataclass

import ray


@dataclass(frozen=True)
class FreeResources:
    """The resources of a cluster, and those that no task or actor holds at the moment."""

    cpus: float
    free_cpus: float
    gpus: float
    free_gpus: float

    @classmethod
    def read(cls) -> FreeResources:
        """The resources of the connected Ray."""
        total = ray.cluster_resources()  # type: ignore[no-untyped-call]
        free = ray.available_resources()  # type: ignore[no-untyped-call]
        return cls(
            cpus=total.get("CPU", 0.0),
            free_cpus=free.get("CPU", 0.0),
            gpus=total.get("GPU", 0.0),
            free_gpus=free.get("GPU", 0.0),
        )

    def lacks(self, *, cpus: float, gpus: float) -> str:
        """A clause that reports that fewer than these are free; "" if enough are."""
        if self.free_cpus < cpus:
            return f"the cluster has {self.free_cpus:g} of {self.cpus:g} CPUs free"
        if self.free_gpus < gpus:
            return f"the cluster has {self.free_gpus:g} of {self.gpus:g} GPUs free"
        return ""
