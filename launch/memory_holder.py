"""The node's memory that outlives a worker: one memfd per allocation, held open here.

Invariant: the memory of a worker that took part in the data plane stays until the survivors say
that they have recovered (a release for a view that was installed after the loss); everything else
is closed with its worker.
"""

import errno
import os
from dataclasses import dataclass

KEPT_MEMORIES = 64


@dataclass(frozen=True, slots=True)
class KeptMemory:
    """Memory of a dead worker: its holder, the descriptor, the generation that lost it."""

    holder: int
    file: int
    generation: int


class MemoryHolder:
    """Descriptors of the memories of living workers, and of those of dead ones until released."""

    def __init__(self) -> None:
        self._live: dict[int, int] = {}
        self.kept: list[KeptMemory] = []

    def allocate(self, holder: int, size: int) -> int:
        """A sparse memfd of `size` bytes for `holder`; OSError or ValueError if there is none."""
        if size <= 0:
            raise ValueError("not a size")
        # Sparse memory can be promised beyond all bounds; a worker that fills it would be killed.
        if size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
            raise OSError(errno.ENOMEM, "this node has not so much memory")
        file = os.memfd_create(f"outlast-{holder}")
        try:
            os.ftruncate(file, size)
        except (OSError, OverflowError):
            os.close(file)
            raise
        self.forget(holder)
        self._live[holder] = file
        return file

    def keep(self, holder: int, generation: int) -> None:
        """The worker was lost in `generation`: its memory waits for the survivors."""
        file = self._live.pop(holder, None)
        if file is not None:
            self.kept.append(KeptMemory(holder, file, generation))
        while len(self.kept) > KEPT_MEMORIES:
            os.close(self.kept.pop(0).file)

    def forget(self, holder: int) -> None:
        """The worker is gone and nobody needs its memory."""
        file = self._live.pop(holder, None)
        if file is not None:
            os.close(file)

    def release(self, generation: int) -> int:
        """Close the memories lost before view `generation` was installed; how many they were."""
        gone = [memory for memory in self.kept if memory.generation < generation]
        self.kept = [memory for memory in self.kept if memory.generation >= generation]
        for memory in gone:
            os.close(memory.file)
        return len(gone)

    def close(self) -> None:
        """Close everything."""
        for holder in list(self._live):
            self.forget(holder)
        for memory in self.kept:
            os.close(memory.file)
        self.kept = []
