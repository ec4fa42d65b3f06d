"""What a checkpoint of any format holds, as plain values: arrays by role and name, groups, facts.

Every format is read into this and written from it, so N formats need N readers and N writers. An
array is named by its role and its tensor: `param` is the value at its highest precision (the fp32
master of a bf16 model); the other trained roles (`exp_avg`, ...) are the optimizer's and have the
tensor's shape; `frozen` and `buffer` are what is not trained.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from math import isfinite, prod
from typing import Any, Self

PARAM, FROZEN, BUFFER = "param", "frozen", "buffer"
UNTRAINED = (FROZEN, BUFFER)


@dataclass(frozen=True, slots=True)
class Array:
    """One tensor in one role; `dtype` is a bare name, as in "float32" or "bfloat16"."""

    role: str
    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """Elements; a scalar has one."""
        return prod(self.shape)

    @property
    def key(self) -> str:
        """Names it in manifests and messages."""
        return f"{self.role}/{self.name}"


@dataclass(frozen=True, slots=True)
class Group:
    """A parameter group of the optimizer.

    Args:
        names: its trained parameters, in the optimizer's order.
        hyper: lr, betas, weight_decay, ...: JSON values under the names of torch.optim.
        scalars: what the optimizer keeps per tensor as one number, equal for all `names`: "step".
    """

    names: tuple[str, ...]
    hyper: dict[str, Any]
    scalars: dict[str, float]


@dataclass(frozen=True)
class Contents:
    """Everything but the values.

    Args:
        step: committed optimizer steps.
        arrays: all of a role together, `param` first, in the model's order.
        groups: every `param` is in one.
        dtype: of the working parameters that forward and backward use.
        aliases: tied parameters: other name -> name that has the arrays.
        facts: what else the source says, JSON: "lr_scheduler", "client_state", "ds_config", ...
        run: what only outlast says of a run (seed, leaves, losses, lineage, ...); {} elsewhere.
        left_out: what the source has and this cannot carry, one sentence each: never silently.
    """

    step: int
    arrays: tuple[Array, ...]
    groups: tuple[Group, ...] = ()
    dtype: str = "float32"
    aliases: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    @cached_property
    def by_key(self) -> dict[str, Array]:
        """Arrays by key."""
        return {array.key: array for array in self.arrays}

    def of(self, role: str) -> tuple[Array, ...]:
        """Arrays of a role, in the model's order."""
        return tuple(array for array in self.arrays if array.role == role)

    @property
    def optimizer_roles(self) -> tuple[str, ...]:
        """Per-element state of the optimizer, in order."""
        roles = dict.fromkeys(array.role for array in self.arrays)
        return tuple(role for role in roles if role not in (PARAM, *UNTRAINED))

    def flaws(self) -> Iterable[str]:
        """What contradicts itself, one sentence each; nothing for what can be used."""
        if len(self.by_key) != len(self.arrays):
            yield "two arrays of one role and name"
        if not 0 <= self.step < 2**63:
            yield f"its step is {self.step:.4g}"
        shapes = {array.name: array.shape for array in self.of(PARAM)}
        for array in self.arrays:
            if array.role not in UNTRAINED and shapes.get(array.name) != array.shape:
                yield f"{array.key} {array.shape} is not of a parameter's shape"
            if any(size < 0 for size in array.shape):
                yield f"{array.key} has the shape {array.shape}"
        names = [name for group in self.groups for name in group.names]
        if len(set(names)) != len(names) or (names and set(names) != set(shapes)):
            yield "the parameter groups do not hold every parameter once"
        held = {array.name for array in self.arrays}
        yield from (f"{a} is tied to {n}, which is not there" for a, n in self.aliases.items()
                    if n not in held)  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """As JSON values; `from_json` reads it back."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        arrays = [[a.role, a.name, list(a.shape), a.dtype] for a in self.arrays]
        return plain | {"arrays": arrays, "groups": [asdict(group) for group in self.groups]}

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Self:
        """What `as_json` described.

        Raises:
            ValueError, TypeError, KeyError, ArithmeticError: it is anything else.
        """
        arrays = tuple(
            Array(str(role), str(name), tuple(map(int, shape)), str(dtype))
            for role, name, shape, dtype in plain["arrays"]
        )
        groups = tuple(
            Group(tuple(map(str, g["names"])), dict(g["hyper"]), _numbers(g["scalars"]))
            for g in plain["groups"]
        )
        typed: dict[str, Any] = {"arrays": arrays, "groups": groups}
        typed |= {"step": int(plain["step"]), "dtype": str(plain["dtype"])}
        typed["left_out"] = tuple(map(str, plain["left_out"]))
        typed |= {name: dict(plain[name]) for name in ("aliases", "facts", "run")}
        for name in _DICTS & typed["facts"].keys():
            typed["facts"][name] = dict(typed["facts"][name] or {})
        return cls(**(plain | typed))


_DICTS = {"client_state", "ds_config", "loss_scaler", "megatron", "source",
          "universal_checkpoint_info"}  # fmt: skip


def _numbers(told: dict[str, Any]) -> dict[str, float]:
    """Numbers by name: what a counter of an optimizer can be."""
    for name, value in told.items():
        if not isinstance(value, int | float) or not isfinite(value):
            raise ValueError(f"{name} is {value!r:.99}, which is no number")
    return dict(told)
