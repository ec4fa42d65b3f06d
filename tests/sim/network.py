"""Machines and the wires between them: delays, partitions, cuts.

Every connection is TCP-like: bytes arrive in order or the connection ends. A partition holds back
what is sent until it is healed, and no end learns of it; `cut` ends connections at once.
"""

from sim.world import World


class Network:
    """Which machines reach each other, and how long it takes."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.side: dict[int, int] = {}  # machines of different sides do not reach each other
        self.dead: set[int] = set()  # machines without power
        self.latency_s = world.random.choice([0.0002, 0.001, 0.004])

    def delay(self, a: int, b: int) -> float:
        """Of one message, in seconds."""
        if a == b:
            return 0.00002
        return self.latency_s * (0.5 + self.world.random.random())

    def reachable(self, a: int, b: int) -> bool:
        """Whether a message gets from one machine to the other now."""
        if a == b:
            return True
        return self.side.get(a, 0) == self.side.get(b, 0) and not {a, b} & self.dead
