"""The network interface of this node over which the others reach it.

The kernel's routing table knows it: the way to another node's endpoint leaves through it. A host
name does not, since many machines have their own name in their tables as a loopback address, and
on a node of several networks it may stand for the slow one. Invariant: an address that is chosen
is one of an interface that is up, and never the loopback unless an endpoint is at the loopback.
"""

import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from ipaddress import ip_address, ip_network

import psutil

from outlast.cluster.errors import Misuse

ANYWHERE = ("203.0.113.1", 9)  # kept free for documentation: stands for the default route

Endpoint = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Interface:
    """`name` is the kernel's, empty for the loopback and for an address of no interface of ours."""

    name: str
    address: str


def choose(endpoints: Sequence[Endpoint], wanted: str = "", address: str = "") -> Interface:
    """The interface of this node that the job uses; nothing is sent to find it.

    Args:
        wanted: name of an interface, a network such as 10.0.0.0/8, or an address of this node.
        address: of this node, taken as it is.
    Raises:
        Misuse: there is none, or no telling which.
    """
    address = address or (_named(wanted) if wanted else _routed(endpoints))
    return Interface(own_addresses().get(address, ""), address)


def own_addresses() -> dict[str, str]:
    """Address -> name of its interface, of those that are up, IPv4 first."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    found = [
        (entry.address, name)
        for label, entries in psutil.net_if_addrs().items()
        for name in [label.partition(":")[0]]  # an address such as eth0:1 is one of eth0
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6) and name in up
        and "%" not in entry.address and not ip_address(entry.address).is_loopback
    ]  # fmt: skip
    return dict(sorted(found, key=lambda pair: ":" in pair[0]))


def _named(wanted: str) -> str:
    own = own_addresses()
    try:
        network = ip_network(wanted, strict=False)
    except ValueError:
        matching = [address for address, name in own.items() if name == wanted]
    else:
        matching = [address for address in own if ip_address(address) in network]
    if not matching:
        raise Misuse(f"--interface: {wanted!r} is none that is up here; there is {_listed(own)}")
    return matching[0]


def _routed(endpoints: Sequence[Endpoint]) -> str:
    ways = list(_ways(endpoints))
    for others in (True, False):  # the way to ourselves says less than the way to another node
        for here, there in ways:
            if not ip_address(here).is_loopback and (here != there) == others:
                return here
    for host, _ in endpoints:
        if host in ("localhost", "::1") or host.startswith("127."):
            return "::1" if ":" in host else "127.0.0.1"
    own = own_addresses()
    if ways:  # all endpoints are names of ours that stand for the loopback
        only = list(own) if len(set(own.values())) == 1 else []
        for address in (*(here for here, _ in _ways([ANYWHERE])), *only):
            return address
    raise Misuse(
        "--rdzv-endpoint: no way from here to " + ", ".join(host for host, _ in endpoints)
        + f"; check the names, or give --interface: there is {_listed(own)}"
    )  # fmt: skip


def _ways(endpoints: Sequence[Endpoint]) -> Iterator[tuple[str, str]]:
    """(our address, theirs) for every address of every endpoint to which there is a route."""
    for host, port in endpoints:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
        except OSError:
            continue  # the caller refuses if none is left
        for family, kind, _, _, there in found:
            with socket.socket(family, kind) as probe:
                try:
                    probe.connect(there)
                except OSError:
                    continue
                here = str(probe.getsockname()[0])
            yield here.partition("%")[0], str(there[0]).partition("%")[0]


def _listed(own: dict[str, str]) -> str:
    return ", ".join(f"{name} {address}" for address, name in own.items()) or "no network"
