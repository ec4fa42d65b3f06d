"""What the operator sees: few plain lines on stderr, so that stdout belongs to the script.

Invariant: a terminal or pipe that nobody reads never holds the agent up; lines are written by a
thread of their own.
"""

import os
import sys
import threading
from queue import SimpleQueue

FLUSH_S = 2.0


class Console:
    """Writes lines in order, from a thread; `title` stands before what is said of the job."""

    def __init__(self, title: str = "") -> None:
        self._title = title
        self._lines: SimpleQueue[str | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="console", daemon=True)
        self._thread.start()

    def line(self, text: str) -> None:
        """Say something about the job."""
        self._lines.put(f"outlast: {self._title}{text}\n")

    def failure(self, text: str, trace: str) -> None:
        """Say what failed, with the traceback as it is where there is one."""
        self.line(text)
        if trace:
            self._lines.put(trace.rstrip() + "\n")

    def close(self) -> None:
        """Wait until everything is written, but not for ever."""
        self._lines.put(None)
        self._thread.join(FLUSH_S)

    def _write(self) -> None:
        while (text := self._lines.get()) is not None:
            try:
                os.write(sys.stderr.fileno(), text.encode(errors="replace"))
            except OSError:  # nobody listens any more: go on without a console
                continue
