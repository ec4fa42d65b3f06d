"""Checkpoints of real FSDP2 runs are read; FSDP2 loads what is written, on any number of ranks."""

import json
import math
import shutil
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import dcp_runs
import numpy as np
import pytest
from held import held, into
from hypothesis import given
from hypothesis import strategies as st

from outlast.checkpoint.contents import Array
from outlast.checkpoint.formats import dcp, distcp
from outlast.checkpoint.formats.pickle_writer import dump
from outlast.checkpoint.formats.pickles import Opaque, Size, load
from outlast.checkpoint.formats.torch_zip import ZipFolder
from outlast.checkpoint.items import Wanted
from outlast.checkpoint.source import Source
from outlast.cluster.errors import Corrupt, Misuse


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    into = tmp_path_factory.mktemp("dcp")
    dcp_runs.run(into)
    return into


def opened(path: Path) -> Source:
    place = dcp.find(path)
    assert place is not None
    return dcp.open(place)


def whole(source: Source, array: Array) -> Any:
    return source.read(array, 0, array.numel).reshape(array.shape)


def check(source: Source, truth: Any, roles: tuple[str, ...]) -> None:
    """Every array is the truth's, bit by bit, and none is missing."""
    expected = {key for key in truth.files if key.startswith(tuple(f"{role}/" for role in roles))}
    aliases = {f"param/{alias}" for alias in source.contents.aliases}
    assert {array.key for array in source.contents.arrays} == expected - aliases
    for array in source.contents.arrays:
        value = truth[array.key]
        assert array.shape == value.shape
        assert whole(source, array).astype(value.dtype).tobytes() == value.tobytes(), array.key


ROLES = ("param", "exp_avg", "exp_avg_sq", "frozen", "buffer")


@pytest.mark.parametrize("name", ["nested", "flat", "ours"])
def test_a_run_of_fsdp2_is_read(runs: Path, name: str) -> None:
    source, told = opened(runs / name), json.loads((runs / "facts.json").read_text())
    check(source, np.load(runs / "truth.npz"), ROLES)
    contents = source.contents
    assert contents.aliases == {"head.weight": "wte.weight"}
    assert (contents.step, contents.dtype) == (3, "float32")
    for group, said in zip(contents.groups, told["groups"], strict=True):
        assert list(group.names) == said.pop("params")
        assert group.hyper == said
        assert group.scalars == {"step": 3.0}
    assert contents.facts["source"] == {"format": "dcp", "ranks": 2}
    if name == "nested":
        extra = {key: value for key, value in dcp_runs.EXTRA.items()}
        assert contents.facts["client_state"] == {"extra": extra}
        assert contents.left_out == ("extra.rng (uint8 (5056,)) is not the model's",)


def test_weights_alone_are_read(runs: Path) -> None:
    contents = opened(runs / "weights").contents
    assert {array.role for array in contents.arrays} == {"param", "buffer"}
    assert (contents.groups, contents.step) == ((), 0)


def test_a_model_in_bfloat16_is_read(runs: Path) -> None:
    source = opened(runs / "bf16")
    check(source, np.load(runs / "truth-bf16.npz"), ROLES)
    assert source.contents.dtype == "bfloat16"


def test_boxes_of_several_axes_are_put_together(runs: Path) -> None:
    source = opened(runs / "columns")
    expected = np.arange(7 * 5 * 6, dtype=np.float32).reshape(7, 5, 6)
    arrays = {array.name: array for array in source.contents.arrays}
    assert np.array_equal(whole(source, arrays["w"]), expected)
    assert np.array_equal(whole(source, arrays["last"]), expected * 2)
    for start, stop in ((0, 1), (17, 60), (209, 210), (5, 5)):
        assert np.array_equal(source.read(arrays["w"], start, stop), expected.flat[start:stop])


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_fsdp2_loads_what_is_written(runs: Path, world: int) -> None:
    truth, got = np.load(runs / "truth.npz"), np.load(runs / f"loaded-{world}.npz")
    assert set(got.files) == set(truth.files)
    for key in truth.files:
        assert got[key].dtype == truth[key].dtype
        assert got[key].tobytes() == truth[key].tobytes(), key
    told = json.loads((runs / "facts.json").read_text())
    now = json.loads((runs / f"facts-{world}.json").read_text())
    assert now["groups"] == told["groups"]
    assert now["extra"] == dcp_runs.EXTRA
    if world == 2:  # others see other batches
        assert now["losses"] == told["losses"]


def test_what_is_written_means_the_same_without_its_note(runs: Path, tmp_path: Path) -> None:
    """As a program that knows nothing of us reads it."""
    edited = shutil.copytree(runs / "ours", tmp_path / "ours")
    root = load((edited / ".metadata").read_bytes(), "x")
    del root.state["state_dict_metadata"]["outlast"], root.state["planner_data"]["outlast"]
    (edited / ".metadata").write_bytes(dump(root).data)
    with_note, without = opened(runs / "ours").contents, opened(edited).contents
    assert without.arrays == with_note.arrays
    assert without.groups == with_note.groups
    assert without.aliases == with_note.aliases
    assert without.facts["client_state"] == with_note.facts["client_state"]


def edit(root: Opaque, what: str) -> None:
    """Lies that the metadata can tell."""
    told, places = root.state["state_dict_metadata"], root.state["storage_data"]
    key, tensor = "model.up.weight", told["model.up.weight"]
    first, second, *_ = tensor.state["chunks"]
    info = next(i for k, i in places.items() if k.state["fqn"] == key)
    if what == "a file outside":
        info.state["relative_path"] = "../__0_0.distcp"
    elif what == "a file that is not there":
        info.state["relative_path"] = "__7_0.distcp"
    elif what == "an offset beyond the end":
        info.state["offset"] = 10**9
    elif what == "a length that is not":
        info.state["length"] -= 1
    elif what == "a chunk of another tensor":
        info.state.update(
            next(i for k, i in places.items() if k.state["fqn"] == "model.wte.weight").state
        )
    elif what == "a chunk that is missing":
        tensor.state["chunks"].pop()
    elif what == "chunks that overlap":
        tensor.state["chunks"] = [first, first]
    elif what == "a larger tensor":
        tensor.state["size"] = Size((99, 16))
    elif what == "a tensor larger than memory":
        tensor.state["size"] = Size((2**60, 16))
    elif what == "a size of another rank":
        tensor.state["size"] = Size((33, 16, 1))
    elif what == "an offset that is negative":
        second.state["offsets"] = Size((-17, 0))
    elif what == "another dtype":
        tensor.state["properties"] = told["model.calls"].state["properties"]
    elif what == "a compressed chunk":
        info.state["transform_descriptors"] = ["zstd"]
    elif what == "no place":
        places.clear()
    elif what == "not metadata":
        root.name = "torch.distributed.checkpoint.metadata.StorageMeta"
    elif what == "a parameter less":
        del told[key]
    else:
        raise AssertionError(what)


LIES = (
    "a file outside", "a file that is not there", "an offset beyond the end",
    "a length that is not", "a chunk of another tensor", "a chunk that is missing",
    "chunks that overlap", "a larger tensor", "a tensor larger than memory",
    "a size of another rank", "an offset that is negative", "another dtype",
    "a compressed chunk", "no place", "not metadata", "a parameter less",
)  # fmt: skip


@pytest.mark.parametrize("name", ["nested", "ours"])
@pytest.mark.parametrize("what", LIES)
def test_lies_of_the_metadata_are_refused(runs: Path, tmp_path: Path, name: str, what: str) -> None:
    edited = shutil.copytree(runs / name, tmp_path / name)
    root = load((edited / ".metadata").read_bytes(), "x")
    (edited / ".metadata").write_bytes(dump(root).data)
    assert opened(edited).contents.arrays == opened(runs / name).contents.arrays
    edit(root, what)
    (edited / ".metadata").write_bytes(dump(root).data)
    with pytest.raises(Corrupt, match=str(edited)):
        opened(edited)


def test_steps_that_differ_inside_a_group_are_refused(runs: Path, tmp_path: Path) -> None:
    edited = shutil.copytree(runs / "nested", tmp_path / "nested")
    root = load((edited / ".metadata").read_bytes(), "x")
    places = {k.state["fqn"]: i for k, i in root.state["storage_data"].items()}
    step, factor = places["optim.state.up.weight.step"], places["model.factor"]
    step.state, factor.state = factor.state, step.state
    (edited / ".metadata").write_bytes(dump(root).data)
    with pytest.raises(Misuse, match=r"step of up.weight is 2.5, of others of its group 3.0"):
        opened(edited)


def test_links_out_and_mixed_files_are_refused(runs: Path, tmp_path: Path) -> None:
    edited = shutil.copytree(runs / "nested", tmp_path / "nested")
    (edited / "__1_0.distcp").unlink()
    (edited / "__1_0.distcp").symlink_to(runs / "nested" / "__1_0.distcp")
    with pytest.raises(Corrupt, match="leads out"):
        opened(edited)
    (edited / "__1_0.distcp").unlink()
    shutil.copy(runs / "bf16" / "__1_0.distcp", edited / "__1_0.distcp")
    with pytest.raises(Corrupt, match="__1_0"):
        opened(edited)


def test_entries_that_share_bytes_are_refused(runs: Path, tmp_path: Path) -> None:
    """A small file would be read as often as it is named."""
    edited = shutil.copytree(runs / "nested", tmp_path / "nested")
    root = load((edited / ".metadata").read_bytes(), "x")
    places = {k.state["fqn"]: i for k, i in root.state["storage_data"].items()}
    places["extra.note"].state.update(places["extra.tokens"].state)
    (edited / ".metadata").write_bytes(dump(root).data)
    with pytest.raises(Corrupt, match="is in two entries"):
        opened(edited)


NOTES: dict[str, Any] = {
    "step": [math.inf, -1, 10**30, None], "aliases": [{"a": "nobody"}, 5], "arrays": [[5]],
    "facts": [5, {"client_state": [1]}, {"megatron": 5}, {"source": "x"}],
    "groups": [[{"names": [], "hyper": {}, "scalars": {"step": each}}] for each in (
        "x", None, math.nan, math.inf)] + [[{"names": [], "hyper": 5, "scalars": {}}]],
}  # fmt: skip


def read_note(path: Path, note: str, shards: distcp.Shards) -> None:
    contents, _ = distcp.from_note(path, note, shards.tensors, dcp._key)
    if flaw := next(iter(contents.flaws()), None):
        raise Corrupt(flaw)


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, all_ in NOTES.items() for v in all_])
def test_notes_that_nobody_wrote_are_refused(key: str, value: Any, tmp_path: Path) -> None:
    for item in dcp.plan(held(groups=()), tmp_path, Wanted()):
        item.make(lambda size: None)
    shards = distcp.read_shards(ZipFolder(tmp_path))
    note = json.loads(shards.objects["outlast"]) | {key: value}
    with pytest.raises(Corrupt):
        read_note(tmp_path, json.dumps(note), shards)


def test_tied_buffers_and_odd_facts_are_written(tmp_path: Path) -> None:
    facts = {"ds_config": {"zero_optimization": {"sub_group_size": math.nan}},
             "skipped_steps": math.inf}  # fmt: skip
    groups = [replace(group, hyper=group.hyper | {"betas": 5}) for group in held().contents.groups]
    source = held(aliases={"mask2": "mask"}, facts=facts, groups=tuple(groups))
    for name in ("dcp", "universal", "deepspeed", "megatron"):
        assert into(source, name, tmp_path).source.contents.aliases == {"mask2": "mask"}


def test_only_steps_are_chosen_among(runs: Path, tmp_path: Path) -> None:
    for name in ("model", "optimizer"):
        shutil.copytree(runs / "columns", tmp_path / name)
    with pytest.raises(Misuse, match="name one of model, optimizer"):
        dcp.find(tmp_path)


def test_only_what_is_a_checkpoint_is_found(runs: Path, tmp_path: Path) -> None:
    assert dcp.find(tmp_path) is None
    for step in (9, 10):
        shutil.copytree(runs / "columns", tmp_path / f"step-{step}")
    assert dcp.find(tmp_path) == tmp_path / "step-10"


def test_the_number_of_ranks_does_not_matter(runs: Path, tmp_path: Path) -> None:
    source = opened(runs / "nested")
    for ranks in (1, 40):
        (tmp_path / str(ranks)).mkdir()
        for item in dcp.plan(source, tmp_path / str(ranks), Wanted(ranks=ranks)):
            done: list[int] = []
            item.make(done.append)
            item.make(lambda size: None)  # again, after it was cut short
            assert sum(done) == item.size
        check(opened(tmp_path / str(ranks)), np.load(runs / "truth.npz"), ROLES)


@given(st.data())
def test_boxes_are_runs(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 4), max_size=4)))
    offsets = tuple(data.draw(st.integers(0, n)) for n in shape)
    sizes = tuple(data.draw(st.integers(0, n - a)) for n, a in zip(shape, offsets, strict=True))
    number = np.arange(prod(shape)).reshape(shape)
    box = number[tuple(slice(a, a + n) for a, n in zip(offsets, sizes, strict=True))].reshape(-1)
    runs = list(distcp.boxed(shape, offsets, sizes))
    found = [(skip, [e for a, b in run.intervals() for e in range(a, b)]) for skip, run in runs]
    assert [e for _, elements in found for e in elements] == list(box)
    assert [skip for skip, _ in found] == [
        sum(r.numel for _, r in runs[:i]) for i in range(len(runs))
    ]


def test_a_box_of_too_many_intervals_is_refused() -> None:
    with pytest.raises(ValueError, match="intervals"):
        list(distcp.boxed((2**11, 3, 2**11, 3, 2, 3), (0,) * 6, (2**11, 2, 2**11, 2, 2, 2)))
