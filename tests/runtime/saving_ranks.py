"""Ranks that save steps whose every element is known, without training and without processes."""

import os
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from thread_group import on_ranks

from outlast.checkpoint.contents import BUFFER, Array
from outlast.checkpoint.every import Every
from outlast.checkpoint.memory import StateMemory, memory_bytes
from outlast.checkpoint.native import NativeSource
from outlast.checkpoint.records import Role, SlotRecord, StateShape
from outlast.checkpoint.steps import Steps
from outlast.cluster.errors import Corrupt
from outlast.cluster.timing import Timing
from outlast.layout.layout import deal, replicate
from outlast.layout.space import Space, Tensor
from outlast.runtime.collectives import Communicator
from outlast.runtime.saving import Saving
from outlast.runtime.shard_state import ShardState
from outlast.runtime.training import Settings

SHAPES = {"wte": (50, 7), "h.0.w": (33, 5), "h.0.b": (5,), "h.1.w": (33, 5), "h.1.b": (5,), "s": ()}
SPACE = Space.of(
    [Tensor(name, shape, "float32") for name, shape in SHAPES.items()],
    unit_of=lambda name: name.rpartition(".")[0] or name,
)
ROLES = (Role("master", "float32", 4), Role("exp_avg", "float32", 4), Role("tiny", "bfloat16", 2))
SHAPE = StateShape(SPACE.fingerprint(), SPACE.numel, ROLES)
BUFFERS = [Array(BUFFER, "count", (), "int64")]


def truth(role: str, step: int) -> np.ndarray:
    """The bytes of a role at a step, uint8 [numel, itemsize]."""
    width, number = SHAPE.role(role).itemsize, [each.name for each in ROLES].index(role)
    generator = np.random.default_rng([number, step])
    return generator.integers(0, 256, (SPACE.numel, width), dtype=np.uint8)


class Rank:
    """What `Saving` uses of a training, on one rank of one generation."""

    def __init__(self, rank: int, size: int, zero: int, tell: Callable[..., None]) -> None:
        file = os.memfd_create("saving-test")
        os.ftruncate(file, memory_bytes(SHAPE))
        self.state = ShardState(StateMemory(file, SHAPE), SPACE)
        os.close(file)
        self.settings: Any = Settings(seed=5, grain=64, zero=zero)
        self.link = SimpleNamespace(
            send=tell, identity=SimpleNamespace(timing=Timing(heartbeat_s=0.02))
        )
        self.untrained = SimpleNamespace(arrays=BUFFERS, copy=self._buffers)
        self.optimizer = SimpleNamespace(hyper={"lr": 1.0, "eps": 0.1}, base_rate=1.0)
        self.schedule = SimpleNamespace(rate=lambda step: 1 / (1 + step))
        self.model = SimpleNamespace(dtype="torch.bfloat16", aliases={"head": "wte"})
        self.committed = 0
        self.enter(1, rank, size)

    def enter(self, generation: int, rank: int, size: int) -> None:
        holders = tuple(range(10, 10 + size))
        sharded = self.settings.zero > 0
        layout = deal(SPACE, holders, 64) if sharded else replicate(SPACE, holders)
        self.membership = SimpleNamespace(
            holders=holders, layout=layout,
            generation=SimpleNamespace(
                communicator=SimpleNamespace(rank=rank),
                view=SimpleNamespace(generation=generation, agents=("a", "b")),
            ),
        )  # fmt: skip
        self.state.adopt(self.state.half, self.committed, layout.runs(holders[rank]))

    def _buffers(self) -> list[tuple[Array, Any]]:
        return [(BUFFERS[0], np.array([self.committed], dtype=np.int64))]

    def commit(self, step: int) -> None:
        self.committed = step
        state = self.state

        def change(live: Any) -> None:
            for role in ROLES:
                for run in state.owned:
                    state.memory.run_bytes(state.half, role, run)[:] = truth(role.name, step)[
                        run.start : run.stop
                    ].ravel()

        state.update(change)
        state.commit(SlotRecord(step, 1, (), (), {}, {"step": float(step)}, [0.5]))


class Ranks:
    """All ranks of a job; `make` is how each gets at the store."""

    def __init__(self, size: int, zero: int, every: str, make: Callable[[], Steps]) -> None:
        self.events: list[dict[str, Any]] = []
        self.every, self.make, self.generation = Every.parse(every), make, 1
        self.ranks = [Rank(rank, size, zero, self._tell) for rank in range(size)]
        self.savings = [self._saving(rank) for rank in self.ranks]

    def _tell(self, **event: Any) -> None:
        self.events.append(event)

    def _saving(self, rank: Rank) -> Saving:
        training: Any = rank
        return Saving(training, self.make, self.every)

    def told(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == name]

    def step(self, step: int) -> None:
        """Commit a step, vote on it, and stage what is agreed on, as training does."""
        votes = [saving.say(step) for saving in self.savings]
        for rank in self.ranks:
            rank.commit(step)
        stages = [saving.heed(votes, step) for saving in self.savings]
        assert len({stage is None for stage in stages}) == 1, "all do the same"

        def work(communicator: Communicator) -> None:
            stage = stages[communicator.rank]
            if stage is not None:
                stage(lambda: communicator)

        on_ranks(len(stages), work)

    def change(self, size: int) -> None:
        """A new generation: ranks at the end are lost, or new ones come."""
        self.generation += 1
        while len(self.ranks) < size:
            rank = Rank(0, 1, self.ranks[0].settings.zero, self._tell)
            self.ranks.append(rank)
            self.savings.append(self._saving(rank))
        del self.ranks[size:], self.savings[size:]
        for number, rank in enumerate(self.ranks):
            rank.committed = self.ranks[0].committed
            rank.enter(self.generation, number, size)
            rank.commit(rank.committed)
        for saving in self.savings:
            saving.enter()

    def finish(self) -> list[str]:
        def work(communicator: Communicator) -> str:
            return self.savings[communicator.rank].finish(communicator)

        return on_ranks(len(self.ranks), work)

    def quiet(self, limit_s: float = 20.0) -> None:
        """Until no errand runs."""
        end = time.monotonic() + limit_s
        while any(s._errand is not None and not s._errand.done for s in self.savings):
            assert time.monotonic() < end
            time.sleep(0.002)


def check_steps(directory: Path, least: int = 0) -> list[int]:
    """Every step that is listed is whole and right; their numbers, newest first."""
    steps, found = Steps(str(directory)), []
    for name in steps.names():
        try:
            with closing(steps.open(name)) as source:
                check_step(source)
                found.append(source.contents.step)
        except Corrupt:
            assert name not in steps.names(), "it was removed meanwhile, as too old"
    assert len(found) >= least
    return found


def check_step(source: NativeSource) -> None:
    step = source.contents.step
    assert not list(source.contents.flaws())
    for array in source.contents.arrays:
        values = source.read(array, 0, array.numel).view(np.uint8)
        if array in BUFFERS:
            assert values.view(np.int64).tolist() == [step]
            continue
        role = "master" if array.role == "param" else array.role
        first = SPACE.offset(array.name)
        expected = truth(role, step)[first : first + array.numel]
        assert np.array_equal(values, expected.ravel()), f"{array.key} of step {step}"
