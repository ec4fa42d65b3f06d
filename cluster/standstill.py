"""Which workers of this node stand still while others wait for them: hung, though they may answer.

A worker says with every pong how far it has come: a position (generation, place), the same sequence
on all ranks, odd places being those where ranks wait for each other, and a count that every sign
of progress changes. Somebody who waits at a later position waits for everybody who is before it;
this stays true until those arrive, so it is said once, by the agent of the one who waits. A worker
outside of the runtime is hung when its count has stood still, and somebody has waited for it, both
for its *patience*:

- in a leaf: 10 times the longest leaf that it has completed, at least `stall_s`, so that a rank
  that becomes 10 times slower from one leaf to the next is not taken for hung;
- in its first leaf, which may compile, and between two steps: `stalled_s`, just below the deadline
  of the collective in which the others wait, and which the job would not survive;
- silent, so that nobody knows where it is by now: as in a leaf, counted from its last word.
"""

from collections.abc import Collection
from dataclasses import dataclass

from outlast.cluster.timing import Timing

SLOWER = 10.0
REMEMBERED = 8  # positions at which others wait; what is older has been passed by all

Position = tuple[int, int]  # generation and place


@dataclass(slots=True)
class _Seen:
    position: Position
    count: int
    in_leaf: bool
    longest_s: float
    since: float  # when this was new
    heard: float  # when it was said last


class Standstill:
    """The workers of one agent; all times are of one clock."""

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        self._seen: dict[int, _Seen] = {}
        self._waited: dict[Position, float] = {}  # since when somebody waits there
        self._told: Position = (0, 0)

    def pong(
        self, holder: int, position: Position, count: int, leaf_s: tuple[bool, float], now: float
    ) -> None:
        """A worker's reading; leaf_s: whether it is in a leaf, and its longest so far."""
        before = self._seen.get(holder)
        if before is None or (before.position, before.count) != (position, count):
            self._seen[holder] = _Seen(position, count, *leaf_s, now, now)
        else:
            before.heard = now

    def waited(self, position: Position, since: float) -> None:
        """Somebody, somewhere, waits at `position` since then."""
        self._waited[position] = min(since, self._waited.get(position, since))
        for old in sorted(self._waited)[:-REMEMBERED]:
            del self._waited[old]

    def forgive(self, now: float) -> None:
        """This process was held up itself: nothing that it has seen so far counts."""
        for seen in self._seen.values():
            seen.since = seen.heard = now
        self._waited = dict.fromkeys(self._waited, now)

    def watch(self, holders: Collection[int]) -> None:
        """Only these exist."""
        self._seen = {holder: seen for holder, seen in self._seen.items() if holder in holders}

    def news(self, now: float) -> list[tuple[Position, float]]:
        """(position, seconds) at which a worker of ours waits so long that the others should know;
        each position once."""
        found = []
        for seen in self._seen.values():
            waits = now - seen.since
            if seen.position[1] & 1 and waits >= self._timing.stall_s:
                self.waited(seen.position, seen.since)
                if seen.position > self._told:
                    self._told = seen.position
                    found.append((seen.position, waits))
        return found

    def hung(self, now: float) -> list[tuple[int, float]]:
        """(holder, seconds that others have waited) of the workers that must go."""
        found = []
        for holder, seen in self._seen.items():
            later = [since for at, since in self._waited.items() if at > seen.position]
            silent = now - seen.heard >= self._timing.silence_s
            patience = self._patience(seen, silent)
            stood = now - (seen.heard if silent else seen.since)
            inside = seen.position[1] & 1 and not silent
            if later and not inside and stood >= patience <= now - min(later):
                found.append((holder, now - min(later)))
        return found

    def _patience(self, seen: _Seen, silent: bool) -> float:
        timing = self._timing
        if not ((seen.in_leaf or silent) and seen.longest_s):
            return timing.stalled_s
        return min(max(timing.stall_s, SLOWER * seen.longest_s), timing.stalled_s)
