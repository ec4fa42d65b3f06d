"""What the membership machine is told and what it asks for; times are of one monotonic clock."""

from dataclasses import dataclass
from typing import Any

from outlast.cluster.view import Member, View


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passes; due every `tick_s`."""

    now: float


@dataclass(frozen=True, slots=True)
class Connected:
    """There is an authenticated link to this agent (the only one; a second one is no event)."""

    now: float
    agent: str


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The link to this agent is gone; nothing more is received on it."""

    now: float
    agent: str
    cause: str


@dataclass(frozen=True, slots=True)
class Received:
    """A message of this agent."""

    now: float
    agent: str
    message: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Described:
    """This agent describes itself anew."""

    now: float
    member: Member


@dataclass(frozen=True, slots=True)
class Ready:
    """This agent wants to be in the view from now on."""

    now: float


@dataclass(frozen=True, slots=True)
class Asked:
    """Every other endpoint was asked for a running job or could not be reached."""

    now: float


Event = Tick | Connected | Disconnected | Received | Described | Ready | Asked


@dataclass(frozen=True, slots=True)
class Send:
    """Send to a connected agent; without effect where the link is gone."""

    to: str
    message: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Dial:
    """Try to connect to this control address, unless a try is under way."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Install:
    """This agent is in the new view; `detected` is when it first learnt of the change."""

    view: View
    proposer: str
    detected: float


@dataclass(frozen=True, slots=True)
class Running:
    """A job is running without this agent."""

    view: View


@dataclass(frozen=True, slots=True)
class Learned:
    """An agent's latest description of itself."""

    member: Member


@dataclass(frozen=True, slots=True)
class Suspect:
    """For the log: this member is suspected of being gone."""

    agent: str
    node: str
    cause: str


@dataclass(frozen=True, slots=True)
class Evicted:
    """The others went on without this agent; the machine is over."""

    view: View


@dataclass(frozen=True, slots=True)
class NoQuorum:
    """The members that can be reached are no quorum of the view; the machine is over."""

    view: View
    alive: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Failed:
    """This agent will never be in a view, and why; the machine is over."""

    reason: str


Action = Send | Dial | Install | Running | Learned | Suspect | Evicted | NoQuorum | Failed
