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
ISLAND, ISLANDS = "OUTLAST_ISLAND", "OUTLAST_ISLANDS"  # for scripts; nothing here reads them
SWITCHES = "SLURM_TOPOLOGY_ADDR"
# How many processes an MPI launcher has started: mpirun of Open MPI, Hydra and srun --mpi=pmi2.
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
PMIX_RANK, STEP_SIZE = "PMIX_RANK", "SLURM_STEP_NUM_TASKS"  # srun --mpi=pmix says no size itself
# A worker is none of the launcher's processes, whatever its script imports.
MPI_RANK = ("PMI_", "PMIX_", "OMPI_")
SWITCH_KINDS = "SLURM_TOPOLOGY_ADDR_PATTERN"
KEY_BYTES_MIN = 16
# Steps from here on are SLURM's own, such as the shell of salloc.
SPECIAL_STEPS = 0xFFFFFFF0


@dataclass(frozen=True, slots=True, kw_only=True)
class Slurm:
    """What SLURM says to a process of a job; all nodes as host lists.

    step: the nodes of the step that this process is of; empty in a batch script or salloc's shell.
    step_id: number of that step.
    sole: the step has one task on every node. task: its process, as the node numbers it.
    """

    job: str
    nodes: str
    node: str
    restarts: int
    gpus: int
    step: str
    step_id: str
    sole: bool
    task: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What an agent passes to its workers, and what an operator passes to the agents; None where
    unset."""

    local_rank: int
    agent_fd: int | None
    latch_fd: int | None
    job_key: bytes | None
    drill: Drill | None
    mpi_size: int  # processes of the MPI job that this one is of, 0 if there is none
    rack: str  # the switches above this node as SLURM names them, empty where unset
    slurm: Slurm | None


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
        mpi_size=_mpi_size(found),
        rack=_rack(found),
        drill=_drill(found.get(DRILL)),
        slurm=_slurm(found),
    )


def inherited() -> dict[str, str]:
    """A copy of this process's variables for a child, without the job key and MPI's."""
    return {
        name: value for name, value in os.environ.items()
        if name != JOB_KEY and not name.startswith(MPI_RANK)
    }  # fmt: skip


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


def _slurm(found: Mapping[str, str]) -> Slurm | None:
    job, nodes = found.get("SLURM_JOB_ID"), found.get("SLURM_JOB_NODELIST")
    if not job or not nodes:
        return None
    counts = {name: int(text) if (text := found.get(f"SLURM_{name}", "")).isdecimal() else 0
              for name in ("RESTART_COUNT", "GPUS_ON_NODE", "TASK_PID")}  # fmt: skip
    step = found.get("SLURM_STEP_ID", "")
    inside = step.isdecimal() and int(step) < SPECIAL_STEPS
    return Slurm(
        job=job, nodes=nodes, node=found.get("SLURMD_NODENAME", ""),
        restarts=counts["RESTART_COUNT"], gpus=counts["GPUS_ON_NODE"],
        step=found.get("SLURM_STEP_NODELIST", "") if inside else "", step_id=step,
        sole=found.get("SLURM_STEP_TASKS_PER_NODE", "").partition("(")[0] == "1",
        task=counts["TASK_PID"],
    )  # fmt: skip


def _mpi_size(found: Mapping[str, str]) -> int:
    names = [*MPI_SIZES, *([STEP_SIZE] if PMIX_RANK in found else [])]
    return next((int(found[name]) for name in names if found.get(name, "").isdecimal()), 0)


def _number(found: Mapping[str, str], name: str) -> int | None:
    text = found.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit()):
        raise Misuse(
            f"{name}={text!r} is not a number; it is set by `outlast launch` alone"
        )
    return int(text)
