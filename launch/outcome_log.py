"""How each agent of a job ended, in a folder for all starts of the job.

It is what a start's conclusion is drawn from (`conclusion`), because nobody else can be asked
afterwards: srun says 0 of a node that died. Invariant: a record is whole or absent, and a node
without one has lost its agent. Hence a file for each agent: all of them end in the same instant,
and what several machines append to one file of NFS overwrites each other.
"""

import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from outlast.cluster.view import View
from outlast.launch.ending import Outcome

OUTCOMES = "outcomes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The end of one agent.

    restart: which start of the job. step: the newest committed step it knew of; source: the step
    on storage from which the start went on; both -1 if there is none. stopped: the state was
    brought to storage at a signal. lost: nodes that left its view and are not back. evicted: nodes
    whose workers computed wrong gradients. plain: no worker spoke outlast, so steps are unknown.
    """

    time: float
    job: str
    restart: int
    node: str
    agent: str
    code: int
    text: str = ""
    signal: int = 0
    step: int = -1
    source: int = -1
    stopped: bool = False
    lost: tuple[str, ...] = ()
    evicted: tuple[str, ...] = ()
    plain: bool = False


class OutcomeLog:
    """What one agent has seen that matters afterwards."""

    def __init__(self, directory: Path, job: str, restart: int, node: str) -> None:
        self._path, self._job, self._restart, self._node = directory / OUTCOMES, job, restart, node
        self.source = -1
        self.plain = True
        self._seen: dict[str, None] = {}
        self._evicted: dict[str, None] = {}

    def follow(self, view: View) -> None:
        """A new generation."""
        self._seen |= dict.fromkeys(member.node for member in view.members)

    def evict(self, view: View, holder: int) -> None:
        """The worker `holder` has to leave: its node is to blame."""
        nodes = (m.node for m in view.members if any(w.holder == holder for w in m.workers))
        self._evicted |= dict.fromkeys(nodes)

    def write(self, agent: str, outcome: Outcome, step: int, there: Iterable[str]) -> None:
        """Leave the end of this agent; `there`: the nodes that are in the job to the last."""
        present = {*there, self._node}
        record = Record(
            time=time.time(), job=self._job, restart=self._restart, node=self._node, agent=agent,
            code=outcome.code, text=outcome.text, signal=outcome.signal,
            step=max(step, outcome.step), source=self.source, stopped=outcome.step >= 0,
            lost=tuple(node for node in self._seen if node not in present),
            evicted=tuple(self._evicted), plain=self.plain,
        )  # fmt: skip
        self._path.mkdir(exist_ok=True)
        fresh = self._path / f".{agent}"
        fresh.write_text(json.dumps(asdict(record)), encoding="utf-8")
        fresh.replace(self._path / f"{self._node}-{agent}.json")


def read_outcomes(directory: Path) -> list[Record]:
    """All records, oldest first; a file that holds none, or of another version, is passed over.

    Raises OSError: nothing is known then, which is not the same as no record.
    """
    try:
        names = os.listdir(directory / OUTCOMES)
    except FileNotFoundError:
        return []
    found = [_read(directory / OUTCOMES / name) for name in names if name.endswith(".json")]
    return sorted((record for record in found if record is not None), key=lambda r: r.time)


@cache  # for they never change, and a supervisor asks often
def _read(path: Path) -> Record | None:
    try:
        values = json.loads(path.read_bytes())
        lists = {name: tuple(value) for name, value in values.items() if type(value) is list}
        return Record(**{**values, **lists})
    except (ValueError, TypeError, AttributeError):
        return None
