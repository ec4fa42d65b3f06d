"""Answers what workers say over their links: attach, memory, rendezvous keys, logs.

Invariant: a message is acted on whole or not at all; one that makes no sense is written to the
event log and changes nothing, whatever the script sent.
"""

from typing import TYPE_CHECKING

from outlast.cluster.errors import Misuse
from outlast.cluster.view import field
from outlast.launch.eviction import condemn, noted
from outlast.launch.link import Message
from outlast.launch.store_relay import StoreRelay
from outlast.launch.worker_process import WorkerProcess

if TYPE_CHECKING:
    from outlast.launch.agent import Agent

SIZE_MAX = 1 << 62


class WorkerDesk:
    """One method per kind of message, for all workers of the agent."""

    def __init__(self, agent: "Agent") -> None:
        self._agent = agent
        self.relay = StoreRelay()
        self._restored: object = None  # step at which the workers last began a generation
        self._answers = {
            "attach": self._attach, "ready": self._ready, "allocate": self._allocate,
            "memories": self._memories, "release": self._release, "store": self._store,
            "pong": self._pong, "log": self._log, "event": self._event, "error": self._error,
            "finished": self._finished, "stopped": self._finished,
            "follow": agent.islands.follow, "islands": agent.islands.said,
            "condemn": lambda _, message: condemn(agent, message, agent.mesh.broadcast),
        }  # fmt: skip

    def said(self, worker: WorkerProcess, message: Message) -> None:
        """Act on one message."""
        try:
            self._answers[field(message, "kind", str)](worker, message)
        except (Misuse, KeyError) as error:
            self._agent.event("malformed", holder=worker.holder, cause=str(error))

    def push(self, message: Message) -> None:
        """A rendezvous key from another agent or a worker of ours: kept and passed on."""
        if self.relay.put(message):
            for worker in self._agent.crew.attached:
                worker.send(message)

    def show_view(self, worker: WorkerProcess) -> None:
        """Tell a worker the current view, and the keys that were published for it."""
        agent = self._agent
        if agent.view is None:
            return
        worker.send({"kind": "view", "view": agent.view.as_json(), **agent.times})
        for message in self.relay.replay():
            worker.send(message)

    def _attach(self, worker: WorkerProcess, message: Message) -> None:
        if worker.attached:
            return
        agent = self._agent
        worker.attach()
        agent.crew.ever_attached = True
        worker.send({
            "kind": "welcome", "holder": worker.holder, "node": agent.node,
            "job": agent.config.job, "heartbeat_s": agent.config.heartbeat_s,
            "host": agent.mesh.me.host, "rebalance": agent.config.rebalance,
            "evict_poison": agent.config.poison == "evict",
            "checkpoint_dir": agent.config.checkpoint_dir,
            "checkpoint_every": agent.config.checkpoint_every,
            "checkpoint_keep": agent.config.checkpoint_keep,
            "restarts": agent.crew.slots[worker.local_rank].spawns - 1,
            **agent.islands.welcome(),
        })  # fmt: skip
        agent.describe()

    def _ready(self, worker: WorkerProcess, message: Message) -> None:
        agent = self._agent
        agent.crew.ready(worker)
        self.show_view(worker)  # also one without it: then it knows that it has to wait

    def _allocate(self, worker: WorkerProcess, message: Message) -> None:
        size = field(message, "size", int, 0, SIZE_MAX)
        try:
            file = self._agent.crew.memory.allocate(worker.holder, size)
        except (OSError, OverflowError, ValueError) as error:
            text = f"{size} bytes of shared memory cannot be had: {error}"
            worker.send({"kind": "memory", "error": text})
            return
        worker.send({"kind": "memory", "holder": worker.holder}, [file])

    def _memories(self, worker: WorkerProcess, message: Message) -> None:
        kept = self._agent.crew.memory.kept
        holders = [memory.holder for memory in kept]
        worker.send({"kind": "memories", "holders": holders}, [memory.file for memory in kept])

    def _release(self, worker: WorkerProcess, message: Message) -> None:
        generation = field(message, "generation", int)
        if count := self._agent.crew.memory.release(generation):
            self._agent.event("released", generation=generation, memories=count)
            self._agent.describe()

    def _store(self, worker: WorkerProcess, message: Message) -> None:
        self.push(message)
        self._agent.mesh.broadcast(message)

    def _pong(self, worker: WorkerProcess, message: Message) -> None:
        worker.heard()
        noted(self._agent.crew, worker.holder, message)

    def _log(self, worker: WorkerProcess, message: Message) -> None:
        agent = self._agent
        agent.metrics.record(field(message, "step", int), field(message, "metrics", dict))
        if agent.progress.hosts_rank_0 or message["step"] == self._restored:
            agent.metrics.write()

    def _event(self, worker: WorkerProcess, message: Message) -> None:
        name = field(message, "event", str)
        rest = {key: value for key, value in message.items() if key not in ("kind", "event")}
        self._agent.events.write(name, {"holder": worker.holder, **rest})
        if name == "recovered":
            self._agent.progress.recovered(message)
            # Rank 0 may be new and have missed a step: whoever has made it writes it.
            self._restored = message.get("step")
            self._agent.metrics.write()
        elif name == "loaded":
            self._agent.metrics.founding = False  # what an earlier start wrote is this job's own
            self._agent.outcomes.source = field(message, "step", int)
            self._agent.progress.loaded(message)
        elif name == "resumed" and not self._agent.trained:
            self._agent.trained = True
            self._agent.describe()
        else:
            self._agent.progress.told(name, message)

    def _error(self, worker: WorkerProcess, message: Message) -> None:
        text = message.get("text")
        worker.error = text if isinstance(text, str) else ""

    def _finished(self, worker: WorkerProcess, message: Message) -> None:
        worker.finished = True
        if message["kind"] == "stopped":
            said = {"kind": "stored", "step": field(message, "step", int)}
            self._agent.mesh.broadcast(said)
            self._agent.ending.stored(said["step"])
