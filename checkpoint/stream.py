"""A worker's *stream* is its state in a fixed order: role by role, wide ones first, run by run.

Stripes cut streams into units of equal length; this says which bytes of which role a cut holds.
Because no role is wider than the one before, every multiple of the widest element is a border
between elements, in every stream.
"""

from collections.abc import Iterator, Sequence

from outlast.checkpoint.records import Role, StateShape
from outlast.layout.run import Run


def stream_bytes(shape: StateShape, runs: Sequence[Run]) -> int:
    """Length of the stream of a worker that owns `runs`."""
    return shape.element_bytes * sum(run.numel for run in runs)


def stream_roles(shape: StateShape) -> list[Role]:
    """The roles in the order of a stream."""
    return sorted(shape.roles, key=lambda role: -role.itemsize)


def stream_parts(
    shape: StateShape, runs: Sequence[Run], start: int, stop: int
) -> Iterator[tuple[str, Run]]:
    """(role, run) of the bytes [start, stop) of a stream; cuts fall on element borders."""
    at = 0
    for role in stream_roles(shape):
        for run in runs:
            size = run.numel * role.itemsize
            low, high = max(start, at), min(stop, at + size)
            if low < high:
                first, last = (low - at) // role.itemsize, (high - at) // role.itemsize
                yield role.name, Run.of(run.start + first, run.start + last)
            at += size
