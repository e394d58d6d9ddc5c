"""The lease on an output: only the run that acquired it last may write."""

from __future__ import annotations

import uuid
from collections.abc import Collection
from dataclasses import dataclass

from imcap_ray import storage
from imcap_ray.errors import ImcapError


@dataclass(frozen=True, slots=True)
class Lease:
    """One run's right to write to a work folder. Processes of other machines may hold copies of it."""

    work: str
    """The work folder, `_imcap` or `_training`, below the output."""
    token: str
    """What the folder's file `owner` holds while this run may write."""

    @classmethod
    def acquire(cls, work: str) -> Lease:
        """Acquire the lease. A run that held it before, or a process of it that was thought dead, writes no more."""
        lease = cls(work, uuid.uuid4().hex)
        storage.write_bytes(storage.join(work, "owner"), lease.token.encode())
        return lease

    def is_held(self) -> bool:
        """Whether no other run has acquired the lease since."""
        return storage.read_bytes(storage.join(self.work, "owner")).decode() == self.token

    def require(self) -> None:
        """Raise ImcapError if another run has acquired the lease."""
        if not self.is_held():
            raise ImcapError(f"another run has taken over {storage.parent(self.work)}: this one must not write there")


def has_foreign_files(output: str, first_files: Collection[str]) -> bool:
    """Whether the output of a run contains files other than those that a run writes before anything else.

    A run that is killed right after its start leaves only those, and temporary ones.

    Args:
        first_files: names of these files within the output.
    """
    names = (file.name for file in storage.list_files(output))
    return any(name not in first_files and not storage.is_temporary(name.rpartition("/")[2]) for name in names)
