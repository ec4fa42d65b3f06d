"""One of many: what the rules make of good, bad and broken contributions."""

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from outlast.layout.run import Run, numel
from outlast.runtime.islands import rules
from outlast.runtime.islands.rules import grain_grams, total, trimmed_mean, weights

LINEAR = ("mean", "edit", "median")
NAN, INF = float("nan"), float("inf")


def gram_of(vectors: Sequence[Tensor], grain: int = 64) -> NDArray[np.float64]:
    return total(grain_grams(vectors, [Run.of(0, len(vectors[0]))], grain))


def random(count: int, size: int, seed: int = 0) -> list[Tensor]:
    return list(torch.randn(count, size, generator=torch.Generator().manual_seed(seed)))


def averaged(rule: str, vectors: Sequence[Tensor], guard: dict[str, Any] | None = None) -> Tensor:
    """What an island does with the weights; zeros where it goes back."""
    if rule == "trimmed":
        return trimmed_mean(torch.stack(list(vectors)), (len(vectors) - 1) // 2)
    found, _, _ = weights(rule, gram_of(vectors), range(len(vectors)), guard or {})
    rows = [float(w) * v for w, v in zip(found, vectors, strict=True) if w]
    return torch.stack(rows).sum(0) if rows else torch.zeros_like(vectors[0])


# ---- Gram matrices


@given(st.integers(1, 4), st.lists(st.integers(1, 700), min_size=1, max_size=3), st.data())
def test_grams_are_those_of_the_whole_however_it_is_cut(
    count: int, units: list[int], data: st.DataObject
) -> None:
    """Units behind one another, dealt to ranks at grains: together the bits of one rank alone."""
    grain, start = data.draw(st.sampled_from([64, 192])), 0
    whole = []
    for length in units:
        whole.append(Run.of(start, start + length))
        start += length
    vectors = [v * 10.0**i for i, v in enumerate(random(count, start))]
    expected = grain_grams(vectors, whole, grain)
    assert expected.shape == (sum(-(-length // grain) for length in units), count, count)
    ranks: list[list[Run]] = [[], [], []]
    for unit in whole:
        grains = range(unit.start, unit.stop, grain)
        cut = sorted(data.draw(st.sets(st.sampled_from(grains), max_size=3)) | {unit.start})
        for a, b in pairwise([*cut, unit.stop]):
            ranks[data.draw(st.integers(0, 2))].append(Run.of(a, b))
    parts = []
    for owned in ranks:
        mine = [torch.cat([v[r.start : r.stop] for r in owned] or [v[:0]]) for v in vectors]
        assert len(mine[0]) == numel(owned)
        parts.append(grain_grams(mine, owned, grain))
    together = np.concatenate(parts)
    assert sorted(map(bytes, together)) == sorted(map(bytes, expected))
    assert total(together).tobytes() == total(expected).tobytes()
    exact = np.stack([v.double().numpy() for v in vectors])
    np.testing.assert_allclose(total(expected), exact @ exact.T, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("grain", [64, 192])
def test_a_grain_is_summed_in_an_order_that_every_device_has(grain: int) -> None:
    """Halves are added to halves, number by number, however much is held at once."""
    a, b = (vector.tolist() for vector in random(2, grain))
    products = [x * y for x, y in zip(a, b, strict=True)]
    while len(products) > 1:
        half = len(products) // 2
        for i, product in enumerate(products[-half:]):
            products[i] += product
        del products[-half:]
    (gram,) = grain_grams([torch.tensor(a), torch.tensor(b)], [Run.of(grain, 2 * grain)], grain)
    assert gram[0, 1] == gram[1, 0] == products[0]


def test_bits_of_a_gram_do_not_depend_on_how_much_is_held_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vectors, runs = random(3, 5000), [Run.of(0, 4000), Run.of(8192, 9192)]
    whole = grain_grams(vectors, runs, 64)
    monkeypatch.setattr(rules, "_BLOCK", 1)
    assert grain_grams(vectors, runs, 64).tobytes() == whole.tobytes()


def test_a_sum_over_grains_is_exact() -> None:
    """Large numbers that cancel hide nothing, in whatever order they come."""
    grams = np.array([1e30, 1.0, -1e30, 3.0]).reshape(4, 1, 1)
    assert total(grams) == total(grams[::-1]) == 4.0
    assert np.isnan(total(np.array([INF, -INF, NAN]).reshape(3, 1, 1)))


# ---- all rules


@pytest.mark.parametrize("rule", LINEAR)
@given(st.integers(1, 6), st.integers(0, 99), st.randoms())
def test_weights_sum_to_one_and_go_with_their_islands(
    rule: str, count: int, seed: int, order: Any
) -> None:
    """To the last bit: a rule that reads the islands in another order decides the same."""
    gram = gram_of([(1 + i) * v for i, v in enumerate(random(count, 100, seed))])
    islands = list(range(10, 10 + count))
    found, guard, facts = weights(rule, gram, islands, {})
    assert found.sum() == pytest.approx(1, abs=1e-12)
    assert (found >= 0).all()
    assert "rolled_back" not in facts
    mixed = order.sample(range(count), count)
    again, same, _ = weights(rule, gram[np.ix_(mixed, mixed)], [islands[i] for i in mixed], {})
    assert again.tolist() == found[mixed].tolist()
    assert same == guard


@pytest.mark.parametrize("rule", LINEAR)
@pytest.mark.parametrize("broken", [NAN, INF, -INF])
def test_what_is_not_finite_does_not_count(rule: str, broken: float) -> None:
    vectors = random(4, 100)
    vectors[1][57] = broken
    found, guard, facts = weights(rule, gram_of(vectors), [0, 1, 2, 7], {})
    rest = [vectors[i] for i in (0, 2, 3)]
    alone, same, _ = weights(rule, gram_of(rest), [0, 2, 7], {})
    assert found.tolist() == [alone[0], 0, *alone[1:]]
    assert facts["broken"] == [1]
    assert guard == same  # and nothing is learned from it
    for vector in vectors:
        vector[0] = broken
    found, _, facts = weights(rule, gram_of(vectors), [0, 1, 2, 7], {})
    assert found.tolist() == [0, 0, 0, 0]
    assert facts == {"broken": [0, 1, 2, 7], "rolled_back": True}


@pytest.mark.parametrize("rule", ["edit", "median"])
def test_one_that_is_far_away_moves_nothing(rule: str) -> None:
    """Also by as many digits as a float32 has."""
    for size in (1e3, 1e12, 1e30):
        vectors = random(5, 100)
        clean = averaged(rule, vectors[1:])
        vectors[0] = size * vectors[0]
        assert (averaged(rule, vectors) - clean).norm() < 0.5 * clean.norm()


@pytest.mark.parametrize("rule", LINEAR)
def test_equal_and_empty_contributions(rule: str) -> None:
    same = [torch.ones(100)] * 3
    assert averaged(rule, same).tolist() == pytest.approx([1.0] * 100, abs=1e-6)
    nothing = [torch.zeros(100)] * 3
    assert weights(rule, gram_of(nothing), [0, 1, 2], {})[0].tolist() == [1 / 3] * 3
    assert weights(rule, gram_of(nothing[:1]), [5], {})[0].tolist() == [1.0]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("edit", ["0x1.25b0eaa412177p-2", "0x1.a24045086c07dp-2", "0x1.380ed05381e0cp-2"]),
        ("median", ["0x1.7a18ae18a5f86p-2", "0x1.5b4929d4ea4a3p-2", "0x1.2a9e28126fbd8p-2"]),
    ],
)
def test_the_bits_are_these_on_every_machine(rule: str, expected: list[str]) -> None:
    gram = np.array([[9.0, 1.0, 2.0], [1.0, 4.0, -1.0], [2.0, -1.0, 8.0]])
    found, _, _ = weights(rule, gram, [0, 1, 2], {})
    assert [float(weight).hex() for weight in found] == expected


# ---- trimmed mean


VALUES = st.one_of(
    st.floats(-100, 100, width=32).filter(lambda v: v == 0 or abs(v) > 1e-30),
    st.sampled_from([NAN, INF, -INF]),
)


@given(st.data(), st.integers(1, 7), st.integers(1, 4))
def test_trimmed_mean_is_that_of_sorted_columns(data: st.DataObject, count: int, size: int) -> None:
    f = data.draw(st.integers(0, (count - 1) // 2))
    column = st.lists(VALUES, min_size=size, max_size=size)
    rows = data.draw(st.lists(column, min_size=count, max_size=count))
    found = trimmed_mean(torch.tensor(rows), f).tolist()
    for at, value in enumerate(found):
        by_size = sorted((row[at] for row in rows), key=lambda v: (v != v, v))
        middle = by_size[f : count - f]
        mean = sum(middle) / len(middle)
        expected = mean if mean - mean == 0 else 0.0  # more are broken than may be: it stays
        assert value == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_trimmed_mean_has_to_leave_something() -> None:
    with pytest.raises(ValueError, match="4 of 4 values cannot be dropped"):
        trimmed_mean(torch.zeros(4, 2), 2)


# ---- geometric median


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([[0, 0], [4, 0], [0, 4], [4, 4]], [2, 2]),
        ([[0, 0], [2, 2], [10, 10]], [2, 2]),  # on a line: the middle one
        ([[0, 0], [1, 0.2], [-1, 0.2]], [0, 0]),  # a corner of more than 120 degrees
        ([[0, 1], [-3, 0], [3, 0], [0, -8], [0, 2]], [0, 1]),
        ([[7, 7], [7, 7], [7, 7], [0, 900], [-800, 3]], [7, 7]),
    ],
)
def test_geometric_median_of_points_that_are_known(
    points: list[list[float]], expected: list[float]
) -> None:
    vectors = [torch.tensor(point, dtype=torch.float32) for point in points]
    assert averaged("median", vectors).tolist() == pytest.approx(expected, abs=2e-2)


@given(st.integers(3, 9), st.integers(0, 999))
def test_no_point_nearby_has_a_smaller_sum_of_distances(count: int, seed: int) -> None:
    vectors = torch.stack([v * (1 + seed % 7) ** i for i, v in enumerate(random(count, 5, seed))])
    found = averaged("median", list(vectors))

    def cost(point: Tensor) -> float:
        return float((vectors.double() - point).norm(dim=1).sum())

    for step in random(20, 5, seed + 1):
        assert cost(found.double()) <= cost(found + 0.05 * step * found.norm()) * (1 + 1e-4)


def test_geometric_median_moves_with_its_points() -> None:
    vectors = random(7, 50)
    shift = torch.full((50,), 3.0)
    moved = averaged("median", [v + shift for v in vectors])
    torch.testing.assert_close(moved, averaged("median", vectors) + shift, atol=1e-4, rtol=1e-4)


def test_the_log_is_told_who_is_outlying() -> None:
    vectors = random(5, 100)
    vectors[3] = vectors[3] + 50
    _, _, facts = weights("median", gram_of(vectors), [0, 1, 2, 8, 9], {})
    assert facts == {"outlying": [8]}


# ---- EDiT


def rounds(norms: Sequence[Sequence[float]], guard: dict[str, Any] | None = None) -> list[Any]:
    """Facts of rounds of contributions at right angles; the guard goes through JSON between."""
    found, guard = [], guard if guard is not None else {}
    for row in norms:
        islands = range(len(row))
        _, after, facts = weights("edit", np.diag(np.square(row)), islands, guard)
        guard.clear()
        guard.update(json.loads(json.dumps(after)))
        found.append(facts)
    return found


def test_detector_on_a_known_trace() -> None:
    """Noise with one spike: the spike. A norm that grows by a percent a round: nothing."""
    noise = np.random.default_rng(4).normal(1, 0.1, 520)
    noise[500] = 3.0
    told = rounds([[norm, 1.0] for norm in noise])
    assert [i for i, facts in enumerate(told) if facts] == [500]
    assert told[500] == {"anomalous": [0]}
    drift = [[1.01**i * (1 + 0.01 * (-1) ** i), 1.0] for i in range(500)]
    assert not any(rounds(drift))


def test_noise_is_rarely_taken_for_a_spike() -> None:
    """Of normal numbers one in 740 is three deviations too large."""
    noise = np.random.default_rng(2).normal(1, 0.1, (500, 20))
    told = rounds(noise.tolist())
    assert sum(len(facts.get("anomalous", ())) for facts in told) < noise.size / 300


def test_a_spike_is_found_soon() -> None:
    noise = np.random.default_rng(3).normal(1, 0.1, 20).clip(0.8, 1.2)
    told = rounds([*([norm] for norm in noise), [1.5]])
    assert [bool(facts) for facts in told] == [False] * 20 + [True]


def test_small_norms_are_welcome() -> None:
    norms = [[1 + 0.1 * (-1) ** i] for i in range(100)]
    assert not any(rounds([*norms, [0.0], [1e-9], *norms]))


def test_one_spike_does_not_hide_the_next_and_a_new_level_becomes_usual() -> None:
    noise = np.random.default_rng(1).normal(1, 0.1, 200).clip(0.8, 1.2)
    spikes = rounds([*([norm] for norm in noise), [1e30], [1e30], [3.0], [1.0], [3.0]])
    assert [bool(facts) for facts in spikes[-5:]] == [True, True, True, False, True]
    level = [bool(facts) for facts in rounds([*([n] for n in noise), *([10 * n] for n in noise)])]
    assert all(level[200:210])
    assert not any(level[250:])


def test_all_are_anomalous_and_the_unit_goes_back() -> None:
    guard: dict[str, Any] = {}
    rounds([[1 + 0.1 * (-1) ** i, 2 + 0.1 * (-1) ** i] for i in range(50)], guard)
    found, _, facts = weights("edit", np.diag([100.0, 100.0]), [0, 1], guard)
    assert found.tolist() == [0.0, 0.0]
    assert facts == {"anomalous": [0, 1], "rolled_back": True}


@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=8), st.floats(1e-6, 1e6))
def test_smaller_norms_count_more_whatever_the_unit(norms: list[float], unit: float) -> None:
    found, _, _ = weights("edit", np.diag(np.square(norms)), range(len(norms)), {})
    ordered = found[np.argsort(norms)]
    assert (np.diff(ordered) <= 1e-12).all()
    scaled, _, _ = weights("edit", np.diag(np.square(norms) * unit**2), range(len(norms)), {})
    np.testing.assert_allclose(scaled, found, atol=1e-9)


def test_softmax_does_not_saturate_on_large_units() -> None:
    """exp(-1000) and exp(-1010) would leave one island alone."""
    found, _, _ = weights("edit", np.diag(np.square([1000.0, 1010.0])), [0, 1], {})
    assert found.min() > 0.49


def test_of_two_nobody_sets_the_scale_alone() -> None:
    found, _, _ = weights("edit", np.diag(np.square([100.0, 1.0])), [0, 1], {})
    assert found[0] < 1e-9
    found, _, _ = weights("edit", np.diag(np.square([0.0, 50.0])), [0, 1], {})
    assert found[1] > 0.2  # one that stood still does not silence the other


def test_a_newcomer_on_its_own_is_clipped() -> None:
    guard: dict[str, Any] = {}
    rounds([[1 + 0.1 * (-1) ** i] for i in range(50)], guard)
    found, after, facts = weights("edit", np.array([[1e6]]), [3], guard)
    usual = guard["mean"][1]
    assert found[0] * 1e3 == pytest.approx(10 * usual)
    assert facts["clipped"] == found[0]
    assert after["mean"][1] < 1.2 * usual  # nor is what was cut off learned
    assert weights("edit", np.array([[1e6]]), [3], {})[0].tolist() == [1.0]  # nothing is known yet


def test_a_guard_outlives_islands_that_come_and_go() -> None:
    guard: dict[str, Any] = {}
    rounds([[1 + 0.1 * (-1) ** i, 2 + 0.1 * (-1) ** i] for i in range(50)], guard)
    _, after, _ = weights("edit", np.array([[1.0]]), [0], guard)
    assert after["1"] == guard["1"]
    found, _, facts = weights("edit", np.diag([1.0, 25.0, 1.0]), [0, 1, 2], after)
    assert facts == {"anomalous": [1]}
    assert found[2] > 0


@pytest.mark.parametrize(
    "entry",
    [None, 1, [], [1, 2.0], [1, NAN, 1, 0, 0], [99, 1.0, -1.0, 0, 0], [99, "1", 1.0, 0, 0],
     [-5, 1.0, 1.0, 0, 0], [1.5, 1.0, 1.0, 0, 0], [10**400, 1.0, 1.0, 0, 0], [99, INF, 1.0, 0, 0],
     {"a": 1}, [True, 1.0, 1.0, 0, 0]],
)  # fmt: skip
def test_a_guard_that_cannot_be_is_as_good_as_none(entry: Any) -> None:
    gram = np.diag([1.0, 4.0])
    expected = weights("edit", gram, [0, 1], {})
    found = weights("edit", gram, [0, 1], {"0": entry, "mean": entry})
    assert found[0].tolist() == expected[0].tolist()
    assert found[1:] == expected[1:]


# ---- training under attack: section 17's acceptance, 15 islands of which 3 lie

ISLANDS, LIARS, FEATURES = 15, 3, 20
Attack = Callable[[Tensor, torch.Generator], Tensor]  # honest [n, size] -> what each liar sends


def _alie(honest: Tensor, generator: torch.Generator) -> Tensor:
    """A little is enough (Baruch et al. 2019): at the edge of what is still usual."""
    return honest.mean(0) - 1.5 * honest.std(0)


ATTACKS: dict[str, Attack] = {
    "none": lambda honest, generator: honest[0],
    "random": lambda honest, generator: 100 * torch.randn(honest[0].shape, generator=generator),
    "flip": lambda honest, generator: -10 * honest.mean(0),
    "drop": lambda honest, generator: torch.zeros_like(honest[0]),
    "little": _alie,
    "inner": lambda honest, generator: -0.5 * honest.mean(0),
    "broken": lambda honest, generator: torch.full_like(honest[0], NAN),
}


def accuracy(rule: str, attack: str) -> float:
    """Of a logistic regression that 15 islands train, 3 of which send something else."""
    generator = torch.Generator().manual_seed(5)
    truth = torch.randn(FEATURES, generator=generator)

    def samples(count: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, FEATURES, generator=generator)
        noise = 0.5 * torch.randn(count, generator=generator)
        return x, ((x @ truth + noise) > 0).float()

    shards = [samples(200) for _ in range(ISLANDS)]
    x, y = samples(4000)
    outer, momentum, guard = torch.zeros(FEATURES), torch.zeros(FEATURES), {}
    for _ in range(12):
        deltas = []
        for data, labels in shards:
            local = outer.clone()
            for _ in range(5):
                local -= 0.5 * data.T @ ((data @ local).sigmoid() - labels) / len(labels)
            deltas.append(outer - local)
        lie = ATTACKS[attack](torch.stack(deltas[LIARS:]), generator)
        if attack != "none":
            deltas[:LIARS] = [lie] * LIARS
        if rule == "trimmed":
            mean = averaged(rule, deltas)
        else:
            found, guard, _ = weights(rule, gram_of(deltas), range(ISLANDS), guard)
            mean = sum(float(w) * d for w, d in zip(found, deltas, strict=True) if w)
        momentum = 0.5 * momentum + mean
        outer = outer - 0.5 * (mean + 0.5 * momentum)
    return float((((x @ outer) > 0).float() == y).float().mean())


@pytest.mark.parametrize("attack", sorted(ATTACKS))
def test_robust_rules_learn_all_the_same(attack: str) -> None:
    clean = accuracy("mean", "none")
    assert clean > 0.9
    for rule in ("trimmed", "median"):
        assert accuracy(rule, attack) > clean - 0.02, rule


@pytest.mark.parametrize("attack", ["random", "flip"])
def test_a_mean_does_not(attack: str) -> None:
    assert accuracy("mean", attack) < accuracy("mean", "none") - 0.05


@pytest.mark.parametrize("attack", ["none", "random", "flip", "drop", "broken"])
def test_the_guard_copes_with_what_is_too_long(attack: str) -> None:
    assert accuracy("edit", attack) > accuracy("mean", "none") - 0.02
