"""The folded gradient and its norm have the same bits on any number of ranks."""

import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import FileStore, ProcessGroupGloo

from outlast.cluster.timing import Timing
from outlast.layout.layout import Layout, deal, fill_hole
from outlast.layout.run import Run, union
from outlast.layout.space import Space, Tensor
from outlast.runtime import fold as module
from outlast.runtime.collectives import Communicator
from outlast.runtime.fold import buckets, fold, grain_squares, norm, spread, unit_runs
from outlast.runtime.leaf_tree import Node, push_all

sys.path.insert(0, str(Path(__file__).parent))
from thread_group import on_ranks

GRAIN, LEAVES = 64, 8
SPACE = Space.of(
    [Tensor(f"unit{i}.w", (n,), "float32") for i, n in enumerate((300, 64, 1000, 77, 5))],
    unit_of=lambda name: name.split(".")[0],
)
SCALES = 10.0 ** torch.arange(-4, 4)
GRADIENTS = torch.randn(LEAVES, SPACE.numel, generator=torch.Generator().manual_seed(1))
GRADIENTS *= SCALES.unsqueeze(1)
Owned = tuple[torch.Tensor, list[float]]


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUCKET", 500)


def node_sum(node: Node) -> torch.Tensor:
    level, index = node
    if level == 0:
        return GRADIENTS[index].clone()
    return node_sum((level - 1, 2 * index)) + node_sum((level - 1, 2 * index + 1))


def reduced(layout: Layout, holders: Sequence[int], leaves: Sequence[Sequence[int]]) -> Owned:
    """Whole gradient and grain squares after a fold on len(holders) ranks."""
    nodes = [push_all((), mine) for mine in leaves]

    def work(communicator: Communicator) -> tuple[torch.Tensor, torch.Tensor]:
        return fold_on(communicator, layout, holders, nodes)

    results = on_ranks(len(holders), work)
    squares = [square for _, mine in results for square in mine.tolist()]
    for whole, _ in results[1:]:
        assert torch.equal(whole, results[0][0])
    return results[0][0], squares


def fold_on(
    communicator: Communicator,
    layout: Layout,
    holders: Sequence[int],
    nodes: Sequence[Sequence[Node]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole gradient as this rank sees it after fold and spread; its own grain squares."""
    plan, rank = buckets(SPACE, layout, holders), communicator.rank
    runs = unit_runs(SPACE, layout.runs(holders[rank]))
    out = torch.full((sum(run.length for run in runs),), math.nan)
    sums = {node: node_sum(node) for node in nodes[rank]}
    fold(communicator, plan, nodes, sums, LEAVES, out)
    whole = torch.full((SPACE.numel,), math.nan)
    spread(communicator, plan, out, whole)
    return whole, grain_squares(out, runs, GRAIN)


ALONE = deal(SPACE, [1], GRAIN)


def expected() -> Owned:
    return reduced(ALONE, [1], [range(LEAVES)])


@given(
    st.lists(st.integers(0, 4), min_size=LEAVES, max_size=LEAVES),
    st.integers(1, 5),
    st.permutations(range(LEAVES)),
    st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_any_number_of_ranks_gives_the_bits_of_one(
    owner: list[int], size: int, order: list[int], uneven: bool
) -> None:
    holders = [90 - 3 * rank for rank in range(size)]
    layout = deal(SPACE, holders, GRAIN)
    if uneven and size > 1:
        layout = fill_hole(layout, [*holders[1:], 7], SPACE, GRAIN)
        holders = [*holders[1:], 7]
    leaves = [[leaf for leaf in order if owner[leaf] % size == rank] for rank in range(size)]
    whole, squares = reduced(layout, holders, leaves)
    right, right_squares = expected()
    assert torch.equal(whole, right)
    assert norm(squares) == norm(right_squares)
    assert sorted(squares) == sorted(right_squares)


def test_the_result_is_the_mean_of_the_leaves() -> None:
    whole, _ = expected()
    right = GRADIENTS.double().mean(0)
    assert torch.allclose(whole.double(), right, rtol=1e-4, atol=1e-4)
    assert torch.equal(whole, node_sum((3, 0)) / LEAVES)


def test_planted_sum_in_rank_order_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_order(parts: dict[Node, torch.Tensor], node: Node) -> torch.Tensor:
        total = torch.zeros_like(next(iter(parts.values())))
        for part in parts.values():
            total += part
        return total

    one, _ = expected()
    monkeypatch.setattr(module, "combine", in_order)
    three, _ = reduced(deal(SPACE, [1, 2, 3], GRAIN), [1, 2, 3], [[0, 1, 2], [3, 4, 5], [6, 7]])
    assert not torch.equal(one, three)


# Grains.


def grain_sums(gradient: torch.Tensor, layout: Layout, grain: int) -> dict[int, float]:
    """Address of each grain -> its sum of squares, computed by its owner."""
    found: dict[int, float] = {}
    for holder in layout.holders:
        runs = unit_runs(SPACE, layout.runs(holder))
        mine = torch.cat([gradient[run.start : run.stop] for run in runs] or [gradient[:0]])
        starts = [at for run in runs for at in range(run.start, run.stop, grain)]
        squares = grain_squares(mine, runs, grain).tolist()
        found |= dict(zip(starts, squares, strict=True))
    return found


@pytest.mark.parametrize("owners", range(1, 9))
@pytest.mark.parametrize("grain", [64, 256, 4096])
def test_grain_sums_do_not_depend_on_the_cuts(owners: int, grain: int) -> None:
    gradient = GRADIENTS[5]
    one = grain_sums(gradient, deal(SPACE, [1], grain), grain)
    many = grain_sums(gradient, deal(SPACE, list(range(owners)), grain), grain)
    assert many == one
    assert set(one) == set(SPACE.cuts(grain)[:-1].tolist())


@pytest.mark.parametrize("grain", [64, 4096, 65536])
def test_a_single_grain_has_the_bits_it_has_among_others(grain: int) -> None:
    values = torch.randn(5 * grain, generator=torch.Generator().manual_seed(3))
    together = grain_squares(values, [Run.of(0, 5 * grain)], grain)
    for i in range(5):
        alone = grain_squares(values[i * grain : (i + 1) * grain].clone(), [Run(0, grain)], grain)
        assert alone.item() == together[i].item()


def test_planted_cut_inside_a_grain_differs() -> None:
    gradient = GRADIENTS[5]
    one = grain_sums(gradient, deal(SPACE, [1], 64), 64)
    shifted = Layout.of({1: [Run.of(0, 40)], 2: [Run.of(40, SPACE.numel)]})
    assert grain_sums(gradient, shifted, 64) != one


def test_norm_does_not_depend_on_the_order_of_grains() -> None:
    squares = (torch.rand(500) * 10.0 ** torch.randint(-12, 12, (500,))).tolist()
    assert norm(squares) == norm(squares[::-1]) == norm(sorted(squares))
    assert norm([9.0, 16.0]) == 5.0
    assert norm([]) == 0.0
    assert math.isnan(norm([1.0, math.nan]))


def test_runs_are_cut_at_units_and_buckets_cover_the_space() -> None:
    layout = deal(SPACE, [3, 1, 2], GRAIN)
    starts = {unit.start for unit in SPACE.units}
    for holder in layout.holders:
        runs = unit_runs(SPACE, layout.runs(holder))
        assert union((), runs) == layout.runs(holder)
        for run in runs:
            crossed = [s for s in starts if run.start < s < run.stop]
            assert not crossed
    pieces = [p for b in buckets(SPACE, layout, [3, 1, 2]) for rank in b.pieces for p in rank]
    assert sorted(pieces)[0][0] == 0
    assert sum(b - a for a, b in pieces) == SPACE.numel


# The same over sockets.


def gloo(directory: str, rank: int, size: int) -> Communicator:
    options = ProcessGroupGloo._Options()
    options._devices = [ProcessGroupGloo.create_device(hostname="127.0.0.1", lazy_init=False)]
    options._timeout = timedelta(seconds=20)
    group = ProcessGroupGloo(FileStore(f"{directory}/store", size), rank, size, options)
    return Communicator(1, group, torch.device("cpu"), Timing(), lambda: None)


def in_processes(size: int, work: Callable[[Communicator], torch.Tensor]) -> list[bytes]:
    """Bytes of each rank's result; ranks are forked, connected by gloo."""
    with tempfile.TemporaryDirectory() as directory:
        pids = []
        for rank in range(size):
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    result = work(gloo(directory, rank, size))
                    Path(directory, f"{rank}").write_bytes(result.numpy().tobytes())
                    status = 0
                finally:
                    os._exit(status)
            pids.append(pid)
        ends = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        assert ends == [0] * size
        return [Path(directory, f"{rank}").read_bytes() for rank in range(size)]


def test_real_processes_give_the_bits_of_one() -> None:
    holders = [5, 9, 2]
    layout = deal(SPACE, holders, GRAIN)
    nodes = [push_all((), leaves) for leaves in ([0, 1, 2], [3, 5, 4], [6, 7])]

    def work(communicator: Communicator) -> torch.Tensor:
        return fold_on(communicator, layout, holders, nodes)[0]

    right, _ = expected()
    assert in_processes(3, work) == [right.numpy().tobytes()] * 3
