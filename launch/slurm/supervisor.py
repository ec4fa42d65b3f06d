"""Starts the agents of an allocation, one step of srun per node, and stays until they have ended.

One step for all nodes would die as a whole when a node comes back before SLURM has noticed that it
was dead. Invariant: none of the agents' decisions needs the supervisor; it starts again what was
killed or cut off, hands signals on, and concludes.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from outlast.cluster.environment import environment
from outlast.cluster.timing import Timing
from outlast.launch.config import LaunchConfig
from outlast.launch.slurm.commands import command, nodes_of, say
from outlast.launch.slurm.conclusion import CUT_OFF, EXIT_AGAIN, Start
from outlast.launch.slurm.job import SlurmJob, answers
from outlast.launch.standalone import signals
from outlast.launch.surroundings import Surroundings, job_port

POLL_S = 0.5
PAUSE_MAX_S = 60.0
ENDED = (2, *range(128, 256))  # exit codes of an agent that was refused, or was told to end
STEP = (
    "srun", "--nodes=1", "--ntasks=1", "--overlap", "--whole", "--export=ALL", "--mpi=none",
    "--cpu-bind=none", "--input=none", "--no-kill", "--kill-on-bad-exit=0", "--unbuffered",
    "--disable-status",  # a SIGINT would only make it say how the task is
    # Written by the node itself: output through srun would stop a script when srun's node is dead.
    "--open-mode=append",
)  # fmt: skip
CONSOLE = "console-{}.log"
say_once = cache(say)


class Step:
    """The agent of one node, as srun shows it."""

    def __init__(self, node: str, directory: Path) -> None:
        self.node = node
        self._console = directory / CONSOLE.format(node)
        self._copied = self._console.stat().st_size if self._console.exists() else 0
        self.gone = False  # it is not started again
        self.known = 0  # records of the node from before the agent was started
        self.due = 0.0
        self._failures, self._progress, self._started = 0, -1, 0.0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def runs(self) -> bool:
        """Whether srun does: if the node is dead, until SLURM has noticed."""
        return self._process is not None and self._process.poll() is None

    def start(self, known: int = 0) -> None:
        """Begin; in a session of its own, because Ctrl-C is the supervisor's to hand on."""
        output = self._console.with_name(CONSOLE.format("%N"))
        words = [*STEP, f"--nodelist={self.node}", f"--output={output}", sys.executable]
        words += sys.orig_argv[1:]
        self._process = subprocess.Popen(words, stdin=subprocess.DEVNULL, start_new_session=True)
        self.known, self.due, self._started = known, 0.0, time.monotonic()

    def copy(self) -> None:
        """Show the lines that the node has written since."""
        if self._console.exists():
            with self._console.open("rb") as file:
                file.seek(self._copied)
                fresh = file.read()
            whole = fresh.rfind(b"\n") + 1
            if whole:  # unbuffered: what there is no room for now is copied later
                self._copied += os.write(sys.stdout.fileno(), fresh[:whole])

    def signal(self, number: int) -> None:
        """Send to srun, which hands SIGINT and SIGUSR1 on."""
        if self.runs and self._process is not None:
            self._process.send_signal(number)

    def pause(self, progress: int, failures_max: int) -> None:
        """Set when to start again: later after every failure, unless it did well meanwhile."""
        well = progress > self._progress and time.monotonic() > self._started + PAUSE_MAX_S
        self._failures = 0 if well else self._failures + 1
        self._progress, self.gone = progress, self._failures > failures_max
        self.due = time.monotonic() + min(PAUSE_MAX_S, 2.0**self._failures)


class Supervisor:
    """Of one start of a job."""

    def __init__(self, config: LaunchConfig, found: Surroundings, options: dict[str, Any]) -> None:
        self.config, self.found, self.options = config, found, options
        self.directory = Path(config.log_dir).absolute()
        self.timing = Timing(heartbeat_s=config.heartbeat_s)
        self.steps = [Step(node, self.directory) for node in found.nodes]
        self.signal = 0  # that somebody sent to end the job, other than SLURM's warning
        self._over: float | None = None
        self._start = Start.of(())  # as far as is known

    def run(self) -> int:
        """Until the start is over and concluded; returns the exit code."""
        left = command("squeue", "-h", "-j", self.found.slurm, "-o", "%L")[0] or "unknown"
        say(f"SLURM job {self.found.slurm}: {len(self.steps)} nodes, time left {left}")
        with signals() as wakeup, socket.create_server(("", 0), backlog=4096) as server:
            job = self.job(server.getsockname()[1])
            job.begin(self.directory)
            wakeup.settimeout(POLL_S)
            server.setblocking(False)
            for step in self.steps:
                step.start()
            while not self._ended():
                self._hear(wakeup)
                self.attempt(lambda: self._revive(job))
                self._copy()
                _answer(server)
            self._copy()
            code = 128 + self.signal if self.signal else job.conclude(self.directory)
            job.end(self.directory)
            return EXIT_AGAIN if code is None else code

    def attempt(self, work: Callable[[], None]) -> None:
        """What is in the way of some work, such as a disk that is full, does not end the job."""
        try:
            work()
        except OSError as error:
            say_once(f"the supervisor goes on in spite of: {error}")

    def job(self, port: int) -> SlurmJob:
        """What others have to know of this start; `port`: where the supervisor listens."""
        config, found = self.config, self.found
        key = self.options["job_key_file"] or (not environment().job_key and self.directory / "key")
        flags = {
            "--rdzv-endpoint": ",".join(f"{node}:{job_port(found.job)}" for node in found.nodes),
            "--rdzv-id": config.job, "--nnodes": f"{config.min_nodes}:{config.max_nodes}",
            "--spares": config.spares, "--nproc-per-node": config.nproc_per_node,
            "--log-dir": self.directory, "--checkpoint-dir": config.checkpoint_dir,
            **({"--job-key-file": Path(key).absolute()} if key else {}),
        }  # fmt: skip
        return SlurmJob(
            job=config.job, number=found.slurm, restart=found.requeues, nodes=found.nodes,
            supervisor=f"{found.node}:{port}", tries=self.options["tries"],
            requeue=not self.options["no_requeue"], drain=self.options["drain"],
            here=str(Path.cwd()),
            flags=tuple(str(word) for pair in flags.items() for word in pair),
            arguments=tuple(sys.argv[sys.argv.index("launch") + 1 :]),
        )  # fmt: skip

    def _ended(self) -> bool:
        """Whether nothing more comes of this start; ends what hangs on after its end."""
        running = [step for step in self.steps if step.runs]
        if (start := self._start).over or self.signal:
            # Those that are dead for the others are so for us, whenever srun hears of it.
            lost = {node for r in start.records if r.code != CUT_OFF for node in r.lost}
            self._over = self._over or time.monotonic()
            since_s = time.monotonic() - self._over
            grace_s = self.config.shutdown_timeout_s or self.timing.grace_s
            dead = start.over and all(step.node in lost for step in running)
            if since_s > (self.timing.silence_s if dead else grace_s + self.timing.no_quorum_s):
                for step in running:
                    step.signal(signal.SIGKILL)
                return True
        return not running

    def _hear(self, wakeup: socket.socket) -> None:
        with suppress(TimeoutError):
            for number in wakeup.recv(64):
                if number != signal.SIGUSR1:
                    self.signal = self.signal or number
                # SLURM sends its SIGTERM to the agents, too; as SIGUSR1 it does no harm twice.
                for step in self.steps:
                    step.signal(signal.SIGINT if number == signal.SIGINT else signal.SIGUSR1)

    def _revive(self, job: SlurmJob) -> None:
        """Start agents again that ended alone, while others go on."""
        start = self._start = job.start(self.directory)
        here, others = None, [step for step in self.steps if step.runs]
        if start.over or self.signal or not others:
            return
        for step in self.steps:
            records = [record for record in start.records if record.node == step.node]
            code = records[-1].code if len(records) > step.known else None
            if step.runs or step.gone or code in ENDED:
                continue
            if not step.due:
                metrics = self.directory / "metrics.jsonl"
                step.pause(metrics.stat().st_size if metrics.exists() else 0, job.tries)
            # Whoever was cut off has nothing to join before an agent can be reached again.
            elif time.monotonic() >= step.due and (code != CUT_OFF or self._reached(others)):
                here = nodes_of(self.found.slurm) if here is None else here
                step.gone = bool(here) and step.node not in here
                if not step.gone:
                    say(f"the agent of {step.node} is started again")
                    step.start(len(records))

    def _copy(self) -> None:
        for step in self.steps:
            self.attempt(step.copy)

    def _reached(self, steps: list[Step]) -> bool:
        return any(answers(f"{step.node}:{job_port(self.found.job)}") for step in steps)


def _answer(server: socket.socket) -> None:
    """Take the calls of agents that ask whether the supervisor lives."""
    with suppress(BlockingIOError):
        while True:
            server.accept()[0].close()
