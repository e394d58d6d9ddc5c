"""Which tasks the counter takes for retries. The actor's class is used as an ordinary one: no Ray is started."""

from __future__ import annotations

from typing import Any

import pytest

from imcap_ray.distributed.pipeline.progress import ProgressCounter


@pytest.fixture
def counter() -> Any:
    return ProgressCounter.__ray_metadata__.modified_class()  # type: ignore[attr-defined]


def test_a_task_that_begins_again_without_having_ended_is_a_retry(counter: Any) -> None:
    assert not counter.start_task("first")
    assert not counter.start_task("second")
    assert counter.start_task("first")


def test_a_task_that_has_ended_is_not_a_retry(counter: Any) -> None:
    counter.start_task("task")
    counter.report_work("task", is_working=False, is_actor=False)

    assert not counter.start_task("task")


def test_the_end_of_one_part_of_a_task_leaves_the_other_a_retry(counter: Any) -> None:
    for part in ("task/0", "task/64"):
        counter.start_task(part)  # the process dies in the second
        if part == "task/0":
            counter.report_work(part, is_working=False, is_actor=False)

    assert not counter.start_task("task/0")
    counter.report_work("task/0", is_working=False, is_actor=False)
    assert counter.start_task("task/64")
