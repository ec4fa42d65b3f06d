"""`outlast plan-stripes`: where parity would lie, what it costs and which losses it survives.

It asks the functions that a job asks, about nodes that need not exist, so that a topology, m and
the size of groups can be chosen before anything is started.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import comb
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from outlast.cluster.errors import Misuse
from outlast.launch.topology import read_racks
from outlast.layout.stripe import Stripe, parity_bytes, rack_of, stripes
from outlast.layout.survival import Survival, copies_lost, survival_of

_POWERS = " KMGT"
_GROUPS_SHOWN, _LOSSES_SHOWN = 12, 8


def plan_stripes(options: Mapping[str, Any], console: Console) -> None:
    """The command behind `options`, as `launch.cli` names them.

    Raises:
        Misuse: they do not fit together.
    """
    names = _domains(options["nodes"], options["topology"])
    workers, m = options["nproc_per_node"], options["parity"]
    if workers < 1 or not 0 <= m < options["group"]:
        raise Misuse("need at least one worker per node, and 0 <= --parity < --group")
    size = -(-byte_count(options["bytes_per_node"]) // workers)
    domains = dict(enumerate(name for name in names for _ in range(workers)))
    sizes = dict.fromkeys(domains, size)
    made = stripes(sizes, domains, m, options["group"])
    survival = survival_of(made, sizes, domains)
    cost = _cost(made, sizes, domains)
    groups = _groups(made, domains)
    chances = {p: _chances(survival, p, cost["overhead"]) for p in options["probability"]}
    _show(groups, cost, survival, chances, console)
    if options["as_json"]:
        plan = {"groups": groups, "survival": asdict(survival), "probabilities": chances} | cost
        try:
            Path(options["as_json"]).write_text(json.dumps(plan, indent=1), "utf-8")
        except OSError as error:
            raise Misuse(f"--json: {error}") from error


def byte_count(text: str) -> int:
    """Bytes of a size such as 32GB, 1.5TiB or 4096; raises Misuse."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if found is None:
        raise Misuse(f"{text!r} is not a size: write 32GB or 32GiB")
    number, prefix, binary = found.groups()
    power = _POWERS.index(prefix.upper() or " ")
    return round(float(number) * (1024 if binary else 1000) ** power)


def _domains(nodes: int, topology: str) -> list[str]:
    """ "rack/node" of every node, without a rack where there is no topology."""
    if not topology:
        if nodes < 1:
            raise Misuse("how many nodes? Give --nodes, or --topology with their names")
        return [f"/node{index}" for index in range(nodes)]
    racks = read_racks(topology)
    if nodes and nodes != len(racks):
        raise Misuse(f"--nodes {nodes}, but {topology} names {len(racks)}: leave out --nodes")
    return [f"{rack}/{node}" for node, rack in racks.items()]


def _cost(
    made: Sequence[Stripe], sizes: Mapping[int, int], domains: Mapping[int, str]
) -> dict[str, float]:
    """Bytes of the node that has most of each: its state, its parity (it keeps two versions), and
    what it sends for the parity of a step; the overhead is that of all nodes together."""
    state, parity, sent = (dict.fromkeys(domains.values(), 0) for _ in range(3))
    for holder, size in sizes.items():
        state[domains[holder]] += size
    for holder, size in parity_bytes(made).items():
        parity[domains[holder]] += size
    for stripe in made:
        for piece in stripe.data:
            sent[domains[piece.holder]] += piece.stop - piece.start
        sent[domains[stripe.parity[0]]] += stripe.length * (len(stripe.parity) - 1)
    most = {"state_bytes": state, "parity_bytes": parity, "sent_bytes": sent}
    overhead = sum(parity.values()) / max(1, sum(state.values()))
    return {name: max(values.values()) for name, values in most.items()} | {"overhead": overhead}


def _groups(made: Sequence[Stripe], domains: Mapping[int, str]) -> list[dict[str, Any]]:
    """Which domains share stripes of k data and m parity units."""
    found = {}
    for stripe in made:
        holders = sorted((*stripe.parity, *(piece.holder for piece in stripe.data)))
        members = tuple(domains[holder] for holder in holders)
        group = {"k": len(stripe.data), "m": len(stripe.parity), "domains": members}
        found[tuple(group.values())] = group
    return list(found.values())


def _chances(survival: Survival, p: float, overhead: float) -> dict[str, float]:
    """Scheme -> probability that state is lost where a node is lost with probability `p`."""
    return {
        "these stripes": survival.loss_probability(p),
        "copies of what the same memory holds": copies_lost(survival.nodes, p, overhead),
        "two copies (100 % more)": copies_lost(survival.nodes, p),
        "nothing": copies_lost(survival.nodes, p, 0.0),
    }


def _show(
    groups: Sequence[dict[str, Any]],
    cost: Mapping[str, float],
    survival: Survival,
    chances: Mapping[float, Mapping[str, float]],
    console: Console,
) -> None:
    table = _table("group", "units", "racks", "nodes")
    for number, group in enumerate(groups[:_GROUPS_SHOWN]):
        nodes = ", ".join(domain.rpartition("/")[2] for domain in group["domains"])
        racks = len({rack_of(domain) for domain in group["domains"]} - {""})
        table.add_row(str(number), f"{group['k']} + {group['m']}", str(racks or "?"), nodes)
    console.print(table if groups else "No stripes: nothing is protected.")
    if len(groups) > _GROUPS_SHOWN:
        console.print(f"and {len(groups) - _GROUPS_SHOWN} groups more\n")
    state, parity, sent = (cost[f"{what}_bytes"] / 1e9 for what in ("state", "parity", "sent"))
    console.print(
        f"For {state:.2f} GB of state a node keeps {parity:.2f} GB of parity "
        f"({cost['overhead']:.0%}), in two versions, and sends {sent:.2f} GB in every step."
    )
    table = _table("nodes lost", "patterns survived", "of", "share")
    known = "" if survival.exact else "at least "
    for lost in range(1, min(_LOSSES_SHOWN, survival.nodes) + 1):
        counts = survival.patterns[lost], comb(survival.nodes, lost)
        shown = [f"{count:,}" if count < 1e12 else f"{count:.3e}" for count in counts]
        table.add_row(str(lost), known + shown[0], shown[1], f"{survival.share(lost):.2%}")
    console.print(table)
    fatal = [rack for rack, alive in survival.racks.items() if not alive]
    if survival.racks:
        verdict = f"fatal for {', '.join(fatal)}" if fatal else "any one is survived"
        console.print(f"Loss of one of {len(survival.racks)} whole racks: {verdict}\n")
    console.print("Probability that state is lost before the redundancy is whole again:")
    table = _table("a node is lost with p =", *(f"{p:g}" for p in chances))
    for scheme in next(iter(chances.values())):
        table.add_row(scheme, *(f"{column[scheme]:.1e}" for column in chances.values()))
    console.print(table)


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table
