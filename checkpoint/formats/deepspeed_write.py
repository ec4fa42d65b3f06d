"""Writing what DeepSpeed itself loads: ZeRO 1, 2 or 3 for any number of ranks.

Every file is a pickle and the storages of its tensors; the pickle is made at once, the storages are
filled from the source while they are written. Source of keys and shapes: `state_dict` and
`load_state_dict` of stage_1_and_2.py and stage3.py, `_common_checkpoint_state` of engine.py. Left
out on purpose is `param_alignment_paddings`: without it, DeepSpeed makes its own from the shards.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import isfinite, prod
from pathlib import Path
from typing import Any

import numpy as np

from outlast.checkpoint.contents import BUFFER, FROZEN, PARAM, UNTRAINED, Array, Contents, Group
from outlast.checkpoint.dtypes import Values, cast, dtype_of
from outlast.checkpoint.formats.deepspeed_layout import (
    Flat,
    Split,
    flat,
    round_robin,
    split,
    sub_groups,
)  # fmt: skip
from outlast.checkpoint.formats.pickles import Opaque, Size, Symbol, TensorRef
from outlast.checkpoint.formats.plain import from_json
from outlast.checkpoint.formats.torch_zip import Fill, write
from outlast.checkpoint.items import Item, Wanted
from outlast.checkpoint.source import Source, Tick
from outlast.cluster.errors import Corrupt, Misuse

LATEST = "latest"
MASTER = "float32"  # dtype of masters and optimizer state
VERSION = "0.19.8"  # of DeepSpeed, whose files these are
_SCALERS = "deepspeed.runtime.fp16.loss_scaler"

Cut = Flat | Split
State = dict[str, Any]


def name_of(contents: Contents) -> str:
    """The tag."""
    return f"global_step{contents.step}"


def stored(array: Array, contents: Contents, wanted: Wanted) -> Array:
    """What the files hold of an array: all that is trained in float32."""
    return array if array.role in UNTRAINED else replace(array, dtype=MASTER)


def plan(source: Source, directory: Path, wanted: Wanted) -> list[Item]:
    """One item for each file.

    Raises:
        Misuse: the contents are not what ZeRO keeps.
    """
    if wanted.stage not in (1, 2, 3):
        raise Misuse(f"ZeRO stage {wanted.stage} is not written: --stage 1, 2 or 3")
    model = Model(source, wanted.stage, wanted.ranks)
    bf16 = "bf16_" if source.contents.dtype == "bfloat16" else ""
    files: dict[str, Callable[[Tensors], State]] = {}
    for rank in range(wanted.ranks):
        name = f"zero_pp_rank_{rank}_mp_rank_00"
        files[f"{bf16}{name}_optim_states.pt"] = partial(model.optimizer, rank=rank)
        if wanted.stage == 3:
            files[f"{name}_model_states.pt"] = partial(model.partition, rank=rank)
    if wanted.stage < 3:
        files["mp_rank_00_model_states.pt"] = model.whole
    return [item(source, directory, name, build) for name, build in files.items()]


class Tensors:
    """The tensors of one file: references for its pickle, and what fills the storages."""

    def __init__(self, source: Source) -> None:
        self.fills: dict[str, Fill] = {}
        self.size = 0  # bytes of all storages
        self._source = source

    def _new(self, dtype: str, shape: tuple[int, ...], fill: Fill) -> TensorRef:
        ref = TensorRef.of(dtype, shape, str(len(self.fills)))
        self.fills[ref.key] = fill
        self.size += ref.numel * dtype_of(dtype).itemsize
        return ref

    def array(
        self, array: Array, dtype: str | None = None, shape: tuple[int, ...] | None = None
    ) -> TensorRef:
        """A whole array, as `dtype` if it is given; of less rows with a `shape` that has less."""
        dtype = dtype or array.dtype

        def fill(start: int, stop: int) -> Values:
            return cast(self._source.read(array, start, stop), dtype)

        return self._new(dtype, array.shape if shape is None else shape, fill)

    def shard(self, role: str, cut: Cut, rank: int, length: int, dtype: str = MASTER) -> TensorRef:
        """`length` elements of a rank's shard; zeros where it is padding."""
        arrays, shares = self._source.contents.by_key, [*cut.shares(rank)]

        def fill(start: int, stop: int) -> Values:
            out = np.zeros(stop - start, dtype_of(dtype))
            for share in shares:
                array = arrays.get(f"{role}/{share.name}")  # none before its first gradient
                low = max(start - share.offset, 0) + share.start
                high = min(stop - share.offset, share.stop - share.start) + share.start
                if array and low < high:
                    at = share.offset + low - share.start - start
                    values = self._source.read(array, low, high)
                    out[at : at + high - low] = cast(values, dtype)
            return out

        return self._new(dtype, (length,), fill)

    def number(self, value: float, dtype: str = MASTER) -> TensorRef:
        """A tensor without dimensions."""
        return self._new(dtype, (), lambda start, stop: np.full(1, value, dtype_of(dtype)))

    def nothing(self, dtype: str) -> TensorRef:
        """What ZeRO 3 leaves of a parameter that is elsewhere."""
        self.fills[f"no {dtype}"] = lambda start, stop: np.empty(0, dtype_of(dtype))
        return TensorRef.of(dtype, (0,), f"no {dtype}")


def item(source: Source, directory: Path, name: str, build: Callable[[Tensors], Any]) -> Item:
    """The item of the file `name` below a directory, which has what `build` returns."""
    counted = Tensors(source)
    build(counted)

    def make(tick: Tick) -> None:
        tensors = Tensors(source)
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        write(directory / name, build(tensors), tensors.fills, tick)

    return Item(name, counted.size, make)


class Model:
    """What the files of a checkpoint have in common.

    Raises:
        Misuse: there are no parameter groups; hyper-parameters or state are not of torch.
    """

    def __init__(self, source: Source, stage: int, ranks: int) -> None:
        self.contents = contents = source.contents
        self.facts = _dict(from_json(contents.facts))
        self.config = _config(self.facts, contents.dtype, stage)
        self.stage, self.ranks = stage, ranks
        for array in contents.arrays:
            if array.role not in UNTRAINED and "float" not in array.dtype:
                raise Misuse(f"{array.key} is {array.dtype}, which ZeRO does not train")
        if ranks < 1:
            raise Misuse(f"{ranks} ranks cannot load a checkpoint: --ranks 1 or more")
        self.shapes = {array.name: array.shape for array in contents.of(PARAM)}
        zero = self.config["zero_optimization"]
        sizes = {name: prod(shape) for name, shape in self.shapes.items()}
        # Parameters without elements are kept with those that are not trained.
        self.untrained = [
            *contents.of(FROZEN), *(a for a in contents.of(PARAM) if not a.numel),
        ]  # fmt: skip
        self.groups = [
            (replace(group, hyper=_dict(from_json(group.hyper))), names)
            for group in contents.groups
            if (names := [name for name in group.names if sizes[name]])
        ]
        if not self.groups:
            raise Misuse(
                "there are no groups of parameters, which ZeRO's files consist of: convert a "
                "checkpoint that has its optimizer, or to safetensors"
            )
        self.cuts: list[Cut] = []
        self.members: list[list[int]] = []  # of each group: its cuts
        self.order: list[list[str]] = []  # of each cut: its names
        for _, names in self.groups:
            if stage < 3 and zero.get("round_robin_gradients") is True and not self._accumulates():
                names = [names[place] for place in round_robin(len(names), ranks)]
            limit = int(_number(zero.get("sub_group_size"), 1_000_000_000))
            whole = {name: sizes[name] for name in names}
            parts = sub_groups(whole, ranks, limit) if stage == 3 else [whole]
            self.members.append([len(self.cuts) + index for index in range(len(parts))])
            self.cuts += [split(part, ranks) if stage == 3 else flat(part, ranks) for part in parts]
            self.order += [[*part] for part in parts]

    @property
    def clip(self) -> float:
        """Norm that gradients are clipped to, 0 for none."""
        return float(_number(self.config.get("gradient_clipping"), 0.0))

    def _accumulates(self) -> bool:
        """Whether DeepSpeed uses its class BF16_Optimizer, which has no round robin."""
        dtype = _dict(self.config.get("data_types")).get("grad_accum_dtype")
        bf16 = self.contents.dtype == "bfloat16"
        return bf16 and self.stage == 1 and dtype in ("fp32", "float32", "float")

    def optimizer(self, tensors: Tensors, rank: int) -> State:
        """The optimizer's file of a rank."""
        sharded = self._zero3(tensors, rank) if self.stage == 3 else self._zero12(tensors, rank)
        state = {**self.common(), **sharded}
        return {
            "optimizer_state_dict": state, "ds_config": self.config, "ds_version": VERSION,
        }  # fmt: skip

    def common(self) -> State:
        """What every rank's optimizer says alike."""
        scaler: State = {"cur_scale": 1.0, "dynamic": False} | _dict(self.facts.get("loss_scaler"))
        dynamic = scaler.pop("class", "") == "DynamicLossScaler"
        kind = "DynamicLossScaler" if dynamic else "LossScaler"
        scaler |= {"dtype": Symbol("torch.float16")} if dynamic else {}
        return {
            "loss_scaler": Opaque(f"{_SCALERS}.{kind}", (), scaler),
            "dynamic_loss_scale": dynamic,
            "overflow": False,
            "zero_stage": Opaque("deepspeed.runtime.zero.config.ZeroStageEnum", (self.stage,)),
            "ds_version": VERSION,
        }

    def base(self, tensors: Tensors, rank: int) -> State:
        """The state of the optimizer of torch, whose parameters are the shards."""
        state = {}
        for (group, _), members in zip(self.groups, self.members, strict=True):
            for index in members:
                cut = self.cuts[index]
                state[index] = self.scalars(tensors, group) | {
                    role: tensors.shard(role, cut, rank, cut.length)
                    for role in self.contents.optimizer_roles
                    if any(f"{role}/{name}" in self.contents.by_key for name in self.order[index])
                }
        return {
            "state": {i: each for i, each in state.items() if each},
            "param_groups": self.hyper(),
        }

    def hyper(self) -> list[State]:
        """The parameter groups of the optimizer of torch."""
        return [
            {key: tuple(v) if isinstance(v, list) else v for key, v in group.hyper.items()}
            | {"params": members}
            for (group, _), members in zip(self.groups, self.members, strict=True)
        ]

    def scalars(self, tensors: Tensors, group: Group) -> State:
        """What the optimizer counts: torch's own in tensors, DeepSpeed's as integers."""
        own = "bias_correction" in group.hyper  # FusedAdam, DeepSpeedCPUAdam
        if _dict(self.facts.get("source")).get("step", "int" if own else "tensor") == "int":
            return {key: int(value) for key, value in group.scalars.items()}
        return {key: tensors.number(value) for key, value in group.scalars.items()}

    def _zero12(self, tensors: Tensors, rank: int) -> State:
        cuts = self.cuts
        fragment = "deepspeed.utils.tensor_fragment.fragment_address"
        return {
            "clip_grad": self.clip,
            "base_optimizer_state": self.base(tensors, rank),
            "single_partition_of_fp32_groups": [
                tensors.shard(PARAM, cut, rank, cut.filled(rank)) for cut in cuts
            ],
            "group_paddings": [cut.length - cut.filled(rank) for cut in cuts],
            "partition_count": [self.ranks] * len(cuts),
            "param_slice_mappings": [
                OrderedDict(
                    (s.name, Opaque(fragment, (), {"numel": s.stop - s.start, "start": s.offset}))
                    for s in cut.shares(rank)
                )
                for cut in cuts
            ],
        }

    def _zero3(self, tensors: Tensors, rank: int) -> State:
        return {
            "partition_count": self.ranks,
            "optimizer_state_dict": self.base(tensors, rank),
            "fp32_flat_groups": [tensors.shard(PARAM, cut, rank, cut.length) for cut in self.cuts],
        }

    def whole(self, tensors: Tensors) -> State:
        """The model's file of ZeRO 1 and 2: all that forward and backward need."""
        contents, module = self.contents, OrderedDict()
        for array in contents.of(PARAM):
            module[array.name] = tensors.array(array, contents.dtype)
        for array in (*contents.of(FROZEN), *contents.of(BUFFER)):
            module[array.name] = tensors.array(array)
        module.update({alias: module[name] for alias, name in contents.aliases.items()})
        kept = {array.name: module[array.name] for array in self.untrained}
        return self._state(module, kept if self.stage > 1 else None)

    def partition(self, tensors: Tensors, rank: int) -> State:
        """The model's file of a rank of ZeRO 3: buffers, and its part of what is frozen."""
        contents, module = self.contents, OrderedDict()
        for array in (*contents.of(PARAM), *contents.of(FROZEN)):
            module[array.name] = tensors.nothing(self._dtype(array))
        for array in contents.of(BUFFER):
            module[array.name] = tensors.array(array)
        module.update({alias: module[name] for alias, name in contents.aliases.items()})
        kept = OrderedDict()
        for array in self.untrained:
            cut = split({array.name: array.numel}, self.ranks)
            dtype = self._dtype(array)
            kept[array.name] = tensors.shard(array.role, cut, rank, cut.length, dtype)
        return self._state(module, kept)

    def _dtype(self, array: Array) -> str:
        return self.contents.dtype if array.role == PARAM else array.dtype

    def _state(self, module: State, kept: State | None) -> State:
        """A file of the model.

        Args:
            kept: what a rank has of the parameters that are not trained; None with ZeRO 1, which
                has them in the module alone.
        """
        contents, facts = self.contents, self.facts
        shapes = {array.name: Size(array.shape) for array in self.untrained}
        known = {
            "global_samples": facts.get("global_samples"),
            "universal_checkpoint_info": _one(facts.get("universal_checkpoint_info")),
        }
        return {
            **_dict(facts.get("client_state")),
            "module": module,
            "buffer_names": [array.name for array in contents.of(BUFFER)],
            "optimizer": None,
            "param_shapes": [
                OrderedDict((name, Size(self.shapes[name])) for name in names)
                for names in self.order
            ],
            "frozen_param_shapes": None if kept is None else OrderedDict(shapes),
            "shared_params": dict(contents.aliases),
            "frozen_param_fragments": None if kept is None else OrderedDict(kept),
            "lr_scheduler": facts.get("lr_scheduler"),
            "data_sampler": None,
            "random_ltd": None,
            "skipped_steps": int(_number(facts.get("skipped_steps"), 0)),
            "global_steps": contents.step,
            "dp_world_size": self.ranks,
            "mp_world_size": 1,
            "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
            "ds_config": self.config,
            "ds_version": VERSION,
            **{key: value for key, value in known.items() if value is not None},
        }


def _dict(value: Any) -> State:
    return value if isinstance(value, dict) else {}


def _number(value: Any, default: float) -> float:
    """A number of the configuration, which may have "auto" there."""
    return value if isinstance(value, int | float) and isfinite(value) else default


def _config(facts: State, dtype: str, stage: int) -> State:
    """The configuration of the engine that is to load it, as far as it is known."""
    config = _dict(facts.get("ds_config"))
    if not config and dtype in ("bfloat16", "float16"):
        config = {{"bfloat16": "bf16", "float16": "fp16"}[dtype]: {"enabled": True}}
    zero = _dict(config.get("zero_optimization"))
    return config | {"zero_optimization": zero | {"stage": stage}}


def _one(info: Any) -> State | None:
    """`universal_checkpoint_info` for one tensor-parallel rank, from that for several."""
    if not isinstance(info, dict):
        return None
    kept = {key: value for key, value in info.items() if key != "affine_map"}
    try:
        if widths := info.get("sub_param_shard_widths"):
            merged = {pattern: [[sum(row)] for row in rows] for pattern, rows in widths.items()}
            kept["sub_param_shard_widths"] = merged
        if subs := info.get("parameter_with_sub_params"):  # JSON has made lists of its tuples
            kept["parameter_with_sub_params"] = [
                sub | {"shape": tuple(tuple(d) if isinstance(d, list) else d for d in sub["shape"])}
                for sub in subs
            ]
    except (LookupError, TypeError, AttributeError) as cause:
        raise Corrupt(f"universal_checkpoint_info is not understood: {cause!r}") from cause
    return kept
