"""What a step leaves as it was is not copied again, and is there whichever half is read."""

import os
from functools import partial

import pytest
import torch
from torch import Tensor

from outlast.checkpoint.memory import HALVES, StateMemory, memory_bytes
from outlast.checkpoint.records import SlotRecord, StateShape
from outlast.layout.run import Run
from outlast.layout.space import Space
from outlast.layout.space import Tensor as SpaceTensor
from outlast.runtime.shard_state import ShardState, role_of

SPACE = Space.of([SpaceTensor("a", (100,), "float32"), SpaceTensor("b", (28,), "float32")], str)
OWNED = (Run.of(0, 64), Run.of(100, 128))
ROLES = ("param", "slow")


@pytest.fixture
def state() -> ShardState:
    roles = tuple(role_of(name, torch.float32) for name in ROLES)
    shape = StateShape("model", SPACE.numel, roles)
    file = os.memfd_create("state")
    os.ftruncate(file, memory_bytes(shape))
    found = ShardState(StateMemory(file, shape), SPACE)
    os.close(file)
    found.adopt(0, 0, OWNED)
    return found


def step(state: ShardState, number: int, changed: tuple[str, ...]) -> None:
    def change(live: dict[str, list[Tensor]]) -> None:
        for role in changed:
            for values in live[role]:
                values += number

    state.update(change)
    still = frozenset(ROLES) - frozenset(changed)
    state.commit(SlotRecord(number, 1, (), (), {}, {}, []), still)


def test_both_halves_are_whole_at_every_step(state: ShardState) -> None:
    param = slow = before = 0
    for number in range(1, 30):
        changed = ROLES if number % 7 in (0, 1, 4) else ROLES[:1]
        before = slow
        step(state, number, changed)
        param += number
        slow += number * (len(changed) == 2)
        for half in HALVES if number > 1 else (state.half,):
            record = state.memory.record(half)
            assert record is not None
            assert record.step == number - (half != state.half)
            assert not state.memory.torn(half, record)
        for role, value in zip(ROLES, (param, slow), strict=True):
            assert all((values == value).all() for values in state.live(role))
        if number > 1:
            assert (state.host(1 - state.half, "slow", OWNED[0]) == before).all()


def test_other_runs_are_copied_anew(state: ShardState) -> None:
    for number in (1, 2, 3):
        step(state, number, ROLES[:1] if number > 1 else ROLES)
    host = partial(state.host, role="slow", run=Run.of(64, 100))
    host(state.half).fill_(5)
    host(1 - state.half).fill_(6)  # of an older step
    state.adopt(state.half, 3, (Run.of(0, 128),))
    step(state, 4, ROLES[:1])
    assert (host(state.half) == 5).all()
    record = state.memory.record(state.half)
    assert record is not None
    assert not state.memory.torn(state.half, record)
