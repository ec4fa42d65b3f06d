"""Checkpoints of torch.distributed.checkpoint as FSDP2 writes them, read and written without torch.

`get_state_dict` names tensors model.<name> and optim.state.<name>.<role>, and hyper-parameters
optim.param_groups.<group>.<key>. Other prefixes are found out, and so is the layout of
`flatten_optimizer_state_dict`. What such a checkpoint does not say is concluded from what it has:
a matrix of the model that the optimizer does not have and that equals one of its parameters bit by
bit is tied to it; of the rest, what is sharded is frozen and what is not is a buffer.
"""

import json
from collections import Counter
from collections.abc import Iterator
from functools import partial
from math import prod
from pathlib import Path
from re import findall
from typing import Any

import numpy as np

from outlast.checkpoint.contents import (
    BUFFER,
    FROZEN,
    PARAM,
    UNTRAINED,
    Array,
    Contents,
    Group,
)
from outlast.checkpoint.dtypes import Values
from outlast.checkpoint.formats import distcp
from outlast.checkpoint.formats.distcp import METADATA, NOTE, Entry, Shards, Stored, number
from outlast.checkpoint.formats.folder import Folder, corrupt
from outlast.checkpoint.formats.pieces import PieceSource
from outlast.checkpoint.formats.plain import Note, carried, from_json
from outlast.checkpoint.formats.torch_zip import ZipFolder
from outlast.checkpoint.grid import grid
from outlast.checkpoint.items import Item, Wanted
from outlast.checkpoint.source import Source
from outlast.cluster.errors import Corrupt, Misuse

LATEST = None
# What torch.optim.AdamW has in its groups and others leave out: FSDP2 wants all of them.
ADAMW = {
    "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2, "amsgrad": False,
    "maximize": False, "foreach": None, "capturable": False, "differentiable": False,
    "fused": None, "decoupled_weight_decay": True,
}  # fmt: skip


def find(path: Path) -> Path | None:
    """The directory that has the metadata, or the newest of several; None where none has.

    Raises:
        Misuse: there are several, which are not steps.
    """
    found = [path / METADATA, *path.glob(f"*/{METADATA}")]
    found = [file.parent for file in found if file.is_file()]
    found = [
        each for each in found if not (each / "metadata.json").exists()
    ]  # those are Megatron's
    if path in found:
        return path
    if len(found) > 1 and not all(findall(r"\d$", each.name) for each in found):
        names = ", ".join(sorted(each.name for each in found))
        raise Misuse(f"{path} has several: name one of {names:.400}")
    return max(found, key=lambda each: _number(each.name), default=None)


def _number(name: str) -> int:
    """The last number in a name, as of a step."""
    return int((findall(r"\d+", name) or ["-1"])[-1])


def open(path: Path, follow: bool = False) -> Source:
    """Read the metadata and the small objects of a checkpoint.

    Raises:
        Corrupt: with file and offset.
        Misuse: the parameters of one group are at different steps.
    """
    folder = ZipFolder(path, follow)
    shards = distcp.read_shards(folder)
    try:
        if NOTE in shards.objects:
            contents, found = distcp.from_note(path, shards.objects[NOTE], shards.tensors, _key)
        else:
            contents, found = _concluded(folder, shards)
    except (LookupError, TypeError, ValueError, AttributeError) as cause:
        raise corrupt(path / METADATA, 0, f"its names make no sense ({cause!r:.200})") from cause
    return PieceSource(folder, contents, {key: stored.pieces for key, stored in found.items()})


def _path(array: Array) -> tuple[str, ...]:
    """Where an array is in the state dicts of FSDP2."""
    trained = array.role not in (PARAM, *UNTRAINED)
    return ("optim", "state", array.name, array.role) if trained else ("model", array.name)


def _key(array: Array) -> str:
    return ".".join(_path(array))


# ---- reading what others wrote


def _concluded(folder: Folder, shards: Shards) -> tuple[Contents, dict[str, Stored]]:
    """What a checkpoint means, and the tensor of every array."""
    left_out: list[str] = []
    optimizer, groups = _groups(folder, shards, left_out)
    state = f"{optimizer}state."
    names = [name for names, _ in groups for name in names]
    model = _model_prefix(folder, shards, state, names)
    parts = {key: stored for key, stored in shards.tensors.items() if not key.startswith(state)}
    weights = {key.removeprefix(model): s for key, s in parts.items() if key.startswith(model)}
    trained = set(names) or {name for name, s in weights.items() if "float" in s.dtype}
    found = {Array(PARAM, n, s.shape, s.dtype): s for n, s in weights.items() if n in trained}
    held, scalars = _state(folder, shards, state, found, left_out)
    rest = {name: stored for name, stored in weights.items() if name not in trained}
    untrained, aliases = _untrained(folder, rest, found)
    found |= held | untrained
    hyper = f"{optimizer}param_groups."
    strangers = {key: s for key, s in parts.items() if not key.startswith((model, hyper))}
    left_out += [f"{k} ({s.dtype} {s.shape}) is not the model's" for k, s in strangers.items()]
    extras = [key for key in shards.objects if not key.startswith((state, hyper))]
    told = {shards.paths.get(key, (key,)): shards.objects[key] for key in extras}
    client = _nested(told, left_out.append)
    facts = {"source": {"format": "dcp", "ranks": shards.ranks}, "client_state": client}
    facts |= {"lr_scheduler": client.pop("lr_scheduler")} if "lr_scheduler" in client else {}
    made = tuple(Group(n, h, _agreed(folder, n, scalars)) for n, h in groups)
    step = max((int(group.scalars.get("step", 0)) for group in made), default=0)
    dtypes = Counter(array.dtype for array in found if array.role == PARAM)
    dtype = max(dtypes, key=dtypes.__getitem__, default="float32")
    contents = Contents(step, tuple(found), made, dtype, aliases, facts, left_out=tuple(left_out))
    return contents, {array.key: stored for array, stored in found.items()}


def _groups(
    folder: Folder, shards: Shards, left_out: list[str]
) -> tuple[str, list[tuple[tuple[str, ...], dict[str, Any]]]]:
    """What is before "state." and "param_groups.", and every group's names and hyper-parameters."""
    mark, told = "param_groups.", dict[str, dict[str, Any]]()
    keys = [key for key in (*shards.objects, *shards.tensors) if mark in key]
    prefixes = {key[: key.index(mark)] for key in keys}
    if len(prefixes) > 1:
        raise Misuse(f"{folder.path} has several optimizers: {', '.join(sorted(prefixes))}")
    prefix = min(prefixes, default="optim.")
    for key in keys:
        group, _, name = key.removeprefix(prefix + mark).rpartition(".")
        value = shards.objects.get(key)
        if key in shards.tensors:
            value = number(folder, shards.tensors[key])
        told.setdefault(group, {})[name] = list(value) if isinstance(value, tuple) else value
    groups: dict[Any, tuple[list[Any], dict[str, Any]]] = {}
    numbered = all(group.isdecimal() for group in told)
    for group in sorted(told, key=_number) if numbered else told:
        names = told[group].pop("params", None)
        hyper = carried(told[group], f"parameter group {group}", left_out.append)
        if numbered:
            groups[group] = (list(names or ()), hyper)
        else:  # flattened: the hyper-parameters of every parameter by itself
            groups.setdefault(json.dumps(hyper), ([], hyper))[0].append(group)
    if any(not isinstance(name, str) for names, _ in groups.values() for name in names):
        left_out.append("the optimizer's state, by number: save with get_state_dict for names")
        return prefix, []
    return prefix, [(tuple(names), hyper) for names, hyper in groups.values()]


def _model_prefix(folder: Folder, shards: Shards, state: str, names: list[str]) -> str:
    """What is before the names of the model's tensors."""
    if not names:
        paths = [shards.paths.get(key, (key,)) for key in shards.tensors]
        heads = {path[0] for path in paths if len(path) == 2}
        return f"{heads.pop()}." if len(heads) == 1 and all(len(p) == 2 for p in paths) else ""
    for key in sorted(shards.tensors, key=len):
        prefix = key.removesuffix(names[0])
        fits = key.endswith(names[0]) and not key.startswith(state)
        if fits and all(prefix + name in shards.tensors for name in names):
            return prefix
    raise Corrupt(f"{folder.path / METADATA}: the optimizer's parameters are not all there")


def _state(
    folder: Folder, shards: Shards, state: str, params: dict[Array, Stored], left_out: list[str]
) -> tuple[dict[Array, Stored], dict[str, dict[str, float]]]:
    """The optimizer's arrays by role, and its counters: name -> role -> number."""
    shapes = {array.name: array.shape for array in params}
    arrays: dict[str, dict[Array, Stored]] = {}
    scalars: dict[str, dict[str, float]] = {name: {} for name in shapes}
    for key in (*shards.tensors, *shards.objects):
        name, _, role = key.removeprefix(state).rpartition(".")
        stored, value = shards.tensors.get(key), shards.objects.get(key)
        if not key.startswith(state):
            continue
        if name in shapes and stored and role != "step" and stored.shape == shapes[name]:
            arrays.setdefault(role, {})[Array(role, name, stored.shape, stored.dtype)] = stored
        elif name in shapes and stored and prod(stored.shape) == 1:
            scalars[name][role] = number(folder, stored)
        elif name in shapes and isinstance(value, int | float):
            scalars[name][role] = value
        else:
            left_out.append(
                f"{key} of the optimizer is neither of a parameter's shape nor one number"
            )
    return {array: stored for held in arrays.values() for array, stored in held.items()}, scalars


def _agreed(
    folder: Folder, names: tuple[str, ...], scalars: dict[str, dict[str, float]]
) -> dict[str, float]:
    """The counters of a group."""
    agreed: dict[str, float] = {}
    for name in names:
        for role, value in scalars.get(name, {}).items():
            if agreed.setdefault(role, value) != value:
                raise Misuse(f"{folder.path}: {role} of {name} is {value}, of others of its group "
                             f"{agreed[role]}: make a group of those that are alike")  # fmt: skip
    return agreed


def _untrained(
    folder: Folder, rest: dict[str, Stored], params: dict[Array, Stored]
) -> tuple[dict[Array, Stored], dict[str, str]]:
    """What of the model the optimizer does not have: frozen and buffers, and tied names."""
    found, aliases = {}, {}
    sharded = any(stored.boxes > 1 for stored in (*rest.values(), *params.values()))
    for name, stored in rest.items():
        same = [array.name for array, other in params.items() if _equal(folder, stored, other)]
        if same:
            aliases[name] = same[0]
            continue
        matrix = "float" in stored.dtype and len(stored.shape) > 1
        role = FROZEN if stored.boxes > 1 or (not sharded and matrix) else BUFFER
        found[Array(role, name, stored.shape, stored.dtype)] = stored
    in_order = sorted(found, key=lambda array: UNTRAINED.index(array.role))
    return {array: found[array] for array in in_order}, aliases


def _equal(folder: Folder, a: Stored, b: Stored) -> bool:
    """Whether two matrices are the same, bit by bit; read to the first difference."""
    if len(a.shape) < 2 or (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    pair = [Array(BUFFER, name, a.shape, a.dtype) for name in ("a", "b")]
    pieces = {"buffer/a": a.pieces, "buffer/b": b.pieces}
    source = PieceSource(folder, Contents(0, tuple(pair)), pieces)
    for start, stop in grid(a.shape).shards():
        left, right = (source.read(array, start, stop).view(np.uint8) for array in pair)
        if not np.array_equal(left, right):
            return False
    return True


def _nested(flat: dict[tuple[str | int, ...], Any], note: Note) -> dict[str, Any]:
    """Nested dicts from the path of every value, as JSON."""
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        place = nested
        for part in path[:-1]:
            place = place.setdefault(str(part), {})
        place[str(path[-1])] = carried(value, ".".join(map(str, path)), note)
    return nested


# ---- writing


def name_of(contents: Contents) -> str:
    """Right into the directory that is given."""
    return ""


def plan(source: Source, directory: Path, wanted: Wanted) -> list[Item]:
    """A file for each rank that FSDP2 would have, cut as it cuts; any number of ranks loads it."""
    return distcp.plan_shards(directory, list(_entries(source)), wanted.ranks)


def _entries(source: Source) -> Iterator[Entry]:
    contents = source.contents
    for array in contents.arrays:
        fill = partial(source.read, array)
        yield Entry(_path(array), array=array, fill=fill, whole=array.role == BUFFER)
    tensors = {a.name: a for a in contents.arrays if a.role in (PARAM, *UNTRAINED)}
    for alias, name in contents.aliases.items():  # FSDP2 loads it under every name
        array, fill = tensors[name], partial(source.read, tensors[name])
        yield Entry(("model", alias), array=array, fill=fill, whole=array.role == BUFFER)
    counter = Array("step", "step", (), "float32")
    for index, group in enumerate(contents.groups):
        for name in group.names:
            for role, value in group.scalars.items():
                fill = partial(_number_of, value)
                yield Entry(("optim", "state", name, role), array=counter, fill=fill)
        given = ADAMW if "exp_avg_sq" in contents.optimizer_roles else {}
        hyper = given | from_json(group.hyper) | {"params": list(group.names)}
        for key, value in hyper.items():
            typed = tuple(value) if key == "betas" and isinstance(value, list) else value
            yield Entry(("optim", "param_groups", index, key), typed)
    told = {"lr_scheduler": contents.facts.get("lr_scheduler")}
    told = {**(contents.facts.get("client_state") or {}), **{k: v for k, v in told.items() if v}}
    yield from (Entry(path, value) for path, value in _flat((), from_json(told)))
    yield Entry((NOTE,), distcp.noted(contents))


def _number_of(value: float, start: int, stop: int) -> Values:
    return np.full(stop - start, value, np.float32)


def _flat(path: tuple[str, ...], value: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The values in nested dicts, with their paths."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _flat((*path, str(key)), part)
    elif path:
        yield path, value
