"""How long agents in real processes need to agree on a new view, by kind of change.

    python benchmarks/membership.py [--agents 4] [--repeats 9] [--json]

From the change to the last survivor's installation, in ms: median, lowest and highest.
"""

import argparse
import json
import signal
import socket
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from agent_process import AgentProcess

CHANGES = ("describe", "kill lowest", "kill highest", "kill two", "stop lowest")


def measured(change: str, count: int) -> float:
    """One job, one change: ms until all survivors have the new view."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    agents = []
    try:
        for index in range(count):
            agents.append(AgentProcess(f"n{index}", port, (count, count)))
            agents[-1].wait("started")
        for agent in agents:
            agent.view(*(a.name for a in agents))
        time.sleep(0.3)
        victims = {"describe": [], "kill highest": [-1], "kill two": [0, -1]}.get(change, [0])
        kind = signal.SIGSTOP if "stop" in change else signal.SIGKILL
        left = [a for i, a in enumerate(agents) if i not in victims and i - count not in victims]
        began = time.monotonic()
        if change == "describe":
            agents[count // 2].command("describe 1")
        for victim in victims:
            agents[victim].signal(kind)
        names = {a.name for a in left}
        done = [
            a.wait("install", lambda e: e["generation"] > 1 and set(e["nodes"]) == names)
            for a in left
        ]
        return (max(e["now"] for e in done) - began) * 1e3
    finally:
        for agent in agents:
            agent.end()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--agents", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = {}
    for change in CHANGES:
        # Of four agents, two are no minority.
        count = max(options.agents, 5) if change == "kill two" else options.agents
        times = [measured(change, count) for _ in range(options.repeats)]
        results[change] = {
            "agents": count,
            "median_ms": round(statistics.median(times), 2),
            "min_ms": round(min(times), 2),
            "max_ms": round(max(times), 2),
        }
        if not options.json:
            print(change, results[change], flush=True)
    if options.json:
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
