"""Laws of stripes, with every pattern of loss in small clusters."""

from collections.abc import Mapping, Sequence
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outlast.layout.stripe import Piece, Stripe, parity_bytes, stripes

EXAMPLES = settings(max_examples=150, deadline=None)


@st.composite
def clusters(draw: st.DrawFn) -> tuple[dict[int, int], dict[int, int]]:
    """(sizes, domains) of up to 7 nodes with up to 4 workers each."""
    workers = draw(st.lists(st.integers(1, 4), min_size=1, max_size=7))
    domains = {10 * node + local: node for node, n in enumerate(workers) for local in range(n)}
    order = draw(st.permutations(list(domains)))
    return {holder: draw(st.integers(0, 1000)) for holder in order}, domains


def check_pieces(made: Sequence[Stripe], sizes: Mapping[int, int]) -> None:
    """Every byte of every stream is in exactly one piece, and no piece is longer than its unit."""
    pieces = [(stripe, piece) for stripe in made for piece in stripe.data]
    assert all(0 <= piece.stop - piece.start <= stripe.length for stripe, piece in pieces)
    for holder, size in sizes.items():
        mine = [range(piece.start, piece.stop) for _, piece in pieces if piece.holder == holder]
        assert sorted(byte for part in mine for byte in part) == list(range(size))


def check_survives(made: Sequence[Stripe], domains: Mapping[int, int], m: int) -> None:
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
def test_laws(cluster: tuple[dict[int, int], dict[int, int]], m: int, group: int) -> None:
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


@pytest.mark.parametrize(("nodes", "local", "m"), [(2, 1, 1), (4, 8, 1), (8, 4, 2), (33, 2, 3)])
def test_even_clusters_pay_m_over_k(nodes: int, local: int, m: int) -> None:
    domains = {node * local + worker: node for node in range(nodes) for worker in range(local)}
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


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="group"):
        stripes({1: 1, 2: 1}, {1: 1, 2: 2}, m=4, group=4)
    assert stripes({1: 9, 2: 9}, {1: 1, 2: 2}, m=0) == ()
    assert stripes({}, {}) == ()
    assert stripes({1: 0, 2: 0}, {1: 1, 2: 2}) == ()


SIZES, DOMAINS = {1: 64, 2: 64, 3: 64}, {1: 1, 2: 2, 3: 3}
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
