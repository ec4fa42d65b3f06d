"""A deliberately dumb second opinion: sets of addresses and per-element dictionaries."""

from collections.abc import Iterable, Sequence
from itertools import pairwise

from hypothesis import strategies as st

from outlast.layout.layout import Layout
from outlast.layout.run import Run
from outlast.layout.space import Space, Tensor


def elements(runs: Iterable[Run]) -> list[int]:
    """Every address of the runs, as often as they hold it."""
    return [address for run in runs for pair in run.intervals() for address in range(*pair)]


def held(layout: Layout) -> dict[int, set[int]]:
    """holder -> addresses; a holder's runs must be disjoint."""
    table = {}
    for holder in layout.holders:
        addresses = elements(layout.runs(holder))
        table[holder] = set(addresses)
        assert len(table[holder]) == len(addresses) == layout.numel(holder)
    return table


@st.composite
def runs(draw: st.DrawFn, top: int = 60, strided: bool = True) -> Run:
    """A run that ends a little after `top` at most."""
    start, length = draw(st.integers(0, top)), draw(st.integers(1, 6))
    count = draw(st.integers(1, 5)) if strided else 1
    return Run(start, length, length + draw(st.integers(0, 6)), count)


def run_sets(top: int = 60, strided: bool = True) -> st.SearchStrategy[list[Run]]:
    """Some runs, which may overlap."""
    return st.lists(runs(top, strided), max_size=5)


@st.composite
def spaces(draw: st.DrawFn, multiple: int = 1) -> Space:
    """A small space with a few units; tensor sizes are multiples of `multiple`."""
    sizes = draw(st.lists(st.integers(0, 40 // multiple), min_size=1, max_size=6))
    units = draw(st.lists(st.sampled_from("abc"), min_size=len(sizes), max_size=len(sizes)))
    tensors = [
        Tensor(f"{unit}.{index}", (size, multiple), "float32")
        for index, (size, unit) in enumerate(zip(sizes, sorted(units), strict=True))
    ]
    return Space.of(tensors, unit_of=lambda name: name.split(".")[0])


def holder_lists(least: int = 1, most: int = 6) -> st.SearchStrategy[list[int]]:
    """Distinct holders in any order."""
    return st.lists(st.integers(0, 2**48), min_size=least, max_size=most, unique=True)


@st.composite
def partitions(draw: st.DrawFn, space: Space, holders: Sequence[int], grain: int) -> Layout:
    """Any partition of the space whose cuts are allowed cuts."""
    cuts = space.cuts(grain).tolist()
    owned: dict[int, list[Run]] = {holder: [] for holder in holders}
    for start, stop in pairwise(cuts):
        if start < stop:
            owned[draw(st.sampled_from(list(holders)))].append(Run.of(start, stop))
    return Layout.of(owned)


@st.composite
def layouts(draw: st.DrawFn, holders: Sequence[int], top: int = 60, strided: bool = True) -> Layout:
    """Any layout: replicas, holes, strided runs."""
    return Layout.of({holder: draw(run_sets(top, strided)) for holder in holders})
