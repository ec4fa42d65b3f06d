"""What can be read as a checkpoint: contents, and any interval of any array.

A digest is made of the digests of an array's shards (`checkpoint.grid`), so that it is computed in
parallel and by interval, and is the same for the same values in every format.
"""

from collections.abc import Callable, Iterable
from typing import Protocol

import xxhash

from outlast.checkpoint.contents import Array, Contents
from outlast.checkpoint.dtypes import Values
from outlast.checkpoint.grid import grid

Tick = Callable[[int], None]  # bytes that were dealt with since the last call


class Source(Protocol):
    """A checkpoint of any format, open for reading; safe to use from several threads."""

    contents: Contents

    def read(self, array: Array, start: int, stop: int) -> Values:
        """Elements [start, stop) of an array, row-major: a vector of the array's dtype.

        Raises:
            Corrupt: with file and offset: the bytes are not there, or do not match.
        """
        ...

    def stored_digest(self, array: Array) -> str | None:
        """What the checkpoint itself says that `digest` is; None where it says nothing."""
        ...

    def close(self) -> None:
        """Close its files."""
        ...


def shard_digest(values: Values) -> str:
    """xxh3-128 of the bytes of one shard's elements, in hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(memoryview(values.view("u1")))


def array_digest(shards: Iterable[str]) -> str:
    """Digest of an array from those of its shards, in order."""
    return xxhash.xxh3_128_hexdigest("".join(shards).encode())


def digest(
    source: Source, array: Array, look: Callable[[Values], None] = lambda values: None
) -> str:
    """Digest of an array's values, read shard by shard; `look` sees those of each."""
    found = []
    for start, stop in grid(array.shape).shards():
        values = source.read(array, start, stop)
        found.append(shard_digest(values))
        look(values)
    return array_digest(found)
