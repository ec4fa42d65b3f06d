"""A process group of threads: the same bytes as gloo's all-to-all, without processes."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, TypeVar

import torch

from outlast.cluster.timing import Timing
from outlast.runtime.collectives import Communicator

Result = TypeVar("Result")


class Table:
    """What the ranks have put into each operation."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.changed = threading.Condition()
        self.sent: dict[tuple[int, int], list[torch.Tensor]] = {}  # (operation, rank) -> by target

    def put(self, operation: int, rank: int, parts: list[torch.Tensor]) -> None:
        with self.changed:
            self.sent[operation, rank] = parts
            self.changed.notify_all()

    def complete(self, operation: int) -> bool:
        return all((operation, rank) in self.sent for rank in range(self.size))


class Work:
    """An operation of one rank, finished when all ranks have put in their part."""

    def __init__(self, group: "ThreadGroup", output: torch.Tensor, received: list[int]) -> None:
        self._group, self._output, self._received = group, output, received
        self._operation = group.operation

    def is_completed(self) -> bool:
        with self._group.table.changed:
            return self._group.table.complete(self._operation)

    def wait(self, timeout: timedelta) -> None:
        table, rank = self._group.table, self._group.rank()
        with table.changed:
            done = table.changed.wait_for(
                lambda: table.complete(self._operation), timeout.total_seconds()
            )
            if not done:
                raise RuntimeError("timed out")
            parts = [table.sent[self._operation, src][rank] for src in range(table.size)]
        assert [part.numel() for part in parts] == self._received, "ranks disagree about sizes"
        self._output.copy_(torch.cat(parts))


class ThreadGroup:
    """What `Communicator` uses of a backend, for one rank."""

    def __init__(self, table: Table, rank: int) -> None:
        self.table, self._rank, self.operation = table, rank, 0

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self.table.size

    def alltoall_base(
        self, output: torch.Tensor, input: torch.Tensor, received: list[int], sent: list[int],
        options: Any,
    ) -> Work:  # fmt: skip
        assert output.dtype == input.dtype == torch.uint8
        self.operation += 1
        parts = list(torch.split(input.clone(), sent)) if sum(sent) else [input[:0]] * len(sent)
        self.table.put(self.operation, self._rank, parts)
        return Work(self, output, received)


def on_ranks(
    size: int, work: Callable[[Communicator], Result], device: str = "cpu"
) -> list[Result]:
    """Run `work` on `size` ranks at once; their results in rank order."""
    table = Table(size)
    communicators = [
        Communicator(1, ThreadGroup(table, rank), torch.device(device), Timing(), lambda: None)
        for rank in range(size)
    ]
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(work, communicators))
