"""The worker's line to its agent: views and rendezvous keys come in, memory and events go out.

One thread listens. A new view interrupts the running generation at once and is connected in a
thread of its own, so that the main thread, which may be deep in somebody's forward pass, finds
the new group ready when it comes up for air. The same thread then connects a second group, the
*side*, for what travels beside the steps. `SoloLink` is the same line for a process that no agent
started: a job of one.

[Note: side group] Collectives of one group must be posted in the same order by every rank. Parity
travels chunk by chunk while the main thread folds and gathers at moments of its own, so it has a
group of its own: neither ever waits for the other. The side is up a little later than its
generation, and ends with it."""

import base64
import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from outlast.cluster.errors import GenerationChanged, JobComplete, Misuse, PeerLost
from outlast.cluster.failpoint import reach
from outlast.cluster.latch import Latch
from outlast.cluster.timing import Timing
from outlast.cluster.view import Member, View, Worker
from outlast.runtime.collectives import Communicator, Graveyard, connect, shut_down
from outlast.runtime.pulse import Pulse
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
    checkpoint_dir: str = ""  # where the state goes when the job is asked to stop, and
    checkpoint_every: str = ""  # how often before, see `checkpoint.every`
    checkpoint_keep: int = 2  # how many steps stay there
    island: int | None = None  # which of them this job is
    islands: int = 1
    island_host: str = "127.0.0.1"  # where ranks of other islands reach this one
    island_key: bytes = b""  # of the exchange between islands


@dataclass(frozen=True, slots=True)
class Generation:
    """A view this worker is part of, with its connected group; times are `time.time()`.

    Args:
        side: the group of [Note: side group]: its result once it is connected, GenerationChanged or
            PeerLost once it never will be.
    """

    view: View
    communicator: Communicator
    received: float
    interrupted: float
    connected: float
    side: Future[Communicator] = field(default_factory=Future)

    @property
    def nodes(self) -> list[tuple[int, str]]:
        """(holder, node) in rank order."""
        return [(worker.holder, member.node) for member, worker in self.view.workers]

    @property
    def domains(self) -> dict[int, str]:
        """Failure domain of every holder, "rack/agent": two agents may share a node's name."""
        return {w.holder: f"{member.rack}/{member.agent}" for member, w in self.view.workers}

    @property
    def trained(self) -> bool:
        """Whether the job had committed a step when this view was agreed: who knows of none came
        after that, and must not start over."""
        return any(member.trained for member in self.view.members)

    @property
    def unread_memories(self) -> bool:
        """Whether an agent keeps memories of dead workers that no worker of its node can read."""
        return any(member.memories and not member.workers for member in self.view.members)

    def first_of_node(self, holder: int) -> int:
        """The worker that acts for the whole node of `holder`."""
        domains = self.domains
        return next(h for h, domain in domains.items() if domain == domains[holder])

    def bury(self, graveyard: Graveyard) -> None:
        """End both groups, also a side that is not up yet; never blocks."""
        with contextlib.suppress(InvalidStateError):
            self.side.set_exception(GenerationChanged("the generation has ended"))
        graveyard.bury(self.communicator)
        if self.side.exception() is None:
            graveyard.bury(self.side.result())


Heard = Callable[[int, dict[str, Any]], None]
Reached = Callable[[list[int], int], None]


class Link(Protocol):
    """What the runtime needs of its surroundings."""

    identity: Identity
    pulse: Pulse

    def ready(self, device: torch.device, protected: bool, sharded: bool) -> None: ...
    def allocate(self, size: int) -> int: ...
    def memories(self) -> dict[int, int]: ...
    def send(self, **message: object) -> None: ...
    def follow_islands(self, heard: Heard, reached: Reached) -> None: ...
    def superseded(self, generation: int) -> bool: ...
    def next_generation(self, newer_than: int, deadline_s: float) -> Generation: ...
    def close(self) -> None: ...


class AgentLink:
    """The line over the socket that the agent left in this process."""

    def __init__(self, descriptor: int, latch: int | None) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._state = threading.Condition()
        self._answers: dict[str, tuple[dict[str, Any], list[int]]] = {}
        self._stores: dict[tuple[int, str], RendezvousStore] = {}  # by generation and group
        self._view: View | None = None
        self._received = 0.0
        self._complete = False
        self._current: Generation | None = None
        self._graveyard = Graveyard()
        self._followed: tuple[Heard, Reached] | None = None
        self._device, self._protected, self._saves = torch.device("cpu"), False, False
        self._prepared = threading.Event()  # before, nobody knows which groups are needed
        self.pulse = Pulse()
        if latch is not None:
            Latch(latch).hold()
        threading.Thread(target=self._listen, name="outlast-link", daemon=True).start()
        self.send(kind="attach", pid=os.getpid())
        self._answer("welcome", 60.0)

    def ready(self, device: torch.device, protected: bool, sharded: bool) -> None:
        """Ask to take part in the data plane, with tensors on `device`; protected: steps have
        parity; sharded: no rank has the whole state. Either may need the side group."""
        self._device, self._protected = device, protected
        self._saves = sharded and bool(self.identity.checkpoint_every)
        self._prepared.set()
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

    def follow_islands(self, heard: Heard, reached: Reached) -> None:
        """From now on hear what ranks of other islands say with `send(kind="islands", message={})`
        (JSON, in all less than 128 KiB), and which islands are in reach.

        Args:
            heard: called with an island and a message. What was said before is said again.
            reached: called with the other islands in reach and a count that grows; whenever it is,
                all that this rank has to say has to be said again. Both run on the link's thread.
        """
        self._followed = heard, reached
        self.send(kind="follow")

    def superseded(self, generation: int) -> bool:
        """Whether a newer view than `generation` has arrived."""
        return self._view is not None and self._view.generation > generation

    def next_generation(self, newer_than: int, deadline_s: float) -> Generation:
        """Wait for a connected generation that is newer and the newest.

        A worker that the newest view leaves out waits without limit: places are the agents' to
        give, and only the peers of a view can be late.

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
            began = time.time()
            while not self._state.wait_for(lambda: found() or self._complete, deadline_s):
                late = time.time() - max(began, self._received) >= deadline_s
                if late and not _left_out(self._view, self.identity.holder):
                    raise PeerLost(f"no generation after {newer_than} within {deadline_s:.0f} s")
            if not found():
                raise JobComplete("the job is complete: other ranks have finished and left")
            assert self._current is not None
            return self._current

    def close(self) -> None:
        """Leave: the work is done."""
        self.send(kind="finished")
        if self._current is not None:
            self._current.bury(self._graveyard)
        self._graveyard.close(self.identity.timing.silence_s)

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
                self.send(kind="pong", n=message["n"], **self.pulse.fields())
            elif kind == "store":
                group, _, key = message["key"].partition("/")
                value = base64.b64decode(message["value"])
                self._store(message["generation"], group).put(key, value)
            elif kind == "complete":
                with self._state:
                    self._complete = True
                    self._state.notify_all()
            elif kind in ("islands", "reach") and self._followed is not None:
                if kind == "islands":
                    self._followed[0](message["island"], message["message"])
                else:
                    self._followed[1](message["islands"], message["count"])
            elif kind == "view":
                self._install(View.from_json(message["view"]))
            else:
                if kind == "welcome":  # here, for the view may be the very next message
                    self.identity = _identity(message)
                with self._state:
                    self._answers[kind] = (message, descriptors)
                    self._state.notify_all()

    def _store(self, generation: int, group: str) -> RendezvousStore:
        """The store of a group of a generation; keys may arrive before their view."""
        with self._state:
            if (generation, group) not in self._stores:

                def publish(key: str, value: bytes) -> None:
                    text, name = base64.b64encode(value).decode(), f"{group}/{key}"
                    self.send(kind="store", generation=generation, key=name, value=text)

                self._stores[generation, group] = RendezvousStore(publish, _PEER_START_S)
            return self._stores[generation, group]

    def _install(self, view: View) -> None:
        """A new view: end the old generation, connect the new one beside the main thread."""
        with self._state:
            if self._view is not None and view.generation <= self._view.generation:
                return
            self._view, self._received = view, time.time()
            old, self._current = self._current, None
            stale = [key for key in self._stores if key[0] < view.generation]
            ended = [self._stores.pop(key) for key in stale]
            for store in ended:
                store.close()
            shut_down(*ended)  # a peer of a half-built group may be dead: do not wait for it
            stores = [self._store(view.generation, group) for group in ("main", "side")]
        if old is not None:
            reach("interrupt", generation=view.generation)
            old.bury(self._graveyard)
        interrupted = time.time()
        holders = [worker.holder for _, worker in view.workers]
        if self.identity.holder in holders:
            rank = holders.index(self.identity.holder)
            threading.Thread(
                target=self._connect,
                args=(view, rank, interrupted, stores),
                name=f"outlast-generation-{view.generation}",
                daemon=True,
            ).start()

    def _connect(
        self, view: View, rank: int, interrupted: float, stores: Sequence[RendezvousStore]
    ) -> None:
        """Both groups of a view; the side while the main thread already recovers."""
        generation = view.generation
        self._prepared.wait()
        reach("reconnect", generation=generation)
        communicator = self._join(view, rank, stores[0])
        if communicator is None:
            return
        with self._state:
            if self._view is not view:
                self._graveyard.bury(communicator)
                return
            received, connected = self._received, time.time()
            current = Generation(view, communicator, received, interrupted, connected)
            self._current = current
            self._state.notify_all()
        self.send(kind="event", event="connected", generation=generation, rank=rank)
        # Nothing is protected against the loss of the only domain.
        encodes = self._protected and len(set(current.domains.values())) > 1
        if not encodes and not (self._saves and len(view.workers) > 1):
            return
        side = self._join(view, rank, stores[1])
        try:
            if side is None:
                current.side.set_exception(PeerLost("the side did not connect"))
            else:
                current.side.set_result(side)
        except InvalidStateError:  # buried meanwhile
            if side is not None:
                self._graveyard.bury(side)

    def _join(self, view: View, rank: int, store: RendezvousStore) -> Communicator | None:
        """One group of a view, up once every rank was heard; None if it did not come about."""
        generation, size, identity = view.generation, len(view.workers), self.identity
        try:
            communicator = connect(
                store, generation, rank, size, self._device, identity.host, identity.timing
            )
            communicator.gather_bytes(b"")
        except (PeerLost, GenerationChanged) as cause:
            if not self.superseded(generation):
                self.send(
                    kind="event", event="connect_failed", generation=generation, cause=str(cause)
                )
            return None
        return communicator


def _left_out(view: View | None, holder: int) -> bool:
    return view is not None and all(worker.holder != holder for _, worker in view.workers)


def _identity(welcome: dict[str, Any]) -> Identity:
    names = ("holder", "node", "job", "host", "rebalance", "evict_poison",
             "checkpoint_dir", "checkpoint_every", "checkpoint_keep",
             *(("island", "islands", "island_host") if "island" in welcome else ()))  # fmt: skip
    timing, key = Timing(heartbeat_s=welcome["heartbeat_s"]), welcome.get("island_key", "")
    fields = {name: welcome[name] for name in names}
    return Identity(timing=timing, island_key=bytes.fromhex(key), **fields)


# How long a peer may take from its start to `prepare()`. If it dies meanwhile, a new view says so.
_PEER_START_S = Timing().join_s


class SoloLink:
    """A job of one process: its own memory, one view for ever."""

    def __init__(self) -> None:
        self.identity = Identity(1, "localhost", "solo", "127.0.0.1", Timing())
        self._view = View(1, (Member("solo", "localhost", "127.0.0.1", 0, (Worker(1, 0),)),))
        self._generation: Generation | None = None
        self.pulse = Pulse()

    def ready(self, device: torch.device, protected: bool, sharded: bool) -> None:
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

    def follow_islands(self, heard: Heard, reached: Reached) -> None:
        """There are no others."""

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
