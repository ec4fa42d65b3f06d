"""Real DeepSpeed runs whose parameters are cut over two tensor-parallel ranks (its AutoTP), on CPU.

`save(directory, stages)` trains with two tensor-parallel times two data-parallel ranks and saves
`z<stage>` there; `resume(directory, stages)` loads the universal checkpoints that lie in `u<stage>`
there into others, and saves what they have then in `v<stage>`. `wide` is cut by rows, unevenly,
`narrow` and `mixed` by columns, `fused` is three matrices in one; the rest is on both ranks.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def _model(seed: int) -> Any:
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(16)
            self.fused = nn.Linear(16, 36, bias=False)
            self.mixed = nn.Linear(36, 16)
            self.wide, self.narrow = nn.Linear(16, 27), nn.Linear(27, 16)

        def forward(self, x: Any) -> Any:
            x = x + self.mixed(torch.tanh(self.fused(self.norm(x))))
            return x + self.narrow(torch.tanh(self.wide(x)))

    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inlet = nn.Linear(8, 16)
            self.blocks = nn.ModuleList([Block()])
            self.register_buffer("shift", torch.randn(5))

        def forward(self, x: Any) -> Any:
            x = self.inlet(x) + self.shift.sum()
            for block in self.blocks:
                x = block(x)
            return x.square().mean()

    torch.manual_seed(seed)
    return Tiny()


def _layer(pattern: str, kind: str, **more: Any) -> dict[str, Any]:
    return {"patterns": [pattern], "partition_type": kind, **more}


def save(directory: Path, stages: list[int]) -> None:
    """See above."""
    _start("save", directory, stages)


def resume(directory: Path, stages: list[int]) -> None:
    """See above."""
    _start("resume", directory, stages)


def _start(task: str, directory: Path, stages: list[int]) -> None:
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "DEEPSPEED_LOG_LEVEL": "error",
        "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore", "TORCHDYNAMO_DISABLE": "1",
    }  # fmt: skip
    command = [sys.executable, __file__, task, str(directory), *map(str, stages)]
    done = subprocess.run(
        command, env=environment, timeout=200, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:]


# What follows runs in the ranks.


def _engine(stage: int, seed: int, universal: bool) -> Any:
    import deepspeed
    import torch

    model = _model(seed)
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    layers = [
        _layer(".*fused.weight$", "column", shape=[3, -1], partition_dim=0),
        _layer(".*wide.weight$", "column"),
        _layer(".*(mixed|narrow).weight$", "row"),
        _layer(".*inlet.weight$", "skip"),
    ]
    config = {
        "train_micro_batch_size_per_gpu": 4, "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True, "zero_optimization": {"stage": stage},
        "checkpoint": {"load_universal": universal},
        "tensor_parallel": {
            "autotp_size": 2,
            "partition_config": {"use_default_specs": False, "layer_specs": layers},
        },
    }  # fmt: skip
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def _save(stage: int, directory: Path) -> None:
    import torch

    engine = _engine(stage, 0, universal=False)
    for step in range(3):
        generator = torch.Generator().manual_seed(100 * step + engine.mpu.get_data_parallel_rank())
        loss = engine(torch.randn(4, 8, generator=generator))
        engine.backward(loss)
        engine.step()
    engine.save_checkpoint(str(directory / f"z{stage}"), client_state={"epoch": 7})


def _resume(stage: int, directory: Path) -> None:
    engine = _engine(stage, 1, universal=True)
    path, _ = engine.load_checkpoint(str(directory / f"u{stage}"))
    assert path is not None
    engine.save_checkpoint(str(directory / f"v{stage}"))


def _rank(rank: int, port: int, task: str, directory: Path, stages: list[int]) -> None:
    import deepspeed
    from torch import distributed

    local = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 4, "LOCAL_SIZE": 4}
    os.environ.update({key: str(value) for key, value in local.items()})
    store = distributed.TCPStore("127.0.0.1", port)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=4)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    for stage in stages:
        {"save": _save, "resume": _resume}[task](stage, directory)
    distributed.destroy_process_group()


def _main() -> None:
    import multiprocessing

    import deepspeed.ops
    import torch
    from torch.distributed import TCPStore

    deepspeed.ops.__compatible_ops__ = {}  # what it does not look for it does not compile
    torch.set_num_threads(1)
    task, directory = sys.argv[1], Path(sys.argv[2])
    stages = [int(stage) for stage in sys.argv[3:]]
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    fork = multiprocessing.get_context("fork")
    arguments = [(rank, store.port, task, directory, stages) for rank in range(4)]
    ranks = [fork.Process(target=_rank, args=each) for each in arguments]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(any(process.exitcode for process in ranks))


if __name__ == "__main__":
    _main()
