"""Nodes fall silent and nobody is told: the majority goes on, the others stop, and whoever comes
back does so as a new member."""

from pathlib import Path

from slurm_cluster import Cluster
from slurm_run import STEPS, SlurmRun

FIVE = ("--nodes", "5", "--time", "5")


def test_a_minority_stops_and_rejoins_when_it_is_healed(cluster: Cluster, tmp_path: Path) -> None:
    run = SlurmRun(cluster, tmp_path, *FIVE, script=(*STEPS, "--parity", "2"))
    run.await_step(3)
    agents = {event["node"]: event["agent"] for event in run.events("started")}
    cluster.cut("node4", "node5", place="island1")
    run.await_members("node1", "node2", "node3")
    run.await_true(lambda: len(run.events("no_quorum")) == 2, "end of the minority")
    assert {event["node"] for event in run.events("no_quorum")} == {"node4", "node5"}
    run.await_steps_more()
    cluster.heal("node4", "node5")
    run.await_members(*cluster.nodes[:5])
    again = {event["node"]: event["agent"] for event in run.events("started")}
    assert {node for node in agents if agents[node] != again[node]} == {"node4", "node5"}
    run.await_steps_more()
    run.hurry()
    run.check_bits()


def test_the_batch_host_is_the_one_that_is_cut_off(cluster: Cluster, tmp_path: Path) -> None:
    """SLURM reaches all of them: nothing may be concluded from the supervisor's silence alone."""
    run = SlurmRun(cluster, tmp_path, *FIVE)
    run.await_step(3)
    cluster.cut("node1")
    run.await_members("node2", "node3", "node4", "node5")
    run.await_steps_more()
    cluster.heal("node1")
    run.await_members(*cluster.nodes[:5])
    run.hurry()
    run.check_bits()


def test_a_frozen_node_is_left_out_and_comes_back(cluster: Cluster, tmp_path: Path) -> None:
    run = SlurmRun(cluster, tmp_path, "--nodes", "3", "--spares", "1", "--time", "5")
    run.await_step(3)
    cluster.freeze("node2")
    run.await_members("node1", "node3", "node4")
    run.await_steps_more()
    cluster.heal("node2", wait=False)
    run.await_members("node1", "node2", "node3", "node4")
    run.hurry()
    run.check_bits()
