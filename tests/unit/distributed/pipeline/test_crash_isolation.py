"""A process that must end is ended during any work, and no other process is."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from imcap_ray.distributed.pipeline.crash_isolation import took_longer

LIMIT = "from imcap_ray.distributed.pipeline.crash_isolation import process_ends_after; import ctypes, time\n"


def exit_code(code: str) -> int:
    return subprocess.run([sys.executable, "-c", LIMIT + code], timeout=50, check=False).returncode


def test_a_process_ends_even_if_its_work_holds_the_gil() -> None:
    assert exit_code("with process_ends_after(0.2): ctypes.PyDLL(None).sleep(45)") == -signal.SIGALRM


def test_a_process_survives_work_that_finished_in_time() -> None:
    assert exit_code("with process_ends_after(0.2): pass\ntime.sleep(0.5)") == 0
    assert exit_code("try:\n  with process_ends_after(0.2): 1 / 0\nexcept ZeroDivisionError: time.sleep(0.5)") == 0


@pytest.mark.parametrize(
    ("work", "expected_exit", "is_slow"),
    [
        ("time.sleep(0.6)\nwith process_ends_after(0.5): os.abort()", -signal.SIGABRT, False),  # a slow store
        ("with process_ends_after(0.5): time.sleep(45)", -signal.SIGALRM, True),
        ("with process_ends_after(0.5): pass\ntime.sleep(0.6)\nos.abort()", -signal.SIGABRT, False),
    ],
)
def test_only_decoding_is_subject_to_the_decoding_time_limit(
    tmp_path: Path, work: str, expected_exit: int, is_slow: bool
) -> None:
    note = tmp_path / "note"
    note.write_bytes(bytes(8))

    imports = "import os\nfrom imcap_ray.distributed.pipeline.crash_isolation import keep_note"
    code = f"{imports}\nkeep_note({str(note)!r})\n{work}"

    assert exit_code(code) == expected_exit
    with note.open("rb") as file:
        assert took_longer(file, 0.5) == is_slow
