"""The lease on an output: only the run that acquired it last may write."""

from __future__ import annotations

import uuid

from imcap_ray import storage
from imcap_ray.errors import ImcapError


def take_over(work: str) -> str:
    """Become the one run that may write to this work folder; the name under which `is_owner` knows it.

    A process of a run that was thought dead writes nothing after that.
    """
    token = uuid.uuid4().hex
    storage.write_bytes(storage.join(work, "owner"), token.encode())
    return token


def is_owner(work: str, token: str) -> bool:
    """Whether the run that took the name `token` may still write."""
    return storage.read_bytes(storage.join(work, "owner")).decode() == token


def require_owner(work: str, token: str) -> None:
    """Raise ImcapError if another run has taken over.

    Here, and not where images are captioned, for the processes that write parts need no torch: importing it costs each
    of them seconds.
    """
    if not is_owner(work, token):
        raise ImcapError(f"another run has taken over {storage.parent(work)}: this one must not write there")
