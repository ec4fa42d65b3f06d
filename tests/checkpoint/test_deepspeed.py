"""DeepSpeed's checkpoints, read: every bit of real runs, and an error for what is not whole."""

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed_runs as runs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlast.checkpoint.contents import PARAM
from outlast.checkpoint.dtypes import dtype_of
from outlast.checkpoint.formats import deepspeed, deepspeed_optimizer, torch_zip
from outlast.checkpoint.formats.deepspeed_layout import Flat, Split, flat, round_robin, split
from outlast.checkpoint.formats.folder import Folder
from outlast.checkpoint.formats.pickles import Opaque, Size, TensorRef
from outlast.checkpoint.formats.plain import from_json
from outlast.checkpoint.source import Source
from outlast.cluster.errors import Corrupt, Misuse, OutlastError

RUNS = sorted(name for name, case in runs.CASES.items() if case.stage)


def arrays(source: Source) -> dict[str, np.ndarray]:
    """All values; bfloat16 as float32, as in the truth."""
    found = {}
    for array in source.contents.arrays:
        values = source.read(array, 0, array.numel).reshape(array.shape)
        found[array.key] = values.astype("f4") if array.dtype == "bfloat16" else values
    return found


def differing(found: dict[str, np.ndarray], truth: dict[str, np.ndarray]) -> list[str]:
    """Keys of what is not the same, bit by bit."""
    assert set(found) == set(truth)
    return [
        key
        for key, a in found.items()
        if (a.dtype, a.shape, a.tobytes())
        != (truth[key].dtype, truth[key].shape, truth[key].tobytes())
    ]


@pytest.mark.parametrize("name", RUNS)
def test_every_bit_of_a_run_is_read(deepspeed_saves: Path, name: str) -> None:
    at = deepspeed_saves / name
    for tag, truth in [("global_step3", "truth"), ("global_step6", "after")]:
        source = deepspeed.open(at / tag)
        assert differing(arrays(source), runs.truth(at, truth)) == []
        assert list(deepspeed.disagreements(source)) == []
        source.close()


@pytest.mark.parametrize("name", RUNS)
def test_what_is_said_of_a_run(deepspeed_saves: Path, name: str) -> None:
    case, told = runs.CASES[name], runs.facts(deepspeed_saves / name)
    contents = deepspeed.open(deepspeed.find(deepspeed_saves / name)).contents
    assert contents.step == told["global_steps"] == 3
    assert contents.left_out == ()
    assert contents.dtype == ("bfloat16" if case.bf16 else "float32")
    assert contents.aliases == ({"head.weight": "embed.weight"} if case.tied else {})
    assert [group.hyper for group in contents.groups] == told["groups"]
    assert {s for group in contents.groups for s in group.scalars.values()} == set(told["step"])
    facts = from_json(contents.facts)
    assert facts["lr_scheduler"] == told["lr_scheduler"]
    assert facts["client_state"] == runs.CLIENT
    assert (facts["source"]["stage"], facts["source"]["ranks"]) == (case.stage, case.world)
    # The optimizer's order, which is not that of the flat buffer where gradients go round robin.
    names = [array.name for array in contents.of(PARAM)]
    shapes = {array.name: array.shape for array in contents.arrays}
    if case.groups == 2:
        expected = [
            [n for n in names if len(shapes[n]) > 1],
            [n for n in names if len(shapes[n]) < 2],
        ]
        assert [list(group.names) for group in contents.groups] == expected


def test_a_wrong_layout_shows(deepspeed_saves: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def backwards(sizes: dict[str, int], ranks: int, paddings: Any = ()) -> Flat:
        return flat(dict(reversed(sizes.items())), ranks, paddings)

    def split_otherwise(sizes: dict[str, int], ranks: int) -> Split:
        cut = split(sizes, ranks)  # a matrix of 45 x 32 and one of 32 x 45 change places
        names = {name: size for name, size in sizes.items() if size == 1440}
        moved = dict(zip(names, reversed(names), strict=True))
        return replace(cut, sizes={moved.get(name, name): size for name, size in sizes.items()})

    for name, function, planted in [("z1", "flat", backwards), ("z3", "split", split_otherwise)]:
        monkeypatch.setattr(deepspeed_optimizer, function, planted)
        at = deepspeed_saves / name
        assert differing(arrays(deepspeed.open(deepspeed.find(at))), runs.truth(at)) != []
    assert list(deepspeed.disagreements(deepspeed.open(deepspeed_saves / "z1/global_step3"))) != []


SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=8).map(
    lambda sizes: {f"p{index}": size for index, size in enumerate(sizes)}
)


@given(SIZES, st.integers(1, 9), st.integers(0, 3))
def test_layouts_have_every_element_once(sizes: dict[str, int], ranks: int, pad: int) -> None:
    for cut in (flat(sizes, ranks, [pad] * len(sizes)), split(sizes, ranks)):
        found = {name: [0] * size for name, size in sizes.items()}
        for rank in range(ranks):
            held: set[int] = set()
            for share in cut.shares(rank):
                inside = range(share.offset, share.offset + share.stop - share.start)
                assert held.isdisjoint(inside)
                assert inside.stop <= cut.filled(rank) <= cut.length
                held.update(inside)
                for index in range(share.start, share.stop):
                    found[share.name][index] += 1
        assert all(set(counts) == {1} for counts in found.values())


@given(st.integers(0, 50), st.integers(1, 9))
def test_round_robin_is_a_permutation(count: int, ranks: int) -> None:
    assert sorted(round_robin(count, ranks)) == list(range(count))


# ---- what is not whole


def copied(at: Path, into: Path) -> Path:
    """The third step of a run, to be damaged."""
    return Path(shutil.copytree(at / "global_step3", into / "global_step3"))


OPTIMIZER = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
FIRST, MODEL = OPTIMIZER.replace("_1_", "_0_"), OPTIMIZER.replace("optim", "model")


def _take(name: str, other: str) -> Callable[[Path, Path], Any]:
    """The file of another checkpoint in place of this one's."""
    return lambda at, saves: shutil.copy(saves / other / name, at / name)


def _made(name: str) -> Callable[[Path, Path], Any]:
    return lambda at, saves: (at / name).touch()


def _cut_short(at: Path, saves: Path) -> None:
    (at / OPTIMIZER).write_bytes((at / OPTIMIZER).read_bytes()[:-9])


FOREIGN = [
    ("z1", lambda at, saves: (at / OPTIMIZER).unlink(), f"{OPTIMIZER}.*not there"),
    ("z3", lambda at, saves: (at / MODEL).unlink(), f"{MODEL}.*not there"),
    ("z1", _take(OPTIMIZER, "z1/global_step6"), "not of one save"),
    ("z3", _take(OPTIMIZER, "z3/global_step6"), "not of one save"),
    ("z3", _take(MODEL, "z3/global_step6"), "global_steps is 6"),
    ("z1", _take(OPTIMIZER, "z2/global_step3"), "another ZeRO stage"),
    ("z1", _take(OPTIMIZER, "z1_w4/global_step3"), "4, 4. ranks"),
    ("z1", _take(OPTIMIZER.replace("_1_", "_3_"), "z1_w4/global_step3"), "another save"),
    ("z1", _take(f"bf16_{OPTIMIZER}", "z1_bf16/global_step3"), "not there"),
    ("z3", _take(MODEL, "z3_bf16_w3/global_step3"), "is 3, and 2"),
    ("z1", _cut_short, "zip"),
    ("z1", _made("layer_00-model_states.pt"), "pipelines"),
    ("z1", _made("layer_0_expert_1_mp_rank_00_model_states.pt"), "experts"),
]


@pytest.mark.parametrize(("name", "damage", "why"), FOREIGN)
def test_files_that_are_not_of_one_save_are_refused(
    deepspeed_saves: Path, tmp_path: Path, name: str, damage: Callable[..., Any], why: str
) -> None:
    at = copied(deepspeed_saves / name, tmp_path)
    damage(at, deepspeed_saves)
    with pytest.raises((Corrupt, Misuse), match=why):
        deepspeed.open(at)


def test_a_link_that_leads_out_is_followed_when_asked(
    deepspeed_saves: Path, tmp_path: Path
) -> None:
    at = copied(deepspeed_saves / "z1", tmp_path)
    (at / OPTIMIZER).rename(tmp_path / OPTIMIZER)
    (at / OPTIMIZER).symlink_to(tmp_path / OPTIMIZER)
    with pytest.raises(Corrupt, match="leads out"):
        deepspeed.open(at)
    assert deepspeed.open(at, follow=True).contents.step == 3


def test_one_is_found(deepspeed_saves: Path, tmp_path: Path) -> None:
    at = deepspeed_saves / "z1"
    assert deepspeed.find(at) == deepspeed.find(at / "global_step3") == at / "global_step3"
    both = Path(shutil.copytree(at, tmp_path / "both"))
    (both / "latest").unlink()
    assert deepspeed.find(both) == both / "global_step6"
    for tag in ("../both/global_step3", "global_step9", "\0", ""):
        (both / "latest").write_text(tag)
        assert deepspeed.find(both) is None
    assert deepspeed.find(tmp_path) is deepspeed.find(tmp_path / "nothing") is None


def test_weights_of_another_step_are_told(deepspeed_saves: Path, tmp_path: Path) -> None:
    at = copied(deepspeed_saves / "z1_bf16", tmp_path)
    _take("mp_rank_00_model_states.pt", "z1_bf16/global_step6")(at, deepspeed_saves)
    told = list(deepspeed.disagreements(deepspeed.open(at)))
    assert any(line.startswith("param/embed.weight: ") for line in told)
    assert all("are others in the module's weights" in line for line in told)

    def other(root: Any) -> None:
        root["module"]["embed.weight"] = root["module"]["fixed.weight"]

    rewritten(at / "mp_rank_00_model_states.pt", other)
    told = list(deepspeed.disagreements(deepspeed.open(at)))
    assert "param/embed.weight (61, 32) is (32, 32) in the module's weights" in told


def test_stage_0_is_refused(deepspeed_saves: Path) -> None:
    """Its optimizer's states have numbers, and whose they are depends on the program."""
    with pytest.raises(Misuse, match="stage 0, which does not say"):
        deepspeed.open(deepspeed_saves / "z0" / "global_step3")


def test_what_is_frozen_may_be_tied(deepspeed_saves: Path, tmp_path: Path) -> None:
    at = copied(deepspeed_saves / "z1", tmp_path)

    def tie(root: Any) -> None:
        root["shared_params"]["again.weight"] = "fixed.weight"
        root["module"]["again.weight"] = root["module"]["fixed.weight"]

    rewritten(at / WHOLE, tie)
    contents = deepspeed.open(at).contents
    assert contents.aliases == {"head.weight": "embed.weight", "again.weight": "fixed.weight"}
    assert "frozen/fixed.weight" in contents.by_key


# ---- hostile files


def rewritten(file: Path, change: Callable[[Any], None]) -> None:
    """A file of torch.save with another pickle and the same storages."""
    folder = Folder(file.parent)
    value = torch_zip.read(folder, file.name)
    change(value)
    stored = {ref.key: ref for ref in _tensors(value)}

    def fill(ref: TensorRef) -> Callable[[int, int], np.ndarray]:
        offset = ref.offset - ref.start * dtype_of(ref.dtype).itemsize
        whole = replace(ref, shape=(ref.extent,), strides=(1,), start=0, offset=offset)
        return lambda start, stop: torch_zip.values(folder, whole)[start:stop]

    torch_zip.write(file.with_suffix(".new"), value, {key: fill(r) for key, r in stored.items()})
    folder.close()
    file.with_suffix(".new").replace(file)


def _tensors(value: Any) -> Iterator[TensorRef]:
    if isinstance(value, TensorRef):
        yield value
    children = [*value.values()] if isinstance(value, dict) else value
    if isinstance(value, Opaque):
        children = [*value.args, value.state]
    for child in children if isinstance(children, list | tuple) else ():
        yield from _tensors(child)


STATE, WHOLE = "optimizer_state_dict", "mp_rank_00_model_states.pt"
LIES: list[tuple[str, str, Any, str]] = [
    ("z1", f"{OPTIMIZER}/{STATE}/partition_count", [3, 3], "3, 3. ranks"),
    ("z1", f"{OPTIMIZER}/{STATE}/group_paddings", [0, 0], "with 0 of padding"),
    ("z1", f"{OPTIMIZER}/{STATE}/base_optimizer_state", [], "elastic"),
    ("z1", f"{OPTIMIZER}/{STATE}/base_optimizer_state/state/0/step", 4, "step is 4"),
    ("z1", f"{OPTIMIZER}/{STATE}/base_optimizer_state/state/1", {}, "its state"),
    ("z1", f"{OPTIMIZER}/{STATE}/base_optimizer_state/param_groups/1/lr", 1, "those of rank 0"),
    ("z1_aligned", f"{FIRST}/{STATE}/param_alignment_paddings/0/0", -4, "paddings"),
    ("z1", f"{WHOLE}/param_shapes/0/embed.weight", Size([62, 32]), "length"),
    ("z1", f"{WHOLE}/param_shapes/0/embed.weight", Size([2**62, 2**62]), "length"),
    ("z1", f"{WHOLE}/param_shapes/0/embed.weight", Size([-61, 32]), "as the shape"),
    ("z1", f"{WHOLE}/dp_world_size", 10**15, "not there"),
    ("z1", f"{WHOLE}/dp_world_size", 0, "0 x 1"),
    ("z1", f"{WHOLE}/mp_world_size", 2, "mp_rank_01.*not there"),
    ("z1", f"{WHOLE}/shared_params/head.weight", "nobody", "tied to nobody"),
    ("z3", f"{OPTIMIZER}/{STATE}/{STATE}/param_groups/0/params", [7], "rank 0"),
    ("z3", f"{MODEL}/frozen_param_shapes/fixed.weight", Size([31, 32]), "not of one save"),
    ("z3", f"{MODEL}/frozen_param_fragments/fixed.weight", None, "no fixed.weight"),
    ("z3", f"{MODEL}/param_shapes", None, "not of one save"),
]


@pytest.mark.parametrize(("name", "place", "value", "why"), LIES)
def test_lies_are_refused(
    deepspeed_saves: Path, tmp_path: Path, name: str, place: str, value: Any, why: str
) -> None:
    at = copied(deepspeed_saves / name, tmp_path)
    file, *path, last = [int(key) if key.isdigit() else key for key in place.split("/")]

    def change(root: Any) -> None:
        for key in path:
            root = root[key]
        root[last] = value

    rewritten(at / str(file), change)
    with pytest.raises((Corrupt, Misuse), match=why):
        deepspeed.open(at)


JUNK = [
    None, True, -1, 0, 3, 2**62, 1.5, float("nan"), "x", b"x", [], {}, (), [[]], {"x": {}},
    {0: None}, Size([2**40, 2**40]), Size([0]), Opaque("torch.device", (1,), {"a": 1}),
]  # fmt: skip


def _slots(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in nested dicts and lists."""
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _slots(value[key])


@pytest.mark.parametrize("name", ["z1", "z3_sub_groups", "z1_bf16_optimizer"])
def test_junk_anywhere_is_refused_or_harmless(
    deepspeed_saves: Path, tmp_path: Path, name: str
) -> None:
    """Each file, one value of its pickle replaced by another: no other error than ours."""
    dice, at = random.Random(name), copied(deepspeed_saves / name, tmp_path)
    refused = 0
    for file in sorted(at.glob("*.pt")) * (40 // len(list(at.glob("*.pt")))):
        before = file.read_bytes()
        told = ""

        def change(root: Any) -> None:
            nonlocal told
            slots = [s for s in _slots(root) if s[1] != "ds_config"]
            container, key = dice.choice(slots)
            container[key] = dice.choice(JUNK)
            told = f"{key}: {container[key]!r}"

        rewritten(file, change)
        try:
            source = deepspeed.open(at)
            assert sum(array.numel for array in source.contents.arrays) < 10**6
            arrays(source)
            source.close()
        except OutlastError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"{file.name}: {told}") from error
        file.write_bytes(before)
    assert refused > 5


@pytest.mark.parametrize("name", ["z1", "z3"])
def test_a_flipped_bit_is_refused_or_harmless(
    deepspeed_saves: Path, tmp_path: Path, name: str
) -> None:
    dice, at = random.Random(name), copied(deepspeed_saves / name, tmp_path)
    truth, refused = runs.truth(deepspeed_saves / name), 0
    files = sorted(at.glob("*.pt"))
    for _ in range(60):
        file = dice.choice(files)
        before = file.read_bytes()
        after = bytearray(before)
        after[dice.randrange(len(after))] ^= 1 << dice.randrange(8)
        file.write_bytes(after)
        try:
            source = deepspeed.open(at)
            assert differing(arrays(source), truth) == []
            source.close()
        except OutlastError:
            refused += 1
        file.write_bytes(before)
    assert refused > 30
