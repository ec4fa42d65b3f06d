"""Where a worker's stdout and stderr go: the console, a file, or both (--redirects and --tee).

With other islands on the same console every line is marked. Invariant: otherwise, without flags,
the worker writes to the console itself and the agent never touches a byte of it.
"""

import os
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import IO

from outlast.launch.config import LaunchConfig, captured

FLUSH_S = 0.5


class WorkerOutput:
    """The two streams of one worker; `stdout` and `stderr` are what Popen takes (None: inherit)."""

    def __init__(self, config: LaunchConfig, directory: Path, local_rank: int, title: str) -> None:
        hidden = config.local_ranks_filter and local_rank not in config.local_ranks_filter
        redirected = 3 if hidden else captured(config.redirects, local_rank)
        teed = captured(config.tee, local_rank)
        mark = f"[island {config.island}] " if config.together else ""
        self._ours: list[int] = []
        self._threads: list[threading.Thread] = []
        targets: list[int | None] = []
        for stream, name in ((1, "stdout"), (2, "stderr")):
            kept = (redirected | teed) & stream
            if not kept and not mark:
                targets.append(None)
                continue
            file = (directory / f"{name}.log").open("ab", buffering=0) if kept else None
            if file is not None and redirected & stream:
                targets.append(os.dup(file.fileno()))
                file.close()
            else:
                source, sink = os.pipe()
                targets.append(sink)
                prefix = (f"{mark}[{title}]:" if kept else mark).encode()
                copy = threading.Thread(
                    target=_copy, args=(source, file, stream, prefix), daemon=True
                )
                copy.start()
                self._threads.append(copy)
        self.stdout, self.stderr = targets
        self._ours = [target for target in targets if target is not None]

    def spawned(self) -> None:
        """The worker has its ends: give up ours, so that its death ends the streams."""
        for file in self._ours:
            os.close(file)
        self._ours = []

    def finish(self) -> None:
        """Wait a little until the last lines of a dead worker are on the console."""
        for thread in self._threads:
            thread.join(FLUSH_S)


def _copy(source: int, file: IO[bytes] | None, console: int, prefix: bytes) -> None:
    with os.fdopen(source, "rb") as lines, file or nullcontext():
        for line in lines:
            if file is not None:
                file.write(line)
            os.write(console, prefix + line)
