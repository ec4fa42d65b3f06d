"""How many workers a node can have, asked without torch.

Invariant: a count is at least 1, or the question is refused with what to do.
"""

import os
from pathlib import Path

from outlast.cluster.errors import Misuse


def worker_count(text: str) -> int:
    """Read --nproc-per-node: a number, "cpu", "gpu", or "auto" (GPUs if there are any)."""
    gpus = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    if text.isdecimal():
        return int(text)
    if text == "gpu" and not gpus:
        raise Misuse("--nproc-per-node gpu: no GPU found; say a number or cpu")
    if text in ("cpu", "gpu", "auto"):
        return gpus if gpus and text != "cpu" else len(os.sched_getaffinity(0))
    raise Misuse(f"--nproc-per-node: {text!r} is not a number, auto, cpu or gpu")
