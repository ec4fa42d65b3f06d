"""Where the agents of a job look for each other, and what became of each try.

The endpoints are dialled until an agent answers there, by every agent and for ever: so a node that
comes back at an endpoint is told where the job is before it could found it a second time.
"""

from outlast.cluster.detector import Patience
from outlast.cluster.roster import Address
from outlast.cluster.timing import Timing


class Endpoints:
    """The addresses of one job, as one agent knows them."""

    def __init__(self, addresses: tuple[Address, ...], timing: Timing) -> None:
        self.addresses = addresses
        self.timing = timing
        self._unasked = set(addresses)
        self._agents: dict[Address, str] = {}
        self._patience = Patience()
        self._dialled: float | None = None

    @property
    def asked(self) -> bool:
        """Whether every endpoint has answered or was out of reach, once."""
        return not self._unasked

    def due(self, period_s: float, now: float) -> list[Address]:
        """Those to dial now; each about every `period_s`."""
        if self._dialled is not None and now - self._dialled < period_s:
            return []
        self._dialled = now
        return [address for address in self.addresses if address not in self._agents]

    def linked(self, address: Address | None, agent: str, now: float) -> None:
        """This agent is at that address."""
        if address is not None and address in self.addresses:
            self._agents[address] = agent
            self._patience.over(repr(address), True, 0, now)

    def answered(self, address: Address | None) -> None:
        """The agent there said what it knows."""
        if address is not None:
            self._unasked.discard(address)

    def gone(self, agent: str) -> None:
        """This agent is no longer linked."""
        self._agents = {a: known for a, known in self._agents.items() if known != agent}

    def failed(self, address: Address, reached: bool, now: float) -> bool:
        """A dial came to nothing; whether something else has answered there for `full_s`."""
        self.answered(address)
        taken = reached and address in self.addresses
        return self._patience.over(repr(address), not taken, self.timing.full_s, now)
