"""DeepSpeed's own universal checkpoints: of all its stages, and of tensor-parallel ranks."""

import os
import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import deepspeed_runs as runs
import numpy as np
import pytest
import tensor_parallel_runs
from held import held
from test_deepspeed_write import digests, same, written

from outlast.checkpoint.contents import UNTRAINED
from outlast.checkpoint.formats import deepspeed, deepspeed_write, universal
from outlast.checkpoint.items import Wanted
from outlast.cluster.errors import Corrupt, Misuse

os.environ.setdefault("DS_ACCELERATOR", "cpu")
STARTS = ["z1", "z1_bf16_optimizer", "z2_bf16_w3", "z3", "z3_bf16_w3"]


def converted(folder: Path, into: Path) -> Path:
    """A checkpoint of DeepSpeed in its universal format, by its own converter."""
    from deepspeed.checkpoint.ds_to_universal import main

    main(Namespace(
        input_folder=str(deepspeed.find(folder)), output_folder=str(into), num_extract_workers=1,
        num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=False,
    ))  # fmt: skip
    return into


@pytest.mark.parametrize("start", STARTS)
def test_what_deepspeed_converted_is_read(
    deepspeed_saves: Path, tmp_path: Path, start: str
) -> None:
    native = deepspeed.open(deepspeed.find(deepspeed_saves / start))
    place = converted(deepspeed_saves / start, tmp_path / "of" / "global_step3_universal")
    assert universal.find(tmp_path / "of") == place
    assert deepspeed.find(place) is None
    source, truth = universal.open(place), runs.truth(deepspeed_saves / start)
    assert digests(source) == digests(native)
    for array in source.contents.arrays:
        values = source.read(array, 0, array.numel)
        expected = truth[array.key]
        assert same(np.asarray(values, expected.dtype).reshape(array.shape), expected)
    for name in ("step", "groups", "aliases", "dtype"):
        assert getattr(source.contents, name) == getattr(native.contents, name), name
    for key in ("client_state", "lr_scheduler", "global_samples"):
        assert source.contents.facts[key] == native.contents.facts[key]


@pytest.fixture(scope="module")
def parallel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `tensor_parallel_runs`: z1 and z3."""
    directory = tmp_path_factory.mktemp("parallel")
    tensor_parallel_runs.save(directory, [1, 3])
    return directory


@pytest.mark.parametrize("stage", [1, 3])
def test_slices_of_tensor_ranks_are_put_together(parallel: Path, stage: int) -> None:
    native = deepspeed.open(deepspeed.find(parallel / f"z{stage}"))
    place = converted(parallel / f"z{stage}", parallel / f"z{stage}_universal")
    theirs = universal.open(place)
    expected = digests(theirs)
    assert {array.role for array in native.contents.arrays} >= {"param", "exp_avg", "exp_avg_sq"}
    assert digests(native) == expected
    assert theirs.contents.left_out == native.contents.left_out == ()
    assert theirs.contents.by_key["param/blocks.0.wide.weight"].shape == (27, 16)
    assert theirs.contents.groups == native.contents.groups
    # What is written for one tensor-parallel rank still tells DeepSpeed's converter what is what.
    written(native, parallel / f"one{stage}", deepspeed_write, ranks=2, stage=1)
    again = universal.open(converted(parallel / f"one{stage}", parallel / f"one{stage}_universal"))
    assert digests(again) == expected


@pytest.mark.long
def test_deepspeed_cuts_what_is_written_here_for_its_tensor_ranks(parallel: Path) -> None:
    expected = {}
    for stage in (1, 3):
        source = deepspeed.open(deepspeed.find(parallel / f"z{stage}"))
        written(source, parallel / f"u{stage}", universal)
        expected[stage] = digests(source)
    tensor_parallel_runs.resume(parallel, [1, 3])
    for stage in (1, 3):
        found = digests(deepspeed.open(deepspeed.find(parallel / f"v{stage}")))
        trained = [key for key in found if key.split("/")[0] not in UNTRAINED]
        assert {k: found[k] for k in trained} == {k: expected[stage][k] for k in trained}


def test_what_contradicts_itself_is_refused(tmp_path: Path) -> None:
    place = written(held(), tmp_path, universal)
    step = place / "zero" / "scale" / "step.pt"
    kept = step.read_bytes()
    other = written(held(groups=tuple(
        type(group)(group.names, group.hyper, {"step": 8.0}) for group in held().contents.groups
    )), tmp_path / "other", universal)  # fmt: skip
    step.write_bytes((other / "zero" / "scale" / "step.pt").read_bytes())
    with pytest.raises(Corrupt, match="different steps"):
        universal.open(place)
    step.write_bytes(kept)
    lost = step.with_name("fp32.pt").rename(step.with_name("fp32"))
    with pytest.raises(Corrupt, match=r"fp32\.pt"):
        universal.open(place)
    lost.rename(step.with_name("fp32.pt"))
    shutil.copy(step, step.with_name("buffer.pt"))
    with pytest.raises(Corrupt, match="no states"):
        universal.open(place)
    step.with_name("buffer.pt").unlink()
    model = deepspeed_write.Model(held(), 2, 1)
    common = model.common() | {"param_groups": model.hyper()[:1]}
    deepspeed_write.item(held(), place, "zero/optimizer_state.pt", lambda tensors: common).make(
        lambda size: None
    )
    with pytest.raises(Corrupt, match="none of the parameter groups"):
        universal.open(place)
    (tmp_path / universal.LATEST).write_text("../" + place.name)
    assert universal.find(tmp_path) is None


@pytest.mark.parametrize("name", ["a\0b", "x" * 256, "../x", "a/b", ".", ""])
def test_a_name_that_is_no_directory_is_refused(tmp_path: Path, name: str) -> None:
    place, source = written(held(), tmp_path, universal), held()
    contents = source.contents
    renamed = held(
        arrays=tuple(replace(a, name=name) if a.name == "scale" else a for a in contents.arrays),
        groups=tuple(
            replace(g, names=tuple(name if n == "scale" else n for n in g.names))
            for g in contents.groups
        ),
    )
    with pytest.raises(Misuse, match="directory"):
        universal.plan(renamed, place, Wanted())
    model = deepspeed_write.Model(renamed, 2, 1)
    file = "mp_rank_00_model_states.pt"
    deepspeed_write.item(renamed, place, file, model.whole).make(lambda size: None)
    with pytest.raises(Corrupt, match="as the name"):
        universal.open(place)


@pytest.mark.parametrize("seed", range(40))
def test_a_flipped_bit_is_found_or_means_nothing(tmp_path: Path, seed: int) -> None:
    source, random = held(), np.random.default_rng(seed)
    place = written(source, tmp_path, universal)
    files = sorted(place.rglob("*.pt"))
    for _ in range(3):
        file = files[random.integers(len(files))]
        data = bytearray(file.read_bytes())
        data[random.integers(len(data))] ^= 1 << random.integers(8)
        file.write_bytes(data)
    try:
        found = universal.open(place)
        assert found.contents.groups == source.contents.groups
        assert digests(found) == digests(source)
    except (Corrupt, Misuse):
        pass
