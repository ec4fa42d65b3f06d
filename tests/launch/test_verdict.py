"""Every promise of a drill, each with the lie that must be found."""

import io
from typing import Any

import pytest
from handmade_run import EVENTS, FAULTS, METRICS
from rich.console import Console

from outlast.launch.drill import verdict
from outlast.launch.drill.drill import exit_code
from outlast.launch.drill.fault import Order
from outlast.launch.drill.strike import Struck
from outlast.launch.report.timeline import Fault, tell

Event = dict[str, Any]


def commits(
    steps: list[int], holder: int = 1, generation: int = 1, loss: float = 1.0
) -> list[Event]:
    return [
        {"event": "committed", "holder": holder, "generation": generation, "step": step,
         "loss": loss / step, "norm": 0.5, "time": float(step)}
        for step in steps
    ]  # fmt: skip


def digest(value: str) -> Event:
    return {"event": "digest", "sha256": value, "step": 9}


def test_bits() -> None:
    assert not verdict.same_bits([digest("a"), digest("a")], [digest("a")])
    assert verdict.same_bits([digest("a")], [digest("b")])
    assert verdict.same_bits([digest("a"), digest("b")], [digest("a")])
    assert verdict.same_bits([], [digest("a")]), "no digest is not the same digest"


def test_steps_are_those_of_the_twin_and_of_every_rank() -> None:
    run = commits([1, 2, 3]) + commits([1, 2, 3], holder=2)
    assert not verdict.same_steps(run, commits([1, 2, 3, 4]))
    assert not verdict.agreed(run)
    planted = run + commits([3], holder=3, loss=1.1)
    assert verdict.agreed(planted)
    assert verdict.same_steps(planted, commits([1, 2, 3]))
    assert verdict.same_steps([], commits([1]))


@pytest.mark.parametrize(("steps", "good"), [([1, 2, 3], True), ([1, 3], False), ([1, 1], False)])
def test_each_step_once(steps: list[int], good: bool) -> None:
    assert (not verdict.once([{"step": step} for step in steps])) is good


def test_commits_go_back_by_one_step_and_only_in_another_generation() -> None:
    before = commits([1, 2, 3])
    assert not verdict.monotonic(before + commits([3, 4], generation=2))
    assert verdict.monotonic(before + commits([3]))
    assert verdict.monotonic(before + commits([5]))
    restarted = commits([1, 2], holder=2, generation=2)
    assert verdict.monotonic(commits(list(range(1, 9))) + restarted), "steps were lost"


def test_all_nodes_install_the_same_views() -> None:
    def view(agent: str, generation: int, members: list[str]) -> Event:
        return {"event": "view", "agent": agent, "node": agent, "generation": generation,
                "members": members}  # fmt: skip

    assert not verdict.one_view([view("a", 1, ["a", "b"]), view("b", 1, ["a", "b"])])
    assert verdict.one_view([view("a", 1, ["a", "b"]), view("b", 1, ["b"])])
    assert verdict.one_view([view("a", 2, ["a"]), view("a", 1, ["a", "b"])])


def test_redone_steps_and_averages_are_told() -> None:
    run = tell("run", [*EVENTS], METRICS, FAULTS)
    assert verdict.bounded(run), "the handmade run makes two steps again"
    lossy = [{**event, "rungs": {"average": 8}} if event["event"] == "recovered" else event
             for event in EVENTS]  # fmt: skip
    averaged = tell("run", lossy, METRICS, FAULTS)
    assert verdict.unannounced(averaged, lossy)
    assert not verdict.unannounced(averaged, [*lossy, {"event": "averaged"}])


def test_a_fault_without_effect_is_told_as_one() -> None:
    signs = [Struck(Order("kill-worker"), fault, sign={"event": "view"}) for fault in FAULTS]
    run = tell("run", EVENTS, METRICS, FAULTS)
    told = [verdict.told(struck, run) for struck in signs]
    assert [entry["passed"] for entry in told] == [True, True, True]
    missed = Fault(20.0, "node", "nobody noticed", "node1", ("zzzz",))
    run = tell("run", EVENTS, METRICS, [*FAULTS, missed])
    entry = verdict.told(Struck(Order("kill-node"), missed, sign={"event": "view"}), run)
    assert not entry["took_effect"]
    silent = verdict.told(Struck(Order("kill-worker"), FAULTS[0]), run)
    assert not silent["passed"]
    for width in (180, 100):
        out = io.StringIO()
        Console(file=out, width=width).print(verdict.table([*told, entry], width))
        words = out.getvalue().split()
        assert words.count("passed") == 3
        assert {"parity", "no", "effect"} <= set(words)


def test_the_exit_code_tells_not_run_from_broken() -> None:
    passed = {"passed": True, "why": ""}
    not_run, broken = {"passed": False, "why": "not run: no x"}, {"passed": False, "why": "x"}
    assert exit_code({"events": [passed], "violations": {"p": []}}) == 0
    assert exit_code({"events": [passed, not_run], "violations": {}}) == 3
    assert exit_code({"events": [not_run, broken], "violations": {}}) == 1
    assert exit_code({"events": [passed, not_run], "violations": {"p": ["wrong"]}}) == 1
