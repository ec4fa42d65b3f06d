"""Islands that really train: start, kill, collect digests; and what they must end with."""

import hashlib
import json
import re
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch

from outlast.runtime.determinism import seed_all
from outlast.runtime.islands.codec import codec

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import island_script as script
from reference import Island as Model
from reference import Reference
from training_job import TrainingJob

Digests = dict[int, set[tuple[str, ...]]]  # island -> (param, outer) of its ranks


class Island(TrainingJob):
    """One island of a launch."""

    def __init__(self, job: TrainingJob, number: int) -> None:
        self.process, self._out, self.number = job.process, job._out, number
        self.directory = job.directory / f"island{number}"

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """What it has applied."""
        return self.events("outer")

    def processes(self) -> list[psutil.Process]:
        """Of all its living agents and their workers."""
        agents = [psutil.Process(pid) for pid in self.agents().values() if psutil.pid_exists(pid)]
        return [each for agent in agents for each in (agent, *agent.children(recursive=True))]

    def kill(self) -> None:
        """All of it at once."""
        for process in self.processes():
            process.send_signal(signal.SIGSTOP)  # nobody sees another one die
        for process in self.processes():
            process.kill()


class IslandsJob(TrainingJob):
    """`outlast launch --islands` of the script of islands."""

    program = script.__file__

    def __init__(
        self, directory: Path, islands: int, shape: tuple[int, int], settings: dict[str, Any],
        options: Iterable[str], launch: Iterable[str] = (),
    ) -> None:  # fmt: skip
        nodes, workers = map(str, shape)
        flags = ["--islands", str(islands), "--standalone", "--nnodes", nodes]
        flags += ["--nproc-per-node", workers, "--heartbeat", "1", *launch]
        super().__init__(directory, flags, ["--islands", json.dumps(settings), *options])
        self.islands = [Island(self, number) for number in range(islands)]

    @property
    def ends(self) -> Digests:
        """What the ranks of each island have ended with."""
        told = re.findall(r"island (\d+): param ([0-9a-f]{64}) outer ([0-9a-f]{64})", self.output)
        return {each.number: {(param, outer) for island, param, outer in told
                              if int(island) == each.number} for each in self.islands}  # fmt: skip

    @property
    def outers(self) -> set[str]:
        """Outer parameters and momenta at the end, of all islands."""
        return {outer for digests in self.ends.values() for _, outer in digests}

    def kill(self) -> None:
        """The launcher too."""
        for island in self.islands:
            for process in island.processes():
                process.kill()
        self.process.kill()
        self.process.wait()


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch as in the workers, with nothing of it left behind."""
    threads, hook = torch.get_num_threads(), sys.excepthook
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    sys.excepthook = hook


@cache
def reference(settings: str, islands: int = 2, steps: int = 24) -> Digests:
    """What undisturbed islands end with, from settings in JSON."""
    wanted = script.settings(settings)
    assert wanted is not None
    with one_thread():
        models = []
        for number in range(islands):
            seed_all(script.SEED)
            models.append(Model(number, script.Stack(), script.ADAMW, script.GRAIN))
        exchange = Reference(models, wanted, codec(wanted.codec, script.GRAIN))
        for step in range(steps):
            for model in models:
                first = model.number * script.LEAVES
                texts = [script.batch(step, first + leaf) for leaf in range(script.LEAVES)]
                leaves = [lambda module, text=text: script.loss(module, text) for text in texts]
                model.train(leaves, script.RATE, script.CLIP)
            exchange.step(step + 1)
    return {
        model.number: {(digest(model.param), digest(model.outer, model.momentum))}
        for model in models
    }


def digest(*parts: torch.Tensor) -> str:
    """As `run.digest` has it."""
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()
