"""Background tasks whose failure is seen at once.

asyncio keeps an exception of a task until somebody asks; an agent that lost its pings that way
would look healthy. Invariant: an exception in a watched task reaches the loop's exception handler
when it happens.
"""

import asyncio
from collections.abc import Coroutine


def watched(work: Coroutine[None, None, None]) -> asyncio.Task[None]:
    """Run `work` in the background; hand its exception, if any, to the loop."""
    task = asyncio.get_running_loop().create_task(work)
    task.add_done_callback(_report)
    return task


def _report(task: asyncio.Task[None]) -> None:
    if task.cancelled():
        return
    if error := task.exception():
        context = {"message": "a background task failed", "exception": error}
        task.get_loop().call_exception_handler(context)
