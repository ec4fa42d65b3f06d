"""The saves of a job: staged beside the parity, written while training goes on, published whole.

    stage      the redundancy's thread, behind its parity: all shards of this rank (`staging`)
    write      an errand: every shard to the store, then a note of their digests
    publish    an errand of rank 0, once all have written: the manifest

[Note: saves] Nobody asks anybody: every rank says in each vote on a step how far it is (`Say`), so
all see the same and agree on what is next (`agreed`). There is one save at most, hence one buffer;
what is due meanwhile is skipped, and said so. A store that fails gives the save up, one that hangs
leaves its rank busy; training waits for neither. A new generation drops the save in flight, and is
due at once."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import partial
from hashlib import sha256
from math import inf
from typing import TYPE_CHECKING, Any

from outlast.checkpoint.contents import Array, Contents
from outlast.checkpoint.dtypes import Values
from outlast.checkpoint.every import Every
from outlast.checkpoint.grid import grid
from outlast.checkpoint.native import write_shard
from outlast.checkpoint.pool import at_once
from outlast.checkpoint.steps import Draft, Steps
from outlast.layout.layout import Layout
from outlast.runtime.collectives import Communicator
from outlast.runtime.errand import Errand, StillWanted
from outlast.runtime.staging import Staging
from outlast.runtime.stored_run import contents_of

if TYPE_CHECKING:
    from outlast.runtime.training import Membership, Training

Group = Callable[[], Communicator]
Stage = Callable[[Group], None]

_AT_ONCE = 4  # shards, 16 MiB each and once more to read it back; waiting for the disk is the most


class Phase(StrEnum):
    """How far a rank is."""

    IDLE = "idle"
    BUSY = "busy"  # also with the end of a save that was dropped
    WRITTEN = "written"
    PUBLISHED = "published"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Say:
    """What a rank says in a vote.

    Args:
        due: this step has to be saved; owed: so does the next one that can be.
    """

    phase: Phase
    due: bool = False
    owed: bool = False
    why: str = ""


class Next(StrEnum):
    """What all ranks do."""

    NOTHING = "nothing"
    START = "start"
    SKIP = "skip"  # it is due and cannot be
    PUBLISH = "publish"
    FINISH = "finish"
    GIVE_UP = "give up"


def agreed(says: Sequence[Say]) -> Next:
    """What follows from what all ranks say."""
    phases = {say.phase for say in says}
    due = any(say.due for say in says)
    if Phase.FAILED in phases:
        return Next.GIVE_UP
    if Phase.PUBLISHED in phases:
        return Next.FINISH
    if phases == {Phase.WRITTEN}:
        return Next.PUBLISH
    if phases == {Phase.IDLE}:
        return Next.START if due or any(say.owed for say in says) else Next.NOTHING
    return Next.SKIP if due else Next.NOTHING


class Save:
    """One step on its way to storage; what it needs is captured, for generations change.

    Args:
        steps: makes the store, which may hang: only errands call it.
    """

    def __init__(self, training: "Training", steps: Callable[[], Steps], step: int) -> None:
        self._training, self._steps, self.step = training, steps, step
        generation = training.membership.generation
        self._rank = generation.communicator.rank
        # Unique over all starts of a job: generations begin anew, agents have other names.
        agents = "".join(generation.view.agents).encode()
        self._tag = f"{generation.view.generation}-{sha256(agents).hexdigest()[:8]}"
        self._staging: Staging | None = None
        self._untrained = training.untrained.copy() if self._rank == 0 else []
        self._contents: Contents | None = None
        self._draft: Draft | None = None
        self._began = time.monotonic()
        self.moved = self._began  # when something last got on

    @property
    def seconds(self) -> float:
        """Since it began."""
        return round(time.monotonic() - self._began, 3)

    def stage(self, staging: Staging, group: Group) -> None:
        """Copy the newest step, which may be overwritten afterwards; a collective."""
        state = self._training.state
        state.seal()
        staging.fill(state.half, group)
        record = state.memory.record(state.half)
        assert record is not None, "it was sealed"
        if self._rank == 0:
            self._contents = contents_of(self._training, record)
        self._staging, self.moved = staging, time.monotonic()

    def write(self, wanted: StillWanted) -> None:
        """All shards of this rank, and the note."""
        draft = self._draft = self._steps().draft(self.step, self._tag)
        digests: dict[str, dict[int, str]] = {}

        def write(array: Array, index: int, values: Values) -> None:
            if wanted:
                digest = write_shard(draft.store, array, index, values)
                digests.setdefault(array.key, {})[index] = digest
                self.moved = time.monotonic()

        with closing(draft.store):
            at_once((partial(write, *shard) for shard in self._shards()), _AT_ONCE)
            if wanted:
                draft.note(self._rank, digests)

    def _shards(self) -> Iterator[tuple[Array, int, Values]]:
        assert self._staging is not None
        yield from self._staging.shards()
        for array, values in self._untrained:
            for index, (start, stop) in enumerate(grid(array.shape).shards()):
                yield array, index, values[start:stop]

    def _got_on(self, size: int) -> None:
        self.moved = time.monotonic()

    def publish(self, wanted: StillWanted) -> None:
        """Complete the step, which all ranks have written; rank 0 does."""
        assert self._draft is not None
        assert self._contents is not None
        self.moved = time.monotonic()
        with closing(self._draft.store):
            if wanted:
                self._draft.publish(self._contents, self._got_on)
                facts = {"step": self.step, "seconds": self.seconds}
                self._training.link.send(kind="event", event="saved", **facts)


class Saving:
    """The saves of one job, as one rank sees them, see [Note: saves]."""

    def __init__(self, training: "Training", steps: Callable[[], Steps], every: Every) -> None:
        self._training, self._steps, self._every = training, steps, every
        self.saved = -1  # newest step that this rank knows to be on storage
        self._owed = False
        self._unclean = True  # drafts may lie about, of earlier generations or of a save given up
        self._due_at = time.monotonic() + every.seconds
        self._staging: tuple[Membership, Staging] | None = None
        self._save: Save | None = None
        self._errand: Errand[None] | None = None
        self._then = Phase.IDLE  # when the errand has ended well

    @property
    def _rank(self) -> int:
        return self._training.membership.generation.communicator.rank

    def enter(self) -> None:
        """A new generation: what was in flight is not completed any more."""
        self._owed |= bool(self._every) and self._save is not None
        self._drop()
        if self._every:
            self._look()

    # ---- beside the steps

    def say(self, step: int, due: bool | None = None) -> dict[str, Any]:
        """This rank's word in the vote on `step`."""
        if due is None:
            every = self._every
            due = not step % every.steps if every.steps else time.monotonic() >= self._due_at
        phase = self._look()
        why = self._errand.error if phase == Phase.FAILED and self._errand else ""
        return asdict(Say(phase, due, self._owed, why))

    def _look(self) -> Phase:
        """How far this rank is; when it is idle again, it first removes what was left behind."""
        errand = self._errand
        if errand is not None and not errand.done:
            return Phase.BUSY
        if errand is None or not errand.wanted:
            assert self._save is None, "the thread of the staging died, see above"
            self._errand = None
            if not (self._unclean and self._rank == 0):
                return Phase.IDLE
            self._unclean = False
            tidy = self._send(lambda wanted: self._steps().discard(), Phase.IDLE)
            tidy.wanted.drop()  # if it fails, so will the next save, and say why
            return Phase.BUSY
        return Phase.FAILED if errand.error else self._then

    def heed(self, votes: Sequence[Mapping[str, Any]], step: int) -> Stage | None:
        """Do what follows from the votes on `step`, which all ranks have gathered; what is to be
        called beside the next step, if a save begins."""
        says = [Say(**vote) for vote in votes]
        verdict, save = agreed(says), self._save
        if due := any(say.due for say in says):
            self._due_at = time.monotonic() + self._every.seconds
        if verdict == Next.START:
            return self._start(step)
        if verdict == Next.SKIP:
            self._tell(
                "save_skipped", step=step, saving=save.step if save else -1,
                seconds=save.seconds if save else 0.0,
                ranks=[rank for rank, say in enumerate(says) if say.phase == Phase.BUSY],
            )  # fmt: skip
        elif verdict == Next.PUBLISH and self._rank == 0 and save is not None:
            self._send(save.publish, Phase.PUBLISHED)
        elif verdict == Next.FINISH and save is not None:
            self.saved, self._save, self._errand = save.step, None, None
            self._owed = self._owed and self.saved < step
        elif verdict == Next.GIVE_UP:
            rank, why = next((n, s.why) for n, s in enumerate(says) if s.phase == Phase.FAILED)
            self._give_up(f"rank {rank}: {why}")
        if verdict != Next.SKIP:
            self._owed |= due  # a save ends in this very vote: the next step is taken instead
        return None

    def _start(self, step: int) -> Stage:
        self._owed, now = False, self._training.membership
        save = self._save = Save(self._training, self._steps, step)
        self._tell("saving", step=step)

        def stage(group: Group) -> None:
            if self._staging is None or self._staging[0] is not now:
                self._staging = None  # so that there never are two
                held = {rank: now.layout.runs(holder) for rank, holder in enumerate(now.holders)}
                staging = Staging(self._training.state, Layout.of(held), self._rank)
                self._staging = now, staging
            save.stage(self._staging[1], group)
            self._send(save.write, Phase.WRITTEN)

        return stage

    def _give_up(self, cause: str) -> None:
        self._tell("save_failed", step=self._save.step if self._save else -1, cause=cause)
        self._drop()
        self._look()

    def _drop(self) -> None:
        self._save, self._unclean = None, True
        if self._errand is not None:
            self._errand.wanted.drop()

    def _send(self, work: Callable[[StillWanted], None], then: Phase) -> Errand[None]:
        errand = Errand(work)
        self._errand, self._then = errand, then
        return errand

    def _tell(self, event: str, **facts: Any) -> None:
        if self._rank == 0:
            self._training.link.send(kind="event", event=event, **facts)

    # ---- while all ranks wait

    def finish(self, communicator: Communicator, limit_s: float = inf) -> str:
        """Bring the newest step to storage; why it is not there, if so.

        Args:
            limit_s: give up on a store with which nothing gets on for so long.
        Raises:
            GenerationChanged, PeerLost: the generation ended meanwhile.
        """
        step, failed, began = self._training.committed, "", time.monotonic()
        self._owed = step not in communicator.gather_json(self.saved)
        while True:
            moved = max(began, self._save.moved if self._save else began)
            late = time.monotonic() > moved + limit_s
            votes = communicator.gather_json(self.say(step, due=False) | {"late": late})
            if all([vote.pop("late") for vote in votes]):
                failed = f"nothing got on for {limit_s:.0f} s"
                self._tell("save_failed", step=step, cause=failed)
                self._drop()
                return failed
            if all(vote["phase"] == Phase.IDLE and not vote["owed"] for vote in votes):
                return failed
            failed = next((vote["why"] for vote in votes if vote["why"]), failed)
            if (stage := self.heed(votes, step)) is not None:
                failed = ""
                stage(lambda: communicator)
            if self._errand is not None:
                self._errand.wait(self._training.link.identity.timing.heartbeat_s)
