"""Who writes which shard: each once, by one that holds much of it, evenly."""

import doctest
import importlib
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlast.checkpoint import grid as grids
from outlast.checkpoint.writers import parts, shards, writers
from outlast.layout.layout import Layout, deal, replicate
from outlast.layout.plan import plan
from outlast.layout.run import Run, canonical, intersect, numel
from outlast.layout.space import Space, Tensor

SHAPES = st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=8)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 16 elements, so that small tensors have several."""
    monkeypatch.setattr(grids, "CHUNK", 4)
    monkeypatch.setattr(grids, "SHARD", 16)


def space_of(shapes: list[tuple[int, ...]]) -> Space:
    tensors = (Tensor(f"u{i // 2}.t{i}", shape, "float32") for i, shape in enumerate(shapes))
    return Space.of(tensors, unit_of=lambda name: name.split(".")[0])


def held_by(space: Space, ranks: int, replicated: bool, grain: int) -> Layout:
    holders = range(ranks)
    return replicate(space, holders) if replicated else deal(space, holders, grain)


@given(SHAPES, st.integers(1, 5), st.booleans(), st.integers(1, 7))
def test_every_shard_has_one_writer_that_can_have_it(
    shapes: list[tuple[int, ...]], ranks: int, replicated: bool, grain: int
) -> None:
    space = space_of(shapes)
    held = held_by(space, ranks, replicated, grain)
    chosen = writers(space, held)
    assert [shard for shard, _ in chosen] == shards(space)
    runs: dict[int, list[Run]] = {rank: [] for rank in held.holders}
    for shard, writer in chosen:
        runs[writer].append(shard.run)
        amounts = [numel(intersect(held.runs(rank), [shard.run])) for rank in held.holders]
        assert 2 * amounts[writer] >= max(amounts), "others would send most of it"
    wanted = Layout.of(runs)
    assert wanted.is_partition(space.numel)
    moves = plan(held, wanted)
    assert not moves.missing
    if replicated:
        assert not len(moves), "everybody has everything"


@pytest.mark.parametrize("name", ["every", "writers", "grid"])
def test_examples(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    failed, tried = doctest.testmod(importlib.import_module(f"outlast.checkpoint.{name}"))
    assert tried
    assert not failed


@given(SHAPES, st.data())
def test_parts_are_the_runs_cut_at_shards(
    shapes: list[tuple[int, ...]], data: st.DataObject
) -> None:
    space = space_of(shapes)
    cuts = sorted(data.draw(st.sets(st.integers(0, space.numel), max_size=8)))
    runs = [Run.of(a, b) for a, b in list(pairwise(cuts))[::2]]
    found = list(parts(space, runs))
    assert canonical(run for _, run in found) == canonical(runs)
    assert all(shard.run.start <= run.start and run.stop <= shard.run.stop for shard, run in found)
    assert sum(run.numel for _, run in found) == numel(runs)


def test_shards_tile_the_space_in_order() -> None:
    space = space_of([(7, 9), (), (0, 3), (40,)])
    edges = [0, *(shard.run.stop for shard in shards(space))]
    assert [shard.run.start for shard in shards(space)] == edges[:-1]
    assert edges[-1] == space.numel
    assert len(edges) > 8
    assert all(a < b for a, b in pairwise(edges))


@pytest.mark.parametrize("replicated", [True, False])
def test_the_work_is_even(replicated: bool) -> None:
    space = space_of([(64,)] * 32)
    held = held_by(space, 4, replicated, 4)
    load = dict.fromkeys(held.holders, 0)
    for shard, writer in writers(space, held):
        load[writer] += shard.run.length
    assert max(load.values()) <= 1.1 * space.numel / 4
