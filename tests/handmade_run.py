"""One handmade run: a worker dies, then a node, and the proposer in the middle of that recovery."""

from typing import Any

from outlast.launch.report.timeline import Fault

A, B, C = ("node0", "aaaa"), ("node1", "bbbb"), ("node2", "cccc")
HOLDERS = {"aaaa": [1, 2], "bbbb": [3, 4], "cccc": [5, 6], "dddd": [7, 8]}


def event(time: float, author: tuple[str, str], name: str, **rest: Any) -> dict[str, Any]:
    return {"time": time, "node": author[0], "agent": author[1], "event": name, **rest}


def view(
    author: tuple[str, str], generation: int, members: dict[tuple[str, str], list[int]],
    detected: float, agreed: float,
) -> dict[str, Any]:  # fmt: skip
    told = [{"node": n, "agent": a, "workers": holders} for (n, a), holders in members.items()]
    times = {"detected": detected, "agreed": agreed}
    return event(agreed, author, "view", generation=generation, members=told, **times)


def recovered(author: tuple[str, str], time: float, generation: int, **rest: Any) -> dict[str, Any]:
    return event(time, author, "recovered", **{"generation": generation, "step": 5, "redone": 0,
                 "rank": 0, "phases": {}, "lost": [], "rungs": {}, **rest})  # fmt: skip


EVERYBODY = {A: [1, 2], B: [3, 4], C: [5, 6]}
EVENTS = [
    view(A, 1, EVERYBODY, 0.0, 0.1),
    view(B, 1, EVERYBODY, 0.0, 0.2),
    # A worker of node1 dies at 10.0; node0 knows at 10.01, node1 at 10.005.
    event(10.005, B, "worker_lost", holder=4, local_rank=1, pid=9, cause="signal 9"),
    view(A, 2, {A: [1, 2], B: [3], C: [5, 6]}, 10.010, 10.030),
    view(B, 2, {A: [1, 2], B: [3], C: [5, 6]}, 10.005, 10.025),
    recovered(A, 10.2, 2, phases={"interrupt": 5.0, "move": 90.0}, rungs={"memory": 100},
              leaves_kept=3, leaves_missing=2),
    recovered(C, 10.3, 2, phases={"interrupt": 8.0, "move": 70.0, "plan": 1.0}, redone=1,
              rungs={"memory": 60, "replica": 500}, leaves_kept=2, leaves_missing=2),
    # The worker comes back.
    view(A, 3, EVERYBODY | {B: [3, 9]}, 14.0, 14.1),
    recovered(A, 14.2, 3),
    # node2 dies, and the proposer while the others recover from that.
    view(B, 4, {A: [1, 2], B: [3, 9]}, 20.5, 20.6),
    view(B, 5, {B: [3, 9]}, 21.0, 21.1),
    recovered(B, 21.4, 5, redone=2, phases={"move": 20.0}, rungs={"parity": 7}),
    # node2 comes back as a new agent.
    view(B, 6, {B: [3, 9], ("node2", "dddd"): [7, 8]}, 30.0, 30.5),
    event(40.0, B, "finished"),
    view(("node2", "dddd"), 7, {("node2", "dddd"): [7, 8]}, 40.1, 40.2),
    event(41.0, ("node2", "dddd"), "finished"),
]  # fmt: skip
METRICS = [{"step": step, "time": 4.0 * step, "loss": 5.0 - step / 10} for step in range(11)]
FAULTS = [
    Fault(9.995, "worker", "kill -9 of a worker", "node1", holders=(4,)),
    Fault(20.0, "node", "kill -9 of a node", "node2", agents=("cccc",)),
    Fault(20.8, "cascade", "kill -9 during recovery", "node0", agents=("aaaa",)),
]
