"""Names of captioners -> the modules that are sent to a cluster for them, and the packages that its nodes need."""

from __future__ import annotations

import importlib.machinery
import os
import sysconfig
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Final, NamedTuple

from imcap_ray.errors import ClusterError
from imcap_ray.models.plugin import factory_module, find_entry_point, is_plugin_name, search_current_folder

MAX_PACKAGE_BYTES: Final = 200 * 2**20
"""Largest package that is sent to a cluster. Ray keeps it in the head's memory, and refuses 512 MiB."""


class CaptionerCode(NamedTuple):
    """What the nodes of a cluster need in order to load captioners."""

    modules: tuple[Path, ...] = ()
    """Files and package folders that are sent to them."""
    notes: tuple[str, ...] = ()
    """One line for each package that they must have."""


def captioner_code(models: Iterable[str]) -> CaptionerCode:
    """The code of the captioners among these models. Imports none of them.

    Raises:
        ClusterError: a module is too large to be sent.
    """
    modules, notes = [], []
    for name in models:
        if not is_plugin_name(name):
            continue
        module = factory_module(name)
        if not module:
            notes.append(f"the cluster's nodes need the package {_package_of(name)}, for {name}")
        elif not (path := _find_module(module)):
            notes.append(f"there is no module {module} here: {name} needs it on the cluster's nodes")
        elif _is_installed(path):
            package = packages_distributions().get(module, [module])[0]
            notes.append(f"the cluster's nodes need the package {package}, for {name}")
        else:
            require_small(path)
            modules.append(path)
    return CaptionerCode(tuple(modules), tuple(notes))


def require_small(module: Path) -> None:
    """Raise ClusterError if a module's file or folder is too large to be sent to a cluster."""
    left_out = {".git", ".venv", "venv", "__pycache__"}  # Ray leaves them out too
    paths = [module, *module.rglob("*")]
    sizes = {
        path: path.stat().st_size
        for path in paths
        if path.is_file() and not left_out & set(path.relative_to(module).parts)
    }
    total = sum(sizes.values())
    if total > MAX_PACKAGE_BYTES:
        largest = max(sizes, key=lambda path: sizes[path])
        raise ClusterError(
            f"{module} is sent to the cluster: expected at most {MAX_PACKAGE_BYTES >> 20} MiB, got {total >> 20} MiB: "
            f"move files that are not part of the package, such as {largest}, out of it"
        )


def _package_of(name: str) -> str:
    """The package that provides a captioner that is not named by its module."""
    entry_point = find_entry_point(name)
    if not entry_point:
        return "transformers"
    return entry_point.dist.name if entry_point.dist else entry_point.module


def _find_module(name: str) -> Path | None:
    """The file of a top-level module, or its folder; None if there is none."""
    search_current_folder()
    spec = importlib.machinery.PathFinder.find_spec(name)
    if not spec:
        return None
    if spec.submodule_search_locations:
        return Path(os.path.abspath(next(iter(spec.submodule_search_locations))))
    return Path(os.path.abspath(spec.origin)) if spec.origin else None


def _is_installed(module: Path) -> bool:
    is_library = {"site-packages", "dist-packages"} & set(module.parts)
    return bool(is_library) or module.is_relative_to(sysconfig.get_path("stdlib")) or module.suffix not in ("", ".py")
