"""Workers that have to leave though they live: hung ones, and ones that compute wrong gradients.

Invariant: what leads to an eviction is said about one generation or position, so that a message
that comes late evicts nobody.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from outlast.cluster.view import field
from outlast.launch.link import Message

if TYPE_CHECKING:
    from outlast.launch.agent import Agent
    from outlast.launch.crew import Crew


def condemn(
    agent: "Agent", message: Message, broadcast: Callable[[Message], None] | None = None
) -> None:
    """Take the worker `holder` out of the job if it is ours; its place stays empty. What a worker
    of ours says is passed on."""
    holder, generation = field(message, "holder", int), field(message, "generation", int)
    if agent.view is None or generation != agent.view.generation:
        return
    agent.outcomes.evict(agent.view, holder)
    if broadcast is not None:
        broadcast(message)
    for slot in agent.crew.slots:
        if slot.process is not None and slot.process.holder == holder and slot.member:
            slot.closed = True
            slot.process.lose("computed a wrong gradient")


def waiting(crew: "Crew", message: Message) -> None:
    """Another node's worker waits for somebody."""
    position = field(message, "generation", int), field(message, "place", int)
    seconds = field(message, "milliseconds", int, 0, 1 << 32) / 1000
    crew.standstill.waited(position, time.monotonic() - seconds)


def noted(crew: "Crew", holder: int, message: Message) -> None:
    """How far a worker has come, out of its pong."""
    if "place" in message:
        position = field(message, "generation", int), field(message, "place", int)
        leaf_s = field(message, "leaf", bool), field(message, "longest_s", float)
        count = field(message, "count", int)
        crew.standstill.pong(holder, position, count, leaf_s, time.monotonic())


def end_standstill(crew: "Crew", broadcast: Callable[[Message], None], now: float) -> None:
    """Tell others for whom our workers wait, and lose our own that others wait for."""
    working = {w.holder: w for w in crew.attached if w.ready and not w.finished}
    crew.standstill.watch(working)
    for (generation, place), seconds in crew.standstill.news(now):
        broadcast({
            "kind": "waiting", "generation": generation, "place": place,
            "milliseconds": int(1000 * seconds),
        })  # fmt: skip
    for holder, seconds in crew.standstill.hung(now):
        working[holder].hung = True
        working[holder].lose(f"hung: others have waited for it for {seconds:.1f} s")
