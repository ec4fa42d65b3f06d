"""A step's shards, each whole in the memory of the rank that writes it.

Ownership cuts a step elsewhere than its files (`checkpoint.writers`). So every rank sends what
others write and gets what it writes itself, in rounds of bounded memory, into buffers that are its
share of the state and are used again for every step. From there the files can be written while the
halves go on changing.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import accumulate

import numpy as np
import torch

from outlast.checkpoint.batch import batches
from outlast.checkpoint.contents import PARAM, Array
from outlast.checkpoint.dtypes import Values, dtype_of
from outlast.checkpoint.ladder import Recovery, Rung, Transfer
from outlast.checkpoint.memory import Bytes
from outlast.checkpoint.records import Role, StateShape
from outlast.checkpoint.writers import writers
from outlast.layout.layout import Layout
from outlast.layout.plan import plan
from outlast.layout.run import Run, canonical, intersect
from outlast.layout.space import Space
from outlast.runtime.collectives import Communicator
from outlast.runtime.shard_state import ShardState
from outlast.runtime.transfer import Mail

ROUND_BYTES = 32 << 20  # that a rank sends or receives at once


def stored_roles(shape: StateShape) -> list[tuple[Role, str]]:
    """Every role with its name in a checkpoint: there the first is `param`, also where memory calls
    it the master."""
    return [(role, role.name if index else PARAM) for index, role in enumerate(shape.roles)]


def stored_arrays(shape: StateShape, space: Space) -> list[Array]:
    """The state as arrays of a checkpoint."""
    return [
        Array(stored, tensor.name, tensor.shape, role.dtype)
        for role, stored in stored_roles(shape)
        for tensor in space.tensors
    ]


class Staging:
    """What one rank writes of every step under one layout.

    Args:
        held: rank -> the runs that it has, together the whole space.
    """

    def __init__(self, state: ShardState, held: Layout, rank: int) -> None:
        self._state, self._rank = state, rank
        shape = state.memory.shape
        self._arrays = {array.key: array for array in stored_arrays(shape, state.space)}
        chosen = writers(state.space, held)
        self._shards = [shard for shard, writer in chosen if writer == rank]
        written: dict[int, list[Run]] = {holder: [] for holder in held.holders}
        for shard, writer in chosen:
            written[writer].append(shard.run)
        wanted = Layout.of(written)
        moves = [Transfer(Rung.HEAL, m.src, 0, m.dst, m.run) for m in plan(held, wanted)]
        recovery = Recovery(0, wanted, transfers=tuple(moves))
        self._rounds = list(batches(recovery, shape, ROUND_BYTES))
        self._runs = canonical(written[rank])
        self._own = intersect(held.runs(rank), self._runs)
        self._starts = [run.start for run in self._runs]
        self._before = list(accumulate((run.numel for run in self._runs), initial=0))
        size = self._before[-1]
        self._buffers = {r.name: np.empty(size, dtype=dtype_of(r.dtype)) for r in shape.roles}

    @property
    def size_bytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def fill(self, half: int, group: Callable[[], Communicator]) -> None:
        """Take over the step that is committed in `half`; a collective.

        Args:
            group: what nothing else uses meanwhile; asked for only where ranks need each other.
        Raises:
            GenerationChanged, PeerLost: it is not there and never will be.
        """
        memory = self._state.memory
        for run in self._own:
            for role in memory.shape.roles:
                self._put(role, run, memory.run_bytes(half, role, run))
        for batch in self._rounds:
            mail, incoming = Mail(group()), list[tuple[Role, Run]]()
            for move in batch.moves:
                for role in memory.shape.roles:
                    mine = move.src == self._rank
                    data = memory.run_bytes(half, role, move.run) if mine else None
                    mail.post(
                        move.src, move.dst, move.run.numel * role.itemsize,
                        None if data is None else torch.from_numpy(data),
                    )  # fmt: skip
                    if move.dst == self._rank:
                        incoming.append((role, move.run))
            for (role, run), values in zip(incoming, mail.deliver(), strict=True):
                self._put(role, run, values.numpy())

    def _put(self, role: Role, run: Run, values: Bytes) -> None:
        at = self._at(run.start) * role.itemsize
        self._buffers[role.name].view(np.uint8)[at : at + len(values)] = values

    def _at(self, address: int) -> int:
        """Position of an element in the buffers."""
        index = bisect_right(self._starts, address) - 1
        return self._before[index] + address - self._starts[index]

    def shards(self) -> Iterator[tuple[Array, int, Values]]:
        """What is to be written: array, index of the shard, its elements."""
        for shard in self._shards:
            at = self._at(shard.run.start)
            for role, stored in stored_roles(self._state.memory.shape):
                values = self._buffers[role.name][at : at + shard.run.length]
                yield self._arrays[f"{stored}/{shard.name}"], shard.index, values
