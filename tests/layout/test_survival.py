"""Counts of survivable losses against looking at every pattern, and the formulas they replace."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from math import comb, expm1, isclose, log1p

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outlast.layout import survival as module
from outlast.layout.stripe import Stripe, stripes
from outlast.layout.survival import Survival, copies_lost, survival_of

EXAMPLES = settings(max_examples=60, deadline=None)


def looked_at(made: Sequence[Stripe], sizes: Mapping[int, int], domains: Mapping[int, str]) -> list:
    """Survivable patterns of every size by trying all of them on every stripe."""
    nodes = sorted(set(domains.values()))
    bare = {h for h, size in sizes.items() if size} - {p.holder for s in made for p in s.data}

    def alive(gone: tuple[str, ...]) -> bool:
        for stripe in made:
            data = [p.holder for p in stripe.data if p.stop > p.start]
            lost = sum(domains[holder] in gone for holder in data)
            kept = sum(domains[holder] not in gone for holder in stripe.parity)
            if lost > kept:
                return False
        return not any(domains[holder] in gone for holder in bare)

    return [sum(map(alive, combinations(nodes, lost))) for lost in range(len(nodes) + 1)]


@st.composite
def clusters(draw: st.DrawFn) -> tuple[dict[int, int], dict[int, str]]:
    """Up to 9 nodes; where their numbers of workers differ, groups overlap."""
    workers = draw(st.lists(st.integers(1, 3), min_size=1, max_size=9))
    domains = {10 * i + local: f"/{i}" for i, n in enumerate(workers) for local in range(n)}
    return {holder: draw(st.integers(0, 500)) for holder in domains}, domains


@EXAMPLES
@given(clusters(), st.integers(0, 3), st.integers(4, 6))
def test_counts_are_those_of_every_pattern(
    cluster: tuple[dict[int, int], dict[int, str]], m: int, group: int
) -> None:
    sizes, domains = cluster
    made = stripes(sizes, domains, m, group)
    survival = survival_of(made, sizes, domains)
    assert survival.exact
    assert list(survival.patterns) == looked_at(made, sizes, domains)
    n = survival.nodes
    for p in (0.0, 0.01, 0.5, 1.0):
        whole = sum(c * p**j * (1 - p) ** (n - j) for j, c in enumerate(survival.patterns))
        assert isclose(survival.loss_probability(p), 1 - whole, abs_tol=1e-12)


def test_planted_wrong_tolerance_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    domains = {node: f"/{node}" for node in range(8)}
    sizes = dict.fromkeys(domains, 640)
    made = stripes(sizes, domains, 2, 4)
    right = looked_at(made, sizes, domains)
    assert list(survival_of(made, sizes, domains).patterns) == right
    demand = module.Demand
    monkeypatch.setattr(module, "Demand", lambda nodes, most: demand(nodes, most + 1))
    assert list(survival_of(made, sizes, domains).patterns) != right


@pytest.mark.parametrize(
    ("k", "m", "p", "expected"),
    [(2, 2, 1e-4, 1.0e-9), (4, 2, 1e-3, 3.4e-6), (8, 2, 1e-2, 1.2e-2), (14, 2, 1e-3, 3.5e-5)],
)
def test_1024_nodes_in_groups_are_as_likely_lost_as_the_formula_says(
    k: int, m: int, p: float, expected: float
) -> None:
    n, groups = k + m, 1024 // (k + m)
    domains = {node: f"/{node}" for node in range(n * groups)}
    sizes = dict.fromkeys(domains, 64 * k)
    survival = survival_of(stripes(sizes, domains, m, n), sizes, domains)
    assert survival.exact
    group = sum(comb(n, j) * p**j * (1 - p) ** (n - j) for j in range(m + 1, n + 1))
    formula = -expm1(groups * log1p(-group))  # 1 - (1 - group) ** groups
    assert isclose(survival.loss_probability(p), formula, rel_tol=1e-6)
    assert isclose(survival.loss_probability(p), expected, rel_tol=0.1)


def test_copies() -> None:
    assert isclose(copies_lost(1024, 1e-3), 5.1e-4, rel_tol=0.01)
    assert isclose(copies_lost(1024, 1e-3, 2.0), 3.4e-7, rel_tol=0.01)
    assert isclose(copies_lost(1024, 1e-4, 0.0), 9.7e-2, rel_tol=0.01)
    quarter = copies_lost(1024, 1e-3, 0.25)  # three quarters of the nodes have none
    assert isclose(quarter, 1 - (1 - 1e-3) ** 768 * (1 - 1e-6) ** 128, rel_tol=1e-9)
    assert copies_lost(4, 1.0) == 1.0


def test_too_many_patterns_are_a_lower_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = [2] * 6 + [1] * 6  # the second workers group otherwise than the first
    domains = {10 * i + local: f"/{i}" for i, n in enumerate(workers) for local in range(n)}
    sizes = dict.fromkeys(domains, 640)
    made = stripes(sizes, domains, 1, 5)
    full = survival_of(made, sizes, domains)
    monkeypatch.setattr(module, "ENUMERATED_MAX", 20)
    cut = survival_of(made, sizes, domains)
    assert full.exact
    assert not cut.exact
    assert all(few <= all_ for few, all_ in zip(cut.patterns, full.patterns, strict=True))
    assert cut.patterns[:2] == (1, 12)
    assert cut.loss_probability(1e-3) >= full.loss_probability(1e-3)


def test_shares() -> None:
    assert Survival(4, (1, 4, 3, 0, 0), True, {}).share(2) == 0.5
