"""The only place that reads environment variables.

Everything else takes values as arguments, so what a process does never depends on a variable that
nobody sees. The job key is a secret of the agents: it is not handed on to workers.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from outlast.cluster.errors import Misuse
from outlast.cluster.failpoint import POINTS, Drill

LOCAL_RANK = "LOCAL_RANK"
AGENT_FD = "OUTLAST_AGENT_FD"
LATCH_FD = "OUTLAST_LATCH_FD"
JOB_KEY = "OUTLAST_JOB_KEY"
DRILL = "OUTLAST_DRILL"  # SOCKET_PATH:point,point
SWITCHES = "SLURM_TOPOLOGY_ADDR"
SWITCH_KINDS = "SLURM_TOPOLOGY_ADDR_PATTERN"
KEY_BYTES_MIN = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What an agent passes to its workers, and what an operator passes to the agents; None where
    unset."""

    local_rank: int
    agent_fd: int | None
    latch_fd: int | None
    job_key: bytes | None
    drill: Drill | None
    rack: str  # the switches above this node as SLURM names them, empty where unset


def environment(variables: Mapping[str, str] | None = None) -> Environment:
    """Read this process's variables (or the given ones); raises Misuse on a value that makes no
    sense."""
    found = os.environ if variables is None else variables
    key = found.get(JOB_KEY)
    if key is not None and len(key.encode()) < KEY_BYTES_MIN:
        raise Misuse(
            f"{JOB_KEY} is shorter than {KEY_BYTES_MIN} bytes: use e.g. `openssl rand -hex 32`"
        )
    return Environment(
        local_rank=_number(found, LOCAL_RANK) or 0,
        agent_fd=_number(found, AGENT_FD),
        latch_fd=_number(found, LATCH_FD),
        job_key=None if key is None else key.encode(),
        rack=_rack(found),
        drill=_drill(found.get(DRILL)),
    )


def inherited() -> dict[str, str]:
    """A copy of this process's variables for a child, without the job key."""
    return {name: value for name, value in os.environ.items() if name != JOB_KEY}


def _drill(text: str | None) -> Drill | None:
    if text is None:
        return None
    path, _, names = text.rpartition(":")
    points = frozenset(filter(None, names.split(",")))
    if not path or not points <= set(POINTS):
        raise Misuse(f"{DRILL}={text!r} is not SOCKET_PATH:POINT,POINT; `outlast drill` sets it")
    return Drill(path, points)


def _rack(found: Mapping[str, str]) -> str:
    """SLURM's "switch.switch.node" without the node, whose name may contain dots."""
    switches = found.get(SWITCH_KINDS, "").count(".")
    return ".".join(found.get(SWITCHES, "").split(".")[:switches])


def _number(found: Mapping[str, str], name: str) -> int | None:
    text = found.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit()):
        raise Misuse(
            f"{name}={text!r} is not a number; it is set by `outlast launch` alone"
        )
    return int(text)
