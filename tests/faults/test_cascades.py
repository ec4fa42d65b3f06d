"""A further loss in any phase of a recovery: every phase, every victim, every kind of loss.

Four nodes, two parity units per stripe. A worker of the last node is killed; when the recovery
from that reaches the named phase, the victim is killed, frozen or cut off the network there. The
survivors have to end in the bits of an undisturbed run, with every step committed once.

The short tests take each phase once, with victims and kinds in turn; the long ones enumerate.
"""

import sys
from contextlib import ExitStack, closing
from functools import partial
from itertools import product
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))
from pretended_cluster import Cluster, Hand
from training_job import alone

from outlast.cluster.failpoint import AGENT, RECOVERY
from outlast.launch import namespaces
from outlast.launch.namespaces import Namespaces

NODES = ["node0", "node1", "node2", "node3"]
VICTIMS = {"proposer": "node0", "peer": "node1", "worker": "node1"}
SCRIPT = ("--pause", "0.08", "--steps", "24", "--parity", "2")
PHASES = (*AGENT, *RECOVERY)
CASES = [
    (phase, victim, kind)
    for phase, victim, kind in product(PHASES, VICTIMS, ("kill", "hang", "partition"))
    if not (victim == "worker" and kind == "partition")  # a cable belongs to a node
]
SHORT = [CASES[8 * index + 3 * index % 8] for index in range(len(PHASES))]


def cascade(directory: Path, phase: str, victim: str, kind: str) -> None:
    node, worker_only = VICTIMS[victim], victim == "worker"
    with ExitStack() as stack:
        network = stack.enter_context(Namespaces(NODES)) if kind == "partition" else None
        cluster = stack.enter_context(Cluster(directory, NODES, network, *SCRIPT))
        cluster.points = phase
        at = "" if phase in AGENT else node
        strike = partial(cluster.strike, kind, node, worker_only)
        hand = stack.enter_context(closing(Hand(cluster.socket, phase, at, strike)))
        cluster.start()
        cluster.wait(lambda: 3 in cluster.steps, "step 3")
        before = cluster.events("view")[-1]["generation"]
        hand.ready.set()
        cluster.strike("kill", "node3", worker_only=True)
        cluster.wait(hand.done.is_set, f"{node} in phase {phase}")
        cluster.wait(lambda: without(cluster, node, before), f"view without {node}")
        cluster.wait(lambda: resumed(cluster, without(cluster, node, before)), "step after it")
        cluster.heal(kind, node)
        sound = [one for one in NODES if one != node]
        assert cluster.end(sound) == dict.fromkeys(sound, 0), cluster.shown()
        found = {one: set(cluster.digests(one)) for one in sound}
        assert set().union(*found.values()) == {alone("--steps", "24")}, cluster.shown()
        assert found["node2"], "a worker that was killed may be back too late; this one never left"
        assert cluster.steps == list(range(1, 25))


def without(cluster: Cluster, node: str, before: int) -> int:
    """The first generation after the fault that has no worker of `node` from before; 0 if none."""
    views = cluster.events("view")
    old = next(view for view in views if view["generation"] == before)
    gone = {holder for m in old["members"] if m["node"] == node for holder in m["workers"]}
    later = [
        view["generation"]
        for view in views
        if view["generation"] > before
        and not gone & {holder for m in view["members"] for holder in m["workers"]}
    ]
    return min(later, default=0)


def resumed(cluster: Cluster, generation: int) -> bool:
    """Whether the node that no fault touches has committed a step since."""
    return any(
        event["generation"] >= generation and event["node"] == "node2"
        for event in cluster.events("resumed")
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
