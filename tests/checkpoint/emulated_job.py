"""A job without processes: nodes with the memories of their workers, as plain arrays.

It follows the rules of the runtime (two halves, parity of a step made while the next computes,
memories of dead workers kept by their node) and carries out a recovery byte by byte. Bytes that
nobody may read are poison, and every recovered byte is compared with the true contents of its
step."""

import json
from collections.abc import Collection, Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np

from outlast.checkpoint.batch import batches
from outlast.checkpoint.code import Code
from outlast.checkpoint.decode import Decode
from outlast.checkpoint.ladder import Ladder, Recovery
from outlast.checkpoint.memory import ParityMemory
from outlast.checkpoint.protection import layout_stripes
from outlast.checkpoint.records import (
    ParityRecord,
    ParitySource,
    ParityUnit,
    Protection,
    Report,
    Role,
    SlotSource,
    StateShape,
)
from outlast.checkpoint.stream import stream_parts
from outlast.layout.layout import Layout, deal, replicate
from outlast.layout.run import Run, union
from outlast.layout.space import Space, Tensor
from outlast.layout.stripe import Stripe

Array = np.ndarray
ROLES = (Role("param", "float32", 4), Role("exp_avg", "bfloat16", 2))
WIDTH = {role.name: role.itemsize for role in ROLES}
GRAIN = 64
PROTECTION = Protection()
WINDOW, ROUND = 512, 2048  # bytes: small enough that every decode and round is cut
POISON = 0xEE


def small_space(lengths: Sequence[int] = (640, 700, 700, 333)) -> Space:
    tensors = [Tensor(f"block{i}", (n,), "float32") for i, n in enumerate(lengths)]
    return Space.of(tensors, unit_of=str)


@cache
def truth(step: int, role: str, numel: int) -> Array:
    """Contents of a role after a step; no two are alike."""
    rng = np.random.default_rng([step, WIDTH[role]])
    return rng.integers(0, 256, numel * WIDTH[role], np.uint8)


def cut(data: Array, role: str, run: Run) -> Array:
    return data[run.start * WIDTH[role] : run.stop * WIDTH[role]]


@dataclass(frozen=True)
class Half:
    """A committed half of state; bytes outside `held` are poison."""

    step: int
    generation: int
    owned: tuple[Run, ...]
    held: tuple[Run, ...]
    data: dict[str, Array]

    def source(self, own: bool, holder: int) -> SlotSource:
        scalars = {"step": float(self.step)}
        losses = (float(self.step),)
        return SlotSource(
            own, holder, self.step, self.generation, self.owned, self.held, scalars, losses
        )


@dataclass(frozen=True)
class ParityHalf:
    record: ParityRecord
    units: dict[tuple[int, int], Array]


@dataclass
class Memory:
    """Memory of one worker."""

    node: str
    halves: list[Half | None] = field(default_factory=lambda: [None, None])
    parity: list[ParityHalf | None] = field(default_factory=lambda: [None, None])

    def record(self, half: int) -> ParityRecord | None:
        found = self.parity[half]
        return None if found is None else found.record

    _age = ParityMemory._age  # which half is spare is decided by the real thing

    def copy(self) -> "Memory":
        return Memory(self.node, list(self.halves), list(self.parity))


class EmulatedJob:
    """Nodes of `per_node` workers each; step 1 is committed on all of them, without parity."""

    def __init__(
        self,
        nodes: int,
        per_node: int,
        *,
        replicated: bool = False,
        space: Space | None = None,
        protection: Protection = PROTECTION,
    ) -> None:
        self.space = space or small_space()
        self.shape = StateShape("model", self.space.numel, ROLES)
        self.ladder = Ladder(self.space, self.shape, GRAIN, replicated, protection)
        self.replicated = replicated
        self.ranks = [1000 - 7 * i for i in range(nodes * per_node)]  # holders, not ascending
        self.memories = {
            holder: Memory(f"node{i // per_node}") for i, holder in enumerate(self.ranks)
        }
        self.generation = 1
        self.keep: tuple[int, int] | None = None  # parity that a rank may not overwrite
        share = replicate if replicated else deal
        self.layout: Layout = share(self.space, self.ranks, *([] if replicated else [GRAIN]))
        self.commit(1)

    def copy(self) -> "EmulatedJob":
        """The same job, to be harmed in another way."""
        other = copy(self)
        other.ranks = list(self.ranks)
        other.memories = {holder: memory.copy() for holder, memory in self.memories.items()}
        return other

    @property
    def nodes(self) -> list[str]:
        return sorted({memory.node for memory in self.memories.values()})

    # What a healthy job does

    def commit(self, step: int, holders: Collection[int] | None = None) -> None:
        """`holders`, by default all, write and commit a step into their other half."""
        for holder in self.ranks if holders is None else holders:
            owned = self.layout.runs(holder)
            data = {role.name: _poison(role.name, self.space.numel) for role in ROLES}
            for name, values in data.items():
                for run in owned:
                    cut(values, name, run)[:] = cut(truth(step, name, self.space.numel), name, run)
            _open(self.memories[holder], step)
            halves = self.memories[holder].halves
            halves[halves.index(None)] = Half(step, self.generation, owned, owned, data)

    def begin(self, step: int, holders: Collection[int]) -> None:
        """`holders` are in the middle of writing a step."""
        for holder in holders:
            _open(self.memories[holder], step)

    def protect(
        self, step: int, encoders: Collection[int] | None = None, flaw: Layout | None = None
    ) -> None:
        """`encoders`, by default all, commit the parity of a step; `flaw`: another layout's map."""
        domains = {holder: self.memories[holder].node for holder in self.ranks}
        if len(set(domains.values())) < 2 or self.replicated:
            return
        protection = self.ladder.protection
        named = {str(holder): node for holder, node in domains.items()}
        described = self.layout.as_json(), named, protection
        made = layout_stripes(self.shape, flaw or self.layout, domains, protection)
        encoded = {stripe.index: _encode(stripe, self._streams(stripe, step)) for stripe in made}
        for holder in self.ranks if encoders is None else encoders:
            memory = self.memories[holder]
            half = ParityMemory.spare(memory, self.keep)  # type: ignore[arg-type]
            units = {
                (stripe.index, row): encoded[stripe.index][row]
                for stripe in made
                for row, keeper in enumerate(stripe.parity)
                if keeper == holder
            }
            listed = [ParityUnit(*key, 0, unit.size, 0) for key, unit in units.items()]
            record = ParityRecord(step, self.generation, *described, tuple(listed))
            memory.parity[half] = ParityHalf(record, units)
        if encoders is None:
            self.keep = (step, self.generation)

    def _streams(self, stripe: Stripe, step: int) -> list[Array]:
        """The data units, without their padding."""
        found = []
        for piece in stripe.data:
            runs = self.layout.runs(piece.holder)
            half = next(h for h in self.memories[piece.holder].halves if h and h.step == step)
            parts = stream_parts(self.shape, runs, piece.start, piece.stop)
            found.append(_joined(cut(half.data[role], role, run) for role, run in parts))
        return found

    # What happens to it

    def lose_node(self, node: str) -> None:
        self.memories = {h: m for h, m in self.memories.items() if m.node != node}
        self.ranks = [holder for holder in self.ranks if holder in self.memories]

    def lose_worker(self, holder: int) -> None:
        """The worker dies, its node keeps the memory."""
        if holder in self.ranks:
            self.ranks.remove(holder)

    def tear(self, holder: int) -> None:
        """Bits flip in every run of the worker's state; its survey leaves them out."""
        memory = self.memories[holder]
        memory.halves = [half and replace(half, held=()) for half in memory.halves]

    def join(self, holder: int, node: str) -> None:
        self.memories[holder] = Memory(node)
        self.ranks.append(holder)

    # Recovery

    def sources(self) -> tuple[list[list[Half]], list[list[ParityHalf]], list[Report]]:
        """What each rank can read, and its report of that, as it arrives over the network."""
        slots, parity, reports = [], [], []
        for rank, holder in enumerate(self.ranks):
            node = self.memories[holder].node
            mates = [h for h in self.ranks if self.memories[h].node == node]
            readable = [holder]
            if mates[0] == holder:
                dead = set(self.memories) - set(self.ranks)
                readable += sorted(h for h in dead if self.memories[h].node == node)
            found = [(h, half) for h in readable for half in self.memories[h].halves if half]
            coded = [(h, p) for h in readable for p in self.memories[h].parity if p]
            slots.append([half for _, half in found])
            parity.append([p for _, p in coded])
            report = Report(
                rank, holder, node, -1, not found, -1, (), 1.0, "model", "numerics",
                tuple(half.source(h == holder, h) for h, half in found),
                tuple(ParitySource(h == holder, p.record) for h, p in coded),
            )  # fmt: skip
            reports.append(Report.from_json(json.loads(json.dumps(report.as_json()))))
        return slots, parity, reports

    def recover(self) -> Recovery:
        """Enter the next generation; AssertionError if a byte is wrong, StateLost as decided."""
        slots, parity, reports = self.sources()
        decision = self.ladder.decide(reports)
        self.generation += 1
        self.keep = decision.parity
        arrived = self._execute(decision, slots, parity)
        for rank, holder in enumerate(self.ranks):
            halves = self.memories[holder].halves
            mine = next((h for h in halves if h and h.step == decision.step), None)
            owned, data = decision.layout.runs(holder), arrived[rank][0]
            held = union(mine.held if mine else (), arrived[rank][1])
            self._check(decision, holder, owned, held, data)
            place = halves.index(mine) if mine else _oldest(halves)
            halves[place] = Half(decision.step, self.generation, owned, held, data)
        self.layout = decision.layout
        return decision

    def _check(
        self,
        decision: Recovery,
        holder: int,
        owned: tuple[Run, ...],
        held: tuple[Run, ...],
        data: dict[str, Array],
    ) -> None:
        numel = self.space.numel
        if self.replicated:
            assert owned == (Run.of(0, numel),)
        else:
            assert decision.layout.is_partition(numel)
        assert decision.scalars == {"step": float(decision.step)}
        assert decision.losses == (float(decision.step),)
        for role in ROLES:
            right = truth(decision.step, role.name, numel)
            for run in (*owned, *held):
                mine, its = (cut(values, role.name, run) for values in (data[role.name], right))
                assert np.array_equal(mine, its), f"wrong bytes: {role.name} {run} of {holder}"

    def _execute(
        self, decision: Recovery, slots: list[list[Half]], parity: list[list[ParityHalf]]
    ) -> list[tuple[dict[str, Array], tuple[Run, ...]]]:
        """Bytes of every rank after the transfers, and the runs that arrived."""
        data: list[dict[str, Array]] = []
        for holder in self.ranks:
            halves = self.memories[holder].halves
            mine = next((h for h in halves if h and h.step == decision.step), None)
            fresh = {role.name: _poison(role.name, self.space.numel) for role in ROLES}
            data.append({n: v.copy() for n, v in mine.data.items()} if mine else fresh)
        arrived: list[list[Run]] = [[] for _ in self.ranks]
        rounds = list(batches(decision, self.shape, ROUND, WINDOW))
        for move in (move for batch in rounds for move in batch.moves):
            half = slots[move.src][move.source]
            assert half.step == decision.step
            for role in ROLES:
                from_there = cut(half.data[role.name], role.name, move.run)
                cut(data[move.dst][role.name], role.name, move.run)[:] = from_there
            arrived[move.dst].append(move.run)
        for decode in (decode for batch in rounds for decode in batch.decodes):
            rebuilt = _decode(decode, slots, parity)
            for out in decode.outputs:
                at, size = out.at - decode.begin, out.run.numel * WIDTH[out.role]
                cut(data[out.dst][out.role], out.role, out.run)[:] = rebuilt[out.unit][
                    at : at + size
                ]
                arrived[out.dst].append(out.run)
        return [(d, union((), runs)) for d, runs in zip(data, arrived, strict=True)]


def _encode(stripe: Stripe, data: list[Array]) -> list[Array]:
    parity = [np.empty(stripe.length, np.uint8) for _ in stripe.parity]
    Code(len(data), len(parity)).encode(data, parity)
    return parity


def _joined(parts: Iterable[Array]) -> Array:
    return np.concatenate([np.empty(0, np.uint8), *parts])


def _oldest(halves: list[Half | None]) -> int:
    steps = [half.step if half else -1 for half in halves]
    return steps.index(min(steps))


def _decode(
    decode: Decode, slots: list[list[Half]], parity: list[list[ParityHalf]]
) -> dict[int, Array]:
    """The lost units of one window."""
    parts: dict[int, list[Array]] = {n: [] for n in range(decode.k) if n not in decode.lost}
    for p in decode.inputs:
        parts[p.unit].append(cut(slots[p.src][p.source].data[p.role], p.role, p.run))
    rows = {
        row.row: parity[row.src][row.source].units[decode.stripe, row.row] for row in decode.parity
    }
    window = {row: unit[decode.begin : decode.end] for row, unit in rows.items()}
    lost = {unit: np.empty(decode.end - decode.begin, np.uint8) for unit in decode.lost}
    data = {unit: _joined(some) for unit, some in parts.items()}
    Code(decode.k, decode.m).decode(data, window, lost)
    return lost


def _poison(role: str, numel: int) -> Array:
    return np.full(numel * WIDTH[role], POISON, np.uint8)


def _open(memory: Memory, step: int) -> None:
    """Make the half invalid that does not hold the step before."""
    halves = memory.halves
    stale = [i for i, half in enumerate(halves) if half is None or half.step != step - 1]
    halves[min(stale, key=lambda i: halves[i] is not None)] = None


def unreadable(job: EmulatedJob, before: EmulatedJob) -> int:
    """Nodes of which no memory can be read any more."""
    living = {job.memories[holder].node for holder in job.ranks}
    return len(set(before.nodes) - living)
