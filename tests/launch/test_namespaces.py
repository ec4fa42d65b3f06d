"""Pretended machines reach each other, and only when they should."""

import subprocess
from collections.abc import Iterator

import pytest

from outlast.cluster.errors import Misuse
from outlast.launch.drill import namespaces
from outlast.launch.drill.namespaces import Namespaces

if namespaces.missing():
    pytest.skip(f"not run: {namespaces.missing()}", allow_module_level=True)

SAY = """
import socket, sys
with socket.create_server((sys.argv[1], 7000)) as server:
    print("up", flush=True)
    while True:
        server.accept()[0].close()
"""
ASK = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], 7000), timeout=0.5).close()
except OSError as error:
    sys.exit(str(error) or "silence")
"""


@pytest.fixture
def network() -> Iterator[Namespaces]:
    with Namespaces(["a", "b", "c"]) as made:
        yield made


@pytest.fixture
def listening(network: Namespaces) -> Iterator[Namespaces]:
    command = [*network.prefix("a"), "python3", "-c", SAY, network.address("a")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"up\n"
        yield network
        server.kill()


def reaches(network: Namespaces, node: str) -> bool:
    command = [*network.prefix(node), "python3", "-c", ASK, network.address("a")]
    return subprocess.run(command, capture_output=True).returncode == 0


def reaches_again(network: Namespaces, node: str) -> bool:
    """A question for an address that went unanswered is only repeated after a second."""
    return any(reaches(network, node) for _ in range(6))


def test_a_cut_node_is_silent_until_it_is_healed(listening: Namespaces) -> None:
    assert reaches(listening, "b")
    listening.cut(["b"])
    assert not reaches(listening, "b")
    assert reaches(listening, "c")
    listening.heal(["b"])
    assert reaches_again(listening, "b")


def test_an_island_talks_to_itself(listening: Namespaces) -> None:
    listening.cut(["a", "b"], island=0)
    assert reaches(listening, "b")
    assert not reaches(listening, "c")
    listening.cut(["c"], island=1)
    assert not reaches(listening, "c")
    listening.heal(["a", "b", "c"])
    assert reaches_again(listening, "c")


def test_a_slow_cable_still_works_and_is_fast_again(listening: Namespaces) -> None:
    listening.slow(["a", "b"], megabits=1)
    assert reaches(listening, "b")
    listening.heal(["a", "b"])
    assert reaches(listening, "b")


def test_nothing_is_left_behind(network: Namespaces) -> None:
    mine = network.prefix("a")[-1].rpartition("-")[0]
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    assert mine in listed.stdout
    network.close()
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    assert mine not in listed.stdout


def test_too_many_nodes_are_refused() -> None:
    with pytest.raises(Misuse, match="at most 200"):
        Namespaces([str(number) for number in range(201)])
