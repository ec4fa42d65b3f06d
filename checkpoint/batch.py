"""A recovery cut into rounds that every rank has the memory for.

All ranks walk the same list in the same order, so what one sends is what the other expects, and
no message needs a header. Receivers take turns in the list, so that all of them are busy in every
round.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TypeVar

from outlast.checkpoint.average import Fill
from outlast.checkpoint.decode import Decode, windows
from outlast.checkpoint.ladder import Recovery, Transfer
from outlast.checkpoint.records import StateShape
from outlast.layout.run import Run

ROUND_BYTES = 128 << 20  # that a rank sends or receives at once; one window may exceed it
WINDOW_BYTES = 8 << 20  # of each unit

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Batch:
    """One round: `moves` reach their new owners, `decodes` get their inputs."""

    moves: tuple[Transfer, ...] = ()
    decodes: tuple[Decode, ...] = ()


def batches(
    recovery: Recovery,
    shape: StateShape,
    round_bytes: int = ROUND_BYTES,
    window_bytes: int = WINDOW_BYTES,
) -> Iterator[Batch]:
    """The rounds of a recovery.

    Args:
        window_bytes: a multiple of the widest role.
    """
    most = max(1, round_bytes // shape.element_bytes)
    moves = (
        replace(move, run=Run.of(start, min(start + most, move.run.stop)))
        for move in recovery.transfers
        for start in range(move.run.start, move.run.stop, most)
    )
    parts = (window for d in recovery.decodes for window in windows(d, shape, window_bytes))
    rounds = zip_longest(
        _packed(
            _in_turn(moves, lambda move: move.dst),
            lambda move: [(move.src, move.dst, move.run.numel * shape.element_bytes)],
            round_bytes,
        ),
        _packed(
            _in_turn(parts, lambda part: part.decoder), lambda part: part.moved(shape), round_bytes
        ),
        fillvalue=(),
    )
    for some_moves, some_decodes in rounds:
        yield Batch(some_moves, some_decodes)


def fillings(
    fills: Iterable[Fill], shape: StateShape, round_bytes: int = ROUND_BYTES
) -> Iterator[tuple[Fill, ...]]:
    """The rounds in which what is lost is averaged, after all batches: of the first role alone."""
    width = shape.roles[0].itemsize
    return _packed(
        fills,
        lambda fill: [(side.src, fill.dst, side.run.numel * width) for side in fill.sides],
        round_bytes,
    )


def _in_turn(items: Iterable[Item], key: Callable[[Item], Hashable]) -> Iterator[Item]:
    """One item of each key, then the next of each."""
    queues: dict[Hashable, list[Item]] = {}
    for item in items:
        queues.setdefault(key(item), []).append(item)
    for turn in zip_longest(*queues.values()):
        yield from (item for item in turn if item is not None)


def _packed(
    items: Iterable[Item], messages: Callable[[Item], Iterable[tuple[int, int, int]]], limit: int
) -> Iterator[tuple[Item, ...]]:
    """As many items as each round allows, in order."""
    chosen: list[Item] = []
    load: Counter[tuple[str, int]] = Counter()
    for item in items:
        more: Counter[tuple[str, int]] = Counter()
        for src, dst, size in messages(item):
            more["sent", src] += size
            more["received", dst] += size
        if chosen and any(load[end] + size > limit for end, size in more.items()):
            yield tuple(chosen)
            chosen, load = [], Counter()
        chosen.append(item)
        load.update(more)
    if chosen:
        yield tuple(chosen)
