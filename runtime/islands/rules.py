"""How the contributions of several islands become one: a mean, EDiT's guard, two robust means.

A rule other than the trimmed mean is linear: it answers with a weight for every contribution, and
needs of the contributions x_i no more than their Gram matrix <x_i, x_j>, which holds all norms and
distances. Of a unit of millions of elements that is M x M numbers, so one small collective serves
all rules, and the ranks of an island agree without ever holding a whole unit.

mean      1/M of each.
edit      EDiT (Cheng et al. 2024), see `_edit`: outliers are left out, small norms preferred.
trimmed   coordinate by coordinate without the lowest and the highest (Yin et al. 2018).
median    geometric median, by Weiszfeld's iteration on the weights (Pillutla et al. 2022).

Invariant: the same contributions give the same bits on every island, however many ranks and
whatever processors it has. Sums are therefore exact (`fsum`), or a tree of fixed shape, or one
addition after the other; products and sums are never fused; exp() is rounded correctly, which
that of a C library is not. A contribution that is not finite has weight 0 under every rule.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from decimal import Context, Decimal
from itertools import combinations_with_replacement
from math import fsum, isfinite, sqrt
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from outlast.layout.run import Run

Gram = NDArray[np.float64]
Facts = dict[str, Any]

_BLOCK = 1 << 20  # elements whose products are held at once
_ITERATIONS = 64  # of Weiszfeld's; one far away loses about half its weight in each
_RATE = 0.02  # of the detector's moving means (EDiT: alpha)
_DEVIATIONS = 3.0  # from which on a norm is an outlier (EDiT: delta)
_CLIP = 10.0  # a mean is this many times as long as usual at most (EDiT: phi, in absolute terms)
_WARM_UP = 16  # rounds without judgement: half a thousand steps with H = 30
_ROUNDED = Context(prec=25)


def grain_grams(vectors: Sequence[Tensor], runs: Sequence[Run], grain: int) -> Gram:
    """Inner products of M vectors over every grain of `runs`: float64 [grains, M, M].

    A float64 holds the product of two float32 exactly, and halves are added to halves, so that
    the bits are the same on every device and for every cut.

    Args:
        vectors: M tensors float32 [sum of runs], in address order.
        runs: plain, cut at unit borders, so that each starts at a grain.
    """
    found = [np.zeros((0, len(vectors), len(vectors)))]
    at, step = 0, max(_BLOCK // grain, 1) * grain
    for run in runs:
        for start in range(at, at + run.length, step):
            stop = min(start + step, at + run.length)
            rows = [
                torch.nn.functional.pad(v[start:stop].double(), (0, (start - stop) % grain))
                for v in vectors
            ]
            gram = torch.empty(
                (-(-(stop - start) // grain), len(rows), len(rows)), dtype=torch.float64
            )
            for i, j in combinations_with_replacement(range(len(rows)), 2):
                sums = _sum_of_halves((rows[i] * rows[j]).view(-1, grain))
                gram[:, i, j] = gram[:, j, i] = sums.cpu()
            found.append(gram.numpy())
        at += run.length
    return np.concatenate(found)


def _sum_of_halves(values: Tensor) -> Tensor:
    """The sum of each row, by a tree; `values` are overwritten."""
    width = values.shape[1]
    while width > 1:
        half = width // 2
        values[:, :half] += values[:, width - half : width]
        width -= half
    return values[:, 0]


def total(grams: Gram) -> Gram:
    """The Gram matrix of a unit from those of all its grains [grains, M, M], in any order: the sum
    is exact."""
    count = grams.shape[1]
    found = np.zeros((count, count))
    for i, j in combinations_with_replacement(range(count), 2):
        column = grams[:, i, j]
        found[i, j] = found[j, i] = fsum(column) if np.isfinite(column).all() else np.nan
    return found


def weights(
    rule: str, gram: Gram, islands: Sequence[int], guard: dict[str, Any]
) -> tuple[NDArray[np.float64], dict[str, Any], Facts]:
    """What the contributions of `islands` to one unit count.

    Args:
        gram: float64 [M, M] of the whole unit.
        islands: their numbers, ascending.
        guard: JSON, what this rule has learned of this unit; {} at first. It is checked.
    Returns:
        weights float64 [M]; the new guard; facts for the event log: which islands are "broken"
        (not finite), "anomalous", "outlying", how far the mean was "clipped". Weights that sum to
        0 say that nobody's can be used: the unit goes back to the outer parameters.
    """
    gram = np.asarray(gram, dtype=np.float64)
    # The products of two that are finite are finite: nobody can spoil the row of another.
    sound = [i for i in range(len(islands)) if isfinite(gram[i, i])]
    facts: Facts = {}
    if len(sound) < len(islands):
        facts["broken"] = [number for i, number in enumerate(islands) if i not in sound]
    found = np.zeros(len(islands))
    if sound:
        part, numbers = gram[np.ix_(sound, sound)], [islands[i] for i in sound]
        if rule == "edit":
            found[sound], guard, told = _edit(part, numbers, guard)
            facts |= told
        elif rule == "median":
            found[sound], told = _median(part, numbers)
            facts |= told
        else:
            found[sound] = 1 / len(sound)
    if not found.any():
        facts["rolled_back"] = True
    return found, guard, facts


# ---- trimmed mean


def trimmed_mean(vectors: Tensor, f: int) -> Tensor:
    """Mean of each coordinate without its f lowest and f highest values: [M, n] -> [n].

    Values that are not finite are among those; where there are more of them than f, the result is
    0: the coordinate stays where it is.
    """
    count = len(vectors)
    if not 0 <= 2 * f < count:
        raise ValueError(f"{2 * f} of {count} values cannot be dropped")
    middle = vectors.sort(dim=0).values[f : count - f]  # NaN is sorted behind infinity
    mean = middle[0].double()
    for row in middle[1:]:
        mean += row
    mean = (mean / len(middle)).to(vectors.dtype)
    return torch.where(mean.isfinite(), mean, torch.zeros_like(mean))


# ---- geometric median


def _median(gram: Gram, islands: Sequence[int]) -> tuple[list[float], Facts]:
    """Weights of the point with the least sum of distances to the contributions.

    The point is always some sum of c_j x_j with weights of sum 1, and its squared distance to x_i
    is sum_j c_j D_ij - 1/2 sum_jk c_j c_k D_jk, where D are the squared distances between the x.
    Who is a million times as far from the others as is usual is left out: their distance would
    drown the others' in rounding, and take as many iterations to forget as it has digits.
    """
    count, norms = len(gram), np.diagonal(gram)
    apart = np.maximum(norms[:, None] + norms[None, :] - 2 * gram, 0.0)
    reach = [sqrt(sorted(row)[count // 2]) for row in apart.tolist()]
    middle = _middle(reach)
    near = [i for i, distance in enumerate(reach) if distance <= 1e6 * middle]
    table = apart[np.ix_(near, near)].tolist()
    least = 1e-6 * middle or 1.0  # next to a contribution the iteration would not move on
    shares = [1 / len(near)] * len(near)
    for _ in range(_ITERATIONS):
        toward = [_inner(shares, row) for row in table]
        inner = _inner(shares, toward) / 2
        shares = _shares([1 / max(sqrt(max(t - inner, 0.0)), least) for t in toward])
    found = [0.0] * count
    for i, share in zip(near, shares, strict=True):
        found[i] = share
    outlying = [islands[i] for i in range(count) if found[i] < 0.25 / count]
    return found, {"outlying": outlying} if outlying else {}


def _inner(a: Sequence[float], b: Sequence[float]) -> float:
    return fsum(x * y for x, y in zip(a, b, strict=True))


def _shares(parts: Sequence[float]) -> list[float]:
    whole = fsum(parts)
    return [part / whole for part in parts]


def _middle(values: Sequence[float]) -> float:
    """The lower median: of two norms the smaller one, which nobody can raise alone."""
    return sorted(values)[(len(values) - 1) // 2]


# ---- EDiT


@dataclass(frozen=True, slots=True)
class _Trace:
    """Moving mean and variance of a norm, and of how unusual it was (z, in deviations).

    EDiT keeps the last 120 z to know their deviation; a moving variance does as well and is one
    number. The first 1 / _RATE values count alike, so that a young mean is not drawn to zero.
    """

    rounds: int = 0
    mean: float = 0.0
    variance: float = 0.0
    z_mean: float = 0.0
    z_variance: float = 0.0

    @classmethod
    def of(cls, told: Any) -> Self:
        """From a guard, which may be another island's: what cannot be is as good as nothing."""
        if not (isinstance(told, list) and len(told) == 5 and type(told[0]) is int):
            return cls()
        numbers = all(type(value) in (int, float) and abs(value) < 1e100 for value in told)
        return cls(*told) if numbers and min(told[0], told[2], told[4]) >= 0 else cls()

    def told(self) -> list[float]:
        """For a guard."""
        return list(astuple(self))

    @property
    def judges(self) -> bool:
        return self.rounds >= _WARM_UP and self.variance > 0

    def z(self, norm: float) -> float:
        return (norm - self.mean) / sqrt(self.variance) if self.judges else 0.0

    @property
    def limit(self) -> float:
        """The z from which on a norm is an outlier."""
        return _DEVIATIONS * max(1.0, sqrt(self.z_variance))

    def after(self, norm: float) -> Self:
        """With one more norm. An outlier counts as much as the largest norm that is none: one does
        not hide the next, and a norm that stays ten times as large is usual after 20 rounds."""
        z = self.z(norm)
        if z > self.limit:
            norm, z = self.mean + self.limit * sqrt(self.variance), self.limit
        rounds = self.rounds + 1
        rate = max(_RATE, 1 / rounds)
        mean, variance = _moved(self.mean, self.variance, norm, rate)
        return type(self)(rounds, mean, variance, *_moved(self.z_mean, self.z_variance, z, rate))


def _moved(mean: float, variance: float, value: float, rate: float) -> tuple[float, float]:
    """Exponentially weighted mean and variance after one more value (Finch 2009, eq. 143)."""
    apart = value - mean
    return mean + rate * apart, (1 - rate) * (variance + rate * apart * apart)


def _edit(
    gram: Gram, islands: Sequence[int], guard: dict[str, Any]
) -> tuple[list[float], dict[str, Any], Facts]:
    """EDiT's pseudo-gradient penalty for one unit.

    1. A norm that is 3 deviations above what this island usually has is anomalous: weight 0.
    2. The others get softmax(-norm). Norms grow with the square root of the size of a unit, and
       exp(-100) leaves only the smallest; here they are divided by the round's middle one.
    3. The weighted mean is clipped. EDiT clips to a number, and a good one depends on the model:
       here it is 10 times the usual norm of this unit's mean. That counts where a newcomer, whom
       nobody can judge yet, is the only one who contributes.
    4. If all are anomalous there is no mean.
    """
    norms = [sqrt(gram[i, i]) for i in range(len(islands))]
    traces = [_Trace.of(guard.get(str(island))) for island in islands]
    judged = list(zip(islands, traces, norms, strict=True))
    guard = guard | {str(island): trace.after(norm).told() for island, trace, norm in judged}
    anomalous = [island for island, trace, norm in judged if trace.z(norm) > trace.limit]
    facts: Facts = {"anomalous": anomalous} if anomalous else {}
    found = [0.0] * len(islands)
    kept = [i for i, island in enumerate(islands) if island not in anomalous]
    if not kept:
        return found, guard, facts
    least = min(norms[i] for i in kept)
    scale = _middle([norms[i] for i in kept]) or max(norms) or 1.0
    shares = _shares([_exp((least - norms[i]) / scale) for i in kept])
    for i, share in zip(kept, shares, strict=True):
        found[i] = share
    length = sqrt(max(_inner(found, [_inner(found, row) for row in gram.tolist()]), 0.0))
    usual = _Trace.of(guard.get("mean"))
    if usual.judges and length > _CLIP * usual.mean:
        facts["clipped"] = _CLIP * usual.mean / length
        found = [facts["clipped"] * share for share in found]
    guard["mean"] = usual.after(length).told()
    return found, guard, facts


def _exp(value: float) -> float:
    return float(Decimal(value).exp(_ROUNDED))
