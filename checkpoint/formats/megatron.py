"""Megatron-Core's torch_dist checkpoints: shards as in `distcp`, with Megatron's own names.

A model's tensors have their names, layers stacked along a first axis; the optimizer's are
optimizer.state.<role>.<name>, with fp32_param for the master; the rest is in `common.pt`. Which
parameters are in which group is not stored: with one group, or two of which one has no weight
decay, Megatron's own rule (no decay for biases and vectors) tells, otherwise it stays open.
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from re import fullmatch, search
from typing import Any

from outlast.checkpoint.contents import BUFFER, FROZEN, PARAM, UNTRAINED, Array, Contents, Group
from outlast.checkpoint.dtypes import Values, cast
from outlast.checkpoint.formats import distcp, torch_zip
from outlast.checkpoint.formats.distcp import NOTE, Entry, Stored
from outlast.checkpoint.formats.folder import corrupt
from outlast.checkpoint.formats.pieces import PieceSource
from outlast.checkpoint.formats.plain import carried, from_json
from outlast.checkpoint.items import Item, Wanted
from outlast.checkpoint.source import Source
from outlast.cluster.errors import Misuse

LATEST = None
_CONFIG, _COMMON = "metadata.json", "common.pt"
_STATE, _MASTER = "optimizer.state.", "fp32_param"
_BACKENDS = {
    "sharded_backend": "torch_dist", "sharded_backend_version": 1,
    "common_backend": "torch", "common_backend_version": 1,
}  # fmt: skip


def find(path: Path) -> Path | None:
    """The directory of one iteration, or the newest below; None where there is none."""
    found = [path / _CONFIG, *path.glob(f"iter_*/{_CONFIG}")]
    found = [file.parent for file in found if (file.parent / _COMMON).is_file() and file.is_file()]
    return path if path in found else max(found, default=None)


def open(path: Path, follow: bool = False) -> Source:
    """Read the metadata, the common part and the small objects.

    Raises:
        Corrupt: with file and offset.
        Misuse: it is of a kind that is tied to the number of its ranks.
    """
    folder = torch_zip.ZipFolder(path, follow)
    try:
        config = json.loads(folder.read(_CONFIG, 0, min(folder.size(_CONFIG), 1 << 20)))
        backend = config["sharded_backend"]
    except (ValueError, LookupError, TypeError, RecursionError) as cause:
        raise corrupt(path / _CONFIG, 0, f"not Megatron's ({cause})") from cause
    if backend != "torch_dist":
        raise Misuse(f"{path} is in Megatron's format {backend!r}: save it as torch_dist")
    common, shards = torch_zip.read(folder, _COMMON), distcp.read_shards(folder)
    if not isinstance(common, dict):
        raise corrupt(path / _COMMON, 0, "not Megatron's")
    if any("optimizer.distributed." in key for key in (*shards.tensors, *shards.objects)):
        why = "its optimizer is tied to the ranks that saved it"
        raise Misuse(f"{path}: {why}: save with --dist-ckpt-optim-fully-reshardable")
    tensors = {_unchained(key): stored for key, stored in shards.tensors.items()}
    try:
        if NOTE in common:
            key_of = partial(_key, tensors)
            contents, found = distcp.from_note(path / _COMMON, common[NOTE], tensors, key_of)
        else:
            contents, found = _concluded(common, shards.objects, tensors)
            contents.facts["source"] = {"format": "megatron", "ranks": shards.ranks}
    except (LookupError, TypeError, ValueError, AttributeError) as cause:
        raise corrupt(path / _COMMON, 0, f"what it says makes no sense ({cause!r:.200})") from cause
    return PieceSource(folder, contents, {key: stored.pieces for key, stored in found.items()})


def _unchained(key: str) -> str:
    """Without the number of an optimizer among several, which have different parameters."""
    return key[key.index(_STATE) :] if fullmatch(rf"chained_\d+\.{_STATE}.*", key) else key


def _key(tensors: dict[str, Stored], array: Array) -> str:
    """What Megatron names an array."""
    role = _MASTER if array.role == PARAM else array.role
    key = f"{_STATE}{role}.{array.name}"
    return array.name if array.role in UNTRAINED or key not in tensors else key


def _concluded(
    common: dict[str, Any], objects: dict[str, Any], tensors: dict[str, Stored]
) -> tuple[Contents, dict[str, Stored]]:
    """What a checkpoint means, and the tensor of every array."""
    weights = {key: stored for key, stored in tensors.items() if not key.startswith(_STATE)}
    state = [key.removeprefix(_STATE).split(".", 1) for key in tensors if key.startswith(_STATE)]
    trained = {name for _, name in state} or {n for n, s in weights.items() if "float" in s.dtype}
    found: dict[Array, Stored] = {}
    for name in (*weights, *sorted(trained - weights.keys())):
        kind = FROZEN if name in weights and "float" in weights[name].dtype else BUFFER
        stored = tensors.get(f"{_STATE}{_MASTER}.{name}") or weights.get(name)
        if stored:
            role = PARAM if name in trained else kind
            found[Array(role, name, stored.shape, stored.dtype)] = stored
    params = [array for array in found if array.role == PARAM]
    for role in dict.fromkeys(role for role, _ in state if role != _MASTER):
        for name in (array.name for array in params):
            if stored := tensors.get(f"{_STATE}{role}.{name}"):
                found[Array(role, name, stored.shape, stored.dtype)] = stored
    roles = list(dict.fromkeys(array.role for array in found if array.role not in UNTRAINED))
    order = [PARAM, *(role for role in roles if role != PARAM), *UNTRAINED]
    arrays = sorted(found, key=lambda array: order.index(array.role))
    groups, left_out = _groups(common, params)
    facts, left = _facts(common, objects)
    dtype = next((weights[a.name].dtype for a in params if a.name in weights), "float32")
    step = int(max((g.scalars["step"] for g in groups if "step" in g.scalars),
                   default=common.get("iteration", 0)))  # fmt: skip
    contents = Contents(
        step, tuple(arrays), groups, dtype, facts=facts, left_out=(*left_out, *left)
    )
    return contents, {array.key: stored for array, stored in found.items()}


def _optimizer(common: dict[str, Any]) -> dict[str, Any]:
    """The dict that has the groups: of an optimizer, or of the one that it wraps."""
    optimizer = common.get("optimizer")
    while isinstance(optimizer, dict) and isinstance(optimizer.get("optimizer"), dict):
        optimizer = optimizer["optimizer"]
    return optimizer if isinstance(optimizer, dict) else {}


def _groups(common: dict[str, Any], params: list[Array]) -> tuple[tuple[Group, ...], list[str]]:
    """The parameter groups; and what could not be told."""
    told = _optimizer(common).get("param_groups") or []
    state = _optimizer(common).get("state")
    step = state.get("common_step") if isinstance(state, dict) else None
    scalars = [{"step": float(s)} if isinstance(s := group.get("step", step), int | float) else {}
               for group in told]  # fmt: skip
    hypers = [
        {k: list(v) if isinstance(v, tuple) else v for k, v in group.items()} for group in told
    ]
    left_out: list[str] = []
    hypers = [
        carried({k: v for k, v in h.items() if k not in ("params", "step")}, f"group {i}",
                left_out.append)
        for i, h in enumerate(hypers)
    ]  # fmt: skip
    flat = [group.get("weight_decay") == 0 or group.get("wd_mult") == 0 for group in told]
    if len(told) == 1:
        names = [tuple(array.name for array in params)]
    elif sorted(flat) == [False, True]:
        names = [tuple(a.name for a in params if _is_vector(a) == is_flat) for is_flat in flat]
    else:
        open_ = f"which parameters are in which of {len(told)} groups, which Megatron does not save"
        return (), [open_] if told else []
    return tuple(map(Group, names, hypers, scalars)), left_out


def _is_vector(array: Array) -> bool:
    """Whether Megatron does not let it decay: see its no_weight_decay_cond."""
    stacked = bool(search(r"\.layers\.(?!\d)", array.name))
    return array.name.endswith(".bias") or len(array.shape) - stacked == 1


def _facts(common: dict[str, Any], objects: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What else there is, as JSON; and what has tensors, which has no place."""
    left_out: list[str] = []
    kept = {
        place: {str(key): carried(value, f"{key} of {place}", left_out.append)
                for key, value in values.items()}
        for place, values in (("common", common), ("objects", objects))
    }  # fmt: skip
    facts = {"megatron": kept, "lr_scheduler": kept["common"].get("opt_param_scheduler")}
    return {key: value for key, value in facts.items() if value}, left_out


# ---- writing


def name_of(contents: Contents) -> str:
    """As Megatron names an iteration."""
    return f"iter_{contents.step:07}"


def plan(source: Source, directory: Path, wanted: Wanted) -> list[Item]:
    """Shards in `wanted.ranks` files, the common part, and the file that makes it Megatron's."""
    common, config = _common(source.contents), json.dumps(_BACKENDS).encode()
    write = lambda tick: torch_zip.write(directory / _COMMON, common, {})  # noqa: E731
    return [
        *distcp.plan_shards(directory, list(_entries(source)), wanted.ranks),
        Item(_COMMON, 0, write),
        Item(_CONFIG, len(config), partial(distcp.put, directory / _CONFIG, config)),
    ]


def _entries(source: Source) -> Iterator[Entry]:
    contents = source.contents
    for array in contents.arrays:
        fill, path = partial(source.read, array), array.name
        if array.role == PARAM and array.dtype != contents.dtype:
            copy = Array(PARAM, array.name, array.shape, contents.dtype)
            yield Entry((path,), array=copy, fill=partial(_rounded, source, array, copy.dtype))
            path = f"{_STATE}{_MASTER}.{array.name}"
        elif array.role not in (PARAM, *UNTRAINED):
            path = f"{_STATE}{array.role}.{array.name}"
        yield Entry((path,), array=array, fill=fill, whole=array.role == BUFFER)
    objects = contents.facts.get("megatron", {}).get("objects", {})
    yield from (Entry((key,), from_json(value)) for key, value in objects.items())


def _rounded(source: Source, array: Array, dtype: str, start: int, stop: int) -> Values:
    return cast(source.read(array, start, stop), dtype)


def _common(contents: Contents) -> dict[str, Any]:
    """As Megatron saved it, or as its FP32Optimizer and Float16Optimizer would."""
    common = from_json(contents.facts.get("megatron", {}).get("common", {}))
    common |= {"iteration": contents.step, NOTE: distcp.noted(contents)}
    common.setdefault("checkpoint_version", 3.0)
    if not _optimizer(common) and contents.groups:
        made: dict[str, Any] = {}
        master = contents.of(PARAM)[0].dtype != contents.dtype
        common["optimizer"] = {"optimizer": made} if master else made
        made["state"] = {}
    steps = {group.scalars.get("step") for group in contents.groups}
    if contents.groups:
        state = _optimizer(common).setdefault("state", {})
        if len(steps) == 1 and (step := steps.pop()) is not None:
            state["common_step"] = step
        groups = [from_json(group.hyper) for group in contents.groups]
        for group in groups:
            betas = group.get("betas")
            group |= {"betas": tuple(betas)} if isinstance(betas, list) else {}
        _optimizer(common)["param_groups"] = groups
    return common
