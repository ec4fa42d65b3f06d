"""No schedule of messages, deaths, cuts and partitions makes two agents disagree on a view."""

from collections.abc import Iterable

import pytest
from simulated_network import Network, member, storm

from outlast.cluster import event as ev
from outlast.cluster.agreement import Agreement
from outlast.cluster.roster import Seats
from outlast.cluster.view import View

SEEDS = range(120)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_storm_never_makes_two_views(seed: int) -> None:
    network = Network(seed, "abcde", seats=Seats(3, 7))
    network.settle(55 if seed % 3 else 0)  # every third storm breaks out before the founding
    storm(network, 400, deaths=2)
    assert network.checker.installs or not seed % 3
    # Two deaths of five or more: those that were not cut off too long agree in the end.
    assert len(network.views()) <= 1, network.views()


def planted(seed: int) -> None:
    network = Network(seed, "abcd")
    network.settle(5)
    storm(network, 500, deaths=1)


def red(seeds: int = 80) -> bool:
    """Whether the checker notices within so many storms."""
    for seed in range(seeds):
        try:
            planted(seed)
        except AssertionError:
            return True
    return False


def test_the_checker_is_green_without_a_bug() -> None:
    assert not red(20)


def test_a_quorum_off_by_one_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def half(self: View, agents: Iterable[str]) -> bool:
        return 2 * len(set(agents) & set(self.agents)) >= len(self.members)

    monkeypatch.setattr(View, "quorum", half)
    assert red()


def test_accepting_below_the_promise_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    accept = Agreement._accept

    def careless(self: Agreement, sender: str, ballot: object, value: object) -> object:
        self.promised = min(self.promised, ballot)  # type: ignore[type-var]
        return accept(self, sender, ballot, value)  # type: ignore[arg-type]

    monkeypatch.setattr(Agreement, "_accept", careless)
    assert red(300)


def test_forgetting_what_was_accepted_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    promise = Agreement._promise

    def forgetful(self: Agreement, sender: str, ballot: object, _: object, now: float) -> object:
        return promise(self, sender, ballot, None, now)  # type: ignore[arg-type]

    monkeypatch.setattr(Agreement, "_promise", forgetful)
    assert red(300)


def founded(names: str) -> Network:
    network = Network(1, names)
    network.settle(5)
    assert network.views() == {names}
    return network


@pytest.mark.parametrize(("victims", "left"), [("a", "bcde"), ("e", "abcd"), ("ab", "cde")])
def test_survivors_agree_within_a_tick(victims: str, left: str) -> None:
    network = founded("abcde")
    for victim in victims:
        network.kill(victim)
    network.settle(1)
    assert network.views() == {left}


def test_silence_is_noticed_and_the_sleeper_evicted() -> None:
    network = founded("abc")
    network.side = {"a": 1}  # stopped: nothing arrives, nothing is sent, no connection ends
    network.settle(25)
    assert network.members("b") == "bc"
    network.side = {}
    network.settle(5)
    assert network.machines["a"].over
    assert network.views() == {"bc"}


def test_a_minority_never_installs_and_gives_up() -> None:
    network = founded("abcde")
    network.side = {"a": 1, "b": 1}
    network.settle(40)
    assert network.members("a") == "abcde"
    assert network.members("c") == "cde"
    network.settle(60)
    assert network.machines["a"].over
    assert network.machines["b"].over


def test_exactly_half_goes_on_with_the_first_member_only() -> None:
    network = founded("abcd")
    network.side = {"c": 1, "d": 1}
    network.settle(100)
    assert network.views() == {"ab"}
    assert network.machines["c"].over


def test_a_newcomer_is_taken_in_when_it_is_ready() -> None:
    network = founded("abc")
    network.kill("b")
    network.settle(2)
    network.start("x")
    network.settle(8)
    assert network.views() == {"ac"}
    network.feed("x", ev.Ready(network.now))
    network.settle(1)
    assert network.views() == {"acx"}


def test_a_newcomer_to_a_full_job_is_told_what_to_do() -> None:
    network = founded("abc")
    network.start("x")
    network.settle(70)
    assert network.machines["x"].over
    assert network.views() == {"abc"}


def test_workers_die_and_return_without_a_node_lost() -> None:
    network = founded("abc")
    network.feed("b", ev.Described(network.now, member("b", workers=0)))
    network.settle(1)
    seen = network.machines["c"].view
    assert seen is not None
    assert [len(m.workers) for m in seen.members] == [1, 0, 1]
    network.feed("b", ev.Described(network.now, member("b", workers=1)))
    network.settle(1)
    assert network.machines["c"].generation == 3


def test_a_finished_member_is_not_lost_when_it_leaves() -> None:
    network = founded("abc")
    network.feed("b", ev.Described(network.now, member("b", finished=True)))
    network.settle(2)
    network.kill("b")
    network.settle(100)
    assert network.views() == {"abc"}
    assert network.machines["a"].generation == 1


def test_a_starved_agent_blames_nobody() -> None:
    network = founded("abc")
    network.now += 30
    network.feed("a", ev.Tick(network.now))
    assert not network.machines["a"].detector.suspects
