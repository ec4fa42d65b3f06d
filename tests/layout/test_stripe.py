"""Laws of stripes, with every pattern of loss in small clusters."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations, zip_longest

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outlast.layout.stripe import Piece, Stripe, parity_bytes, rack_of, stripes
from outlast.layout.survival import survival_of

EXAMPLES = settings(max_examples=150, deadline=None)


@st.composite
def clusters(draw: st.DrawFn) -> tuple[dict[int, int], dict[int, str]]:
    """(sizes, domains) of up to 9 nodes in up to 5 racks, or none, with up to 4 workers each."""
    workers = draw(st.lists(st.integers(1, 4), min_size=1, max_size=9))
    racks = draw(st.integers(0, 5))
    names = [
        f"{draw(st.integers(1, racks))}/{node}" if racks else f"/{node}"
        for node in range(len(workers))
    ]
    domains = {10 * i + local: names[i] for i, n in enumerate(workers) for local in range(n)}
    order = draw(st.permutations(list(domains)))
    return {holder: draw(st.integers(0, 1000)) for holder in order}, domains


def check_pieces(made: Sequence[Stripe], sizes: Mapping[int, int]) -> None:
    """Every byte of every stream is in exactly one piece, and no piece is longer than its unit."""
    pieces = [(stripe, piece) for stripe in made for piece in stripe.data]
    assert all(0 <= piece.stop - piece.start <= stripe.length for stripe, piece in pieces)
    for holder, size in sizes.items():
        mine = [range(piece.start, piece.stop) for _, piece in pieces if piece.holder == holder]
        assert sorted(byte for part in mine for byte in part) == list(range(size))


def check_survives(made: Sequence[Stripe], domains: Mapping[int, str], m: int) -> None:
    """Every stripe has m parity units, and losing any m domains costs it m units at most."""
    lost = list(combinations(sorted(set(domains.values())), m))
    for stripe in made:
        units = [domains[holder] for holder in (*stripe.parity, *(p.holder for p in stripe.data))]
        assert len(stripe.parity) == m
        assert stripe.data
        assert len(units) == len(set(units))
        assert all(sum(unit in gone for unit in units) <= m for gone in lost)


@EXAMPLES
@given(clusters(), st.integers(1, 3), st.integers(4, 6))
def test_laws(cluster: tuple[dict[int, int], dict[int, str]], m: int, group: int) -> None:
    sizes, domains = cluster
    made = stripes(sizes, domains, m, group)
    nodes = len(set(domains.values()))
    if nodes == 1:
        assert made == ()
        return
    check_pieces(made, sizes)
    check_survives(made, domains, min(m, nodes - 1))
    assert [stripe.index for stripe in made] == list(range(len(made)))
    assert all(stripe.length % 64 == 0 and stripe.length for stripe in made)
    assert all(len(stripe.data) + len(stripe.parity) <= group for stripe in made)


def rack_proof(lanes: Sequence[Sequence[str]], m: int, group: int) -> bool:
    """Whether every lane of domains can be cut into groups with at most m members of each rack.

    A lane of at most m members is mirrored in other racks. Otherwise some number g of groups of
    nearly equal size must do: more than m members each, and at most g * m members of a rack.
    """
    for lane in lanes:
        most = max(Counter(rack_of(domain) for domain in lane).values())
        counts = range(-(-len(lane) // group), len(lane) // (m + 1) + 1)
        if len(lane) > m and not any(most <= m * count for count in counts):
            return False
    return True


@EXAMPLES
@given(clusters(), st.integers(1, 3), st.integers(4, 9))
def test_any_rack_may_be_lost_where_groups_allow_it(
    cluster: tuple[dict[int, int], dict[int, str]], m: int, group: int
) -> None:
    sizes, domains = cluster
    sizes = {holder: size + 1 for holder, size in sizes.items()}
    made = stripes(sizes, domains, m, group)
    nodes = sorted(set(domains.values()))
    racks = {rack_of(node) for node in nodes} - {""}
    m = min(m, len(nodes) - 1)
    survived = survival_of(made, sizes, domains).racks
    assert survived.keys() == racks
    for rack, alive in survived.items():  # the count of survival, once more by hand
        units = [(s, [*s.parity, *(p.holder for p in s.data if p.stop > p.start)]) for s in made]
        lost = [sum(rack_of(domains[h]) == rack for h in holders) for _, holders in units]
        allowed = [len(s.parity) for s, _ in units]
        gone = m < 1 or any(a > b for a, b in zip(lost, allowed, strict=True))
        assert alive is not gone
    members = [[h for h in sizes if domains[h] == node] for node in nodes]
    lanes = [[domains[h] for h in lane if h is not None] for lane in zip_longest(*members)]
    if len(racks) > 1 and rack_proof(lanes, m, group):
        assert all(survived.values())


def test_groups_spread_over_racks() -> None:
    domains = {node: f"rack{node // 4}/{node}" for node in range(16)}
    made = stripes(dict.fromkeys(domains, 640), domains, m=1, group=8)
    groups = {frozenset([*stripe.parity, *(p.holder for p in stripe.data)]) for stripe in made}
    assert groups == {frozenset(range(first, 16, 4)) for first in range(4)}
    made = stripes(dict.fromkeys(domains, 640), domains, m=2, group=8)
    groups = {frozenset([*stripe.parity, *(p.holder for p in stripe.data)]) for stripe in made}
    assert sorted(map(len, groups)) == [8, 8]  # two of each rack in either


@pytest.mark.parametrize(("nodes", "local", "m"), [(2, 1, 1), (4, 8, 1), (8, 4, 2), (33, 2, 3)])
def test_even_clusters_pay_m_over_k(nodes: int, local: int, m: int) -> None:
    domains = {
        node * local + worker: f"/{node}" for node in range(nodes) for worker in range(local)
    }
    made = stripes(dict.fromkeys(domains, 64_000), domains, m)
    n = nodes // -(-nodes // 16)  # the smallest group pays most
    load = parity_bytes(made)
    assert load.keys() == domains.keys()
    assert max(load.values()) <= m * (64_000 / (n - m) + 64)
    members = {holder for stripe in made for holder in (*stripe.parity, stripe.data[0].holder)}
    assert members == set(domains)


def test_leftovers_are_mirrored_on_the_least_loaded() -> None:
    domains = {1: "a", 2: "b", 3: "a", 4: "a", 5: "c"}
    made = stripes(dict.fromkeys(domains, 640), domains)
    mirrors = [stripe for stripe in made if len(stripe.data) == 1]
    assert [stripe.data[0].holder for stripe in mirrors] == [3, 4]
    assert {stripe.parity[0] for stripe in mirrors} == {2, 5}


TWO = {1: "a", 2: "b"}


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="group"):
        stripes({1: 1, 2: 1}, TWO, m=4, group=4)
    assert stripes({1: 9, 2: 9}, TWO, m=0) == ()
    assert stripes({}, {}) == ()
    assert stripes({1: 0, 2: 0}, TWO) == ()


SIZES, DOMAINS = {1: 64, 2: 64, 3: 64}, {1: "1", 2: "2", 3: "3"}
RIGHT = (
    Stripe(0, (Piece(1, 0, 64), Piece(2, 0, 64)), (3,), 64),
    Stripe(1, (Piece(3, 0, 64),), (1,), 64),
)


@pytest.mark.parametrize(
    "wrong",
    [
        RIGHT[:1],  # stream 3 unprotected
        (*RIGHT, RIGHT[1]),  # and twice
        (Stripe(0, (Piece(1, 0, 63), Piece(2, 0, 64)), (3,), 64), RIGHT[1]),
        (Stripe(0, RIGHT[0].data, (3,), 32), RIGHT[1]),
    ],
)
def test_planted_bugs_in_pieces_are_seen(wrong: tuple[Stripe, ...]) -> None:
    check_pieces(RIGHT, SIZES)
    with pytest.raises(AssertionError):
        check_pieces(wrong, SIZES)


@pytest.mark.parametrize(
    "wrong",
    [
        (Stripe(0, (Piece(1, 0, 64), Piece(2, 0, 64)), (2,), 64),),  # parity beside its data
        (Stripe(0, (Piece(1, 0, 64),), (), 64),),
        (Stripe(0, (), (2,), 64),),
    ],
)
def test_planted_bugs_in_placement_are_seen(wrong: tuple[Stripe, ...]) -> None:
    check_survives(RIGHT, DOMAINS, 1)
    with pytest.raises(AssertionError):
        check_survives(wrong, DOMAINS, 1)


def test_planted_blindness_to_racks_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    domains = {node: f"rack{node // 4}/{node}" for node in range(8)}
    sizes = dict.fromkeys(domains, 64)
    assert all(survival_of(stripes(sizes, domains, 1, 4), sizes, domains).racks.values())
    monkeypatch.setattr("outlast.layout.stripe.rack_of", lambda domain: "")
    assert not any(survival_of(stripes(sizes, domains, 1, 4), sizes, domains).racks.values())
