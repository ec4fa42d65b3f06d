"""Brings what an island has sent of each fragment to whoever owns the same elements elsewhere.

[Note: courier] A contribution is kept as a role of the state until the next of its fragment. So
what is owed can be worked out anew at any time from the state and from what is known of the other
islands: it does not matter which rank was lost meanwhile, here or there.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from outlast.layout.run import Run, intersect
from outlast.runtime.islands.closing import Version
from outlast.runtime.islands.codec import Codec
from outlast.runtime.islands.exchange import Exchange
from outlast.runtime.islands.facts import Facts
from outlast.runtime.islands.inbox import Inbox
from outlast.runtime.islands.neighbours import Neighbours, Place

# Elements of one parcel, at most: it is kept whole at both ends, and sent again from its start.
PIECE = 1 << 22


class Courier:
    """What one rank of `island` brings to the ranks of the others."""

    def __init__(
        self, island: int, codec: Codec, neighbours: Neighbours, exchange: Exchange
    ) -> None:
        self._island, self._codec = island, codec
        self._neighbours, self._exchange = neighbours, exchange
        self._most = PIECE // codec.block * codec.block  # elements: pieces are cut at blocks
        self._brought: set[tuple[int, int, str, int]] = set()

    def bring(
        self, facts: Facts, values: Sequence[Tensor], runs: Sequence[Run], of: Sequence[int]
    ) -> None:
        """Send what was not sent yet to every place that is known.

        Args:
            values: the pseudogradient of every run, as it was when it was sent.
            of: fragment of every run.
        """
        teams = [self._neighbours.places(island) for island in self._neighbours.reach]
        places = [place for team in teams for place in team]
        self._exchange.keep({place.address for place in places})
        sent = [(p, at) for p, at in enumerate(facts.sent) if at is not None]
        # A rank that stays owns other runs in its next team.
        owed = {(p, at[0], place.team, place.holder) for p, at in sent for place in places}
        for place in places:
            for fragment, at in sent:
                if (fragment, at[0], place.team, place.holder) in self._brought:
                    continue
                chosen = [(run, value) for run, value, p in zip(runs, values, of, strict=True)
                          if p == fragment]  # fmt: skip
                sent_at = (*at, facts.began)
                if parcels := self._parcels(self._island, fragment, sent_at, chosen, place):
                    self._exchange.send(place.address, ("contribution", fragment), parcels)
        self._brought = owed

    def enter(self) -> None:
        """This rank may own what another one has not brought any more: bring everything again."""
        self._brought.clear()

    def pass_on(self, inbox: Inbox, runs: Sequence[Run], of: Sequence[int]) -> None:
        """Send what others want of a third island's contribution, and this rank has."""
        while self._neighbours.wants:
            (asker, fragment, step, island), _ = self._neighbours.wants.popitem()
            mine = [run for run, at in zip(runs, of, strict=True) if at == fragment]
            base = inbox.base(fragment, step, island)
            if base is None or not mine or not inbox.covers(fragment, step, island, mine):
                continue
            chosen = [*zip(mine, inbox.codes(fragment, step, island, mine), strict=True)]
            facts = step, Version(*base), inbox.began(fragment, step, island)
            for place in self._neighbours.places(asker):
                if parcels := self._parcels(island, fragment, facts, chosen, place):
                    topic = ("passed on", fragment, island)
                    self._exchange.send(place.address, topic, parcels)

    def _parcels(
        self, island: int, fragment: int, sent: tuple[int, Version, int],
        chosen: Sequence[tuple[Run, Tensor]], place: Place,
    ) -> list[tuple[dict[str, Any], bytes]]:  # fmt: skip
        head = {
            "type": "contribution", "island": island, "fragment": fragment, "step": sent[0],
            "base": sent[1].name, "weight": sent[1].weight, "began": sent[2],
            "codec": self._codec.name,
        }  # fmt: skip
        return [
            (head | {"start": piece.start, "stop": piece.stop}, self._codec.encode(part))
            for run, value in chosen
            for piece, part in _pieces(run, value, place.runs, self._most)
        ]

    def hand_over(
        self, name: str, island: int, roles: Mapping[str, Sequence[Tensor]], runs: Sequence[Run],
        facts: dict[str, Any],
    ) -> None:  # fmt: skip
        """Send the whole state to an island that has asked for it.

        Args:
            roles: a view of every run per role; copied before this returns.
            facts: of the step.
        """
        head = {"island": self._island, "nonce": name, "step": facts["step"]}
        for place in self._neighbours.places(island):
            parcels: list[tuple[dict[str, Any], bytes]] = [
                (head | {"type": "state", "role": role, "start": piece.start, "stop": piece.stop},
                 part.contiguous().view(torch.uint8).cpu().numpy().tobytes())
                for role, values in roles.items()
                for run, value in zip(runs, values, strict=True)
                for piece, part in _pieces(run, value, place.runs, self._most)
            ]  # fmt: skip
            parcels.append((head | {"type": "facts", "facts": facts}, b""))
            self._exchange.send(place.address, ("state",), parcels)


def _pieces(run: Run, value: Tensor, wanted: Sequence[Run], most: int) -> list[tuple[Run, Tensor]]:
    return [
        (Run.of(low, high), value[low - run.start : high - run.start])
        for piece in intersect([run], wanted)
        for start, stop in piece.intervals()
        for low in range(start, stop, most)
        for high in [min(low + most, stop)]
    ]
