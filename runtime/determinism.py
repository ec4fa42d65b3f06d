"""What besides the data decides the bits: threads, instruction set, library switches.

Reductions inside a kernel may be cut by the number of threads, and kernels differ between
instruction sets, so both are pinned for the life of a process, are the same on all ranks, and
travel with the state. A difference is no error, only no longer the same numbers: it is a warning
that says so."""

import random

import numpy as np
import torch


def pin(threads: int, local_rank: int) -> None:
    """Fix everything that a process may choose for itself; call before the first kernel."""
    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
        # The environment is set by the agent; these are the switches inside torch.
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
        torch.backends.cuda.matmul.allow_tf32 = False


def numerics() -> str:
    """One line that is equal on processes that compute the same bits."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, {device}, {capability}, {torch.get_num_threads()} threads"


def seed_all(seed: int) -> None:
    """Seed every generator that a forward pass or a data set may use."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
