"""DeepSpeed's universal format: whole tensors, one file for every parameter and role.

    save/latest_universal                                   the name of the directory
    save/global_step3_universal/mp_rank_00_model_states.pt  what is not cut, as in `deepspeed`
                                zero/optimizer_state.pt     parameter groups, loss scale
                                zero/<parameter>/fp32.pt, exp_avg.pt, ..., step.pt

What is written here loads with `{"checkpoint": {"load_universal": true}}` into ZeRO 1, 2 and 3
alike, where DeepSpeed's own converter writes for one family: bodies are dicts, which all stages
read, both kinds of model files are there, and `optimizer_state.pt` has what either looks for.
Sources: ds_to_universal.py, universal_checkpoint.py, base_optimizer.py and stage3.py.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from glob import escape
from math import prod
from pathlib import Path
from typing import Any

from outlast.checkpoint.contents import BUFFER, FROZEN, PARAM, UNTRAINED, Array, Contents, Group
from outlast.checkpoint.formats import deepspeed_write as zero
from outlast.checkpoint.formats.deepspeed_layout import split
from outlast.checkpoint.formats.deepspeed_model import Model, Shape, State, loss_scaler
from outlast.checkpoint.formats.folder import corrupt, named_by
from outlast.checkpoint.formats.patterns import VOCABULARY, Patterns
from outlast.checkpoint.formats.pickles import Opaque, TensorRef
from outlast.checkpoint.formats.pieces import Piece, PieceSource
from outlast.checkpoint.formats.plain import plain
from outlast.checkpoint.formats.torch_zip import ZipFolder, read, values
from outlast.checkpoint.items import Item, Wanted
from outlast.checkpoint.source import Source
from outlast.cluster.errors import Misuse
from outlast.layout.run import Run

LATEST = "latest_universal"
_OPTIMIZER = "zero/optimizer_state.pt"
_WHOLE, _PARTS = "mp_rank_*_model_states.pt", "zero_pp_rank_*_mp_rank_*_model_states.pt"
_SUB_PARAMETERS = "deepspeed.checkpoint.universal_checkpoint.SubparamShape"


def find(path: Path) -> Path | None:
    """The checkpoint at `path`, or the one that `latest_universal` there names."""
    if (path / _OPTIMIZER).is_file():
        return path
    if (latest := path / LATEST).is_file() and (named := named_by(latest)):
        return named if (named / _OPTIMIZER).is_file() else None
    return None


def open(path: Path, follow: bool = False) -> Source:
    """Open one, written for any stage, by DeepSpeed or here.

    Raises:
        Corrupt: files are damaged, missing, or contradict each other.
        Misuse: it has experts.
    """
    return _Reader(ZipFolder(path, follow)).source()


class _Reader:
    """Puts the files of one checkpoint together."""

    def __init__(self, folder: ZipFolder) -> None:
        self.folder, self.left_out = folder, list[str]()
        names = folder.names(_WHOLE) or folder.names(_PARTS)
        if not names:
            raise corrupt(folder.path, 0, "no file of model states")
        names.sort(key=lambda name: (len(name), name))  # ranks are not padded with zeros
        self.models = [Model.read(folder, name) for name in names]
        self.model = self.models[0]
        self.partitioned = names[0].startswith("zero_pp_rank_")
        self.tensors = len({name.rpartition("mp_rank_")[2] for name in names})
        place = folder.path / _OPTIMIZER
        self.optimizer = State(place, read(folder, _OPTIMIZER), _OPTIMIZER)
        self.counts = "tensor"  # what the step is: DeepSpeed's Adam has integers
        self.arrays: dict[str, Array] = {}
        self.pieces: dict[str, list[Piece]] = {}

    def source(self) -> PieceSource:
        """Read what there is."""
        state, model = self.model.state, self.model
        steps = {m.state.get("global_steps", int) for m in self.models}
        if len(steps) > 1:
            raise state.wrong(f"the model files beside it are of the steps {sorted(steps)}")
        groups = [self._group(index, told) for index, told in enumerate(self._declared())]
        named = {name for group in groups for name in group.names}
        if lost := [n for m in self.models for part in m.trained for n in part if n not in named]:
            raise self.optimizer.wrong(f"{lost[0][:99]} is in none of the parameter groups")
        self._untrained()
        source = {"format": "universal", "step": self.counts}
        facts = model.facts(self.left_out.append) | {"source": source}
        if scaler := loss_scaler(self.optimizer.values.get("loss_scaler")):
            facts["loss_scaler"] = scaler
        dtypes = [
            ref.dtype for name, ref in model.module.items() if f"{PARAM}/{name}" in self.arrays
        ]
        contents = Contents(
            step=steps.pop(), arrays=model.ordered(self.arrays.values()), groups=tuple(groups),
            dtype=dtypes[0] if dtypes else "float32", aliases=model.aliases, facts=facts,
            left_out=tuple(self.left_out),
        )  # fmt: skip
        return PieceSource(self.folder, contents, self.pieces)

    def _declared(self) -> list[State]:
        """The parameter groups of the optimizer."""
        state = self.optimizer
        return [State(state.where, g) for g in state.get("param_groups", list)]

    def _group(self, index: int, declared: State) -> Group:
        """A parameter group, with the arrays of all its parameters."""
        shapes: dict[str, Shape] = {}
        for model in self.models:  # slices of tensor ranks, or the same for every rank of ZeRO 3
            for place in declared.get("params", list):
                if not isinstance(place, int) or not 0 <= place < len(model.trained):
                    raise declared.wrong(f"parameter group {index} has a group {place!r}")
                shapes |= {n: s for n, s in model.trained[place].items() if n not in shapes}
        scalars = [self._parameter(name, shape) for name, shape in shapes.items()]
        hyper = plain(declared.values, f"param_groups[{index}]", self.left_out.append)
        hyper.pop("params", None)
        if any(each != scalars[0] for each in scalars):
            raise declared.wrong(f"the parameters of group {index} have counted different steps")
        return Group(tuple(shapes), hyper, scalars[0] if scalars else {})

    def _parameter(self, name: str, shape: Shape) -> dict[str, float]:
        """Find a parameter's arrays; what the optimizer has counted for it."""
        folder, base = self.folder, f"zero/{name}"
        if not _is_directory(name):
            raise self.model.state.wrong(f"{name[:99]!r} as the name of a parameter")
        found = [file[len(base) + 1 : -3] for file in folder.names(f"{escape(base)}/*.pt")]
        if odd := {PARAM, *UNTRAINED} & {*found}:
            raise corrupt(folder.path / base, 0, f"{sorted(odd)} are no states of an optimizer")
        for role in ["fp32", *sorted({*found} - {"fp32", "step"})]:
            file = f"{base}/{role}.pt"
            body = read(folder, file)
            told = body if isinstance(body, dict) else {}
            ref = told.get("param", body)
            if not isinstance(ref, TensorRef):
                raise corrupt(folder.path / file, 0, "no tensor")
            if told.get("is_expert_param"):
                raise Misuse(f"{folder.path / file} is of an expert: not read yet")
            self._add(Array(PARAM if role == "fp32" else role, name,
                            self._shape(name, ref, shape), ref.dtype), ref)  # fmt: skip
        if "step" not in found:
            return self._counted()
        return {"step": self._number(read(folder, f"{base}/step.pt"), f"{base}/step.pt")}

    def _shape(self, name: str, ref: TensorRef, shape: Shape) -> Shape:
        """That of the model, which ZeRO 3 flattens, if it is not a tensor rank's slice."""
        if ref.numel == prod(shape):
            return shape
        if self.tensors == 1:
            note = f"{name}: the padding of its vocabulary, {shape} to {ref.shape}, is not there"
            if note not in self.left_out:
                self.left_out.append(note)
        return ref.shape

    def _counted(self) -> dict[str, float]:
        """The step that ZeRO 3 keeps beside the groups."""
        inner = self.optimizer.get("optimizer_state_dict", dict, default={})
        states = State(self.optimizer.where, inner).get("state", dict, default={})
        first = next(iter(states.values()), None)
        step = first.get("step") if isinstance(first, dict) else None
        return {} if step is None else {"step": self._number(step, _OPTIMIZER)}

    def _number(self, value: Any, file: str) -> float:
        if isinstance(value, int):
            self.counts = "int"
        elif isinstance(value, TensorRef) and value.numel == 1:
            value = values(self.folder, value)[0].item()
        if not isinstance(value, int | float):
            raise corrupt(self.folder.path / file, 0, "the step is no number")
        return float(value)

    def _untrained(self) -> None:
        """Buffers, and what is frozen, of which every rank of ZeRO 3 has a part."""
        model, trained = self.model, {array.name for array in self.arrays.values()}
        rest = [name for name in model.rest if name not in trained]
        if self.tensors > 1 and rest:
            self.left_out.append(
                f"{', '.join(rest)}: slices of {self.tensors} tensor-parallel ranks, which are not "
                "merged: convert the checkpoint that this one was made from"
            )
        elif self.partitioned:
            for name, shape in model.frozen.items():
                self._frozen(name, shape)
            if lost := [name for name in rest if name not in model.frozen]:
                self.left_out.append(f"the checkpoint has no values of {', '.join(lost)}")
        else:
            for name in rest:
                self._whole(FROZEN, name)
        for name in model.buffers:
            self._whole(BUFFER, name)

    def _frozen(self, name: str, shape: Shape) -> None:
        cut = split({name: prod(shape)}, len(self.models))
        refs = [model.fragment(name) for model in self.models]
        array = Array(FROZEN, name, shape, refs[0].dtype)
        self.arrays[array.key] = array
        self.pieces[array.key] = [
            refs[rank].piece(Run.of(share.start, share.stop), share.offset)
            for rank in range(len(self.models))
            for share in cut.shares(rank)
        ]

    def _whole(self, role: str, name: str) -> None:
        ref = self.model.tensor(name)
        self._add(Array(role, name, ref.shape, ref.dtype), ref)

    def _add(self, array: Array, ref: TensorRef) -> None:
        self.arrays[array.key] = array
        whole = [ref.piece(Run.of(0, array.numel))] if array.numel else []
        self.pieces[array.key] = whole


# ---- writing


def name_of(contents: Contents) -> str:
    """The directory that `latest_universal` names."""
    return f"{zero.name_of(contents)}_universal"


def stored(array: Array, contents: Contents, wanted: Wanted) -> Array:
    """What the files hold of an array: of a vocabulary not its padding."""
    kept = zero.stored(array, contents, wanted)
    info = contents.facts.get("universal_checkpoint_info") or {}
    if array.role in UNTRAINED or not info.get(VOCABULARY):
        return kept
    padded = {key: info.get(key) for key in (VOCABULARY, "original_vocab_size")}
    return replace(kept, shape=Patterns(padded).stripped(array.name, array.shape))


def plan(source: Source, directory: Path, wanted: Wanted) -> list[Item]:
    """Items for every file of every parameter, and for what they have in common.

    Raises:
        Misuse: there are no parameter groups, or the name of a parameter is none for a directory.
    """
    contents, model = source.contents, zero.Model(source, 2, 1)
    patterns = Patterns(contents.facts.get("universal_checkpoint_info") or {})
    files: dict[str, Callable[[zero.Tensors], Any]] = {
        "mp_rank_00_model_states.pt": model.whole,
        "zero_pp_rank_0_mp_rank_00_model_states.pt": partial(model.partition, rank=0),
        _OPTIMIZER: partial(_common, model),
    }
    for group, names in model.groups:
        for name in names:
            if not _is_directory(name):
                raise Misuse(f"a parameter {name[:99]!r} cannot be a directory of this format")
            tags = patterns.tags(name, model.shapes[name])
            if "sub_param_shape" in tags:
                tags["sub_param_shape"] = Opaque(_SUB_PARAMETERS, (), tags["sub_param_shape"])
            for role in (PARAM, *contents.optimizer_roles):
                if array := contents.by_key.get(f"{role}/{name}"):
                    shape = stored(array, contents, wanted).shape
                    file = f"zero/{name}/{'fp32' if role == PARAM else role}.pt"
                    files[file] = partial(_body, array, shape, tags)
            if "step" in group.scalars:
                files[f"zero/{name}/step.pt"] = partial(_step, model, group)
    return [zero.item(source, directory, name, build) for name, build in files.items()]


def _is_directory(name: str) -> bool:
    """Whether the name of a parameter can be that of a directory, anywhere."""
    plain_text = name.isprintable() and "/" not in name and name not in ("", ".", "..")
    return plain_text and len(name.encode()) < 256


def _body(array: Array, shape: Shape, tags: dict[str, Any], tensors: zero.Tensors) -> zero.State:
    return {"param": tensors.array(array, zero.MASTER, shape)} | tags


def _step(model: zero.Model, group: Group, tensors: zero.Tensors) -> Any:
    return model.scalars(tensors, group)["step"]


def _common(model: zero.Model, tensors: zero.Tensors) -> zero.State:
    """`optimizer_state.pt`: ZeRO 3 looks for the step in the state of its first sub-group."""
    groups = model.hyper()
    first = {i: model.scalars(tensors, group) for i, (group, _) in enumerate(model.groups)}
    return {
        **model.common(),
        "clip_grad": model.clip,
        "group_paddings": [0] * len(groups),
        "partition_count": [1] * len(groups),
        "param_groups": groups,
        "optimizer_state_dict": {"state": first, "param_groups": groups},
    }
