"""An errand is something slow on storage, in a thread of its own, that nobody has to wait for.

A store may hang for ever. So whoever gives up on an errand drops it and goes on: it ends as soon
as the store lets it, changes nothing any more (`StillWanted.held`), and nobody hears of it.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from outlast.cluster.errors import GenerationChanged, OutlastError
from outlast.runtime.collectives import Communicator

T = TypeVar("T")


class StillWanted:
    """Whether the result of an errand is still wanted."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._yes = True

    def __bool__(self) -> bool:
        return self._yes

    @contextmanager
    def held(self) -> Iterator[None]:
        """While it is wanted, and dropping it waits: for changes to memory that others use.

        Raises:
            GenerationChanged: it is not wanted any more.
        """
        with self._lock:
            if not self._yes:
                raise GenerationChanged("nobody waits for this any more")
            yield

    def drop(self) -> None:
        """From now on it is not."""
        with self._lock:
            self._yes = False


class Errand(Generic[T]):
    """`work` has begun when this exists; `result` and `error` are there once it is `done`."""

    def __init__(self, work: Callable[[StillWanted], T]) -> None:
        self.result: T | None = None
        self.error = ""
        self.wanted = StillWanted()
        self._thread = threading.Thread(
            target=self._run, args=(work,), name="outlast-errand", daemon=True
        )
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return not self._thread.is_alive()

    def wait(self, limit_s: float) -> None:
        """Until it is done, at most so long."""
        self._thread.join(limit_s)

    def _run(self, work: Callable[[StillWanted], T]) -> None:
        self.error = "it came to no end: the output of its rank has the reason"
        try:
            self.result = work(self.wanted)
            self.error = ""
        except (OutlastError, OSError) as error:
            self.error = f"{type(error).__name__}: {error}"


def together(
    communicator: Communicator, work: Callable[[StillWanted], T], period_s: float
) -> tuple[T | None, list[str]]:
    """Do something slow on every rank while all keep meeting, so that no collective waits for long;
    its result here, and what went wrong anywhere.

    Raises:
        GenerationChanged, PeerLost: the generation ended meanwhile; nobody waits for the work.
    """
    errand: Errand[T] = Errand(work)
    said: list[Any] = [[False, ""]]
    try:
        while not all(done for done, _ in said):
            errand.wait(period_s)
            said = communicator.gather_json([errand.done, errand.error])
    finally:
        errand.wanted.drop()
    return errand.result, [error for _, error in said if error]
