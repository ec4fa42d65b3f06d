"""The address space against a list with one entry per element."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outlast.layout.run import Run
from outlast.layout.space import Space, Tensor, Unit, chains
from outlast.tests.layout.oracle import elements, run_sets, spaces

EXAMPLES = settings(max_examples=100, deadline=None)


@EXAMPLES
@given(spaces(), run_sets())
def test_addresses(space: Space, runs: list[Run]) -> None:
    flat = [(tensor.name, index) for tensor in space.tensors for index in range(tensor.numel)]
    assert space.numel == len(flat)
    for address, (name, index) in enumerate(flat):
        tensor, inside = space.locate(address)
        assert (tensor.name, inside) == (name, index)
        assert space.offset(name) + index == address
    touched = {flat[address][0] for address in elements(runs) if address < len(flat)}
    assert space.names(runs) == [tensor.name for tensor in space.tensors if tensor.name in touched]


@EXAMPLES
@given(spaces(), st.integers(1, 12))
def test_cuts(space: Space, grain: int) -> None:
    cuts = {a for unit in space.units for a in range(unit.start, unit.stop, grain)} | {space.numel}
    assert space.cuts(grain).tolist() == sorted(cuts)
    everywhere = list(range(space.numel + 1))
    nearest = [min(cuts | {0}, key=lambda c: (abs(c - a), c)) for a in everywhere]
    assert space.snap(everywhere, grain).tolist() == nearest


@EXAMPLES
@given(spaces())
def test_json(space: Space) -> None:
    again = Space.from_json(json.loads(json.dumps(space.as_json())))
    assert again == space
    assert again.fingerprint() == space.fingerprint()


def test_fingerprint_tells_spaces_apart() -> None:
    tensors = [Tensor("a", (2, 3), "float32"), Tensor("b", (6,), "float32")]
    others = [
        Space.of(tensors),
        Space.of(tensors, unit_of=str),
        Space.of(tensors[::-1]),
        Space.of([Tensor("a", (3, 2), "float32"), tensors[1]]),
        Space.of([Tensor("a", (2, 3), "bfloat16"), tensors[1]]),
    ]
    assert len({space.fingerprint() for space in others}) == len(others)


def test_impossible_spaces_are_refused() -> None:
    tensor = Tensor("a", (4,), "float32")
    with pytest.raises(ValueError, match="unique"):
        Space.of([tensor, tensor])
    with pytest.raises(ValueError, match="tile"):
        Space((tensor,), (Unit("a", 0, 3, (0,)),))
    with pytest.raises(IndexError):
        Space.of([tensor]).locate(4)


def test_chains_are_numbered_blocks_of_one_kind() -> None:
    """Equal shapes alone do not make two tensors blocks of one stack."""
    shapes = {
        "embedding.weight": 8, "position.weight": 8,
        "h.0.w": 4, "h.1.w": 4, "h.2.w": 5, "h.3.v": 5, "h.5.v": 5, "h.6.v": 5,
        "g.7.w": 4, "g.8.w": 4, "norm.weight": 4,
    }  # fmt: skip
    tensors = [Tensor(name, (size,), "float32") for name, size in shapes.items()]
    space = Space.of(tensors, unit_of=lambda name: name.rpartition(".")[0])
    names = [[space.units[index].name for index in chain] for chain in chains(space)]
    assert names == [["h.0", "h.1"], ["h.5", "h.6"], ["g.7", "g.8"]]
