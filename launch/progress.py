"""What is said about a job: one line per change of membership and per recovery.

Invariant: only the agent of the first member speaks for the job, so that every line appears once
however many nodes share a console.
"""

from collections import deque
from collections.abc import Sequence

from outlast.cluster.view import View
from outlast.launch.console import Console
from outlast.launch.link import Message

REFUSED_MAX = 16  # causes on the console
TURNS = 10  # of the first fragment, from one word about the exchange to the next


class Progress:
    """Turns views and events into lines of the console."""

    def __init__(self, console: Console, job: str, log_dir: str, agent: str) -> None:
        self._console, self._job, self._log_dir, self._agent = console, job, log_dir, agent
        self.causes: dict[str, str] = {}  # agent -> why it was lost
        self._recovered = 0
        self._islands: list[int] = []  # that had a share in what was merged last
        self._rounds = self._turns = 0  # of all fragments, of the first one
        self._waited_s = 0.0
        self._refused: set[str] = set()  # why
        self._early: deque[str] = deque(maxlen=8)  # what there was to say before the first view
        self._view: View | None = None

    @property
    def speaks(self) -> bool:
        """Whether this agent is the first member."""
        return self._view is not None and self._view.members[0].agent == self._agent

    @property
    def hosts_rank_0(self) -> bool:
        """Whether rank 0, which sees every step, is a worker of this agent."""
        workers = self._view.workers if self._view else ()
        return bool(workers) and workers[0][0].agent == self._agent

    def say(self, text: str) -> None:
        """A line about the job, if this agent speaks for it."""
        if self._view is None:
            self._early.append(text)
        elif self.speaks:
            self._console.line(text)

    def install(self, view: View, detected: float, agreed: float) -> None:
        """A new generation."""
        before, self._view = self._view, view
        size = f"{_count(len(view.active), 'node')}, {_count(len(view.workers), 'worker')}"
        if spares := len(view.members) - len(view.active):
            size += f", {_count(spares, 'spare')}"
        if before is None and view.generation == 1:
            self.say(f"job {self._job}: {size}; logs in {self._log_dir}")
        elif before is not None:
            changes = self._changes(before, view) or "order changed"
            took = f"agreed in {max(0.0, agreed - detected) * 1000:.0f} ms"
            self.say(f"generation {view.generation}: {changes}, {size}; {took}")
        while self._early:
            self.say(self._early.popleft())

    def recovered(self, message: Message) -> None:
        """A worker has recovered: said once per generation."""
        generation, phases = message.get("generation"), message.get("phases")
        if not isinstance(generation, int) or generation <= self._recovered:
            return
        self._recovered = generation
        took = sum(phases.values()) if isinstance(phases, dict) else 0.0
        rungs = message.get("rungs")
        names = ", ".join(rungs) if isinstance(rungs, dict) and rungs else "nothing was lost"
        step = message.get("step")
        if generation == 1:
            self.say(f"training starts at step {step}")
        else:
            went = f"goes on at step {step} after {took:.0f} ms ({names})"
            self.say(f"generation {generation}: {went}")

    def loaded(self, message: Message) -> None:
        """A worker has read its part of a step from storage: said once."""
        if message.get("rank") == 0:
            by = ", which another program wrote" if message.get("foreign") else ""
            self._console.line(f"step {message.get('step')} read from {message.get('path')}{by}")

    def told(self, name: str, message: Message) -> None:
        """What one worker, wherever it is, says of another and people should know."""
        say = self._console.line
        node, rank, step = (message.get(key) for key in ("peer_node", "rank", "step"))
        if name == "poisoned":
            how = "that is not finite" if message.get("how") == "not finite" else "that is wrong"
            found = f"{node} (rank {rank}) computed a gradient {how}"
            say(f"step {step}: {found}; it is {message.get('action')}")
        elif name == "slow_rank":
            say(f"{node} (rank {rank}) takes {message.get('ratio')} times as long as others")
        elif name == "averaged":
            units = message.get("units")
            what = f"{_count(len(units), 'block')}" if isinstance(units, list) else "blocks"
            self.say(f"step {step}: LOSSY: {what} averaged from the neighbours; training goes on")
        elif name == "saved":
            say(f"step {step} is on storage after {message.get('seconds')} s")
        elif name == "save_failed":
            say(f"step {step} is not on storage: {message.get('cause')}")
        elif name == "passed_over":
            say(f"goes on from step {step}, not from a newer one: {message.get('cause')}")
        elif name == "save_skipped":
            slow = f"that of step {message.get('saving')} takes {message.get('seconds')} s so far"
            say(f"step {step}: no save, {slow} (ranks {message.get('ranks')})")
        elif name == "outer":
            self._outer(message)
        elif name == "island_refused":
            self._refuse(str(message.get("cause")))
        elif name == "island_entered":
            self.say(f"step {step}: entered with the state of island {message.get('donor')}")
        elif name == "island_waiting":
            names = ", ".join(map(str, message.get("islands") or ()))
            self.say(f"waits up to {message.get('limit_s')} s for island {names}")
        elif name == "island_missed":
            lost, fragment = message.get("island"), message.get("fragment")
            self.say(f"step {step}: without island {lost}, which did not send fragment {fragment}")
        elif name == "island_behind":
            self.say(f"step {step}: others went on without this island; their state is taken")
        elif name == "island_forked":
            self.say(f"step {step}: others know more of the outer parameters; their state is taken")
        elif name == "rebalanced":
            say(f"leaves are dealt by speed, in rank order {message.get('weights')}")

    def reach(self, before: Sequence[int], now: Sequence[int]) -> None:
        """Other islands came into reach, or went out of it."""
        for islands, where in ((set(now) - set(before), "in"), (set(before) - set(now), "out of")):
            for island in sorted(islands):
                self.say(f"island {island} is {where} reach")

    def _refuse(self, cause: str) -> None:
        """What was said to be an island is none: once for each cause, and not without end."""
        if cause not in self._refused and len(self._refused) < REFUSED_MAX:
            self._refused.add(cause)
            self.say(f"an island is refused: {cause}")

    def _outer(self, message: Message) -> None:
        """A fragment was merged: said when other islands than before had a share in it, and now
        and then what all that has cost."""
        names = ("islands", "fragment", "step", "waited_s", "bytes")
        islands, fragment, step, waited_s, size = (message.get(name) for name in names)
        if isinstance(islands, list) and islands != self._islands:
            self._islands = islands
            which = f"fragment {fragment} of islands {', '.join(map(str, islands))} is merged"
            self.say(f"step {step}: {which}")
        if isinstance(waited_s, float) and isinstance(size, int):
            self._rounds, self._waited_s = self._rounds + 1, self._waited_s + waited_s
            self._turns += fragment == 0
            if fragment == 0 and self._turns % TURNS == 0:
                cost = f"waited {self._waited_s:.1f} s, {size / 1e6:.3g} MB sent by rank 0"
                self.say(f"step {step}: {self._rounds} rounds so far, {cost}")

    def _changes(self, before: View, view: View) -> str:
        stops = view.stopping and not before.stopping
        texts = [f"{view.stopping}, the job stops"] if stops else []
        for member in before.members:
            now = view.member(member.agent)
            if now is None:
                what = f"spare {member.node}" if member.spare else member.node
                texts.append(f"lost {what} ({self.causes.get(member.agent, 'gone')})")
                continue
            if now.spare or member.spare:  # whose workers come and go unnoticed
                texts += [] if now.spare else [f"spare {member.node} takes a place"]
                continue
            holders = {worker.holder for worker in now.workers}
            gone = [w for w in member.workers if w.holder not in holders]
            texts += [f"lost worker {w.local_rank} of {member.node}" for w in gone]
            known = {worker.holder for worker in member.workers}
            back = [w for w in now.workers if w.holder not in known]
            texts += [f"worker {w.local_rank} of {member.node} is back" for w in back]
            if now.restarts > member.restarts:
                texts.append(f"restart {now.restarts} asked by {member.node}")
        fresh = [member for member in view.members if before.member(member.agent) is None]
        texts += [f"{m.node} joined" + (" as a spare" if m.spare else "") for m in fresh]
        return ", ".join(texts)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
