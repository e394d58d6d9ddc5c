"""The folder of a feature cache: which trainings use it, and which of them encodes. Knows nothing of features.

    FOLDER/*.parquet            the parts, under unique names; a part never changes
    FOLDER/_imcap/seal.json     the valid parts and their checksums
                  users/NAME    a training that uses them, rewritten while it is alive: its name, machine, process, time
                  encoding/NAME exists while that user encodes, or is about to
                  work/NAME/    Ray Data's files while that user encodes

Several trainings may use a folder at the same time. One of them encodes and the others wait. This only saves work, the
data are correct without it: the checksums name only parts that their writer has seen complete, and a part that they do
not name is removed only while no other training is alive.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from imcap_ray import storage
from imcap_ray.errors import ImcapError
from imcap_ray.runs.heartbeat import SILENT_SECONDS

WORK_FOLDER: Final = "_imcap"

CHECKSUM_FILE: Final = f"{WORK_FOLDER}/seal.json"


_POLL_SECONDS: Final = 1.0


class FeatureFolder:
    """One training's use of a folder of features, at a path or URI.

    Args:
        training: the training's name. An earlier user with this name counts as dead, because the same training has been
            started again. "": a name that no other user has.
    """

    def __init__(self, location: str, training: str = "") -> None:
        self.location = storage.absolute(location)
        self.name = uuid.uuid4().hex
        self.work = storage.join(self.location, WORK_FOLDER, "work", self.name)
        self._training = training or self.name
        self._users = storage.join(self.location, WORK_FOLDER, "users")
        self._encoding = storage.join(self.location, WORK_FOLDER, "encoding")

    def beat(self) -> None:
        """Write a heartbeat."""
        user = {"training": self._training, "machine": _machine(), "process": os.getpid(), "time_ns": time.time_ns()}
        storage.write_bytes(storage.join(self._users, self.name), json.dumps(user).encode())

    def try_to_beat(self) -> None:
        """Write a heartbeat and ignore errors, because the next one may reach the store."""
        with suppress(OSError, ImcapError):
            self.beat()

    def leave(self) -> None:
        """Stop using the folder."""
        with suppress(OSError, ImcapError):
            storage.remove(storage.join(self._users, self.name))

    @contextmanager
    def encoding(self, *, report: Callable[[str], None], check: Callable[[], None]) -> Iterator[None]:
        """Be the only user that encodes while the block runs; wait while another live user does.

        Args:
            report: called once with a line if there is another one.
            check: called while waiting; raises to stop waiting.
        """
        own, is_marked, has_waited, is_reported = storage.join(self._encoding, self.name), False, False, False
        self.beat()  # the mark of a user without a heartbeat does not count
        try:
            while True:
                if not is_marked and not self._rivals():
                    storage.write_bytes(own, b"")
                    is_marked = True
                rivals = self._rivals()
                # Only one user can see no mark besides its own, because anyone who makes a mark later sees this one.
                if is_marked and not rivals:
                    break
                if is_marked and self.name > min(rivals):  # if several begin together, one of them keeps its mark
                    storage.remove(own)
                    is_marked = False
                if rivals and has_waited and not is_reported:
                    is_reported = True
                    report(f"waiting for {self.location}: {min(rivals.values())} is encoding the same images there")
                check()
                time.sleep(_POLL_SECONDS)
                has_waited = True
            yield
        finally:
            with suppress(OSError, ImcapError):
                storage.remove(own)

    def _rivals(self) -> dict[str, str]:
        """The training names of other live users that encode or are about to, by user."""
        if not storage.is_folder(self._encoding):
            return {}
        marks = {file.name for file in storage.list_files(self._encoding, recursive=False)}
        return {name: training for name, training in self.live_others().items() if name in marks}

    def live_others(self) -> dict[str, str]:
        """The training names of other live users, by user.

        Their heartbeats are compared with this user's, whose time comes from the same clock: the store's, or the
        machines' if the store keeps no times.
        """
        self.beat()
        files = {file.name: file for file in storage.list_files(self._users, recursive=False)}
        now = (files[self.name].modified_ns if self.name in files else 0) or time.time_ns()
        others = {}
        for name, file in files.items():
            if name == self.name or storage.is_temporary(name):
                continue
            is_old = file.modified_ns and now - file.modified_ns > SILENT_SECONDS * 1e9
            training = "" if is_old else self._training_of(file.location, has_time=file.modified_ns != 0)
            if training not in ("", self._training):
                others[name] = training
        return others

    def _training_of(self, location: str, *, has_time: bool) -> str:
        """The name of a user's training; "" if this machine knows that the user's process has ended.

        Args:
            has_time: whether the store knows when the user's file was written; otherwise the time in it counts.
        """
        try:
            user = json.loads(self._read(location))
            training, machine, process = str(user["training"]), user["machine"], int(user["process"])
            written_ns = int(user.get("time_ns", 0))  # earlier versions wrote none
        except (ValueError, KeyError, TypeError):
            return ""
        if not has_time and written_ns and time.time_ns() - written_ns > SILENT_SECONDS * 1e9:
            return ""
        return "" if machine == _machine() and not _is_running(process) else training

    def remove_all_but(self, parts: Collection[str]) -> None:
        """Remove all other parts, and files that dead users left, unless another user is alive."""
        if self.live_others():
            return
        for path in storage.list_parquet(self.location):
            if path.rpartition("/")[2] not in parts:
                storage.remove(path)
        storage.remove_temporary(self.location)
        for name in ("work", "manifest", "done"):  # earlier versions wrote the last two
            storage.remove(storage.join(self.location, WORK_FOLDER, name))
        for folder in (self._users, self._encoding):
            for file in storage.list_files(folder, recursive=False):
                if file.name != self.name:
                    storage.remove(file.location)

    def _read(self, location: str) -> str:
        try:
            return storage.read_bytes(location).decode(errors="replace")
        except FileNotFoundError:
            return ""


def _machine() -> str:
    """A name for the machine or container in which process ids are unique. Host names may repeat."""
    name = socket.gethostname()
    with suppress(OSError):
        name += f" {os.readlink('/proc/self/ns/pid')}"
    with suppress(OSError):
        name += f" {Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"
    return name


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's process
        return True
    return True
