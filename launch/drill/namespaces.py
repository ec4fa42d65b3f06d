"""Pretended machines: network namespaces of this host, joined by a switch that can cut cables.

Nothing outside these namespaces is touched: the switch is a bridge in a namespace of its own, and
each node has one cable to it. A node that is cut off keeps its carrier, so that every packet
vanishes and nothing is refused, as in a partition of a real network. Needs CAP_NET_ADMIN and
iproute2; `missing` says what is not there.
"""

import contextlib
import secrets
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from functools import cache
from types import TracebackType
from typing import Self

from outlast.cluster.errors import Misuse

BRIDGE, ISLANDS = "main", ("island1", "island2")


@cache
def missing() -> str:
    """Why namespaces cannot be made here; empty if they can."""
    if shutil.which("ip") is None:
        return "no iproute2 (the command `ip`)"
    name = f"outlast-{secrets.token_hex(3)}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"no CAP_NET_ADMIN ({' '.join(made.stderr.split())})"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return ""


class Namespaces:
    """One namespace per node and a switch between them; leaving the context removes them.

    Raises:
        Misuse: they cannot be made here.
    """

    def __init__(self, nodes: Sequence[str]) -> None:
        if missing():
            raise Misuse(f"network namespaces: {missing()}")
        if len(nodes) > 200:
            raise Misuse(f"{len(nodes)} namespaces: at most 200 fit into one pretended network")
        token = secrets.token_hex(3)
        self._switch = f"outlast-{token}"
        self._names = {node: f"outlast-{token}-{index}" for index, node in enumerate(nodes)}
        self._cables = {node: f"cable{index}" for index, node in enumerate(nodes)}
        self._addresses = {node: f"10.77.0.{index + 1}" for index, node in enumerate(nodes)}

    def address(self, node: str) -> str:
        """IPv4 address of a node on the switch."""
        return self._addresses[node]

    def prefix(self, node: str) -> list[str]:
        """Words that run the command after them inside the namespace of a node."""
        return ["ip", "netns", "exec", self._names[node]]

    def cut(self, nodes: Iterable[str], island: int | None = None) -> None:
        """Cut nodes off: each from everybody, or with `island` 0 or 1 together from the rest."""
        place = "nomaster" if island is None else f"master {ISLANDS[island]}"
        self._on_switch(f"link set {self._cables[node]} {place}" for node in nodes)

    def slow(self, nodes: Iterable[str], megabits: float) -> None:
        """Limit what nodes receive."""
        for node in nodes:
            shape = f"root tbf rate {megabits}mbit burst 64kb latency 400ms".split()
            _call("tc", "-n", self._switch, "qdisc", "replace", "dev", self._cables[node], *shape)

    def heal(self, nodes: Iterable[str]) -> None:
        """Plug nodes back in, at full speed."""
        plain = list(nodes)
        self._on_switch(f"link set {self._cables[node]} master {BRIDGE}" for node in plain)
        for node in plain:
            device = ["dev", self._cables[node], "root"]
            subprocess.run(["tc", "-n", self._switch, "qdisc", "del", *device], capture_output=True)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            self._make()
            undo.pop_all()
        return self

    def _make(self) -> None:
        _call("ip", "netns", "add", self._switch)
        for bridge in (BRIDGE, *ISLANDS):
            self._on_switch([f"link add {bridge} type bridge", f"link set {bridge} up"])
        for node, name in self._names.items():
            cable = self._cables[node]
            _call("ip", "netns", "add", name)
            self._on_switch([
                f"link add {cable} type veth peer name eth0 netns {name}",
                f"link set {cable} master {BRIDGE}",
                f"link set {cable} up",
            ])  # fmt: skip
            _batch(name, [
                "link set lo up", f"address add {self._addresses[node]}/24 dev eth0",
                "link set eth0 up",
            ])  # fmt: skip

    def _on_switch(self, lines: Iterable[str]) -> None:
        _batch(self._switch, lines)

    def close(self) -> None:
        """Remove the namespaces; processes that still run in them keep theirs until they end."""
        for name in (*self._names.values(), self._switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        with contextlib.suppress(KeyboardInterrupt):
            self.close()


def _batch(namespace: str, lines: Iterable[str]) -> None:
    _call("ip", "-n", namespace, "-batch", "-", text="\n".join(lines))


def _call(*command: str, text: str = "") -> None:
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        raise Misuse(f"{' '.join(command)}: {' '.join(done.stderr.split())}")
