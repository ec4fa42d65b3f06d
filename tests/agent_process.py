"""An agent without workers in a process of its own, for tests and measurements of the mesh.

The process prints a line of JSON per callback and takes commands from its standard input:
`describe N` (N restarts), `join`, `say TEXT`, `finish`, `stop`.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from outlast.cluster.errors import Misuse
from outlast.cluster.mesh import Callbacks, Job, Mesh
from outlast.cluster.timing import Timing
from outlast.cluster.view import Member, View, Worker


def main(name: str, ports: str, low: int, high: int, job: str, key: str) -> None:
    """The process."""

    def tell(event: str, **more: object) -> None:
        record = {"event": event, "now": time.monotonic(), **more}
        os.write(1, (json.dumps(record) + "\n").encode())

    async def run() -> None:
        number = int.from_bytes(os.urandom(5), "big")
        me = Member(f"{name}-{number:x}", name, "127.0.0.1", 0, (Worker(number, 0),))
        nodes = lambda view: [m.node for m in view.members]  # noqa: E731

        def installed(view: View, detected: float, agreed: float, proposer: str) -> None:
            tell("install", generation=view.generation, nodes=nodes(view), took=agreed - detected)

        def failed(error: Misuse) -> None:
            tell("failed", text=str(error))

        callbacks = Callbacks(
            on_install=installed,
            on_running=lambda view: tell("running", nodes=nodes(view)),
            on_described=lambda member: tell("described", node=member.node),
            on_message=lambda sender, message: tell("message", sender=sender, message=message),
            on_suspect=lambda agent, node, cause: tell("suspect", node=node, cause=cause),
            on_refused=lambda cause: tell("refused", cause=cause),
            on_evicted=lambda: tell("evicted"),
            on_no_quorum=lambda: tell("no_quorum"),
            on_failed=failed,
        )
        endpoints = tuple(("127.0.0.1", int(port)) for port in ports.split(","))
        given = Job(
            job_id=job, key=key.encode(), endpoints=endpoints, min_nodes=low, max_nodes=high
        )
        mesh = Mesh(given, me, Timing(), callbacks)
        address = await mesh.start()
        tell("started", port=address[1])
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, sys.stdin)
        while line := (await reader.readline()).decode().split():
            match line:
                case ["describe", count]:
                    mesh.describe(replace(mesh.me, restarts=int(count)))
                case ["finish"]:
                    mesh.describe(replace(mesh.me, finished=True))
                case ["join"]:
                    mesh.request_join()
                case ["say", text]:
                    mesh.broadcast({"text": text})
                case ["stop"]:
                    break
        await mesh.stop()

    asyncio.run(run())


class AgentProcess:
    """The other end: starts an agent, reads what it tells."""

    def __init__(
        self,
        name: str,
        port: int | str,
        nodes: tuple[int, int],
        *,
        job: str = "job",
        key: str = "a key of sixteen bytes",
    ) -> None:
        self.name = name
        arguments = [name, str(port), str(nodes[0]), str(nodes[1]), job, key]
        self.process = subprocess.Popen(
            [sys.executable, __file__, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        self.told: list[dict[str, Any]] = []
        self._rest = b""

    def read(self) -> list[dict[str, Any]]:
        """Everything told so far."""
        assert self.process.stdout is not None
        try:
            while data := os.read(self.process.stdout.fileno(), 1 << 16):
                *lines, self._rest = (self._rest + data).split(b"\n")
                self.told += [json.loads(line) for line in lines]
        except BlockingIOError:
            pass
        return self.told

    def wait(
        self, event: str, until: Callable[[dict[str, Any]], bool] = bool, limit_s: float = 15
    ) -> dict[str, Any]:
        """The latest such event that satisfies `until`; AssertionError when it does not come."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            found = [e for e in self.read() if e["event"] == event and until(e)]
            if found:
                return found[-1]
            time.sleep(0.001)
        raise AssertionError(f"{self.name}: no {event} within {limit_s} s; told: {self.told[-9:]}")

    def view(self, *nodes: str, limit_s: float = 15) -> dict[str, Any]:
        """Wait until this agent has installed a view of these nodes (in any order)."""
        return self.wait("install", lambda e: sorted(e["nodes"]) == sorted(nodes), limit_s)

    def command(self, text: str) -> None:
        """Have the agent do something."""
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode() + b"\n")
        self.process.stdin.flush()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to this very process."""
        self.process.send_signal(number)

    def end(self) -> None:
        """Kill and reap."""
        self.process.kill()
        self.process.wait(10)
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:7])
