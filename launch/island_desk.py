"""An agent's part in the exchange between islands: it carries what workers say, and looks at none.

Only workers that follow hear of other islands. Whoever begins to follow has missed what was said
before, so everybody elsewhere is asked to say it again.
"""

import hmac
import json
from typing import TYPE_CHECKING, Any

from outlast.cluster.errors import Misuse
from outlast.cluster.island_mesh import Callbacks, IslandMesh, Place
from outlast.cluster.link import CLOSED
from outlast.cluster.view import field
from outlast.launch.config import LaunchConfig
from outlast.launch.interface import choose
from outlast.launch.link import DATAGRAM_BYTES, Message
from outlast.launch.worker_process import WorkerProcess

if TYPE_CHECKING:
    from outlast.launch.agent import Agent


class IslandDesk:
    """What the workers of this node say to other islands and hear from them; without islands it
    does nothing."""

    def __init__(self, agent: "Agent", config: LaunchConfig, key: bytes) -> None:
        self._agent, self._key = agent, key
        self._island, self._islands, self._training = config.island, config.islands, config.training
        self._followers: set[int] = set()  # holders
        self._reach: Message = {"kind": "reach", "islands": [], "count": 0}
        self._refused: set[str] = set()
        self._host = ""
        self._mesh: IslandMesh | None = None
        if config.island is not None:
            place = Place(
                job_id=self._training, key=key, island=config.island,
                endpoints=config.island_addresses(),
            )  # fmt: skip
            callbacks = Callbacks(heard=self._heard, reached=self._reached, refused=self._refuse)
            self._host = self._route(config, place)
            self._mesh = IslandMesh(place, agent.agent, self._host, agent.timing, callbacks)

    def _route(self, config: LaunchConfig, place: Place) -> str:
        """Our address on the way to the others, which may be another network than the island's."""
        ends = []
        for island, there in enumerate(place.endpoints):
            if island == place.island:
                continue
            try:
                choose(there)
                ends += there
            except Misuse:  # it may come yet, and nobody is needed
                hosts = ", ".join(host for host, _ in there)
                self._refuse(f"--island-endpoints: no way from here to {hosts}; check the names")
        if config.local_addr and not config.standalone:
            return config.local_addr
        return choose(ends).address if ends else self._agent.mesh.me.host

    async def start(self) -> None:
        """Listen and dial."""
        if self._mesh is not None:
            await self._mesh.start()

    async def stop(self) -> None:
        """Leave the others."""
        if self._mesh is not None:
            await self._mesh.stop()

    def welcome(self) -> dict[str, Any]:
        """What a worker is told of its island. The key is one of the exchange alone: no worker
        gets the job's."""
        if self._island is None:
            return {}
        key = hmac.digest(self._key, f"exchange of islands of {self._training}".encode(), "sha256")
        told = {"island": self._island, "islands": self._islands, "island_host": self._host}
        return {**told, "island_key": key.hex()}

    def follow(self, worker: WorkerProcess, message: Message) -> None:
        """A worker wants to hear of other islands."""
        self._followers.add(worker.holder)
        if self._mesh is not None:
            worker.send(self._reach)
            self._mesh.ask()

    def said(self, worker: WorkerProcess, message: Message) -> None:
        """A worker tells all workers of all other islands something."""
        text = field(message, "message", dict)
        if len(json.dumps(_told(self._islands, text))) > DATAGRAM_BYTES:
            raise Misuse(f"a message to other islands of more than {DATAGRAM_BYTES} bytes")
        if self._mesh is not None:
            self._mesh.say(text)

    def _heard(self, island: int, message: Message) -> None:
        told = _told(island, message)
        if len(json.dumps(told)) > DATAGRAM_BYTES:  # a worker would get the beginning alone
            self._refuse(f"a message of island {island} of more than {DATAGRAM_BYTES} bytes")
        else:
            self._forward(told)

    def _reached(self, islands: list[int], count: int) -> None:
        if islands != self._reach["islands"]:
            self._agent.event("islands", reach=islands)
            self._agent.progress.reach(self._reach["islands"], islands)
        self._reach = {"kind": "reach", "islands": islands, "count": count}
        self._forward(self._reach)

    def _refuse(self, cause: str) -> None:
        if cause == CLOSED:  # whoever comes and says nothing, such as a scan of ports
            return
        if cause not in self._refused and len(self._refused) < 16:
            self._refused.add(cause)
            self._agent.event("island_refused", cause=cause)
            self._agent.progress.told("island_refused", {"cause": cause})

    def _forward(self, message: Message) -> None:
        for worker in self._agent.crew.attached:
            if worker.holder in self._followers:
                worker.send(message)


def _told(island: int, message: Message) -> Message:
    """How a worker hears what one of another island has said."""
    return {"kind": "islands", "island": island, "message": message}
