"""Tasks on threads, which end soon after one fails or somebody has enough."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

from outlast.checkpoint.source import Tick

Name, Result = TypeVar("Name"), TypeVar("Result")


class _EnoughError(Exception):
    """Ends a task whose result nobody waits for."""


def spread(
    tasks: Sequence[tuple[Name, Callable[[Tick], Result]]], workers: int, tick: Tick
) -> Iterator[tuple[Name, Result]]:
    """The tasks' results, as they are done.

    A task is ended at its next tick when another raises, or when the caller goes away; `tick` is
    called by one thread at a time.
    """
    enough, lock = threading.Event(), threading.Lock()

    def one_by_one(size: int) -> None:
        if enough.is_set():
            raise _EnoughError
        with lock:
            tick(size)

    pool = ThreadPoolExecutor(workers, thread_name_prefix="checkpoint")
    try:
        futures = {pool.submit(task, one_by_one): name for name, task in tasks}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        enough.set()
        pool.shutdown(cancel_futures=True)
