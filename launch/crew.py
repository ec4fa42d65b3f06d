"""The worker processes of one node: one slot per local rank, refilled while restarts are left.

Invariant: `workers()` names exactly the processes that others may build a data plane with. A lost
worker is out of it before anybody hears its exit code; a respawned one is back in only when it
has said that it is ready.
"""

import asyncio
import secrets
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from outlast.cluster.environment import inherited
from outlast.cluster.failpoint import reach
from outlast.cluster.standstill import Standstill
from outlast.cluster.timing import Timing
from outlast.cluster.view import Member, View, Worker
from outlast.launch.config import LaunchConfig
from outlast.launch.eviction import end_standstill
from outlast.launch.link import Message
from outlast.launch.memory_holder import MemoryHolder
from outlast.launch.torch_environment import torch_environment
from outlast.launch.worker_process import WorkerOrder, WorkerProcess, exit_text

if TYPE_CHECKING:
    from outlast.launch.ending import Ending
    from outlast.launch.spare import Spare

# A worker that was killed is the machine's fault and not the script's: it comes back also without
# --max-restarts, so often. A script that is killed for what it does (memory) stops some day.
KILLS_FORGIVEN = 16
PAUSE_MAX_S = 30.0
# A worker that is killed before any worker spoke may belong to an elastic job or to a plain one:
# that shows when the first worker attaches, or not within this time of its life.
UNDECIDED_S = 15.0


class CrewOwner(Protocol):
    """The agent, as its crew sees it."""

    ending: "Ending"
    spare: "Spare"

    @property
    def elastic(self) -> bool:
        """Whether workers of this job speak outlast."""

    @property
    def view(self) -> View | None:
        """The view installed last."""

    def said(self, worker: WorkerProcess, message: Message) -> None:
        """A worker's message."""

    def describe(self) -> None:
        """What others should know of this node has changed."""

    def fail(self, text: str) -> None:
        """The job cannot go on."""

    def failed(self, worker: WorkerProcess, code: int, respawn: bool) -> None:
        """A worker of the current view ended badly; respawn: its slot is to be filled again."""

    def event(self, name: str, **fields: Any) -> None:
        """Something for the event log."""


@dataclass(slots=True)
class Slot:
    """A place for a worker: `member` in the data plane, `done` ended well, `closed` given up."""

    local_rank: int
    holder: int
    process: WorkerProcess | None = None
    member: bool = True
    done: bool = False
    closed: bool = False
    spawns: int = 0
    false_starts: int = 0  # in a row: died before it was ready

    def pause_s(self, heartbeat_s: float) -> float:
        """How long to wait before it is filled again.

        The survivors need the processor first: a process that starts takes a core for seconds. A
        worker that cannot start must not spin.
        """
        return min(PAUSE_MAX_S, heartbeat_s * float(2 ** (self.false_starts + 1)))


class Crew:
    """All workers of this node; watches them for the agent."""

    def __init__(self, config: LaunchConfig, owner: CrewOwner, directory: Path) -> None:
        self._config, self.owner, self._directory = config, owner, directory
        self.memory = MemoryHolder()
        self.standstill = Standstill(Timing(heartbeat_s=config.heartbeat_s))
        self.slots = [Slot(rank, new_holder()) for rank in range(config.nproc_per_node)]
        self.respawns = 0
        self.undecided: list[tuple[WorkerProcess, int, float]] = []
        self.started = self.ever_attached = False

    def workers(self) -> tuple[Worker, ...]:
        """Those that take part in the data plane."""
        return tuple(Worker(s.holder, s.local_rank) for s in self.slots if s.member)

    @property
    def attached(self) -> list[WorkerProcess]:
        """The living workers that speak outlast."""
        found = [s.process for s in self.slots if s.process is not None]
        return [worker for worker in found if worker.attached and not worker.gone.is_set()]

    @property
    def complete(self) -> bool:
        """Every slot is part of the data plane or was given up."""
        return all(slot.member or slot.closed for slot in self.slots)

    @property
    def settled(self) -> bool:
        """Nothing more comes from here: every slot ended well or was given up."""
        return all(slot.done or slot.closed for slot in self.slots)

    def start(self, view: View, me: Member, *, member: bool = True) -> None:
        """Fill every slot with a fresh process; member: of the data plane at once, not only when it
        is ready."""
        self.started = True
        for slot in self.slots:
            slot.done = slot.closed = False
            slot.member = member
            self.spawn(slot, view, me)

    def spawn(self, slot: Slot, view: View, me: Member) -> None:
        """Fill one slot."""
        outside = inherited()
        variables = torch_environment(view, me, slot.local_rank, self._config, outside)
        order = WorkerOrder(
            holder=slot.holder,
            local_rank=slot.local_rank,
            rank=int(variables["RANK"]),
            title=f"{me.node}/{variables['RANK']}",
            environment=outside | variables,
            directory=self._directory / f"attempt_{slot.spawns}" / str(slot.local_rank),
        )
        slot.spawns += 1
        try:
            slot.process = WorkerProcess(order, self._config, self)
        except OSError as error:
            self.owner.fail(f"{me.node} cannot start {self._config.script}: {error}")

    def refill(self, view: View, me: Member) -> None:
        """The job turned out to be elastic: fill the slots that died before anybody knew."""
        for slot in self.slots:
            dead = slot.process is not None and slot.process.gone.is_set()
            if dead and not slot.done and not slot.closed:
                slot.holder, slot.member = new_holder(), False
                self.spawn(slot, view, me)

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, and SIGKILL after the grace; returns when every process is reaped."""
        running = [s.process for s in self.slots if s.process and not s.process.gone.is_set()]
        for worker in running:
            worker.expected = True
            # One that speaks outlast and has no handler of its own ignores what others heed.
            heeds = not worker.attached or worker.catches(signal.SIGTERM)
            worker.signal(signal.SIGTERM if grace_s and heeds else signal.SIGKILL)
            worker.signal(signal.SIGCONT)
        waits = [asyncio.create_task(worker.gone.wait()) for worker in running]
        if waits:
            _, late = await asyncio.wait(waits, timeout=grace_s or None)
            for worker in running if late else ():
                worker.signal(signal.SIGKILL)
            await asyncio.gather(*waits)

    def kill(self) -> None:
        """End every process now; whoever waits in `stop` goes on."""
        for slot in self.slots:
            if slot.process is not None:
                slot.process.expected = True
                slot.process.signal(signal.SIGKILL)

    def ready(self, worker: WorkerProcess) -> None:
        """It can take part in the data plane."""
        worker.ready = True
        self.slots[worker.local_rank].member = True
        self.owner.describe()

    def said(self, worker: WorkerProcess, message: Message) -> None:
        """Pass a message on to the agent."""
        self.owner.said(worker, message)

    def lost(self, worker: WorkerProcess, cause: str) -> None:
        """Out of the data plane at once; its memory waits for the survivors."""
        slot, view = self.slots[worker.local_rank], self.owner.view
        if slot.process is not worker:
            return
        slot.member = False
        reach("detect", lost=worker.holder)
        generation = view.generation if view else 0
        if worker.ready and not self.owner.spare.waits:
            self.memory.keep(worker.holder, generation)
        else:
            self.memory.forget(worker.holder)
        self.owner.describe()
        self.owner.event(
            "worker_lost", holder=worker.holder, local_rank=worker.local_rank, pid=worker.pid,
            cause=cause, generation=generation,
        )  # fmt: skip

    def exited(self, worker: WorkerProcess, code: int) -> None:
        """Decide what becomes of the slot."""
        slot = self.slots[worker.local_rank]
        if worker.expected or slot.process is not worker:
            return
        if code == 0 or worker.finished:
            slot.done = True
            self.owner.describe()
            return
        if not self.owner.elastic:
            deadline = worker.started + UNDECIDED_S
            if code < 0 and not self.ever_attached and time.monotonic() < deadline:
                self.undecided.append((worker, code, deadline))
            else:
                self.owner.failed(worker, code, False)
            return
        self.give_up(worker, 1 if worker.error else code)  # an exception, whatever came after it

    def give_up(self, worker: WorkerProcess, code: int) -> None:
        """A worker of an elastic job ended badly: go on without it, or with a new one."""
        slot = self.slots[worker.local_rank]
        worker.lose(exit_text(code))
        limit = self._config.max_restarts + (KILLS_FORGIVEN if code < 0 and not worker.hung else 0)
        respawn = self.respawns < limit and not (self.owner.ending.over or slot.closed)
        if respawn:
            self.respawns += 1
            slot.false_starts = 0 if worker.ready else slot.false_starts + 1
            slot.holder = new_holder()
        slot.closed = not respawn
        self.owner.failed(worker, code, respawn)


def tell_ranks(crew: Crew, view: View) -> None:
    """The workers' ranks in a new view; one that is not in it keeps its last."""
    ranks = {worker.holder: rank for rank, (_, worker) in enumerate(view.workers)}
    for slot in crew.slots:
        if slot.process is not None:
            slot.process.rank = ranks.get(slot.process.holder, slot.process.rank)


async def keep_pinging(
    crew: Crew, timing: Timing, broadcast: Callable[[Message], None]
) -> None:
    """Ping everybody once per heartbeat, and look at those that do not answer or go on."""
    before, count = time.monotonic(), 0
    while True:
        await asyncio.sleep(timing.heartbeat_s)
        now, count = time.monotonic(), count + 1
        for worker in crew.attached:
            if now - before > 2 * timing.heartbeat_s:  # held up ourselves: no silence counts
                worker.heard()
                crew.standstill.forgive(now)
            worker.send({"kind": "ping", "n": count})
            worker.check_silence(timing, now)
        end_standstill(crew, broadcast, now)
        decide(crew, now)
        before = now


def decide(crew: Crew, now: float) -> None:
    """Act on workers that died before it was known what kind of job this is."""
    owner = crew.owner
    for entry in list(crew.undecided):
        worker, code, deadline = entry
        stale = crew.slots[worker.local_rank].process is not worker
        if not (stale or owner.elastic or now > deadline):
            continue
        crew.undecided.remove(entry)
        if stale:
            continue
        if owner.elastic:
            crew.give_up(worker, code)
        else:
            owner.failed(worker, code, False)


def memories_of_use(crew: Crew, max_restarts: int) -> int:
    """Memories of dead workers that a worker of this node will still be able to read."""
    coming = any(not slot.done and not slot.closed for slot in crew.slots)
    left = crew.respawns < max_restarts + KILLS_FORGIVEN
    return len(crew.memory.kept) if coming and left else 0


def forward(crew: Crew, number: signal.Signals) -> bool:
    """Hand a signal on to the workers that have a handler for it; whether there are any."""
    there = [s.process for s in crew.slots if s.process and s.process.catches(number)]
    for worker in there:
        worker.signal(number)
    return bool(there)


def dismiss(crew: Crew) -> None:
    """The job is complete: who is not in the data plane by now is not needed any more. Workers of a
    spare that are ready end by themselves."""
    for slot in crew.slots:
        worker = slot.process
        if worker is None:
            slot.closed = True
        elif worker.lost and not worker.gone.is_set():
            continue  # its end is still to be heard, and then nothing takes its place
        elif not slot.member and not slot.done:
            slot.closed = worker.expected = True
            worker.signal(signal.SIGTERM)


def new_holder() -> int:
    """The identity of a worker that was never there before: 48 random bits."""
    return secrets.randbits(48) or 1
