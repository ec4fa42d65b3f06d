"""Where DeepSpeed's ranks keep which elements of which parameter.

ZeRO 1 and 2 lay the parameters of a group end to end, pad that to a multiple of twice the ranks,
and give every rank an even part: parameters straddle ranks. ZeRO 3 cuts every parameter on its own
into even parts, rounded up, and a rank's parts lie end to end, in sub-groups that depend on the
number of ranks. Sources: stage_1_and_2.py (flatten_dense_tensors_aligned, _round_robin_reorder),
stage3.py (_create_fp16_sub_groups) and partition_parameters.py (_partition_param).

>>> cut = flat({"a": 5, "b": 6}, ranks=2)
>>> cut.length, cut.filled(0), cut.filled(1)
(6, 6, 5)
>>> list(cut.shares(1))
[Share(name='b', start=1, stop=6, offset=0)]
>>> cut = split({"a": 5, "b": 6}, ranks=2)
>>> cut.length, list(cut.shares(1))
(6, [Share(name='a', start=3, stop=5, offset=0), Share(name='b', start=3, stop=6, offset=3)])
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

_ALIGNMENT = 2  # elements of every rank's part: nccl_start_alignment_factor


@dataclass(frozen=True, slots=True)
class Share:
    """Elements [start, stop) of `name` lie in a rank's shard from `offset` on."""

    name: str
    start: int
    stop: int
    offset: int


@dataclass(frozen=True, slots=True)
class Flat:
    """A group of ZeRO 1 or 2.

    Args:
        names: in the order of the flat buffer.
        starts: where each begins there.
        sizes: elements of each.
        total: elements with the padding between them, without that at the end.
        length: elements of every rank's shard.
    """

    names: Sequence[str]
    starts: Sequence[int]
    sizes: Sequence[int]
    total: int
    length: int

    def filled(self, rank: int) -> int:
        """Elements of a rank's shard before the padding at the end."""
        return min(max(self.total - rank * self.length, 0), self.length)

    def shares(self, rank: int) -> Iterator[Share]:
        """What lies in the shard of `rank`."""
        low, high = rank * self.length, (rank + 1) * self.length
        for index in range(max(bisect_right(self.starts, low) - 1, 0), len(self.names)):
            begin, size = self.starts[index], self.sizes[index]
            if begin >= high:
                return
            start, stop = max(low - begin, 0), min(high - begin, size)
            if start < stop:
                yield Share(self.names[index], start, stop, begin + start - low)


@dataclass(frozen=True, slots=True)
class Split:
    """A sub-group of ZeRO 3: see `Flat`; `parts` are the elements of each that a rank has."""

    sizes: Mapping[str, int]
    parts: Sequence[int]
    length: int

    def filled(self, rank: int) -> int:
        """All: what is padding lies between."""
        return self.length

    def shares(self, rank: int) -> Iterator[Share]:
        """What lies in the shard of `rank`."""
        offset = 0
        for (name, size), part in zip(self.sizes.items(), self.parts, strict=True):
            start, stop = rank * part, min((rank + 1) * part, size)
            if start < stop:
                yield Share(name, start, stop, offset)
            offset += part


def flat(sizes: Mapping[str, int], ranks: int, paddings: Sequence[int] = ()) -> Flat:
    """The cut of ZeRO 1 and 2; `paddings` follow each parameter (`parameter_alignment`)."""
    steps = [
        size + padding
        for size, padding in zip(sizes.values(), paddings or [0] * len(sizes), strict=True)
    ]
    ends, unit = [0, *accumulate(steps)], _ALIGNMENT * ranks
    return Flat([*sizes], ends[:-1], [*sizes.values()], ends[-1], -(-ends[-1] // unit) * _ALIGNMENT)


def split(sizes: Mapping[str, int], ranks: int) -> Split:
    """The cut of ZeRO 3."""
    parts = [-(-size // ranks) for size in sizes.values()]
    return Split(sizes, parts, sum(parts))


def sub_groups(sizes: Mapping[str, int], ranks: int, limit: int) -> list[dict[str, int]]:
    """How ZeRO 3 cuts a parameter group: after the parameter that reaches `limit` on one rank."""
    groups: list[dict[str, int]] = [{}]
    held = 0
    for name, size in sizes.items():
        if held >= limit:
            groups.append({})
            held = 0
        groups[-1][name] = size
        held += -(-size // ranks)
    return groups


def round_robin(count: int, ranks: int) -> list[int]:
    """With `round_robin_gradients`: place in the flat buffer -> place in the optimizer's group.

    >>> round_robin(5, 2)
    [0, 2, 4, 1, 3]
    """
    return [index for first in range(ranks) for index in range(first, count, ranks)]
