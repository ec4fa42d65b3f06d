"""The line on the terminal of rank 0: a bar with the time left, or plain lines in a log file."""

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

PLAIN_INTERVAL_S = 5.0


class Progress:
    """Shows the steps of a training of `steps` steps; only the rank that calls `show` prints.

    Which rank that is may change in the middle of the run, so nothing is printed before the first
    call, and a bar begins where the run is. `title` says of which training.
    """

    def __init__(self, steps: int, title: str = "") -> None:
        self.steps, self.title = steps, title
        self._bar: Bar | None = None
        self._plain_at = 0.0

    def show(self, done: int, world_size: int, metrics: Mapping[str, float]) -> None:
        """`done` steps of all are committed; validations and the last step always get a line."""
        text = self.title + "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        validated = "validation_bits_per_byte" in metrics
        if not sys.stdout.isatty():
            if validated or done == self.steps or time.monotonic() >= self._plain_at:
                self._plain_at = time.monotonic() + PLAIN_INTERVAL_S
                print(f"step {done}/{self.steps}  ranks {world_size}  {text}", flush=True)
            return
        if self._bar is None:
            columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(24))
            times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
            self._bar = Bar(*columns, *times, TextColumn("{task.fields[text]}"), console=Console())
            self._bar.add_task("training", total=self.steps, completed=done - 1, text="")
            self._bar.start()
        if validated:
            self._bar.console.print(f"step {done}/{self.steps}  {text}")
        short = f"{self.title}ranks {world_size}  loss {metrics['loss']:.4f}"
        self._bar.update(self._bar.task_ids[0], completed=done, text=short)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        if self._bar is not None:
            self._bar.stop()
