"""The worker's line to its agent: views and rendezvous keys come in, memory and events go out.

One thread listens. A new view interrupts the running generation at once and is connected in a
thread of its own, so that the main thread, which may be deep in somebody's forward pass, finds
the new group ready when it comes up for air. `SoloLink` is the same line for a process that no
agent started: a job of one."""

import base64
import contextlib
import json
import os
import signal
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from outlast.cluster.errors import GenerationChanged, JobComplete, Misuse, PeerLost
from outlast.cluster.failpoint import reach
from outlast.cluster.latch import Latch
from outlast.cluster.timing import Timing
from outlast.cluster.view import Member, View, Worker
from outlast.runtime.collectives import Communicator, Graveyard, connect, shut_down
from outlast.runtime.rendezvous import RendezvousStore

_DATAGRAM = 1 << 17


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this worker is."""

    holder: int
    node: str
    job: str
    host: str
    timing: Timing
    rebalance: bool = False  # deal leaves by measured speed
    evict_poison: bool = True  # whoever computes wrong gradients leaves the job


@dataclass(frozen=True, slots=True)
class Generation:
    """A view this worker is part of, with its connected group; times are `time.time()`."""

    view: View
    communicator: Communicator
    received: float
    interrupted: float
    connected: float

    @property
    def nodes(self) -> list[tuple[int, str]]:
        """(holder, node) in rank order."""
        return [(worker.holder, member.node) for member, worker in self.view.workers]

    @property
    def domains(self) -> dict[int, str]:
        """Failure domain of every holder, "rack/agent": two agents may share a node's name."""
        return {w.holder: f"{member.rack}/{member.agent}" for member, w in self.view.workers}

    @property
    def unread_memories(self) -> bool:
        """Whether an agent keeps memories of dead workers that no worker of its node can read."""
        return any(member.memories and not member.workers for member in self.view.members)

    def first_of_node(self, holder: int) -> int:
        """The worker that acts for the whole node of `holder`."""
        domains = self.domains
        return next(h for h, domain in domains.items() if domain == domains[holder])


class Link(Protocol):
    """What the runtime needs of its surroundings."""

    identity: Identity

    def ready(self, device: torch.device) -> None: ...
    def allocate(self, size: int) -> int: ...
    def memories(self) -> dict[int, int]: ...
    def send(self, **message: object) -> None: ...
    def superseded(self, generation: int) -> bool: ...
    def next_generation(self, newer_than: int, deadline_s: float) -> Generation: ...
    def close(self) -> None: ...


class AgentLink:
    """The line over the socket that the agent left in this process."""

    def __init__(self, descriptor: int, latch: int | None) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._state = threading.Condition()
        self._answers: dict[str, tuple[dict[str, Any], list[int]]] = {}
        self._stores: dict[int, RendezvousStore] = {}
        self._view: View | None = None
        self._received = 0.0
        self._complete = False
        self._current: Generation | None = None
        self._graveyard = Graveyard()
        self._device = torch.device("cpu")
        self.step = 0
        if latch is not None:
            Latch(latch).hold()
        threading.Thread(target=self._listen, name="outlast-link", daemon=True).start()
        self.send(kind="attach", pid=os.getpid())
        welcome, _ = self._answer("welcome", 60.0)
        self.identity = Identity(
            holder=welcome["holder"],
            node=welcome["node"],
            job=welcome["job"],
            host=welcome["host"],
            timing=Timing(heartbeat_s=welcome["heartbeat_s"]),
            rebalance=welcome["rebalance"],
            evict_poison=welcome["evict_poison"],
        )

    def ready(self, device: torch.device) -> None:
        """Ask to take part in the data plane, with tensors on `device`."""
        self._device = device
        self.send(kind="ready")

    def allocate(self, size: int) -> int:
        """Descriptor of this worker's state memory, `size` bytes, sparse, kept by the agent.

        Raises:
            Misuse: the node cannot give that much.
        """
        self.send(kind="allocate", size=size)
        answer, descriptors = self._answer("memory", self.identity.timing.grace_s)
        if not descriptors:
            raise Misuse(f"no state memory of {size} bytes: {answer.get('error')}")
        return descriptors[0]

    def memories(self) -> dict[int, int]:
        """Holder -> descriptor of the memories of dead workers of this node."""
        self.send(kind="memories")
        answer, descriptors = self._answer("memories", self.identity.timing.grace_s)
        return dict(zip(answer["holders"], descriptors, strict=True))

    def send(self, **message: object) -> None:
        """Send one message; if the agent is gone there is nobody left to tell."""
        with contextlib.suppress(OSError):
            self._socket.send(json.dumps(message).encode())

    def superseded(self, generation: int) -> bool:
        """Whether a newer view than `generation` has arrived."""
        return self._view is not None and self._view.generation > generation

    def next_generation(self, newer_than: int, deadline_s: float) -> Generation:
        """Wait for a connected generation that is newer and the newest.

        Raises:
            PeerLost: none came by the deadline.
            JobComplete: none will come.
        """

        def found() -> bool:
            current = self._current
            return (
                current is not None
                and current.view.generation > newer_than
                and current.view is self._view
                and not current.communicator.interrupted
            )

        with self._state:
            if not self._state.wait_for(lambda: found() or self._complete, deadline_s):
                raise PeerLost(f"no generation after {newer_than} within {deadline_s:.0f} s")
            if not found():
                raise JobComplete("the job is complete: other ranks have finished and left")
            assert self._current is not None
            return self._current

    def close(self) -> None:
        """Leave: the work is done."""
        self.send(kind="finished")
        if self._current is not None:
            self._graveyard.bury(self._current.communicator)

    def _answer(self, kind: str, deadline_s: float) -> tuple[dict[str, Any], list[int]]:
        with self._state:
            if not self._state.wait_for(lambda: kind in self._answers, deadline_s):
                raise PeerLost(f"the agent did not answer with {kind} within {deadline_s:.0f} s")
            return self._answers.pop(kind)

    def _listen(self) -> None:
        while True:
            try:
                data, descriptors, _, _ = socket.recv_fds(self._socket, _DATAGRAM, 64)
            except OSError:
                data, descriptors = b"", []
            if not data:
                # The agent is dead, and a worker without its agent is not in any view.
                os.kill(os.getpid(), signal.SIGKILL)
            message = json.loads(data)
            kind = message["kind"]
            if kind == "ping":
                self.send(kind="pong", n=message["n"], step=self.step)
            elif kind == "store":
                value = base64.b64decode(message["value"])
                self._store(message["generation"]).put(message["key"], value)
            elif kind == "complete":
                with self._state:
                    self._complete = True
                    self._state.notify_all()
            elif kind == "view":
                self._install(View.from_json(message["view"]))
            else:
                with self._state:
                    self._answers[kind] = (message, descriptors)
                    self._state.notify_all()

    def _store(self, generation: int) -> RendezvousStore:
        """The store of a generation; keys may arrive before their view."""
        with self._state:
            if generation not in self._stores:

                def publish(key: str, value: bytes) -> None:
                    text = base64.b64encode(value).decode()
                    self.send(kind="store", generation=generation, key=key, value=text)

                self._stores[generation] = RendezvousStore(publish, _PEER_START_S)
            return self._stores[generation]

    def _install(self, view: View) -> None:
        """A new view: end the old generation, connect the new one beside the main thread."""
        with self._state:
            if self._view is not None and view.generation <= self._view.generation:
                return
            self._view, self._received = view, time.time()
            old, self._current = self._current, None
            stale = [g for g in self._stores if g < view.generation]
            for generation in stale:
                store = self._stores.pop(generation)
                store.close()
                shut_down(store)  # a peer of a half-built group may be dead: do not wait for it
        if old is not None:
            reach("interrupt", generation=view.generation)
            self._graveyard.bury(old.communicator)
        interrupted = time.time()
        holders = [worker.holder for _, worker in view.workers]
        if self.identity.holder in holders:
            rank = holders.index(self.identity.holder)
            threading.Thread(
                target=self._connect,
                args=(view, rank, interrupted),
                name=f"outlast-generation-{view.generation}",
                daemon=True,
            ).start()

    def _connect(self, view: View, rank: int, interrupted: float) -> None:
        generation, size = view.generation, len(view.workers)
        store = self._store(generation)
        identity = self.identity
        reach("reconnect", generation=generation)
        try:
            communicator = connect(
                store, generation, rank, size, self._device, identity.host, identity.timing
            )
            communicator.gather_bytes(b"")  # the generation is up once every rank was heard
        except (PeerLost, GenerationChanged) as cause:
            if not self.superseded(generation):
                self.send(
                    kind="event", event="connect_failed", generation=generation, cause=str(cause)
                )
            return
        with self._state:
            if self._view is not view:
                self._graveyard.bury(communicator)
                return
            received, connected = self._received, time.time()
            self._current = Generation(view, communicator, received, interrupted, connected)
            self._state.notify_all()
        self.send(kind="event", event="connected", generation=generation, rank=rank)


# How long a peer may take from its start to `prepare()`. If it dies meanwhile, a new view says so.
_PEER_START_S = Timing().join_s


class SoloLink:
    """A job of one process: its own memory, one view for ever."""

    def __init__(self) -> None:
        self.identity = Identity(1, "localhost", "solo", "127.0.0.1", Timing())
        self._view = View(1, (Member("solo", "localhost", "127.0.0.1", 0, (Worker(1, 0),)),))
        self._generation: Generation | None = None
        self.step = 0

    def ready(self, device: torch.device) -> None:
        """Connect the group of one."""
        now = time.time()
        store = RendezvousStore(lambda key, value: None, _PEER_START_S)
        host, timing = self.identity.host, self.identity.timing
        communicator = connect(store, 1, 0, 1, device, host, timing)
        self._generation = Generation(self._view, communicator, now, now, time.time())

    def allocate(self, size: int) -> int:
        """A memfd of this process alone."""
        descriptor = os.memfd_create("outlast-solo")
        os.ftruncate(descriptor, size)
        return descriptor

    def memories(self) -> dict[int, int]:
        """Nobody else ever ran here."""
        return {}

    def send(self, **message: object) -> None:
        """Nobody listens."""

    def superseded(self, generation: int) -> bool:
        """Nothing ever changes."""
        return False

    def next_generation(self, newer_than: int, deadline_s: float) -> Generation:
        """The only generation."""
        assert self._generation is not None
        if newer_than >= 1:
            raise PeerLost("a job of one has one generation")
        return self._generation

    def close(self) -> None:
        """Nothing to leave."""
