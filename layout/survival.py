"""Which losses of nodes stripes survive: counted, not sampled.

A stripe is decodable as long as no more of its units are gone than it has parity units. Stripes of
one group ask the same of the same nodes; groups that share no node are independent, so the number
of survivable patterns of j lost nodes is a coefficient of the product of their polynomials (REFT's
reliability formulas, arXiv 2310.12670, are these for groups of one size). Where groups overlap,
patterns are enumerated.

>>> from outlast.layout.stripe import stripes
>>> domains = {holder: f"node{holder}" for holder in range(8)}
>>> sizes = dict.fromkeys(domains, 640)
>>> survival = survival_of(stripes(sizes, domains, m=2, group=4), sizes, domains)
>>> survival.patterns[:6]  # of 1, 8, 28, 56, 70, 56: of five nodes, some group loses three
(1, 8, 28, 48, 36, 0)
>>> f"{survival.loss_probability(1e-3):.2e} {copies_lost(8, 1e-3):.2e}"
'7.99e-09 4.00e-06'
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb, exp, expm1, log, log1p

from outlast.layout.stripe import Stripe, rack_of

ENUMERATED_MAX = 200_000  # patterns; of groups that overlap, beyond that a loss counts as fatal

Polynomial = tuple[int, ...]  # coefficient j: patterns of j lost nodes


@dataclass(frozen=True, slots=True)
class Demand:
    """Of these nodes no more than `most` may be lost."""

    nodes: frozenset[str]
    most: int


@dataclass(frozen=True, slots=True)
class Survival:
    """What a set of stripes survives.

    Args:
        nodes: number of nodes.
        patterns: how many patterns of j lost nodes are survived, for j = 0 to `nodes`.
        exact: False if there were too many patterns to look at; `patterns` is then a lower bound.
        racks: whether the loss of this rack alone is survived.
    """

    nodes: int
    patterns: Polynomial
    exact: bool
    racks: dict[str, bool]

    def share(self, lost: int) -> float:
        """Share of the patterns of `lost` lost nodes that is survived."""
        return self.patterns[lost] / comb(self.nodes, lost)

    def loss_probability(self, p: float) -> float:
        """Probability that state is lost where each node is, independently, with probability `p`.

        The window that `p` is for: from one loss until the redundancy is whole again.
        """
        if p in (0.0, 1.0):
            return float(p == 1.0 and not self.patterns[-1])
        total = 0.0
        for lost, survived in enumerate(self.patterns):
            fatal = comb(self.nodes, lost) - survived
            if fatal:  # by logarithms: the count may be beyond a float
                total += exp(log(fatal) + lost * log(p) + (self.nodes - lost) * log1p(-p))
        return min(total, 1.0)


def survival_of(
    made: Iterable[Stripe], sizes: Mapping[int, int], domains: Mapping[int, str]
) -> Survival:
    """What the stripes `made` of streams of `sizes` bytes survive, their holders in `domains`.

    A node is a whole domain, its rack what stands before the last "/". A node with bytes that no
    stripe protects may not be lost at all.
    """
    demands = _demands(made, sizes, domains)
    nodes = sorted(set(domains.values()))
    patterns: Polynomial = (1,)
    exact = True
    for part in _independent(demands, nodes):
        counted, whole = _count(part)
        patterns, exact = _product(patterns, counted), exact and whole
    patterns += (0,) * (len(nodes) + 1 - len(patterns))
    racks: dict[str, set[str]] = {}
    for node in nodes:
        if rack_of(node):
            racks.setdefault(rack_of(node), set()).add(node)
    alive = {rack: survives(demands, gone) for rack, gone in sorted(racks.items())}
    return Survival(len(nodes), patterns, exact, alive)


def survives(demands: Iterable[Demand], gone: Collection[str]) -> bool:
    """Whether the loss of the nodes `gone` leaves all state."""
    return all(sum(node in demand.nodes for node in gone) <= demand.most for demand in demands)


def copies_lost(nodes: int, p: float, memory: float = 1.0) -> float:
    """Probability of a loss where copies are kept instead (Gemini, SOSP 2023).

    Args:
        nodes: they form disjoint groups as large as a stream has copies, the own one included.
        memory: extra memory, as a multiple of the state. A fraction covers that share of the
            groups with one more copy than the others have.
    """
    if p == 1.0:
        return 1.0
    copies = 1 + int(memory)
    more = memory - int(memory)
    alive = (1 - more) / copies * log1p(-(p**copies))
    return -expm1(nodes * (alive + more / (copies + 1) * log1p(-(p ** (copies + 1)))))


def _demands(
    made: Iterable[Stripe], sizes: Mapping[int, int], domains: Mapping[int, str]
) -> tuple[Demand, ...]:
    """What is asked for, without what follows from another demand; a unit without bytes is never
    lost."""
    found: set[Demand] = set()
    covered: set[int] = set()
    for stripe in made:
        data = [piece.holder for piece in stripe.data if piece.start < piece.stop]
        units = frozenset(domains[holder] for holder in (*stripe.parity, *data))
        covered.update(data)
        if data:
            found.add(Demand(units, len(stripe.parity)))
    bare = {domains[holder] for holder, size in sizes.items() if size and holder not in covered}
    found |= {Demand(frozenset([node]), 0) for node in bare}
    return tuple(
        one
        for one in found
        if not any(
            one != other and one.nodes <= other.nodes and one.most >= other.most for other in found
        )
    )


def _independent(
    demands: Sequence[Demand], nodes: Iterable[str]
) -> Iterator[tuple[tuple[str, ...], tuple[Demand, ...]]]:
    """(nodes, demands) of the parts that share no node; a node of no demand is a part."""
    parts: list[tuple[set[str], list[Demand]]] = []
    for demand in demands:
        touched = [part for part in parts if part[0] & demand.nodes]
        parts = [part for part in parts if not part[0] & demand.nodes]
        members = set(demand.nodes).union(*(part[0] for part in touched))
        parts.append((members, [demand, *(one for part in touched for one in part[1])]))
    for members, asked in parts:
        yield tuple(sorted(members)), tuple(asked)
    for node in sorted(set(nodes).difference(*(part[0] for part in parts))):
        yield (node,), ()


def _count(part: tuple[tuple[str, ...], tuple[Demand, ...]]) -> tuple[Polynomial, bool]:
    """Survivable patterns of one part, and whether all of them were looked at."""
    nodes, demands = part
    size = len(nodes)
    if len(demands) <= 1:
        most = demands[0].most if demands else size
        return tuple(comb(size, lost) for lost in range(min(most, size) + 1)), True
    at = {node: 1 << index for index, node in enumerate(nodes)}
    masks = [(sum(at[node] for node in demand.nodes), demand.most) for demand in demands]
    counts: list[int] = []
    seen = 0
    for lost in range(size + 1):
        seen += comb(size, lost)
        if seen > ENUMERATED_MAX:
            return tuple(counts), False
        counts.append(
            sum(
                all((gone & mask).bit_count() <= most for mask, most in masks)
                for gone in map(sum, combinations(at.values(), lost))
            )
        )
        if not counts[-1]:
            break
    return tuple(counts), True


def _product(a: Polynomial, b: Polynomial) -> Polynomial:
    total = [0] * (len(a) + len(b) - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            total[i + j] += x * y
    return tuple(total)
