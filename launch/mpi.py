"""Surroundings out of MPI: `mpirun -n N outlast launch …` and `srun --mpi=… outlast launch …`.

MPI carries one small message to everybody: where the nodes can be reached, the job's name and its
key. Invariant: it is finalized before anything else starts, so that nothing of the job depends on
it; what it has carried is JSON, never a pickle. What a launcher does when it loses a process is
the launcher's own policy: docs/mpi.md.
"""

import json
import os
import secrets
import select
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from ipaddress import ip_interface
from typing import Any, NoReturn

import psutil

from outlast.cluster.environment import environment
from outlast.cluster.errors import Misuse
from outlast.launch.interface import choose, own_addresses
from outlast.launch.surroundings import ENDPOINTS_MAX, Surroundings, job_port


def surroundings(wanted: str = "") -> Surroundings | None:
    """What MPI says of the job; None where it did not start at least two processes.

    The first process of a node returns and is its agent, with a worker for each process of the
    node; the others wait until it ends. `wanted` names an interface as `--interface` does.

    Raises:
        Misuse: mpi4py is missing, or belongs to another MPI than the launcher.
    """
    found = environment()
    if found.mpi_size < 2:
        return None
    cards, rank = _exchange({
        "name": socket.gethostname(), "pid": os.getpid(), "addresses": _addresses(wanted),
        "job": f"mpi-{secrets.token_hex(4)}",
        "key": (found.job_key or secrets.token_bytes(32)).hex(),
    }, found.mpi_size)  # fmt: skip
    mine = cards[rank]
    if mine["first"] != rank:
        _wait_for(cards[mine["first"]]["pid"])
    agents = [card for index, card in enumerate(cards) if card["first"] == index]
    names = [card["name"] for card in agents]
    if len(set(names)) < len(names):  # containers often have the same
        names = [f"{card['name']}-{card['first']}" for card in agents]
    hosts = meeting_places([card["addresses"] for card in agents]) or names
    count = sum(card["first"] == rank for card in cards)
    slurm, job = found.slurm, cards[0]["job"]
    return Surroundings(
        job=job,
        node=names[agents.index(mine)],
        nodes=tuple(names),
        endpoints=tuple(f"{host}:{job_port(job)}" for host in hosts[:ENDPOINTS_MAX]),
        nproc=(slurm.gpus or None) if slurm and count == 1 else count,
        key=bytes.fromhex(cards[0]["key"]),
        log_dir=f"outlast_logs/{f'slurm-{slurm.job}' if slurm else job}",
        requeues=slurm.restarts if slurm else 0,
    )


def meeting_places(nodes: Sequence[Sequence[str]]) -> list[str]:
    """One address of each node that the others can dial; empty if these do not tell.

    Taken is the first network in which every node has an address of its own: a bridge to a
    machine's containers has the same address on all of them.

    Args:
        nodes: each node's addresses with the width of their networks, such as "10.0.0.7/24".
    """
    if len(nodes) == 1:
        return ["127.0.0.1"]
    known = [[ip_interface(text) for text in texts] for texts in nodes]
    for network in dict.fromkeys(address.network for address in known[0]):
        found = [[str(a.ip) for a in addresses if a.network == network] for addresses in known]
        if all(found) and len({texts[0] for texts in found}) == len(nodes):
            return [texts[0] for texts in found]
    only = {str(addresses[0].ip) for addresses in known if len(addresses) == 1}
    return [str(addresses[0].ip) for addresses in known] if len(only) == len(nodes) else []


def _addresses(wanted: str) -> list[str]:
    own = [choose((), wanted).address] if wanted else own_addresses()
    entries = (entry for entries in psutil.net_if_addrs().values() for entry in entries)
    return [f"{entry.address}/{entry.netmask or 32}" for entry in entries
            if entry.address in own and entry.family == socket.AF_INET]  # fmt: skip


def _exchange(card: dict[str, Any], size: int) -> tuple[list[dict[str, Any]], int]:
    """Everybody's card, and which is ours; "first": the index of the first one of its node."""
    try:
        import mpi4py

        mpi4py.rc.initialize = mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise Misuse(
            f"MPI started {size} processes, and mpi4py is missing or finds no MPI library "
            f"({str(error).splitlines()[0]}): pip install 'outlast[mpi]', or give --rdzv-endpoint"
        ) from error
    MPI.Init_thread(MPI.THREAD_SINGLE)
    MPI.pickle.__init__(lambda card: json.dumps(card).encode(), lambda b: json.loads(bytes(b)))
    world, library = MPI.COMM_WORLD, MPI.Get_library_version().split(",")[0].splitlines()[0]
    rank, count = world.Get_rank(), world.Get_size()
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    cards = world.allgather({**card, "first": node.bcast(rank)})
    node.Free()
    MPI.Finalize()
    if count != size:
        raise Misuse(
            f"MPI started {size} processes, and mpi4py sees {count} of them through {library}: "
            "use the mpirun of that MPI, or point MPI4PY_LIBMPI at the other's library"
        )
    return cards, rank


def _wait_for(agent: int) -> NoReturn:
    """Leave with the node's agent, not before: some launchers end a job with its first process.

    A launcher's signals reach every process, but it is the agent that heeds them.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    with suppress(ProcessLookupError):
        select.select([os.pidfd_open(agent)], [], [])
    sys.exit(0)
