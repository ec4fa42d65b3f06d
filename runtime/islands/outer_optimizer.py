"""What Streaming DiLoCo does to the elements of a fragment: send, average, outer step, merge.

Douillard et al., "Streaming DiLoCo with overlapping communication" (2025), Algorithm 2. Everything
is element by element, or from sums per grain that are added exactly; so the bits are the same
however many ranks an island has.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from outlast.checkpoint.records import Role
from outlast.layout.fragments import Rounds
from outlast.layout.run import Run
from outlast.runtime.islands.codec import Codec
from outlast.runtime.islands.rules import grain_grams, total, trimmed_mean, weights
from outlast.runtime.islands.settings import Islands

OUTER_PARAM, OUTER_MOMENTUM, PSEUDOGRADIENT = "outer_param", "outer_momentum", "pseudogradient"
RESIDUAL = "residual"
APPLIED_ROLES, SENT_ROLES = (OUTER_PARAM, OUTER_MOMENTUM), (PSEUDOGRADIENT, RESIDUAL)
OUTER_ROLES = APPLIED_ROLES + SENT_ROLES

Live = Mapping[str, Sequence[Tensor]]  # role -> a view per owned run
Gather = Callable[[bytes], list[bytes]]
Guard = dict[str, Any]


def outer_roles(settings: Islands) -> tuple[str, ...]:
    """Roles that an island has besides those of its inner optimizer, all float32."""
    return OUTER_ROLES if settings.codec == "topk" else OUTER_ROLES[:-1]


def still_roles(rounds: Rounds, delays: Sequence[int], step: int) -> frozenset[str]:
    """Those that the step that makes `step` steps leaves as they are."""
    sent = SENT_ROLES if rounds.sent(step) else ()
    applied = APPLIED_ROLES if rounds.due(step, delays) else ()
    return frozenset(OUTER_ROLES) - {*sent, *applied}


def taken_roles(roles: Sequence[Role], primary: str) -> list[str]:
    """Those that an island takes from another one; it makes the others from these."""
    return [role.name for role in roles if role.name not in (primary, *SENT_ROLES)]


class OuterOptimizer:
    """SGD with Nesterov momentum over the owned runs of a fragment.

    Args:
        primary: role of the parameters that the inner optimizer changes.
    """

    def __init__(self, settings: Islands, codec: Codec, primary: str, grain: int) -> None:
        self._settings, self._codec = settings, codec
        self._primary, self._grain = primary, grain

    def send(self, live: Live, chosen: Sequence[int]) -> None:
        """Note the pseudogradient of the runs `chosen`, as its receivers will decode it."""
        for i in chosen:
            wanted = live[OUTER_PARAM][i] - live[self._primary][i]
            if RESIDUAL in live:  # error feedback: SparseLoCo (2025), equation 1
                wanted += self._settings.feedback * live[RESIDUAL][i]
            sent = self._codec.decode(self._codec.encode(wanted), wanted.numel())
            live[PSEUDOGRADIENT][i].copy_(sent)
            if RESIDUAL in live:
                live[RESIDUAL][i].copy_(wanted - live[PSEUDOGRADIENT][i])

    def average(
        self,
        vectors: Mapping[int, Sequence[Tensor]],
        runs: Sequence[Run],
        units: Sequence[int],
        guard: Guard,
        gather: Gather,
    ) -> tuple[list[Tensor | None], Guard, dict[str, Any]]:
        """What the contributors agree on, per run; None where the rule trusts none of them.

        Args:
            vectors: island -> decoded pseudogradient of every run, in the order of islands.
            units: unit of every run.
            guard: what the rule remembers, by unit.
            gather: bytes of this rank -> bytes of all ranks; a collective.
        Returns:
            the pseudogradients, what the rule remembers now, facts for the log.
        """
        islands = list(vectors)
        if self._settings.rule in ("mean", "trimmed"):
            columns = [[vectors[j][i] for j in islands] for i in range(len(runs))]
            if self._settings.rule == "mean":
                return [_sum(column) / len(islands) for column in columns], guard, {}
            most = (len(islands) - 1) // 2
            return [trimmed_mean(torch.stack(column), most) for column in columns], guard, {}
        grams = self._grams(vectors, runs, units, gather)
        facts: dict[str, Any] = {}
        shares: dict[int, NDArray[np.float64]] = {}
        for unit, gram in sorted(grams.items()):
            known = guard.get(str(unit), {})
            shares[unit], known, told = weights(self._settings.rule, gram, islands, known)
            guard = guard | {str(unit): known}
            if told:
                facts[str(unit)] = told
        found: list[Tensor | None] = []
        for i, unit in enumerate(units):
            rows = [float(shares[unit][n]) * vectors[j][i] for n, j in enumerate(islands)
                    if shares[unit][n]]  # fmt: skip
            found.append(_sum(rows) if rows else None)
        return found, guard, facts

    def _grams(
        self,
        vectors: Mapping[int, Sequence[Tensor]],
        runs: Sequence[Run],
        units: Sequence[int],
        gather: Gather,
    ) -> dict[int, NDArray[np.float64]]:
        """Inner products of all contributions, by unit, the same on every rank."""
        count = len(vectors)
        mine: list[bytes] = []
        for i, (run, unit) in enumerate(zip(runs, units, strict=True)):
            rows = grain_grams([vectors[j][i] for j in vectors], [run], self._grain)
            head = np.array([unit, len(rows)], dtype=np.int64)
            mine.append(head.tobytes() + np.ascontiguousarray(rows, dtype=np.float64).tobytes())
        parts: dict[int, list[NDArray[np.float64]]] = {}
        for payload in gather(b"".join(mine)):
            at = 0
            while at < len(payload):
                unit, grains = np.frombuffer(payload, np.int64, 2, at)
                size = int(grains) * count * count
                rows = np.frombuffer(payload, np.float64, size, at + 16)
                parts.setdefault(int(unit), []).append(rows.reshape(-1, count, count))
                at += 16 + 8 * size
        return {unit: total(np.concatenate(rows)) for unit, rows in parts.items()}

    def apply(
        self, live: Live, chosen: Sequence[int], average: Sequence[Tensor | None], mixing: float
    ) -> None:
        """The outer step on the runs `chosen`, and the merge into the local parameters.

        Args:
            average: None rolls a run back to the outer parameters.
            mixing: alpha, share of the local parameters.
        """
        rate, momentum = self._settings.outer_lr, self._settings.outer_momentum
        for i, delta in zip(chosen, average, strict=True):
            velocity, outer = live[OUTER_MOMENTUM][i], live[OUTER_PARAM][i]
            local = live[self._primary][i]
            if delta is not None:
                velocity.mul_(momentum).add_(delta)
                outer.sub_(rate * (delta + momentum * velocity))
            if mixing and delta is not None:
                local.mul_(mixing).add_((1 - mixing) * outer)
            else:
                local.copy_(outer)


def _sum(rows: Sequence[Tensor]) -> Tensor:
    """In the order of the islands."""
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return total
