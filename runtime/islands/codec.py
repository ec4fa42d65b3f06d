"""Codecs of pseudogradients: what islands send of a run of float32 elements, in few bits.

A run is coded block by block, a row of bytes for each: first the scale, then the elements. A block
never crosses a grain, so the codes of elements [a, b) of a run, cut at grains, are its bytes
[size(a), size(b)), whoever owns what. Everything is computed per element or per block in a fixed
order, and no two codes mean the same: decode accepts exactly what encode can make, so

    encode(decode(codes)) == codes            for all codes that are accepted,

and a sender that lost a worker sends the same bytes again from the decoded state.

"e3m0", 4.03 bit: sign and three bits of exponent, no mantissa (Streaming DiLoCo): 0 or the
    nearest of +-scale * 2^0 .. 2^-6; scale is the power of two nearest to the largest of 256.
"int8", 8.06 bit: -127 .. 127 times a bfloat16 unit for each 256.
"topk", 0.227 bit: of each 4096 the 64 of largest magnitude, as SparseLoCo: 12 bits say where, two
    sign and one of two magnitudes (two bfloat16 for each 4096). What was not sent, exact in
    float32, stays with the sender, who adds it the next time.
"none", 32 bit: float32.

>>> e3m0 = codec("e3m0", 64)
>>> e3m0.decode(e3m0.encode(torch.tensor([1.0, 1.4, 1.5, -0.3, 0.016, 0.0])), 6).tolist()
[1.0, 1.0, 2.0, -0.25, 0.03125, 0.0]
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from math import gcd, isfinite
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from outlast.cluster.errors import Misuse

Rows = NDArray[np.uint8]

BLOCK = 256  # elements with one scale, at most
CHUNK = 4096  # elements of which topk sends one in SPARSITY
SPARSITY = 64
TINY = torch.finfo(torch.float32).tiny  # what is smaller than any normal number counts as zero
_CACHED = 1 << 16  # elements that are coded at once: their intermediate values stay in the cache
_BFLOAT16 = -1 << 16  # the bits of a float32 that a bfloat16 has, too


class Codec(ABC):
    """Codes of runs that begin at a grain, in blocks of `block` elements; the last may be shorter.

    Codes are made on the device of the values.
    """

    name: ClassVar[str]

    def __init__(self, block: int) -> None:
        self.block = block

    def size(self, count: int) -> int:
        """Bytes of `count` encoded elements."""
        blocks, rest = divmod(count, self.block)
        return blocks * self._width(self.block) + (self._width(rest) if rest else 0)

    def encode(self, values: Tensor) -> bytes:
        """Codes of a run, float32 [n].

        Raises:
            ValueError: there is an infinity or a NaN, which nobody should average.
        """
        at_once = _CACHED if values.is_cpu else values.numel()
        parts = self._parts(values.numel(), at_once)
        return b"".join(
            self._rows(values[part].view(-1, length)).tobytes() for part, length in parts
        )

    def decode(self, codes: bytes | memoryview, count: int) -> Tensor:
        """The `count` values, float32 [count] in memory, that `codes` stand for.

        Raises:
            ValueError: no encoder makes such codes.
        """
        if len(codes) != self.size(count):
            raise ValueError(
                f"{len(codes)} bytes are not the {self.name} codes of {count} elements, "
                f"which take {self.size(count)}"
            )
        values, data = torch.empty(count), np.frombuffer(codes, np.uint8)
        for part, length in self._parts(count, _CACHED):
            rows = data[self.size(part.start) : self.size(part.stop)]
            rows = rows.reshape(-1, self._width(length))
            decoded = self._decode(rows, length)
            if not np.array_equal(self._rows(decoded), rows):
                raise ValueError(f"no encoder makes these {self.name} codes")
            values[part].view(-1, length).copy_(decoded)
        return values

    def _parts(self, count: int, at_once: int) -> Iterator[tuple[slice, int]]:
        """Elements that are coded at once, and the length of their blocks: whole ones, the rest."""
        whole = count // self.block * self.block
        stride = max(1, at_once // self.block) * self.block
        for start in range(0, whole, stride):
            yield slice(start, min(start + stride, whole)), self.block
        if whole < count:
            yield slice(whole, count), count - whole

    def _rows(self, values: Tensor) -> Rows:
        low, high = values.aminmax()
        if not (isfinite(low) and isfinite(high)):
            raise ValueError("values that are not finite have no codes")
        return self._encode(values).cpu().numpy()

    @abstractmethod
    def _width(self, length: int) -> int:
        """Bytes of a block of `length` elements."""

    @abstractmethod
    def _encode(self, rows: Tensor) -> Tensor:
        """float32 [blocks, length], finite -> uint8 [blocks, width]."""

    @abstractmethod
    def _decode(self, rows: Rows, length: int) -> Tensor:
        """uint8 [blocks, width], anything -> float32 [blocks, length], anything."""


class Float32(Codec):
    """Every bit of the values."""

    name = "none"

    def _width(self, length: int) -> int:
        return 4 * length

    def _encode(self, rows: Tensor) -> Tensor:
        return rows.view(torch.uint8)

    def _decode(self, rows: Rows, length: int) -> Tensor:
        return torch.from_numpy(rows.copy()).view(torch.float32)


class E3M0(Codec):
    """Sign and exponent. The first byte is the exponent of the scale, with the bias of float32.

    Midpoints go to the larger magnitude: 1.5 to 2, and half of the smallest one to the smallest.
    """

    name = "e3m0"

    def _width(self, length: int) -> int:
        return 1 + (length + 1) // 2

    def _encode(self, rows: Tensor) -> Tensor:
        # The sign, the exponent and the first bit of the mantissa decide; 16 bits hold them.
        bits = (rows.view(torch.int32) >> 22).to(torch.int16)
        halves = bits & 511  # 2 e is 2^e, 2 e + 1 is 1.5 * 2^e and rounds to the next power
        top = ((halves.amax(1, keepdim=True) + 1) >> 1).clamp_(8, 254)
        above = halves.sub_((top << 1) - 15)  # from 1 on: half of the smallest magnitude
        codes = torch.maximum(above >> 1, above.clamp(max=1)).clamp_(0, 7)
        codes |= (bits >> 12) & (codes.clamp(max=1) << 3)  # zero has no sign
        pairs = (pad(codes, (0, 1)) if codes.shape[1] % 2 else codes).view(torch.int32)
        return torch.cat([top.to(torch.uint8), (pairs | pairs >> 12).to(torch.uint8)], 1)

    def _decode(self, rows: Rows, length: int) -> Tensor:
        scale = torch.from_numpy(rows[:, :1].astype(np.int32) << 23).view(torch.float32)
        values = torch.from_numpy(np.take(_E3M0_PAIRS, rows[:, 1:])).view(torch.float32)
        return values[:, :length].mul_(scale)


def _e3m0_pairs() -> NDArray[np.int64]:
    """[256]: the two values of each byte, the lower half first, as the bits of two float32."""
    powers = [0.0, *(2.0**exponent for exponent in range(-6, 1))]
    values = np.array([*powers, *(-power for power in powers)], np.float32)
    return np.stack(np.meshgrid(values, values), axis=-1).view(np.int64).ravel()


_E3M0_PAIRS = _e3m0_pairs()


class Int8(Codec):
    """Whole multiples of a unit. Its short mantissa keeps products and quotients exact; it is
    rounded down, so that the largest magnitude is 127 units in any case."""

    name = "int8"

    def _width(self, length: int) -> int:
        return 2 + length

    def _encode(self, rows: Tensor) -> Tensor:
        peak = rows.abs().amax(1, keepdim=True)
        unit = ((peak / 127).view(torch.int32) & _BFLOAT16).view(torch.float32).clamp_(TINY)
        codes = (rows / unit).round_().clamp_(-127, 127).to(torch.int8)
        head = (unit.view(torch.int32) >> 16).to(torch.int16)
        return torch.cat([head.view(torch.uint8), codes.view(torch.uint8)], 1)

    def _decode(self, rows: Rows, length: int) -> Tensor:
        codes = torch.from_numpy(rows[:, 2:].view(np.int8).astype(np.float32))
        return codes.mul_(_from_bfloat16(rows[:, :2]))


class TopK(Codec):
    """The largest magnitudes of a chunk, each as one of two: the means of those above and of those
    below the middle between the largest and the smallest of them.

    They stand in order of their index, which is how a slot that was not needed is told: its index
    does not rise. Zeros are not sent, nor is what is less than half of what would be sent for it.
    """

    name = "topk"

    def _width(self, length: int) -> int:
        return 4 + -(-_slots(length) * 14 // 8)

    def _encode(self, rows: Tensor) -> Tensor:
        slots, magnitude = _slots(rows.shape[1]), rows.abs()
        least = magnitude.topk(slots, sorted=False).values.amin(1, keepdim=True)
        chosen = magnitude >= least
        if chosen.sum() > slots * len(rows):  # of those that are equal the first are taken
            last = magnitude == least
            surplus = chosen.sum(1, keepdim=True) - slots
            chosen &= ~last | (last.cumsum(1) <= last.sum(1, keepdim=True) - surplus)
        index = chosen.nonzero()[:, 1].view(-1, slots)
        return torch.from_numpy(_pack(index.cpu().numpy(), rows.gather(1, index).cpu().numpy()))

    def _decode(self, rows: Rows, length: int) -> Tensor:
        slots = _slots(length)
        bits = np.unpackbits(rows[:, 4:], axis=1, count=14 * slots).reshape(-1, slots, 14)
        field = bits @ (1 << np.arange(13, -1, -1, dtype=np.int16))
        index = field >> 2
        scale = _from_bfloat16(rows[:, :4]).numpy()  # the upper, the lower
        used = np.concatenate([scale[:, :1] > 0, index[:, 1:] > index[:, :-1]], axis=1)
        if (index[used] >= length).any():
            raise ValueError("an index of the topk codes lies outside of its chunk")
        value = np.where(field & 1, scale[:, :1], scale[:, 1:])
        value = np.where(field & 2, -value, value)
        out = np.zeros((len(rows), length), np.float32)
        out[used.nonzero()[0], index[used]] = value[used]
        return torch.from_numpy(out)


def _slots(length: int) -> int:
    return -(-length // SPARSITY)


def _pack(index: NDArray[np.int64], values: NDArray[np.float32]) -> Rows:
    """Rows of topk from ascending indices and the values there, both [chunks, slots]."""
    size = np.abs(values)
    some = size >= TINY
    middle = (np.where(some, size, np.inf).min(1) + size.max(1).astype(np.float64)) / 2
    upper = some & (size >= middle[:, None])
    high, low = _mean(size, upper), _mean(size, some & ~upper)
    same = high == low  # one magnitude is left, and it is called the upper
    upper |= same & some
    low[same] = 0
    # Nothing is sent that would leave a rest of more bits than float32 has: half to twice is exact.
    used = upper | (some & (size >= low / 2))
    field = np.where(used, index << 2 | (values < 0) << 1 | upper, 0)
    field = np.take_along_axis(field, np.argsort(~used, axis=1, kind="stable"), axis=1)
    bits = (field[:, :, None] >> np.arange(13, -1, -1) & 1).astype(np.uint8)
    head = np.concatenate([high, low], axis=1).view(np.uint32) >> 16
    packed = np.packbits(bits.reshape(len(bits), -1), axis=1)
    return np.concatenate([head.astype("<u2").view(np.uint8), packed], axis=1)


def _mean(size: NDArray[np.float32], of: NDArray[np.bool_]) -> NDArray[np.float32]:
    """[chunks, 1]: means by row, rounded down to bfloat16; 0 of none. Summed in order: the bits
    must not depend on how many rows there are."""
    total = np.where(of, size, 0).cumsum(1, dtype=np.float64)[:, -1:]
    mean = (total / of.sum(1, keepdims=True).clip(1)).astype(np.float32)
    down: NDArray[np.float32] = (mean.view(np.int32) & _BFLOAT16).view(np.float32)
    return down


def _from_bfloat16(rows: Rows) -> Tensor:
    """uint8 [blocks, 2 n] -> float32 [blocks, n]."""
    bits = np.ascontiguousarray(rows).view("<u2").astype(np.uint32) << 16
    return torch.from_numpy(bits.view(np.float32))


_BLOCKED: dict[str, type[Codec]] = {kind.name: kind for kind in (E3M0, Int8, Float32)}


def codec(name: str, grain: int) -> Codec:
    """The codec of that name, for runs that are cut at multiples of `grain` elements.

    Raises:
        Misuse: there is no such codec, or the grain is odd.
    """
    if grain < 2 or grain % 2:
        raise Misuse(f"grain={grain}: codecs need an even number of elements")
    if name == TopK.name:
        return TopK(grain if grain <= CHUNK else gcd(grain, CHUNK))
    if name not in _BLOCKED:
        raise Misuse(f"codec={name!r}: use one of {', '.join([*_BLOCKED, TopK.name])}")
    return _BLOCKED[name](gcd(grain, BLOCK))
