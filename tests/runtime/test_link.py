"""What the runtime reads out of a view and its settings."""

import json
import socket
from concurrent.futures import Future
from queue import Queue
from typing import Any

import pytest
import torch

from outlast.checkpoint.records import Protection
from outlast.cluster.errors import PeerLost
from outlast.cluster.view import Member, View, Worker
from outlast.layout.space import Space, Tensor
from outlast.runtime.link import AgentLink, Generation
from outlast.runtime.training import Settings


def generation(*members: Member) -> Generation:
    group: Any = None
    return Generation(View(3, members), group, 0.0, 0.0, 0.0, Future())


def test_what_fails_together_is_the_rack_then_the_agent() -> None:
    first = Member("a1", "n", "h", 1, (Worker(7, 0), Worker(8, 1)), rack="r1")
    second = Member("a2", "n", "h", 2, (Worker(9, 0),), rack="r2")  # of the same name
    found = generation(first, second)
    assert found.domains == {7: "r1/a1", 8: "r1/a1", 9: "r2/a2"}
    assert [found.first_of_node(holder) for holder in (7, 8, 9)] == [7, 7, 9]


@pytest.mark.parametrize("average", [None, "squared"])
def test_a_step_is_protected_as_the_script_says(average: str | None) -> None:
    space = Space.of([Tensor("head.weight", (64, 2), "float32")], lambda name: name)
    protection = Settings(parity=2, group=5, average=average).protection(space)
    assert (protection.m, protection.group) == (2, 5)
    assert bool(protection.edges) == (average is not None)
    assert protection != Protection(2, 16, protection.edges)


def test_nothing_connects_before_it_is_known_which_groups_are_needed() -> None:
    """An agent tells views to workers that still build their model. One that connected then would
    do so without a side, for which the others wait for ever."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    welcome = {
        "kind": "welcome", "holder": 5, "node": "n", "job": "j", "host": "127.0.0.1",
        "heartbeat_s": 0.5, "rebalance": False, "evict_poison": True, "checkpoint_dir": "",
        "checkpoint_every": "", "checkpoint_keep": 2,
    }  # fmt: skip
    view = View(1, (Member("a", "n", "127.0.0.1", 0, (Worker(5, 0),)),))
    for message in (welcome, {"kind": "view", "view": view.as_json()}):
        there.send(json.dumps(message).encode())
    there.detach()  # open for as long as this process lives: the end of its agent would end it
    link = AgentLink(here.detach(), None)
    with pytest.raises(PeerLost):
        link.next_generation(0, 0.2)
    link.ready(torch.device("cpu"), True, True)
    assert link.next_generation(0, 30.0).view == view


def test_other_islands_are_heard_once_they_are_followed() -> None:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    welcome = {
        "kind": "welcome", "holder": 5, "node": "n", "job": "j", "host": "127.0.0.1",
        "heartbeat_s": 0.5, "rebalance": False, "evict_poison": True, "checkpoint_dir": "",
        "checkpoint_every": "", "checkpoint_keep": 2, "island": 1, "islands": 3,
        "island_host": "10.0.0.1", "island_key": "ab" * 32,
    }  # fmt: skip

    def tell(message: dict[str, Any]) -> None:
        there.send(json.dumps(message).encode())

    tell(welcome)
    link = AgentLink(here.detach(), None)
    assert json.loads(there.recv(1 << 16))["kind"] == "attach"
    tell({"kind": "islands", "island": 0, "message": {"early": 1}})
    tell({"kind": "ping", "n": 1})
    assert json.loads(there.recv(1 << 16))["kind"] == "pong"
    identity = link.identity
    assert (identity.island, identity.islands, identity.island_host) == (1, 3, "10.0.0.1")
    assert identity.island_key == b"\xab" * 32
    told: Queue[tuple[Any, Any]] = Queue()
    link.follow_islands(lambda *heard: told.put(heard), lambda *reach: told.put(reach))
    assert json.loads(there.recv(1 << 16)) == {"kind": "follow"}
    tell({"kind": "reach", "islands": [0], "count": 7})
    tell({"kind": "islands", "island": 0, "message": {"late": 1}})
    assert [told.get(timeout=30) for _ in range(2)] == [([0], 7), (0, {"late": 1})]
    there.detach()
