"""Slices of tensor-parallel ranks: copies that are averaged, copies that have to be equal."""

from pathlib import Path

import numpy as np
import pytest

from outlast.checkpoint.contents import PARAM, Contents
from outlast.checkpoint.formats.folder import Folder
from outlast.checkpoint.formats.patterns import AVERAGED, REPLICATED, ROWS
from outlast.checkpoint.formats.pickles import TensorRef
from outlast.checkpoint.formats.slices import Located, MergedSource, Merges, Slices
from outlast.cluster.errors import Corrupt

RANKS = 3


def merged(path: Path, values: dict[str, list[np.ndarray]]) -> MergedSource:
    """A source of tensors, each of whose slices is in two pieces of a file of its own."""
    info = {AVERAGED: ["mean"], REPLICATED: ["same"], ROWS: ["rows"]}
    merges = Merges(RANKS, info)
    slices = Slices(merges)
    for name, arrays in values.items():
        found = []
        for rank, array in enumerate(arrays):
            array.tofile(path / f"{name}-{rank}")
            ref = replace_file(TensorRef.of("float32", array.shape, "0"), f"{name}-{rank}")
            half = array.size // 2 + 1
            found += [Located(rank, half, array.size, ref, half), Located(rank, 0, half, ref)]
        slices.add(PARAM, name, [array.shape for array in arrays], "float32", found)
    contents = Contents(1, tuple(slices.arrays.values()))
    return MergedSource(slices.sources(Folder(path), contents), merges.averaged())


def replace_file(ref: TensorRef, file: str) -> TensorRef:
    return TensorRef(ref.dtype, ref.shape, ref.key, ref.extent, ref.start, ref.strides, file)


def read(source: MergedSource, name: str) -> np.ndarray:
    array = source.contents.by_key[f"{PARAM}/{name}"]
    whole = source.read(array, 0, array.numel)
    parts = [source.read(array, at, at + 1) for at in range(array.numel)]
    assert np.concatenate(parts).tobytes() == whole.tobytes()
    return whole.reshape(array.shape)


def test_slices_make_wholes(tmp_path: Path) -> None:
    dice = np.random.default_rng(0)
    mean = [dice.standard_normal((4, 5), np.float32) for _ in range(RANKS)]
    rows = [dice.standard_normal((4, width), np.float32) for width in (1, 3, 2)]
    cut = [dice.standard_normal((height, 2), np.float32) for height in (2, 1, 3)]
    same = dice.standard_normal((3, 3), np.float32)
    source = merged(tmp_path, {"mean": mean, "rows": rows, "cut": cut, "same": [same] * RANKS})
    expected = (mean[0] + mean[1] + mean[2]) / np.float32(RANKS)
    assert read(source, "mean").tobytes() == expected.tobytes()
    assert read(source, "rows").tobytes() == np.concatenate(rows, 1).tobytes()
    assert read(source, "cut").tobytes() == np.concatenate(cut).tobytes()
    assert read(source, "same").tobytes() == same.tobytes()


def test_copies_that_differ_are_refused(tmp_path: Path) -> None:
    same = np.ones((3, 3), np.float32)
    other = same.copy()
    other[2, 2] = np.nextafter(np.float32(1), np.float32(2))
    source = merged(tmp_path, {"same": [same, same, other]})
    array = source.contents.by_key["param/same"]
    assert source.read(array, 0, 8).tobytes() == same.tobytes()[:-4]
    with pytest.raises(Corrupt, match=r"param/same.*differ"):
        source.read(array, 0, 9)
