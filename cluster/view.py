"""Who is in the job: a view is a numbered, ordered list of members, each an agent with its workers.

Views are agreed one generation at a time (see `agreement`). Invariants of the type: agents and
holders are unique, so that a rank names one process and a vote is counted once. Two quorums of one
view always share a member.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from outlast.cluster.errors import Misuse

MEMBERS_MAX = 4096
WORKERS_MAX = 1024
TEXT_MAX = 256
MAY_BE_EMPTY = frozenset({"rack", "leaving", "stopping"})

T = TypeVar("T")


def field(data: object, name: str, kind: type[T], low: int = 0, high: int = 1 << 62) -> T:
    """The field `name` of a decoded JSON object, of exactly type `kind`; integers within [low,
    high], text bounded and not empty (unless it may be)."""
    value = data.get(name) if isinstance(data, Mapping) else None
    if type(value) is not kind:
        raise Misuse(f"{name}: expected {kind.__name__}, got {type(value).__name__}")
    if isinstance(value, int) and not low <= value <= high:
        raise Misuse(f"{name}: {value} is not within {low}..{high}")
    if isinstance(value, str) and not (name not in MAY_BE_EMPTY) <= len(value) <= TEXT_MAX:
        raise Misuse(f"{name}: text of 1..{TEXT_MAX} characters expected")
    return value


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker process: its identity and its place on its node."""

    holder: int
    local_rank: int


@dataclass(frozen=True, slots=True)
class Member:
    """An agent as it describes itself; its seat, `spare`, is the proposer's word.

    host, port: the control address that others dial. workers: those that take part in the data
    plane. restarts: bumped to make everybody restart. finished: all its workers ended with 0.
    elastic: its workers speak outlast. memories: how many memories of dead workers it keeps for
    workers that will come back. complete: a worker ended well, so the view stays as it is. rack:
    what it shares with the nodes that fail with it, empty if unknown. trained: it knows that the
    job has committed a step. spare: it votes, and its workers wait for the place of a lost member.
    leaving: the signal that asked this node to end. stopping: the signal that ends the whole job,
    with its state on storage.
    """

    agent: str
    node: str
    host: str
    port: int
    workers: tuple[Worker, ...]
    restarts: int = 0
    finished: bool = False
    elastic: bool = False
    memories: int = 0
    complete: bool = False
    rack: str = ""
    trained: bool = False
    spare: bool = False
    leaving: str = ""
    stopping: str = ""

    def shape(self) -> tuple[object, ...]:
        """What a generation is about: two descriptions of one shape differ only in notes, which
        change no rank. The workers of a spare have none yet."""
        workers = () if self.spare else self.workers
        seat = (self.agent, self.host, self.port, workers)
        return (*seat, self.restarts, self.spare, self.stopping)

    def as_json(self) -> dict[str, object]:
        """A plain dict for JSON."""
        # Not `asdict`: it copies deeply, and took most of the time of an agreement.
        workers = [{"holder": w.holder, "local_rank": w.local_rank} for w in self.workers]
        return {**{name: getattr(self, name) for name in self.__slots__}, "workers": workers}

    @staticmethod
    def from_json(data: object) -> "Member":
        """The inverse of `as_json`; raises Misuse on anything else."""
        workers = field(data, "workers", list)
        if len(workers) > WORKERS_MAX:
            raise Misuse(f"workers: {len(workers)} on one node, at most {WORKERS_MAX}")
        member = Member(
            agent=field(data, "agent", str),
            node=field(data, "node", str),
            host=field(data, "host", str),
            port=field(data, "port", int, 0, 65535),
            workers=tuple(
                Worker(field(w, "holder", int), field(w, "local_rank", int)) for w in workers
            ),
            restarts=field(data, "restarts", int),
            finished=field(data, "finished", bool),
            elastic=field(data, "elastic", bool),
            memories=field(data, "memories", int),
            complete=field(data, "complete", bool),
            rack=field(data, "rack", str),
            trained=field(data, "trained", bool),
            spare=field(data, "spare", bool),
            leaving=field(data, "leaving", str),
            stopping=field(data, "stopping", str),
        )
        _unique("local_rank", [worker.local_rank for worker in member.workers])
        return member


@dataclass(frozen=True, slots=True)
class View:
    """One generation of the membership; rank order is member order, then the order of each
    member's workers."""

    generation: int
    members: tuple[Member, ...]

    @property
    def active(self) -> tuple[Member, ...]:
        """The members that train: all but the spares."""
        return tuple(member for member in self.members if not member.spare)

    @property
    def workers(self) -> tuple[tuple[Member, Worker], ...]:
        """Every worker of the data plane with its member, in rank order."""
        return tuple((member, worker) for member in self.active for worker in member.workers)

    @property
    def agents(self) -> tuple[str, ...]:
        """The members' agents in view order."""
        return tuple(member.agent for member in self.members)

    @property
    def stopping(self) -> str:
        """The signal that ends the job, empty while it goes on."""
        return next((member.stopping for member in self.members if member.stopping), "")

    def quorum(self, agents: Iterable[str]) -> bool:
        """Whether these agents may decide for the view: a majority of it, or exactly half with its
        first member."""
        voters = set(agents) & set(self.agents)
        if 2 * len(voters) == len(self.members):
            return self.members[0].agent in voters
        return 2 * len(voters) > len(self.members)

    def member(self, agent: str) -> Member | None:
        """The member of that agent, or None."""
        return next((member for member in self.members if member.agent == agent), None)

    def as_json(self) -> dict[str, object]:
        """A plain dict for JSON."""
        return {"generation": self.generation, "members": [m.as_json() for m in self.members]}

    @staticmethod
    def from_json(data: object) -> "View":
        """The inverse of `as_json`; raises Misuse on anything else."""
        return View(
            field(data, "generation", int, 1), members_from_json(field(data, "members", list))
        )


def members_from_json(data: object) -> tuple[Member, ...]:
    """A decoded list of members, non-empty, with unique agents and holders; raises Misuse on
    anything else."""
    if not isinstance(data, list) or not 0 < len(data) <= MEMBERS_MAX:
        raise Misuse(f"members: a list of 1..{MEMBERS_MAX} expected")
    members = tuple(Member.from_json(item) for item in data)
    _unique("agent", [member.agent for member in members])
    _unique("holder", [worker.holder for member in members for worker in member.workers])
    return members


def _unique(name: str, values: list[T]) -> None:
    if len(set(values)) != len(values):
        raise Misuse(f"{name}: the same one twice")
