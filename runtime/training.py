"""A step as a transaction: leaves, fold, update, commit, gather.

[Note: commit rule] A rank commits its half of step s *before* it sends the new parameters; a
rank that has gathered all parameters has *done* step s. So once anybody has done s, everybody
has committed s, the dead included. Parity of s is exchanged while step s + 1 computes; no rank
starts the update of s + 1, which overwrites the half of s - 1, before the parity of s is
complete on every rank. So some step can always be restored exactly, s or s - 1, and determinism
makes the rest again.

Steps are counted by commits: `committed` is the number of steps that are done, and the index of
the one in flight.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import torch
from torch import Tensor

from outlast.checkpoint.average import WEIGHTS, edges, remembered
from outlast.checkpoint.ladder import Ladder
from outlast.checkpoint.records import Lineage, Protection, SlotRecord
from outlast.cluster.errors import GenerationChanged, Misuse
from outlast.cluster.failpoint import drilled, reach
from outlast.layout.layout import Layout, deal
from outlast.layout.run import Run
from outlast.layout.space import Space
from outlast.runtime.durable import Durable
from outlast.runtime.flat_model import FlatModel
from outlast.runtime.fold import (
    Bucket,
    buckets,
    fold,
    grain_squares,
    norm,
    out_of_nothing,
    spread,
    unit_norms,
    unit_runs,
    unit_squares,
)
from outlast.runtime.islands.outer import Outer
from outlast.runtime.islands.outer_optimizer import still_roles
from outlast.runtime.islands.settings import Islands
from outlast.runtime.jury import Jury
from outlast.runtime.leaf_gradient import LeafGradient
from outlast.runtime.leaf_stack import LeafStack
from outlast.runtime.leaf_tree import Node, assign, push_all
from outlast.runtime.link import Generation, Link
from outlast.runtime.optimizer import CohortOptimizer, Schedule
from outlast.runtime.pace import Pace
from outlast.runtime.redundancy import Redundancy
from outlast.runtime.saving import Stage
from outlast.runtime.shard_state import ShardState
from outlast.runtime.untrained import Untrained


class Safety(TypedDict, total=False):
    """The part of `Settings` that says which losses a job survives."""

    parity: int
    group: int
    spot_check: int
    average: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What a job fixes once, the same on every rank.

    Args:
        leaves: micro-batches of a step, a power of two.
        grain: elements; shards are cut at multiples of it inside a unit.
        zero: 0 replicates the optimizer state, 1 and 2 shard it; 2 frees gradients between steps.
        clip: limit of the global gradient norm, None for no clipping.
        parity: parity units per stripe: how many domains may be lost at once; 0 for none.
        group: most members of a parity group.
        weight: relative speed of this rank, the only value that may differ between ranks.
        spot_check: every how many steps one leaf is computed by two ranks, 0 for never.
        average: weights by which a block that nothing else gives back is made from its neighbours,
            "squared" or "plain" gradient norms; None refuses.
        islands: what is exchanged with other islands, None for a job that is none.
    """

    seed: int = 0
    leaves: int = 8
    grain: int = 4096
    zero: int = 2
    clip: float | None = None
    parity: int = 1
    group: int = 16
    weight: float = 1.0
    spot_check: int = 0
    average: str | None = None
    islands: Islands | None = None

    def protection(self, space: Space) -> Protection:
        """What every step is protected with: parity, and copies of what could not be averaged."""
        twice = edges(space) if self.average is not None else ()
        return Protection(int(self.parity), self.group, twice)

    def __post_init__(self) -> None:
        if self.leaves < 1 or self.leaves & (self.leaves - 1):
            raise Misuse(f"leaves={self.leaves}: use a power of two, such as 8")
        if self.grain < 64 or self.grain % 64:
            raise Misuse(f"grain={self.grain}: use a multiple of 64")
        if self.zero not in (0, 1, 2):
            raise Misuse(f"zero={self.zero}: this version has stages 0, 1 and 2")
        if self.clip is not None and not self.clip > 0:
            raise Misuse(f"clip={self.clip}: use a positive norm, or None")
        if not 0 <= self.parity < self.group:
            raise Misuse(
                f"parity={self.parity}, group={self.group}: a group has parity units and data, so "
                "use a parity of 0 or more and a larger group"
            )
        if not self.weight >= 0:
            raise Misuse(f"weight={self.weight}: use 0 or more")
        if self.average not in (None, *WEIGHTS):
            raise Misuse(f"average={self.average!r}: use one of {', '.join(WEIGHTS)}, or None")
        if self.spot_check < 0:
            raise Misuse(f"spot_check={self.spot_check}: use a number of steps, or 0 for never")
        if self.islands is not None and (self.zero == 0 or self.average is not None):
            raise Misuse(
                f"zero={self.zero}, average={self.average!r}: islands need zero=1 or 2, which say "
                "who sends what, and no averaging: a lost island takes the state of another"
            )


@dataclass(frozen=True, slots=True)
class Membership:
    """Everything about the present generation that a step uses."""

    generation: Generation
    holders: tuple[int, ...]
    layout: Layout
    plan: tuple[Bucket, ...]  # pieces of the fold and of the gather, by rank
    reduced: list[Run]  # runs whose gradient this rank reduces, cut at units
    weights: tuple[float, ...]
    redundancy: Redundancy


class Training:
    """The state of one rank between and within steps.

    Args:
        link: the line to the agent.
        state: memory of the owned runs; its first role is the parameter or its fp32 master.
    """

    def __init__(
        self,
        settings: Settings,
        link: Link,
        model: FlatModel,
        optimizer: CohortOptimizer,
        schedule: Schedule,
        ladder: Ladder,
        state: ShardState,
    ) -> None:
        self.settings, self.link, self.model = settings, link, model
        self.optimizer, self.schedule, self.ladder, self.state = optimizer, schedule, ladder, state
        self.stack = LeafStack(model.space.numel, model.device)
        self.jury = Jury(self)
        self.leaf = LeafGradient(model, self.stack, link.pulse, self.jury.testify)
        self.pace = Pace()
        self.weight = settings.weight  # or as measured, where leaves follow the pace
        self.primary = state.roles[0].name
        self.committed = 0
        self.ended = -1  # newest step behind which all ranks have waited for each other
        self.gathered = -1  # newest step of which all working parameters are here
        self.initial = True  # the working parameters are still those of the script
        self.losses: tuple[float, ...] = ()
        self.lineage: Lineage = ()
        self.announced = 0  # generation of the newest averaging that was told of
        self.norm = 0.0
        self.todo, self.nodes = list[int](), list[tuple[Node, ...]]()
        self.untrained = Untrained(model.module)
        self.durable = Durable(self)
        self.outer: Outer | None = None
        self.recorded = SlotRecord(0, 0, (), (), {}, {}, [])  # facts of the newest step
        self.now: Membership | None = None
        self.restored = 0  # step that this generation started from

    @property
    def membership(self) -> Membership:
        """The present generation; only after the first recovery."""
        assert self.now is not None
        return self.now

    def enter(self, generation: Generation, layout: Layout, weights: Sequence[float]) -> None:
        """Set up for a generation; the state of the owned runs is in place already."""
        holders = tuple(holder for holder, _ in generation.nodes)
        space, communicator = self.model.space, generation.communicator
        dealt = deal(space, holders, self.settings.grain) if self.ladder.replicated else layout
        redundancy = Redundancy(self.state, generation, layout, self.ladder.protection)
        mine = unit_runs(space, dealt.runs(holders[communicator.rank]))
        self.now = Membership(
            generation,
            holders,
            layout,
            buckets(space, dealt, holders),
            mine,
            tuple(weights),
            redundancy,
        )
        self.pace.enter(holders)
        self.durable.saving.enter()
        self.restored = self.committed

    def deal_leaves(
        self, kept: Mapping[int, tuple[Node, ...]], without: Collection[int] = ()
    ) -> None:
        """Decide who computes what is missing of the step in flight: not the ranks `without`, if
        there are others."""
        self.stack.start(self.committed)
        weights = self.membership.weights
        others = [0.0 if rank in without else weight for rank, weight in enumerate(weights)]
        todo = assign(self.settings.leaves, kept, others if any(others) else weights)
        self.nodes = [push_all(kept.get(rank, ()), leaves) for rank, leaves in enumerate(todo)]
        self.todo = todo[self.membership.generation.communicator.rank]
        self.jury.deal(without)

    def leaves(self) -> Iterator[int]:
        """Leaves this rank still owes to the step in flight, its own and then those to compare.

        Raises:
            GenerationChanged: a newer view has arrived.
        """
        if self.stack.step != self.committed:
            self.deal_leaves({})
        while duties := self.todo or self.jury.duties:
            self.check()
            yield duties[0]
            duties.pop(0)

    def check(self) -> None:
        """Raise GenerationChanged if the present generation is over."""
        if self.link.superseded(self.membership.generation.view.generation):
            raise GenerationChanged("a newer view has arrived")

    def commit(self) -> None:
        """Turn the finished leaves of all ranks into the next step; see [Note: commit rule].

        Returns without having done so where leaves have to be computed again first.

        Raises:
            GenerationChanged, PeerLost: a rank was lost meanwhile.
            Diverged: the gradient is not finite, and no single rank is to blame.
        """
        now = self.membership
        self.link.pulse.inside()
        communicator, index = now.generation.communicator, self.committed
        now.redundancy.finish()
        gradient = self._reduce(now)
        squares = grain_squares(gradient, now.reduced, self.settings.grain)
        heads, self.norm = self._agree(now, squares)
        if not self.jury.clear(heads, self.norm):
            self.link.pulse.outside()
            return
        merged = {int(leaf): loss for head in heads for leaf, loss in head["losses"].items()}
        losses = [merged[leaf] for leaf in range(self.settings.leaves)]
        if self.settings.clip is not None:
            gradient.mul_(min(1.0, self.settings.clip / (self.norm + 1e-6)))
        if self.ladder.replicated:
            whole = torch.empty(
                self.model.space.numel, dtype=torch.float32, device=self.model.device
            )
            spread(communicator, now.plan, gradient, whole)
            gradient = whole
        self._update(gradient, index, losses, heads)
        self.gather()
        self.committed = index + 1
        self.losses = tuple(losses)
        if drilled():
            _tell(self, now.generation.view.generation)
        if index == self.restored:
            number = now.generation.view.generation
            self.link.send(kind="event", event="resumed", generation=number, step=self.committed)
        if self.settings.zero == 2:
            self.stack.release()
        _clean_up(self, now)
        self.protect(self.durable.heed(heads, self.committed))
        if self.outer is not None:
            self.outer.committed(self.recorded, heads)
        _follow_pace(self, heads)
        self.link.pulse.outside()

    def _reduce(self, now: Membership) -> Tensor:
        communicator = now.generation.communicator
        reach("reduce", step=self.committed)
        mine = sum(bucket.counts[communicator.rank] for bucket in now.plan)
        out = torch.empty(mine, dtype=torch.float32, device=self.model.device)
        fold(communicator, now.plan, self.nodes, self.stack.sums, self.settings.leaves, out)
        return out

    def _agree(self, now: Membership, squares: Tensor) -> tuple[list[dict[str, Any]], float]:
        """Exchange what is known of the leaves and the grain sums: every rank gets what each rank
        says of its leaves, in rank order, and the same norm."""
        reach("vote", step=self.committed)
        due = self.committed + 1
        head: dict[str, Any] = {
            "losses": self.stack.losses,
            "found": [[leaf, *values] for leaf, values in self.stack.found.items()],
            "seconds": self.leaf.seconds,
            **self.durable.say(due),
            **({"outer": self.outer.say(due)} if self.outer is not None else {}),
        }
        if self.ladder.average is not None:
            sizes = self.settings.grain, self.model.space
            head["squares"] = unit_squares(squares, now.reduced, *sizes)
        heads: list[dict[str, Any]] = []
        grains: list[float] = []
        for payload in now.generation.communicator.gather_bytes(
            json.dumps(head).encode() + b"\n" + squares.cpu().numpy().tobytes()
        ):
            text, _, sums = payload.partition(b"\n")
            heads.append(json.loads(text))
            if sums:
                grains += torch.frombuffer(bytearray(sums), dtype=torch.float32).tolist()
        return heads, norm(grains)

    def _update(
        self, gradient: Tensor, index: int, losses: list[float], heads: list[dict[str, Any]]
    ) -> None:
        runs, rate = self.state.runs, self.schedule.rate(index)
        grads = list(torch.split(gradient, [run.length for run in runs]))
        scalars: list[dict[str, float]] = []
        outer: dict[str, Any] = {}

        def change(live: dict[str, list[Tensor]]) -> None:
            moments = [
                {name: live[name][i] for name in self.optimizer.state.roles}
                for i in range(len(runs))
            ]
            scalars.extend(self.optimizer.step(live[self.primary], moments, grads, rate))
            if self.outer is not None:
                outer.update(self.outer.advance(live, index + 1, heads))

        self.state.update(change)
        reach("commit", step=index)
        self.lineage = remembered(self.lineage, scalars[1:])
        norms = unit_norms(heads, len(self.model.space.units))
        facts = scalars[0], losses, norms, self.lineage, outer
        generation = self.membership.generation.view.generation
        self.recorded = SlotRecord(index + 1, generation, (), (), {}, *facts)
        still = frozenset[str]()
        if self.outer is not None:
            still = still_roles(self.outer.rounds, self.outer.delays, index + 1)
        self.state.commit(self.recorded, still)

    def gather(self) -> None:
        """Fill the working parameters from their owners; afterwards the newest step is done."""
        self.initial = False
        self.gathered = -1
        step = self.state.step
        reach("gather", step=step - 1)
        live = self.state.live(self.primary)
        if self.ladder.replicated:
            for run, values in zip(self.state.runs, live, strict=True):
                self.model.param[run.start : run.stop].copy_(values)
        else:
            owned = torch.cat(live) if live else out_of_nothing(self.model.device)
            now = self.membership
            spread(
                now.generation.communicator, now.plan, owned.to(self.model.dtype), self.model.param
            )
        self.gathered = step

    def protect(self, stage: Stage | None = None) -> None:
        """Begin the parity of the newest step, and its save, beside the leaves of the next."""
        reach("protect", step=self.committed - 1)
        self.membership.redundancy.start(stage)

    def whole_role(self, role: str, use: Callable[[Tensor], None]) -> None:
        """Call `use` with every element of one role, in address order; a collective."""
        now = self.membership
        if self.ladder.replicated:
            for values in self.state.live(role):
                use(values)
            return
        values = (
            torch.cat(self.state.live(role))
            if self.state.runs
            else out_of_nothing(self.model.device)
        )
        dtype = self.state.dtype(role)
        whole = torch.empty(self.model.space.numel, dtype=dtype, device=self.model.device)
        spread(now.generation.communicator, now.plan, values.to(dtype), whole)
        use(whole)


def _tell(training: Training, generation: int) -> None:
    """What a drill compares with the undisturbed twin, step by step."""
    loss = sum(training.losses) / len(training.losses)
    training.link.send(
        kind="event", event="committed", step=training.committed, generation=generation,
        loss=loss, norm=training.norm,
    )  # fmt: skip


def _clean_up(training: Training, now: Membership) -> None:
    """Two commits after a recovery nothing refers to older layouts or dead memories."""
    if training.committed == training.restored + 2:
        training.state.trim()
        me = training.link.identity.holder
        if me == now.generation.first_of_node(me):
            training.link.send(kind="release", generation=now.generation.view.generation)


def _follow_pace(training: Training, heads: Sequence[Mapping[str, Any]]) -> None:
    """Note how long the leaves of a step took on each rank; tell of slow ranks, and let the dealing
    of leaves follow where that is asked for."""
    training.leaf.seconds = []
    now, link, pace = training.membership, training.link, training.pace
    rank = now.generation.communicator.rank
    seconds = [head["seconds"] for head in heads]
    slow = pace.note(dict(zip(now.holders, seconds, strict=True)))
    for holder, ratio in slow.items() if rank == 0 else ():
        at = now.holders.index(holder)
        node = now.generation.nodes[at][1]
        link.send(kind="event", event="slow_rank", rank=at, peer_node=node, ratio=round(ratio, 2))
    if not link.identity.rebalance:
        return
    wanted = pace.weights(dict(zip(now.holders, now.weights, strict=True)))
    if wanted is not None:
        weights = tuple(wanted[holder] for holder in now.holders)
        training.now, training.weight = replace(now, weights=weights), weights[rank]
        if rank == 0:
            link.send(kind="event", event="rebalanced", weights=list(weights))
