"""Slices of tensor-parallel ranks: put together as DeepSpeed's own converter does it."""

import os
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from outlast.checkpoint.formats.patterns import Merge, Part, Patterns, placed
from outlast.cluster.errors import Corrupt
from outlast.layout.run import Run

os.environ.setdefault("DS_ACCELERATOR", "cpu")
NAME = "h.0.weight"
SIZES = st.integers(1, 5)


def assembled(merge: Merge, slices: list[np.ndarray]) -> np.ndarray:
    """Every copy that the parts describe, the mean of them or the first."""
    copies = []
    for parts in merge.copies:
        out = np.full(int(np.prod(merge.shape)), np.nan, dtype=slices[0].dtype)
        for part in parts:
            values = slices[part.rank].reshape(-1)[part.start : part.start + part.run.numel]
            at = 0
            for start, stop in part.run.intervals():
                out[start:stop] = values[at : at + stop - start]
                at += stop - start
        copies.append(out)
    if merge.averaged:
        return (sum(copies) / len(copies)).astype(np.float32).reshape(merge.shape)
    assert all(np.array_equal(copy, copies[0]) for copy in copies)
    return copies[0].reshape(merge.shape)


@st.composite
def cases(draw: Any) -> tuple[dict[str, Any], list[tuple[int, ...]], bool]:
    """(universal_checkpoint_info, shapes of the slices, whether they are equal)."""
    ranks = draw(st.integers(1, 3))
    kind = draw(
        st.sampled_from(["", "row", "same", "mean", "halves", "subs", "count", "vocabulary"])
    )
    shape = [draw(SIZES), draw(SIZES)]
    info: dict[str, Any] = {"universal_checkpoint_version": 0.4}
    if kind == "row":
        info["parameter_with_row_parallelism_patterns"] = [r"h\.\d+\.weight"]
        return info, [(shape[0], draw(SIZES)) for _ in range(ranks)], False
    if kind in ("same", "mean"):
        key = (
            "tp_replicated_parameter_patterns"
            if kind == "same"
            else "parameter_to_average_patterns"
        )
        info[key] = [f"^{NAME}$"]
        return info, [tuple(shape)] * ranks, kind == "same"
    if kind == "halves":
        info["parameter_with_2_sub_params_cat_dim_0"] = ["h"]
        return info, [(draw(st.integers(2, 6)), shape[1]) for _ in range(ranks)], False
    if kind in ("subs", "count"):
        axis = draw(st.integers(0, 1))
        widths = draw(st.lists(st.lists(st.integers(0, 3), min_size=ranks, max_size=ranks),
                               min_size=1, max_size=3))  # fmt: skip
        if kind == "count" or not any(map(any, widths)):
            widths = [[shape[axis]] * ranks] * draw(st.integers(1, 3))
            info["universal_checkpoint_version"] = draw(st.sampled_from([0.2, 0.4]))
        counted = info["universal_checkpoint_version"] < 0.4 and draw(st.booleans())
        declared: list[Any] = [-1, -1]
        declared[axis] = len(widths) if counted else tuple(map(sum, widths))
        declared[1 - axis] = draw(st.sampled_from([-1, shape[1 - axis]]))
        info["parameter_with_sub_params"] = [
            {"patterns": ["other", NAME], "shape": tuple(declared), "partition_dim": axis}
        ]
        info["sub_param_shard_widths"] = {NAME: widths}
        slices = []
        for row in zip(*widths, strict=True):
            own = list(shape)
            own[axis] = sum(row)
            slices.append(tuple(own))
        return info, slices, False
    if kind == "vocabulary":
        info["vocabulary_parameter_patterns"] = [".*weight"]
        info["original_vocab_size"] = draw(st.integers(1, 12))
    return info, [(draw(SIZES), shape[1]) for _ in range(ranks)], False


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases(), seed=st.integers(0, 9))
@example(case=({"tp_replicated_parameter_patterns": ["nobody"]}, [(2, 2), (2, 2)], False), seed=0)
def test_slices_are_put_together_as_deepspeed_does_it(
    tmp_path_factory: pytest.TempPathFactory,
    case: tuple[dict[str, Any], list[tuple[int, ...]], bool],
    seed: int,
) -> None:
    from deepspeed.checkpoint.ds_to_universal import merge_tp_slices
    from deepspeed.checkpoint.universal_checkpoint import SubparamShape

    info, shapes, same = case
    numbers = np.random.default_rng(seed)
    slices = [numbers.standard_normal(shape).astype(np.float32) for shape in shapes]
    if same:
        slices = [slices[0]] * len(slices)
    directory = tmp_path_factory.mktemp("merge")
    for rank, each in enumerate(slices):
        flat = torch.from_numpy(each.reshape(-1))
        (directory / "in" / NAME / str(rank)).mkdir(parents=True)
        for state in ("fp32", "exp_avg", "exp_avg_sq"):
            torch.save(flat, directory / "in" / NAME / str(rank) / f"{state}.00")
    sizes = [torch.Size(shape) for shape in shapes]
    unused = merge_tp_slices(
        info, str(directory / "out"), str(directory / "in"), len(shapes), (NAME, sizes)
    )
    with torch.serialization.safe_globals([SubparamShape]):
        theirs = torch.load(directory / "out" / NAME / "fp32.pt", weights_only=True)

    patterns = Patterns(info)
    merge = patterns.merge(NAME, shapes)
    assert np.array_equal(assembled(merge, slices), theirs.pop("param").numpy())
    assert merge.shape == tuple(patterns.stripped(NAME, merge.shape))
    assert patterns.unused == unused
    if sub := theirs.pop("sub_param_shape", None):
        ours = merge.tags.pop("sub_param_shape")
        assert list(ours["shape"]) == list(sub.shape)
        assert (ours["partition_dim"], ours["patterns"]) == (sub.partition_dim, sub.patterns)
    assert merge.tags == theirs


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_affine_maps_are_followed_as_deepspeed_does_it(data: Any) -> None:
    from deepspeed.checkpoint import affine

    ranks, shape = data.draw(st.integers(1, 3)), (data.draw(SIZES), data.draw(SIZES))
    axis = data.draw(st.integers(0, 1))
    widths = [data.draw(st.lists(st.integers(0, 3), min_size=ranks, max_size=ranks)) for _ in "qkv"]
    kind = data.draw(st.sampled_from(["replicated", "split", "subs", "segments"]))
    whole = list(shape)
    if kind == "replicated":
        mapping = affine.replicated_map(shape, ranks)
    elif kind == "split":
        whole[axis] = sum(widths[0])
        mapping = affine.contiguous_split_map(tuple(whole), widths[0], axis)
    elif kind == "subs":
        whole[axis] = sum(map(sum, widths))
        mapping = affine.sub_param_map(tuple(whole), list(map(sum, widths)), widths, axis)
    else:
        whole[axis] = sum(widths[0]) + 2
        mapping = affine.segmented_map(
            tuple(whole), [(sum(widths[0]), False), (2, True)], axis, ranks, [widths[0]]
        )
    full = torch.randn(mapping.logical_shape)
    slices = [mapping.extract(full, rank).numpy() for rank in range(ranks)]
    info = {"affine_map": {"version": 1, "params": {NAME: mapping.to_dict()}}}
    merge = Patterns(info).merge(NAME, [each.shape for each in slices])
    assert np.array_equal(assembled(merge, slices), full.numpy())


@given(
    parts=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=4),
    data=st.data(),
)
def test_any_interval_of_a_slice_is_placed_like_its_elements(
    parts: list[tuple[int, int]], data: Any
) -> None:
    given_parts, start, begin = [], 0, 0
    for length, count in parts:
        given_parts.append(Part(0, start, Run(begin, length, length + 1, count)))
        start, begin = start + length * count, begin + (length + 1) * count
    first = data.draw(st.integers(0, start))
    last = data.draw(st.integers(first, start))
    addresses = [
        a for part in given_parts for low, high in part.run.intervals() for a in range(low, high)
    ]
    found = {
        at + index: address
        for at, run in placed(given_parts, 0, first, last)
        for index, address in enumerate(
            a for low, high in run.intervals() for a in range(low, high)
        )
    }
    assert found == {index: addresses[index] for index in range(first, last)}


@pytest.mark.parametrize(
    ("info", "shapes", "message"),
    [
        ({"tp_replicated_parameter_patterns": ["h", "h.*"]}, [(2,)], "several"),
        ({"tp_replicated_parameter_patterns": ["h"]}, [(2,), (3,)], "differ"),
        ({"parameter_with_row_parallelism_patterns": ["h"]}, [(2,), (3,)], "does not fit"),
        ({"parameter_with_2_sub_params_cat_dim_0": ["h"]}, [(1, 2)], "second half"),
        ({"vocabulary_parameter_patterns": ["h"]}, [(1, 2)], "original_vocab_size"),
        ({"tp_replicated_parameter_patterns": ["("]}, [(1,)], "no pattern"),
        ({"tp_replicated_parameter_patterns": ["(a|b)*c"]}, [(1,)], "for ever"),
        ({"tp_replicated_parameter_patterns": [".*.*.*.*x"]}, [(1,)], "for ever"),
        ({"tp_replicated_parameter_patterns": [7]}, [(1,)], "not understood"),
        ({"parameter_with_sub_params": 7}, [(1,)], "not understood"),
        ({"affine_map": {"version": 2, "params": {}}}, [(1,)], "newer"),
        ({"affine_map": {"version": 1, "params": {"h": {}}}}, [(1,)], "does not fit"),
        ({"autotp_unsupported_parameter_patterns": {"h": "fused"}}, [(1,)], "fused"),
        (
            {
                "universal_checkpoint_version": 0.4,
                "parameter_with_sub_params": [
                    {"patterns": ["h"], "shape": [(2, 2), 3], "partition_dim": 0}
                ],
            },
            [(4, 3)],
            "sub_param_shard_widths",
        ),
        (
            {
                "parameter_with_sub_params": [
                    {"patterns": ["h"], "shape": [10**12, 3], "partition_dim": 0}
                ]
            },
            [(10**12, 3)],
            "even parts",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    info: dict[str, Any], shapes: list[tuple[int, ...]], message: str
) -> None:
    with pytest.raises(Corrupt, match=message):
        Patterns(info).merge(NAME, shapes)


def test_a_scaled_piece_is_refused() -> None:
    from deepspeed.checkpoint import affine

    info = {"affine_map": {"params": {NAME: affine.replicated_map((2,), 2, scale=0.5).to_dict()}}}
    with pytest.raises(Corrupt, match="scaled"):
        Patterns(info).merge(NAME, [(2,), (2,)])
