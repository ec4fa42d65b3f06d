"""Which of a rank's runs are of which fragment and unit."""

from bisect import bisect_right
from collections.abc import Sequence

from outlast.layout.fragments import Fragment
from outlast.layout.run import Run
from outlast.layout.space import Space


class Shares:
    """The runs of one rank, in address order and cut at units.

    Attributes:
        runs: they themselves; units, fragments: of each run the number of its unit and fragment.
    """

    def __init__(self, space: Space, fragments: Sequence[Fragment], runs: Sequence[Run]) -> None:
        home = {unit: p for p, fragment in enumerate(fragments) for unit in fragment.units}
        filled = [number for number, unit in enumerate(space.units) if unit.numel]
        starts = [space.units[number].start for number in filled]
        self.runs = list(runs)
        self.units = [filled[bisect_right(starts, run.start) - 1] for run in runs]
        self.fragments = [home[unit] for unit in self.units]

    def of(self, fragment: int) -> tuple[list[int], list[Run]]:
        """Positions of the runs of a fragment, and these runs."""
        chosen = [i for i, p in enumerate(self.fragments) if p == fragment]
        return chosen, [self.runs[i] for i in chosen]
