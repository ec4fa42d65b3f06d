"""Every deadline of the product, derived from one number: the heartbeat.

A hierarchy of hand-tuned timeouts drifts until an outer one fires before an inner one. Here each
deadline is a multiple of `heartbeat_s` with its reason beside it, so the longest possible wait is
computable and the order of the deadlines is fixed.
"""

from dataclasses import dataclass

from outlast.cluster.errors import Misuse


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """All waits in seconds; `heartbeat_s` is how often an agent says that it is alive."""

    heartbeat_s: float = 0.5

    def __post_init__(self) -> None:
        if not 0.01 <= self.heartbeat_s <= 60:
            raise Misuse(f"heartbeat of {self.heartbeat_s} s: choose 0.01 to 60 s")

    @property
    def tick_s(self) -> float:
        """How often a machine is told the time: a fraction of the heartbeat, so that deadlines
        fire close to on time."""
        return self.heartbeat_s / 5

    @property
    def silence_s(self) -> float:
        """Silence after which a peer is suspect: healthy agents on an overloaded machine were
        measured up to 1 s late."""
        return 4 * self.heartbeat_s

    @property
    def busy_silence_s(self) -> float:
        """Silence after which even a process that still burns CPU is lost: it is in a loop, not in
        a long kernel."""
        return 10 * self.silence_s

    @property
    def late_tick_s(self) -> float:
        """Gap between own ticks beyond which this process was starved itself and nobody else is to
        blame."""
        return self.tick_s + self.heartbeat_s

    @property
    def connect_s(self) -> float:
        """One dial of a control address: a live host answers in milliseconds, a dead one does not
        answer at all."""
        return 2 * self.heartbeat_s

    @property
    def handshake_s(self) -> float:
        """From an accepted connection to its first authenticated frame; a stranger holds a slot no
        longer than this."""
        return 4 * self.heartbeat_s

    @property
    def promise_s(self) -> float:
        """How long a proposer with a quorum of promises waits for the other live members: so that
        a false suspect can answer."""
        return self.heartbeat_s / 2

    @property
    def retry_s(self) -> float:
        """A proposal that is not decided by then starts over with a higher ballot; must exceed
        `promise_s` plus a round trip."""
        return 2 * self.heartbeat_s

    @property
    def last_call_s(self) -> float:
        """With the minimum of nodes there, how long the founder waits for more: longer than nodes
        of one job start apart."""
        return 10 * self.heartbeat_s

    @property
    def full_s(self) -> float:
        """How long a newcomer finds the job full before it gives up: a predecessor's death is
        noticed well within this."""
        return 2 * self.silence_s

    @property
    def no_quorum_s(self) -> float:
        """How long a member outlives the loss of its quorum: longer than a link flap plus a
        redial, shorter than a meeting."""
        return 3 * self.silence_s

    @property
    def join_s(self) -> float:
        """How long an agent looks for a job that nobody has founded yet: nodes of one allocation
        start minutes apart."""
        return 600 * self.heartbeat_s

    @property
    def rebuild_s(self) -> float:
        """Building the process group of a generation: a peer that dies meanwhile shows only as
        this deadline."""
        return 10 * self.heartbeat_s

    @property
    def poll_s(self) -> float:
        """Slice in which a wait for a collective looks at the generation: an abort is noticed this
        fast at worst."""
        return self.heartbeat_s / 25

    @property
    def collective_s(self) -> float:
        """A collective whose peers are all called alive: longer than any silence, so the agents
        decide first."""
        return 2 * self.busy_silence_s

    @property
    def grace_s(self) -> float:
        """From SIGTERM to SIGKILL for a worker: time to write what it holds; schedulers commonly
        give 30 s in all."""
        return 50 * self.heartbeat_s
