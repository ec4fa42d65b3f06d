"""A job under drill: its nodes, its logs, its failpoints, and whether it is at full strength."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outlast.cluster.errors import OutlastError
from outlast.launch.drill.namespaces import Namespaces
from outlast.launch.drill.nodes import Nodes, free_port, outlast
from outlast.launch.drill.trap import Traps
from outlast.launch.drill.watch import Watch

START_LIMIT_S, RETURN_LIMIT_S, STEP_LIMIT_S, END_LIMIT_S = 300.0, 180.0, 600.0, 1800.0
STABLE_COMMITS = 2  # of one generation: then the redundancy of the new layout is complete
TAIL_LINES, POLL_S = 20, 0.005
# What a step takes at least while somebody is on the way back: a short script outlasts its faults.
PATIENCE_S = 1.0
Member = dict[str, Any]


class DrillFailed(OutlastError):
    """The drill cannot go on; the text says why and where to look."""


class TrainingOver(DrillFailed):
    """The job has ended well while faults were still due."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What is started on how many nodes.

    Args:
        workers: of each node.
        launch: further flags of `outlast launch`.
        script: the user's command line.
    """

    nodes: int
    workers: int
    spares: int = 0
    launch: tuple[str, ...] = ()
    script: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """Of the nodes; members are ordered by name."""
        width = len(str(self.nodes + self.spares - 1))
        return [f"node{index:0{width}}" for index in range(self.nodes + self.spares)]


class DrilledJob:
    """One `outlast launch` per node. As a context it starts them, and ends them whatever happens.

    Args:
        out: its logs go to `out`, what the nodes print to `out.parent / "nodes"`.
        network: where given, every node runs in its own network namespace.
    """

    def __init__(
        self, out: Path, shape: Shape, traps: Traps, network: Namespaces | None = None
    ) -> None:
        self.out, self.shape, self.traps, self.network = out, shape, traps, network
        self.names = shape.names
        self._job, self._port = f"drill-{secrets.token_hex(4)}", free_port()
        self.nodes = Nodes(
            self.names, self._command, out.parent / "nodes", secrets.token_hex(32),
            traps.environment,
        )  # fmt: skip
        self.watch = Watch(out, self._alive)
        self.excused: set[str] = set()  # nodes that are meant to end with an error
        self.pace_s, self.patient = 0.0, True
        self.held_s: float | None = None  # pace while the effect of a fault is waited for
        self.evicted = 0  # workers that do not come back
        self.over_is_news = True  # whether the end of the training comes too early

    def _command(self, node: str) -> list[str]:
        shape, network = self.shape, self.network
        addresses = {name: network.address(name) if network else "127.0.0.1" for name in self.names}
        # In namespaces only its owner can listen at an address: whoever is left must be found.
        meeting = dict.fromkeys(f"{address}:{self._port}" for address in addresses.values())
        spares = ["--spares", str(shape.spares)] if shape.spares else []
        return [*(network.prefix(node) if network else ()), *outlast(
            "launch", "--nnodes", str(shape.nodes), "--rdzv-endpoint", ",".join(meeting),
            "--rdzv-id", self._job, "--local-addr", addresses[node], "--node-name", node,
            "--nproc-per-node", str(shape.workers), "--max-restarts", "1000",
            "--log-dir", str(self.out), *spares, *shape.launch, *shape.script,
        )]  # fmt: skip

    def __enter__(self) -> "DrilledJob":
        self.nodes.__enter__()
        self.out.mkdir(parents=True, exist_ok=True)
        for node in self.names:
            self.nodes.start(node)
        return self

    def __exit__(self, *trouble: Any) -> None:
        self.nodes.__exit__(*trouble)

    def _alive(self) -> None:
        # What has recovered can wait; what has not is being measured.
        pace_s = self.pace_s
        if self.patient and self.stable():
            pace_s = PATIENCE_S if not self.full() else pace_s
            pace_s = pace_s if self.held_s is None else self.held_s
        self.traps.pace_s = pace_s
        codes = self.nodes.exit_codes()
        for node, code in codes.items():
            if code and node not in self.excused:
                raise DrillFailed(f"{node} ended with {code}; {self.tail(node)}")
        if self.over_is_news and self.ended():
            raise TrainingOver(
                "the training was over before the last fault: give it more steps, or --pace"
            )

    def ended(self) -> bool:
        """Whether every node that was not killed has ended well."""
        return set(self.nodes.exit_codes().values()) == {0}

    def tail(self, node: str) -> str:
        """The end of what a node printed, with the place of the rest."""
        log = self.nodes.output / f"{node}.log"
        lines = log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        return f"the end of {log}:\n" + "\n".join(lines)

    @property
    def working(self) -> list[Member]:
        """Members of the newest view whose workers train, the first one first."""
        return [m for m in self.watch.members if m["workers"] and not m.get("spare")]

    @property
    def holders(self) -> dict[int, str]:
        """Worker -> its node, in the newest view."""
        return {int(holder): m["node"] for m in self.working for holder in m["workers"]}

    def stable(self) -> bool:
        """Whether the newest view has committed enough to stand the next loss."""
        return len(self.watch.commits.get(self.watch.generation, ())) >= STABLE_COMMITS

    def full(self) -> bool:
        """Whether all workers and spares are in the newest view."""
        ranks = self.shape.nodes * self.shape.workers - self.evicted
        return len(self.holders) >= ranks and len(self.watch.members) == len(self.names)

    def await_strength(self, step: int = 0) -> None:
        """Until all are there and stand on their own redundancy, and `step` is committed.

        Raises:
            TimeoutError, DrillFailed: they never will.
        """

        def strong() -> bool:
            over = self.ended() and not self.over_is_news
            return over or (self.full() and self.stable() and self.watch.step >= step)

        limit_s = STEP_LIMIT_S + RETURN_LIMIT_S if self.watch.step else START_LIMIT_S
        self.await_that(strong, f"all workers at step {step}", limit_s)

    def await_that(self, condition: Callable[[], bool], what: str, limit_s: float) -> None:
        """Until it holds; raises TimeoutError, or what `_alive` raises."""
        self.watch.until(lambda: True if condition() else None, what, limit_s, POLL_S)

    def await_view(self, without: str | int) -> None:
        """Until an agent (its id) or a worker (its holder) is in the view no more."""

        def gone() -> bool:
            return without not in {m["agent"] for m in self.watch.members} | self.holders.keys()

        self.await_that(gone, f"a view without {without}", RETURN_LIMIT_S)

    def await_end(self) -> None:
        """Until every node has ended well."""
        self.over_is_news = False
        self.await_that(self.ended, "the end of the training", END_LIMIT_S)
