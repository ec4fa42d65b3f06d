"""The job's metrics: every committed step exactly once and in order, whoever writes.

All ranks report the same values for a committed step, so every agent keeps the last records and
only the first member writes them. Invariant: a step is appended under the file's lock and only if
it is newer than the last one in the file; a writer that was suspended and wakes up after it was
replaced therefore repeats nothing.
"""

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

KEPT_RECORDS = 1000
TAIL_BYTES = 1 << 16


class MetricsLog:
    """The records of this agent's workers, and the file when this agent is the writer."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._records: dict[int, bytes] = {}
        self.newest = -1  # step that is known to be committed
        self.founding = False
        self._found = -1  # bytes that the file of an earlier run had when the job was founded

    def record(self, step: int, metrics: dict[str, Any]) -> None:
        """Keep the values of a committed step; the first report of a step counts."""
        if step <= self.newest:
            return
        self.newest = step
        line = {**metrics, "step": step, "time": time.time()}
        self._records[step] = json.dumps(line).encode() + b"\n"
        if len(self._records) > KEPT_RECORDS:
            del self._records[next(iter(self._records))]

    def write(self) -> None:
        """Append what the file lacks; called by the agent of the first member only.

        The founder of a job may find the file of an earlier run: a run that goes on behind it
        appends, one that starts over sets it aside. A file that has grown since is the job's own.
        """
        if self.founding and self._found < 0:
            self._found = self._path.stat().st_size if self._path.exists() else 0
        if not self._records:
            return
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            # A writer that was stopped while it held the lock must not stop its successor: the
            # records are kept and the next step brings them.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            last, end = _last_step(file)
            first = next(iter(self._records))
            if self.founding and first <= last and os.fstat(file).st_size == self._found:
                self._path.rename(self._path.with_suffix(f".{time.time_ns()}.jsonl"))
                return
            os.ftruncate(file, end)
            missing = [line for step, line in self._records.items() if step > last]
            os.pwrite(file, b"".join(missing), end)
            self._records.clear()
            self.founding = False
        except BlockingIOError:
            return
        finally:
            os.close(file)


def _last_step(file: int) -> tuple[int, int]:
    """The last whole record's step (-1 without one) and where it ends, in bytes."""
    size = os.fstat(file).st_size
    start = max(0, size - TAIL_BYTES)
    tail = os.pread(file, size - start, start)
    whole = tail[: tail.rfind(b"\n") + 1]
    lines = whole.splitlines()
    step = int(json.loads(lines[-1])["step"]) if lines else -1
    return step, start + len(whole)
