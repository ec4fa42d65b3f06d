"""Codes of pseudogradients against dumb oracles; whatever decode takes, encode gives back."""

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from math import copysign
from statistics import fmean

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from outlast.cluster.errors import Misuse
from outlast.runtime.islands import codec as module
from outlast.runtime.islands.codec import TINY, codec
from outlast.runtime.islands.settings import CODECS

GRAINS = (64, 96, 256, 4096)
LARGEST = float(torch.finfo(torch.float32).max)
# Where rounding turns: powers of two, midpoints and their neighbours; what has no normal number.
TURNS = [2.0**exponent * (1 + half / 2) for exponent in range(-9, 3) for half in range(2)]
TURNS += [float(np.nextafter(np.float32(turn), np.float32(to))) for turn in TURNS for to in (0, 9)]
EDGES = [0.0, -0.0, TINY, TINY / 2, 2.0**-149, 2.0**-119, 2.0**-126, LARGEST, 1.5 * 2.0**127]
ELEMENTS = st.one_of(
    st.sampled_from(TURNS),
    st.sampled_from(TURNS).map(lambda value: -value),
    st.floats(-4, 4, width=32),
    st.sampled_from(EDGES),
    st.floats(allow_nan=False, allow_infinity=False, width=32),
)


def tensor(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


@st.composite
def runs(draw: st.DrawFn) -> torch.Tensor:
    """A few drawn elements somewhere in a run of noise, of zeros, of one or nearly one value."""
    count = draw(st.sampled_from((1, 2, 63, 64, 65, 255, 300, 4096, 5001)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    noise = torch.randn(count, generator=generator)
    few = draw(st.lists(ELEMENTS, min_size=1, max_size=12))
    backgrounds = noise, torch.zeros(count), torch.full((count,), few[0]), 1 + 1e-6 * noise
    run = draw(st.sampled_from(backgrounds))
    start = draw(st.integers(0, count - 1))
    run[start : start + len(few)] = tensor(few)[: count - start]
    return run


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the bits are the same."""
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


@pytest.mark.parametrize("name", CODECS)
@given(run=runs(), grain=st.sampled_from(GRAINS))
def test_decoded_values_have_the_codes_they_came_from(
    name: str, run: torch.Tensor, grain: int
) -> None:
    tested = codec(name, grain)
    codes = tested.encode(run)
    assert len(codes) == tested.size(len(run))
    decoded = tested.decode(codes, len(run))
    assert decoded.shape == run.shape
    assert decoded.dtype == torch.float32
    assert tested.encode(decoded) == codes
    assert name != "none" or same(decoded, run)


@pytest.mark.parametrize("name", CODECS)
@given(run=runs(), grain=st.sampled_from(GRAINS), data=st.data())
def test_pieces_have_the_codes_of_the_whole(
    name: str, run: torch.Tensor, grain: int, data: st.DataObject
) -> None:
    tested = codec(name, grain)
    edges = data.draw(st.lists(st.integers(0, len(run) // grain), max_size=3, unique=True))
    cuts = [0, *(grain * edge for edge in sorted(edges)), len(run)]
    codes = tested.encode(run)
    decoded = tested.decode(codes, len(run))
    for start, stop in pairwise(cuts):
        piece = codes[tested.size(start) : tested.size(stop)]
        assert tested.encode(run[start:stop]) == piece
        assert same(tested.decode(memoryview(piece), stop - start), decoded[start:stop])


@pytest.mark.parametrize("name", CODECS)
@given(data=st.data())
def test_what_is_decoded_has_one_code_and_the_rest_is_refused(
    name: str, data: st.DataObject
) -> None:
    run, tested = data.draw(runs()), codec(name, 64)
    codes = bytearray(tested.encode(run))
    for _ in range(data.draw(st.integers(1, 3))):
        codes[data.draw(st.integers(0, min(len(codes), 40) - 1))] = data.draw(st.integers(0, 255))
    try:
        decoded = tested.decode(codes, len(run))
    except ValueError:
        return
    assert decoded.isfinite().all()
    assert tested.encode(decoded) == codes


@pytest.mark.parametrize("name", CODECS)
@given(codes=st.binary(max_size=24), count=st.integers(0, 40))
def test_any_bytes_are_refused_or_mean_something(name: str, codes: bytes, count: int) -> None:
    tested = codec(name, 8)
    codes = (codes * tested.size(count))[: tested.size(count)]
    if len(codes) == tested.size(count):
        try:
            assert tested.encode(tested.decode(codes, count)) == codes
        except ValueError:
            return


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(name: str, wrong: float) -> None:
    for count, place in ((300, 7), (300, 299), (1, 0)):
        run = torch.ones(count)
        run[place] = wrong
        with pytest.raises(ValueError, match="not finite"):
            codec(name, 256).encode(run)


@pytest.mark.parametrize("name", CODECS)
def test_codes_of_another_length_are_refused(name: str) -> None:
    tested = codec(name, 64)
    codes = tested.encode(torch.ones(100))
    assert tested.encode(torch.ones(0)) == b""
    assert tested.decode(b"", 0).numel() == 0
    for other in (codes[:-1], codes + b"\0", b""):
        with pytest.raises(ValueError, match="of 100 elements"):
            tested.decode(other, 100)


@pytest.mark.parametrize("name", CODECS)
def test_many_parts_have_the_codes_of_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    tested = codec(name, 256)
    codes = tested.encode(run)
    decoded = tested.decode(codes, len(run))
    monkeypatch.setattr(module, "_CACHED", 1000)
    assert tested.encode(run) == codes
    assert same(tested.decode(codes, len(run)), decoded)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", CODECS)
def test_a_gpu_makes_the_same_codes(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-40, 38, (70_000,), generator=generator)
    run = torch.randn(70_000, generator=generator) * 10.0**exponents
    run[30_000:40_000] = tensor(TURNS * 10_000)[:10_000]
    for grain in GRAINS:
        tested = codec(name, grain)
        assert tested.encode(run.cuda()) == tested.encode(run)


def test_a_codec_that_cannot_be_is_named() -> None:
    with pytest.raises(Misuse, match=r"e4m3.*topk"):
        codec("e4m3", 64)
    with pytest.raises(Misuse, match="even"):
        codec("e3m0", 63)


# E3M0


def e3m0_oracle(block: Sequence[float]) -> list[float]:
    """Nearest of the fifteen values, the larger of two that are equally near, element by element;
    the scale is the nearest of the powers that float32 leaves room for."""
    powers = [Fraction(2) ** exponent for exponent in range(-119, 128)]
    peak = max(abs(Fraction(value)) for value in block)
    scale = min(powers, key=lambda power: (abs(power - peak), -power))
    magnitudes = [Fraction(0), *(scale / 2**step for step in range(7))]
    found = []
    for value in block:
        size = abs(Fraction(value))
        near = float(min(magnitudes, key=lambda one: (abs(one - size), -one)))
        found.append(-near if value < 0 and near else near)
    return found


def check_e3m0(block: Sequence[float]) -> None:
    tested, values = codec("e3m0", 256), tensor(block)
    decoded = tested.decode(tested.encode(values), len(block))
    assert same(decoded, tensor(e3m0_oracle(values.tolist())))


@given(block=st.lists(ELEMENTS, min_size=1, max_size=40))
def test_e3m0_takes_the_nearest_value(block: list[float]) -> None:
    check_e3m0(block)


def test_e3m0_turns_where_the_oracle_does() -> None:
    for peak in TURNS[12:24]:
        check_e3m0([peak, *(turn for turn in TURNS if turn < peak)])


def test_e3m0_has_sixteen_codes_of_which_minus_zero_is_refused() -> None:
    tested = codec("e3m0", 64)
    scale = 127 + 3  # with the bias of float32: 2^3
    values = {}
    for code in range(16):
        codes = bytes([scale, 7 | code << 4])
        if code == 8:
            with pytest.raises(ValueError, match="no encoder"):
                tested.decode(codes, 2)
        else:
            peak, values[code] = tested.decode(codes, 2).tolist()
            assert peak == 8
    powers = [2.0**exponent for exponent in range(-3, 4)]
    assert [values[code] for code in range(8)] == [0.0, *powers]
    assert [values[code] for code in range(9, 16)] == [-power for power in powers]


@pytest.mark.parametrize(
    ("codes", "count"),
    [
        (bytes([130, 0x66]), 2),  # the largest of a block is not the scale: half of it would do
        (bytes([130, 0x00]), 2),  # zeros with another scale than the smallest
        (bytes([7, 0x77]), 2),  # half of the smallest value is no normal number
        (bytes([255, 0x77]), 2),  # infinite
        (bytes([130, 0x17]), 1),  # something in the half byte that is nobody's
    ],
)
def test_e3m0_refuses_what_means_the_same_or_nothing(codes: bytes, count: int) -> None:
    with pytest.raises(ValueError, match="codes"):
        codec("e3m0", 64).decode(codes, count)


@given(
    block=st.lists(st.floats(2.0**-6, 1.5, width=32, exclude_max=True), min_size=2, max_size=256)
)
def test_e3m0_is_symmetric_monotone_and_within_a_third(block: list[float]) -> None:
    tested, values = codec("e3m0", 256), tensor([*block[1:], 1.0]).sort().values
    decoded = tested.decode(tested.encode(values), len(values))
    assert (decoded.diff() >= 0).all()
    assert ((decoded - values).abs() <= values / 3 * (1 + 1e-6)).all()
    assert same(tested.decode(tested.encode(-values), len(values)), -decoded)


@given(block=st.lists(ELEMENTS, min_size=2, max_size=64))
def test_e3m0_is_symmetric_everywhere(block: list[float]) -> None:
    tested, values = codec("e3m0", 64), tensor(block)
    there, back = tested.encode(values), tested.encode(-values)
    assert torch.equal(tested.decode(there, len(block)), -tested.decode(back, len(block)))


def test_sums_of_decoded_values_are_exact_in_float32() -> None:
    tested, generator = codec("e3m0", 256), torch.Generator().manual_seed(3)
    islands = [torch.randn(4096, generator=generator) for _ in range(8)]
    decoded = [tested.decode(tested.encode(values), 4096) for values in islands]
    total = torch.stack(decoded).sum(0)
    assert torch.equal(total.double(), torch.stack(decoded).double().sum(0))


# int8


@given(block=st.lists(ELEMENTS, min_size=1, max_size=64))
def test_int8_is_within_half_a_unit_and_the_largest_within_one(block: list[float]) -> None:
    tested, values = codec("int8", 64), tensor(block)
    codes = tested.encode(values)
    decoded = tested.decode(codes, len(block)).double()
    values = values.double()
    unit = float(np.frombuffer(b"\0\0" + codes[:2], "<f4")[0])
    peak = float(values.abs().max())
    assert TINY <= unit <= max(peak / 127, TINY) * (1 + 1e-6)
    assert unit > peak / 127 / (1 + 2**-7) * (1 - 1e-6)
    inside = values.abs() <= 127 * unit
    assert ((decoded - values)[inside].abs() <= unit / 2 * (1 + 1e-6)).all()
    assert (decoded[~inside].abs() == 127 * unit).all()
    assert ((decoded - values).abs() <= unit).all()


# topk


def topk_oracle(chunk: torch.Tensor) -> dict[int, float]:
    """Index -> about what is sent of it: of the largest magnitudes, of equal ones the first."""
    size = dict(enumerate(chunk.abs().tolist()))
    largest = sorted(size, key=lambda index: (-size[index], index))[: -(-len(chunk) // 64)]
    chosen = [index for index in largest if size[index] >= TINY]
    if not chosen:
        return {}
    middle = (size[chosen[0]] + size[chosen[-1]]) / 2
    upper = [index for index in chosen if size[index] >= middle]
    lower = [index for index in chosen if size[index] < middle]
    means = {index: fmean(size[one] for one in part) for part in (upper, lower) for index in part}
    return {index: copysign(mean, chunk[index]) for index, mean in means.items()}


@given(run=runs())
def test_topk_sends_the_largest_and_the_rest_is_exact(run: torch.Tensor) -> None:
    tested = codec("topk", 4096)
    sent = tested.decode(tested.encode(run), len(run))
    assert torch.equal(sent + (run - sent), run)
    for chunk, part in zip(run.split(4096), sent.split(4096), strict=True):
        expected = topk_oracle(chunk)
        found = part.nonzero().flatten().tolist()
        assert len(part[found].abs().unique()) <= 2
        assert {index: pytest.approx(part[index].item(), rel=0.01) for index in found} == {
            index: expected[index] for index in found
        }
        for index in set(expected) - set(found):  # nearer to zero than to what would be sent
            assert abs(chunk[index]) <= abs(expected[index]) / 2


def test_topk_of_noise_sends_every_slot_with_a_small_error() -> None:
    tested, generator = codec("topk", 4096), torch.Generator().manual_seed(5)
    run = torch.randn(1 << 16, generator=generator)
    sent = tested.decode(tested.encode(run), len(run))
    there = sent != 0
    assert (there.view(-1, 4096).sum(1) == 64).all()
    assert (run - sent)[there].norm() < 0.1 * run[there].norm()


def test_topk_takes_896_bits_and_two_scales_for_a_chunk() -> None:
    assert 8 * codec("topk", 1 << 20).size(4096) == 64 * (12 + 2) + 2 * 16
    assert codec("topk", 256).size(4096) == 16 * codec("topk", 256).size(256)


def test_topk_with_feedback_delivers_everything() -> None:
    """A constant pseudogradient: after n rounds all but what the residual holds has arrived."""
    tested, generator = codec("topk", 4096), torch.Generator().manual_seed(7)
    gradient = torch.randn(4096, generator=generator)
    residual, arrived = torch.zeros(4096), torch.zeros(4096)
    for _ in range(400):
        wanted = residual + gradient
        sent = tested.decode(tested.encode(wanted), 4096)
        residual, arrived = wanted - sent, arrived + sent
    assert (arrived / 400 - gradient).norm() < 0.2 * gradient.norm()


def topk_codes(
    fields: Sequence[tuple[int, int]], high: float = 1.0, low: float = 0.0, slots: int = 2
) -> bytes:
    """Codes of one chunk from (index, two bits of sign and magnitude)."""
    heads: NDArray[np.uint32] = np.array([high, low], np.float32).view(np.uint32) >> 16
    bits = "".join(f"{index:012b}{value:02b}" for index, value in fields).ljust(14 * slots, "0")
    body = int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2)
    return heads.astype("<u2").tobytes() + body.to_bytes(-(-14 * slots // 8), "big")


def test_topk_means_what_it_says() -> None:
    values = codec("topk", 128).decode(topk_codes([(3, 0b01), (127, 0b10)], 1.0, 0.25), 128)
    assert values.nonzero().flatten().tolist() == [3, 127]
    assert values[[3, 127]].tolist() == [1.0, -0.25]


@pytest.mark.parametrize(
    "codes",
    [
        topk_codes([(3, 0b01), (128, 0b01)]),  # outside of the chunk
        topk_codes([(3, 0b01), (4095, 0b01)]),
        topk_codes([(3, 0b01), (3, 0b01)]),  # one element twice
        topk_codes([(9, 0b01), (3, 0b01)]),  # not in order
        topk_codes([(0, 0b00), (3, 0b01)]),  # the smaller magnitude is zero
        topk_codes([(3, 0b01), (5, 0b00)], 1.0, 1.0),  # one magnitude under two names
        topk_codes([(3, 0b01), (5, 0b00)], 0.25, 1.0),  # the upper is the smaller
        topk_codes([(3, 0b00)], 1.0, 0.5),  # nothing has the upper one
        topk_codes([(3, 0b01)], -1.0),
        topk_codes([(3, 0b01)], float("inf")),
        topk_codes([(3, 0b01)], float("nan")),
        topk_codes([(3, 0b01)], 0.0, 1.0),
        topk_codes([(3, 0b01)], 2.0**-130),  # no normal number
    ],
)
def test_topk_refuses_what_means_the_same_or_nothing(codes: bytes) -> None:
    with pytest.raises(ValueError, match="codes"):
        codec("topk", 128).decode(codes, 128)
