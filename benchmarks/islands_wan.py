"""Two islands behind a long line: what a step takes, beside a synchronous job and torchft.

    python benchmarks/islands_wan.py --torchft VENV/bin/python --json wan.json

As root: each island is a network namespace, and the line between them has a rate and a delay
(tests/slurm/bed/wan.py). All train the model of `islands.py` on the same samples, and exchange
every fragment once in 30 steps: `islands` in 4 bit, `torchft` (its Streaming DiLoCo, see
`islands_torchft.py`) in float32, three fragments of its own kind; `synchronous` is one job with a
worker on either side. Bytes are those that the device of island 0 has sent, headers and all.

`--kill` ends all processes of island 1 in the middle, by SIGKILL, and starts it again after five
seconds. `gap`: longest step of island 0 from then on, over the usual one; `back`: from the new
start until island 1 has made a step that it had not made before it was killed.

VENV is one with this project's needs and torchft, whose own processes it runs.
"""

import json
import os
import secrets
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from job import parser_of, say, table, workspace, write_json

from outlast.launch.drill.nodes import Nodes, outlast

ROOT = Path(__file__).resolve().parent.parent
WAN = ROOT / "tests" / "slurm" / "bed" / "wan.py"
ISLANDS = ("island0", "island1")
TAPS = ("w1a", "w1b")
SYSTEMS = ("synchronous", "islands", "torchft")
FREE = 10_000.0  # Mbit/s: as good as no limit
WARM, KILL_AT, AWAY_S, LIMIT_S = 10, 60, 5.0, 600.0
MODEL = ("--layers=6", "--width=128", "--context=64", "--batch-size=2", "--warmup=100")


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


class Line:
    """Two namespaces and a line between them; leaving the context removes them."""

    def __init__(self, directory: Path, rate_mbit: float, delay_ms: float) -> None:
        token = secrets.token_hex(3)
        self.directory, self._middle = directory, f"line-{token}"
        self._names = {node: f"line-{token}-{node}" for node in ISLANDS}
        self._link = {"taps": TAPS, "rate_mbit": rate_mbit, "delay_ms": delay_ms, "jitter_ms": 0,
                      "loss": 0.0, "queue_ms": 1000}  # fmt: skip

    def __enter__(self) -> "Line":
        self.directory.mkdir(parents=True, exist_ok=True)
        link = self.directory / "link.json"
        link.write_text(json.dumps(self._link))
        for name in (self._middle, *self._names.values()):
            _ip("netns", "add", name)
        for device in TAPS:
            _ip("-n", self._middle, "tuntap", "add", "dev", device, "mode", "tap", "vnet_hdr")
        inside = ["ip", "netns", "exec", self._middle]
        self._forwarder = subprocess.Popen(
            [*inside, sys.executable, str(WAN), str(link)], stdout=subprocess.PIPE
        )
        assert self._forwarder.stdout is not None
        assert self._forwarder.stdout.readline() == b"ready\n", "see the output of wan.py"
        for (node, name), device in zip(self._names.items(), TAPS, strict=True):
            _ip("-n", self._middle, "link", "set", device, "netns", name)
            _ip("-n", name, "link", "set", device, "name", "eth0")
            _ip("-n", name, "address", "add", f"{self.address(node)}/24", "dev", "eth0")
            for each in ("lo", "eth0"):
                _ip("-n", name, "link", "set", each, "up")
        return self

    def __exit__(self, *trouble: Any) -> None:
        self._forwarder.terminate()
        self._forwarder.wait()
        for name in (*self._names.values(), self._middle):
            _ip("netns", "del", name)

    def address(self, node: str) -> str:
        """Where a node is."""
        return f"10.78.0.{ISLANDS.index(node) + 1}"

    def on(self, node: str, *command: str) -> list[str]:
        """The command that runs `command` there."""
        return ["ip", "netns", "exec", self._names[node], *command]

    def sent(self, node: str) -> int:
        """Bytes that this node has put on the line."""
        found = json.loads(_ip("-n", self._names[node], "-s", "-j", "link", "show", "eth0"))
        return int(found[0]["stats64"]["tx"]["bytes"])


@dataclass(frozen=True)
class Made:
    """A step of an island: its number, when it ended, its loss."""

    step: int
    time: float
    loss: float


class Training:
    """One of SYSTEMS at work on both ends of a line."""

    def __init__(self, system: str, line: Line, options: Namespace, steps: int) -> None:
        self.system, self.line, self.options, self.steps = system, line, options, steps
        self.out = line.directory
        names = ISLANDS if system != "torchft" else (*ISLANDS, "lighthouse")
        os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
        self.nodes = Nodes(names, getattr(self, f"_{system}"), self.out / "nodes",
                           secrets.token_hex(32))  # fmt: skip

    def _launch(self, node: str, *flags: str) -> list[str]:
        logs = str(self.out / (node if self.system == "islands" else "job"))
        address = self.line.address(node)
        return self.line.on(node, *outlast("launch", "--local-addr", address, "--rdzv-id", "line",
                            "--max-restarts", "1000", "--log-dir", logs, *flags))  # fmt: skip

    def _script(self, name: str, leaves: int, *flags: str) -> list[str]:
        steps = f"--steps={self.steps}"
        return [str(ROOT / "examples" / name), *MODEL, steps, f"--leaves={leaves}", "--dropout=0",
                "--eval-every=0", "--corpus-mb=16", *flags]  # fmt: skip

    def _synchronous(self, node: str) -> list[str]:
        flags = ("--nnodes", "2", "--rdzv-endpoint", f"{self.line.address('island0')}:29400")
        return [
            *self._launch(node, *flags, "--node-name", node),
            *self._script("gpt.py", 4, "--parity=0"),
        ]

    def _islands(self, node: str) -> list[str]:
        endpoints = ",".join(f"{self.line.address(each)}:29500" for each in ISLANDS)
        flags = ("--nnodes", "1", "--rdzv-endpoint", f"{self.line.address(node)}:29400",
                 "--islands", "2", "--island", str(ISLANDS.index(node)),
                 "--island-endpoints", endpoints)  # fmt: skip
        tau = f"--delay={self.options.delay}"
        return [*self._launch(node, *flags), *self._script("gpt_islands.py", 2, tau)]

    def _torchft(self, node: str) -> list[str]:
        python = Path(self.options.torchft)
        if node == "lighthouse":
            return self.line.on("island0", str(python.with_name("torchft_lighthouse")),
                "--bind", "0.0.0.0:29600", "--min_replicas", "1", "--quorum_tick_ms", "50",
                "--join_timeout_ms", "3000", "--heartbeat_timeout_ms", "500")  # fmt: skip
        here = self.line.address(node)
        island, judge = str(ISLANDS.index(node)), f"http://{self.line.address('island0')}:29600"
        return self.line.on(node, str(python), str(ROOT / "benchmarks" / "islands_torchft.py"),
            *MODEL, f"--steps={self.steps}", "--island", island, "--host", here,
            "--lighthouse", judge, "--delay", str(self.options.delay), "--beat-ms", "50",
            "--timeout", str(self.options.timeout), "--out", str(self.out / f"{node}.jsonl"),
            "--go", str(self.out / "go"))  # fmt: skip

    def start(self) -> None:
        """Start both ends; torchft's wait for each other, as islands do by themselves."""
        for node in reversed(self.nodes.names):
            self.nodes.start(node)
        if self.system == "torchft":
            self._await(lambda: all(self._lines(node) for node in ISLANDS))
            (self.out / "go").touch()

    def _lines(self, node: str) -> list[dict[str, Any]]:
        place = {"islands": f"{node}/metrics.jsonl", "synchronous": "job/metrics.jsonl"}
        path = self.out / place.get(self.system, f"{node}.jsonl")
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line[-1] == "\n"]

    def made(self, node: str) -> list[Made]:
        """Steps that a node has made, in the order of time."""
        lines = [line for line in self._lines(node) if "step" in line]
        return [Made(line["step"], line["time"], line.get("bits_per_byte", line["loss"]))
                for line in lines]  # fmt: skip

    def await_step(self, node: str, step: int) -> Made:
        """Until a node has made this step."""
        found = self._await(lambda: next((m for m in self.made(node) if m.step >= step), None))
        assert isinstance(found, Made)
        return found

    def _await(self, look: Any) -> object:
        limit = time.monotonic() + LIMIT_S
        while not (found := look()):
            failed = {n: code for n, code in self.nodes.exit_codes().items() if code}
            if failed or time.monotonic() > limit:
                raise TimeoutError(f"{self.system}: {failed or 'no end'}: see {self.nodes.output}")
            time.sleep(0.1)
        return found


@contextmanager
def training(
    system: str, options: Namespace, out: Path, rate: float, steps: int
) -> Iterator[Training]:
    """A training that has begun."""
    delay_ms = options.delay_ms if rate < FREE else 0.0
    with Line(out, rate, delay_ms) as line:
        work = Training(system, line, options, steps)
        with work.nodes:
            work.start()
            yield work


def measure(system: str, options: Namespace, out: Path, rate: float) -> dict[str, Any]:
    """Seconds and bytes of a step."""
    steps = options.steps if system != "synchronous" else max(20, options.steps // 5)
    with training(system, options, out, rate, steps) as work:
        work.await_step("island0", WARM)
        before, first = work.line.sent("island0"), len(work.made("island0"))
        last = work.await_step("island0", steps - 1)
        sent = work.line.sent("island0") - before
        made = work.made("island0")
        times = [b.time - a.time for a, b in pairwise(made[first - 1 :])]
    found = {"system": system, "rate": rate, "times": times, "loss": last.loss,
             "step_s": statistics.mean(times), "bytes": sent / len(times),
             "load": os.getloadavg()[0]}  # fmt: skip
    say(f"{system} at {rate:.0f} Mbit/s: {found['step_s']:.3f} s, {found['bytes'] / 1e3:.0f} kB")
    return found


def kill(system: str, options: Namespace, out: Path) -> dict[str, Any]:
    """What the death and the return of island 1 cost."""
    with training(system, options, out, FREE, options.steps) as work:
        work.await_step("island0", KILL_AT)
        at = work.nodes.kill_node("island1")
        time.sleep(AWAY_S)
        known = max(made.step for made in work.made("island1"))
        again = time.time()
        work.nodes.start("island1")
        back = work.await_step("island1", known + 1)
        work.await_step("island0", options.steps)
        made = work.made("island0")
        spans = [(b.time, b.time - a.time) for a, b in pairwise(made)]
        returned = [b.step for b in work.made("island1") if b.time > again]
    usual = statistics.median(s for end, s in spans if end < at)
    gaps = {"death": max(s for end, s in spans if at < end < again),
            "return": max(s for end, s in spans if again < end)}  # fmt: skip
    found = {"system": system, "usual_s": usual, "gaps": gaps, "back_s": back.time - again,
             "killed_at": known, "back_at": returned[0],
             "others": max(b.step for b in made if b.time < back.time)}  # fmt: skip
    say(f"{system}: {found}")
    return found


def show(results: Sequence[dict[str, Any]], deaths: Sequence[dict[str, Any]]) -> None:
    """Both tables."""
    if results:
        rows = []
        for found in results:
            free = next((r for r in results if r["system"] == found["system"]
                         and r["rate"] == FREE), None)  # fmt: skip
            slower = f"{found['step_s'] / free['step_s']:.2f}" if free else ""
            rate = "free" if found["rate"] == FREE else f"{found['rate']:.0f} Mbit/s"
            rows.append([found["system"], rate, 1000 * found["step_s"], slower,
                         found["bytes"] / 1e3])  # fmt: skip
        print(table(["system", "line", "ms a step", "times as long", "kB a step"], rows))
    if deaths:
        print(table(
            ["system", "usual ms", "gap at death, s", "gap at return, s", "back, s"],
            [[d["system"], 1000 * d["usual_s"], *d["gaps"].values(), d["back_s"]] for d in deaths],
        ))  # fmt: skip


def main() -> None:
    """Measure what was asked for."""
    parser = parser_of(__doc__)
    add = parser.add_argument
    add(
        "--torchft", metavar="PYTHON", help="interpreter of torchft; without it torchft is left out"
    )
    add("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    add("--rates", nargs="*", type=float, default=[FREE, 100.0, 10.0], help="Mbit/s")
    add("--delay-ms", type=float, default=25.0, help="of the line, in one direction")
    add("--delay", type=int, default=1, help="tau, steps")
    add("--steps", type=int, default=150)
    add("--timeout", type=float, default=30.0, help="seconds, of torchft")
    add("--kill", action="store_true")
    options = parser.parse_args()
    systems = [s for s in options.systems if s != "torchft" or options.torchft]
    results: list[dict[str, Any]] = []
    deaths: list[dict[str, Any]] = []
    with workspace(options.out) as out:
        for rate in options.rates:
            for system in systems:
                where = out / f"{system}-{rate:.0f}"
                results.append(measure(system, options, where, rate))
                write_json(options.json, {"results": results, "deaths": deaths})
        for system in systems if options.kill else ():
            if system != "synchronous":
                deaths.append(kill(system, options, out / f"{system}-kill"))
                write_json(options.json, {"results": results, "deaths": deaths})
    show(results, deaths)


if __name__ == "__main__":
    main()
