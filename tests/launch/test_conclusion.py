"""What becomes of a job after a start: every way it can end, and that no loop is endless."""

import random
from collections.abc import Callable, Sequence

import pytest

from outlast.launch.outcome_log import Record
from outlast.launch.slurm.conclusion import Decision, Kind, Start, decide

NODES = ("a", "b", "c")
Decide = Callable[[Sequence[Record], int, Sequence[str], int], Decision]


def record(code: int, node: str = "a", **rest: object) -> Record:
    fields = {"time": 0.0, "job": "slurm-1-0", "restart": 0, "agent": "x"} | rest
    return Record(code=code, node=node, **fields)  # type: ignore[arg-type]


def everywhere(code: int, **rest: object) -> list[Record]:
    return [record(code, node, **rest) for node in NODES]


@pytest.mark.parametrize(
    ("records", "again", "code"),
    [
        (everywhere(0), False, 0),
        ([record(75, "a", lost=("b", "c")), record(0, "b"), record(0, "c")], False, 0),
        (everywhere(138, signal=10, stopped=True, step=7), True, 138),
        (everywhere(138, signal=10), True, 138),  # a script with a storage of its own
        (everywhere(130, signal=2, stopped=True, step=7), False, 130),
        (everywhere(143, signal=15), False, 143),
        (everywhere(1, step=7), True, 75),
        (everywhere(75, step=7), True, 75),
        ([record(143, "a", signal=15), record(75, "b"), record(75, "c")], True, 75),
        ([], True, 75),
    ],
)
def test_a_first_start(records: list[Record], again: bool, code: int) -> None:
    decision = decide(records, 0, NODES, 3)
    assert (decision.again, decision.code) == (again, code)


def test_bad_nodes() -> None:
    def bad(*records: Record) -> tuple[str, ...]:
        return decide(records, 0, NODES, 3).bad

    assert bad() == ()  # all are gone: nobody is left to blame one
    assert bad(*everywhere(1)) == ()
    assert bad(record(1, "a", lost=("c",)), record(1, "b", lost=("c",))) == ("c",)
    assert bad(record(1, "a"), record(1, "b")) == ("c",)  # without a word
    # Seen from a node that was cut off all the others are lost; from the others, it is.
    assert bad(record(75, "a", lost=("b", "c")), record(1, "b", lost=("a",)), record(1, "c")) == (
        "a",
    )
    assert bad(*everywhere(75, lost=("a", "b", "c"))) == ()
    assert bad(record(0, "a", evicted=("b",)), record(0, "b"), record(0, "c")) == ("b",)
    # At a signal a node may leave without a word; whoever was lost before was lost.
    assert bad(record(138, "a", signal=10, lost=("b",))) == ("b",)


def test_a_script_is_not_tried_again_from_the_same_step_to_the_same_place() -> None:
    first = everywhere(1, step=50, source=-1)
    assert decide(first, 0, NODES, 9).again
    second = first + everywhere(1, step=50, source=-1, restart=1)
    decision = decide(second, 1, NODES, 9)
    assert not decision.again
    assert decision.code == 1
    assert "failed 2 times" in decision.text
    further = first + everywhere(1, step=51, source=-1, restart=1)
    assert decide(further, 1, NODES, 9).again
    elsewhere = first + everywhere(1, step=50, source=40, restart=1)
    assert decide(elsewhere, 1, NODES, 9).again


def test_lost_state_is_not_the_script_s_fault() -> None:
    text = "job failed: rank 1 exited with code 1: outlast.cluster.errors.StateLost: step 3"
    starts = [*everywhere(1, step=3, text=text), *everywhere(1, step=3, text=text, restart=1)]
    assert decide(starts, 1, NODES, 3).again
    assert Start.of(starts[:3]).kind is Kind.LOST


def warned(*steps: int, **rest: object) -> list[Record]:
    """Starts that SIGUSR1 ended at these steps."""
    return [
        r for n, step in enumerate(steps)
        for r in everywhere(138, signal=10, step=step, restart=n, **rest)
    ]  # fmt: skip


def test_a_stop_at_a_signal_is_no_failure() -> None:
    assert decide(warned(*range(9)), 8, NODES, 3).again
    assert decide(warned(9, 2, 5, 8, stopped=True), 3, NODES, 1).again is False
    assert decide(warned(*range(9), stopped=True), 8, NODES, 1).again
    # What was committed last is lost with the nodes; a later start brings less to storage.
    lost = everywhere(75, step=50)
    stored = everywhere(138, signal=10, step=30, stopped=True, restart=1)
    assert decide(lost + stored, 1, NODES, 1).again
    assert not decide(lost + everywhere(138, signal=10, step=30, restart=1), 1, NODES, 1).again


def test_time_limits_that_are_too_short_to_begin_are_not_tried_for_ever() -> None:
    assert decide(warned(-1, -1), 1, NODES, 3).again
    decision = decide(warned(-1, -1, -1), 2, NODES, 3)
    assert (decision.again, decision.code) == (False, 1)
    assert "3 starts in a row came to no new step" in decision.text
    assert decide(warned(-1, -1, -1, plain=True), 2, NODES, 3).again, "it has its own storage"
    assert decide(warned(-1, -1, -1), 2, NODES, 3, preempted=[2]).again
    assert decide(warned(-1, -1, -1), 2, NODES, 3, preempted=[0]).again, "it was not its time"
    ended = warned(-1, -1) + everywhere(143, signal=15, restart=2)
    assert decide(ended, 2, NODES, 1).code == 143, "whoever ends it is told so"


def test_a_node_that_left_before_does_not_say_how_the_start_ended() -> None:
    left = record(143, "a", signal=15)
    decision = decide([left], 0, NODES, 3)
    assert (decision.again, decision.code, decision.bad) == (True, 75, ())
    assert decide([left, record(70, "b", time=1.0), record(143, "c", signal=15)], 0, NODES, 3).again
    back = [left, record(70, "a", time=1.0)]
    assert decide(back, 0, ["a"], 3).again, "the last word counts"
    dead = [record(143, node, signal=15, lost=("c",)) for node in "ab"]
    assert decide(dead, 0, NODES, 3).code == 143, "c was dead when somebody ended the job"


def test_a_preempted_job_starts_again_whatever_the_signal() -> None:
    records = everywhere(143, signal=15, stopped=True, step=7)
    assert not decide(records, 0, NODES, 3).again
    assert decide(records, 0, NODES, 3, preempted=[0]).again
    assert not decide(everywhere(0), 0, NODES, 3, preempted=[0]).again


def endless(decide: Decide, seed: int, tries: int) -> bool:
    """Whether a job that comes no further is started again and again."""
    rng, records, best, stale = random.Random(seed), [], -1, 0
    for restart in range(40):
        kind = rng.choice(["failed", "lost", "gone", "further", "stopped"])
        step = best + rng.randint(1, 5) if kind == "further" else rng.randint(-1, max(best, -1))
        code = {"failed": 1, "lost": 75, "further": rng.choice([1, 75]), "stopped": 138}
        signal = 10 if kind == "stopped" else 0
        if kind != "gone":
            records += everywhere(code[kind], step=step, restart=restart, signal=signal)
        stale = 0 if step > best and kind != "gone" else stale + 1
        best = max(best, step) if kind != "gone" else best
        if not decide(records, restart, NODES, tries).again:
            return False
        if stale >= tries:
            return True
    return False


@pytest.mark.parametrize("tries", [1, 3])
def test_no_loop_is_endless(tries: int) -> None:
    assert not any(endless(decide, seed, tries) for seed in range(300))


def test_the_check_for_endless_loops_can_go_red() -> None:
    def forgetful(
        records: Sequence[Record], restart: int, nodes: Sequence[str], tries: int
    ) -> Decision:
        last = [r for r in records if r.restart == restart]
        return decide(last, restart, nodes, restart + 2)  # as if no start had been before

    assert any(endless(forgetful, seed, 3) for seed in range(300))
