"""A process that is to end does, whatever it is doing, and no other."""

from __future__ import annotations

import signal
import subprocess
import sys

LIMIT = "from imcap_ray.distributed.isolation import process_ends_after; import ctypes, time\n"


def exit_code(code: str) -> int:
    return subprocess.run([sys.executable, "-c", LIMIT + code], timeout=50, check=False).returncode


def test_a_process_ends_though_its_work_keeps_pythons_lock() -> None:
    assert exit_code("with process_ends_after(0.2): ctypes.PyDLL(None).sleep(45)") == -signal.SIGALRM


def test_a_process_lives_on_after_work_that_was_done_in_time() -> None:
    assert exit_code("with process_ends_after(0.2): pass\ntime.sleep(0.5)") == 0
    assert exit_code("try:\n  with process_ends_after(0.2): 1 / 0\nexcept ZeroDivisionError: time.sleep(0.5)") == 0
