"""How a job ends: well, when nothing more comes from any member, or at a signal.

An elastic job is complete as soon as one worker has ended well, because all have passed the last
step by then. From that moment the view stays as it is: workers that are gone would never connect
again, so nobody is taken in, and nobody is waited for who is not in it.

A signal that one node gets alone takes that node out of the job. One that ends the job (most nodes
get it, or it is SIGUSR1 or SIGINT) becomes part of the view, so that all agree; the ranks enter the
generation as after a loss, bring the step that all of them have to storage, and end.
"""

import asyncio
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING

from outlast.cluster.view import Member
from outlast.launch.config import LaunchConfig
from outlast.launch.crew import dismiss, forward

if TYPE_CHECKING:
    from outlast.launch.agent import Agent


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an incarnation ended: exit code, what to say, whether workers get a grace, what next.

    signal, step: the signal that ended it, and the step that is on storage then; -1 for none.
    """

    code: int
    text: str = ""
    graceful: bool = True
    rejoin: bool = False
    signal: int = 0
    step: int = -1


def goes_on(config: LaunchConfig) -> str:
    """What to do after a job was stopped."""
    return f"the same command with --checkpoint-dir {config.checkpoint_root} goes on"


class Ending:
    """What this agent knows of the end of its job."""

    def __init__(self, agent: "Agent") -> None:
        self._agent = agent
        self.succeeded = self.complete = False
        self.signal: signal.Signals | None = None  # the first that this node got
        self._stored = -1  # the step that was brought to storage
        self._limited = False  # whether the grace runs

    @property
    def stopping(self) -> str:
        """The signal that ends the job, empty while it goes on."""
        return self._agent.view.stopping if self._agent.view is not None else ""

    @property
    def over(self) -> bool:
        """Whether nobody is started any more."""
        return self.complete or bool(self.stopping)

    @property
    def wishes(self) -> dict[str, str]:
        """What this node says of itself: that it has to leave, and whether the job is to stop."""
        if self.signal is None:
            return {"leaving": "", "stopping": ""}
        name = self.signal.name
        return {"leaving": name, "stopping": "" if self.signal == signal.SIGTERM else name}

    def signalled(self, number: signal.Signals) -> None:
        """A signal asks this node to end; a scheduler repeats itself, a person insists by a second
        SIGINT."""
        agent, loop, again = self._agent, asyncio.get_running_loop(), self.signal is not None
        text = f"stopped by {number.name}"
        left = Outcome(128 + number, text, signal=number)
        if agent.outcome.done():
            if number == signal.SIGINT:
                agent.crew.kill()
        elif number == signal.SIGUSR1 and not agent.elastic and forward(agent.crew, number):
            return  # a plain script that has a handler of its own
        elif not self._can_store or (again and number == signal.SIGINT):
            agent.end(left)
        elif not again:
            self.signal = number
            agent.describe()
            if number == signal.SIGTERM:
                loop.call_later(agent.timing.alone_s, lambda: self.stopping or agent.end(left))
            self._limit(number)

    def _limit(self, number: signal.Signals) -> None:
        """From now on the grace runs, if it does not yet."""
        agent, before, self._limited = self._agent, self._limited, True
        if before:
            return
        late = f"the state was not on storage within {agent.grace_s:.0f} s"
        text = f"stopped by {number.name}: {late}"
        outcome = Outcome(128 + number, text, graceful=False, signal=number)
        asyncio.get_running_loop().call_later(agent.grace_s, agent.end, outcome)

    @property
    def _can_store(self) -> bool:
        agent = self._agent
        trains = agent.view is not None and agent.elastic and agent.trained
        return trains and not self.complete and bool(agent.config.checkpoint_dir)

    def stop(self) -> None:
        """The view says that the job stops: whoever does not train ends now."""
        self._limit(signal.Signals[self.stopping])
        dismiss(self._agent.crew)
        if self._agent.spare.waits:
            self._release()
        self._agent.describe()

    def stored(self, step: int) -> None:
        """A worker somewhere has seen the step on storage."""
        self._stored = step
        self.check()
        # It is complete, so that nobody is waited for who cannot be heard any more.
        wait_s = self._agent.timing.silence_s
        asyncio.get_running_loop().call_later(wait_s, self._end_stored)

    def _end_stored(self) -> None:
        if not self.stopping:
            return  # cut off before the view came that says so
        number, config = signal.Signals[self.stopping], self._agent.config
        text = f"stopped by {number.name}; step {self._stored} is in {config.checkpoint_dir}"
        if not config.together:  # else its launcher says it for all islands
            text += f": {goes_on(config)}"
        end = Outcome(128 + number, text, signal=number, step=self._stored)
        self._agent.end(end, broadcast=True)

    def _release(self) -> None:
        for worker in self._agent.crew.attached:
            worker.send({"kind": "complete"})

    def succeed(self) -> None:
        """A worker somewhere ended well."""
        self.succeeded = True
        if self._agent.elastic and not self.complete:
            self.complete = True
            dismiss(self._agent.crew)
            self._release()

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
            if self.stopping and self._stored >= 0:
                self._end_stored()
            elif self.succeeded:
                agent.end(Outcome(0), broadcast=True)
            else:
                agent.fail("every worker was lost")
