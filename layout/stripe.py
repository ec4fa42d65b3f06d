"""Stripes: which holders carry the parity of whose snapshot bytes.

A holder's snapshot is a stream of bytes. Holders of distinct failure domains form groups of n = k +
m; a group has n stripes, and stripe s has its m parity units on members s .. s+m-1 (mod n) and one
data unit, a piece of the stream, on each of the other k. So every member is data k times, parity m
times, and no node is special; the overhead is m / k. Holders that find no group are mirrored: data
of a stripe with k = 1.

Law: all units of a stripe lie in distinct domains, so losing any m domains costs each stripe at
most m units, which the code restores. Every byte of every stream is in exactly one piece.

A domain may lie in a rack: "rack/node". A group then takes few members from every rack, and where
groups of more than m members allow it at most m, so that the loss of a whole rack is survived
too. That may need more and therefore smaller groups, whose overhead is larger: with m = 1 and two
racks, nothing less than a copy of everything in the other rack will do.

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
>>> racks = {1: "a/node0", 2: "a/node1", 3: "b/node2", 4: "b/node3"}
>>> for s in stripes(dict.fromkeys(racks, 64), racks):
...     s.parity, [p.holder for p in s.data]
((1,), [3])
((3,), [1])
((2,), [4])
((4,), [2])
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

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
    sizes: Mapping[int, int], domains: Mapping[int, str], m: int = 1, group: int = 16
) -> tuple[Stripe, ...]:
    """The stripes that protect every stream against the loss of any `m` domains.

    The order of `sizes` is the order of the holders: the i-th holders of all domains form a lane,
    which is cut into groups of at most `group`. Fewer than m + 1 domains lower m; a single domain
    gives no stripes.

    Args:
        sizes: bytes of each holder's stream.
        domains: failure domain of each holder, its node; before the last "/" its rack if known.
    """
    if group <= m:
        raise ValueError(f"a group of {group} cannot carry {m} parity units and data")
    members: dict[str, list[int]] = {}
    for holder in sizes:
        members.setdefault(domains[holder], []).append(holder)
    m = min(m, len(members) - 1)
    if m < 1:
        return ()
    made: list[Stripe] = []
    alone: list[int] = []
    for lane in zip_longest(*members.values()):
        present = [holder for holder in lane if holder is not None]
        for part in _groups(present, domains, m, group):
            if len(part) > m:
                made += _rotate(part, sizes, m, len(made))
            else:
                alone += part
    load = dict.fromkeys(sizes, 0) | parity_bytes(made)
    for holder in alone:
        if sizes[holder]:
            parity = _mirrors(domains[holder], members, load, m)
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


def rack_of(domain: str) -> str:
    """The rack of a domain, empty where it is not known.

    >>> rack_of("row 3/rack 7/node12"), rack_of("node12"), rack_of("/node12")
    ('row 3/rack 7', '', '')
    """
    return domain.rpartition("/")[0]


def _groups(
    lane: Sequence[int], domains: Mapping[int, str], m: int, group: int
) -> list[Sequence[int]]:
    """`lane` in as few groups of at most `group` as possible, of nearly equal size.

    Members are dealt rack by rack, so of r members of a rack in g groups none has more than r / g,
    rounded up: as evenly as can be. More groups make that at most m, as long as all of them still
    have more than m members.
    """
    count = -(-len(lane) // group)
    crowds = Counter(rack for rack in (rack_of(domains[holder]) for holder in lane) if rack)
    apart = max(count, -(-max(crowds.values(), default=0) // m))
    if len(lane) // apart > m:
        count = apart
    dealt = sorted(lane, key=lambda holder: rack_of(domains[holder]))
    return [dealt[index::count] for index in range(count)]


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


def _mirrors(
    home: str, members: Mapping[str, Sequence[int]], load: Mapping[int, int], m: int
) -> tuple[int, ...]:
    """One holder each of `m` other domains, of another rack than `home`'s if there is one, and
    with the fewest bytes of parity so far."""
    ranked = sorted(
        (rack_of(domain) == rack_of(home), min((load[other], other) for other in holders))
        for domain, holders in members.items()
        if domain != home
    )
    return tuple(other for _, (_, other) in ranked[:m])


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN
