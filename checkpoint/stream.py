"""A worker's *stream* is its state in a fixed order: role by role, run by run.

Stripes cut streams into units of equal length; this says which bytes of which role a cut holds.
"""

from collections.abc import Iterator, Sequence

from outlast.checkpoint.records import StateShape
from outlast.layout.run import Run


def stream_bytes(shape: StateShape, runs: Sequence[Run]) -> int:
    """Length of the stream of a worker that owns `runs`."""
    return shape.element_bytes * sum(run.numel for run in runs)


def stream_parts(
    shape: StateShape, runs: Sequence[Run], start: int, stop: int
) -> Iterator[tuple[str, Run]]:
    """(role, run) of the bytes [start, stop) of a stream; cuts fall on element borders."""
    at = 0
    for role in shape.roles:
        for run in runs:
            size = run.numel * role.itemsize
            low, high = max(start, at), min(stop, at + size)
            if low < high:
                first, last = (low - at) // role.itemsize, (high - at) // role.itemsize
                yield role.name, Run.of(run.start + first, run.start + last)
            at += size
