"""How each agent of a job ended, in one file for all starts of the job.

It is what a start's conclusion is drawn from (`conclusion`), because nobody else can be asked
afterwards: srun says 0 of a node that died. Invariant: a line is whole or absent (one O_APPEND
write), and a node without a line has lost its agent.
"""

import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from outlast.cluster.view import View
from outlast.launch.ending import Outcome

FILE = "outcomes.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The end of one agent.

    restart: which start of the job. step: the newest committed step it knew of; source: the step
    on storage from which the start went on; both -1 if there is none. stopped: the state was
    brought to storage at a signal. lost: nodes that left its view and are not back. evicted: nodes
    whose workers computed wrong gradients.
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


class OutcomeLog:
    """What one agent has seen that matters afterwards."""

    def __init__(self, directory: Path, job: str, restart: int, node: str) -> None:
        self._path, self._job, self._restart, self._node = directory / FILE, job, restart, node
        self.source = -1
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
        """Append the end of this agent; `there`: the nodes that are in the job to the last."""
        present = {*there, self._node}
        record = Record(
            time=time.time(), job=self._job, restart=self._restart, node=self._node, agent=agent,
            code=outcome.code, text=outcome.text, signal=outcome.signal,
            step=max(step, outcome.step), source=self.source, stopped=outcome.step >= 0,
            lost=tuple(node for node in self._seen if node not in present),
            evicted=tuple(self._evicted),
        )  # fmt: skip
        file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            os.write(file, json.dumps(asdict(record)).encode() + b"\n")
        finally:
            os.close(file)


def read_outcomes(directory: Path) -> list[Record]:
    """All records, oldest first; a line that is none, or of another version, is passed over."""
    try:
        lines = (directory / FILE).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            values = json.loads(line)
            lists = {name: tuple(value) for name, value in values.items() if type(value) is list}
            found.append(Record(**{**values, **lists}))
        except (ValueError, TypeError, AttributeError):
            continue
    return found


