"""The state on storage: saved while the job runs and when it is asked to stop, read when it starts.

A start and a stop happen inside the entry into a generation, where all ranks are at one step and
whole, so that a loss meanwhile is one more generation, in which it is done again.
"""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from outlast.checkpoint.contents import PARAM, Contents
from outlast.checkpoint.every import Every
from outlast.checkpoint.grid import grid
from outlast.checkpoint.native import metadata
from outlast.checkpoint.records import SlotRecord
from outlast.checkpoint.steps import Steps
from outlast.checkpoint.writers import parts
from outlast.cluster.errors import Misuse, StateLost, Stopped
from outlast.layout.run import Run
from outlast.runtime.collectives import Communicator
from outlast.runtime.errand import Errand, StillWanted, together
from outlast.runtime.islands.outer_optimizer import OUTER_PARAM
from outlast.runtime.saving import Phase, Saving, Stage
from outlast.runtime.staging import stored_roles
from outlast.runtime.stored_run import fitting, record_of

if TYPE_CHECKING:
    from outlast.runtime.training import Training


@dataclass(frozen=True, slots=True)
class _Read:
    """A step that was read: its facts; whether what is not trained is no longer as the script made
    it; whether another program wrote it."""

    record: SlotRecord
    changed: bool
    foreign: bool


class Durable:
    """The storage of one job, as one rank sees it."""

    def __init__(self, training: "Training") -> None:
        self._training, identity = training, training.link.identity
        self._url, self._keep = identity.checkpoint_dir, identity.checkpoint_keep
        self._period_s = identity.timing.heartbeat_s
        if self._url:  # what cannot be stored is known now, and not when it has to be
            metadata(Contents(0, tuple(training.untrained.arrays)))
        self.every = Every.parse(identity.checkpoint_every if self._url else "")
        if self.every:
            # It takes as long as many steps do: here, before the first, and not beside one.
            import_module("outlast.checkpoint.zarr_array")
        self.saving = Saving(training, lambda: self._steps, self.every)
        self.changed = False  # what is not trained is not what the script made of it

    @cached_property
    def _steps(self) -> Steps:
        """Only errands ask for it: a store may hang."""
        return Steps(self._url, self._keep)

    def names(self, communicator: Communicator) -> tuple[str, ...]:
        """Steps that any rank sees, newest first: what one of them does not see is a fault."""
        mine: list[str] | None = []
        if self._url:
            if self.every and self._training.initial and communicator.rank == 0:
                Errand(lambda wanted: self._probe())
            mine, errors = together(communicator, lambda _: self._steps.names(), self._period_s)
            if errors:
                cause = errors[0].removeprefix("Misuse: ")
                raise Misuse(f"{cause}: is it the right --checkpoint-dir?")
        seen = {name for names in communicator.gather_json(mine) for name in names or ()}
        return tuple(sorted(seen, reverse=True))

    def _probe(self) -> None:
        try:
            self._steps.probe()
        except Misuse as error:  # said while nothing is lost yet; training does not need it
            facts = {"step": self._training.committed, "cause": str(error)}
            self._training.link.send(kind="event", event="save_failed", **facts)

    def load(
        self, communicator: Communicator, names: Sequence[str], owned: Sequence[Run]
    ) -> SlotRecord:
        """Fill the first half with the runs `owned` of the newest step that every rank can read.

        Raises:
            StateLost: there is none.
        """
        training, reasons = self._training, []
        for name in names:

            def read(wanted: StillWanted, name: str = name) -> _Read:
                return self._read(name, owned, wanted)

            found, errors = together(communicator, read, self._period_s)
            if not errors and found is not None:
                for reason in reasons if communicator.rank == 0 else ():
                    training.link.send(
                        kind="event", event="passed_over", step=found.record.step, cause=reason
                    )
                self.saving.saved, self.changed = found.record.step, self.changed or found.changed
                training.link.send(
                    kind="event", event="loaded", rank=communicator.rank, step=found.record.step,
                    path=f"{self._url}/{name}", foreign=found.foreign,
                )  # fmt: skip
                return found.record
            reasons.append(errors[0])
        raise StateLost(f"{'; '.join(reasons)}: put it right, or remove it to start over")

    def _read(self, name: str, owned: Sequence[Run], wanted: StillWanted) -> _Read:
        """Bring the runs `owned` of a step into the first half, and what is not trained."""
        training, where = self._training, f"{self._url}/{name}"
        memory, space, untrained = training.state.memory, training.state.space, training.untrained
        changed = False
        with closing(self._steps.open(name)) as source:
            arrays = fitting(training, source.contents, where)
            record = record_of(source.contents, where)
            with wanted.held():
                memory.begin(0)
            for role, stored in stored_roles(memory.shape):
                for shard, run in parts(space, owned):
                    # What an island has besides begins as a copy of the parameters, or with zeros.
                    name = PARAM if role.name == OUTER_PARAM else stored
                    array = arrays.get(f"{stored}/{shard.name}", arrays.get(f"{name}/{shard.name}"))
                    if array is None:
                        continue
                    first = space.offset(shard.name)
                    values = source.read(array, run.start - first, run.stop - first)
                    with wanted.held():
                        memory.run_bytes(0, role, run)[:] = values.view(np.uint8)
            for mine in untrained.arrays:
                for start, stop in grid(mine.shape).shards():
                    values = source.read(arrays[mine.key], start, stop)
                    with wanted.held():
                        changed |= untrained.fill(mine.key, start, values)
        return _Read(record, changed, foreign=not source.contents.run)

    def share(self, communicator: Communicator, changed: Sequence[bool]) -> None:
        """Who joins a run that took what is not trained from storage gets it from another rank."""
        if any(changed) and not all(changed):
            takers = [rank for rank, there in enumerate(changed) if not there]
            self._training.untrained.share(communicator, changed.index(True), takers)
            self.changed = True

    def say(self, step: int) -> dict[str, Any]:
        """What this rank's vote on `step` has of a job that saves while it runs."""
        return {"save": self.saving.say(step)} if self.every else {}

    def heed(self, heads: Sequence[Mapping[str, Any]], step: int) -> Stage | None:
        """See `Saving.heed`; a rank that was started without --checkpoint-every is never ready."""
        unready = {"phase": Phase.BUSY}
        votes = [head.get("save", unready) for head in heads]
        return self.saving.heed(votes, step) if self.every else None

    def end(self, communicator: Communicator) -> None:
        """Wait for all ranks behind the last step; if they save while they run, save it first."""
        if all(communicator.gather_bytes(b"saves" if self.every else b"")):
            self.saving.finish(communicator, self._training.link.identity.timing.grace_s)

    def save_and_stop(self, communicator: Communicator) -> None:
        """Write the step that all ranks are at.

        Raises:
            Stopped: always: it is stored, and this rank's work is done.
            Misuse: it cannot be written.
        """
        training = self._training
        assert self._url, "only a job with storage is asked to stop"
        if failed := self.saving.finish(communicator):
            raise Misuse(f"the job was to stop, but {failed}")
        training.link.send(kind="stopped", step=training.committed)
        raise Stopped(f"step {training.committed} is on storage")
