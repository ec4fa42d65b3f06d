"""Who is suspected of being gone: an opinion, on which `membership` acts and which a view settles.

A closed connection is suspicion at once, silence of `silence_s` is suspicion, and hearing anything
clears it. A process whose own tick comes late was starved itself: it forgives all silence so far.
"""

from collections.abc import Iterable

from outlast.cluster.timing import Timing


class Detector:
    """Watches a set of agents; times in seconds of one monotonic clock."""

    def __init__(self, timing: Timing) -> None:
        self.timing = timing
        self.suspects: dict[str, str] = {}
        self._heard: dict[str, float] = {}
        self._ticked: float | None = None

    def watch(self, agents: Iterable[str], now: float) -> None:
        """Watch exactly these; what is known of those watched before stays known."""
        self._heard = {agent: self._heard.get(agent, now) for agent in agents}
        self.suspects = {a: cause for a, cause in self.suspects.items() if a in self._heard}
        self._ticked = now if self._ticked is None else self._ticked

    def heard(self, agent: str, now: float) -> None:
        """The agent spoke: it is no suspect."""
        if agent in self._heard:
            self._heard[agent] = now
            self.suspects.pop(agent, None)

    def alive(self, agents: Iterable[str]) -> list[str]:
        """Those of them that are not suspects, in their order."""
        return [agent for agent in agents if agent not in self.suspects]

    def closed(self, agent: str, cause: str) -> bool:
        """Its connection ended; whether it is a suspect only now."""
        fresh = agent in self._heard and agent not in self.suspects
        if fresh:
            self.suspects[agent] = cause
        return fresh

    def tick(self, now: float) -> list[tuple[str, str]]:
        """Those that became suspects by silence, with the cause."""
        late = self._ticked is not None and now - self._ticked > self.timing.late_tick_s
        self._ticked = now
        if late:
            self._heard = dict.fromkeys(self._heard, now)
        limit = now - self.timing.silence_s
        silent = [a for a, t in self._heard.items() if t < limit and a not in self.suspects]
        for agent in silent:
            self.suspects[agent] = f"silent for {now - self._heard[agent]:.1f} s"
        return [(agent, self.suspects[agent]) for agent in silent]


class Patience:
    """Since when unsettled things are unsettled, each under its name."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}

    def over(self, what: str, settled: bool, limit_s: float, now: float) -> bool:
        """Whether this has been unsettled for `limit_s`."""
        if settled:
            self._since.pop(what, None)
            return False
        return now - self._since.setdefault(what, now) >= limit_s
