"""Rendezvous keys of the data plane, kept for workers that arrive a moment later.

Invariant: only keys of the current or a newer generation are kept or passed on: a key of an older
one can mislead nobody.
"""

import base64
import binascii

from outlast.cluster.errors import Misuse
from outlast.cluster.view import field
from outlast.launch.link import Message

KEYS_MAX = 65536


class StoreRelay:
    """The keys by generation and name."""

    def __init__(self) -> None:
        self._generation = 0
        self._keys: dict[tuple[int, str], Message] = {}

    def install(self, generation: int) -> None:
        """A new generation: forget the keys of older ones."""
        self._generation = generation
        self._keys = {key: kept for key, kept in self._keys.items() if key[0] >= generation}

    def put(self, message: Message) -> bool:
        """Keep a `store` message; False if it is of an older generation. Raises Misuse."""
        generation, key = field(message, "generation", int), field(message, "key", str)
        value = message.get("value")
        try:
            base64.b64decode(value if isinstance(value, str) else "?", validate=True)
        except binascii.Error:
            raise Misuse("value: base64 expected") from None
        if generation < self._generation or len(self._keys) >= KEYS_MAX:
            return False
        self._keys[generation, key] = message
        return True

    def replay(self) -> list[Message]:
        """Everything kept, oldest first."""
        return list(self._keys.values())
