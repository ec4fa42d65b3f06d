"""Real DeepSpeed runs whose parameters are cut over two tensor-parallel ranks (its AutoTP), on CPU.

`python tensor_parallel_runs.py DIRECTORY STAGE...` trains with two tensor-parallel times two
data-parallel ranks and saves `DIRECTORY/z<stage>`. `wide` is cut by rows, unevenly, `narrow` and
`mixed` by columns, `fused` is three matrices in one; the rest is on both ranks.
"""

import os
import sys
from pathlib import Path
from typing import Any


def _model() -> Any:
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

    torch.manual_seed(0)
    return Tiny()


def _layer(pattern: str, kind: str, **more: Any) -> dict[str, Any]:
    return {"patterns": [pattern], "partition_type": kind, **more}


def _save(stage: int, into: Path) -> None:
    import deepspeed
    import torch

    model = _model()
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
        "tensor_parallel": {
            "autotp_size": 2,
            "partition_config": {"use_default_specs": False, "layer_specs": layers},
        },
    }  # fmt: skip
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    for step in range(3):
        generator = torch.Generator().manual_seed(100 * step + engine.mpu.get_data_parallel_rank())
        loss = engine(torch.randn(4, 8, generator=generator))
        engine.backward(loss)
        engine.step()
    engine.save_checkpoint(str(into), client_state={"epoch": 7})


def _rank(rank: int, port: int, directory: Path, stages: list[int]) -> None:
    import deepspeed
    from torch import distributed

    local = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 4, "LOCAL_SIZE": 4}
    os.environ.update({key: str(value) for key, value in local.items()})
    store = distributed.TCPStore("127.0.0.1", port)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=4)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    for stage in stages:
        _save(stage, directory / f"z{stage}")
    distributed.destroy_process_group()


def _main() -> None:
    import multiprocessing

    import deepspeed.ops
    import torch
    from torch.distributed import TCPStore

    deepspeed.ops.__compatible_ops__ = {}  # what it does not look for it does not compile
    torch.set_num_threads(1)
    directory, stages = Path(sys.argv[1]), [int(stage) for stage in sys.argv[2:]]
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    fork = multiprocessing.get_context("fork")
    arguments = [(rank, store.port, directory, stages) for rank in range(4)]
    ranks = [fork.Process(target=_rank, args=each) for each in arguments]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(any(process.exitcode for process in ranks))


if __name__ == "__main__":
    _main()
