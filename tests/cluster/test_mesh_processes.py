"""Agents in real processes: killed, stopped, woken, restarted, and joined by strangers."""

import socket
import time
from collections.abc import Callable, Iterator
from signal import SIGCONT, SIGKILL, SIGSTOP

import pytest
from agent_process import AgentProcess

Start = Callable[..., AgentProcess]


@pytest.fixture
def port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number: int = probe.getsockname()[1]
        return number


@pytest.fixture
def start(port: int) -> Iterator[Start]:
    """Starts agents; all of them are gone afterwards."""
    agents: list[AgentProcess] = []

    def begin(name: str, nodes: tuple[int, int], ports: str = "", **more: str) -> AgentProcess:
        agents.append(AgentProcess(name, ports or port, nodes, **more))
        agents[-1].wait("started")
        return agents[-1]

    yield begin
    for agent in agents:
        agent.end()


def job(start: Start, count: int, high: int | None = None) -> list[AgentProcess]:
    """A founded job of nodes n0, n1, ..."""
    agents = [start(f"n{i}", (count, high or count)) for i in range(count)]
    for agent in agents:
        agent.view(*(a.name for a in agents))
    return agents


def test_kill_the_first_and_come_back(start: Start, port: int) -> None:
    a, b, c = job(start, 3)
    a.signal(SIGKILL)
    for agent in (b, c):
        assert agent.view("n1", "n2")["generation"] == 2
    # The node comes back, can bind the first endpoint, and must not found a second job.
    again = start("n0", (3, 3))
    assert again.wait("running")["nodes"] == ["n1", "n2"]
    again.command("join")
    for agent in (b, c, again):
        assert agent.view("n1", "n2", "n0", limit_s=5)["generation"] in (1, 3)
    assert again.view("n0", "n1", "n2")["nodes"] == ["n1", "n2", "n0"]


def test_a_founder_that_comes_back_asks_the_other_endpoint_first(start: Start, port: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        ports = f"{port},{probe.getsockname()[1]}"
    a, b, c = (start(f"n{i}", (1, 3), ports=ports) for i in range(3))
    for agent in (a, b, c):
        agent.view("n0", "n1", "n2")
    told = [agent.wait("started")["port"] for agent in (a, b)]
    assert ",".join(map(str, told)) == ports
    a.signal(SIGKILL)
    b.view("n1", "n2")
    # Alone it would be enough to found a job of one node.
    again = start("n0", (1, 3), ports=ports)
    assert again.wait("running")["nodes"] == ["n1", "n2"]


def test_two_of_five_are_killed_at_once(start: Start) -> None:
    agents = job(start, 5)
    agents[0].signal(SIGKILL)
    agents[3].signal(SIGKILL)
    for index in (1, 2, 4):
        agents[index].view("n1", "n2", "n4")


def test_a_stopped_agent_is_evicted_and_learns_it(start: Start) -> None:
    a, b, c = job(start, 3)
    a.signal(SIGSTOP)
    began = time.monotonic()
    b.view("n1", "n2")
    c.view("n1", "n2")
    assert 1 < time.monotonic() - began < 4
    a.signal(SIGCONT)
    a.wait("evicted")
    assert [e["generation"] for e in a.read() if e["event"] == "install"] == [1]


def test_without_a_quorum_the_rest_gives_up(start: Start) -> None:
    a, b, c = job(start, 3)
    for agent in (a, b):
        agent.signal(SIGKILL)
    c.wait("no_quorum")
    assert [e["generation"] for e in c.read() if e["event"] == "install"] == [1]


def test_a_second_job_of_the_same_id_is_told_so(start: Start) -> None:
    agents = job(start, 2)
    second = start("other", (2, 2))
    assert "another job id" in second.wait("failed")["text"]
    assert all(len([e for e in a.read() if e["event"] == "install"]) == 1 for a in agents)


@pytest.mark.parametrize("more", [{"key": "some other key, long enough"}, {"job": "other"}])
def test_another_key_or_job_is_told_so(start: Start, more: dict[str, str]) -> None:
    first = start("n0", (2, 2))
    second = start("n1", (2, 2), **more)
    assert "same job id and key" in second.wait("failed", limit_s=12)["text"]
    assert first.wait("refused")
    assert not any(e["event"] in ("install", "described") for e in first.read())


def test_a_change_and_a_word_reach_everybody(start: Start) -> None:
    agents = job(start, 3, high=4)
    agents[2].command("describe 1")
    for agent in agents:
        agent.wait("install", lambda e: e["generation"] == 2)
    agents[1].command("say hello")
    for agent in (agents[0], agents[2]):
        assert agent.wait("message")["message"] == {"text": "hello"}
    late = start("n3", (3, 4))
    late.wait("running")
    late.command("join")
    for agent in (*agents, late):
        agent.view("n0", "n1", "n2", "n3")


def test_finished_agents_leave_quietly(start: Start) -> None:
    a, b, c = job(start, 3)
    for agent in (b, c):
        agent.command("finish")
    a.wait("described", lambda e: e["node"] == "n2")
    time.sleep(0.2)
    b.command("stop")
    assert b.process.wait(5) == 0
    time.sleep(0.5)
    assert not any(e["event"] == "suspect" for e in a.read() + c.read())


def test_strangers_cost_little_and_change_nothing(start: Start, port: int) -> None:
    a, b = job(start, 2)
    strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(80)]
    strangers[0].sendall(b"GET / HTTP/1.1\r\n\r\n")
    strangers[1].sendall(b"outlast\x01")  # half a hello, and never the rest
    strangers[2].sendall(b"\x00" * 100_000)
    causes = set()
    deadline = time.monotonic() + 10
    while len([e for e in a.read() if e["event"] == "refused"]) < 80:
        assert time.monotonic() < deadline, "half-open connections are closed"
        time.sleep(0.05)
    causes = {e["cause"] for e in a.read() if e["event"] == "refused"}
    assert {"too many strangers", "not an outlast agent", "no handshake in time"} <= causes
    for stranger in strangers:
        stranger.close()
    b.command("describe 1")
    a.wait("install", lambda e: e["generation"] == 2)
    assert not any(e["event"] == "suspect" for e in a.read() + b.read())
