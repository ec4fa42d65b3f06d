"""Tasks on threads, which end soon after one fails or somebody has enough."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from typing import TypeVar

from outlast.checkpoint.source import Tick
from outlast.cluster.errors import OutlastError

Name, Result = TypeVar("Name"), TypeVar("Result")


class _EnoughError(Exception):
    """Ends a task whose result nobody waits for."""


_here = threading.local()  # enough: of the thread of a task


def go_on() -> None:
    """Where what takes long has no tick: ends a task of `spread` that nobody waits for."""
    if hasattr(_here, "enough") and _here.enough.is_set():
        raise _EnoughError


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

    begin = partial(setattr, _here, "enough", enough)
    pool = ThreadPoolExecutor(workers, "checkpoint", initializer=begin)
    try:
        futures = {pool.submit(task, one_by_one): name for name, task in tasks}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        enough.set()
        pool.shutdown(cancel_futures=True)


def at_once(tasks: Iterable[Callable[[], None]], threads: int = 8) -> None:
    """Every task, several at once, on threads that an interpreter which ends does not wait for: a
    store may hang for ever. To wait for it is most of what small files cost.

    Raises:
        OutlastError, OSError: the first that a task raised; none is begun after it.
    """
    left, lock = iter(tasks), threading.Lock()
    ended: list[bool] = []
    errors: list[OutlastError | OSError] = []

    def work() -> None:
        try:
            while not errors:
                with lock:
                    task = next(left, None)
                if task is None:
                    break
                task()
            ended.append(True)
        except (OutlastError, OSError) as error:
            errors.append(error)

    workers = [threading.Thread(target=work, daemon=True) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
    assert len(ended) == threads, "a thread came to no end: see above"
