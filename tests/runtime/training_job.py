"""Jobs that really train: start, wait for a step, kill, collect digests."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import psutil

SCRIPT = str(Path(__file__).with_name("training_script.py"))
LAUNCH = [sys.executable, "-c", "from outlast.launch.cli import main; main()", "launch"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
WAIT_S = 150.0  # for machines that do much else


class TrainingJob:
    """`outlast launch` of the training script; logs go to `directory`."""

    program = SCRIPT

    def __init__(
        self,
        directory: Path,
        launch: list[str],
        script: list[str],
        environment: dict[str, str] = ENVIRONMENT,
        session: bool = False,
    ) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._out = directory / f"{time.time_ns()}.out"
        command = [*LAUNCH, "--log-dir", str(directory), *launch, self.program, *script]
        with self._out.open("wb") as out:
            self.process = subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=session,
            )

    @property
    def output(self) -> str:
        return self._out.read_text()

    @property
    def digests(self) -> list[str]:
        return re.findall(r"digest ([0-9a-f]{64})", self.output)

    @property
    def steps(self) -> list[int]:
        """Steps in metrics.jsonl, in the order of the file."""
        path = self.directory / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line)["step"] for line in lines]

    def events(self, name: str) -> list[dict[str, Any]]:
        texts = [path.read_text() for path in self.directory.glob("events-*.jsonl")]
        events = [json.loads(line) for text in texts for line in text.splitlines()]
        found = [event for event in events if event["event"] == name]
        return sorted(found, key=lambda event: float(event["time"]))

    def agents(self) -> dict[str, int]:
        """node -> process id of its newest agent."""
        return {event["node"]: event["pid"] for event in self.events("started")}

    def workers(self, node: str) -> list[psutil.Process]:
        children = psutil.Process(self.agents()[node]).children()
        alive = [child for child in children if child.status() != psutil.STATUS_ZOMBIE]
        return sorted(alive, key=lambda child: child.pid)

    def kill_node(self, node: str) -> None:
        """The agent and its workers at once, as when a plug is pulled."""
        os.killpg(self.agents()[node], signal.SIGKILL)

    def wait_for_step(self, step: int) -> None:
        self.wait(lambda: any(done >= step for done in self.steps), f"step {step}")

    def wait_for_recovery(self, generation: int) -> None:
        self.wait(
            lambda: any(e["generation"] >= generation for e in self.events("recovered")),
            f"a recovery of generation {generation}",
        )

    def wait(self, what: Any, name: str) -> None:
        deadline = time.monotonic() + WAIT_S
        while not what():
            assert self.process.poll() is None, f"ended before {name}:\n{self.output}"
            assert time.monotonic() < deadline, f"no {name}:\n{self.output}"
            time.sleep(0.02)

    def end(self) -> int:
        try:
            return self.process.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"hangs:\n{self.output}") from None

    def stop(self) -> None:
        """Leave nothing behind, whatever the test has come to."""
        if self.process.poll() is None:
            root = psutil.Process(self.process.pid)
            tree = [root, *root.children(recursive=True)]
            self.process.send_signal(signal.SIGTERM)
            for process in psutil.wait_procs(tree, 5)[1]:
                process.kill()
            self.process.wait()


@cache
def alone(*script: str) -> str:
    """Digest of the script in one process that no agent started."""
    command = [sys.executable, SCRIPT, *script]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env=ENVIRONMENT, timeout=WAIT_S
    )
    found = re.findall(r"^digest ([0-9a-f]{64})$", done.stdout, re.M)
    assert len(found) == 1
    return str(found[0])
