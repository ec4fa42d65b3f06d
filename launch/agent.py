"""One incarnation of a node's agent: membership on one side, workers on the other.

A worker's death becomes a new description within a millisecond; a new view reaches every worker
of the node as soon as it is installed. An elastic job (its workers speak outlast) goes on with
whoever is left; a plain job is restarted as a whole whenever its members or its count of restarts
change. Invariant: the outcome is set once, and from then on nothing that happens is news.
"""

import asyncio
import os
import secrets
from dataclasses import replace
from pathlib import Path
from typing import Any

from outlast.cluster.errors import Misuse
from outlast.cluster.failpoint import reach
from outlast.cluster.mesh import Callbacks, Job, Mesh
from outlast.cluster.timing import Timing
from outlast.cluster.view import Member, View
from outlast.launch.config import LaunchConfig, host_and_port
from outlast.launch.console import Console
from outlast.launch.crew import Crew, Slot, keep_pinging, memories_of_use, tell_ranks
from outlast.launch.ending import Ending, Outcome
from outlast.launch.event_log import EventLog
from outlast.launch.eviction import condemn, waiting
from outlast.launch.interface import choose
from outlast.launch.island_desk import IslandDesk
from outlast.launch.link import Message
from outlast.launch.metrics_log import MetricsLog
from outlast.launch.outcome_log import OutcomeLog
from outlast.launch.plain_job import PlainJob
from outlast.launch.progress import Progress
from outlast.launch.spare import Spare
from outlast.launch.task import watched
from outlast.launch.topology import rack_of
from outlast.launch.torch_environment import restart_round
from outlast.launch.worker_desk import WorkerDesk
from outlast.launch.worker_process import WorkerProcess, exit_text

EXIT_FAILED = 1
EXIT_REFUSED = 2
EXIT_INTERNAL = 70  # EX_SOFTWARE
EXIT_NO_QUORUM = 75  # EX_TEMPFAIL: a scheduler may start the job again from its checkpoint


class Agent:
    """The agent from its start to its outcome; `run` drives it."""

    def __init__(self, config: LaunchConfig, key: bytes, console: Console) -> None:
        endpoints = tuple(host_and_port(text) for text in config.endpoints)
        way = choose(endpoints, config.interface, config.local_addr)
        config = replace(config, interface=way.name)
        self.config, self.console = config, console
        self.timing = Timing(heartbeat_s=config.heartbeat_s)
        grace_s = config.shutdown_timeout_s  # from SIGTERM to SIGKILL for a worker
        self.grace_s = self.timing.grace_s if grace_s is None else grace_s
        self.agent, self.node = secrets.token_hex(8), config.node
        directory = Path(config.log_dir)
        self.events = EventLog(directory, self.node, self.agent)
        self.metrics = MetricsLog(directory / "metrics.jsonl")
        self.progress = Progress(console, config.job, config.log_dir, self.agent)
        self.outcomes = OutcomeLog(directory, config.job, config.requeues, self.node)
        self.crew = Crew(config, self, directory / self.node / self.agent)
        self.view: View | None = None
        self.times = {"detected": 0.0, "agreed": 0.0}
        self.outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        rack = rack_of(self.node, config.racks, alone=config.standalone)
        me = Member(self.agent, self.node, way.address, 0, self.crew.workers(), rack=rack)
        job = Job(
            job_id=config.job, key=key, endpoints=endpoints,
            min_nodes=config.min_nodes, max_nodes=config.max_nodes, spares=config.spares,
        )  # fmt: skip
        self.ending, self.spare = Ending(self), Spare(self)
        self.mesh = Mesh(job, me, self.timing, self._callbacks())
        self.islands = IslandDesk(self, config, key)
        self.desk = WorkerDesk(self)
        self.restarts, self.trained = 0, False  # trained: it is known that a step was committed
        self.running: View | None = None  # of an elastic job that we are not in yet
        self._plain = PlainJob(self)

    def _callbacks(self) -> Callbacks:
        return Callbacks(
            on_install=self._install,
            on_running=self._join,
            on_described=self.spare.described,
            on_message=self._hear,
            on_suspect=self._suspect,
            on_refused=lambda cause: self.event("refused_peer", cause=cause),
            on_evicted=lambda: self.end(
                Outcome(0, "was evicted while it slept; joins again", False, True), "evicted"
            ),
            on_no_quorum=lambda: self.end(
                Outcome(EXIT_NO_QUORUM, "cut off from the majority of the job; stops", False),
                "no_quorum",
            ),
            on_failed=lambda error: self.end(Outcome(EXIT_REFUSED, str(error))),
        )

    async def run(self) -> Outcome:
        """Take part until the outcome is known; ends the workers and leaves."""
        ticking = None
        try:
            await self.mesh.start()
            await self.islands.start()
            self.event("started", pid=os.getpid())
            ticking = watched(keep_pinging(self.crew, self.timing, self.mesh.broadcast))
            outcome = await self.outcome
        except Misuse as error:
            outcome = Outcome(EXIT_REFUSED, str(error))
            self.end(outcome)
        finally:
            for task in (ticking, self._plain.restarting):
                if task is not None:
                    task.cancel()
                    await asyncio.wait([task])
        # Asked now: those that end with us are about to leave, or have just done so.
        gone = {a for a in self.mesh.detector.suspects if self.progress.causes.get(a) != "left"}
        there = [m.node for m in self.view.members if m.agent not in gone] if self.view else ()
        await self.crew.stop(self.grace_s if outcome.graceful else 0)
        if outcome.code in (0, EXIT_FAILED):
            # The end of the job is on its way to the others: it must not be overtaken by our own.
            await asyncio.sleep(self.timing.tick_s)
        await asyncio.gather(self.mesh.stop(), self.islands.stop())
        self.crew.memory.close()
        self.event("finished" if outcome.code == 0 and not outcome.rejoin else "stopped",
                   code=outcome.code, cause=outcome.text)  # fmt: skip
        self.events.close()
        if not outcome.rejoin:
            self.outcomes.plain = not self.elastic
            self.outcomes.write(self.agent, outcome, self.metrics.newest, there)
        return outcome

    @property
    def elastic(self) -> bool:
        """Whether workers of this job speak outlast: ours, or those of any member."""
        if self.crew.ever_attached or self.running is not None:
            return True
        members = self.view.members if self.view else ()
        return any(self.mesh.members.get(m.agent, m).elastic for m in members)

    def event(self, name: str, **fields: Any) -> None:
        """Write to the event log."""
        self.events.write(name, fields)

    def said(self, worker: WorkerProcess, message: Message) -> None:
        """A worker's message."""
        if not self.outcome.done():
            self.desk.said(worker, message)

    def end(self, outcome: Outcome, event: str = "", broadcast: bool = False) -> None:
        """Set the outcome, once; broadcast: it is the whole job's."""
        if self.outcome.done():
            return
        if event:
            self.event(event)
        if broadcast:
            said = {name: getattr(outcome, name) for name in ("code", "text", "signal", "step")}
            self.mesh.broadcast({"kind": "end", **said})
        self.outcome.set_result(outcome)

    def fail(self, text: str) -> None:
        """The job has failed; every agent ends."""
        self.end(Outcome(EXIT_FAILED, f"job failed: {text}"), broadcast=True)

    def describe(self) -> None:
        """Tell the others what this node is now."""
        if self.outcome.done():
            return
        settled = self.crew.settled
        ended_well = any(slot.done for slot in self.crew.slots) and not self.spare.waits
        ended_well &= not self.ending.stopping
        if ended_well and (settled or self.elastic) and not self.ending.succeeded:
            self.mesh.broadcast({"kind": "done"})
            self.ending.succeed()
        me = replace(
            self.mesh.me, restarts=self.restarts, finished=settled, complete=self.ending.complete,
            workers=self.mesh.me.workers if self.ending.complete else self.spare.offer(),
            elastic=self.crew.ever_attached, trained=self.trained,
            memories=memories_of_use(self.crew, self.config.max_restarts), **self.ending.wishes,
        )  # fmt: skip
        if self.running is not None and self.view is None:
            if not self.crew.complete:
                return
            self.mesh.describe(me)
            self.mesh.request_join()
        elif me != self.mesh.me:
            self.mesh.describe(me)
        self.ending.check()

    def failed(self, worker: WorkerProcess, code: int, respawn: bool) -> None:
        """A worker ended badly: go on without it, with a new one, from the start, or not at all."""
        if self.outcome.done():
            return
        view = self.view or self.running
        assert view is not None, "workers run in a view"
        who = f"rank {worker.rank} ({self.node}, local rank {worker.local_rank}, pid {worker.pid})"
        text = f"{who} {exit_text(code)}"
        if self.elastic:
            if code > 0:
                self.console.failure(text, worker.failure_text())
            if respawn:
                slot = self.crew.slots[worker.local_rank]
                pause_s = slot.pause_s(self.timing.heartbeat_s) if view.workers else 0.0
                asyncio.get_running_loop().call_later(pause_s, self._refill, slot, view, worker)
                return
            text = ": ".join([text, *worker.failure_text().strip().splitlines()[-1:]])
            if self.view is None:  # whoever cannot join a job is not that job's failure
                self.end(Outcome(EXIT_REFUSED, f"cannot join the job: {text}"))
            elif code > 0 and not self.spare.waits:
                self.fail(text)
            else:
                self.describe()
            return
        self.console.failure(text, worker.failure_text())
        if restart_round(view) < self.config.max_restarts:
            self.restarts = restart_round(view) + 1
            self.describe()
        else:
            self.fail(text)

    def _refill(self, slot: Slot, view: View, dead: WorkerProcess) -> None:
        if slot.process is dead and not (self.outcome.done() or slot.closed):
            self.crew.spawn(slot, self.view or view, self.mesh.me)

    def _install(self, view: View, detected: float, agreed: float, proposer: str) -> None:
        if self.outcome.done():
            return
        first, waited = self.view is None, self.spare.waits
        self.view, self.running = view, None
        self.outcomes.follow(view)
        self.times = {"detected": detected, "agreed": agreed}
        tell_ranks(self.crew, view)
        self.desk.relay.install(view.generation)
        for worker in self.crew.attached:
            self.desk.show_view(worker)
        members = [{"node": m.node, "agent": m.agent, "rack": m.rack, "spare": m.spare,
                    "workers": [] if m.spare else [w.holder for w in m.workers]}
                   for m in view.members]  # fmt: skip
        self.event("view", generation=view.generation, members=members, proposer=proposer,
                   **self.times)  # fmt: skip
        if first and view.generation > 1:
            self.event("joined", generation=view.generation)
        if waited and not self.spare.waits:
            self.event("spare_promoted", generation=view.generation)
        self.progress.install(view, detected, agreed)
        if self.progress.hosts_rank_0:
            self.metrics.founding |= view.generation == 1
            self.metrics.write()
        if view.stopping:
            self.ending.stop()
        elif self.spare.waits:
            self.spare.follow(view)
        elif not self.elastic:
            self._plain.follow(view)
        elif self.crew.started:
            self.crew.refill(view, self.mesh.me)
        else:
            self.crew.start(view, self.mesh.me)
        self.ending.check()

    def _join(self, view: View) -> None:
        """A job runs without us. An elastic one is joined when our workers are ready."""
        if self.outcome.done() or self.view is not None or self.running is not None:
            return
        if not any(self.mesh.members.get(m.agent, m).elastic for m in view.members):
            self.mesh.request_join()
            return
        self.running = view
        self.crew.start(view, self.mesh.me, member=False)

    def _hear(self, agent: str, message: Message) -> None:
        kind = message.get("kind")
        try:
            if kind == "store":
                self.desk.push(message)
            elif kind == "waiting":
                waiting(self.crew, message)
            elif kind == "condemn":
                condemn(self, message)
            elif kind == "done":
                self.ending.succeed()
                self.describe()
            elif kind == "end":
                code, text, number, step = (message[k] for k in ("code", "text", "signal", "step"))
                self.end(Outcome(int(code), str(text), signal=int(number), step=int(step)))
            elif kind == "stored":
                self.ending.stored(int(message["step"]))
        except (Misuse, KeyError, TypeError, ValueError) as error:
            self.event("malformed", peer=agent, cause=str(error))

    def _suspect(self, agent: str, node: str, cause: str) -> None:
        self.progress.causes[agent] = cause
        reach("detect", lost=agent)
        self.event("peer_lost", peer=agent, peer_node=node, cause=cause)
        self.ending.check()
