"""Spares in the simulated network: who trains, who waits, and what a quorum is with them."""

from collections.abc import Iterable

import pytest
from simulated_network import Network, member, storm

from outlast.cluster import event as ev
from outlast.cluster.roster import Seats
from outlast.cluster.view import Member, View


def view_of(network: Network, name: str) -> View:
    view = network.machines[name].view
    assert view is not None
    return view


def active(network: Network, name: str = "b") -> str:
    """Who trains in the view of one agent."""
    return "".join(m.agent for m in view_of(network, name).active)


def check_seats(network: Network) -> None:
    """No view has more members, or more that train, than there are seats for, and none lets a
    ready spare wait beside a free seat."""
    for view in network.checker.decided.values():
        assert len(view.members) <= network.seats.all
        assert len(view.active) <= network.seats.most
        ready = [m for m in view.members if m.spare and m.workers]
        assert len(view.active) == network.seats.most or not ready


@pytest.mark.parametrize("seed", range(40))
def test_a_storm_with_spares_never_makes_two_views(seed: int) -> None:
    network = Network(seed, "abcdef", seats=Seats(3, 4, 2))
    network.settle(55 if seed % 3 else 0)
    storm(network, 400, deaths=2)
    assert len(network.views()) <= 1, network.views()
    check_seats(network)


def test_too_many_that_train_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = Seats.taken

    def generous(self: Seats, there: Iterable[Member]) -> tuple[Member, ...]:
        return taken(Seats(self.least, self.most + 1, self.spares), there)

    monkeypatch.setattr(Seats, "taken", generous)
    network = Network(1, "abcde", seats=Seats(4, 4, 1))
    network.settle(5)
    with pytest.raises(AssertionError):
        check_seats(network)


def founded(names: str, spares: int) -> Network:
    network = Network(1, names, seats=Seats(1, len(names) - spares, spares))
    network.settle(5)
    assert network.views() == {names}
    return network


@pytest.mark.parametrize("victim", "abcd")
def test_a_spare_takes_the_place_in_one_change(victim: str) -> None:
    network = founded("abcde", spares=1)
    assert active(network) == "abcd"
    network.kill(victim)
    network.settle(1)
    left = "abcd".replace(victim, "") + "e"
    assert network.views() == {left}
    assert active(network, "e") == left
    assert network.machines["e"].generation == 2


def test_two_nodes_and_a_spare_survive_the_first_of_them() -> None:
    """Two nodes alone cannot tell a cut from a death; with a third vote they can."""
    network = founded("abc", spares=1)
    network.side = {"a": 1}
    network.settle(40)
    assert active(network, "b") == "bc"
    assert network.members("a") == "abc", "the other side installs nothing"
    network.settle(60)
    assert network.machines["a"].over


def test_a_node_that_returns_is_the_new_spare() -> None:
    network = founded("abcd", spares=1)
    network.kill("b")
    network.settle(2)
    network.start("x")
    network.feed("x", ev.Ready(network.now))
    network.settle(8)
    assert network.views() == {"acdx"}
    assert active(network, "a") == "acd"
    network.kill("a")
    network.settle(2)
    assert active(network, "x") == "cdx"


def test_workers_of_a_spare_come_and_go_unnoticed() -> None:
    network = founded("abc", spares=1)
    for workers in (0, 2, 0, 1):
        network.feed("c", ev.Described(network.now, member("c", workers=workers)))
        network.settle(1)
    assert network.machines["a"].generation == 1


def test_a_node_that_gave_up_its_workers_leaves_its_place() -> None:
    network = founded("abcd", spares=1)
    gone = member("b", workers=0, finished=True)
    network.feed("b", ev.Described(network.now, gone))
    network.settle(1)
    assert [(m.agent, len(m.workers)) for m in view_of(network, "a").active] == [
        ("a", 1), ("b", 0), ("c", 1), ("d", 1),
    ]  # fmt: skip
