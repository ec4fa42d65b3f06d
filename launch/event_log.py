"""The agent's event log: one JSON object per line, appended with one write each.

Invariant: a line is either whole or absent (single O_APPEND write), so a reader of a live log
never sees a torn event.
"""

import json
import os
import time
from pathlib import Path
from typing import Any


class EventLog:
    """Appends events of one agent to `events-<node>-<agent>.jsonl`."""

    def __init__(self, directory: Path, node: str, agent: str) -> None:
        self._who = {"node": node, "agent": agent}
        path = directory / f"events-{node}-{agent}.jsonl"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def write(self, event: str, fields: dict[str, Any]) -> None:
        """Append one event; `fields` are JSON values."""
        line = {**fields, "time": time.time(), **self._who, "event": event}
        os.write(self._file, json.dumps(line).encode() + b"\n")

    def close(self) -> None:
        """Close the file; later writes are an error."""
        os.close(self._file)
