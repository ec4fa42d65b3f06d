"""Forked processes that find each other through `RendezvousStore` over socket pairs.

The parent plays the agents: it hears what each process says and tells it to interrupt."""

import json
import os
import select
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch

from outlast.cluster.timing import Timing
from outlast.runtime.collectives import Communicator, Graveyard, connect, shut_down
from outlast.runtime.rendezvous import RendezvousStore

DEADLINE_S = 60.0
PATIENT = Timing(heartbeat_s=20.0)  # no deadline of the product ends a test by itself


class Peer:
    """One process's side. `members` are the peers of a generation; rank is the place therein."""

    def __init__(self, number: int, links: dict[int, socket.socket], parent: socket.socket) -> None:
        self.number, self._links, self._parent = number, links, parent
        self._stores: dict[int, RendezvousStore] = {}
        self._lock = threading.Lock()
        self.graveyard = Graveyard()
        self.timing = PATIENT
        self.after_publish: Callable[[], None] = lambda: None
        self.told = threading.Event()
        self.on_told: Callable[[], None] = lambda: None
        for link in links.values():
            threading.Thread(target=self._listen, args=(link,), daemon=True).start()
        threading.Thread(target=self._obey, daemon=True).start()

    def _listen(self, link: socket.socket) -> None:
        while data := link.recv(1 << 16):
            generation, key, value = json.loads(data)
            self.store(generation).put(key, bytes.fromhex(value))

    def _obey(self) -> None:
        while self._parent.recv(1):
            self.on_told()
            self.told.set()

    def store(self, generation: int) -> RendezvousStore:
        with self._lock:
            if generation not in self._stores:

                def publish(key: str, value: bytes) -> None:
                    for link in self._links.values():
                        try:
                            link.send(json.dumps([generation, key, value.hex()]).encode())
                        except OSError:
                            continue  # that peer is dead
                    self.after_publish()

                self._stores[generation] = RendezvousStore(publish, self.timing.rebuild_s)
            return self._stores[generation]

    def connect(self, generation: int, members: Sequence[int]) -> Communicator:
        rank, size = list(members).index(self.number), len(members)
        cpu, store = torch.device("cpu"), self.store(generation)
        return connect(store, generation, rank, size, cpu, "127.0.0.1", self.timing)

    def abandon(self, generation: int) -> None:
        """End a generation that may be half built."""
        store = self.store(generation)
        store.close()
        shut_down(store)

    def say(self, value: Any) -> None:
        self._parent.send(json.dumps(value).encode())


class Peers:
    """The processes, seen from the parent; leaving the context ends them."""

    def __init__(self, count: int, work: Callable[[Peer], None]) -> None:
        pair = lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # noqa: E731
        links = {(a, b): pair() for a in range(count) for b in range(a + 1, count)}
        self.lines = [pair() for _ in range(count)]
        self.pids = []
        for number in range(count):
            pid = os.fork()
            if pid == 0:
                try:
                    torch.set_num_threads(1)
                    mine = {
                        a + b - number: ends[number == b]
                        for (a, b), ends in links.items()
                        if number in (a, b)
                    }
                    for (a, b), ends in links.items():
                        ends[number != b].close()
                        if number not in (a, b):
                            ends[number == b].close()
                    peer = Peer(number, mine, self.lines[number][1])
                    work(peer)
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(1)
            self.pids.append(pid)
        for ends in links.values():
            for end in ends:
                end.close()

    def __enter__(self) -> "Peers":
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.pids:
            try:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            except (ProcessLookupError, ChildProcessError):
                continue
        for ends in self.lines:
            for end in ends:
                end.close()

    def hear(self, number: int, within_s: float = DEADLINE_S) -> Any:
        """What a peer says next; AssertionError if nothing."""
        line = self.lines[number][0]
        ready, _, _ = select.select([line], [], [], within_s)
        assert ready, f"peer {number} said nothing within {within_s} s"
        return json.loads(line.recv(1 << 16))

    def tell(self, number: int) -> None:
        self.lines[number][0].send(b"!")

    def kill(self, number: int) -> None:
        os.kill(self.pids[number], signal.SIGKILL)
        os.waitpid(self.pids[number], 0)


def descriptors_and_threads() -> tuple[int, int]:
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def settled(limit: tuple[int, int], wait_s: float = 15.0) -> tuple[int, int]:
    """Descriptors and threads, as soon as they are within `limit` or after the wait."""
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        if all(a <= b for a, b in zip(descriptors_and_threads(), limit, strict=True)):
            break
        time.sleep(0.05)
    return descriptors_and_threads()
