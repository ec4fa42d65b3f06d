"""What an island knows of its outer parameters besides their values; a part of every record."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from outlast.layout.fragments import Rounds
from outlast.runtime.islands.closing import Version


@dataclass(frozen=True, slots=True)
class Facts:
    """The outer state as of one step.

    Args:
        began: step at which this island began to take part; what it sends later counts.
        versions: of the outer parameters, by fragment.
        sent: by fragment, the step after which it was sent last, and the version that it changes.
        applied: by fragment, the newest step after which a round was sent that is applied; at first
            the one before the first, H steps earlier.
        missed: rounds in a row that others closed without this island's contribution.
        guard: what the averaging rule remembers, by unit.
        common: name of the settings and the model, see `Islands.common`.
    """

    began: int
    versions: tuple[Version, ...]
    sent: tuple[tuple[int, Version] | None, ...]
    applied: tuple[int, ...]
    common: str
    missed: int = 0
    guard: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def initial(rounds: Rounds, name: str) -> "Facts":
        """Of parameters that nobody has changed; `name` tells which."""
        count = rounds.fragments
        before = tuple(rounds.offset(fragment) for fragment in range(count))
        return Facts(0, (Version(0, name),) * count, (None,) * count, before, name)

    @staticmethod
    def of(fields: Mapping[str, Any], step: int, rounds: Rounds, common: str) -> "Facts":
        """The facts of a record of `step`, also of one that no island wrote."""
        if "versions" in fields:
            return Facts.from_json(fields)
        return replace(Facts.initial(rounds, common), began=step)

    def next_due(self, rounds: Rounds, delays: Sequence[int]) -> int:
        """The step by which the next round has to be applied that is not in this state."""
        due = []
        for p, applied in enumerate(self.applied):
            after, offset = max(applied, self.began - rounds.every), rounds.offset(p)
            turn = max(1, (after - offset) // rounds.every + 1)
            due.append(offset + turn * rounds.every + delays[p])
        return min(due)

    def sending(self, fragment: int, step: int) -> "Facts":
        """After a fragment was sent."""
        return replace(self, sent=_with(self.sent, fragment, (step, self.versions[fragment])))

    def merged(
        self, fragment: int, step: int, islands: Sequence[int], guard: dict[str, Any]
    ) -> "Facts":
        """After the round of a fragment that was sent after `step` was applied."""
        version = self.versions[fragment].after(step, islands)
        return replace(
            self, versions=_with(self.versions, fragment, version), guard=guard,
            applied=_with(self.applied, fragment, step),
        )  # fmt: skip

    def entered(self, step: int) -> "Facts":
        """Taken over by another island, which has sent nothing yet."""
        return replace(self, began=step, sent=(None,) * len(self.sent), missed=0)

    def as_json(self) -> dict[str, Any]:
        """For a record."""
        return {
            "began": self.began,
            "versions": [[each.weight, each.name] for each in self.versions],
            "sent": [[one[0], one[1].weight, one[1].name] if one else None for one in self.sent],
            "applied": list(self.applied),
            "common": self.common,
            "missed": self.missed,
            "guard": self.guard,
        }

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> "Facts":
        """The inverse."""
        return Facts(
            int(fields["began"]),
            tuple(Version(int(weight), str(name)) for weight, name in fields["versions"]),
            tuple(
                (int(one[0]), Version(int(one[1]), str(one[2]))) if one else None
                for one in fields["sent"]
            ),
            tuple(int(step) for step in fields["applied"]),
            str(fields["common"]),
            int(fields["missed"]),
            dict(fields["guard"]),
        )


def _with(values: tuple[Any, ...], index: int, value: Any) -> tuple[Any, ...]:
    return (*values[:index], value, *values[index + 1 :])
