"""Which nodes share a rack: a file of the operator's, or what SLURM says of this node.

A rack is whatever fails as a whole: a switch, a power feed, a blade chassis. Invariant: racks are
known of every node of a job or of none, because parity that is laid over racks trusts them.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path

from outlast.cluster.environment import environment
from outlast.cluster.errors import Misuse
from outlast.cluster.view import TEXT_MAX


def read_racks(path: str) -> dict[str, str]:
    """Node -> rack, from a TOML file with a table `[racks]` of lists: rack = ["node", ...].

    Raises:
        Misuse: the file cannot be read, is something else, or has a node twice.
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8")).get("racks")
    except (OSError, ValueError) as error:
        raise Misuse(f"--topology {path}: {error}") from error
    if not isinstance(table, dict) or not table:
        raise Misuse(f'--topology {path}: expected a table [racks] of lists: rack = ["node", ...]')
    racks: dict[str, str] = {}
    for rack, nodes in table.items():
        if not isinstance(nodes, list) or not all(isinstance(node, str) for node in nodes):
            raise Misuse(f"--topology {path}: rack {rack}: expected a list of node names")
        if not 0 < len(rack) <= TEXT_MAX:
            raise Misuse(f"--topology {path}: a rack's name has 1 to {TEXT_MAX} characters")
        for node in nodes:
            if node in racks:
                raise Misuse(f"--topology {path}: {node} is in two racks, {racks[node]} and {rack}")
            racks[node] = rack
    return racks


def rack_of(node: str, racks: Mapping[str, str], *, alone: bool) -> str:
    """The rack of this node: from the file if there is one, else from SLURM, else empty; SLURM says
    nothing of the nodes of a job that is `alone` on one machine."""
    if not racks:
        return "" if alone else environment().rack
    if node not in racks:
        raise Misuse(f"--topology: node {node} is in no rack: add it, or check --node-name")
    return racks[node]
