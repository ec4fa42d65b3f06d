"""How an agent that is in no view gets into one: the founder's first view, or a place in a job.

Only the founder forms generation 1, so that two halves of a job can never found it twice. It waits
until every other endpoint was asked whether the job is running already.
"""

from outlast.cluster.detector import Patience
from outlast.cluster.roster import Roster, Seats
from outlast.cluster.timing import Timing
from outlast.cluster.view import Member, View


class Founding:
    """The rules for an agent outside; `seats` are those of the job."""

    def __init__(self, timing: Timing, seats: Seats, *, founder: bool) -> None:
        self.timing = timing
        self.seats = seats
        self.founder = founder
        self.asked = False  # whether every other endpoint was
        self._patience = Patience()

    def first_members(self, roster: Roster, now: float) -> tuple[Member, ...]:
        """The members of generation 1, once they are there; empty before, and for others."""
        members = roster.first(self.seats)
        too_few = len(members) < self.seats.least
        called = self._patience.over("last call", too_few, self.timing.last_call_s, now)
        complete = len(members) == self.seats.all
        return members if self.founder and self.asked and (complete or called) else ()

    def failure(self, view: View | None, now: float) -> str:
        """Why this agent will not get in, and what to do about it; empty while it may."""
        over = self._patience.over
        full = view is not None and len(view.members) >= self.seats.all
        if over("job", view is not None, self.timing.join_s, now):
            if self.founder:
                return f"fewer than {self.seats.least} nodes came: start more, or allow fewer"
            return "nobody founded the job: is the node of the first endpoint up?"
        if over("place", not full, self.timing.full_s, now):
            taken = f"a job of this id already runs here with all its {self.seats.all} nodes"
            return f"{taken}: choose another job id and endpoint, or allow more nodes or spares"
        return ""
