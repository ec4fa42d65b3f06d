"""Stripes: which holders carry the parity of whose snapshot bytes.

A holder's snapshot is a stream of bytes. Holders of distinct failure domains form groups of n = k +
m; a group has n stripes, and stripe s has its m parity units on members s .. s+m-1 (mod n) and one
data unit, a piece of the stream, on each of the other k. So every member is data k times, parity m
times, and no node is special; the overhead is m / k. Holders that find no group are mirrored: data
of a stripe with k = 1.

Law: all units of a stripe lie in distinct domains, so losing any m domains costs each stripe at
most m units, which the code restores. Every byte of every stream is in exactly one piece.

>>> made = stripes({1: 100, 2: 128, 3: 90}, {1: "node0", 2: "node1", 3: "node2"})
>>> for s in made:
...     s.parity, [(p.holder, p.start, p.stop) for p in s.data], s.length
((1,), [(2, 64, 128), (3, 0, 64)], 64)
((2,), [(1, 0, 64), (3, 64, 90)], 64)
((3,), [(1, 64, 100), (2, 0, 64)], 64)
>>> parity_bytes(made)
{1: 64, 2: 64, 3: 64}
>>> stripes({1: 100, 2: 100}, {1: "alone", 2: "alone"})  # one domain: no protection
()
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest

ALIGN = 64  # bytes: units end on cache lines and whole words


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes [start, stop) of the snapshot stream of `holder`; may be empty."""

    holder: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Stripe:
    """k data units and m parity units of `length` bytes; `parity[j]` holds parity unit j.

    A piece shorter than `length` counts as padded with zeros.
    """

    index: int
    data: tuple[Piece, ...]
    parity: tuple[int, ...]
    length: int


def stripes(
    sizes: Mapping[int, int], domains: Mapping[int, str | int], m: int = 1, group: int = 16
) -> tuple[Stripe, ...]:
    """The stripes that protect every stream against the loss of any `m` domains.

    The order of `sizes` is the order of the holders: the i-th holders of all domains form a lane,
    which is cut into groups of at most `group`. Fewer than m + 1 domains lower m; a single domain
    gives no stripes.

    Args:
        sizes: bytes of each holder's stream.
        domains: failure domain of each holder, for instance its node.
    """
    if group <= m:
        raise ValueError(f"a group of {group} cannot carry {m} parity units and data")
    members: dict[str | int, list[int]] = {}
    for holder in sizes:
        members.setdefault(domains[holder], []).append(holder)
    m = min(m, len(members) - 1)
    if m < 1:
        return ()
    made: list[Stripe] = []
    alone: list[int] = []
    for lane in zip_longest(*members.values()):
        present = [holder for holder in lane if holder is not None]
        for part in _parts(present, group):
            if len(part) > m:
                made += _rotate(part, sizes, m, len(made))
            else:
                alone += part
    load = dict.fromkeys(sizes, 0) | parity_bytes(made)
    for holder in alone:
        if sizes[holder]:
            others = [them for domain, them in members.items() if domain != domains[holder]]
            parity = _least_loaded(others, load, m)
            length = _aligned(sizes[holder])
            made.append(Stripe(len(made), (Piece(holder, 0, sizes[holder]),), parity, length))
            for mirror in parity:
                load[mirror] += length
    return tuple(made)


def parity_bytes(made: Iterable[Stripe]) -> dict[int, int]:
    """Bytes of parity that each holder carries."""
    total: dict[int, int] = {}
    for stripe in made:
        for holder in stripe.parity:
            total[holder] = total.get(holder, 0) + stripe.length
    return total


def _parts(lane: Sequence[int], group: int) -> list[Sequence[int]]:
    """`lane` in as few groups of at most `group` as possible, of nearly equal size."""
    count = -(-len(lane) // group)
    edges = [index * len(lane) // count for index in range(count + 1)]
    return [lane[a:b] for a, b in pairwise(edges)]


def _rotate(part: Sequence[int], sizes: Mapping[int, int], m: int, first: int) -> list[Stripe]:
    n = len(part)
    k = n - m
    length = _aligned(-(-max(sizes[holder] for holder in part) // k))
    if not length:
        return []
    made = []
    for s in range(n):
        data = []
        for t in range(n):
            piece = (s - t - 1) % n  # member t is data in the k stripes after its own
            if piece < k:
                edge = [min(index * length, sizes[part[t]]) for index in (piece, piece + 1)]
                data.append(Piece(part[t], *edge))
        made.append(
            Stripe(first + s, tuple(data), tuple(part[(s + j) % n] for j in range(m)), length)
        )
    return made


def _least_loaded(
    domains: Iterable[Sequence[int]], load: Mapping[int, int], m: int
) -> tuple[int, ...]:
    """One holder each of m domains, those with the fewest bytes of parity so far."""
    best = [min(holders, key=lambda holder: load[holder]) for holders in domains]
    return tuple(sorted(best, key=lambda holder: load[holder])[:m])


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN
