"""A folder that only this user can enter, for the private Ray of this process -> removed when the process ends.

Ray's own default, /tmp/ray, is writable for everyone and never cleaned. The folder has a file that its process keeps
locked: a folder whose lock is free belonged to a process that was killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Final

PREFIX: Final = "imcap-ray-"
_LOCK_FILE: Final = "owner.lock"

USERS_END_SECONDS: Final = 8.0
"""Ray's agents notice within seconds that the process they belong to has ended."""

_MAX_FOLDER_LENGTH: Final = 107 - len("/ray/session_2000-01-01_00-00-00_000000_4194304/sockets/plasma_store")
"""Ray puts Unix sockets below its temporary folder, and their paths are limited to 107 characters."""


class PrivateFolder:
    """A new folder of mode 0700 below Ray's usual temporary folder."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._is_removed = False
        base = _base()
        remove_abandoned(base)
        self.path: Final = tempfile.mkdtemp(prefix=PREFIX, dir=base)
        # It gets its name when it is locked: before that another process would take the folder for abandoned.
        unnamed = os.path.join(self.path, f"{_LOCK_FILE}.new")
        self._lock = os.open(unnamed, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        os.rename(unnamed, os.path.join(self.path, _LOCK_FILE))

    def end_processes(self) -> None:
        """Kill Ray's processes that have been started for this folder; only where there is a /proc.

        Ray names it in options, as in --session-dir=PATH. A worker that has just been started outlives its raylet.
        """
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                is_other = process.name != str(self._pid)
                if is_other and f"={self.path}/".encode() in (process / "cmdline").read_bytes():
                    os.kill(int(process.name), signal.SIGKILL)

    def remove(self) -> None:
        """Remove the folder with everything in it. Does nothing the second time, or in a forked process.

        Ray's processes end one after the other, and the last ones would make the folder again for their logs.
        """
        if os.getpid() != self._pid or self._is_removed:
            return
        self._is_removed = True
        self.end_processes()
        deadline = time.monotonic() + USERS_END_SECONDS
        while time.monotonic() < deadline and self._has_users():
            time.sleep(0.1)
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)

    def remove_at_once(self) -> None:
        """Remove the folder of a Ray whose GCS is dead, then kill its raylet, whose end may end this process."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.end_processes()
        shutil.rmtree(self.path, ignore_errors=True)

    def _has_users(self) -> bool:
        """Whether another process has a file of the folder open; False where there is no /proc."""
        for descriptors in Path("/proc").glob("[0-9]*/fd"):
            if descriptors.parent.name == str(self._pid):
                continue
            with contextlib.suppress(OSError):  # another user's, or gone by now
                for descriptor in descriptors.iterdir():
                    with contextlib.suppress(OSError):
                        if os.readlink(descriptor).startswith(f"{os.path.realpath(self.path)}/"):
                            return True
        return False


def remove_abandoned(base: str) -> None:
    """Remove this user's folders below `base` whose processes were killed."""
    for folder in Path(base).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            lock = os.open(folder / _LOCK_FILE, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _base() -> str:
    """Where Ray itself would put its files, or /tmp if the paths of its sockets would be too long there."""
    base = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    fits = len(os.path.join(base, f"{PREFIX}12345678")) <= _MAX_FOLDER_LENGTH
    return base if fits and os.access(base, os.W_OK) else "/tmp"
