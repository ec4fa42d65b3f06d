"""How the native format cuts an array: chunks, which are checked, in shards, which are files.

Both are fixed by the shape alone. So a step has the same files with the same bytes whatever number
of ranks wrote it, and every shard is one interval of the row-major elements, which has one writer.
Chunks divide the array evenly, because an edge chunk is stored at full size.

>>> grid((1008, 336))
Grid(shape=(1008, 336), chunk=(504, 336), shard=(1008, 336))
>>> grid((30_000, 768)).chunk, grid((30_000, 768)).shards()[:2]
((341, 768), [(0, 3928320), (3928320, 7856640)])
>>> grid(()).shards(), grid((0, 4)).shards()
([(0, 1)], [])
"""

from dataclasses import dataclass
from math import prod

CHUNK = 1 << 18  # elements: what a reader has to read and check at least
SHARD = 1 << 22  # elements: a file of 16 MiB in float32


@dataclass(frozen=True, slots=True)
class Grid:
    """Shapes of one chunk and of one shard of an array of `shape`."""

    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    shard: tuple[int, ...]

    def shards(self) -> list[tuple[int, int]]:
        """The elements [start, stop) of every shard, row-major, in order; they tile the array."""
        total, size = prod(self.shape), 1
        if not total:
            return []
        for axis in range(len(self.shape) - 1, -1, -1):
            if self.shard[axis] < self.shape[axis]:
                # One axis is cut; before it, a shard has one index. So the cuts start over there.
                row, inner = self.shape[axis] * size, self.shard[axis] * size
                return [
                    (begin + at, begin + min(at + inner, row))
                    for begin in range(0, total, row)
                    for at in range(0, row, inner)
                ]
            size *= self.shape[axis]
        return [(0, total)]


def grid(shape: tuple[int, ...]) -> Grid:
    """The cut of an array of `shape`."""
    chunk = _box(shape, CHUNK)
    # Whole chunks: an axis that a shard holds altogether may end inside of one.
    shard = [-(-n // c) * c for n, c in zip(_box(shape, SHARD), chunk, strict=True)]
    return Grid(shape, chunk, tuple(shard))


def _box(shape: tuple[int, ...], limit: int) -> tuple[int, ...]:
    """The largest equal parts of at most `limit` elements that are intervals of the array."""
    inner = 1
    for axis in range(len(shape) - 1, -1, -1):
        rows = max(shape[axis], 1)
        if inner * rows > limit:
            parts = -(-rows // (limit // inner))
            rows = -(-rows // parts)
            return (*(1 for _ in shape[:axis]), rows, *(max(n, 1) for n in shape[axis + 1 :]))
        inner *= rows
    return tuple(max(n, 1) for n in shape)
