"""The environment that `torchrun` gives its workers, for a worker of a given view.

A pure function of the view: every agent that computes it for the same view and the same round of
restarts arrives at the same RANK, WORLD_SIZE and MASTER_PORT without asking anybody. The port
comes from a hash of the job and the round, in a range below the kernel's ephemeral ports; when it
is taken on the first member's host, that member asks for a new round, which hashes to another
port.
"""

import hashlib
from collections.abc import Mapping

from outlast.cluster.environment import ISLAND, ISLANDS
from outlast.cluster.view import Member, View
from outlast.launch.config import LaunchConfig

PORTS = range(20000, 32000)

# An elastic worker aborts its own collectives; NCCL's watchdogs would end the process instead. And
# cuBLAS is deterministic only with a workspace of fixed size.
ELASTIC_CUDA = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_PROPAGATE_ERROR": "0",
}


def restart_round(view: View) -> int:
    """How often the whole job was restarted: the highest count that a member asks for."""
    return max((member.restarts for member in view.members), default=0)


def master_port(view: View, job: str) -> int:
    """The rendezvous port of this round on the first member's host."""
    agents = ",".join(member.agent for member in view.active)
    text = f"{job}/{restart_round(view)}/{agents}".encode()
    return PORTS[int.from_bytes(hashlib.sha256(text).digest()[:8], "big") % len(PORTS)]


def torch_environment(
    view: View, me: Member, local_rank: int, config: LaunchConfig, inherited: Mapping[str, str]
) -> dict[str, str]:
    """The variables of one worker; a member that is no active one yet counts as the last.

    The view decides ranks, `inherited` only what is not overridden (OMP_NUM_THREADS, NCCL flags).
    """
    known = [me if member.agent == me.agent else member for member in view.active]
    members = known if any(member.agent == me.agent for member in known) else [*known, me]
    sizes = [max(len(member.workers), config.nproc_per_node if member is me else 0)
             for member in members]  # fmt: skip
    group_rank = members.index(me)
    rank, world = sum(sizes[:group_rank]) + local_rank, sum(sizes)
    defaults = dict(ELASTIC_CUDA)
    if config.interface:  # "=": NCCL would take eth01 for eth0, too
        defaults |= {"GLOO_SOCKET_IFNAME": config.interface,
                     "NCCL_SOCKET_IFNAME": f"={config.interface}"}  # fmt: skip
    if sizes[group_rank] > 1:
        defaults["OMP_NUM_THREADS"] = "1"
    values = {
        "LOCAL_RANK": local_rank,
        "RANK": rank,
        "GROUP_RANK": group_rank,
        "ROLE_RANK": rank,
        "ROLE_NAME": config.role,
        "LOCAL_WORLD_SIZE": sizes[group_rank],
        "WORLD_SIZE": world,
        "GROUP_WORLD_SIZE": len(members),
        "ROLE_WORLD_SIZE": world,
        "MASTER_ADDR": members[0].host,
        "MASTER_PORT": master_port(view, config.job),
        "TORCHELASTIC_RESTART_COUNT": restart_round(view),
        "TORCHELASTIC_MAX_RESTARTS": config.max_restarts,
        "TORCHELASTIC_RUN_ID": config.job,
        "TORCHELASTIC_USE_AGENT_STORE": False,
    }
    if config.island is not None:
        values |= {ISLAND: config.island, ISLANDS: config.islands}
    fresh = {name: value for name, value in defaults.items() if name not in inherited}
    return fresh | {name: str(value) for name, value in values.items()}
