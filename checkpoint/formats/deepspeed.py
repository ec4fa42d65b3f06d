"""Native checkpoints of DeepSpeed: ZeRO 1 to 3 in every precision, read in place.

    save/latest                                                     the tag
    save/global_step3/mp_rank_00_model_states.pt                    of each tensor rank; in ZeRO 3
                      zero_pp_rank_0_mp_rank_00_model_states.pt     of every rank
                      [bf16_]zero_pp_rank_0_mp_rank_00_optim_states.pt

Names, shapes and order are those of `param_shapes` alone: `param_slice_mappings` are wrong with
`round_robin_gradients`. Slices of tensor-parallel ranks are put together by the patterns of the
checkpoint. Files that are not of one save are refused.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from outlast.checkpoint.contents import BUFFER, FROZEN, PARAM, Contents
from outlast.checkpoint.dtypes import cast
from outlast.checkpoint.formats.deepspeed_layout import split
from outlast.checkpoint.formats.deepspeed_model import Model, State, numel
from outlast.checkpoint.formats.deepspeed_optimizer import Zero
from outlast.checkpoint.formats.folder import Folder, corrupt, named_by
from outlast.checkpoint.formats.pieces import PieceSource
from outlast.checkpoint.formats.slices import Located, MergedSource, Merges, Slices
from outlast.checkpoint.formats.torch_zip import ZipFolder, read
from outlast.checkpoint.grid import grid
from outlast.checkpoint.source import Source
from outlast.cluster.errors import Misuse

_STEP = re.compile(r"global_step(\d+)")
_FILE = re.compile(
    r"mp_rank_(\d{2,})_model_states\.pt"
    r"|zero_pp_rank_(\d+)_mp_rank_(\d{2,})_model_states\.pt"
    r"|(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d{2,})_optim_states\.pt"
)


def find(path: Path) -> Path | None:
    """The checkpoint at `path`, the one that `latest` there names, or else the newest one."""
    if _is_one(path):
        return path
    if (latest := path / "latest").is_file():
        return named if (named := named_by(latest)) and _is_one(named) else None
    steps = [(int(m[1]), p) for p in path.glob("global_step*") if (m := _STEP.fullmatch(p.name))]
    return next((found for _, found in sorted(steps, reverse=True) if _is_one(found)), None)


def _is_one(path: Path) -> bool:
    """Not a universal one, which has copies of the model files."""
    return any(path.glob("*mp_rank_*_model_states.pt")) and not (path / "zero").is_dir()


class DeepSpeedSource(MergedSource):
    """Also has `others`: what is stored twice, by where: the module's weights, buffers of ranks."""

    others: dict[str, PieceSource]


def disagreements(source: Source) -> Iterator[str]:
    """What the checkpoint stores twice and not alike: the module's weights beside the masters."""
    for label, other in source.others.items() if isinstance(source, DeepSpeedSource) else ():
        for array in other.contents.arrays:
            mine = source.contents.by_key.get(f"{PARAM}/{array.name}", array)
            if mine.shape != array.shape:
                yield f"{mine.key} {mine.shape} is {array.shape} in {label}"
                continue
            count = 0
            for start, stop in grid(array.shape).shards():
                a = cast(source.read(mine, start, stop), array.dtype)
                b = other.read(array, start, stop)
                count += int(np.count_nonzero((a != b) & ~((a != a) & (b != b))))
            if count:
                yield f"{mine.key}: {count} of {array.numel} elements are others in {label}"


def open(path: Path, follow: bool = False) -> Source:
    """Open one.

    Raises:
        Corrupt: files are damaged, missing, or not of one save.
        Misuse: it is of a kind that is not read: stage 0, pipeline stages, experts, the elastic
            format.
    """
    return _Reader(ZipFolder(path, follow)).source()


class _Reader:
    """Puts the files of one checkpoint together; `models`, `states` are by [tensor rank][rank]."""

    def __init__(self, folder: Folder) -> None:
        self.folder, self.left_out = folder, list[str]()
        self.models, self.states = _files(folder)
        self.model = self.models[0][0]
        places = [self.model.state, *(row[0] for row in self.states)]  # AutoTP has it in the second
        found = (at.get("universal_checkpoint_info", dict, default={}) for at in places)
        info: dict[str, Any] = next(filter(None, found), {})
        if len(self.models) > 1 and not info:
            raise Misuse(
                f"{folder.path} has slices of {len(self.models)} tensor-parallel ranks, and does "
                "not say how to merge them: set model.universal_checkpoint_info, and save it again"
            )
        self.merges = Merges(len(self.models), info)
        self.slices = Slices(self.merges)

    def source(self) -> DeepSpeedSource:
        """Read what there is."""
        note = self.left_out.append
        optimizer = Zero(self.folder, self.models, self.states, note)
        if optimizer.partitioned != self.model.state.name.startswith("zero_"):
            raise self.model.state.wrong("its name is not that of the optimizer's ZeRO stage")
        groups = optimizer.add_to(self.slices)
        trained = {name for group in groups for name in group.names}
        self._frozen(optimizer.partitioned)
        for name in self.model.buffers:
            _whole(self.slices, BUFFER, name, [self.model])
        others = self._others([] if optimizer.partitioned else trained & {*self.model.module})
        if unused := self.merges.unused():
            raise self.model.state.wrong(f"patterns that match no parameter: {sorted(unused)}")
        contents = Contents(
            step=self.model.state.get("global_steps", int),
            arrays=self.model.ordered(self.slices.arrays.values()),
            groups=groups,
            dtype=next((r.dtype for n, r in self.model.module.items() if n in trained), "float32"),
            aliases=self.model.aliases,
            facts=self.model.facts(note) | optimizer.facts(),
            left_out=tuple(dict.fromkeys(self.left_out)),
        )
        source = DeepSpeedSource(self.slices.sources(self.folder, contents), self.merges.averaged())
        source.others = {
            label: slices.sources(self.folder, Contents(0, tuple(slices.arrays.values())))[0]
            for label, slices in others.items()
        }
        return source

    def _frozen(self, partitioned: bool) -> None:
        """Parameters that are not trained: cut in ZeRO 3, else in the module."""
        if not partitioned:
            for name in self.model.rest:
                _whole(self.slices, FROZEN, name, [row[0] for row in self.models])
            return
        for name in self.model.frozen:
            shapes, found = [], []
            for tensor, row in enumerate(self.models):
                shapes.append(row[0].frozen.get(name, ()))
                cut = split(numel({name: shapes[-1]}), len(row))
                for rank, model in enumerate(row):
                    ref = model.fragment(name)
                    found += [Located(tensor, s.start, s.stop, ref) for s in cut.shares(rank)]
            self.slices.add(FROZEN, name, shapes, ref.dtype, found)
        if missing := [name for name in self.model.rest if name not in self.model.frozen]:
            self.left_out.append(f"the checkpoint has no values of {', '.join(missing)}")

    def _others(self, trained: Iterable[str]) -> dict[str, Slices]:
        """What is stored twice, by where."""
        found = {"the module's weights": Slices(self.merges)}
        for name in sorted(trained):
            _whole(found["the module's weights"], FROZEN, name, [row[0] for row in self.models])
        for model in [model for row in self.models for model in row][1:]:
            found[model.state.name] = Slices(Merges(1, {}))
            for name in self.model.buffers:
                _whole(found[model.state.name], BUFFER, name, [model])
        return found


def _whole(slices: Slices, role: str, name: str, models: list[Model]) -> None:
    """Add a tensor of the module, which is there as a whole on every tensor rank."""
    refs = [model.tensor(name) for model in models]
    found = [Located(rank, 0, ref.numel, ref) for rank, ref in enumerate(refs)]
    slices.add(role, name, [ref.shape for ref in refs], refs[0].dtype, found)


def _files(folder: Folder) -> tuple[list[list[Model]], list[list[State]]]:
    """The model files and the optimizer's states by [tensor rank][rank]."""
    names = set(folder.names("*.pt"))
    if odd := [name for name in names if name.startswith("layer_") or "expert" in name]:
        raise Misuse(f"{folder.path} has {odd[0]}: pipelines and experts cannot be converted yet")
    cut = "zero_pp_rank_0_mp_rank_00_model_states.pt" in names
    first = Model.read(folder, f"{'zero_pp_rank_0_' if cut else ''}mp_rank_00_model_states.pt")
    if not first.trained:
        raise Misuse(
            f"{first.state.where} is of stage 0, which does not say whose the optimizer's states "
            "are: load it with DeepSpeed, and save it with stage 1"
        )
    ranks, tensors = (first.state.get(key, int) for key in ("dp_world_size", "mp_world_size"))
    bf16 = "bf16_" if any(name.startswith("bf16_") for name in names) else ""

    def name(tensor: int, rank: int | None, kind: str) -> str:
        middle = f"mp_rank_{tensor:02d}_{kind}_states.pt"
        found = middle if rank is None else f"zero_pp_rank_{rank}_{middle}"
        found = bf16 * (kind == "optim") + found
        if found not in names:
            raise corrupt(folder.path / found, 0, f"is not there; saved were {ranks} x {tensors}")
        names.discard(found)
        return found

    if ranks < 1 or tensors < 1:
        raise first.state.wrong(f"of {ranks} x {tensors} ranks")
    models, states = list[list[Model]](), list[list[State]]()
    for tensor in range(tensors):
        files = [name(tensor, rank, "model") for rank in (range(ranks) if cut else [None])]
        models.append([Model.read(folder, file) for file in files])
        files = [name(tensor, rank, "optim") for rank in range(ranks)]
        states.append([_state(folder, file) for file in files])
    if odd := [name for name in names if _FILE.fullmatch(name)]:
        raise corrupt(folder.path / odd[0], 0, f"is of another save; this had {ranks} x {tensors}")
    for tensor, model in [(t, model) for t, row in enumerate(models) for model in row]:
        _compare(first, model, models[tensor][0])
    return models, states


def _state(folder: Folder, name: str) -> State:
    """The dict of an optimizer file, of this rank's part."""
    return State(folder.path / name, read(folder, name), name).state("optimizer_state_dict")


def _compare(first: Model, model: Model, head: Model) -> None:
    """Corrupt if a model file is not of the save of the first, or of the layout of its head."""
    for key in ("global_steps", "dp_world_size", "mp_world_size"):
        here, there = model.state.get(key, int), first.state.get(key, int)
        if here != there:
            raise model.state.wrong(f"{key} is {here}, and {there} for rank 0: not of one save")
    names = [[*group] for group in model.trained]
    same = (model.trained, model.frozen) == (head.trained, head.frozen)
    if not same or names != [[*group] for group in first.trained]:
        raise model.state.wrong("its param_shapes are not those of rank 0: not of one save")
