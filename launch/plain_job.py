"""Restart semantics for scripts that know nothing of outlast, as torchrun has them.

Other members or another count of restarts mean that every worker everywhere starts again with a
new environment. Invariant: all agents derive the round from the view alone, so that workers of
two rounds never meet: they have different rendezvous ports.
"""

import asyncio
import socket
import time
from typing import TYPE_CHECKING

from outlast.cluster.view import View
from outlast.launch.task import watched
from outlast.launch.torch_environment import master_port, restart_round

if TYPE_CHECKING:
    from outlast.launch.agent import Agent


class PlainJob:
    """Follows the views of a plain job; at most one restart is under way."""

    def __init__(self, agent: "Agent") -> None:
        self._agent = agent
        self._round: tuple[object, ...] = ()
        self.restarting: asyncio.Task[None] | None = None

    def follow(self, view: View) -> None:
        """Restart the workers if the view asks for it; the first view starts them."""
        members = tuple((member.agent, len(member.workers)) for member in view.active)
        wanted = (restart_round(view), members)
        if wanted != self._round:
            self._round = wanted
            if self.restarting is None or self.restarting.done():
                self.restarting = watched(self._restart())

    async def _restart(self) -> None:
        agent, started = self._agent, None
        while started != self._round:
            started = self._round
            await agent.crew.stop(agent.grace_s)
            view = agent.view
            if view is None or started != self._round:
                continue
            if len(view.active) < agent.config.min_nodes:
                await self._wait_for_nodes(view)
                continue
            port = master_port(view, agent.config.job)
            if view.active[0].agent == agent.agent and not is_free(port):
                agent.restarts = restart_round(view) + 1  # a new round has another port
            else:
                agent.crew.start(view, agent.mesh.me)
            agent.describe()

    async def _wait_for_nodes(self, view: View) -> None:
        """Too few nodes: nobody runs until one comes back."""
        agent = self._agent
        wait_s = 0 if agent.config.standalone else agent.timing.join_s
        few = f"{len(view.active)} of at least {agent.config.min_nodes} nodes are left"
        agent.progress.say(f"{few}; waits {wait_s:.0f} s for more")
        deadline = time.monotonic() + wait_s
        while agent.view is view and time.monotonic() < deadline:
            await asyncio.sleep(agent.timing.tick_s)
        if agent.view is view:
            agent.fail(few)


def is_free(port: int) -> bool:
    """Whether this host can listen on the port; a connection of an earlier round does not count."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen(1)
        except OSError:
            return False
    return True
