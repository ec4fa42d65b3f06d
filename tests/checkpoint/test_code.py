"""Any m units may go; all ways to compute it, and the rows as the standard defines them, agree."""

import doctest
import random
from itertools import chain, combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outlast.checkpoint import code as code_module
from outlast.checkpoint import doubling, field, isal
from outlast.checkpoint.code import Code
from outlast.checkpoint.isal import Backend, portable
from outlast.cluster.errors import Misuse, StateLost
from outlast.runtime.device_code import DeviceCode

Units = list[np.ndarray]
EXAMPLES = settings(max_examples=150, deadline=None)
BACKENDS = list(isal._candidates())


@st.composite
def stripes(draw: st.DrawFn) -> tuple[int, Units, int]:
    """(m, data units of uneven length at any address, length of the parity units)."""
    sizes = draw(st.lists(st.integers(0, 200), min_size=1, max_size=10))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    first = draw(st.integers(0, 1))
    edges = np.cumsum([first, *sizes])
    whole = rng.integers(0, 256, edges[-1], np.uint8)
    data = [whole[a:b] for a, b in pairwise(edges)]
    return draw(st.integers(1, 5)), data, max(sizes) + draw(st.integers(0, 9))


def by_definition(m: int, data: Units, length: int) -> Units:
    """Parity by the formula of the module, one byte at a time."""
    k = len(data)
    coefficients = [[field.power(field.power(2, i), j) for j in range(k)] for i in range(m)]
    if m > 4 or (m == 4 and k > 21):
        coefficients = [[field.inverse(i ^ j) for j in range(k)] for i in range(k, k + m)]
    parity = [np.zeros(length, np.uint8) for _ in range(m)]
    for unit, row in zip(parity, coefficients, strict=True):
        for factor, source in zip(row, data, strict=True):
            products = [field.multiply(factor, int(value)) for value in source[:length]]
            unit[: len(products)] ^= np.array(products, np.uint8)
    return parity


def encoded(m: int, data: Units, length: int) -> Units:
    parity = [np.full(length, 0xEE, np.uint8) for _ in range(m)]
    Code(len(data), m).encode(data, parity)
    return parity


def losses(k: int, m: int) -> list[tuple[int, ...]]:
    """Every pattern of at most m lost units, at least one of them data; 0 .. k + m - 1."""
    patterns = chain.from_iterable(combinations(range(k + m), size) for size in range(1, m + 1))
    return [lost for lost in patterns if lost[0] < k]


def check_loss(data: Units, parity: Units, lost: tuple[int, ...]) -> None:
    """The data units of `lost` come back from the others, padded with zeros."""
    k, m = len(data), len(parity)
    again = {index: np.full(parity[0].size, 0xEE, np.uint8) for index in lost if index < k}
    left = {index: unit for index, unit in enumerate(data) if index not in lost}
    rows = {row: unit for row, unit in enumerate(parity) if k + row not in lost}
    Code(k, m).decode(left, rows, again)
    for index, unit in again.items():
        assert np.array_equal(unit[: data[index].size], data[index]), f"unit {index} differs"
        assert not unit[data[index].size :].any(), f"the padding of unit {index} is not zero"


@pytest.fixture(params=BACKENDS, ids=lambda candidate: candidate.name)
def codec(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """Each backend that this machine has, used by `Code`."""
    monkeypatch.setattr(code_module, "backend", lambda: request.param)
    return request.param


@EXAMPLES
@given(stripes())
def test_parity_is_what_the_standard_says(case: tuple[int, Units, int]) -> None:
    m, data, length = case
    for made, expected in zip(encoded(*case), by_definition(m, data, length), strict=True):
        assert np.array_equal(made, expected)


@EXAMPLES
@given(stripes(), st.data())
def test_any_m_lost_units_come_back(case: tuple[int, Units, int], draw: st.DataObject) -> None:
    m, data, _ = case
    check_loss(data, encoded(*case), draw.draw(st.sampled_from(losses(len(data), m))))


@pytest.mark.parametrize(("k", "m"), [(1, 1), (3, 1), (2, 2), (8, 2), (8, 3), (6, 4), (3, 6)])
def test_every_pattern_of_loss(codec: Backend, k: int, m: int) -> None:
    rng = np.random.default_rng(k)
    data = [rng.integers(0, 256, 130 + 7 * (j % 3), np.uint8) for j in range(k)]
    parity = encoded(m, data, 150)
    for lost in losses(k, m):
        check_loss(data, parity, lost)


def square_submatrices(k: int, m: int) -> int:
    """How many square submatrices of the parity rows have no inverse; 0 for a good code."""
    bad = 0
    for lost in range(1, m + 1):
        for rows in combinations(range(m), lost):
            for gone in combinations(range(k), lost):
                try:
                    field.decoding_rows(k, m, frozenset(gone), rows)
                except ZeroDivisionError:
                    bad += 1
    return bad


@pytest.mark.parametrize(("k", "m"), [(60, 2), (16, 3), (10, 4), (6, 5), (4, 6)])
def test_every_choice_of_rows_can_be_solved(k: int, m: int) -> None:
    assert square_submatrices(k, m) == 0


@pytest.mark.long
@pytest.mark.parametrize(("k", "m"), [(150, 2), (40, 3), (21, 4), (22, 4), (12, 5)])
def test_every_choice_of_rows_of_wide_stripes_can_be_solved(k: int, m: int) -> None:
    assert square_submatrices(k, m) == 0


def test_planted_matrix_without_the_property_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    gone, rows = frozenset({0, 1, 25}), (0, 1, 3)  # 2^0 + 2^1 = 2^25
    field.decoding_rows(26, 4, gone, rows)
    powers = tuple(tuple(field.power(2, i * j) for j in range(26)) for i in range(4))
    monkeypatch.setattr(field, "parity_rows", lambda k, m: powers)
    field.decoding_rows.cache_clear()
    with pytest.raises(ZeroDivisionError):
        field.decoding_rows(26, 4, gone, rows)
    field.decoding_rows.cache_clear()


@pytest.mark.parametrize("size", [1, 63, 4097, (256 << 10) + 5])
def test_all_backends_give_the_same_bytes(size: int) -> None:
    rng = np.random.default_rng(size)
    data = [rng.integers(0, 256, size, np.uint8) for _ in range(9)]
    rows = tuple(tuple(rng.integers(0, 256, 9).tolist()) for _ in range(5))
    found = []
    for candidate in BACKENDS:
        outputs = [np.full(size, 0xEE, np.uint8) for _ in rows]
        candidate.combine(rows, data, outputs)
        found.append(np.stack(outputs))
    assert all(np.array_equal(one, found[0]) for one in found)


def test_a_call_of_isal_is_cut_where_its_counter_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    if not BACKENDS[0].name.startswith("ISA-L"):
        pytest.skip("not run: no ISA-L here")
    data = [np.arange(n, n + 200, dtype=np.uint8) for n in (0, 50)]
    whole = encoded(2, data, 200)
    monkeypatch.setattr(isal, "_CALL_MAX", 64)
    assert all(np.array_equal(a, b) for a, b in zip(whole, encoded(2, data, 200), strict=True))


@EXAMPLES
@given(stripes())
def test_tensors_give_the_same_bytes(case: tuple[int, Units, int]) -> None:
    m, data, length = case
    parity = encoded(*case)
    tensors = [torch.from_numpy(unit) for unit in data]
    made = [torch.full((length,), 0xEE, dtype=torch.uint8) for _ in parity]
    code = DeviceCode(len(data), m)
    code.encode(tensors, made)
    assert all(np.array_equal(a.numpy(), b) for a, b in zip(made, parity, strict=True))
    lost = random.Random(length).sample(range(len(data)), min(m, len(data)))
    again = {index: torch.empty(length, dtype=torch.uint8) for index in lost}
    left = {index: unit for index, unit in enumerate(tensors) if index not in lost}
    code.decode(left, dict(enumerate(made)), again)
    assert all(torch.equal(again[i][: data[i].size], tensors[i][:length]) for i in lost)


def test_no_backend_with_wrong_bytes_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(rows: field.Rows, inputs: Units, outputs: Units) -> None:
        portable().combine(rows, inputs, outputs)
        outputs[-1][-1] ^= 1

    assert not isal.gives_known_answer(wrong)
    assert all(isal.gives_known_answer(candidate.combine) for candidate in BACKENDS)
    monkeypatch.setattr(isal, "_candidates", lambda: iter([Backend("bad", wrong), portable()]))
    isal.backend.cache_clear()
    assert isal.backend().name == "numpy"
    monkeypatch.setattr(isal, "_candidates", lambda: iter([Backend("bad", wrong)]))
    isal.backend.cache_clear()
    with pytest.raises(Misuse, match="no erasure codec"):
        isal.backend()
    isal.backend.cache_clear()


def test_without_any_library_numpy_remains(monkeypatch: pytest.MonkeyPatch) -> None:
    libraries = [("gone", "/nowhere/libisal.so.2"), ("another", "libc.so.6")]
    monkeypatch.setattr(isal, "_libraries", lambda: iter(libraries))
    assert [candidate.name for candidate in isal._candidates()] == ["numpy"]


def test_planted_wrong_parity_is_noticed() -> None:
    data = [np.arange(90, dtype=np.uint8), np.arange(50, dtype=np.uint8)]
    parity = encoded(2, data, 90)
    parity[1][70] ^= 1
    check_loss(data, parity, (0,))  # rebuilt from row 0 alone
    with pytest.raises(AssertionError, match="unit 0"):
        check_loss(data, parity, (0, 2))
    parity[1][70] ^= 1
    with pytest.raises(AssertionError, match="differs"):
        check_loss([data[0], data[1][::-1].copy()], parity, (0, 1))


def test_more_losses_than_parity_are_refused() -> None:
    some, out = np.zeros(4, np.uint8), np.empty(4, np.uint8)
    with pytest.raises(StateLost, match="1 data and 1 parity"):
        Code(3, 1).decode({0: some}, {0: some}, {2: out})
    with pytest.raises(StateLost):
        Code(3, 2).decode({0: some}, {1: some}, {2: out, 1: out})
    with pytest.raises(StateLost):
        Code(2, 1).decode({0: some}, {}, {1: out})
    with pytest.raises(AssertionError, match="shorter than its stripe"):
        Code(2, 1).decode({0: some}, {0: some[:3]}, {1: out})
    for k, m in [(0, 1), (3, 0), (250, 6)]:
        with pytest.raises(Misuse, match="no code of"):
            Code(k, m)


@pytest.mark.parametrize("module", [field, doubling, code_module], ids=lambda m: m.__name__)
def test_examples(module: object) -> None:
    failed, tried = doctest.testmod(module)
    assert tried
    assert not failed
