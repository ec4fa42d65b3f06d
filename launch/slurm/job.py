"""One start of a job in an allocation of SLURM: what all of its processes know, and its end.

The supervisor concludes. Its node is one like the others: where it is gone, one of the agents
does, and ends the job, which SLURM would call running until its time limit. Invariant: a start is
concluded once: by whoever makes its marker, or the next one if that process dies before SLURM has
heard of it.
"""

import json
import signal
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

from outlast.launch.outcome_log import OUTCOMES, Record, read_outcomes
from outlast.launch.slurm.commands import command, drain, nodes_of, preempted, requeue, say
from outlast.launch.slurm.conclusion import EXIT_AGAIN, EXIT_FAILED, Start, decide

FILE = "job.json"
PROBE_S = 1.0
PROBES_MAX = 180  # longer than all commands of a conclusion take, each at its own limit
MISSED_MAX = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmJob:
    """A start of a job, as its supervisor leaves it in the log directory.

    supervisor: "host:port" where it listens as long as it lives. here: the directory it runs in.
    flags: with which agents that come later join; arguments: those of the supervisor's command.
    """

    job: str
    number: str  # of SLURM
    restart: int
    nodes: tuple[str, ...]
    supervisor: str
    tries: int
    requeue: bool
    drain: bool
    here: str
    flags: tuple[str, ...]
    arguments: tuple[str, ...]

    def begin(self, directory: Path) -> None:
        """Replace the file of an earlier start; what another launch in this very start has left,
        in salloc's shell for instance, is set aside, or this one would be over at once."""
        if any(record.restart == self.restart for record in self.records(directory)):
            (directory / OUTCOMES).rename(directory / f"{OUTCOMES}.{time.time_ns()}")
        for marker in directory.glob(f".*ed-{self.restart}-*"):
            marker.unlink()
        fresh = directory / f".{FILE}"
        fresh.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        fresh.replace(directory / FILE)

    @staticmethod
    def read(directory: Path) -> "SlurmJob | None":
        """The start that wrote there last."""
        try:
            values = json.loads((directory / FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return SlurmJob(**{**values, **lists})

    @staticmethod
    def end(directory: Path) -> None:
        """The start is over: nobody can join it, and nobody has to conclude it any more."""
        (directory / FILE).unlink(missing_ok=True)

    def records(self, directory: Path) -> list[Record]:
        """How the agents of this start and of those before it ended."""
        name = self.job.rpartition("-")[0]
        return [r for r in read_outcomes(directory) if r.job.rpartition("-")[0] == name]

    def start(self, directory: Path) -> Start:
        """What is known of this start."""
        found = [r for r in self.records(directory) if r.restart == self.restart]
        return Start.of(found, self.nodes)

    def conclude(self, directory: Path) -> int | None:
        """Say and do what is to become of the job; its exit code, None if it starts again."""
        if not self._claim(directory):
            return None  # somebody else did
        # A requeue makes SLURM end all that the batch script has started, its commands included.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if preempted(self.number):
            (directory / f".preempted-{self.restart}-").touch()
        spared = [int(path.name.split("-")[1]) for path in directory.glob(".preempted-*-")]
        decision = decide(self.records(directory), self.restart, self.nodes, self.tries, spared)
        if decision.code in (EXIT_FAILED, EXIT_AGAIN):
            say(decision.text)  # of the rest, the agents have said it
        if self.drain:
            drain(self.number, decision.bad)
        if decision.again and self.requeue:
            if not (wrong := requeue(self.number, decision.bad, len(self.nodes))):
                return None
            say(f"cannot start again by itself ({wrong}): start it with the same --log-dir")
        return decision.code

    def _claim(self, directory: Path) -> bool:
        """Whether to conclude: nobody else does, or who began to has had more than enough time."""
        for attempt in count():
            with suppress(FileExistsError):
                (directory / f".concluded-{self.restart}-{attempt}").touch(exist_ok=False)
                break
            for _ in range(PROBES_MAX):
                state, wrong = command("squeue", "-h", "-j", self.number, "-o", "%T")
                if SlurmJob.read(directory) != self or not (wrong or state == "RUNNING"):
                    return False
                time.sleep(PROBE_S)
        return True


def answers(address: str) -> bool:
    """Whether a process listens at "host:port"."""
    host, _, port = address.rpartition(":")
    with suppress(OSError), socket.create_connection((host, int(port)), PROBE_S):
        return True
    return False


def outlive_supervisor(directory: Path, job: str, node: str, cut_off: bool) -> None:
    """After the end of a node's agent: conclude if the supervisor's node is gone.

    It is waited for until nothing more comes of the start: a node whose agent left no record may
    go on behind a cut, until SLURM takes it out of the job. To an agent that was cut off itself,
    a supervisor that is busy concluding would seem gone.
    """
    start = SlurmJob.read(directory)
    host = start.supervisor.rpartition(":")[0] if start is not None else node
    if start is None or start.job != job or host == node or host not in start.nodes:
        return  # its node is this one, or one outside that lives as long as the allocation
    missed = 0
    while missed < MISSED_MAX:
        if answers(start.supervisor):
            return
        known = start.start(directory)
        over = known.over and not cut_off
        silent = {*start.nodes} - {record.node for record in known.records}
        here = () if over or not silent else nodes_of(start.number)
        missed += over or not silent or (bool(here) and not silent & {*here})
        time.sleep(PROBE_S)
    if start.conclude(directory) is not None:
        say(f"{host}, which ran the batch script, is gone: {node} ends the job")
        command("scancel", start.number)
