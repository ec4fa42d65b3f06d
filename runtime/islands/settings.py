"""How islands exchange what they have learned: the numbers of Streaming DiLoCo.

Douillard et al., "Streaming DiLoCo with overlapping communication" (2025). H, |p|, tau, alpha and
the outer learning rate are theirs; a value for the outer momentum is that of DiLoCo (2023).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from math import inf
from typing import ClassVar, TypeVar

from outlast.cluster.errors import Misuse
from outlast.layout.fragments import ORDERS, STRIDED

T = TypeVar("T")

CODECS = ("e3m0", "int8", "none", "topk")
RULES = ("mean", "edit", "trimmed", "median")


@dataclass(frozen=True, slots=True, kw_only=True)
class Islands:
    """Settings of the exchange, the same on all islands but for `delay` and `patience_s`; ORDERS,
    CODECS and RULES are what there is to choose from.

    Args:
        every: H, steps between two exchanges of one fragment.
        fragment: units (transformer blocks, embedding, head) of one fragment, at most.
        order: "strided" (every n-th unit) or "sequential" (neighbours) in one fragment.
        delay: tau, steps of training from sending to applying, for which the exchange may take;
            one number, one of each fragment, or island -> number.
        mixing: alpha, share of the local parameters where the outer ones are merged into them; one
            number or one of each fragment.
        outer_lr, outer_momentum: of the outer optimizer, SGD with Nesterov momentum.
        codec: of what is sent: "e3m0" (4 bit), "int8", "none" (float32), "topk" (SparseLoCo).
        rule: how what was received is averaged: "mean", "edit" (outliers are left out), "trimmed",
            "median" (for islands that nobody trusts).
        feedback: beta of the error feedback, with codec "topk" only.
        patience_s: how long to wait for an island that is in reach and does not come.
        record: directory where all that is averaged is kept, of each island in "islandIofN".
        replay: such a directory of one island, which is to be trained once more on what it has
            received then; other islands are not listened to.
    Raises:
        Misuse: a setting cannot work.
    """

    ORDERS: ClassVar[tuple[str, ...]] = ORDERS
    CODECS: ClassVar[tuple[str, ...]] = CODECS
    RULES: ClassVar[tuple[str, ...]] = RULES

    every: int = 30
    fragment: int = 3
    order: str = STRIDED
    delay: int | Sequence[int] | Mapping[int, int] = 1
    mixing: float | Sequence[float] = 0.0
    outer_lr: float = 0.4
    outer_momentum: float = 0.9
    codec: str = "e3m0"
    rule: str = "mean"
    feedback: float = 0.95
    patience_s: float = 30.0
    record: str = ""
    replay: str = ""

    def __post_init__(self) -> None:
        self._check_types()
        delays = self.delay.values() if isinstance(self.delay, Mapping) else _several(self.delay)
        demands = (
            (self.every >= 1, f"every={self.every}: use 1 or more steps"),
            (self.fragment >= 1, f"fragment={self.fragment}: use 1 or more units"),
            (self.order in ORDERS, f"order={self.order!r}: use one of {', '.join(ORDERS)}"),
            (all(0 <= delay < self.every for delay in delays),
             f"delay={self.delay}: use 0 or more steps, less than every={self.every}"),
            (all(0 <= share <= 1 for share in _several(self.mixing)),
             f"mixing={self.mixing}: use 0 (the outer parameters) to 1 (the local ones)"),
            (0 < self.outer_lr < inf, f"outer_lr={self.outer_lr}: use more than 0"),
            (0 <= self.outer_momentum < 1, f"outer_momentum={self.outer_momentum}: use [0, 1)"),
            (self.codec in CODECS, f"codec={self.codec!r}: use one of {', '.join(CODECS)}"),
            (self.rule in RULES, f"rule={self.rule!r}: use one of {', '.join(RULES)}"),
            (0 <= self.feedback <= 1, f"feedback={self.feedback}: use 0 to 1"),
            (self.patience_s >= 0, f"patience_s={self.patience_s}: use 0 or more seconds"),
        )  # fmt: skip
        for holds, complaint in demands:
            if not holds:
                raise Misuse(f"Islands({complaint})")

    def _check_types(self) -> None:
        delay, names = self.delay, ("outer_lr", "outer_momentum", "feedback", "patience_s")
        delays = [*delay, *delay.values()] if isinstance(delay, Mapping) else _several(delay)
        whole = {"every": [self.every], "fragment": [self.fragment], "delay": delays}
        real = {name: [getattr(self, name)] for name in names} | {"mixing": _several(self.mixing)}
        for name, values in {**whole, **real}.items():
            kinds, noun = (int, "whole numbers") if name in whole else ((int, float), "numbers")
            if not all(isinstance(value, kinds) and type(value) is not bool for value in values):
                raise Misuse(f"Islands({name}={getattr(self, name)!r}): use {noun}")

    def common(self, model: str) -> str:
        """A name for what all islands must have in common, and for the model they start from."""
        names = ("every", "fragment", "order", "mixing", "outer_lr", "outer_momentum", "codec",
                 "rule", "feedback")  # fmt: skip
        text = f"{model} {[getattr(self, name) for name in names]}"
        return sha256(text.encode()).hexdigest()[:16]

    def delays(self, island: int, fragments: int, islands: int) -> tuple[int, ...]:
        """tau of each fragment on `island` of `islands`; raises Misuse on all of them alike."""
        delay = self.delay
        if isinstance(delay, Mapping):
            if missing := [str(each) for each in range(islands) if each not in delay]:
                raise Misuse(
                    f"Islands(delay={dict(delay)}): says nothing of island {', '.join(missing)}"
                )
            delay = delay[island]
        return _each(delay, fragments, "delay")

    def mixings(self, fragments: int) -> tuple[float, ...]:
        """alpha of each fragment."""
        return _each(self.mixing, fragments, "mixing")


def _several(value: T | Sequence[T]) -> Sequence[T]:
    return value if isinstance(value, Sequence) else [value]


def _each(value: T | Sequence[T], fragments: int, name: str) -> tuple[T, ...]:
    if not isinstance(value, Sequence):
        return (value,) * fragments
    if len(value) != fragments:
        raise Misuse(f"Islands({name}={list(value)}): the model has {fragments} fragments")
    return tuple(value)
