"""The address space: every element of the model has one address, fixed by the model alone.

Tensors are laid end to end in order, without padding (padding lives in communication buffers).
Roles (param, grad, exp_avg, ...) share the addresses: one interval names the same elements in every
role. A `Unit` is a stretch of consecutive tensors that is gathered, reduced and moved together.
Invariant: units tile the space, and a run may be cut only at unit.start + i * grain, wherever the
holders are and however many.

>>> shapes = {"a.weight": (4, 6), "a.bias": (4,), "b": (10,)}
>>> tensors = [Tensor(name, shape, "float32") for name, shape in shapes.items()]
>>> space = Space.of(tensors, unit_of=lambda name: name.split(".")[0])
>>> space.numel, space.offset("a.bias"), space.run("b")
(38, 24, Run(start=28, length=10, stride=0, count=1))
>>> [(unit.name, unit.start, unit.stop, unit.tensors) for unit in space.units]
[('a', 0, 28, (0, 1)), ('b', 28, 38, (2,))]
>>> space.locate(26)[1], space.names([Run.of(26, 29)])
(2, ['a.bias', 'b'])
>>> space.cuts(16).tolist()
[0, 16, 28, 38]
>>> stack = [Tensor(f"{unit}.bias", (4,), "float32") for unit in ("in", "h.0", "h.1", "h.2", "out")]
>>> chains(Space.of(stack, unit_of=lambda name: name.removesuffix(".bias")))
((1, 2, 3),)
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from math import prod
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from outlast.layout.run import Run, canonical, intersect

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Tensor:
    """A named array of the model; `dtype` is a bare name, as in "float32"."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """Elements; a scalar has one."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Unit:
    """Addresses [start, stop) of the consecutive tensors with the indices `tensors`.

    Names may repeat (one name, two stretches): a unit's identity is its index in the space.
    """

    name: str
    start: int
    stop: int
    tensors: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements of the unit."""
        return self.stop - self.start


@dataclass(frozen=True)
class Space:
    """Ordered tensors laid end to end and the units that group them; build it with `Space.of`."""

    tensors: tuple[Tensor, ...]
    units: tuple[Unit, ...]

    def __post_init__(self) -> None:
        if len(self._index) != len(self.tensors):
            raise ValueError("tensor names must be unique")
        edges = [0, *(unit.stop for unit in self.units)]
        if edges[:-1] != [unit.start for unit in self.units] or edges[-1] != self.numel:
            raise ValueError("units must tile the space")

    @classmethod
    def of(cls, tensors: Iterable[Tensor], unit_of: Callable[[str], str] | None = None) -> Self:
        """Groups consecutive tensors with the same unit name; by default all are one."""
        ordered = tuple(tensors)
        ends = list(accumulate((tensor.numel for tensor in ordered), initial=0))
        units = []
        name = unit_of or (lambda _: "all")
        for key, group in groupby(range(len(ordered)), key=lambda i: name(ordered[i].name)):
            indices = tuple(group)
            units.append(Unit(key, ends[indices[0]], ends[indices[-1] + 1], indices))
        return cls(ordered, tuple(units))

    @cached_property
    def _index(self) -> dict[str, int]:
        return {tensor.name: index for index, tensor in enumerate(self.tensors)}

    @cached_property
    def _offsets(self) -> list[int]:
        return list(accumulate((tensor.numel for tensor in self.tensors), initial=0))

    @property
    def numel(self) -> int:
        """Elements of all tensors."""
        return self._offsets[-1]

    def offset(self, name: str) -> int:
        """Address of the first element of tensor `name`; KeyError where there is none."""
        return self._offsets[self._index[name]]

    def run(self, name: str) -> Run:
        """Addresses of tensor `name`; ValueError for an empty tensor."""
        start = self.offset(name)
        return Run(start, self.tensors[self._index[name]].numel)

    def locate(self, address: int) -> tuple[Tensor, int]:
        """The tensor at `address` and the element's index in the flattened tensor."""
        if not 0 <= address < self.numel:
            raise IndexError(f"address {address} is outside [0, {self.numel})")
        index = bisect_right(self._offsets, address) - 1
        return self.tensors[index], address - self._offsets[index]

    def names(self, runs: Iterable[Run]) -> list[str]:
        """Names of the tensors that `runs` touch, in address order."""
        held = canonical(runs)
        full = (tensor.name for tensor in self.tensors if tensor.numel)
        return [name for name in full if intersect([self.run(name)], held)]

    @cached_property
    def _starts(self) -> Ints:
        return np.array([unit.start for unit in self.units if unit.numel], dtype=np.int64)

    def snap(self, addresses: Sequence[int] | Ints, grain: int) -> Ints:
        """The allowed cut nearest to each address in [0, numel], the lower of two equally near."""
        at = np.asarray(addresses, dtype=np.int64)
        edge = np.append(self._starts, self.numel)
        unit = np.searchsorted(edge, at, side="right") - 1
        below: Ints = edge[unit] + (at - edge[unit]) // grain * grain
        above = np.minimum(below + grain, edge[np.minimum(unit + 1, len(edge) - 1)])
        return np.where(above - at < at - below, above, below)

    def cuts(self, grain: int) -> Ints:
        """Where a run may be cut: every unit.start + i * grain, and the end of the space."""
        pieces = [np.arange(unit.start, unit.stop, grain, dtype=np.int64) for unit in self.units]
        return np.concatenate([*pieces, np.array([self.numel], dtype=np.int64)])

    def fingerprint(self) -> str:
        """sha256 of names, shapes, dtypes and units: equal where addresses mean the same."""
        return hashlib.sha256(json.dumps(self.as_json(), sort_keys=True).encode()).hexdigest()

    def as_json(self) -> dict[str, Any]:
        """{"tensors": [[name, shape, dtype, name of its unit], ...]}; `from_json` reads it back."""
        unit = {index: unit.name for unit in self.units for index in unit.tensors}
        columns = ([t.name, list(t.shape), t.dtype, unit[i]] for i, t in enumerate(self.tensors))
        return {"tensors": list(columns)}

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Self:
        """The space that `as_json` described."""
        unit = {name: str(of) for name, _, _, of in plain["tensors"]}
        columns = ((str(n), tuple(map(int, shape)), str(d)) for n, shape, d, _ in plain["tensors"])
        return cls.of((Tensor(*fields) for fields in columns), unit.__getitem__)


def chains(space: Space) -> tuple[tuple[int, ...], ...]:
    """Unit indices of blocks in a row, two or more: they are numbered on from each other ("h.0",
    "h.1", ...) and hold tensors of equal names, shapes and dtypes."""
    kinds = [_kind(space, unit) for unit in space.units]
    chained = groupby(range(len(kinds)), key=lambda i: (kinds[i], _number(space.units[i]) - i))
    found = (tuple(group) for (kind, _), group in chained if kind is not None)
    return tuple(chain for chain in found if len(chain) > 1)


def _kind(space: Space, unit: Unit) -> Any:
    """What blocks of one chain have in common; None for what is no block."""
    prefix, _, number = unit.name.rpartition(".")
    if not number.isdecimal() or not unit.numel:
        return None
    inside = [space.tensors[index] for index in unit.tensors]
    return prefix, [(t.name.removeprefix(unit.name), t.shape, t.dtype) for t in inside]


def _number(unit: Unit) -> int:
    number = unit.name.rpartition(".")[2]
    return int(number) if number.isdecimal() else 0
