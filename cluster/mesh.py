"""Drives the membership machine with sockets and a clock (interface; the body follows)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from outlast.cluster.errors import Misuse
from outlast.cluster.timing import Timing
from outlast.cluster.view import Member, View


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Which job this is: `key` authenticates its agents, `endpoints` are where they look for each
    other."""

    job_id: str
    key: bytes
    endpoints: tuple[tuple[str, int], ...]
    min_nodes: int
    max_nodes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Callbacks:
    """What the agent is told; called from the event loop, must not block.

    on_install(view, detected, agreed, proposer): this agent is in the view; the times are
    `time.time()`. on_running(view): a job is running without this agent: describe() and
    request_join() once its workers are ready. on_described(member): the latest self-description of
    any agent. on_failed(error): this mesh will never be in a view; the text says what to do.
    """

    on_install: Callable[[View, float, float, str], None]
    on_running: Callable[[View], None]
    on_described: Callable[[Member], None]
    on_message: Callable[[str, dict[str, Any]], None]
    on_suspect: Callable[[str, str, str], None]
    on_refused: Callable[[str], None]
    on_evicted: Callable[[], None]
    on_no_quorum: Callable[[], None]
    on_failed: Callable[[Misuse], None]


class Mesh:
    """The control plane of one agent."""

    def __init__(self, job: Job, me: Member, timing: Timing, callbacks: Callbacks) -> None:
        self.me = me
        self.view: View | None = None
        self.members: dict[str, Member] = {}

    async def start(self) -> tuple[str, int]:
        """Bind, listen and begin to dial; returns the control address that others dial."""
        raise NotImplementedError

    def describe(self, member: Member) -> None:
        """Tell everybody this agent's new description; a change of shape becomes a new generation."""
        raise NotImplementedError

    def request_join(self) -> None:
        """From now on this agent wants to be in the view."""
        raise NotImplementedError

    def broadcast(self, message: dict[str, Any]) -> None:
        """Send a message to every other member of the view, queued while its link is down."""
        raise NotImplementedError

    async def stop(self) -> None:
        """Say goodbye, close every connection and the listening socket."""
        raise NotImplementedError
