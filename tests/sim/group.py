"""A process group between simulated workers: what `Communicator` uses of gloo, and `connect`.

As with gloo, a rank whose connections were shut down fails in all it waits for, its peers fail in
what needs it once they learn of that, and an operation may just as well hang until it is given
up. A failed operation leaves garbage in its output.
"""

from datetime import timedelta
from typing import Any

import torch

from outlast.cluster.errors import PeerLost
from outlast.runtime.collectives import Communicator
from sim.network import Network
from sim.world import Process, Waiters

Key = tuple[int, int]  # (operation, rank of the sender)


class Group:
    """One rank's end of the group of one generation."""

    def __init__(self, network: Network, process: Process, rank: int, size: int) -> None:
        self.network, self.process = network, process
        self._rank, self._size = rank, size
        self.peers: list[Group] = []
        self.closed = False
        self.gone: set[int] = set()  # ranks whose end is known to be closed
        self.inbox: dict[Key, torch.Tensor] = {}
        self.waiters: Waiters = []
        self._operation = 0
        process.on_exit.append(self._died)

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size

    def alltoall_base(
        self, output: torch.Tensor, input: torch.Tensor, received: list[int], sent: list[int],
        options: Any,
    ) -> "Work":  # fmt: skip
        assert output.dtype == input.dtype == torch.uint8
        self._operation += 1
        for peer, part in zip(self.peers, torch.split(input.clone(), sent), strict=True):
            self._send(peer, (self._operation, self._rank), part)
        return Work(self, self._operation, output, received)

    def _send(self, peer: "Group", key: Key, part: torch.Tensor) -> None:
        world = self.process.world
        if peer is self:
            self.inbox[key] = part
        elif not self.process.dying:
            delay = self.network.delay(self.process.node, peer.process.node)
            world.at(delay, peer.process, peer._arrive, self, key, part)

    def _arrive(self, sender: "Group", key: Key, part: torch.Tensor | None) -> None:
        world = self.process.world
        if not self.network.reachable(sender.process.node, self.process.node):
            world.at(0.05, self.process, self._arrive, sender, key, part)
        elif not self.closed:
            if part is None:
                self.gone.add(key[1])
            elif key[1] not in self.gone:
                self.inbox[key] = part
            world.wake(self.waiters)

    def close(self) -> None:
        """Shut down all connections, from any thread of the process."""
        if not self.closed:
            self.closed = True
            self.process.world.wake(self.waiters)
            self._tell_peers()

    def _died(self) -> None:
        if not self.closed and not self.process.silent:
            self._tell_peers()
        self.closed = True

    def _tell_peers(self) -> None:
        for peer in self.peers:
            if peer is not self:
                # Behind what was sent before: an end of a connection overtakes nothing.
                delay = 2 * self.network.latency_s
                key = (0, self._rank)
                self.process.world.at(delay, peer.process, peer._arrive, self, key, None)


class Work:
    """An operation in flight."""

    def __init__(
        self, group: Group, operation: int, output: torch.Tensor, received: list[int]
    ) -> None:
        self._group, self._output, self._received = group, output, received
        self._keys = [(operation, rank) for rank in range(group.size())]
        self._hangs = group.process.world.random.random() < 0.3
        self._done = False

    def is_completed(self) -> bool:
        return self._done or self._complete() or self._failed()

    def _complete(self) -> bool:
        return not self._group.closed and all(key in self._group.inbox for key in self._keys)

    def _failed(self) -> bool:
        group = self._group
        broken = any(k not in group.inbox and k[1] in group.gone for k in self._keys)
        return (group.closed and not self._hangs) or broken

    def wait(self, timeout: timedelta) -> None:
        group = self._group
        world = group.process.world
        deadline = world.now + timeout.total_seconds()
        while not (self._done or self._complete()):
            if self._failed():
                self._output.fill_(0xA5)
                raise RuntimeError("connection closed by peer")
            left = deadline - world.now
            if left <= 0:
                raise RuntimeError("timed out")
            world.pause(left, group.waiters)
        if not self._done:
            self._done = True
            parts = [group.inbox.pop(key) for key in self._keys]
            sizes = [part.numel() for part in parts]
            assert sizes == self._received, f"ranks disagree about sizes: {sizes} {self._received}"
            self._output.copy_(torch.cat(parts))


class Groups:
    """`connect` and `shut_down` of `runtime.collectives` on a simulated network."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._groups: list[Group] = []
        self._of_store: dict[Any, Group] = {}

    def connect(
        self, store: Any, generation: int, rank: int, size: int, device: Any, host: str, timing: Any
    ) -> Communicator:  # fmt: skip
        """Find the peers through the real rendezvous, then each other."""
        world = self._network.world
        group = Group(self._network, world.current, rank, size)
        self._groups.append(group)
        self._of_store[store] = group
        store.set(f"end/{rank}", str(len(self._groups) - 1).encode())
        group.peers = [self._groups[int(store.get(f"end/{peer}"))] for peer in range(size)]
        world.pause(2 * self._network.latency_s)
        if group.closed or any(peer.closed for peer in group.peers):
            group.close()
            raise PeerLost(f"generation {generation} did not connect")
        return Communicator(generation, group, device, timing, group.close)

    def shut_down(self, *stores: Any) -> None:
        """End the groups of these stores, built or half built."""
        for group in [self._of_store[s] for s in stores if s in self._of_store]:
            group.close()
