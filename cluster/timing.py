"""Every deadline of the product, derived from one number: the heartbeat.

A hierarchy of hand-tuned timeouts drifts until an outer one fires before an inner one. Here each
deadline is a multiple of `heartbeat_s` with its reason beside it, so the longest possible wait is
computable and the order of the deadlines is fixed.
"""

from dataclasses import dataclass

from outlast.cluster.errors import Misuse


class Beats:
    """A duration of so many heartbeats, in seconds when read from a `Timing`."""

    def __init__(self, count: float) -> None:
        self.count = count

    def __get__(self, timing: "Timing", owner: type | None = None) -> float:
        return self.count * timing.heartbeat_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """All waits in seconds; `heartbeat_s` is how often an agent says that it is alive."""

    heartbeat_s: float = 0.5

    # How often a machine is told the time: a fraction, so that deadlines fire close to on time.
    tick_s = Beats(0.2)
    # A gap between own ticks beyond this: this process was starved, nobody else is to blame.
    late_tick_s = Beats(1.2)
    # Silence that makes a peer suspect: healthy ones on a loaded machine were up to 1 s late.
    silence_s = Beats(4)
    # Silence of a process that still burns CPU: no kernel launch or page-in takes this long.
    busy_silence_s = Beats(40)

    # One dial of a control address: a live host answers in milliseconds, a dead one never.
    connect_s = Beats(2)
    # From a connection to its first authenticated frame: a stranger holds a slot no longer.
    handshake_s = Beats(4)
    # With a quorum of promises there, the wait for the rest: a false suspect can still answer.
    promise_s = Beats(0.5)
    # An undecided proposal starts over with a higher ballot: more than `promise_s` + round trips.
    retry_s = Beats(2)

    # With the fewest nodes there, the founder waits for more: nodes of one job start apart.
    last_call_s = Beats(10)
    # A newcomer that finds the job full gives up: a predecessor's death is noticed long before.
    full_s = Beats(12)
    # A member without a quorum gives up: longer than a lost link and its redial.
    no_quorum_s = Beats(12)
    # A search for a job that nobody has founded: nodes of one allocation boot minutes apart.
    join_s = Beats(600)

    # A node that is told to leave waits whether most others are, too: then the whole job ends.
    alone_s = Beats(3)

    # Building the groups of a generation: a peer that dies meanwhile shows only like this.
    rebuild_s = Beats(10)
    # Slices of a wait for a collective: how late an abort is noticed at worst.
    poll_s = Beats(0.04)
    # A collective among peers that are all called alive: longer than any silence.
    collective_s = Beats(80)
    # How long ranks wait for one that computes before it may be called hung: longer than a pause of
    # a collector, a loader or a page-in; a leaf that always takes long gets more, see `standstill`.
    stall_s = Beats(20)
    # The longest they wait: with two beats until an agent knows, less than `collective_s`.
    stalled_s = Beats(70)
    # From SIGTERM to SIGKILL for a worker; schedulers commonly give 30 s in all.
    grace_s = Beats(50)

    def __post_init__(self) -> None:
        if not 0.01 <= self.heartbeat_s <= 60:
            raise Misuse(f"a heartbeat of {self.heartbeat_s} s: choose 0.01 to 60 s")
