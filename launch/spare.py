"""A node that waits for another's place: its agent votes, its workers are prepared and stand by.

Which member is a spare stands in the view. Invariant: a spare offers its workers only when every
one of them is ready, so that the view that takes it in can be connected at once; and what goes
wrong on it is nobody's loss.
"""

from typing import TYPE_CHECKING

from outlast.cluster.view import Member, View, Worker

if TYPE_CHECKING:
    from outlast.launch.agent import Agent


class Spare:
    """What this agent does while it is one."""

    def __init__(self, agent: "Agent") -> None:
        self._agent = agent
        self._ready = False

    @property
    def waits(self) -> bool:
        """Whether this node waits for another's place."""
        view = self._agent.view
        seat = view.member(self._agent.agent) if view is not None else None
        return seat is not None and seat.spare

    def offer(self) -> tuple[Worker, ...]:
        """The workers that this node takes part with, or would if it had a place."""
        crew, before = self._agent.crew, self._ready
        if not self.waits:
            return crew.workers()
        self._ready = crew.complete and crew.started
        if self._ready and not before:
            self._agent.event("spare_ready")
        return crew.workers() if crew.complete else ()

    def described(self, member: Member) -> None:
        """Another agent said how it is: this is how a spare learns what job this is. That it has
        trained is passed on, so that those who never did know it when nobody else is left."""
        agent = self._agent
        if member.trained and not agent.trained:
            agent.trained = True
            agent.describe()
        agent.ending.described(member)
        if self.waits and agent.view is not None:
            self.follow(agent.view)

    def follow(self, view: View) -> None:
        """Start the workers, once it is known that they will wait: those of a plain job train."""
        agent = self._agent
        over = agent.ending.complete or agent.outcome.done()
        if agent.elastic and not agent.crew.started and not over:
            agent.crew.start(view, agent.mesh.me, member=False)
            agent.describe()
