"""Megatron-Core's torch_dist is read; Megatron-Core loads what is written, at 1 and 2 ranks."""

import json
import shutil
from pathlib import Path
from typing import Any

import megatron_runs
import numpy as np
import pytest

from outlast.checkpoint.formats import dcp, megatron
from outlast.checkpoint.formats.folder import Folder
from outlast.checkpoint.formats.torch_zip import read, write
from outlast.checkpoint.source import Source
from outlast.cluster.errors import Corrupt, Misuse


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    into = tmp_path_factory.mktemp("megatron")
    megatron_runs.run(into)
    return into


def opened(path: Path) -> Source:
    place = megatron.find(path)
    assert place is not None
    return megatron.open(place)


def check(source: Source, truth: Any, master: bool) -> None:
    """Every array is what Megatron loads under its key, bit by bit, and none is missing."""
    left = set(truth.files)
    for array in source.contents.arrays:
        key = f"optimizer.state.{array.role}.{array.name}"
        if array.role == "param":
            key = f"optimizer.state.fp32_param.{array.name}" if master else array.name
            left.discard(array.name)
        left.remove(key) if key in left else None
        values = source.read(array, 0, array.numel).reshape(array.shape)
        assert values.tobytes() == truth[key].tobytes(), array.key
    assert not left


@pytest.mark.parametrize("name", ["two", "ours"])
def test_a_checkpoint_of_two_tensor_parallel_ranks_is_read(runs: Path, name: str) -> None:
    source = opened(runs / name)
    check(source, np.load(runs / "truth-two.npz"), master=False)
    contents = source.contents
    assert (contents.step, contents.dtype, contents.left_out) == (2, "float32", ())
    decayed, flat = contents.groups
    assert (decayed.hyper["weight_decay"], flat.hyper["weight_decay"]) == (0.1, 0.0)
    assert decayed.scalars == flat.scalars == {"step": 2.0}
    shapes = {array.name: array.shape for array in contents.of("param")}
    stacked = {name: len(shape) - (".layers." in name) for name, shape in shapes.items()}
    assert {stacked[name] for name in decayed.names} == {2}
    assert {stacked[name] for name in flat.names} == {1}


def test_masters_of_a_bfloat16_model_are_read(runs: Path) -> None:
    source = opened(runs / "half")
    check(source, np.load(runs / "truth-half.npz"), master=True)
    assert source.contents.dtype == "bfloat16"
    assert {array.dtype for array in source.contents.arrays} == {"float32"}


def test_a_bfloat16_model_is_written_with_its_masters(runs: Path, tmp_path: Path) -> None:
    source = opened(runs / "half")
    megatron_runs.convert(runs / "half", tmp_path / "again")
    again = opened(tmp_path / "again")
    check(again, np.load(runs / "truth-half.npz"), master=True)
    assert again.contents.groups == source.contents.groups
    common = read(Folder(tmp_path / "again"), "common.pt")
    assert common["optimizer"]["optimizer"]["state"]["common_step"] == 2


@pytest.mark.parametrize("ranks", [1, 2])
def test_megatron_loads_what_is_written(runs: Path, ranks: int) -> None:
    truth, got = np.load(runs / "truth-two.npz"), np.load(runs / f"loaded-{ranks}.npz")
    assert set(got.files) == set(truth.files)
    for key in truth.files:
        assert got[key].tobytes() == truth[key].tobytes(), key
    told = json.loads((runs / f"facts-{ranks}.json").read_text())
    assert (told["step"], told["iteration"], told["hidden_size"]) == (2, 2, 16)
    assert [group["weight_decay"] for group in told["groups"]] == [0.1, 0.0]
    assert [group["lr"] for group in told["groups"]] == [1e-3, 1e-4]


def test_the_iteration_is_found(runs: Path, tmp_path: Path) -> None:
    for step in (9, 10):
        shutil.copytree(runs / "two", tmp_path / f"iter_{step:07}")
    assert megatron.find(tmp_path) == tmp_path / "iter_0000010"
    assert dcp.find(tmp_path) is None
    assert megatron.name_of(opened(runs / "two").contents) == "iter_0000002"


def test_what_cannot_be_told_is_left_out(runs: Path, tmp_path: Path) -> None:
    edited = shutil.copytree(runs / "two", tmp_path / "two")
    common = read(Folder(edited), "common.pt")
    common["optimizer"]["param_groups"][1]["weight_decay"] = 0.5
    write(edited / "common.pt", common, {})
    contents = opened(edited).contents
    assert contents.groups == ()
    assert contents.left_out == (
        "which parameters are in which of 2 groups, which Megatron does not save",
    )


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"sharded_backend": 1', "[" * 5000])
def test_a_damaged_configuration_is_refused(runs: Path, tmp_path: Path, text: str) -> None:
    edited = shutil.copytree(runs / "two", tmp_path / "two")
    (edited / "metadata.json").write_text(text)
    with pytest.raises(Corrupt, match=r"metadata\.json at byte 0"):
        opened(edited)


def test_other_backends_are_refused_with_what_to_do(runs: Path, tmp_path: Path) -> None:
    edited = shutil.copytree(runs / "two", tmp_path / "two")
    (edited / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(Misuse, match="save it as torch_dist"):
        opened(edited)
    write(edited / "common.pt", [1], {})
    (edited / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    with pytest.raises(Corrupt, match=r"common\.pt"):
        opened(edited)
