"""Who computed a wrong gradient: judged from what several ranks found for the same leaf.

A leaf is a pure function of (step, leaf) and the parameters, so two ranks that compute it must
find the same bits. Every rank *testifies* to each leaf it has computed: the norm, and a digest of
the bits where somebody compares them. A leaf is suspicious if a norm is not finite or stands far
out of the step's, or if two digests differ; then further ranks compute it, one after the other,
until two agree. Those two are right, and whoever found something else is guilty. Nothing is ever
judged by a threshold alone: an honest outlier costs one more computation and is cleared by it.

Everything here follows from the testimonies, which all ranks exchange: so all ranks judge alike,
also one that has joined in between.

>>> judge([Testimony(0, 3, 1.0, 7), Testimony(1, 3, 1.0, 8)], (0, 1, 2)).again
[(3, 2)]
>>> three = [Testimony(rank, 3, 1.0, digest) for rank, digest in ((0, 7), (1, 8), (2, 7))]
>>> judge(three, (0, 1, 2)).guilty
[Testimony(rank=1, leaf=3, norm=1.0, digest=8)]
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite

# A leaf whose norm is this many times the median of its step is computed again. Leaves of one
# step differ by small factors; a flipped exponent bit or a scaled gradient is far beyond.
OUTLIER = 1000.0
_NOT_FINITE = "not finite"


@dataclass(frozen=True, slots=True)
class Testimony:
    """What `rank` found for `leaf`: the norm of its gradient and, or None, xxh3-64 of its bits."""

    rank: int
    leaf: int
    norm: float
    digest: int | None

    @property
    def how(self) -> str:
        """What is wrong with it, if it is."""
        return "differs" if isfinite(self.norm) else _NOT_FINITE


@dataclass(frozen=True, slots=True)
class Verdict:
    """What follows from the testimonies; with nothing in it the step may be committed.

    Args:
        again: (leaf, rank): who computes what once more; the judgement waits for it.
        guilty: what was found wrong.
        diverged: leaves that are not finite whoever computes them.
        undecided: leaves on which the ranks differ, with nobody left to ask.
    """

    again: list[tuple[int, int]] = field(default_factory=list)
    guilty: list[Testimony] = field(default_factory=list)
    diverged: list[int] = field(default_factory=list)
    undecided: list[int] = field(default_factory=list)


def judge(testimonies: Sequence[Testimony], ranks: Sequence[int]) -> Verdict:
    """The verdict over one step.

    Args:
        testimonies: of all ranks; at most one by each rank for each leaf.
        ranks: who may be asked to compute a leaf.
    """
    by_leaf: dict[int, list[Testimony]] = {}
    for testimony in testimonies:
        by_leaf.setdefault(testimony.leaf, []).append(testimony)
    finite = [[t.norm for t in found if isfinite(t.norm)] for found in by_leaf.values()]
    norms = sorted(min(of_leaf) for of_leaf in finite if of_leaf)
    usual = norms[(len(norms) - 1) // 2] if norms else 0.0
    verdict = Verdict()
    for _, found in sorted(by_leaf.items()):
        if _suspicious(found, usual):
            _judge_leaf(found, ranks, verdict)
    return verdict


def _suspicious(found: Sequence[Testimony], usual: float) -> bool:
    digests = {testimony.digest for testimony in found if testimony.digest is not None}
    return len(digests) > 1 or any(
        not isfinite(t.norm) or (usual > 0 and t.norm > OUTLIER * usual) for t in found
    )


def _judge_leaf(found: Sequence[Testimony], ranks: Sequence[int], verdict: Verdict) -> None:
    leaf, compared = found[0].leaf, all(testimony.digest is not None for testimony in found)
    groups: dict[str, set[int]] = {}
    for testimony in found:
        groups.setdefault(_key(testimony, compared), set()).add(testimony.rank)
    true = [key for key, agreeing in groups.items() if len(agreeing) > 1]
    asked = {testimony.rank for testimony in found}
    free = [rank for rank in ranks if rank not in asked]
    if not true and free:
        verdict.again.append((leaf, free[leaf % len(free)]))
        return
    # With nobody left, what is finite is right against what is not: the leaf can be computed.
    true = true or [key for key in groups if key != _NOT_FINITE] or [_NOT_FINITE]
    if len(true) > 1:
        verdict.undecided.append(leaf)
    elif true == [_NOT_FINITE]:
        verdict.diverged.append(leaf)
    else:
        verdict.guilty.extend(t for t in found if _key(t, compared) != true[0])


def _key(testimony: Testimony, compared: bool) -> str:
    """Equal for testimonies that agree; where not all have a digest, the norm has to do."""
    if not isfinite(testimony.norm):
        return _NOT_FINITE
    return str(testimony.digest) if compared else f"{testimony.norm:.3g}"
