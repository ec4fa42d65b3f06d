"""The runtime moves and decodes what the ladder decided, between ranks that are threads."""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from outlast.checkpoint.batch import batches
from outlast.checkpoint.ladder import Recovery
from outlast.checkpoint.records import Protection
from outlast.layout.run import Run, subtract
from outlast.runtime import transfer as module
from outlast.runtime.transfer import Transfer

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "checkpoint"))
from emulated_job import ROLES, EmulatedJob, Half, ParityHalf, cut, truth
from thread_group import on_ranks


class Slot:
    """A half of the emulated job, as a survey shows it."""

    def __init__(self, half: Half) -> None:
        self._half = half

    def read(self, role: str, run: Run) -> torch.Tensor:
        return torch.from_numpy(cut(self._half.data[role], role, run))


class Parity:
    def __init__(self, half: ParityHalf) -> None:
        self._half = half

    def unit(self, stripe: int, row: int) -> np.ndarray:
        return self._half.units[stripe, row]


class State:
    """Where a rank receives: everything else stays poison."""

    def __init__(self, numel: int) -> None:
        self.data = {role.name: np.full(numel * role.itemsize, 0xEE, np.uint8) for role in ROLES}

    def host(self, half: int, role: str, run: Run) -> torch.Tensor:
        assert half == 1
        return torch.from_numpy(cut(self.data[role], role, run))


def transferred(
    job: EmulatedJob, decision: Recovery, states: Sequence[Any], slots: Sequence[Sequence[Half]],
    parity: Sequence[Sequence[ParityHalf]], device: str = "cpu",
) -> list[list[Run]]:  # fmt: skip
    """What every rank received in `states`; the sources are those that the job reported."""

    def work(communicator: Any) -> list[Run]:
        rank = communicator.rank
        survey = SimpleNamespace(
            slots=[Slot(half) for half in slots[rank]],
            parity=[Parity(half) for half in parity[rank]],
        )
        transfer = Transfer(communicator, survey, job.shape)  # type: ignore[arg-type]
        return transfer.run(decision, states[rank], 1)

    return on_ranks(len(job.ranks), work, device)


def recover(job: EmulatedJob, round_bytes: int, window_bytes: int, device: str = "cpu") -> None:
    """Every rank ends with the true bytes of what it received, and nothing else."""
    slots, parity, reports = job.sources()
    decision = job.ladder.decide(reports)
    states = [State(job.space.numel) for _ in job.ranks]
    cut_up = partial(batches, round_bytes=round_bytes, window_bytes=window_bytes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "batches", cut_up)
        received = transferred(job, decision, states, slots, parity, device)
    for rank, holder in enumerate(job.ranks):
        mine = next((h for h in job.memories[holder].halves if h and h.step == decision.step), None)
        lacks = subtract(decision.layout.runs(holder), mine.held if mine else ())
        assert not subtract(lacks, received[rank]), f"rank {rank} still lacks something"
        for role in ROLES:
            right = np.full(job.space.numel * role.itemsize, 0xEE, np.uint8)
            for run in received[rank]:
                cut(right, role.name, run)[:] = cut(
                    truth(decision.step, role.name, job.space.numel), role.name, run
                )
            assert np.array_equal(states[rank].data[role.name], right), f"wrong {role.name}"


def harmed(m: int, lost: tuple[str, ...], worker: bool) -> EmulatedJob:
    """Nodes are gone, perhaps a worker too, and a new node has come."""
    job = EmulatedJob(5, 2, protection=Protection(m))
    job.protect(1)
    for node in lost:
        job.lose_node(node)
    if worker:
        job.lose_worker(job.ranks[-1])
    job.join(3, "node9")
    return job


@pytest.mark.parametrize(("round_bytes", "window_bytes"), [(1 << 20, 1 << 20), (2048, 256)])
@pytest.mark.parametrize("worker", [False, True])
@pytest.mark.parametrize(
    ("m", "lost"), [(1, ()), (1, ("node1",)), (2, ("node0", "node3")), (3, ("node1", "node2"))]
)
def test_every_rank_gets_what_it_lacks(
    m: int, lost: tuple[str, ...], worker: bool, round_bytes: int, window_bytes: int
) -> None:
    recover(harmed(m, lost, worker), round_bytes, window_bytes)


def test_planted_outputs_that_come_late_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the last round rebuilt is forgotten."""
    monkeypatch.setattr(module, "chain", lambda rounds, _: rounds)
    with pytest.raises(AssertionError, match=r"lacks|wrong"):
        recover(harmed(2, ("node0", "node3"), False), 2048, 256)


def test_planted_wrong_offset_of_an_output_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = Transfer._decode

    def flawed(self: Transfer, *given: Any) -> dict[int, torch.Tensor]:
        return {unit: whole.roll(1) for unit, whole in decode(self, *given).items()}

    monkeypatch.setattr(Transfer, "_decode", flawed)
    with pytest.raises(AssertionError, match="wrong"):
        recover(harmed(2, ("node0", "node3"), False), 2048, 256)
