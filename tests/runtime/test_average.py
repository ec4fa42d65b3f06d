"""Nodes are lost that nothing gives back: averaged and announced where asked for, else refused."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from outlast.checkpoint.average import edges
from outlast.checkpoint.batch import fillings
from outlast.checkpoint.ladder import Recovery
from outlast.checkpoint.records import Protection, Report
from outlast.layout.run import Run, canonical, subtract
from outlast.layout.space import Space, Tensor
from outlast.runtime import transfer as module

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "checkpoint"))
import emulated_job
from emulated_job import ROLES, EmulatedJob, cut
from test_transfer import transferred
from training_job import TrainingJob

Start = Callable[..., TrainingJob]
SCRIPT = ("--parity", "0", "--steps", "16", "--pause", "0.05")


@pytest.mark.parametrize("kind", ["squared"])
def test_lost_nodes_are_averaged_and_announced(start: Start, kind: str) -> None:
    """Two in a row: what was averaged first is in the records that the second one reads."""
    job = start(4, 1, *SCRIPT, "--average", kind)
    job.wait_for_step(3)
    job.kill_node("node1")
    job.wait(lambda: len(job.events("averaged")) == 1, "the first loss")
    job.wait_for_step(max(job.steps) + 2)
    job.kill_node("node2")
    assert job.end() == 0, job.output
    assert len(job.digests) == 2
    assert len(set(job.digests)) == 1
    assert job.steps == list(range(1, 17))
    told = job.events("averaged")
    assert [event["units"] for event in told] == [["blocks.0", "blocks.1", "blocks.2"]] * 2
    for event in told:
        first, middle, last = event["weights"]
        assert (first, last) == ([0.0, 1.0], [1.0, 0.0])
        assert sum(middle) == pytest.approx(1.0)
        assert middle[0] not in (0.0, 0.5, 1.0)
        assert event["weighted_by"] == kind
    assert job.output.count("LOSSY: 3 blocks averaged from the neighbours") == 2
    rungs = [entry["rungs"] for entry in job.events("recovered") if entry["generation"] > 1]
    assert all(rung["average"] and rung["parity"] for rung in rungs)  # the edges came exactly
    steps = [[event["step"], 16.0 - event["step"]] for event in told]
    lineages = {json.dumps(json.loads(m)) for m in re.findall(r"lineage (\[\[.*?\]\])", job.output)}
    assert lineages == {json.dumps(steps)}  # they count their steps from the loss


def test_without_asking_it_is_refused(start: Start) -> None:
    job = start(3, 1, *SCRIPT)
    job.wait_for_step(3)
    job.kill_node("node1")
    assert job.end() != 0
    assert "elements are in no memory or parity" in job.output
    assert not job.events("averaged")


# The bytes, between ranks that are threads.

NAMES = ("in", *(f"h.{index}" for index in range(5)), "out")
SPACE = Space.of(
    [Tensor(f"{name}.weight", (700,) if "h" in name else (500,), "float32") for name in NAMES],
    unit_of=lambda name: name.removesuffix(".weight"),
)
NORMS = (9.0, 1.0, 2.0, 4.0, 0.0, 3.0, 9.0)


def numbers(step: int, role: str, numel: int) -> np.ndarray:
    """Contents of a role that are numbers."""
    drawn = np.random.default_rng([step, len(role)]).standard_normal(numel).astype(np.float32)
    return (drawn if role == "param" else drawn.astype(np.float16)).view(np.uint8)


class State:
    """The half of a rank, with what it holds of the step."""

    roles = ROLES

    def __init__(self, data: dict[str, np.ndarray]) -> None:
        self.data = {name: values.copy() for name, values in data.items()}

    def host(self, half: int, role: str, run: Run) -> torch.Tensor:
        whole = torch.from_numpy(self.data[role])
        return whole.view(torch.float32 if role == "param" else torch.bfloat16)[
            run.start : run.stop
        ]


def average(monkeypatch: pytest.MonkeyPatch) -> tuple[Recovery, list[State], list[list[Run]]]:
    """Four nodes lose one: the decision, and what every rank holds and received afterwards."""
    monkeypatch.setattr(emulated_job, "truth", numbers)
    job = EmulatedJob(4, 1, space=SPACE, protection=Protection(0, 16, edges(SPACE)))
    job.ladder = replace(job.ladder, average="squared")
    job.protect(1)
    job.lose_node("node2")
    slots, parity, reports = job.sources()

    def told(report: Report) -> Report:
        return replace(report, slots=tuple(replace(s, norms=NORMS) for s in report.slots))

    decision = job.ladder.decide([told(report) for report in reports])
    states = [State(slots[rank][0].data) for rank in range(len(job.ranks))]

    rounds = partial(fillings, round_bytes=1024)
    monkeypatch.setattr(module, "fillings", rounds)
    assert len(list(rounds(decision.fills, job.shape))) > 1
    received = transferred(job, decision, states, slots, parity)
    for rank, holder in enumerate(job.ranks):
        lacks = subtract(decision.layout.runs(holder), slots[rank][0].held)
        assert not subtract(lacks, received[rank])
    return decision, states, received


def check(decision: Recovery, states: list[State]) -> None:
    """By the formula, from the true contents; moments are empty; all else is as it was."""
    size, distance = SPACE.numel, 700
    right = numbers(1, "param", size).view(np.float32).copy()
    moments = numbers(1, "exp_avg", size).copy()
    lost = canonical(fill.run for fill in decision.fills)
    assert decision.fills
    assert decision.lineage[-1].runs == lost
    # Of h.1 by 1 and 16, of h.2 by 4 and 0, of h.3 by 16 and 9; the ends are copies.
    weights = [(0.0, 1.0), (1 / 17, 16 / 17), (1.0, 0.0), (16 / 25, 9 / 25), (1.0, 0.0)]
    np.testing.assert_allclose(decision.lineage[-1].weights, weights)
    old = right.copy()
    for run in lost:
        for address in range(run.start, run.stop):
            before, after = weights[(address - 500) // distance]
            near = [old[a] if w else 0 for a, w in ((address - distance, before),
                                                    (address + distance, after))]  # fmt: skip
            right[address] = np.float32(before) * near[0] + np.float32(after) * near[1]
            cut(moments, "exp_avg", Run(address, 1))[:] = 0
    for rank, state in enumerate(states):
        for run in decision.layout.runs(sorted(decision.layout.holders)[::-1][rank]):
            mine = state.host(1, "param", run).numpy()
            np.testing.assert_allclose(mine, right[run.start : run.stop], rtol=3e-7, atol=1e-9)
            kept = subtract([run], lost)
            for part in kept:
                assert np.array_equal(
                    state.host(1, "param", part).numpy(), right[part.start : part.stop]
                )
            assert np.array_equal(cut(state.data["exp_avg"], "exp_avg", run),
                                  cut(moments, "exp_avg", run))  # fmt: skip


def test_lost_runs_become_the_weighted_mean_and_the_rest_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decision, states, _ = average(monkeypatch)
    check(decision, states)


@pytest.mark.parametrize("flaw", ["swapped weights", "kept moments"])
def test_planted_flaws_of_the_mean_are_noticed(monkeypatch: pytest.MonkeyPatch, flaw: str) -> None:
    if flaw == "swapped weights":
        monkeypatch.setattr(module, "blend", lambda v, w: sum(
            a * b for a, b in zip(v, reversed(w), strict=True)))  # fmt: skip
    else:
        monkeypatch.setattr(State, "roles", ROLES[:1])
    decision, states, _ = average(monkeypatch)
    with pytest.raises(AssertionError):
        check(decision, states)
