"""What is written for DeepSpeed, native and universal: DeepSpeed itself loads it and trains on."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import deepspeed_runs as runs
import numpy as np
import pytest
from held import held
from hypothesis import given, settings
from hypothesis import strategies as st

from outlast.checkpoint.contents import UNTRAINED, Array, Group
from outlast.checkpoint.formats import deepspeed, deepspeed_write, universal
from outlast.checkpoint.items import Wanted
from outlast.checkpoint.source import Source, digest
from outlast.cluster.errors import Misuse


def written(source: Source, into: Path, form: ModuleType, **wanted: Any) -> Path:
    """All items made, in the order that a user of one thread sees; the checkpoint."""
    place = into / form.name_of(source.contents)
    place.mkdir(parents=True)
    items = form.plan(source, place, Wanted(**wanted))
    assert len({item.name for item in items}) == len(items)
    for item in items:
        told: list[int] = []
        item.make(told.append)
        assert sum(told) == item.size
    (into / form.LATEST).write_text(place.name)
    return place


def digests(source: Source) -> dict[str, str]:
    return {array.key: digest(source, array) for array in source.contents.arrays}


@dataclass(frozen=True, kw_only=True)
class Load:
    """A checkpoint of DeepSpeed, converted, and the engine that loads it.

    Args:
        zero: its configuration, where it is another than that of the run.
    """

    start: str
    stage: int
    world: int
    universal: bool = False
    zero: dict[str, Any] = field(default_factory=dict)

    @property
    def case(self) -> runs.Case:
        case = runs.CASES[self.start]
        zero = {**case.zero, **self.zero}
        return replace(case, name=str(self), stage=self.stage, world=self.world, zero=zero)

    def __str__(self) -> str:
        form = "universal" if self.universal else "native"
        return f"{self.start}-{form}-z{self.stage}-w{self.world}"


LOADS = [
    Load(start="z1", stage=1, world=2),
    Load(start="z1", stage=3, world=2),
    Load(start="z3_sub_groups", stage=3, world=2, zero={"sub_group_size": 900}),
    Load(start="z1_bf16_optimizer", stage=1, world=2),
    Load(start="z2_round_robin", stage=2, world=3),
    Load(start="z3_bf16_w3", stage=1, world=2),
    Load(start="z1", stage=3, world=2, universal=True),
    Load(start="z3", stage=2, world=3, universal=True),
]
MORE = [
    Load(start="z3", stage=2, world=2),
    Load(start="z1_aligned", stage=1, world=2),
    Load(start="z1_bf16", stage=3, world=3),
    Load(start="z1_sgd", stage=1, world=3),
    Load(start="z1_w4", stage=2, world=4),
    Load(start="z2_round_robin", stage=1, world=2),
    Load(start="z1", stage=1, world=2, universal=True),
    Load(start="z3_bf16_w3", stage=3, world=2, universal=True),
]


@pytest.fixture(scope="session")
def loaded(
    request: pytest.FixtureRequest, deepspeed_saves: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What every engine had and did, by the name of the load; of those that tests will look at."""
    directory, jobs = tmp_path_factory.mktemp("loaded"), []
    calls = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    loads = {str(call["load"]): call["load"] for call in calls if "load" in call}
    # ZeRO 3 replaces torch's linear function for the rest of the process, which rounds otherwise.
    for name, load in sorted(loads.items(), key=lambda pair: pair[1].stage):
        source = deepspeed.open(deepspeed.find(deepspeed_saves / load.start))
        source.contents.facts["ds_config"]["zero_optimization"].update(load.zero)
        into, form = directory / "of" / name, universal if load.universal else deepspeed_write
        written(source, into, form, ranks=load.world, stage=load.stage)
        jobs.append(runs.resume(load.case, into, directory / name, load.universal))
    runs.run(jobs)
    return directory


@pytest.mark.parametrize(
    "load", [*LOADS, *(pytest.param(load, marks=pytest.mark.long) for load in MORE)], ids=str
)
def test_deepspeed_loads_every_bit_and_trains_on(
    loaded: Path, deepspeed_saves: Path, load: Load
) -> None:
    here, there = loaded / str(load), deepspeed_saves / load.start
    facts, expected = runs.facts(here), runs.facts(there)
    assert "error" not in facts
    arrays, truth = runs.truth(here), runs.truth(there)
    # DeepSpeed does not load what is not trained from its universal format.
    roles = UNTRAINED if load.universal else ()
    assert [
        k for k in truth if k.split("/")[0] not in roles and not same(arrays[k], truth[k])
    ] == []
    assert set(arrays) == set(truth)
    # ... and in ZeRO 3 it takes the hyper-parameters of the first group for all.
    first = [expected["groups"][0]] * len(expected["groups"])
    alike = load.universal and load.stage == 3
    assert facts["groups"] == (first if alike else expected["groups"])
    assert set(facts["step"]) == set(expected["step"])
    assert {k: facts[k] for k in ("global_steps", "lr_scheduler")} == {
        k: expected[k] for k in ("global_steps", "lr_scheduler")
    }
    assert facts["client_state"] == runs.CLIENT
    case = runs.CASES[load.start]
    if load.universal or load.world != case.world:
        return
    # Another stage adds up the gradients of more than two ranks in another order.
    if load.stage == case.stage or (load.world == 2 and not case.bf16):
        assert facts["losses"] == expected["losses"]
        after, before = runs.truth(here, "after"), runs.truth(there, "after")
        assert [key for key in before if not same(after[key], before[key])] == []
    else:
        assert facts["losses"] == pytest.approx(expected["losses"], rel=1e-6)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("start", [name for name, case in runs.CASES.items() if case.stage])
def test_round_trips_are_bitwise(deepspeed_saves: Path, tmp_path: Path, start: str) -> None:
    """To another stage and world, to the universal format, and back."""
    case = runs.CASES[start]
    first = deepspeed.open(deepspeed.find(deepspeed_saves / start))
    expected, told = digests(first), first.contents
    source: Source = first
    for step, (form, ranks, stage) in enumerate([
        (deepspeed_write, 5, 4 - max(case.stage, 1)), (universal, 1, 1), (deepspeed_write, 3, 3),
        (deepspeed_write, case.world, case.stage),
    ]):  # fmt: skip
        place = written(source, tmp_path / str(step), form, ranks=ranks, stage=stage)
        source.close()
        reader = universal if form is universal else deepspeed
        assert reader.find(place.parent) == reader.find(place) == place
        source = reader.open(place)
        assert digests(source) == expected
        found = source.contents
        assert {a.key: a for a in found.arrays} == told.by_key
        for name in ("step", "groups", "aliases", "dtype", "left_out"):
            assert getattr(found, name) == getattr(told, name), name
        for key in set(told.facts) - {"ds_config", "source"}:
            assert found.facts[key] == told.facts[key], key


def test_planted_bugs_are_seen(
    deepspeed_saves: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of the flat buffer, and where in it a shard starts."""
    source = deepspeed.open(deepspeed.find(deepspeed_saves / "z2_round_robin"))
    with monkeypatch.context() as bug:
        bug.setattr(deepspeed_write, "round_robin", lambda count, ranks: [*range(count)])
        place = written(source, tmp_path / "order", deepspeed_write, ranks=2, stage=2)
    assert deepspeed.open(place).contents.groups != source.contents.groups
    shard = deepspeed_write.Tensors.shard
    with monkeypatch.context() as bug:
        bug.setattr(deepspeed_write.Tensors, "shard", lambda tensors, role, cut, rank, *more: shard(
            tensors, role, cut, 0, *more))  # fmt: skip
        place = written(source, tmp_path / "shard", deepspeed_write, ranks=2, stage=3)
    assert digests(deepspeed.open(place)) != digests(source)


@pytest.mark.parametrize("form", [deepspeed_write, universal])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_contents_of_any_source_come_back(
    tmp_path: Path, form: ModuleType, stage: int, dtype: str
) -> None:
    source = held(dtype)
    place = written(source, tmp_path, form, ranks=3, stage=stage)
    found = (universal if form is universal else deepspeed).open(place)
    assert digests(found) == digests(source)
    for name in ("step", "groups", "aliases", "dtype"):
        assert getattr(found.contents, name) == getattr(source.contents, name), name
    for key, value in source.contents.facts.items():
        assert found.contents.facts[key] == value


def test_what_zero_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Misuse, match="no groups of parameters"):
        deepspeed_write.plan(held(groups=()), tmp_path, Wanted())
    with pytest.raises(Misuse, match="stage 0"):
        deepspeed_write.plan(held(), tmp_path, Wanted(stage=0))
    with pytest.raises(Misuse, match="--ranks"):
        deepspeed_write.plan(held(), tmp_path, Wanted(ranks=0))
    source = held()
    arrays = [replace(a, name=a.name.replace("wte", "../wte")) for a in source.contents.arrays]
    groups = [replace(g, names=tuple(n.replace("wte", "../wte") for n in g.names))
              for g in source.contents.groups]  # fmt: skip
    with pytest.raises(Misuse, match="directory"):
        universal.plan(
            held(arrays=tuple(arrays), groups=tuple(groups), aliases={}), tmp_path, Wanted()
        )


def test_a_vocabulary_is_stripped_and_pieces_are_named(tmp_path: Path) -> None:
    """What DeepSpeed needs to cut the whole again for tensor-parallel ranks is in the files."""
    import torch
    from deepspeed.checkpoint.universal_checkpoint import SubparamShape

    info = {
        "universal_checkpoint_version": 0.4,
        "vocabulary_parameter_patterns": ["wte"], "original_vocab_size": 29,
        "parameter_with_row_parallelism_patterns": [r"blocks\.0\.weight"],
        "parameter_with_sub_params": [
            {"patterns": [r"blocks\.1\.weight"], "shape": [8, [8, 16]], "partition_dim": 1}
        ],
    }  # fmt: skip
    source = held(facts={"universal_checkpoint_info": info})
    place = written(source, tmp_path, universal)

    def body(name: str) -> dict[str, Any]:
        with torch.serialization.safe_globals([SubparamShape]):
            return torch.load(place / "zero" / name / "exp_avg.pt", weights_only=True)

    wte = body("wte.weight")
    expected = source.values["exp_avg/wte.weight"][:29]
    assert same(wte.pop("param").numpy(), expected)
    assert wte == {"cat_dim": 0, "vocab_tensor": True}
    assert body("blocks.0.weight")["cat_dim"] == 1
    shape = body("blocks.1.weight")["sub_param_shape"]
    assert (shape.shape, shape.partition_dim) == ((8, (8, 16)), 1)
    found = universal.open(place).contents
    assert found.by_key["param/wte.weight"].shape == (29, 8)
    assert any("wte.weight" in note and "padding" in note for note in found.left_out)
    array = Array("param", "wte.weight", (31, 8), "float32")
    assert universal.stored(array, source.contents, Wanted()).shape == (29, 8)


SHAPES = st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=6)
SHAPES = SHAPES.filter(lambda shapes: any(0 not in shape for shape in shapes))


@settings(max_examples=40, deadline=None)
@given(shapes=SHAPES, ranks=st.integers(1, 7), stage=st.integers(1, 3), data=st.data())
def test_any_shapes_come_back(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: list[tuple[int, ...]],
    ranks: int,
    stage: int,
    data: Any,
) -> None:
    """More ranks than elements, scalars, sub-groups of any size, groups of nothing."""
    names = [f"p{index}" for index in range(len(shapes))]
    roles = ("param", "exp_avg")
    arrays = [Array(r, n, s, "float32") for r in roles for n, s in zip(names, shapes, strict=True)]
    arrays = [a for a in arrays if a.role == "param" or a.numel]
    cut = data.draw(st.integers(0, len(names)))
    groups = [Group(tuple(part), {"lr": 0.1}, {"step": 2.0}) for part in (names[:cut], names[cut:])]
    zero = {"sub_group_size": data.draw(st.integers(1, 9)), "round_robin_gradients": True}
    source = held(
        arrays=tuple(arrays), groups=tuple(groups), aliases={},
        facts={"ds_config": {"zero_optimization": zero}},
    )  # fmt: skip
    form = data.draw(st.sampled_from([deepspeed_write, universal]))
    place = written(source, tmp_path_factory.mktemp("any"), form, ranks=ranks, stage=stage)
    found = (universal if form is universal else deepspeed).open(place)
    # What has no elements is not trained, says DeepSpeed.
    full = {array.key for array in arrays if array.numel}
    assert {k: v for k, v in digests(found).items() if k in full} == {
        k: v for k, v in digests(source).items() if k in full
    }
    assert {array.name: array.shape for array in found.contents.arrays} == dict(
        zip(names, shapes, strict=True)
    )
    kept = [tuple(n for n in g.names if f"param/{n}" in full) for g in groups]
    assert [group.names for group in found.contents.groups] == [names for names in kept if names]
