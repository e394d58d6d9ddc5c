"""Files that show whether a training is alive and why its workers stopped."""

from __future__ import annotations

import time
from pathlib import Path

from imcap_ray.runs.feature_folder import FeatureFolder
from imcap_ray.runs.lease import Lease
from imcap_ray.runs.training_run import keep_alive, take_stop, write_stop


def test_a_run_that_lost_its_lease_records_no_reason_to_stop(tmp_path: Path) -> None:
    work = str(tmp_path)
    first = Lease.acquire(work)
    write_stop(first, "the loss is not finite")
    assert take_stop(work) == "the loss is not finite"

    Lease.acquire(work)
    write_stop(first, "the loss is not finite")
    assert take_stop(work) is None


def test_a_feature_folder_added_later_gets_heartbeats(tmp_path: Path) -> None:
    folders: list[FeatureFolder] = []
    with keep_alive(Lease.acquire(str(tmp_path / "work")), folders, seconds=0.05):
        use = FeatureFolder(str(tmp_path / "cache"))
        folders.append(use)
        deadline = time.monotonic() + 20
        while not (tmp_path / "cache" / "_imcap" / "users" / use.name).exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
