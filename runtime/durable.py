"""The state on storage: written when the job is asked to stop, read when it is started again.

Both happen inside the entry into a generation, where all ranks are at one step and whole, so that
a loss meanwhile is one more generation, in which it is done again.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlast.checkpoint.records import SlotRecord
from outlast.checkpoint.storage import Storage, StoredStep
from outlast.cluster.errors import Misuse, OutlastError, StateLost, Stopped
from outlast.layout.layout import deal
from outlast.layout.run import Run
from outlast.runtime.collectives import Communicator

if TYPE_CHECKING:
    from outlast.runtime.training import Training

Wanted = Callable[[], bool]


class Durable:
    """The storage of one job, as one rank sees it."""

    def __init__(self, training: "Training") -> None:
        self._training = training
        self._timing = training.link.identity.timing
        directory = training.link.identity.checkpoint_dir
        shape, settings = training.state.memory.shape, training.settings
        roles = [[role.name, role.dtype] for role in shape.roles]
        origin: dict[str, Any] = {"model": shape.fingerprint, "numel": shape.numel, "roles": roles}
        origin |= {name: getattr(settings, name) for name in ("seed", "leaves", "grain")}
        self._storage = Storage(Path(directory), origin) if directory else None

    def names(self, communicator: Communicator) -> tuple[str, ...]:
        """Steps that any rank sees, newest first: what one of them does not see is a fault."""
        mine = self._storage.names() if self._storage is not None else []
        seen = {name for names in communicator.gather_json(mine) for name in names}
        return tuple(sorted(seen, reverse=True))

    def load(
        self, communicator: Communicator, names: Sequence[str], owned: Sequence[Run]
    ) -> StoredStep:
        """Fill the first half with the runs `owned` of the newest step that every rank can read.

        Raises:
            StateLost: there is none.
        """
        training, storage, reasons = self._training, self._storage, []
        assert storage is not None, "no names without storage"
        memory = training.state.memory
        for name in names:

            def read(wanted: Wanted, name: str = name) -> StoredStep:
                found = storage.open(name)
                memory.begin(0)
                storage.read(found, owned, memory, 0, wanted)
                return found

            stored, errors = _together(communicator, read, self._timing.heartbeat_s)
            if not errors:
                where = {"step": stored.step, "path": str(stored.path), "rank": communicator.rank}
                training.link.send(kind="event", event="loaded", **where)
                return stored
            reasons.append(errors[0])
        raise StateLost(f"{'; '.join(reasons)}: put it right, or remove it to start over")

    def save_and_stop(self, communicator: Communicator) -> None:
        """Write the step that all ranks are at.

        Raises:
            Stopped: always: it is stored, and this rank's work is done.
            Misuse: it cannot be written.
        """
        training, storage = self._training, self._storage
        assert storage is not None, "only a job with storage is asked to stop"
        state, rank = training.state, communicator.rank
        committed = state.memory.record(state.half)
        assert committed is not None, "the entry into the generation has committed it"
        runs = state.owned
        if training.ladder.replicated:
            holders = training.membership.holders
            runs = deal(training.model.space, holders, training.settings.grain).runs(holders[rank])
        sums = state.memory.sums(state.half, runs)
        record = replace(committed, owned=runs, held=runs, sums=sums)

        def write(wanted: Wanted) -> bool:
            storage.write(rank, state.memory, state.half, record, wanted)
            return True

        _, errors = _together(communicator, write, self._timing.heartbeat_s)
        records = [SlotRecord.from_json(f) for f in communicator.gather_json(record.as_json())]
        if rank == 0 and not errors:
            errors = _errors_of(lambda: storage.publish(records))
        # Nobody leaves before the step is complete.
        if errors := [error for said in communicator.gather_json(errors) for error in said]:
            if rank == 0:
                storage.discard()
            raise Misuse(f"the job was to stop, but {errors[0]}")
        training.link.send(kind="stopped", step=training.committed)
        raise Stopped(f"step {training.committed} is on storage")


def _together(
    communicator: Communicator, work: Callable[[Wanted], Any], period_s: float
) -> tuple[Any, list[str]]:
    """Do something slow on every rank while all keep meeting, so that no collective waits for long;
    its result here, and what went wrong anywhere.

    When the generation ends meanwhile the work ends before this returns: the next one may train on
    the memory that it fills.
    """
    result: list[Any] = []
    errors: list[str] = []
    unwanted = threading.Event()

    def run() -> None:
        try:
            errors.extend(_errors_of(lambda: result.append(work(lambda: not unwanted.is_set()))))
        finally:
            if not result and not errors:
                errors.append("a rank came to no end: its output has the reason")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    done = False
    try:
        while not done:
            thread.join(period_s)
            said = communicator.gather_json([not thread.is_alive(), errors])
            done = all(finished for finished, _ in said)
    finally:
        unwanted.set()
        thread.join()
    return (result[0] if result else None), [error for _, found in said for error in found]


def _errors_of(work: Callable[[], Any]) -> list[str]:
    try:
        work()
    except (OutlastError, OSError) as error:
        return [f"{type(error).__name__}: {error}"]
    return []
