"""Which islands count in a round: what follows from what the ranks of one island say. Pure.

[Note: closing] The islands have no coordinator and never wait for an agreement. The lowest island
that takes part closes a round: it says whose contributions count, once all of its own ranks have
all of them, and the others follow. Who is out of reach is not waited for, who is in reach for no
longer than the patience. So nobody is ever stopped; what it costs is that islands which could not
hear each other may have closed a round differently. Then their outer parameters differ, which the
version in every contribution tells, and the one behind which fewer contributions stand enters anew.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any


@dataclass(frozen=True, slots=True, order=True)
class Version:
    """Of the outer parameters of one fragment: how many contributions stand behind it, and a hash
    of all rounds that made it."""

    weight: int
    name: str

    def after(self, step: int, islands: Sequence[int]) -> "Version":
        """What it becomes by the round of `step` to which `islands` contributed."""
        if not islands:
            return self
        text = f"{self.name} {step} {','.join(map(str, islands))}"
        return Version(self.weight + len(islands), sha256(text.encode()).hexdigest()[:16])


@dataclass(frozen=True, slots=True)
class Round:
    """One exchange of one fragment, as one island sees it.

    Args:
        step: after which it was sent.
        base: version of the outer parameters that it changes.
        contributed: whether this island has sent its share.
    """

    fragment: int
    step: int
    base: Version
    contributed: bool

    @property
    def key(self) -> str:
        """Its name in a vote."""
        return f"{self.fragment}@{self.step}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What all ranks of the island do about a round.

    Args:
        islands: whose contributions count, in order; None: wait.
        closed: this island has just decided so, and tells the others.
        missed: islands that were given up.
        astray: an island that knows better: take its state, and go on from there.
        wanted: islands that count and can send nothing any more: others may have what they sent.
    """

    islands: tuple[int, ...] | None = None
    closed: bool = False
    missed: tuple[int, ...] = ()
    astray: int | None = None
    wanted: tuple[int, ...] = ()


WAIT = Verdict()


def verdict(at: Round, votes: Sequence[Mapping[str, Any]], me: int) -> Verdict:
    """What follows from the votes of all ranks of island `me`, in rank order.

    Args:
        votes: of each rank, about this round: "have": island -> [weight, name] of the base of each
            contribution that it has whole, None where it owns nothing of the fragment; "closing":
            what it knows to be closed, or None. Of rank 0 besides: "there": island -> step at
            which it began to take part, of those that are to be waited for; "lost": islands from
            which nothing more of this round will come; "late": whether the patience is over.
    """
    first = votes[0]
    said = [vote["have"] for vote in votes if vote["have"] is not None]
    have = {
        int(island): Version(*base)
        for island, base in said[0].items()
        if all(other.get(island) == base for other in said)
    }
    same = {island for island, base in have.items() if base == at.base}
    same |= {me} if at.contributed else set()
    known = [vote["closing"] for vote in votes if vote["closing"] is not None]
    there = {int(j): began for j, began in first["there"].items() if int(j) != me}
    # Who is gone has nothing to give: nobody stops for what it knew.
    if newer := [(have[j], j) for j in there if j in have and have[j] > at.base]:
        return Verdict(astray=max(newer)[1])
    for closing in (closing for closing in known if closing["base"] == at.base.name):
        islands = tuple(sorted(closing["islands"]))
        absent = set(islands) - same
        if not absent:
            return Verdict(islands)
        beyond = absent & {me, *first["lost"]}
        if not beyond and not first["late"]:
            return WAIT
        if there.keys() - beyond and me not in beyond and not first["late"]:
            return Verdict(wanted=tuple(sorted(beyond)))
        if there and beyond:  # what nobody sends any more is in the state of those who had it
            return Verdict(astray=min(there))
        # What counts does not get here, though its sender is in reach: better apart than stopped.
        return Verdict(tuple(sorted(same)), closed=True, missed=tuple(sorted(absent)))
    takes_part = {island for island, began in there.items() if began < at.step}
    if at.contributed or not takes_part:
        takes_part |= {me}
    if min(takes_part) != me:
        return WAIT
    missed = tuple(sorted(takes_part - same - {me}))
    if missed and not first["late"]:
        return WAIT
    return Verdict(tuple(sorted(same)), closed=True, missed=missed)
