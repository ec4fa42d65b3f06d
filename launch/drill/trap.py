"""The drill's end of the failpoints: every process that reaches one waits here for its answer.

A trap is set for a point and springs once, on the first process that fits; that process stands
still at the point until the drill has struck and lets it go. Nobody else is held up, but for the
pace: a job may be slowed down at `reduce`, so that a short script outlasts its faults.
"""

import contextlib
import json
import socketserver
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from outlast.cluster.environment import DRILL

Facts = dict[str, Any]
HELD_S = 60.0  # the longest a process is held at a point; longer is a bug of the drill


class Trap:
    """Waits for a process at `point` whose facts satisfy `wanted`; `answer` is what it is told.

    lasting: it answers every such process, at once, for as long as it is set.
    """

    def __init__(
        self, point: str, wanted: Callable[[Facts], bool], answer: Facts | None = None,
        lasting: bool = False,
    ) -> None:  # fmt: skip
        self.point, self.wanted, self.answer, self.lasting = point, wanted, answer or {}, lasting
        self.facts: Facts = {}
        self.sprung, self.released = threading.Event(), threading.Event()

    def release(self) -> None:
        """Let the process go on, if it still can."""
        self.released.set()


class Traps:
    """A Unix socket at `path` that answers failpoints; a context."""

    def __init__(self, path: Path, points: frozenset[str]) -> None:
        self.path, self.points = path, points
        self.pace_s = 0.0  # what a step takes at least, while the job is watched
        self._set: list[Trap] = []
        self._lock = threading.Lock()
        self._passed: dict[int, float] = {}  # process -> when it last went on from `reduce`
        traps = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                with contextlib.suppress(OSError, ValueError):  # killed in the middle of a word
                    facts = json.loads(self.rfile.readline())
                    self.wfile.write(json.dumps(traps._answer(facts)).encode() + b"\n")

        class Server(socketserver.ThreadingUnixStreamServer):
            daemon_threads, block_on_close, request_queue_size = True, False, 128

        self._server = Server(str(path), Handler)

    @property
    def environment(self) -> dict[str, str]:
        """What arms the processes of a job."""
        return {DRILL: f"{self.path}:{','.join(sorted(self.points))}"}

    def set(self, trap: Trap) -> Trap:
        """From now on it may spring."""
        assert trap.point in self.points, "armed when the job was started"
        with self._lock:
            self._set.append(trap)
        return trap

    def drop(self, trap: Trap) -> None:
        """It springs no more, and whoever stands in it goes on."""
        with self._lock:
            if trap in self._set:
                self._set.remove(trap)
        trap.release()

    def __enter__(self) -> "Traps":
        threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True).start()
        return self

    def __exit__(self, *trouble: object) -> None:
        for trap in list(self._set):
            self.drop(trap)
        self._server.shutdown()
        self._server.server_close()
        self.path.unlink(missing_ok=True)

    def _answer(self, facts: Facts) -> Facts:
        if facts["point"] == "reduce":
            self._hold_to_pace(facts["pid"])
        with self._lock:
            fitting = (t for t in self._set if t.point == facts["point"] and t.wanted(facts))
            trap = next(fitting, None)
            if trap is None:
                return {}
            if not trap.lasting:
                self._set.remove(trap)
            trap.facts = trap.facts or facts
        trap.sprung.set()
        if not trap.lasting:
            trap.released.wait(HELD_S)
        return trap.answer

    def _hold_to_pace(self, pid: int) -> None:
        due = self._passed.get(pid, 0.0) + self.pace_s
        time.sleep(max(0.0, due - time.monotonic()) if self.pace_s else 0.0)
        self._passed[pid] = time.monotonic()
