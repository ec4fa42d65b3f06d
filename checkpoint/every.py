"""How often the state goes to storage while a job runs.

>>> Every.parse("200"), Every.parse("10m"), bool(Every.parse(""))
(Every(steps=200, seconds=0.0), Every(steps=0, seconds=600.0), False)
"""

import re
from dataclasses import dataclass

from outlast.cluster.errors import Misuse

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True, slots=True)
class Every:
    """So many steps, or seconds; never where both are 0."""

    steps: int = 0
    seconds: float = 0.0

    def __bool__(self) -> bool:
        return self.steps > 0 or self.seconds > 0

    @classmethod
    def parse(cls, text: str) -> "Every":
        """Read "200" (steps), "30s", "10m" or "2h"; Misuse for anything else but ""."""
        found = re.fullmatch(r"(\d{1,9})([smh]?)", text)
        if text and (found is None or not int(found[1])):
            raise Misuse(f"--checkpoint-every: {text!r} is not a number of steps, or 30s, 10m, 2h")
        if found is None:
            return cls()
        number, unit = int(found[1]), found[2]
        return cls(seconds=number * _SECONDS[unit]) if unit else cls(number)
