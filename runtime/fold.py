"""The only place where gradients of different ranks are added.

Every rank sends the nodes of the leaf tree that it holds, cut by owner; the owner of an interval
adds them in tree order. The sum is therefore the same whoever computed which leaf and however
many ranks there were. Sums over elements, such as the gradient norm, are taken per grain, a
stretch of the unit that no cut ever divides, and then added exactly.

[Note: buckets] The address space is worked through in buckets, two in flight, so that
communication buffers stay small against the model; padding and packing live in them alone."""

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from outlast.layout.layout import Layout
from outlast.layout.run import Run, intersect
from outlast.layout.space import Space
from outlast.runtime.collectives import Communicator, Pending
from outlast.runtime.leaf_tree import Node

BUCKET = 1 << 22  # elements


@dataclass(frozen=True, slots=True)
class Bucket:
    """The pieces of one stretch of the address space, by rank."""

    pieces: tuple[tuple[tuple[int, int], ...], ...]  # rank -> intervals
    counts: tuple[int, ...]  # rank -> elements


def buckets(space: Space, layout: Layout, holders: Sequence[int]) -> tuple[Bucket, ...]:
    """Cut the address space; `holders` in rank order. The owner's pieces stay in address order."""
    runs = [layout.runs(holder) for holder in holders]
    found = []
    for start in range(0, space.numel, BUCKET):
        window = [Run.of(start, min(start + BUCKET, space.numel))]
        pieces = tuple(
            tuple(pair for run in intersect(mine, window) for pair in run.intervals())
            for mine in runs
        )
        found.append(Bucket(pieces, tuple(sum(b - a for a, b in mine) for mine in pieces)))
    return tuple(found)


def unit_runs(space: Space, runs: Sequence[Run]) -> list[Run]:
    """`runs` cut at unit borders: kernels over them start at a grain whoever owns them."""
    whole = [Run.of(unit.start, unit.stop) for unit in space.units if unit.numel]
    return [piece for unit in whole for piece in intersect(runs, [unit])]


def fold(
    communicator: Communicator,
    plan: Sequence[Bucket],
    nodes: Sequence[Sequence[Node]],
    sums: Mapping[Node, Tensor],
    leaves: int,
    out: Tensor,
) -> None:
    """Mean gradient of all leaves over the owned elements.

    Args:
        nodes: rank -> nodes it holds, in the order in which it sends them.
        sums: the nodes of this rank, float32 [numel].
        out: float32 [owned elements] in address order, written.
    """
    rank, at = communicator.rank, 0
    for bucket, received, pending in _in_flight(communicator, plan, nodes, sums):
        if pending is not None:
            pending.wait()
        mine = bucket.counts[rank]
        parts: dict[Node, Tensor] = {}
        rows = received.view(-1, mine) if mine else received.view(0, 0)
        for node, row in zip((node for held in nodes for node in held), rows, strict=False):
            parts[node] = row
        if mine:
            root = combine(parts, (leaves.bit_length() - 1, 0))
            torch.mul(root, 1.0 / leaves, out=out[at : at + mine])
        at += mine


def _in_flight(
    communicator: Communicator,
    plan: Sequence[Bucket],
    nodes: Sequence[Sequence[Node]],
    sums: Mapping[Node, Tensor],
) -> Iterator[tuple[Bucket, Tensor, Pending | None]]:
    """Each bucket with its transfer, the next bucket's being started before."""
    rank, size = communicator.rank, communicator.size
    started: list[tuple[Bucket, Tensor, Pending | None]] = []
    for bucket in plan:
        held = [sums[node] for node in nodes[rank]]
        slices = [s[a:b] for pieces in bucket.pieces for s in held for a, b in pieces]
        sent = torch.cat(slices) if slices else out_of_nothing(communicator.device)
        if size == 1:
            started.append((bucket, sent, None))
        else:
            mine = bucket.counts[rank]
            received = torch.empty(
                mine * sum(len(n) for n in nodes), dtype=torch.float32, device=communicator.device
            )
            pending = communicator.exchange(
                received.view(torch.uint8),
                sent.view(torch.uint8),
                [4 * mine * len(nodes[src]) for src in range(size)],
                [4 * count * len(held) for count in bucket.counts],
            )
            started.append((bucket, received, pending))
        if len(started) == 2:
            yield started.pop(0)
    yield from started


def out_of_nothing(device: torch.device) -> Tensor:
    """An empty float32 vector."""
    return torch.empty(0, dtype=torch.float32, device=device)


def combine(parts: Mapping[Node, Tensor], node: Node) -> Tensor:
    """Sum of `node` from the parts below it, in tree order; parts are overwritten."""
    if node in parts:
        return parts[node]
    level, index = node
    assert level > 0, f"leaf {index} is missing"
    left, right = combine(parts, (level - 1, 2 * index)), combine(parts, (level - 1, 2 * index + 1))
    return left.add_(right)


def spread(
    communicator: Communicator, plan: Sequence[Bucket], owned: Tensor, whole: Tensor
) -> None:
    """All-gather: fill `whole` [numel] from every rank's `owned` elements, in address order."""
    rank, size, at = communicator.rank, communicator.size, 0
    width = whole.element_size()
    started: list[tuple[Bucket, Tensor, Pending]] = []

    def finish() -> None:
        bucket, received, pending = started.pop(0)
        pending.wait()
        values = received.view(whole.dtype)
        lengths = [b - a for pieces in bucket.pieces for a, b in pieces]
        targets = [pair for pieces in bucket.pieces for pair in pieces]
        for (a, b), value in zip(targets, torch.split(values, lengths), strict=True):
            whole[a:b].copy_(value)

    for bucket in plan:
        mine = owned[at : at + bucket.counts[rank]]
        at += bucket.counts[rank]
        received = torch.empty(
            sum(bucket.counts) * width, dtype=torch.uint8, device=communicator.device
        )
        pending = communicator.exchange(
            received,
            mine.contiguous().view(torch.uint8).repeat(size),
            [count * width for count in bucket.counts],
            [bucket.counts[rank] * width] * size,
        )
        started.append((bucket, received, pending))
        if len(started) == 2:
            finish()
    while started:
        finish()


def grain_squares(gradient: Tensor, runs: Sequence[Run], grain: int) -> Tensor:
    """Sum of squares of every grain of `runs`, float32, in address order.

    Args:
        gradient: float32 [sum of runs] in address order.
        runs: cut at unit borders, so that each starts at a grain.
    """
    found, at = [], 0
    for run in runs:
        values = gradient[at : at + run.length]
        at += run.length
        # One row more than needed: a single row is summed by another kernel, with other bits.
        padding = -run.length % grain + grain
        squares = torch.nn.functional.pad(values * values, (0, padding))
        found.append(squares.view(-1, grain).sum(1)[:-1])
    return torch.cat(found) if found else out_of_nothing(gradient.device)


def norm(squares: Sequence[float]) -> float:
    """Norm from the squares of all grains; the sum is exact, so their order does not matter."""
    return math.sqrt(math.fsum(squares))


def unit_squares(
    squares: Tensor, runs: Sequence[Run], grain: int, space: Space
) -> dict[int, float]:
    """Unit index -> sum of the squares of its grains in `runs`, which `grain_squares` made."""
    starts = [unit.start for unit in space.units if unit.numel]
    numbers = [index for index, unit in enumerate(space.units) if unit.numel]
    sums: dict[int, float] = {}
    counts = [-(-run.length // grain) for run in runs]
    for run, part in zip(runs, torch.split(squares.double().cpu(), counts), strict=True):
        unit = numbers[bisect_right(starts, run.start) - 1]
        sums[unit] = sums.get(unit, 0.0) + float(part.sum())
    return sums


def unit_norms(heads: Sequence[Mapping[str, Any]], units: int) -> tuple[float, ...]:
    """Gradient norm of every unit, from the "squares" of all ranks; nothing without them."""
    if not all("squares" in head for head in heads):
        return ()
    parts = [[head["squares"].get(str(unit), 0.0) for head in heads] for unit in range(units)]
    return tuple(norm(part) for part in parts)
