"""Fragments of a space: the units that islands exchange together, and when (Streaming DiLoCo).

Douillard et al., "Streaming DiLoCo with overlapping communication" (2025), Algorithm 2: fragment p
is sent after step t where t - t_p is a multiple of H, and applied tau steps later. The offsets t_p
spread the fragments evenly over the H steps; nothing is sent in the first H.

>>> from outlast.layout.space import Space, Tensor
>>> names = ("in", "h.0", "h.1", "h.2", "h.3", "out")
>>> stack = Space.of([Tensor(name, (4,), "float32") for name in names], unit_of=str)
>>> [f.units for f in fragments(stack, 2, STRIDED)], [f.units for f in fragments(stack, 4)]
([(0, 3), (1, 4), (2, 5)], [(0, 2, 4), (1, 3, 5)])
>>> [f.units for f in fragments(stack, 4, SEQUENTIAL)]
[(0, 1, 2, 3), (4, 5)]
>>> rounds = Rounds(every=100, fragments=2)
>>> [(step, p) for step in range(300) for p in rounds.sent(step)]
[(100, 0), (150, 1), (200, 0), (250, 1)]
>>> [(step, due) for step in range(170) for due in rounds.due(step, (1, 5))]
[(101, (0, 100)), (155, (1, 150))]
"""

from collections.abc import Sequence
from dataclasses import dataclass

from outlast.layout.run import Run
from outlast.layout.space import Space

STRIDED, SEQUENTIAL = "strided", "sequential"
ORDERS = (STRIDED, SEQUENTIAL)


@dataclass(frozen=True, slots=True)
class Fragment:
    """Indices of the units of a fragment, and their addresses, a run for each unit."""

    units: tuple[int, ...]
    runs: tuple[Run, ...]


def fragments(space: Space, size: int, order: str = STRIDED) -> tuple[Fragment, ...]:
    """Deal the units of `space` to as few fragments as have at most `size` units each."""
    filled = [index for index, unit in enumerate(space.units) if unit.numel]
    count = -(-len(filled) // size)
    strided = [tuple(filled[p::count]) for p in range(count)]
    sequential = [tuple(filled[p * size : (p + 1) * size]) for p in range(count)]
    return tuple(
        Fragment(units, tuple(Run.of(space.units[u].start, space.units[u].stop) for u in units))
        for units in (strided if order == STRIDED else sequential)
    )


@dataclass(frozen=True, slots=True)
class Rounds:
    """When each of `fragments` is exchanged: once in `every` steps (H)."""

    every: int
    fragments: int

    def offset(self, fragment: int) -> int:
        """t_p, in [0, H)."""
        return fragment * self.every // self.fragments

    def sent(self, step: int) -> list[int]:
        """Fragments that are sent after `step` steps."""
        found = range(self.fragments) if step >= self.every else ()
        return [p for p in found if (step - self.offset(p)) % self.every == 0]

    def due(self, step: int, delays: Sequence[int]) -> list[tuple[int, int]]:
        """(fragment, step after which it was sent) of those that are applied after `step` steps,
        in the order in which they were sent; `delays` are tau by fragment."""
        found = [
            (step - delay, p) for p, delay in enumerate(delays) if p in self.sent(step - delay)
        ]
        return [(p, sent) for sent, p in sorted(found)]

    def flying(self, step: int, delays: Sequence[int]) -> list[tuple[int, int]]:
        """(fragment, step after which it was sent) of those that are sent by `step` and applied
        later."""
        found = []
        for p, delay in enumerate(delays):
            sent = step - (step - self.offset(p)) % self.every
            if sent >= self.every and sent + delay > step:
                found.append((p, sent))
        return found
