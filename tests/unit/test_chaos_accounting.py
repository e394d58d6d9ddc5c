"""The accounting of `jobs/benchmark.py chaos`: which captions may have been computed again, and which may not."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FIRST, SECOND = 100, 200
"""Drivers of two successive runs."""
ACTOR, OTHER_ACTOR, ISOLATED, RAYLET, OTHER_RAYLET, INDEX = range(11, 17)


def explain(benchmark: ModuleType, log: list[Any], faults: list[Any], copies: dict[str, int] | None = None) -> Any:
    return benchmark.explain_recomputation(log, faults, [FIRST, SECOND], copies or {})


def computed(benchmark: ModuleType, time: float, *processes: int) -> Any:
    return benchmark.Computed(caption="cat", time=time, processes=processes)


def fault(benchmark: ModuleType, kind: str, time: float, killed: int, *, run: int = FIRST, noted: bool = False) -> Any:
    return benchmark.Fault(kind=kind, run=run, time=time, noted=frozenset({"cat"} if noted else ()), killed=killed)


def test_an_image_in_flight_when_its_driver_is_killed_may_be_computed_again(benchmark: ModuleType) -> None:
    log = [computed(benchmark, 1, FIRST, ACTOR), computed(benchmark, 9, SECOND, ACTOR)]

    found = explain(benchmark, log, [fault(benchmark, "driver", 2, FIRST)])

    assert (found.in_flight, found.by_orphans, found.unexplained) == (1, 0, 0)


def test_an_image_that_an_orphan_computes_after_the_kill_was_in_flight_at_it(benchmark: ModuleType) -> None:
    kill = fault(benchmark, "orphan", 2, FIRST)
    again = computed(benchmark, 9, SECOND, ACTOR)

    for moment in (2.5, 9.5):  # before the next run computes it, and after
        found = explain(benchmark, [computed(benchmark, moment, FIRST, ACTOR), again], [kill])
        assert (found.in_flight, found.by_orphans, found.unexplained) == (1, 1, 0)


def test_an_image_that_was_noted_as_done_must_not_be_computed_again(benchmark: ModuleType) -> None:
    log = [computed(benchmark, 1, FIRST, ACTOR), computed(benchmark, 9, SECOND, ACTOR)]

    found = explain(benchmark, log, [fault(benchmark, "driver", 2, FIRST, noted=True)])

    assert (found.in_flight, found.unexplained) == (0, 1)


def test_without_a_fault_in_between_an_image_must_not_be_computed_again(benchmark: ModuleType) -> None:
    log = [computed(benchmark, 1, FIRST, RAYLET, ACTOR), computed(benchmark, 3, FIRST, RAYLET, ACTOR)]

    assert explain(benchmark, log, []).unexplained == 1
    assert explain(benchmark, log, [fault(benchmark, "actor", 4, ACTOR)]).unexplained == 1
    assert explain(benchmark, log, [fault(benchmark, "orphan", 2, SECOND, run=SECOND)]).unexplained == 1


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
def test_a_fault_loses_what_the_killed_process_and_node_have_computed_and_nothing_else(
    benchmark: ModuleType, kind: str, killed: int, is_lost: bool
) -> None:
    log = [computed(benchmark, 1, FIRST, RAYLET, ACTOR), computed(benchmark, 9, FIRST, 99, 98)]

    found = explain(benchmark, log, [fault(benchmark, kind, 2, killed)])

    assert (found.in_flight, found.unexplained) == ((1, 0) if is_lost else (0, 1))


def test_a_fault_explains_one_computation_of_an_image(benchmark: ModuleType) -> None:
    log = [computed(benchmark, time, FIRST, RAYLET, actor) for time, actor in ((1, ACTOR), (3, 18), (5, 19))]
    faults = [fault(benchmark, "actor", 2, ACTOR), fault(benchmark, "actor", 4, 18)]

    assert explain(benchmark, log, faults[:1]).unexplained == 1
    found = explain(benchmark, log, faults)
    assert (found.in_flight, found.unexplained) == (2, 0)


def test_what_an_isolated_process_computes_is_lost_with_its_actor(benchmark: ModuleType) -> None:
    kill = fault(benchmark, "actor", 2, ACTOR)
    again = computed(benchmark, 9, FIRST, RAYLET, OTHER_ACTOR)

    of_killed = [computed(benchmark, 2.1, FIRST, ACTOR, RAYLET, ISOLATED), again]
    of_another = [computed(benchmark, 2.1, FIRST, OTHER_ACTOR, RAYLET, ISOLATED), again]

    assert explain(benchmark, of_killed, [kill]).unexplained == 0
    assert explain(benchmark, of_another, [kill]).unexplained == 1


def test_a_block_is_lost_with_its_node_even_if_its_actor_was_killed_before(benchmark: ModuleType) -> None:
    log = [computed(benchmark, 1, FIRST, RAYLET, ACTOR), computed(benchmark, 9, FIRST, OTHER_RAYLET, OTHER_ACTOR)]

    assert explain(benchmark, log, [fault(benchmark, "node", 5, RAYLET)]).unexplained == 0
    assert explain(benchmark, log, [fault(benchmark, "node", 5, OTHER_RAYLET)]).unexplained == 1


def test_copies_may_be_computed_after_the_index_was_killed_while_the_first_was_in_flight(
    benchmark: ModuleType,
) -> None:
    log = [computed(benchmark, time, FIRST, RAYLET, ACTOR) for time in (1, 3, 4)]
    kill = fault(benchmark, "index", 2, INDEX)
    kill_when_noted = fault(benchmark, "index", 2, INDEX, noted=True)

    def found(fault: Any, num_copies: int) -> tuple[int, int]:
        recomputation = explain(benchmark, log, [fault], {"cat": num_copies})
        return recomputation.copies, recomputation.unexplained

    assert [found(kill, number) for number in (0, 1, 2, 3)] == [(0, 2), (1, 1), (2, 0), (2, 0)]
    assert found(kill_when_noted, 2) == (0, 2)
    assert found(fault(benchmark, "index", 5, INDEX), 2) == (0, 2)


def test_a_process_logs_for_which_processes_it_works(benchmark: ModuleType, tmp_path: Path) -> None:
    load = benchmark.LoadSlowEcho(str(tmp_path), (FIRST,))

    handed_on = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(load))))
    handed_on()

    (log,) = tmp_path.iterdir()
    this = os.getpid()  # it hands on, and it captions; only the first makes it one of those that others work for
    assert log.name.startswith(f"{FIRST}-{this}-{os.getppid()}-{this}@")
