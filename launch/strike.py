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
from dataclasses import dataclass, field
from pathlib import Path

from outlast.launch.drilled_job import RETURN_LIMIT_S, DrilledJob, Member
from outlast.launch.fault import Order, Salvo
from outlast.launch.timeline import Fault
from outlast.launch.trap import Facts, Trap
from outlast.launch.watch import Event

EFFECT_LIMIT_S = 90.0  # for the sign of a fault that takes nobody away
SLICE_S = 0.06  # a slowed worker is stopped for a part of each slice
SIGNS = {"slow": "slow_rank", "corrupt-snapshot": "corrupt", "poison": "poisoned"}


@dataclass(slots=True)
class Struck:
    """One order and what came of it; `fault` is None where it was not run, and `why` says why."""

    order: Order
    fault: Fault | None = None
    sign: Event | None = None
    why: str = ""


@dataclass(slots=True)
class Aim:
    """The victim of an order: a member, a worker of it, and the process held at a failpoint."""

    struck: Struck
    member: Member = field(default_factory=dict)
    trap: Trap | None = None
    pid: int = 0
    slowing: "Slowing | None" = None


class Slowing(threading.Thread):
    """Lets a process run for 1 / factor of the time."""

    def __init__(self, pid: int, factor: float) -> None:
        super().__init__(name="slowing", daemon=True)
        self._pid, self._share, self._over = pid, 1 / factor, threading.Event()
        self.start()

    def run(self) -> None:
        try:
            while not self._over.wait(SLICE_S * self._share):
                os.kill(self._pid, signal.SIGSTOP)
                self._over.wait(SLICE_S * (1 - self._share))
                os.kill(self._pid, signal.SIGCONT)
        except ProcessLookupError:
            return

    def end(self) -> None:
        """Full speed again."""
        self._over.set()
        self.join()


class Striker:
    """Strikes at one job.

    Args:
        generator: draws the victims; None: always the same ones (the proposer for what names it,
            the last node for nodes, a worker of the second for the rest).
    """

    def __init__(self, job: DrilledJob, generator: random.Random | None = None) -> None:
        self.job, self.generator = job, generator
        self.repairs: list[Fault] = []  # losses that mending needed

    def strike(self, salvo: Salvo) -> list[Struck]:
        """All orders of a salvo, their effect, and the repairs that are not the job's own."""
        aims: list[Aim] = []
        hit: set[str] = set()
        for order in salvo:
            aims.append(self._aim(order, hit))
        try:
            for aim in aims:
                if not aim.struck.why:
                    self._hit(aim, hit)
            for aim in aims:
                if aim.struck.fault is not None:
                    self._await_effect(aim)
        finally:
            for aim in aims:
                if aim.trap is not None:
                    self.job.traps.drop(aim.trap)
                if aim.slowing is not None:
                    aim.slowing.end()
        return [aim.struck for aim in aims]

    # ---- who

    def _aim(self, order: Order, hit: set[str]) -> Aim:
        """Choose the victim, or set the trap that does."""
        aim, job = Aim(Struck(order)), self.job
        if order.kind == "partition" and job.network is None:
            aim.struck.why = "not run: a partition needs --namespaces"
            return aim
        there = [m for m in job.working if m["node"] not in hit]
        candidates = [m for m in there if order.node in ("", m["node"])]
        if not candidates or len(job.working) < 2:
            aim.struck.why = f"not run: {order.node or 'nobody left to strike'} is not in the job"
            return aim
        if not order.within:
            aim.member = self._choose(order, candidates)
            hit.add(aim.member["node"])
        point = order.phase or ("reduce" if order.how == "block" else "")
        if order.kind == "poison":
            answer, sick = {"poison": order.how}, int(aim.member["workers"][0])
            aim.trap = Trap("leaf", lambda facts: facts["holder"] == sick, answer, lasting=True)
        elif point:

            def fits(facts: Facts) -> bool:
                if order.within:
                    anywhere = order.phase == "detect" or facts["node"] not in hit
                    return anywhere and order.node in ("", facts["node"])
                return bool(facts["node"] == aim.member["node"])

            aim.trap = Trap(point, fits)
        if aim.trap is not None:
            job.traps.set(aim.trap)
        return aim

    def _choose(self, order: Order, candidates: list[Member]) -> Member:
        proposer = self.job.members[0]
        if order.kind == "kill-proposer" and proposer in candidates:
            return proposer
        if self.generator is not None:
            return self.generator.choice(candidates)
        return candidates[-1] if order.takes_node else candidates[1 % len(candidates)]

    # ---- how

    def _hit(self, aim: Aim, hit: set[str]) -> None:
        order, job, trap = aim.struck.order, self.job, aim.trap
        if trap is not None:
            try:
                job.watch.until(
                    lambda: True if trap.sprung.is_set() else None, f"{trap.point} of a victim",
                    EFFECT_LIMIT_S, 0.002,
                )  # fmt: skip
            except TimeoutError:
                aim.struck.why = f"nobody came to {trap.point} within {EFFECT_LIMIT_S:.0f} s"
                return
            if order.within:
                node = trap.facts["node"]
                aim.member = next((m for m in job.members if m["node"] == node), {})
                hit.add(node)
        workers = job.nodes.workers(aim.member["node"])
        aim.pid = trap.facts["pid"] if trap is not None else 0
        if aim.pid not in workers:
            aim.pid = workers[0] if workers else 0
        if not aim.pid:
            aim.struck.why = f"not run: {aim.member['node']} has no worker"
            return
        at, holders = self._do(aim), ()
        if order.takes_node:
            holders = tuple(int(holder) for holder in aim.member["workers"])
        elif trap is not None and "holder" in trap.facts:
            holders = (int(trap.facts["holder"]),)
        agents = (aim.member["agent"],) if order.takes_node else ()
        aim.struck.fault = Fault(
            at, order.kind, label(order, aim.member["node"]), aim.member["node"], agents, holders
        )

    def _do(self, aim: Aim) -> float:
        """The deed; returns time.time() of it."""
        order, nodes, node = aim.struck.order, self.job.nodes, aim.member["node"]
        at = time.time()
        if order.kind == "kill-worker":
            os.kill(aim.pid, signal.SIGKILL)
        elif order.kind in ("kill-node", "kill-proposer"):
            nodes.kill_node(node)
        elif order.kind == "hang" and order.how == "stop":
            os.kill(aim.pid, signal.SIGSTOP)
        elif order.kind == "hang" and order.how == "node":
            nodes.signal_node(node, signal.SIGSTOP)
        elif order.kind == "partition" and self.job.network is not None:
            self.job.excused.add(node)
            self.job.network.cut([node])
        elif order.kind == "slow":
            aim.slowing = Slowing(aim.pid, order.factor)
        elif order.kind == "corrupt-snapshot":
            self._corrupt(aim)
        if aim.trap is not None and order.how != "block" and not aim.trap.lasting:
            aim.trap.release()
        return at

    def _corrupt(self, aim: Aim) -> None:
        """Flip bits in the parity that another node keeps, and kill the worker, so that a recovery
        must do without it; stopped meanwhile, its keeper cannot replace it by a newer one."""
        others = [m for m in self.job.working if m["node"] != aim.member["node"]]
        keeper = others[-1]
        pid = self.job.nodes.workers(keeper["node"])[0]
        os.kill(pid, signal.SIGSTOP)
        try:
            agent = self.job.nodes.agents[keeper["node"]].pid
            flip_parity(agent, int(keeper["workers"][0]))
            os.kill(aim.pid, signal.SIGKILL)
            generation = self.job.watch.view["generation"] if self.job.watch.view else 0
            self.job.watch.until(
                lambda: True if (self.job.watch.view or {})["generation"] > generation else None,
                "the view without the worker", RETURN_LIMIT_S, 0.002,
            )  # fmt: skip
        finally:
            os.kill(pid, signal.SIGCONT)

    # ---- what came of it

    def _await_effect(self, aim: Aim) -> None:
        """The sign in the logs, then the repair."""
        struck, job, node = aim.struck, self.job, aim.member["node"]
        order, fault = struck.order, struck.fault
        assert fault is not None
        try:
            if order.takes_node:
                job.await_view(aim.member["agent"])
                struck.sign = job.watch.view
                self._bring_back(order, node)
                return
            name = SIGNS.get(order.kind, "worker_lost")
            who = {"pid": aim.pid} if name == "worker_lost" else {}
            who |= {"node": node} if order.kind in ("slow", "poison") else {}
            limit_s = EFFECT_LIMIT_S if name in SIGNS.values() else RETURN_LIMIT_S
            struck.sign = job.watch.until(
                lambda: job.watch.event(name, fault.time - 1, **who), f"'{name}' of {node}",
                limit_s, 0.005,
            )  # fmt: skip
        except TimeoutError as error:
            struck.why = str(error)
            return
        holders = fault.holders
        lost = job.watch.event("worker_lost", fault.time - 1, pid=aim.pid)
        if lost is not None and order.kind != "poison":
            holders = (int(lost["holder"]),)
        struck.fault = Fault(fault.time, fault.kind, fault.label, node, fault.agents, holders)
        if order.kind == "poison":
            self._replace(aim)

    def _bring_back(self, order: Order, node: str) -> None:
        job = self.job
        if order.kind == "hang":
            job.nodes.signal_node(node, signal.SIGCONT)
            return
        if order.kind == "partition" and job.network is not None:
            job.network.heal([node])
            job.watch.until(
                lambda: True if job.nodes.exit_codes()[node] is not None else None,
                f"the end of {node}, which is cut off", RETURN_LIMIT_S,
            )  # fmt: skip
            job.excused.discard(node)
        job.nodes.start(node)

    def _replace(self, aim: Aim) -> None:
        """A node whose worker was evicted for good is replaced, as its operator would."""
        job, trap = self.job, aim.trap
        assert trap is not None
        job.traps.drop(trap)
        sign = aim.struck.sign or {}
        if sign.get("action") != "evict":
            return
        job.await_view(int(trap.facts["holder"]))
        job.watch.until(lambda: True if job.stable() else None, "two commits", RETURN_LIMIT_S)
        node, agent = aim.member["node"], aim.member["agent"]
        at = job.nodes.kill_node(node)
        self.repairs.append(Fault(at, "repair", f"{node} replaced", node, (agent,)))
        job.await_view(agent)
        job.nodes.start(node)


def label(order: Order, node: str) -> str:
    """What was done, in words."""
    deed = {
        "kill-worker": f"worker of {node} killed", "kill-node": f"{node} killed, whole node",
        "kill-proposer": f"{node} killed, proposer of the views",
        "hang": f"{node} frozen" if order.how == "node" else f"worker of {node} hangs",
        "partition": f"{node} cut off", "slow": f"worker of {node} {order.factor:g} x slower",
        "corrupt-snapshot": f"worker of {node} killed, a parity corrupted",
        "poison": f"worker of {node} poisoned ({order.how})",
    }[order.kind]  # fmt: skip
    return f"{deed}, at {order.phase}" if order.phase else deed


def flip_parity(agent: int, holder: int) -> None:
    """Flip one bit in every stretch of parity of a worker, in the memory that its agent holds."""
    from outlast.checkpoint.memory import parity_region

    for descriptor in Path(f"/proc/{agent}/fd").iterdir():
        if f"outlast-{holder}" not in os.readlink(descriptor):
            continue
        with descriptor.open("r+b") as file:
            size = os.fstat(file.fileno()).st_size
            begin, end = parity_region(size)
            with mmap.mmap(file.fileno(), size) as memory:
                while begin < end:
                    try:
                        begin = os.lseek(file.fileno(), begin, os.SEEK_DATA)
                    except OSError:  # nothing but holes from here on
                        return
                    memory[begin + 100] ^= 1
                    begin += 1 << 16
        return
