"""Resources that a process can use on its machine, from handwritten copies of Linux files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from imcap_ray.distributed.cluster.machine import available_cores, available_memory

GIB = 2**30


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A machine of 64 GiB that has 32 GiB left."""
    write(
        tmp_path,
        proc__meminfo="MemTotal: 67108864 kB\nMemAvailable:   33554432 kB\nHugePages: 0\n",
    )
    return tmp_path


def test_available_memory_is_what_linux_reports(machine: Path) -> None:
    assert available_memory(machine) == 32 * GIB


@pytest.mark.parametrize("version", [1, 2])
def test_available_memory_in_a_container_is_below_its_limit(machine: Path, version: int) -> None:
    limit, usage = {
        1: ("sys__fs__cgroup__memory__memory.limit_in_bytes", "sys__fs__cgroup__memory__memory.usage_in_bytes"),
        2: ("sys__fs__cgroup__memory.max", "sys__fs__cgroup__memory.current"),
    }[version]
    write(machine, **{limit: str(8 * GIB), usage: str(3 * GIB)})
    assert available_memory(machine) == 5 * GIB
    write(machine, **{usage: str(9 * GIB)})  # more than the limit, for a moment
    assert available_memory(machine) == 0


@pytest.mark.parametrize(
    ("folder", "stat"),
    [
        ("sys__fs__cgroup__memory__", "cache 9\ntotal_inactive_file 1073741824\ntotal_active_file 2147483648\n"),
        ("sys__fs__cgroup__", "anon 9\ninactive_file 1073741824\nactive_file 2147483648\n"),
    ],
)
def test_files_that_the_kernel_keeps_in_memory_count_as_available(machine: Path, folder: str, stat: str) -> None:
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if "total" in stat else ("memory.max", "memory.current")
    for name, text in zip((*names, "memory.stat"), (str(8 * GIB), str(7 * GIB), stat), strict=True):
        write(machine, **{folder + name: text})
    assert available_memory(machine) == 4 * GIB


def test_a_container_without_a_limit_has_the_memory_of_the_machine(machine: Path) -> None:
    write(machine, **{"sys__fs__cgroup__memory.max": "max", "sys__fs__cgroup__memory.current": str(3 * GIB)})
    assert available_memory(machine) == 32 * GIB


def test_without_linux_files_the_memory_is_a_positive_guess(tmp_path: Path) -> None:
    assert available_memory(tmp_path) > 0


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 6),
        ({"sys__fs__cgroup__cpu.max": "max 100000\n"}, 6),
        ({"sys__fs__cgroup__cpu.max": "350000 100000\n"}, 3),
        ({"sys__fs__cgroup__cpu.max": "50000 100000\n"}, 1),
        ({"sys__fs__cgroup__cpu.max": "900000 100000\n"}, 6),
        ({"sys__fs__cgroup__cpu__cpu.cfs_quota_us": "-1", "sys__fs__cgroup__cpu__cpu.cfs_period_us": "100000"}, 6),
        ({"sys__fs__cgroup__cpu__cpu.cfs_quota_us": "200000", "sys__fs__cgroup__cpu__cpu.cfs_period_us": "100000"}, 2),
    ],
)
def test_cores_are_those_of_the_affinity_within_the_containers_quota(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, str], cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    write(tmp_path, **files)
    assert available_cores(tmp_path) == cores
