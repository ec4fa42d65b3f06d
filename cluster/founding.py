"""How an agent that is in no view gets into one: the founder's first view, or a place in a job.

Only the founder forms generation 1, so that two halves of a job can never found it twice. It waits
until every other endpoint was asked whether the job is running already.
"""

from outlast.cluster.detector import Patience
from outlast.cluster.roster import Roster
from outlast.cluster.timing import Timing
from outlast.cluster.view import Member, View


class Founding:
    """The rules for an agent outside; `nodes` are the fewest and the most members of the job."""

    def __init__(self, timing: Timing, nodes: tuple[int, int], *, founder: bool) -> None:
        self.timing = timing
        self.nodes_min, self.nodes_max = nodes
        self.founder = founder
        self.asked = False  # whether every other endpoint was
        self._patience = Patience()

    def first_members(self, roster: Roster, now: float) -> tuple[Member, ...]:
        """The members of generation 1, once they are there; empty before, and for others."""
        members = roster.first(self.nodes_max)
        too_few = len(members) < self.nodes_min
        called = self._patience.over("last call", too_few, self.timing.last_call_s, now)
        complete = len(members) == self.nodes_max
        return members if self.founder and self.asked and (complete or called) else ()

    def failure(self, view: View | None, now: float) -> str:
        """Why this agent will not get in, and what to do about it; empty while it may."""
        over = self._patience.over
        full = view is not None and len(view.members) >= self.nodes_max
        if over("job", view is not None, self.timing.join_s, now):
            if self.founder:
                return f"fewer than {self.nodes_min} nodes came: start more, or allow fewer"
            return "nobody founded the job: is the node of the first endpoint up?"
        if over("place", not full, self.timing.full_s, now):
            taken = f"a job of this id already runs here with all its {self.nodes_max} nodes"
            return f"{taken}: choose another job id and endpoint, or allow more nodes"
        return ""
