"""The lossy rung: a block that no exact rung has becomes the mean of its neighbours.

CheckFree ("All is Not Lost: LLM Recovery without Checkpoints", Algorithm 1): a lost block is
replaced by the mean of the blocks before and after it, weighted by the squared norms of their last
gradients before clipping ("plain" takes the norms, as the authors' code does); it starts over with
empty moments and 1.1 times the learning rate, and training goes on with the present batch. Here it
works on single runs: what is lost of a block is averaged from the same offsets of its neighbours,
whoever holds them. The first and the last block are copied from the one neighbour they have. What
is no block (embedding, head, norms) has no neighbour: `edges` names it, to be kept twice.

Invariant: state after an averaging and state of the same step number before it must not meet.
Every later record carries the list of averagings; `superseded` tells what they made void.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np

from outlast.checkpoint.records import Averaging, Lineage
from outlast.layout.layout import Layout
from outlast.layout.run import Run, intersect, subtract, union
from outlast.layout.space import Space, chains

RATE = 1.1  # factor of the learning rate of what was averaged; it does not compound

WEIGHTS: dict[str, Callable[[float], float]] = {"squared": lambda x: x * x, "plain": lambda x: x}

Array = TypeVar("Array", bound=Any)


@dataclass(frozen=True, slots=True)
class Side:
    """Elements of a neighbour that rank `src` holds, and their weight in the mean."""

    src: int
    run: Run
    weight: float


@dataclass(frozen=True, slots=True)
class Fill:
    """Rank `dst` sets `run` to the mean of the sides; the weights add up to 1."""

    dst: int
    run: Run
    sides: tuple[Side, ...]


def edges(space: Space) -> tuple[Run, ...]:
    """What has no neighbour of its kind, to be kept twice."""
    chained = {index for chain in chains(space) for index in chain}
    rest = (unit for index, unit in enumerate(space.units) if index not in chained and unit.numel)
    return union((), [Run.of(unit.start, unit.stop) for unit in rest])


def blend(values: Sequence[Array], weights: Sequence[float]) -> Array:
    """The weighted sum of one or two arrays (numpy or torch), in their own precision."""
    parts: list[Array] = [value * weight for value, weight in zip(values, weights, strict=True)]
    for part in parts[1:]:
        parts[0] = parts[0] + part
    return parts[0]


def shares(kind: str, norms: Sequence[float], before: int | None, after: int | None) -> list[float]:
    """Weights of the units before and after, adding up to 1; half each where norms do not tell.

    Args:
        norms: gradient norm of every unit at the last step, before clipping; may be empty.
    """
    if before is None or after is None:
        return [float(before is not None), float(after is not None)]
    weigh = WEIGHTS[kind]
    top = max(norms[before], norms[after]) if norms else 0.0
    if not 0.0 < top < float("inf"):
        return [0.5, 0.5]
    first, second = weigh(norms[before] / top), weigh(norms[after] / top)  # squares stay finite
    return [first / (first + second), second / (first + second)]


class Averager:
    """Fills of what is lost.

    Args:
        wanted: the layout to be, by rank.
        lost: rank -> runs of it that no exact rung has.
        norms: of every unit at the last step; may be empty.
    """

    def __init__(
        self,
        space: Space,
        kind: str,
        wanted: Layout,
        lost: Mapping[int, Sequence[Run]],
        norms: Sequence[float],
    ) -> None:
        self._space, self._kind, self._norms = space, kind, norms
        self._rows = wanted.rows.plain()
        self._holders = wanted.holders
        self._lost = union((), [run for runs in lost.values() for run in runs])
        self.alone: list[Run] = []  # lost, without a neighbour
        self.adjacent: list[Run] = []  # lost together with a neighbour
        self.weights: dict[int, tuple[float, float]] = {}  # unit -> of the unit before and after
        self._links = {  # unit -> the units before and after it
            index: (chain[at - 1] if at else None, chain[at + 1] if at + 1 < len(chain) else None)
            for chain in chains(space)
            for at, index in enumerate(chain)
        }
        self.fills = tuple(
            fill for dst in sorted(lost) for run in lost[dst] for fill in self._fills(dst, run)
        )

    def refusal(self) -> str:
        """Why this cannot be done; empty if it can."""
        names = ", ".join(self._space.names(self.adjacent or self.alone)[:3])
        if self.adjacent:
            return f"two adjacent blocks are lost at the same place, nothing to average ({names})"
        return f"no block of the same kind is next to what is lost ({names})" if self.alone else ""

    def episode(self, step: int, generation: int) -> Averaging:
        """What later records remember."""
        units = sorted(self.weights)
        return Averaging(
            step,
            generation,
            self._kind,
            tuple(self._space.units[index].name for index in units),
            tuple(self.weights[index] for index in units),
            self._lost,
            {},
        )

    def _fills(self, dst: int, run: Run) -> Iterator[Fill]:
        for index, unit in enumerate(self._space.units):
            for part in _plain(intersect([run], [Run.of(unit.start, unit.stop)][: unit.numel])):
                if index not in self._links:
                    self.alone.append(part)
                    continue
                first, second = shares(self._kind, self._norms, *self._links[index])
                self.weights[index] = (first, second)
                near = zip(self._links[index], (first, second), strict=True)
                sides = [
                    (self._space.units[n].start - unit.start, w) for n, w in near if n is not None
                ]
                yield from self._pieces(dst, part, sides)

    def _pieces(self, dst: int, run: Run, sides: Sequence[tuple[int, float]]) -> Iterator[Fill]:
        """`run` cut where the holders of its neighbours, `sides` = (distance, weight), change."""
        cuts = {run.start, run.stop}
        for distance, _ in sides:
            there = Run.of(run.start + distance, run.stop + distance)
            if intersect([there], self._lost):
                self.adjacent.append(run)
                return
            cuts |= {start - distance for start in self._starts(there)}
        ordered = sorted(cuts)
        for start, stop in pairwise(ordered):
            found = (Run.of(start + d, stop + d) for d, _ in sides)
            yield Fill(
                dst,
                Run.of(start, stop),
                tuple(
                    Side(self._holder(there.start), there, weight)
                    for there, (_, weight) in zip(found, sides, strict=True)
                ),
            )

    def _starts(self, run: Run) -> list[int]:
        """Where another holder's part begins inside `run`."""
        first, last = np.searchsorted(self._rows.start, [run.start, run.stop], side="right")
        starts: list[int] = self._rows.start[first:last].tolist()
        return [start for start in starts if start < run.stop]

    def _holder(self, address: int) -> int:
        row = int(np.searchsorted(self._rows.start, address, side="right")) - 1
        return self._holders[int(self._rows.owner[row])]


def merged(lineages: Sequence[Lineage]) -> Lineage:
    """All averagings that any record knows of, in order.

    An attempt that a further loss cut short may be known to some and done again by all: what is
    averaged again later no longer counts for the earlier one.
    """
    known: dict[tuple[int, int], Averaging] = {}
    for averaging in (one for lineage in lineages for one in lineage):
        key = (averaging.generation, averaging.step)
        other = known.get(key)
        if other is None or not other.scalars:
            known[key] = averaging
    lineage: Lineage = ()
    for key in sorted(known):
        lineage = extended(lineage, known[key])
    return lineage


def extended(lineage: Lineage, new: Averaging) -> Lineage:
    """`lineage` and `new`; runs that are averaged again leave the older entries."""
    older = (replace(old, runs=subtract(old.runs, new.runs)) for old in lineage)
    return (*older, new)


def remembered(lineage: Lineage, scalars: Sequence[dict[str, float]]) -> Lineage:
    """`lineage` with what the optimizer keeps, a step later, of the elements of each averaging."""
    pairs = zip(lineage, scalars, strict=True)
    return tuple(replace(averaging, scalars=numbers) for averaging, numbers in pairs)


def superseded(lineage: Lineage, step: int, generation: int) -> bool:
    """Whether state or parity of `step`, written in `generation`, belongs to a past that an
    averaging has replaced: it is of a later step than the averaging, and was there before it."""
    return any(generation < one.generation and step > one.step for one in lineage)


def cohorts(runs: Sequence[Run], lineage: Lineage) -> tuple[list[Run], list[int]]:
    """`runs` cut where cohorts meet, and the cohort of each: 0, or 1 + its place in the lineage."""
    cut: list[tuple[Run, int]] = []
    for run in runs:
        rest: tuple[Run, ...] = (run,)
        for number, averaging in enumerate(lineage):
            mine = intersect(rest, averaging.runs)
            cut += [(part, 1 + number) for part in _plain(mine)]
            rest = subtract(rest, mine)
        cut += [(part, 0) for part in _plain(rest)]
    cut.sort(key=lambda pair: pair[0].start)
    return [run for run, _ in cut], [number for _, number in cut]


def _plain(runs: Sequence[Run]) -> Iterator[Run]:
    return (Run.of(start, stop) for run in runs for start, stop in run.intervals())
