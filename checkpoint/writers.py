"""Which rank writes which shard of a step: every shard has one writer, who has all of it.

Shards are fixed by the tensors' shapes alone (`checkpoint.grid`), ownership by the number of
ranks: a shard's elements may lie on several ranks. It is written by one that holds much of it, and
the others send theirs: `plan(held, writers)` says what. All ranks with equal layouts agree on the
writers without a word.

>>> from outlast.layout.run import Run
>>> from outlast.layout.space import Tensor
>>> space = Space.of([Tensor("a", (6,), "float32"), Tensor("b", (4,), "float32")])
>>> held = Layout.of({0: [Run.of(0, 4)], 1: [Run.of(4, 10)]})
>>> [(shard.name, shard.index, writer) for shard, writer in writers(space, held)]
[('a', 0, 0), ('b', 0, 1)]
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from outlast.checkpoint.grid import grid
from outlast.layout.layout import Layout
from outlast.layout.run import Run
from outlast.layout.space import Ints, Space


@dataclass(frozen=True, slots=True)
class Shard:
    """Shard `index` of tensor `name`, in any role: the addresses `run`."""

    name: str
    index: int
    run: Run


def shards(space: Space) -> list[Shard]:
    """All shards of one role; they tile the space in order."""
    return [
        Shard(tensor.name, index, Run.of(space.offset(tensor.name) + start,
                                         space.offset(tensor.name) + stop))
        for tensor in space.tensors
        for index, (start, stop) in enumerate(grid(tensor.shape).shards())
    ]  # fmt: skip


def parts(space: Space, runs: Iterable[Run]) -> Iterator[tuple[Shard, Run]]:
    """Plain `runs`, cut where shards are: (shard, addresses in it)."""
    found = shards(space)
    starts = [shard.run.start for shard in found]
    for run in runs:
        for index in range(bisect_right(starts, run.start) - 1, len(found)):
            shard = found[index]
            if shard.run.start >= run.stop:
                break
            yield shard, Run.of(max(run.start, shard.run.start), min(run.stop, shard.run.stop))


def writers(space: Space, held: Layout) -> list[tuple[Shard, int]]:
    """Every shard with the holder that writes it: of those that hold at least half as much of it
    as anybody does, the one with least to write so far.

    Args:
        held: holder -> what it has; together all of the space, plain runs, replicas allowed.
    """
    found = shards(space)
    edges = np.array([0, *(shard.run.stop for shard in found)], dtype=np.int64)
    amounts = np.stack([_within(held, holder, edges) for holder in held.holders])
    load = np.zeros(len(held.holders), dtype=np.int64)
    chosen = []
    for index, shard in enumerate(found):
        able = np.flatnonzero(2 * amounts[:, index] >= amounts[:, index].max())
        writer = able[np.argmin(load[able])]
        load[writer] += shard.run.length
        chosen.append((shard, held.holders[writer]))
    return chosen


def _within(layout: Layout, holder: int, edges: Ints) -> Ints:
    """Elements of `holder` between each edge and the next."""
    rows = layout.rows.take(layout.rows_of(holder)).plain()
    points = np.stack([rows.start, rows.stop], axis=1).ravel()
    below = np.cumsum(np.stack([np.zeros_like(rows.length), rows.length], axis=1).ravel())
    if not len(points):
        return np.zeros(len(edges) - 1, dtype=np.int64)
    # Held elements below an address: piecewise linear with slopes 0 and 1, so this is exact.
    found: Ints = np.diff(np.interp(edges, points, below)).astype(np.int64)
    return found
