"""The accounting of tests/chaos/random_faults.py: which captions can be computed again, and which must not."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from tests.chaos.recomputation import Computed, Fault, Recomputation, explain_recomputation
from tests.chaos.slow_run import LoadSlowEcho

FIRST, SECOND = 100, 200
"""Drivers of two successive runs."""
ACTOR, OTHER_ACTOR, ISOLATED, RAYLET, OTHER_RAYLET, INDEX = range(11, 17)


def explain(log: list[Computed], faults: list[Fault], copies: dict[str, int] | None = None) -> Recomputation:
    return explain_recomputation(log, faults, [FIRST, SECOND], copies or {})


def computed(time: float, *processes: int) -> Computed:
    return Computed(caption="cat", time=time, processes=processes)


def fault(kind: str, time: float, killed: int, *, run: int = FIRST, done: bool = False) -> Fault:
    return Fault(kind=kind, run=run, time=time, done=frozenset({"cat"} if done else ()), killed=killed)


def test_an_image_in_flight_when_its_driver_is_killed_can_be_recomputed() -> None:
    log = [computed(1, FIRST, ACTOR), computed(9, SECOND, ACTOR)]

    result = explain(log, [fault("driver", 2, FIRST)])

    assert (result.in_flight, result.by_orphans, result.unexplained) == (1, 0, 0)


def test_an_image_computed_by_an_orphan_after_the_kill_counts_as_in_flight() -> None:
    kill = fault("orphan", 2, FIRST)
    again = computed(9, SECOND, ACTOR)

    for moment in (2.5, 9.5):  # before the next run computes it, and after
        result = explain([computed(moment, FIRST, ACTOR), again], [kill])
        assert (result.in_flight, result.by_orphans, result.unexplained) == (1, 1, 0)


def test_an_image_that_was_recorded_as_done_must_not_be_computed_again() -> None:
    log = [computed(1, FIRST, ACTOR), computed(9, SECOND, ACTOR)]

    result = explain(log, [fault("driver", 2, FIRST, done=True)])

    assert (result.in_flight, result.unexplained) == (0, 1)


def test_without_a_fault_in_between_an_image_must_not_be_computed_again() -> None:
    log = [computed(1, FIRST, RAYLET, ACTOR), computed(3, FIRST, RAYLET, ACTOR)]

    assert explain(log, []).unexplained == 1
    assert explain(log, [fault("actor", 4, ACTOR)]).unexplained == 1
    assert explain(log, [fault("orphan", 2, SECOND, run=SECOND)]).unexplained == 1


@pytest.mark.parametrize(
    ("kind", "killed", "is_lost"),
    [
        ("actor", ACTOR, True),
        ("node", RAYLET, True),
        ("actor", OTHER_ACTOR, False),
        ("node", OTHER_RAYLET, False),
        ("index", INDEX, False),
    ],
)
def test_a_fault_loses_only_what_the_killed_process_or_node_computed(kind: str, killed: int, is_lost: bool) -> None:
    log = [computed(1, FIRST, RAYLET, ACTOR), computed(9, FIRST, 99, 98)]

    result = explain(log, [fault(kind, 2, killed)])

    assert (result.in_flight, result.unexplained) == ((1, 0) if is_lost else (0, 1))


def test_a_fault_explains_one_computation_of_an_image() -> None:
    log = [computed(time, FIRST, RAYLET, actor) for time, actor in ((1, ACTOR), (3, 18), (5, 19))]
    faults = [fault("actor", 2, ACTOR), fault("actor", 4, 18)]

    assert explain(log, faults[:1]).unexplained == 1
    result = explain(log, faults)
    assert (result.in_flight, result.unexplained) == (2, 0)


def test_work_of_an_isolated_process_is_lost_with_its_actor() -> None:
    kill = fault("actor", 2, ACTOR)
    again = computed(9, FIRST, RAYLET, OTHER_ACTOR)

    of_killed = [computed(2.1, FIRST, ACTOR, RAYLET, ISOLATED), again]
    of_another = [computed(2.1, FIRST, OTHER_ACTOR, RAYLET, ISOLATED), again]

    assert explain(of_killed, [kill]).unexplained == 0
    assert explain(of_another, [kill]).unexplained == 1


def test_a_block_is_lost_with_its_node_even_if_its_actor_was_killed_before() -> None:
    log = [computed(1, FIRST, RAYLET, ACTOR), computed(9, FIRST, OTHER_RAYLET, OTHER_ACTOR)]

    assert explain(log, [fault("node", 5, RAYLET)]).unexplained == 0
    assert explain(log, [fault("node", 5, OTHER_RAYLET)]).unexplained == 1


def test_copies_can_be_computed_if_the_index_was_killed_while_the_first_was_in_flight() -> None:
    log = [computed(time, FIRST, RAYLET, ACTOR) for time in (1, 3, 4)]
    kill = fault("index", 2, INDEX)
    kill_when_done = fault("index", 2, INDEX, done=True)

    def counts(fault: Fault, num_copies: int) -> tuple[int, int]:
        recomputation = explain(log, [fault], {"cat": num_copies})
        return recomputation.copies, recomputation.unexplained

    assert [counts(kill, number) for number in (0, 1, 2, 3)] == [(0, 2), (1, 1), (2, 0), (2, 0)]
    assert counts(kill_when_done, 2) == (0, 2)
    assert counts(fault("index", 5, INDEX), 2) == (0, 2)


def test_a_process_logs_the_processes_it_works_for(tmp_path: Path) -> None:
    load = LoadSlowEcho(str(tmp_path), (FIRST,))

    received = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(load))))
    received()

    (log,) = tmp_path.iterdir()
    this = os.getpid()  # it sends the object, and it captions: only sending makes it one of those that others work for
    assert log.name.startswith(f"{FIRST}-{this}-{os.getppid()}-{this}@")
