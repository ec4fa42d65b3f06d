"""What a drill is asked to do to a job: orders, written as `kill-node@step=30,phase=move`.

    order   kind[@key=value,...]
    SPEC    order[+order...]: at the same moment, or at a phase of the recovery from the first

Keys: `step` (steps that are committed first), `phase` (a failpoint: strike whoever stands there),
`node` (the victim), `factor` (of slow), `how` (of hang, poison). Pure.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from outlast.cluster.errors import Misuse
from outlast.cluster.failpoint import AGENT, POINTS, RECOVERY, STEP

# Each kind with its ways, the first being the default.
KINDS: dict[str, tuple[str, ...]] = {
    "kill-worker": ("",),
    "kill-node": ("",),
    "kill-proposer": ("",),
    "hang": ("stop", "block", "node"),
    "partition": ("",),
    "slow": ("",),
    "corrupt-snapshot": ("",),
    "poison": ("nan", "scale", "flip"),
}
NODE_KINDS = ("kill-node", "kill-proposer", "partition")  # what takes a whole node away
DRAWN = tuple(kind for kind in KINDS if kind not in ("partition", "slow", "poison"))


@dataclass(frozen=True, slots=True)
class Order:
    """One fault to inject; empty or None where nothing was asked for."""

    kind: str
    step: int = 0
    phase: str = ""
    node: str = ""
    factor: float = 3.0
    how: str = ""

    def __str__(self) -> str:
        given = {"step": self.step, "phase": self.phase, "node": self.node}
        given |= {"factor": self.factor} if self.kind == "slow" else {}
        given |= {"how": self.how} if self.how != KINDS[self.kind][0] else {}
        keys = ",".join(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
                        for name, value in given.items() if value)  # fmt: skip
        return f"{self.kind}@{keys}" if keys else self.kind

    @property
    def within(self) -> bool:
        """Whether it strikes within a recovery from something else."""
        return self.phase in (*RECOVERY, *AGENT)

    @property
    def takes_node(self) -> bool:
        """Whether its victim is a whole node."""
        return self.kind in NODE_KINDS or (self.kind, self.how) == ("hang", "node")


Salvo = tuple[Order, ...]


def parse(text: str) -> Salvo:
    """Read one SPEC; an order within a recovery that nothing begins gets a killed worker before it.

    Raises:
        Misuse: it makes no sense; says what would.
    """
    salvo = tuple(_order(part.strip(), text) for part in text.split("+"))
    if salvo[0].within:
        salvo = (Order("kill-worker", salvo[0].step), *salvo)
    return tuple(replace(order, step=salvo[0].step) for order in salvo)


def _order(text: str, spec: str) -> Order:
    kind, _, rest = text.partition("@")
    if kind not in KINDS:
        raise Misuse(f"--fault {spec!r}: {kind!r} is none of {', '.join(KINDS)}")
    given = {}
    for pair in filter(None, (word.strip() for word in rest.split(","))):
        name, sign, value = pair.partition("=")
        if not sign or name not in ("step", "phase", "node", "factor", "how"):
            raise Misuse(f"--fault {spec!r}: {pair!r} is not step=, phase=, node=, factor= or how=")
        given[name] = value
    how, phase = given.get("how", KINDS[kind][0]), given.get("phase", "")
    if how not in KINDS[kind]:
        ways = ", ".join(filter(None, KINDS[kind])) or "nothing to choose"
        raise Misuse(f"--fault {spec!r}: how={how!r}; {kind} has {ways}")
    if how == "block":  # the script stands still, the link thread answers
        phase = phase or "leaf"
    if phase and phase not in POINTS:
        raise Misuse(f"--fault {spec!r}: phase={phase!r} is none of {', '.join(POINTS)}")
    try:
        step, factor = int(given.get("step", 0)), float(given.get("factor", 3))
    except ValueError:
        raise Misuse(f"--fault {spec!r}: step and factor are numbers") from None
    if step < 0 or not 1 < factor <= 100:
        raise Misuse(f"--fault {spec!r}: step is 0 or more, factor between 1 and 100")
    return Order(kind, step, phase, given.get("node", ""), factor, how)


def draw(generator: random.Random, kinds: Sequence[str]) -> Salvo:
    """A random fault: at any moment of a step, at a point of it, or with one in its recovery."""
    kind = generator.choice(list(kinds))
    how = generator.choice(KINDS[kind])
    order = Order(kind, how=how, phase="leaf" if how == "block" else "")
    plain = not order.phase and kind not in ("slow", "poison", "corrupt-snapshot")
    if plain and generator.random() < 0.4:
        order = replace(order, phase=generator.choice(STEP))
    if generator.random() < 0.15 and kind in ("kill-worker", "kill-node"):
        return order, Order("kill-worker", phase=generator.choice(RECOVERY))
    return (order,)
