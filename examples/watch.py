"""Follows the logs of a running job: which view is installed, which step is committed."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

Event = dict[str, Any]
Found = TypeVar("Found")


class Watch:
    """The events and metrics of one log directory, read as they are written.

    alive: called at every look; it raises when there is nothing more to wait for.
    """

    def __init__(self, directory: Path, alive: Callable[[], None]) -> None:
        self.directory = directory
        self.alive = alive
        self.events: list[Event] = []
        self.metrics: list[Event] = []
        self._offsets: dict[Path, int] = {}

    @property
    def step(self) -> int:
        """How many steps are committed."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def view(self) -> Event | None:
        """The newest view that any agent installed."""
        views = [event for event in self.events if event["event"] == "view"]
        return max(views, key=lambda view: int(view["generation"]), default=None)

    def look(self) -> None:
        """Read what was written since the last look."""
        for log in sorted(self.directory.glob("events-*.jsonl")):
            self.events += self._new_lines(log)
        self.metrics += self._new_lines(self.directory / "metrics.jsonl")

    def until(
        self, found: Callable[[], Found | None], what: str, limit_s: float, pause_s: float = 0.02
    ) -> Found:
        """The first value that `found` returns; TimeoutError that names `what` after limit_s."""
        deadline = time.monotonic() + limit_s
        while True:
            self.look()
            value = found()
            if value is not None:
                return value
            self.alive()
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {limit_s:.0f} s for {what}")
            time.sleep(pause_s)

    def event(self, name: str, **fields: Any) -> Event | None:
        """The first event of this name with these fields."""
        for event in self.events:
            if event["event"] == name and all(event.get(k) == v for k, v in fields.items()):
                return event
        return None

    def _new_lines(self, log: Path) -> list[Event]:
        if not log.exists():
            return []
        with log.open("rb") as file:
            file.seek(self._offsets.get(log, 0))
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._offsets[log] = self._offsets.get(log, 0) + len(whole)
        return [json.loads(line) for line in whole.splitlines()]
