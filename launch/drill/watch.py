"""Follows the logs of a running job: which view is installed, which steps are committed."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

Event = dict[str, Any]
Found = TypeVar("Found")


class Watch:
    """The events and metrics of one log directory, read as they are written.

    alive: called at every look; it raises when there is nothing more to wait for. What a drilled
    job says of every commit is kept apart, in `commits`: generation -> steps.
    """

    def __init__(self, directory: Path, alive: Callable[[], None]) -> None:
        self.directory = directory
        self.alive = alive
        self.events: list[Event] = []
        self.metrics: list[Event] = []
        self.commits: dict[int, set[int]] = {}
        self.view: Event | None = None  # the newest that any agent installed
        self.step = 0  # how many steps are committed
        self._offsets: dict[Path, int] = {}

    @property
    def generation(self) -> int:
        """Of the newest view."""
        return int(self.view["generation"]) if self.view else 0

    @property
    def members(self) -> list[Event]:
        """Of the newest view, the proposer first."""
        return list(self.view["members"]) if self.view else []

    def look(self) -> None:
        """Read what was written since the last look."""
        for log in sorted(self.directory.glob("events-*.jsonl")):
            for event in self._new_lines(log):
                self._take(event)
        self.metrics += self._new_lines(self.directory / "metrics.jsonl")
        if self.metrics:
            self.step = max(self.step, int(self.metrics[-1]["step"]))

    def _take(self, event: Event) -> None:
        if event["event"] == "committed":
            self.commits.setdefault(event["generation"], set()).add(event["step"])
            self.step = max(self.step, event["step"])
            return
        self.events.append(event)
        if event["event"] == "view" and event["generation"] > self.generation:
            self.view = event

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

    def event(self, name: str, since: float = 0.0, **fields: Any) -> Event | None:
        """The first event of this name with these fields, written after `since`."""
        for event in self.events:
            if event["event"] != name or event["time"] < since:
                continue
            if all(event.get(k) == v for k, v in fields.items()):
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
