"""What the surroundings of a launch say instead of flags: SLURM's variables, or MPI."""

import hashlib
import importlib.util
import os
import re
import secrets
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from outlast.cluster.environment import Slurm, environment
from outlast.cluster.errors import Misuse
from outlast.launch.slurm.hostlist import hostnames

ENDPOINTS_MAX = 3
PORTS = range(10000, 20000)  # below the ephemeral ones, so that no connection takes the job's


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """A job as its scheduler knows it; whatever flags the user gave come first.

    supervises: this process is outside of the nodes' steps and starts them.
    """

    job: str
    node: str
    nodes: tuple[str, ...]
    endpoints: tuple[str, ...]  # "host:port"
    nproc: int | None
    key: bytes | None
    log_dir: str
    requeues: int
    slurm: str = ""  # SLURM's number of the job
    supervises: bool = False

    def node_range(self, spares: int) -> tuple[int, int]:
        """The fewest nodes that found the job, and how many train at most.

        A majority founds it, so that nodes that were cut off cannot do so once more.
        """
        most = len(self.nodes) - spares
        if most < 1:
            raise Misuse(f"--spares {spares}: of {len(self.nodes)} nodes at least one has to train")
        return min(most, len(self.nodes) // 2 + 1), most


def surroundings(interface: str = "") -> Surroundings | None:
    """What MPI or SLURM says of the job of this process; None where neither does; raises Misuse."""
    found = environment()
    # Some sites have srun set MPI's variables for whatever it starts.
    task = found.slurm is not None and found.slurm.sole and found.slurm.task == os.getpid()
    if found.mpi_size > 1 and not (task and importlib.util.find_spec("mpi4py") is None):
        from outlast.launch import mpi

        return mpi.surroundings(interface)
    return None if found.slurm is None else _of(found.slurm)


def _of(slurm: Slurm) -> Surroundings:
    if slurm.step and not slurm.sole:
        raise Misuse(
            "srun starts several tasks on a node: one agent is enough, it starts the workers: "
            "srun --ntasks-per-node=1 outlast launch --nproc-per-node N"
        )
    # A step of one node is one of the supervisor's, or of a user who does its work.
    nodes, step = hostnames(slurm.nodes), hostnames(slurm.step or "-")
    nodes = step if len(step) > 1 else nodes
    # With the number of requeues: who is left of an earlier start must not join.
    job = f"slurm-{slurm.job}-{slurm.restarts}"
    port = job_port(job)
    node = slurm.node or socket.gethostname()
    # Its own address, too, so that every node listens at the job's port and newcomers find any.
    meeting = dict.fromkeys([*nodes[:ENDPOINTS_MAX], *([node] if node in nodes else [])])
    return Surroundings(
        job=job, node=node, nodes=nodes, key=None, nproc=slurm.gpus or None,
        endpoints=tuple(f"{name}:{port}" for name in meeting),
        log_dir=f"outlast_logs/slurm-{slurm.job}",
        requeues=slurm.restarts, slurm=slurm.job, supervises=not slurm.step,
    )  # fmt: skip


def job_port(job: str) -> int:
    """The port of a job's agents, the same wherever it is computed."""
    digest = hashlib.sha256(job.encode()).digest()
    return PORTS[int.from_bytes(digest[:8], "big") % len(PORTS)]


def restart_of(job: str) -> int:
    """Which start of a job in an allocation has this name, for those who join it from outside."""
    return int("".join(re.findall(r"^slurm-\d+-(\d+)$", job)) or 0)


def shared_key(path: Path) -> bytes:
    """The key in this file on a shared file system, made by whoever comes first.

    A link appears whole or not at all, so that nobody reads half a key.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        fresh = path.with_name(f".key-{secrets.token_hex(8)}")
        file = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(file, "w") as text:
            text.write(secrets.token_hex(32))
        with suppress(FileExistsError):
            os.link(fresh, path)
        fresh.unlink()
    return path.read_bytes().strip()
