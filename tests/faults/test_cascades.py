"""A further loss in any phase of a recovery: every phase, every victim, every kind of loss.

Four nodes, two parity units per stripe. A worker of the last node is killed; when the recovery
from that reaches the named phase, the victim is killed, frozen or cut off the network there. The
survivors have to end in the bits of an undisturbed run, with every step committed once.

The short tests take each phase once, with victims and kinds in turn; the long ones enumerate.
"""

import os
import re
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from itertools import product
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))
from training_job import SCRIPT, WAIT_S, alone

from outlast.cluster.failpoint import AGENT, RECOVERY
from outlast.launch.drill import namespaces
from outlast.launch.drill.drill import traps
from outlast.launch.drill.drilled_job import DrilledJob, Shape
from outlast.launch.drill.namespaces import Namespaces
from outlast.launch.drill.trap import Trap

VICTIMS = {"proposer": "node0", "peer": "node1", "worker": "node1"}
FLAGS = ("--pause", "0.08", "--steps", "24", "--parity", "2")
SHAPE = Shape(nodes=4, workers=1, script=(SCRIPT, *FLAGS))
PHASES = (*AGENT, *RECOVERY)
CASES = [
    (phase, victim, kind)
    for phase, victim, kind in product(PHASES, VICTIMS, ("kill", "hang", "partition"))
    if not (victim == "worker" and kind == "partition")  # a cable belongs to a node
]
SHORT = [CASES[8 * index + 3 * index % 8] for index in range(len(PHASES))]


def cascade(directory: Path, phase: str, victim: str, kind: str) -> None:
    node = VICTIMS[victim]
    with ExitStack() as stack:
        network = stack.enter_context(Namespaces(SHAPE.names)) if kind == "partition" else None
        armed = stack.enter_context(traps(frozenset({phase})))
        job = stack.enter_context(DrilledJob(directory / "job", SHAPE, armed, network))
        job.excused.add(node)
        wait(job, lambda: job.watch.step >= 3, "step 3")
        before, gone = job.watch.generation, holders(job, node)
        trap = armed.set(Trap(phase, lambda facts: phase in AGENT or facts["node"] == node))
        os.kill(job.nodes.workers("node3")[0], signal.SIGKILL)
        wait(job, trap.sprung.is_set, f"{node} in phase {phase}")
        strike(job, kind, node, victim == "worker")
        trap.release()
        wait(job, lambda: without(job, gone, before), f"a view without {node}")
        wait(job, lambda: resumed(job, without(job, gone, before)), "a step after it")
        job.over_is_news = False
        heal(job, kind, node)
        sound = [one for one in SHAPE.names if one != node]
        wait(job, lambda: None not in codes(job, sound).values(), "the end")
        assert codes(job, sound) == dict.fromkeys(sound, 0)
        job.watch.look()
        found = {one: digests(job, one) for one in sound}
        assert set().union(*found.values()) == {alone("--steps", "24")}
        assert found["node2"], "a worker that was killed may be back too late; this one never left"
        assert [line["step"] for line in job.watch.metrics] == list(range(1, 25))


def wait(job: DrilledJob, condition: Callable[[], object], what: str) -> None:
    job.await_that(lambda: bool(condition()), what, WAIT_S)


def strike(job: DrilledJob, kind: str, node: str, worker_only: bool) -> None:
    """Kill, hang or partition a node or its worker."""
    number = signal.SIGKILL if kind == "kill" else signal.SIGSTOP
    if kind == "partition":
        assert job.network is not None
        job.network.cut([node])
    elif worker_only:
        os.kill(job.nodes.workers(node)[0], number)
    elif kind == "kill":
        job.nodes.kill_node(node)
    else:
        job.nodes.signal_node(node, number)


def heal(job: DrilledJob, kind: str, node: str) -> None:
    """Undo what can be undone."""
    if kind == "partition":
        assert job.network is not None
        job.network.heal([node])
    elif kind == "hang":
        job.nodes.signal_node(node, signal.SIGCONT)


def holders(job: DrilledJob, node: str) -> set[int]:
    return {holder for holder, where in job.holders.items() if where == node}


def codes(job: DrilledJob, nodes: list[str]) -> dict[str, int | None]:
    return {node: job.nodes.exit_codes()[node] for node in nodes}


def digests(job: DrilledJob, node: str) -> set[str]:
    """Digests that workers of a node printed."""
    printed = (job.nodes.output / f"{node}.log").read_text(errors="replace")
    return set(re.findall(r"digest ([0-9a-f]{64})", printed))


def without(job: DrilledJob, gone: set[int], before: int) -> int:
    """The first generation after the fault that has none of the workers `gone`; 0 if none."""
    later = [
        event["generation"]
        for event in job.watch.events
        if event["event"] == "view" and event["generation"] > before
        and not gone & {holder for m in event["members"] for holder in m["workers"]}
    ]  # fmt: skip
    return min(later, default=0)


def resumed(job: DrilledJob, generation: int) -> bool:
    """Whether the node that no fault touches has committed a step since."""
    return any(
        (event["event"], event["node"]) == ("resumed", "node2")
        and event["generation"] >= generation
        for event in job.watch.events
    )


def skip_unless_possible(kind: str) -> None:
    if kind == "partition" and namespaces.missing():
        pytest.skip(f"not run: {namespaces.missing()}")


@pytest.mark.parametrize(("phase", "victim", "kind"), SHORT)
def test_a_further_loss(tmp_path: Path, phase: str, victim: str, kind: str) -> None:
    skip_unless_possible(kind)
    cascade(tmp_path, phase, victim, kind)


@pytest.mark.long
@pytest.mark.parametrize(("phase", "victim", "kind"), [c for c in CASES if c not in SHORT])
def test_every_further_loss(tmp_path: Path, phase: str, victim: str, kind: str) -> None:
    skip_unless_possible(kind)
    cascade(tmp_path, phase, victim, kind)


def test_the_short_cases_take_every_phase_victim_and_kind() -> None:
    for place in range(3):
        assert {case[place] for case in SHORT} == {case[place] for case in CASES}
