"""The demo's verdict: it passes only what happened, and only equal bits."""

import dataclasses
import io
from pathlib import Path
from typing import Any

import demo
import gpt
import pytest
from handmade_run import EVENTS, FAULTS, METRICS
from rich.console import Console
from verdict import passed, planned_outcomes, table, took_effect, verdict

from outlast.launch.timeline import Fault, RunRecord, tell

SHA = "ab" * 32


def story(faults: list[Fault], events: list[dict[str, Any]] = EVENTS) -> RunRecord:
    return tell("disturbed", events, METRICS, faults, SHA)


def twin(**changes: Any) -> RunRecord:
    return dataclasses.replace(tell("twin", [], METRICS, digest=SHA), **changes)


def test_equal_bits_and_effective_faults_pass() -> None:
    result = verdict(story(FAULTS), twin(), FAULTS)
    assert result["identical"]
    assert [event["fault"] for event in result["events"]] == [fault.label for fault in FAULTS]
    assert [event["steps_redone"] for event in result["events"]] == [1, 2, 2]
    assert result["events"][0]["phases_ms"]["detect"] == 10.0
    assert passed(result, planned=3)
    assert not passed(result, planned=4)


@pytest.mark.parametrize(
    "other", [{"digest": "cd" * 32}, {"digest": None}, {"losses": {0: 5.0, 1: 4.8}}]
)
def test_another_result_does_not_pass(other: dict[str, Any]) -> None:
    assert not passed(verdict(story(FAULTS), twin(**other), FAULTS), planned=3)


def test_no_digest_is_not_the_same_digest() -> None:
    run = dataclasses.replace(story(FAULTS), digest=None)
    assert not verdict(run, twin(digest=None), FAULTS)["identical"]


def test_a_fault_without_effect_does_not_pass() -> None:
    faults = [*FAULTS[:2], dataclasses.replace(FAULTS[2], agents=("zzzz",))]
    result = verdict(story(faults), twin(), faults)
    assert [event["took_effect"] for event in result["events"]] == [True, True, False]
    assert not passed(result, planned=3)


def test_a_cascade_must_strike_within_the_recovery() -> None:
    # Generation 4 has the ranks 0 to 3; all four recover before the second kill.
    early = [
        {"time": 20.7, "node": "node1", "agent": "bbbb", "event": "recovered", "generation": 4,
         "step": 5, "redone": 0, "rank": rank, "phases": {}, "rungs": {}}
        for rank in range(4)
    ]  # fmt: skip
    run = story(FAULTS, EVENTS + early)
    outcomes = planned_outcomes(run, FAULTS)
    assert not took_effect(outcomes[2], outcomes)
    partly = planned_outcomes(story(FAULTS, EVENTS + early[:3]), FAULTS)
    assert took_effect(partly[2], partly)


@pytest.mark.parametrize("width", [180, 100])
def test_the_table_shows_every_fault(width: int) -> None:
    out = io.StringIO()
    Console(file=out, width=width).print(table(story(FAULTS), FAULTS, width))
    for word in ("kill -9 of a worker", "1 worker of node1", "replica, memory", "parity", "500"):
        assert word in out.getvalue()


def test_what_nobody_injected_is_told() -> None:
    result = verdict(story(FAULTS[1:]), twin(), FAULTS[1:])
    assert result["unplanned"] == ["step 3: 1 worker of node1 lost"]


def test_the_training_understands_its_flags(tmp_path: Path) -> None:
    words = demo.training(demo.parse(["--steps", "7", "--width", "64"]), tmp_path)
    args = gpt.parse(words[1:])
    assert (args.steps, args.width, args.digest_file) == (7, 64, tmp_path / "digest.json")


@pytest.mark.parametrize("keep", [True, False])
def test_earlier_results_are_removed_or_set_aside(tmp_path: Path, keep: bool) -> None:
    out = tmp_path / "demo"
    (out / "twin").mkdir(parents=True)
    (out / "verdict.json").write_text("{}")
    demo.clear(out, keep=keep)
    assert list(out.iterdir()) == []
    assert (tmp_path / "demo.1" / "verdict.json").exists() is keep
