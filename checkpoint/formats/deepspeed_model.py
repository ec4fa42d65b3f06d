"""DeepSpeed's `*_model_states.pt`: shapes and order of what is trained, what is not, and facts."""

from collections.abc import Collection
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from outlast.checkpoint.contents import PARAM, Array
from outlast.checkpoint.formats.folder import Folder, corrupt
from outlast.checkpoint.formats.pickles import Opaque, TensorRef
from outlast.checkpoint.formats.plain import Note, carried, plain
from outlast.checkpoint.formats.torch_zip import read
from outlast.cluster.errors import Corrupt, Misuse

Shape = tuple[int, ...]
Shapes = dict[str, Shape]

# What DeepSpeed itself puts at the top of the file; the rest is the user's client_state.
_OWN = frozenset([
    "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes",
    "frozen_param_fragments", "shared_params", "lr_scheduler", "data_sampler", "random_ltd",
    "sparse_tensor_module_names", "csr_tensor_module_names", "skipped_steps", "global_steps",
    "global_samples", "dp_world_size", "mp_world_size", "checkpoint_parallel_dimensions",
    "ds_config", "ds_version", "universal_checkpoint_info", "num_experts", "ds_autoep_layers",
    "ds_autoep_folding",
])  # fmt: skip
_TOLD = (
    "lr_scheduler", "ds_config", "ds_version", "universal_checkpoint_info", "global_samples",
    "skipped_steps",
)  # fmt: skip
_MISSING: Any = object()


class State:
    """A dict of a file; what is missing there, or of another type, is Corrupt.

    Args:
        where: the file.
        values: what was read from it.
        name: of the file in its directory.
    """

    def __init__(self, where: Path | str, values: Any, name: str = "") -> None:
        if not isinstance(values, dict):
            raise corrupt(where, 0, f"a {type(values).__name__} where a dict is expected")
        self.where, self.values, self.name = where, values, name

    def get(self, key: Any, *kinds: type, default: Any = _MISSING) -> Any:
        """The value of a key; `default`, if there is one, also where the value is None."""
        value = self.values.get(key)
        if value is None and default is not _MISSING:
            return default
        if not isinstance(value, kinds):
            raise self.wrong(f"{key} is a {type(value).__name__}, not a {kinds[0].__name__}")
        return value

    def state(self, key: Any) -> "State":
        """The dict of a key."""
        return State(self.where, self.get(key, dict), self.name)

    def tensors(self, key: str) -> dict[str, TensorRef]:
        """The tensors in the dict of a key by name, in order; {} for None."""
        values = self.get(key, dict, default={})
        return {str(name): t for name, t in values.items() if isinstance(t, TensorRef)}

    def shapes(self, values: Any) -> Shapes:
        """A dict of shapes."""
        if not isinstance(values, dict):
            raise self.wrong("shapes that are no dict")
        for name, shape in values.items():
            fits = isinstance(name, str) and isinstance(shape, tuple) and len(shape) <= 64
            if not fits or any(not isinstance(n, int) or not 0 <= n < 2**63 for n in shape):
                raise self.wrong(f"{str(shape)[:99]} as the shape of {str(name)[:99]}")
        return {name: tuple(shape) for name, shape in values.items()}

    def wrong(self, why: str) -> Corrupt:
        """The error that names this file."""
        return corrupt(self.where, 0, why)


@dataclass(frozen=True, slots=True)
class Model:
    """What the model file of one rank says."""

    state: State
    module: dict[str, TensorRef]
    trained: list[Shapes]
    frozen: Shapes
    fragments: dict[str, TensorRef]
    aliases: dict[str, str]
    buffers: tuple[str, ...]

    @classmethod
    def read(cls, folder: Folder, name: str) -> "Model":
        """Read a file.

        Raises:
            Corrupt: it is damaged, or is none.
            Misuse: it has what this cannot read: mixtures of experts.
        """
        state = State(folder.path / name, read(folder, name), name)
        if any(state.values.get(key) for key in ("ds_autoep_layers", "ds_autoep_folding")):
            raise Misuse(f"{state.where} has experts, which cannot be converted yet")
        module = state.tensors("module")
        trained = [state.shapes(group) for group in state.get("param_shapes", list, default=[])]
        buffers = tuple(str(name) for name in state.get("buffer_names", list, default=[]))
        if missing := [name for name in buffers if name not in module]:
            raise state.wrong(f"the module has no buffer {missing[0][:99]}")
        known = {name for group in trained for name in group}
        shared = state.get("shared_params", dict, default={})
        aliases = {str(a): str(n) for a, n in shared.items() if a not in known}
        rest = {name: ref for name, ref in module.items() if name not in aliases}
        aliases |= _same(rest, {*known, *buffers})
        frozen = state.shapes(state.get("frozen_param_shapes", dict, default={}))
        fragments = state.tensors("frozen_param_fragments")
        return cls(state, module, trained, frozen, fragments, aliases, buffers)

    @property
    def rest(self) -> dict[str, TensorRef]:
        """Of the module, what is not trained, no buffer and no alias."""
        known = {*self.buffers, *self.aliases, *(name for group in self.trained for name in group)}
        return {name: ref for name, ref in self.module.items() if name not in known}

    def ordered(self, arrays: Collection[Array]) -> tuple[Array, ...]:
        """Arrays by role, then in the model's order."""
        roles = [*dict.fromkeys([PARAM, *(array.role for array in arrays)])]
        place = {name: index for index, name in enumerate(self.module)}
        last = len(place)
        return tuple(sorted(arrays, key=lambda a: (roles.index(a.role), place.get(a.name, last))))

    def tensor(self, name: str) -> TensorRef:
        """A tensor of the module; Corrupt where it is not there."""
        if name not in self.module:
            raise self.state.wrong(f"the module has no {name[:99]}")
        return self.module[name]

    def fragment(self, name: str) -> TensorRef:
        """This rank's part of a frozen parameter; Corrupt where it is not there."""
        if name not in self.fragments:
            raise self.state.wrong(f"frozen_param_fragments have no {name[:99]}")
        return self.fragments[name]

    def facts(self, note: Note) -> dict[str, Any]:
        """What `Contents.facts` has of it; what has no place there is noted."""
        values = self.state.values
        for key in ("data_sampler", "random_ltd"):
            if values.get(key) is not None:
                note(f"{key}: what DeepSpeed's own data loading keeps")
        for name in self.state.get("module", dict, default={}):
            if str(name) not in self.module:
                note(f"the module's {name}, which is no tensor (load_module_strict=False)")
        told = {key: values.get(key) for key in _TOLD}
        told["client_state"] = {key: value for key, value in values.items() if key not in _OWN}
        return {k: carried(value, k, note) for k, value in told.items() if value is not None}


def _same(module: dict[str, TensorRef], known: set[str]) -> dict[str, str]:
    """Names that have the elements of another: tied, in a file that does not say so."""
    first: dict[Any, str] = {}
    tied = {}
    for name in sorted(module, key=lambda name: name not in known):
        ref = module[name]
        owner = first.setdefault((ref.key, ref.start, ref.shape), name)
        if owner != name and name not in known and ref.numel:
            tied[name] = owner
    return tied


def loss_scaler(value: Any) -> dict[str, Any] | None:
    """A LossScaler of DeepSpeed in JSON: its class and its attributes."""
    if not isinstance(value, Opaque) or not isinstance(value.state, dict):
        return None
    return {"class": value.name.rpartition(".")[2], **plain(value.state, "", lambda text: None)}


def numel(shapes: Shapes) -> dict[str, int]:
    """Elements of each."""
    return {name: prod(shape) for name, shape in shapes.items()}
