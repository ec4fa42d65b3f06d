"""Rendezvous keys of the data plane, carried by the authenticated control plane.

A process group finds its peers through a store. torch's TCPStore is a server without
authentication in one process, whose death takes the job along; here a key that a rank sets goes
to its agent, from there to all agents, and from each to its workers. A store belongs to one
generation, so there is nothing to migrate and nothing to clean up."""

import threading
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import Store  # type: ignore[attr-defined]

from outlast.cluster.errors import GenerationChanged, PeerLost


class RendezvousStore(Store):
    """Keys of one generation. `publish` sends a key of ours on its way to all other ranks."""

    def __init__(self, publish: Callable[[str, bytes], None], timeout_s: float) -> None:
        super().__init__()
        self._publish = publish
        self._timeout_s = timeout_s
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._closed = False

    def put(self, key: str, value: bytes) -> None:
        """A key arrived."""
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def close(self) -> None:
        """The generation is over: everybody who waits here gets an error at once."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def values(self) -> list[bytes]:
        """All values so far."""
        with self._changed:
            return list(self._values.values())

    def set(self, key: str, value: bytes | str) -> None:
        body = value.encode() if isinstance(value, str) else bytes(value)
        self.put(key, body)
        self._publish(key, body)

    def get(self, key: str) -> bytes:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or key in self._values, self._timeout_s)
            if self._closed:
                raise GenerationChanged(f"generation ended while {key} was awaited")
            if key not in self._values:
                raise PeerLost(f"no {key} within {self._timeout_s} s")
            return self._values[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        for key in keys:
            self.get(key)

    def check(self, keys: list[str]) -> bool:
        with self._changed:
            return all(key in self._values for key in keys)
