"""Where a drill steps in: named points that every process of a job passes, no-ops in a real job.

Only a process that `outlast drill` started has anything armed (OUTLAST_DRILL). An armed point
tells the drill that it was reached, by one JSON line over the drill's Unix socket, and stands
still until the drill answers with one line, or kills, stops or cuts off the process right there.
A drill that is gone holds nobody up. In a real job a point costs one comparison.
"""

import json
import os
import socket
from dataclasses import dataclass, field
from typing import Any

# Of a worker in a step, of a worker in a recovery, of an agent.
STEP = ("leaf", "reduce", "vote", "commit", "gather", "protect", "encode")
RECOVERY = ("interrupt", "reconnect", "finish", "plan", "move", "resume", "reprotect")
AGENT = ("detect", "agree")
POINTS = (*STEP, *RECOVERY, *AGENT)
_LINE_BYTES_MAX = 1 << 16


@dataclass(frozen=True, slots=True)
class Drill:
    """The drill's socket and the points at which it wants to be asked; `who` goes with each."""

    path: str
    points: frozenset[str]
    who: dict[str, Any] = field(default_factory=dict)


_drill: Drill | None = None


def arm(drill: Drill | None, **who: Any) -> None:
    """Arm this process for a drill, or disarm it; `who` are JSON values that say who it is."""
    global _drill
    _drill = None if drill is None else Drill(drill.path, drill.points, who)


def drilled() -> bool:
    """Whether this job is a drill: then every rank tells of every commit."""
    return _drill is not None


def reach(point: str, **facts: Any) -> dict[str, Any]:
    """Pass a point; what the drill answers, or nothing. May block or never return."""
    drill = _drill
    if drill is None or point not in drill.points:
        return {}
    said = {"point": point, "pid": os.getpid(), **drill.who, **facts}
    try:
        with socket.socket(socket.AF_UNIX) as line:
            line.connect(drill.path)
            line.sendall(json.dumps(said).encode() + b"\n")
            answer = line.makefile("rb").readline(_LINE_BYTES_MAX)
        found = json.loads(answer or b"{}")
    except (OSError, ValueError):  # the drill is over
        return {}
    return found if isinstance(found, dict) else {}
