"""DeepSpeed's optimizer states: the flat shards of ZeRO 1 to 3."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from outlast.checkpoint.contents import PARAM, Group
from outlast.checkpoint.formats.deepspeed_layout import Flat, Split, flat, round_robin, split
from outlast.checkpoint.formats.deepspeed_model import Model, State, loss_scaler, numel
from outlast.checkpoint.formats.folder import Folder
from outlast.checkpoint.formats.pickles import Opaque, TensorRef
from outlast.checkpoint.formats.plain import Note, plain
from outlast.checkpoint.formats.slices import Located, Slices
from outlast.checkpoint.formats.torch_zip import values
from outlast.cluster.errors import Misuse


class Groups:
    """The parameter groups: what is said of them in several files has to be the same."""

    def __init__(self, folder: Folder, base: State, note: Note) -> None:
        self._folder, self._note = folder, note
        self.counts = "tensor"  # what the scalars are: torch has tensors, DeepSpeed's Adam ints
        self._told = self._hyper(base)
        self.scalars: list[dict[str, float]] = [{} for _ in self._told]
        self.units = [
            (index, key) for index, group in enumerate(self._told) for key in group["params"]
        ]

    def _hyper(self, base: State) -> list[dict[str, Any]]:
        groups = [State(base.where, group) for group in base.get("param_groups", list)]
        for group in groups:
            if not all(isinstance(key, int) for key in group.get("params", list)):
                raise base.wrong("param_groups without the numbers of their parameters")
        return [
            plain(group.values, f"parameter group {index}", self._note)
            for index, group in enumerate(groups)
        ]

    def compare(self, base: State) -> None:
        """Corrupt if another file has other groups."""
        if self._hyper(base) != self._told:
            raise base.wrong("its param_groups are not those of rank 0: not of one save")

    def tensors(self, base: State, unit: int) -> dict[str, TensorRef]:
        """Per-element state of a unit of a group by role; and its scalars, which others share."""
        index, key = self.units[unit]
        found = {}
        for role, value in base.state("state").get(key, dict, default={}).items():
            if isinstance(value, TensorRef) and value.shape:
                found[str(role)] = value
                continue
            if isinstance(value, TensorRef):
                value = values(self._folder, value)[0].item()
            elif isinstance(value, int):
                self.counts = "int"
            if not isinstance(value, int | float):
                self._note(f"the optimizer's {role} is no number and no tensor")
            elif self.scalars[index].setdefault(str(role), float(value)) != value:
                raise base.wrong(
                    f"{role} is {value:g}, and {self.scalars[index][role]:g} for others of its "
                    "group: not of one save"
                )
        return found

    def made(self, names: Sequence[Iterable[str]]) -> tuple[Group, ...]:
        """The groups of parameters with these names."""
        groups = []
        for mine, told, scalars in zip(names, self._told, self.scalars, strict=True):
            hyper = {key: value for key, value in told.items() if key != "params"}
            if isinstance(step := hyper.get("step"), int | float):  # DeepSpeed's own Adam
                scalars = {"step": float(step)} | scalars
                del hyper["step"]
            groups.append(Group(tuple(mine), hyper, scalars))
        return tuple(groups)


class Zero:
    """Optimizer states of ZeRO: `states` by [tensor rank][rank], each rank's own dict."""

    def __init__(
        self, folder: Folder, models: list[list[Model]], states: list[list[State]], note: Note
    ) -> None:
        self._models, self._states, self._first = models, states, states[0][0]
        self.ranks, self.stage = len(states[0]), _stage(self._first)
        self.partitioned = self.stage == 3
        self._groups = Groups(folder, self._base(self._first), note)
        for state in (state for row in states for state in row):
            self._check(state)

    def _base(self, state: State) -> State:
        key = "optimizer_state_dict" if self.partitioned else "base_optimizer_state"
        if isinstance(state.values.get(key), list):
            raise Misuse(
                f"{state.where} is of DeepSpeed's elastic format: load it with DeepSpeed, and save "
                "it with zero_optimization.elastic_checkpoint false"
            )
        return state.state(key)

    def _check(self, state: State) -> None:
        """A rank's file has to be of the save and the layout of rank 0's."""
        if _stage(state) != self.stage:
            raise state.wrong("is of another ZeRO stage than rank 0's")
        self._groups.compare(self._base(state))
        counts = state.values.get("partition_count")
        if any(n != self.ranks for n in (counts if isinstance(counts, list) else [counts])):
            raise state.wrong(f"says that {counts} ranks share a group, and there are {self.ranks}")
        if state.get("ds_zero_partition_groups", dict, list, default=None):
            raise Misuse(f"{state.where} has experts, which cannot be converted yet")

    def facts(self) -> dict[str, Any]:
        """What `Contents.facts` has of it."""
        source = {"format": "deepspeed", "stage": self.stage, "ranks": self.ranks}
        source |= {"step": self._groups.counts}
        if len(self._models) > 1:
            source["tensor_ranks"] = len(self._models)
        scaler = loss_scaler(self._first.values.get("loss_scaler"))
        return {"source": source} | ({"loss_scaler": scaler} if scaler else {})

    def add_to(self, slices: Slices) -> tuple[Group, ...]:
        """Add every trained parameter and its state; the parameter groups."""
        trained, names = self._models[0][0].trained, defaultdict[int, list[str]](list)
        if len(trained) != len(self._groups.units):
            raise self._first.wrong(
                f"{len(self._groups.units)} flat groups, and {len(trained)} in the model's file"
            )
        for unit, shapes in enumerate(trained):
            self._add(unit, slices)
            names[self._groups.units[unit][0]] += self._ordered([*shapes])
        return self._groups.made([names[index] for index in range(len(self._groups.scalars))])

    def _ordered(self, names: list[str]) -> list[str]:
        """Names in the optimizer's order, from that of the flat buffer."""
        config = self._models[0][0].state.values.get("ds_config")
        zero = config.get("zero_optimization") if isinstance(config, dict) else None
        has_stage = "zero_stage" in self._first.values  # BF16_Optimizer has not, and does not deal
        if self.partitioned or not has_stage or not isinstance(zero, dict):
            return names
        if zero.get("round_robin_gradients") is not True:
            return names
        places = round_robin(len(names), self.ranks)
        return [name for _, name in sorted(zip(places, names, strict=True))]

    def _add(self, unit: int, slices: Slices) -> None:
        found: dict[tuple[str, str], list[Located]] = defaultdict(list)
        dtypes: dict[str, str] = {}
        for tensor, states in enumerate(self._states):
            cut = self._cut(tensor, unit)
            for rank, state in enumerate(states):
                shard = self._shard(state, unit, rank, cut)
                dtypes = dtypes or {role: ref.dtype for role, ref in shard.items()}
                if dtypes != {role: ref.dtype for role, ref in shard.items()}:
                    raise state.wrong(f"its state {[*shard]} is not that of rank 0, {dtypes}")
                for share in cut.shares(rank):
                    for role, ref in shard.items():
                        found[role, share.name].append(
                            Located(tensor, share.start, share.stop, ref, share.offset)
                        )
        rows = [row[0].trained[unit] for row in self._models]
        for role, dtype in dtypes.items():
            for name in rows[0]:
                slices.add(role, name, [row[name] for row in rows], dtype, found[role, name])

    def _cut(self, tensor: int, unit: int) -> Flat | Split:
        sizes = numel(self._models[tensor][0].trained[unit])
        if self.partitioned:
            return split(sizes, self.ranks)
        state = self._states[tensor][0]
        every = state.get("param_alignment_paddings", list, default=None)
        paddings = [0] * len(sizes) if every is None or unit >= len(every) else every[unit]
        if not isinstance(paddings, list) or len(paddings) != len(sizes):
            raise state.wrong("param_alignment_paddings are not one for every parameter")
        if any(not isinstance(n, int) or n < 0 for n in paddings):
            raise state.wrong(f"param_alignment_paddings {paddings}")
        return flat(sizes, self.ranks, paddings)

    def _shard(self, state: State, unit: int, rank: int, cut: Flat | Split) -> dict[str, TensorRef]:
        """A rank's shard of a flat buffer by role, of the lengths that the layout says."""
        key = "fp32_flat_groups" if self.partitioned else "single_partition_of_fp32_groups"
        masters = state.get(key, list)
        if unit >= len(masters) or not isinstance(masters[unit], TensorRef):
            raise state.wrong(f"{key} has no tensor {unit}")
        shard = {PARAM: masters[unit]} | self._groups.tensors(self._base(state), unit)
        paddings = state.get("group_paddings", list, default=None) or []
        padding = paddings[unit] if unit < len(paddings) else 0
        if not isinstance(padding, int):
            raise state.wrong(f"group_paddings {paddings}")
        for role, ref in shard.items():
            # Only the master is saved without the padding, and that not by BF16_Optimizer.
            fits = {cut.length, cut.length - padding if role == PARAM else cut.length}
            if ref.numel not in fits or ref.numel < cut.filled(rank) or len(ref.shape) != 1:
                raise state.wrong(
                    f"{role} of group {unit} is {ref.shape}, not of length {cut.length} with "
                    f"{padding} of padding"
                )
        return shard


def _stage(state: State) -> int:
    """The ZeRO stage of a rank's state; BF16_Optimizer, which is of stage 1, does not say it."""
    kind = state.values.get("zero_stage", 1)
    stage = kind.args[0] if isinstance(kind, Opaque) and kind.args else kind
    if not isinstance(stage, int) or stage not in (1, 2, 3):
        raise state.wrong(f"zero_stage is {stage!r}")
    return stage
