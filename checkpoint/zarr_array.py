"""Boxes of zarr's arrays, read and written by zarr-python in the thread that asks.

zarr's own functions share one event loop and give what may block to threads that the interpreter
waits for when it ends: a store that hangs would keep a job from ending. Here every call has a loop
of its own and blocks nobody else, so that several threads do work at once.

To import this is to import zarr, 0.4 s: inside of functions only.
"""

import asyncio
import json
from collections.abc import Callable, Coroutine
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from zarr import AsyncArray
from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.core.metadata import ArrayV3Metadata
from zarr.storage import StorePath, WrapperStore

from outlast.checkpoint.dtypes import Values

T = TypeVar("T")
Box = tuple[slice, ...]  # a step of 1 on every axis

# What zarr raises for bytes that it has not written: ValueError for sums that do not match, and all
# of them for an index that has a right sum and leads elsewhere.
WRONG = (ValueError, OverflowError, MemoryError, OSError)


def read(store: Store, path: str, metadata: dict[str, Any], box: Box) -> Values:
    """A box of the array at `path`, as a vector; `metadata` is not read again.

    Raises:
        WRONG: it is not what zarr wrote. A chunk or a file that is missing reads as zeros.
    """
    array = _opened(store, path, metadata)
    return np.asarray(_complete(array.getitem(box))).reshape(-1)


def write(store: Store, path: str, metadata: dict[str, Any], box: Box, values: Values) -> None:
    """A box of whole files, each by one put, whatever is there already."""
    shape = [side.stop - side.start for side in box]
    array = _opened(_Fresh(store), path, metadata)
    _complete(array.setitem(box, values.reshape(shape)))


def _opened(store: Store, path: str, metadata: dict[str, Any]) -> AsyncArray[Any]:
    config: Any = {"order": "C", "write_empty_chunks": True}  # no chunk of zeros is left out
    return AsyncArray(_parsed(json.dumps(metadata)), StorePath(store, path), config)


@lru_cache(maxsize=256)
def _parsed(text: str) -> ArrayV3Metadata:
    """Of arrays of one shape and dtype, of which a model has many: it takes 0.4 ms."""
    return ArrayV3Metadata.from_dict(json.loads(text))


class _Fresh(WrapperStore[Store]):
    """Nothing is there: before it writes a shard, zarr reads the one that it replaces."""

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        return None


class _Here(asyncio.SelectorEventLoop):
    """Does in its own thread what it is to have done in another one."""

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:
        done = self.create_future()
        done.set_result(func(*args))
        return done


def _complete(work: Coroutine[Any, Any, T]) -> T:
    loop = _Here()
    try:
        return loop.run_until_complete(work)
    finally:
        loop.close()
