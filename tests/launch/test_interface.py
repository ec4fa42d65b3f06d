"""A node of two networks, whose name its own tables take for the loopback, finds its interface."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from job import COMMAND, KEY

from outlast.cluster.errors import Misuse
from outlast.launch.drill import namespaces
from outlast.launch.drill.namespaces import Namespaces
from outlast.launch.interface import Interface, choose

needs_namespaces = pytest.mark.skipif(
    bool(namespaces.missing()), reason=f"not run: {namespaces.missing()}"
)

# The loopback stands for the own name, as Debian's installer writes it.
BECOME = 'hostname "$0"; mount --bind "$1" /etc/hosts; shift; exec "$@"'
CHOOSE = """
import json, sys
from outlast.cluster.errors import Misuse
from outlast.launch.interface import choose
try:
    found = choose([(host, 10000) for host in sys.argv[2:]], sys.argv[1])
    print(json.dumps([found.name, found.address]))
except Misuse as error:
    print(json.dumps(str(error)))
"""
SAY = """
    found = psutil.Process().net_connections("tcp")
    here = {c.laddr.ip.removeprefix("::ffff:") for c in found if c.status == "ESTABLISHED"}
    print("USED", json.dumps([sorted(here), os.environ["GLOO_SOCKET_IFNAME"],
                              os.environ["NCCL_SOCKET_IFNAME"]]), flush=True)
"""
ELASTIC = f"""
import json, os, psutil, torch, outlast
run = outlast.init(seed=0, leaves=2)
model = run.prepare(torch.nn.Linear(2, 1), optimizer=torch.optim.SGD)
data = [(torch.ones(2), torch.ones(1))] * 8
for step in run.steps(2):
    with step:
        for x, y in step.batches(data, batch_size=1):
            step.backward((model(x) - y).square().mean())
if True:{SAY}
"""
PLAIN = f"""
import json, os, psutil, torch, torch.distributed as dist
dist.init_process_group("gloo")
dist.all_reduce(torch.ones(1))
if True:{SAY}
dist.barrier()
dist.destroy_process_group()
"""


class Machines:
    """Nodes a and b with eth0 (10.77.0.1, .2) and a faster cable, rail0 (10.78.0.1, .2)."""

    def __init__(self, network: Namespaces, folder: Path) -> None:
        self.network, self.folder = network, folder
        cable = ["link", "add", "rail0", "type", "veth", "peer", "name", "rail0", "netns"]
        self.ip("a", *cable, network.prefix("b")[-1])
        for number, node in enumerate("ab", 1):
            self.ip(node, *f"address add 10.78.0.{number}/24 dev rail0".split())
            self.ip(node, "link", "set", "rail0", "up")
            others = [f"{network.address(other)} {other}" for other in "ab" if other != node]
            lines = ["127.0.0.1 localhost", f"127.0.1.1 {node}", *others]
            (folder / f"hosts-{node}").write_text("\n".join(lines) + "\n")
        for node in "ab":  # the kernel notices the carrier a little later
            while "state UP" not in self.ip(node, "link", "show", "rail0"):
                time.sleep(0.05)

    def ip(self, node: str, *words: str) -> str:
        command = [*self.network.prefix(node), "ip", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def command(self, node: str, *words: str) -> list[str]:
        become = ["unshare", "--uts", "--mount", "sh", "-c", BECOME, node]
        return [*self.network.prefix(node), *become, str(self.folder / f"hosts-{node}"), *words]

    def choose(self, node: str, wanted: str, *hosts: str) -> list[str] | str:
        words = self.command(node, sys.executable, "-c", CHOOSE, wanted, *hosts)
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=30)
        found: list[str] | str = json.loads(done.stdout)
        return found


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    with Namespaces(["a", "b"]) as network:
        yield Machines(network, tmp_path)


def test_loopback_is_chosen_only_where_an_endpoint_says_so() -> None:
    assert choose([("127.0.0.1", 1)]) == choose([("localhost", 1)]) == Interface("", "127.0.0.1")


def test_a_given_address_wins() -> None:
    assert choose([("localhost", 1)], "eth9", "192.0.2.77").address == "192.0.2.77"


@pytest.mark.parametrize(
    ("wanted", "host", "complaint"),
    [("none0", "localhost", "'none0' is none that is up here"),
     ("lo", "localhost", "'lo' is none"),
     ("", "nowhere.invalid", "no way from here to nowhere.invalid")],
)  # fmt: skip
def test_what_is_not_there_is_refused(wanted: str, host: str, complaint: str) -> None:
    with pytest.raises(Misuse, match=complaint):
        choose([(host, 1)], wanted)


@needs_namespaces
def test_the_way_to_another_node_decides(machines: Machines) -> None:
    eth, rail = ["eth0", "10.77.0.1"], ["rail0", "10.78.0.1"]
    assert machines.choose("a", "", "b") == eth
    assert machines.choose("a", "", "a", "b") == eth, "its own name stands for the loopback"
    assert machines.choose("a", "", "10.78.0.2") == rail
    assert machines.choose("a", "", "10.77.0.1", "10.78.0.2") == rail, "the way to itself is none"
    assert machines.choose("a", "", "10.77.0.1") == eth, "better than nothing"


@needs_namespaces
@pytest.mark.parametrize("wanted", ["rail0", "10.78.0.0/16", "10.78.0.1"])
def test_an_interface_has_a_name_a_network_and_an_address(machines: Machines, wanted: str) -> None:
    assert machines.choose("a", wanted, "b") == ["rail0", "10.78.0.1"]


@needs_namespaces
def test_a_labelled_address_is_one_of_its_interface(machines: Machines) -> None:
    machines.ip("a", *["address", "add", "10.79.0.1/24", "dev", "rail0", "label", "rail0:1"])
    assert machines.choose("a", "", "b") == ["eth0", "10.77.0.1"]
    assert machines.choose("a", "10.79.0.0/16", "b") == ["rail0", "10.79.0.1"]


@needs_namespaces
def test_no_guess_between_two_networks(machines: Machines) -> None:
    found = machines.choose("a", "", "a")
    assert "give --interface: there is eth0 10.77.0.1, rail0 10.78.0.1" in found
    machines.ip("a", "link", "set", "rail0", "down")
    assert machines.choose("a", "", "a") == ["eth0", "10.77.0.1"], "one is no guess"
    assert "'rail0' is none that is up" in machines.choose("a", "rail0", "b")
    machines.ip("a", "link", "set", "rail0", "up")
    machines.ip("a", "route", "add", "default", "dev", "rail0")
    assert machines.choose("a", "", "a") == ["rail0", "10.78.0.1"]


@needs_namespaces
@pytest.mark.parametrize(
    ("text", "wanted", "name", "network"),
    [(PLAIN, "", "eth0", "10.77."), (ELASTIC, "rail0", "rail0", "10.78.")],
    ids=["plain", "elastic"],
)
def test_a_job_uses_that_interface(
    machines: Machines, tmp_path: Path, text: str, wanted: str, name: str, network: str
) -> None:
    """No variable is set by hand, and each endpoint is a name that is the loopback on its node."""
    script = tmp_path / "script.py"
    script.write_text(text)
    job = ["--nnodes", "2", "--rdzv-endpoint", "a:10000,b:10000", "--log-dir", str(tmp_path / "l")]
    command = [*COMMAND, *job, *(["--interface", wanted] if wanted else []), str(script)]
    with (tmp_path / "output").open("w") as output, contextlib.ExitStack() as stack:
        running = [
            subprocess.Popen(
                machines.command(node, *command), stdout=output, stderr=subprocess.STDOUT,
                env={**os.environ, "OUTLAST_JOB_KEY": KEY},
            )
            for node in "ab"
        ]  # fmt: skip
        for process in running:
            stack.callback(process.kill)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and any(p.poll() is None for p in running):
            time.sleep(0.1)
    said = (tmp_path / "output").read_text()
    assert [process.returncode for process in running] == [0, 0], said
    used = [line.partition("USED ")[2] for line in said.splitlines() if "USED" in line]
    assert len(used) == 2
    for addresses, gloo, nccl in map(json.loads, used):
        assert addresses
        assert all(address.startswith(network) for address in addresses), addresses
        assert (gloo, nccl) == (name, f"={name}")
