"""Where a worker's main thread is: written by it, read by the thread that answers the agent.

All ranks pass the same *places* in a generation, in the same order: odd ones inside the runtime,
where ranks wait for each other, even ones outside, in the script. Whoever stands at an even place
while somebody waits at a later one is being waited for. Invariant: what is read is never torn, as
the whole reading is replaced at once.
"""

import time
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Reading:
    """A moment of a worker.

    Args:
        generation, place: how far it has come.
        count: changes with every sign of progress: a leaf, a backward, a place.
        leaf: whether it is in a leaf, and not between steps.
        longest_s: the longest leaf so far, in seconds.
    """

    generation: int = 0
    place: int = 0
    count: int = 0
    leaf: bool = False
    longest_s: float = 0.0


class Pulse:
    """The newest reading, and how it changes."""

    def __init__(self) -> None:
        self.reading = Reading()
        self._begun = 0.0

    def fields(self) -> dict[str, object]:
        """The reading for a message."""
        return asdict(self.reading)

    def enter(self, generation: int) -> None:
        """Inside, at the begin of a generation."""
        self._change(generation=generation, place=1, leaf=False)

    def inside(self) -> None:
        """In the runtime: other ranks may be waited for."""
        self._change(place=self.reading.place | 1, leaf=False)

    def outside(self) -> None:
        """In the script."""
        self._change(place=self.reading.place + (self.reading.place & 1), leaf=False)

    def beat(self) -> None:
        """A sign of progress."""
        self._change()

    def begin_leaf(self) -> None:
        """The script gets the batch of a leaf."""
        self._begun = time.monotonic()
        self._change(leaf=True)

    def end_leaf(self) -> float:
        """The leaf is done; the seconds it took."""
        seconds = time.monotonic() - self._begun
        self._change(leaf=False, longest_s=max(seconds, self.reading.longest_s))
        return seconds

    def _change(self, **changes: Any) -> None:
        self.reading = replace(self.reading, count=self.reading.count + 1, **changes)
