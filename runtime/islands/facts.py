"""What an island knows of its outer parameters besides their values; a part of every record."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from outlast.runtime.islands.closing import Version


@dataclass(frozen=True, slots=True)
class Facts:
    """The outer state as of one step.

    Args:
        began: step at which this island began to take part; what it sends later counts.
        versions: of the outer parameters, by fragment.
        sent: by fragment, the step after which it was sent last, and the version that it changes.
        guard: what the averaging rule remembers, by unit.
    """

    began: int
    versions: tuple[Version, ...]
    sent: tuple[tuple[int, Version] | None, ...]
    guard: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def initial(fragments: int, name: str) -> "Facts":
        """Of parameters that nobody has changed; `name` tells which."""
        return Facts(0, (Version(0, name),) * fragments, (None,) * fragments)

    def sending(self, fragment: int, step: int) -> "Facts":
        """After a fragment was sent."""
        return replace(self, sent=_with(self.sent, fragment, (step, self.versions[fragment])))

    def applied(self, fragment: int, version: Version, guard: dict[str, Any]) -> "Facts":
        """After the round of a fragment was applied."""
        return replace(self, versions=_with(self.versions, fragment, version), guard=guard)

    def entered(self, step: int) -> "Facts":
        """Taken over by another island, which has sent nothing yet."""
        return replace(self, began=step, sent=(None,) * len(self.sent))

    def as_json(self) -> dict[str, Any]:
        """For a record."""
        return {
            "began": self.began,
            "versions": [[each.weight, each.name] for each in self.versions],
            "sent": [[one[0], one[1].weight, one[1].name] if one else None for one in self.sent],
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
            dict(fields["guard"]),
        )


def _with(values: tuple[Any, ...], index: int, value: Any) -> tuple[Any, ...]:
    return (*values[:index], value, *values[index + 1 :])
