"""The process of one agent: its incarnations, its signals, its exit code.

Invariant: however the agent ends, its workers end before it; if it is killed, the kernel ends
them (PR_SET_PDEATHSIG).
"""

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import sys
from functools import partial
from typing import Any

from outlast.cluster import failpoint
from outlast.cluster.environment import environment
from outlast.launch.agent import EXIT_INTERNAL, Agent
from outlast.launch.config import LaunchConfig
from outlast.launch.console import Console
from outlast.launch.ending import Outcome
from outlast.launch.worker_process import PR_SET_PDEATHSIG

PRIORITY = -10  # a worker's death must be news even where every core computes


def run_node(config: LaunchConfig, key: bytes) -> int:
    """Be the agent of this node until the job ends; returns the exit code of the process."""
    with contextlib.suppress(PermissionError):  # unprivileged: at normal priority then
        os.setpriority(os.PRIO_PROCESS, 0, PRIORITY)
    console = Console("" if config.island is None else f"[island {config.island}] ")
    try:
        return asyncio.run(_incarnations(config, key, console))
    finally:
        console.close()


async def _incarnations(config: LaunchConfig, key: bytes, console: Console) -> int:
    loop = asyncio.get_running_loop()
    while True:
        agent = Agent(config, key, console)
        failpoint.arm(environment().drill, node=agent.node, agent=agent.agent)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            loop.add_signal_handler(number, agent.ending.signalled, number)
        loop.set_exception_handler(partial(_broken, agent))
        outcome = await agent.run()
        if outcome.code == 0 and not outcome.rejoin:
            agent.progress.say("job finished")
        elif outcome.code == 1 or outcome.step >= 0:
            agent.progress.say(outcome.text)
        elif outcome.code < 128:
            console.line(f"{config.node}: {outcome.text}")
        if not outcome.rejoin:
            return outcome.code


def _broken(agent: Agent, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """A bug of ours: this node leaves with the traceback, the others go on without it."""
    loop.default_exception_handler(context)
    cause = f"internal error: {context.get('exception') or context['message']}"
    agent.end(Outcome(EXIT_INTERNAL, cause, graceful=False))


def main() -> int:
    """Entry point of an agent of a standalone job: `python -m outlast.launch.node FD`.

    The descriptor carries the config and the key as JSON: a command line is for all to read.
    """
    with os.fdopen(int(sys.argv[1])) as source:
        order = json.load(source)
    # The launcher's death ends the job; SIGTERM lets the workers go in order.
    ctypes.CDLL("libc.so.6").prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != order["launcher"]:
        return 1
    return run_node(LaunchConfig.from_json(order["config"]), bytes.fromhex(order["key"]))


if __name__ == "__main__":
    sys.exit(main())
