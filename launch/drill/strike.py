"""Carries out the orders of a drill on real processes, and mends what they broke.

Every strike notes what it took and when, and waits for the sign in the job's own logs that it took
effect; a strike without a sign is told as one, never passed over.
"""

import mmap
import os
import random
import signal
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from outlast.checkpoint.memory import parity_region
from outlast.launch.drill.drilled_job import PATIENCE_S, RETURN_LIMIT_S, DrilledJob, Member
from outlast.launch.drill.fault import Order, Salvo
from outlast.launch.drill.trap import Facts, Trap
from outlast.launch.drill.watch import Event
from outlast.launch.report.timeline import Fault

EFFECT_LIMIT_S = 90.0  # for a process to come to a point, and for the sign of what takes nobody
SLICE_S = 0.009  # a slowed worker is stopped for a part of each: shorter than most leaves
SIGNS = {"slow": "slow_rank", "corrupt-snapshot": "corrupt", "poison": "poisoned"}
DEEDS = {
    "kill-worker": "worker of {} killed", "kill-node": "{} killed, whole node",
    "kill-proposer": "{} killed, proposer of the views", "hang": "worker of {} hangs",
    "partition": "{} cut off", "slow": "worker of {} slowed",
    "corrupt-snapshot": "worker of {} killed, parity corrupted", "poison": "worker of {} poisoned",
}  # fmt: skip


@dataclass(slots=True)
class Struck:
    """One order and what came of it; `fault` is None where it was not run, and `why` says why.

    member, pid, trap: the victim, and where it was held.
    """

    order: Order
    fault: Fault | None = None
    sign: Event | None = None
    why: str = ""
    member: Member = field(default_factory=dict)
    pid: int = 0
    trap: Trap | None = None


class Striker:
    """Strikes at one job.

    Args:
        generator: draws the victims; None: always the same ones (the proposer for what names it,
            the last node for nodes, a worker of the second for the rest).
    """

    def __init__(self, job: DrilledJob, generator: random.Random | None = None) -> None:
        self.job, self.generator = job, generator

    def strike(self, salvo: Salvo) -> list[Struck]:
        """All orders of a salvo, their effect, and the repairs that are not the job's own."""
        hit: set[str] = set()
        over, slow = threading.Event(), any(order.kind == "slow" for order in salvo)
        self.job.held_s = 0.0 if slow else PATIENCE_S  # who is slow shows only by computing
        found = [self._aim(order, hit) for order in salvo]
        try:
            for struck in found:
                if not struck.why:
                    self._hit(struck, hit, over)
            for struck in found:
                if struck.fault is not None:
                    self._await_effect(struck)
        finally:
            over.set()
            self.job.held_s = None
            for struck in found:
                if struck.trap is not None:
                    self.job.traps.drop(struck.trap)
        return found

    def _aim(self, order: Order, hit: set[str]) -> Struck:
        """Choose the victim, or set the trap that does."""
        struck, job = Struck(order), self.job
        there = [m for m in job.working if m["node"] not in hit]
        candidates = [m for m in there if order.node in ("", m["node"])]
        if order.kind == "partition" and job.network is None:
            struck.why = "not run: a partition needs --namespaces"
        elif not candidates or len(job.working) < 2:
            struck.why = f"not run: {order.node or 'nobody to strike'} is not in the job"
        if struck.why:
            return struck
        if not order.within:
            struck.member = self._choose(order, candidates)
            hit.add(struck.member["node"])

        def fits(facts: Facts) -> bool:
            if order.kind == "poison":
                return bool(facts["holder"] == struck.member["workers"][0])
            if order.within:
                free = order.phase == "detect" or facts["node"] not in hit
                return free and order.node in ("", facts["node"])
            return bool(facts["node"] == struck.member["node"])

        poison = order.kind == "poison"
        if point := "leaf" if poison else order.phase:
            struck.trap = Trap(point, fits, {"poison": order.how} if poison else {}, lasting=poison)
            job.traps.set(struck.trap)
        return struck

    def _choose(self, order: Order, candidates: list[Member]) -> Member:
        proposer = self.job.watch.members[0]
        if order.kind == "kill-proposer" and proposer in candidates:
            return proposer
        if self.generator is not None:
            return self.generator.choice(candidates)
        return candidates[-1] if order.takes_node else candidates[1 % len(candidates)]

    def _hit(self, struck: Struck, hit: set[str], over: threading.Event) -> None:
        order, job, trap = struck.order, self.job, struck.trap
        if trap is not None:
            try:
                job.await_that(trap.sprung.is_set, f"{trap.point} of a victim", EFFECT_LIMIT_S)
            except TimeoutError as error:
                struck.why = str(error)
                return
            if order.within:
                node = trap.facts["node"]
                struck.member = next((m for m in job.watch.members if m["node"] == node), {})
                hit.add(node)
        node = struck.member.get("node", "")
        workers = job.nodes.workers(node)
        held = trap.facts["pid"] if trap is not None else 0
        struck.pid = held if held in workers else next(iter(workers), 0)
        if not struck.pid:
            struck.why = f"not run: {node} has no worker"
            return
        at, holders, agents = time.time(), (), ()
        self._do(struck, over)
        if order.takes_node:
            holders = tuple(int(holder) for holder in struck.member["workers"])
            agents = (struck.member["agent"],)
        elif trap is not None and "holder" in trap.facts:
            holders = (int(trap.facts["holder"]),)
        deed = DEEDS[order.kind].format(node) + (f", at {order.phase}" if order.phase else "")
        deed += f" ({order.how})" if order.how else ""
        struck.fault = Fault(at, order.kind, deed, node, agents, holders)

    def _do(self, struck: Struck, over: threading.Event) -> None:
        """The deed itself."""
        order, nodes, node = struck.order, self.job.nodes, struck.member["node"]
        if order.kind == "kill-worker":
            os.kill(struck.pid, signal.SIGKILL)
        elif order.kind in ("kill-node", "kill-proposer"):
            nodes.kill_node(node)
        elif order.kind == "hang" and order.how == "stop":
            os.kill(struck.pid, signal.SIGSTOP)
        elif order.kind == "hang" and order.how == "node":
            nodes.signal_node(node, signal.SIGSTOP)
        elif order.kind == "partition" and self.job.network is not None:
            self.job.excused.add(node)
            self.job.network.cut([node])
        elif order.kind == "slow":
            slow = (struck.pid, 1 / order.factor, over)
            threading.Thread(target=_slow_down, args=slow, daemon=True).start()
        elif order.kind == "corrupt-snapshot":
            self._corrupt(struck)
        if struck.trap is not None and order.how != "block" and not struck.trap.lasting:
            struck.trap.release()

    def _corrupt(self, struck: Struck) -> None:
        """Flip bits in the parity that another node keeps, and kill the worker, so that a recovery
        must do without it; stopped meanwhile, its keepers cannot replace it by a newer one."""
        job = self.job
        keeper = [m for m in job.working if m["node"] != struck.member["node"]][-1]["node"]
        stopped = job.nodes.workers(keeper)
        watch, before = job.watch, job.watch.generation
        try:
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
            flip_parity(job.nodes.agents[keeper].pid)
            os.kill(struck.pid, signal.SIGKILL)
            job.await_that(lambda: watch.generation > before, "the next view", RETURN_LIMIT_S)
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)

    def _await_effect(self, struck: Struck) -> None:
        """The sign in the logs, then the repair."""
        job, order, fault, node = self.job, struck.order, struck.fault, struck.member["node"]
        assert fault is not None
        try:
            if order.takes_node:
                job.await_view(struck.member["agent"])
                struck.sign = job.watch.view
                self._bring_back(order, node)
                return
            name = SIGNS.get(order.kind, "worker_lost")
            who = {"pid": struck.pid} if name == "worker_lost" else {}
            who |= {"peer_node": node} if order.kind in ("slow", "poison") else {}
            limit_s = EFFECT_LIMIT_S if order.kind in SIGNS else RETURN_LIMIT_S
            struck.sign = job.watch.until(
                lambda: job.watch.event(name, fault.time - 1, **who), f"'{name}' of {node}",
                limit_s, 0.005,
            )  # fmt: skip
        except TimeoutError as error:
            struck.why = str(error)
            return
        lost = job.watch.event("worker_lost", fault.time - 1, pid=struck.pid)
        if order.kind == "poison":
            if struck.sign["action"] == "evicted":  # and nothing takes its place but a spare
                job.evicted += 1
                job.await_view(int(struck.member["workers"][0]))
        elif lost is not None:
            struck.fault = replace(fault, holders=(int(lost["holder"]),))

    def _bring_back(self, order: Order, node: str) -> None:
        job = self.job
        if order.kind == "hang":
            job.nodes.signal_node(node, signal.SIGCONT)
            return
        if order.kind == "partition" and job.network is not None:
            ended = f"the end of {node}, which is cut off"
            job.await_that(lambda: job.nodes.exit_codes()[node] is not None, ended, RETURN_LIMIT_S)
            job.network.heal([node])
            job.excused.discard(node)
        job.nodes.start(node)


def _slow_down(pid: int, share: float, over: threading.Event) -> None:
    """Let a process run for a share of the time, until `over`."""
    try:
        while not over.wait(SLICE_S * share):
            os.kill(pid, signal.SIGSTOP)
            over.wait(SLICE_S * (1 - share))
            os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        return


def flip_parity(agent: int) -> None:
    """Flip one bit in every stretch of parity that the workers of an agent keep."""
    for descriptor in Path(f"/proc/{agent}/fd").iterdir():
        if "memfd:outlast-" not in (name := os.readlink(descriptor)) or "latch" in name:
            continue
        with descriptor.open("r+b") as file:
            size = os.fstat(file.fileno()).st_size
            begin, end = parity_region(size)
            with mmap.mmap(file.fileno(), size) as memory:
                while begin < end:
                    try:
                        begin = os.lseek(file.fileno(), begin, os.SEEK_DATA)
                    except OSError:  # nothing but holes from here on
                        break
                    memory[begin + 100] ^= 1
                    begin += 1 << 16
