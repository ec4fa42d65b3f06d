"""In which phase of a step a worker is, and how long it has been in each.

    outlast launch … benchmarks/phases.py --phases DIR <flags of examples/gpt.py>

runs the GPT of the examples with its phase published in `DIR/phase-<pid>`, which outlives a worker
that is killed. The methods of the runtime are wrapped from here; the product knows nothing of it.
"""

import argparse
import functools
import mmap
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

# "script" is all that happens outside of the others: the loop, logging, the progress bar.
NAMES = ("script", "leaves", "fold", "agree", "update", "gather", "parity", "recovery")


class Phases:
    """Adds up the time by phase; a phase within a phase interrupts the outer one."""

    def __init__(self, directory: Path | None = None) -> None:
        self.seconds = dict.fromkeys(NAMES, 0.0)
        self.now, self._since = "script", time.perf_counter()
        self._published: mmap.mmap | bytearray = bytearray(1)
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            file = os.open(directory / f"phase-{os.getpid()}", os.O_RDWR | os.O_CREAT)
            os.ftruncate(file, 1)
            self._published = mmap.mmap(file, 1)
            os.close(file)

    def reset(self) -> None:
        """Start counting anew."""
        self.seconds = dict.fromkeys(NAMES, 0.0)
        self._since = time.perf_counter()

    def enter(self, phase: str) -> str:
        """Change the phase; returns the one before."""
        now, before = time.perf_counter(), self.now
        self.seconds[before] += now - self._since
        self.now, self._since = phase, now
        self._published[0] = NAMES.index(phase)
        return before

    @contextmanager
    def inside(self, phase: str) -> Iterator[None]:
        """`phase` for the block."""
        before = self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def wrap(self, owner: Any, name: str, phase: str) -> None:
        """Let every call of `owner.name` count as `phase`."""
        original: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self.inside(phase):
                return original(*args, **kwargs)

        setattr(owner, name, wrapped)

    def install(self) -> None:
        """Wrap the methods that a step consists of."""
        from outlast.runtime import recovery
        from outlast.runtime.redundancy import Redundancy
        from outlast.runtime.training import Training

        methods = {"_reduce": "fold", "_agree": "agree", "_update": "update", "gather": "gather"}
        for name, phase in methods.items():
            self.wrap(Training, name, phase)
        self.wrap(Redundancy, "start", "parity")
        self.wrap(Redundancy, "finish", "parity")
        self.wrap(recovery, "join", "recovery")
        leaves = Training.leaves

        def owed(training: Training) -> Iterator[int]:
            with self.inside("leaves"):  # forward and backward run while it is suspended
                yield from leaves(training)

        Training.leaves = owed  # type: ignore[method-assign]


def phase_of(directory: Path, pid: int) -> str:
    """The phase that a worker is in, or was in when it died."""
    return NAMES[(directory / f"phase-{pid}").read_bytes()[0]]


def main() -> None:
    """The GPT of the examples, with its phases published."""
    from gpt import parse, train

    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--phases", type=Path, required=True)
    options, rest = parser.parse_known_args()
    Phases(options.phases).install()
    train(parse(rest))


if __name__ == "__main__":
    main()
