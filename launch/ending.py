"""How a job ends well: when nothing more comes from any member.

An elastic job is complete as soon as one worker has ended well, because all have passed the last
step by then. From that moment the view stays as it is: workers that are gone would never connect
again, so nobody is taken in, and nobody is waited for who is not in it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from outlast.cluster.view import Member
from outlast.launch.crew import dismiss

if TYPE_CHECKING:
    from outlast.launch.agent import Agent


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an incarnation ended: exit code, what to say, whether workers get a grace, what next."""

    code: int
    text: str = ""
    graceful: bool = True
    rejoin: bool = False


class Ending:
    """What this agent knows of the end of its job."""

    def __init__(self, agent: "Agent") -> None:
        self._agent = agent
        self.succeeded = self.complete = False

    def succeed(self) -> None:
        """A worker somewhere ended well."""
        self.succeeded = True
        if self._agent.elastic and not self.complete:
            self.complete = True
            dismiss(self._agent.crew)
            for worker in self._agent.crew.attached:
                worker.send({"kind": "complete"})

    def described(self, member: Member) -> None:
        """Another agent said how it is."""
        if member.complete and self._agent.running is not None and self._agent.view is None:
            self._agent.end(Outcome(0, "the job was complete before this node could join"))
        self.check()

    def check(self) -> None:
        """End if every member is done."""
        agent = self._agent
        if agent.view is None or agent.outcome.done() or not agent.crew.settled:
            return
        # Spares of a plain job have nothing to end: they hear of it.
        present = agent.view.members if agent.elastic else agent.view.active
        # Nobody is taken out of the view of a complete job, so who is gone is not waited for.
        gone = agent.mesh.detector.suspects if self.complete else ()
        others = [m for m in present if m.agent != agent.agent and m.agent not in gone]
        if all(agent.mesh.members.get(m.agent, m).finished for m in others):
            if self.succeeded:
                agent.end(Outcome(0), broadcast=True)
            else:
                agent.fail("every worker was lost")
