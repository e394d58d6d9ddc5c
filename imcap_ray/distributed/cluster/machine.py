"""Linux's files, and its limits for containers -> the cores and the memory that this process may use."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

_CGROUP: Final = Path("sys/fs/cgroup")

_MEMORY_FILES: Final = (
    ("memory.max", "memory.current"),  # version 2
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),  # version 1
)


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of memory that this machine, or the container of this process, has left.

    Args:
        root: the folder with `proc` and `sys`. Without them, as on macOS, half of the machine's memory counts.
    """
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    with contextlib.suppress(OSError, KeyError):
        lines = (root / "proc/meminfo").read_text().splitlines()
        sizes = dict(line.split(":", 1) for line in lines if ":" in line)
        available = int(sizes["MemAvailable"].split()[0]) * 1024
    for limit_file, usage_file in _MEMORY_FILES:
        with contextlib.suppress(OSError, ValueError):  # "max" is no limit
            limit, usage = (int((root / _CGROUP / name).read_text()) for name in (limit_file, usage_file))
            usage -= _file_cache((root / _CGROUP / usage_file).with_name("memory.stat"))
            available = min(available, max(0, limit - usage))
    return available


def _file_cache(stat_file: Path) -> int:
    """Bytes of a container's files in memory, which the kernel frees when they are needed; they count as usage."""
    lines = [line.split() for line in stat_file.read_text().splitlines()] if stat_file.exists() else []
    sizes = {name: int(size) for name, size in lines}
    prefix = "total_" if "total_inactive_file" in sizes else ""  # version 1: with the groups below
    return sum(sizes.get(f"{prefix}{kind}_file", 0) for kind in ("inactive", "active"))


def available_cores(root: Path = Path("/")) -> int:
    """Cores that this process may use: those of its CPU affinity, or fewer if its container has a quota.

    Args:
        root: the folder with `sys`.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for read_quota in (_quota_of_version_2, _quota_of_version_1):
        with contextlib.suppress(OSError, ValueError):  # "max" is no quota
            cores = min(cores, max(1, int(read_quota(root / _CGROUP))))
    return cores


def _quota_of_version_2(cgroup: Path) -> float:
    quota, period = (cgroup / "cpu.max").read_text().split()
    return int(quota) / int(period)


def _quota_of_version_1(cgroup: Path) -> float:
    quota = int((cgroup / "cpu/cpu.cfs_quota_us").read_text())
    if quota < 0:
        raise ValueError("no quota")
    return quota / int((cgroup / "cpu/cpu.cfs_period_us").read_text())
