"""Who is slow, and how many leaves it should get: from the seconds that a leaf takes on each rank.

A rank's pace is the median of its last `WINDOW` periods, a period being a step or as many as it
takes to be worth measuring; it is compared with the median rank's, so what slows everybody down is
nobody's fault. A rank becomes *slow* beyond `SLOW` and stays so until
it is below `RECOVERED`. Who computes which leaf changes no bit of the result, so leaves may follow
the pace; every rank notes the same numbers at the same steps, and so all deal alike. Times are per
leaf: how many leaves a rank has does not influence its pace.
"""

from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence

WINDOW = 5  # periods; a single long step, as of a collector or a cold cache, is no pace
PERIOD_S = 1.0  # short steps are noise: on a busy machine 15 ms of one rank are 30 ms of another
SLOW, RECOVERED = 1.5, 1.2  # of the median rank's time; 42 % of jobs have a rank 1.1 slower
CHANGE = 0.25  # weights that are off by less than this stay: dealing anew gains nothing


class Pace:
    """What is known of the ranks of the present generation, by holder."""

    def __init__(self) -> None:
        self._times: dict[int, deque[float]] = {}
        self._period: dict[int, list[float]] = {}  # seconds of each leaf of the present period
        self._noted = 0
        self.slow: set[int] = set()

    def enter(self, holders: Iterable[int]) -> None:
        """A generation begins: everybody starts to measure anew, as a joiner has to."""
        self._times = {holder: deque(maxlen=WINDOW) for holder in holders}
        self._period = {holder: [] for holder in self._times}
        self._noted = 0
        self.slow &= set(self._times)

    def note(self, seconds: Mapping[int, Sequence[float]]) -> dict[int, float]:
        """Seconds of each leaf of one step, by holder.

        Returns:
            holders that are slow from now on, with the ratio to the median one.
        """
        for holder, values in seconds.items():
            self._period[holder] += values
        if max(map(sum, self._period.values())) < PERIOD_S:
            return {}
        self._noted += 1
        for holder, values in self._period.items():
            if values:
                self._times[holder].append(sum(values) / len(values))
                self._period[holder] = []
        ratios = self._ratios()
        fresh = {h: r for h, r in ratios.items() if r >= SLOW and h not in self.slow}
        again = {h for h, r in ratios.items() if r <= RECOVERED}
        self.slow = (self.slow | set(fresh)) - again
        return fresh

    def weights(self, present: Mapping[int, float]) -> dict[int, float] | None:
        """Weights that follow the pace, or None while those at `present` are good enough.

        A holder that had no leaf for a whole window has its weight doubled until it gets one, so
        that one that is fast again is found out. Weight 0 stays: it was asked for.
        """
        if self._noted < WINDOW:
            return None
        ratios = self._ratios()
        wanted = {
            holder: round(1 / ratios[holder], 2) if holder in ratios else min(1.0, 2 * weight)
            for holder, weight in present.items()
            if weight > 0
        }
        if all(abs(wanted[h] - present[h]) <= CHANGE * present[h] for h in wanted):
            return None
        self.enter(list(self._times))
        return {holder: wanted.get(holder, 0.0) for holder in present}

    def _ratios(self) -> dict[int, float]:
        """Holder -> its time against the median one's, of those measured often enough."""
        medians = {h: _middle(t) for h, t in self._times.items() if len(t) == WINDOW}
        usual = _middle(medians.values()) if medians else 0.0
        return {holder: value / usual for holder, value in medians.items()} if usual > 0 else {}


def _middle(values: Collection[float]) -> float:
    """The median, the lower one of two."""
    return sorted(values)[(len(values) - 1) // 2]
