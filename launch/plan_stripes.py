"""`outlast plan-stripes`: where parity would lie, what it costs and which losses it survives.

It asks the functions that a job asks, about nodes that need not exist, so that a topology, m and
the size of groups can be chosen before anything is started.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_GROUPS_SHOWN, _LOSSES_SHOWN = 12, 8


@dataclass(frozen=True, slots=True)
class Group:
    """Domains that share stripes of `k` data and `m` parity units."""

    k: int
    m: int
    domains: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StripePlan:
    """What a job would do, its nodes and racks pretended.

    Args:
        state_bytes: of one node.
        parity_bytes: of the node with most of it; a node keeps two such versions.
        sent_bytes: what the node that sends most sends for each step's parity.
        probabilities: p of a node -> {scheme: P(state is lost)}.
    """

    nodes: int
    state_bytes: int
    parity_bytes: int
    sent_bytes: int
    groups: tuple[Group, ...]
    survival: Survival
    probabilities: dict[str, dict[str, float]]


def plan_stripes(options: Mapping[str, Any], console: Console) -> None:
    """The command behind `options`, as `launch.cli` names them.

    Raises:
        Misuse: they do not fit together.
    """
    domains = _domains(options["nodes"], options["topology"])
    workers, m = options["nproc_per_node"], options["parity"]
    if workers < 1 or not 0 <= m < options["group"]:
        raise Misuse("need at least one worker per node, and 0 <= --parity < --group")
    size = -(-byte_count(options["bytes_per_node"]) // workers)
    holders = {
        index * workers + local: domain
        for index, domain in enumerate(domains)
        for local in range(workers)
    }
    made = stripes(dict.fromkeys(holders, size), holders, m, options["group"])
    plan = described(made, dict.fromkeys(holders, size), holders, options["probability"])
    show(plan, console)
    if options["as_json"]:
        try:
            Path(options["as_json"]).write_text(json.dumps(asdict(plan), indent=1), "utf-8")
        except OSError as error:
            raise Misuse(f"--json: {error}") from error


def described(
    made: Sequence[Stripe],
    sizes: Mapping[int, int],
    domains: Mapping[int, str],
    probabilities: Sequence[float],
) -> StripePlan:
    """The plan that the stripes `made` are.

    Args:
        sizes: bytes of each holder's stream.
        domains: "rack/node" of each holder.
        probabilities: of a node to be lost in one window.
    """
    nodes = sorted(set(domains.values()))
    survival = survival_of(made, sizes, domains)
    state, parity, sent = (dict.fromkeys(nodes, 0) for _ in range(3))
    for holder, size in sizes.items():
        state[domains[holder]] += size
    for holder, size in parity_bytes(made).items():
        parity[domains[holder]] += size
    for stripe in made:
        for piece in stripe.data:
            sent[domains[piece.holder]] += piece.stop - piece.start
        sent[domains[stripe.parity[0]]] += stripe.length * (len(stripe.parity) - 1)
    extra = sum(parity.values()) / max(1, sum(state.values()))
    chances = {
        f"{p:g}": {
            "these stripes": survival.loss_probability(p),
            "copies of what the same memory holds": copies_lost(len(nodes), p, extra),
            "two copies (100 % more)": copies_lost(len(nodes), p),
            "nothing": copies_lost(len(nodes), p, 0.0),
        }
        for p in probabilities
    }
    return StripePlan(
        nodes=len(nodes),
        state_bytes=max(state.values()),
        parity_bytes=max(parity.values()),
        sent_bytes=max(sent.values()),
        groups=_groups(made, domains),
        survival=survival,
        probabilities=chances,
    )


def show(plan: StripePlan, console: Console) -> None:
    """Print the tables of a plan."""
    groups = _table("group", "units", "racks", "nodes")
    for number, group in enumerate(plan.groups[:_GROUPS_SHOWN]):
        names = [domain.rpartition("/")[2] for domain in group.domains]
        racks = {rack_of(domain) for domain in group.domains} - {""}
        groups.add_row(
            str(number), f"{group.k} + {group.m}", str(len(racks) or "?"), ", ".join(names)
        )
    console.print(groups if plan.groups else "No stripes: nothing is protected.")
    if len(plan.groups) > _GROUPS_SHOWN:
        console.print(f"and {len(plan.groups) - _GROUPS_SHOWN} groups more\n")
    console.print(
        f"Of {plan.state_bytes / 1e9:.2f} GB of state a node keeps {plan.parity_bytes / 1e9:.2f} GB"
        f" of parity ({plan.parity_bytes / max(1, plan.state_bytes):.0%}), in two versions, and "
        f"sends {plan.sent_bytes / 1e9:.2f} GB for it in every step."
    )
    survival = plan.survival
    losses = _table("nodes lost", "patterns survived", "of", "share")
    for lost in range(1, min(_LOSSES_SHOWN, survival.nodes) + 1):
        known = "" if survival.exact else "at least "
        row = known + _number(survival.patterns[lost]), _number(comb(survival.nodes, lost))
        losses.add_row(str(lost), *row, f"{survival.share(lost):.2%}")
        if not survival.patterns[lost]:
            break
    console.print(losses)
    fatal = [rack for rack, alive in survival.racks.items() if not alive]
    if survival.racks:
        console.print(f"Loss of a whole rack: {_rack_verdict(fatal, len(survival.racks))}\n")
    schemes = next(iter(plan.probabilities.values()), {})
    chances = _table("a node is lost with p =", *plan.probabilities)
    for scheme in schemes:
        chances.add_row(
            scheme, *(f"{column[scheme]:.1e}" for column in plan.probabilities.values())
        )
    chances.title = "Probability that state is lost, until the redundancy is whole again"
    console.print(chances)


def byte_count(text: str) -> int:
    """Bytes of a size such as 32GB, 1.5TiB or 4096.

    >>> byte_count("32GB"), byte_count("0.5 KiB")
    (32000000000, 512)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if found is None:
        raise Misuse(f"{text!r} is not a size: write 32GB or 32GiB")
    number, prefix, binary = found.groups()
    unit = _UNITS[prefix.upper()]
    if binary:
        unit = 1024 ** (len(str(unit)) // 3)
    return round(float(number) * unit)


def _domains(nodes: int, topology: str) -> list[str]:
    if not topology:
        if nodes < 1:
            raise Misuse("how many nodes? Give --nodes, or --topology with their names")
        return [f"/node{index}" for index in range(nodes)]
    racks = read_racks(topology)
    if nodes and nodes != len(racks):
        raise Misuse(f"--nodes {nodes}, but {topology} names {len(racks)}: leave out --nodes")
    return [f"{rack}/{node}" for node, rack in racks.items()]


def _groups(made: Sequence[Stripe], domains: Mapping[int, str]) -> tuple[Group, ...]:
    found: dict[Group, None] = {}
    for stripe in made:
        holders = (*stripe.parity, *(piece.holder for piece in stripe.data))
        members = tuple(sorted({domains[holder] for holder in holders}, key=_natural))
        found[Group(len(stripe.data), len(stripe.parity), members)] = None
    return tuple(found)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts node10 behind node9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _rack_verdict(fatal: Sequence[str], racks: int) -> str:
    if not fatal:
        return f"any one of {racks} is survived"
    shown = ", ".join(fatal[:4]) + (f" and {len(fatal) - 4} more" if len(fatal) > 4 else "")
    return f"fatal for {len(fatal)} of {racks} ({shown})"


def _number(count: int) -> str:
    return f"{count:,}" if count < 10**12 else f"{count:.3e}"


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table
