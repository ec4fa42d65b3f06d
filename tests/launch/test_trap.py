"""A trap holds the process it is meant for, and nobody else."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from outlast.cluster import failpoint
from outlast.cluster.environment import environment
from outlast.launch.drill.trap import Trap, Traps


@pytest.fixture
def traps(tmp_path: Path) -> Iterator[Traps]:
    with Traps(tmp_path / "socket", frozenset({"leaf", "move", "reduce"})) as traps:
        failpoint.arm(environment(traps.environment).drill, node="node1", holder=7)
        yield traps
        failpoint.arm(None)


def test_the_one_that_fits_stands_still_until_it_is_let_go(traps: Traps) -> None:
    trap = traps.set(Trap("move", lambda facts: facts["node"] == "node1", {"word": 1}))
    answers: list[object] = []
    thread = threading.Thread(target=lambda: answers.append(failpoint.reach("move", step=3)))
    thread.start()
    assert trap.sprung.wait(10)
    assert trap.facts["step"] == 3
    assert not answers
    assert failpoint.reach("move", step=4) == {}, "it springs once"
    trap.release()
    thread.join(10)
    assert answers == [{"word": 1}]


def test_nobody_else_is_held(traps: Traps) -> None:
    trap = traps.set(Trap("move", lambda facts: facts["node"] == "node2"))
    assert failpoint.reach("move") == {}
    assert failpoint.reach("leaf") == {}
    assert not trap.sprung.is_set()


def test_a_lasting_trap_answers_until_it_is_dropped(traps: Traps) -> None:
    trap = traps.set(Trap("leaf", lambda _: True, {"poison": "nan"}, lasting=True))
    assert [failpoint.reach("leaf") for _ in range(2)] == [{"poison": "nan"}] * 2
    traps.drop(trap)
    assert failpoint.reach("leaf") == {}


def test_the_pace_holds_steps_up_and_ends_with_the_drill(traps: Traps) -> None:
    traps.pace_s = 60.0
    traps.pace_s = 0.0
    assert failpoint.reach("reduce") == {}
    trap = traps.set(Trap("move", lambda _: True))
    thread = threading.Thread(target=failpoint.reach, args=("move",))
    thread.start()
    assert trap.sprung.wait(10)
    traps.drop(trap)
    thread.join(10)
    assert not thread.is_alive()
