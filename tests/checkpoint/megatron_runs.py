"""Real checkpoints of Megatron-Core on CPU, and Megatron-Core itself to load ours.

`run(into)` starts two processes, which form one group after the other. It leaves in `into`:

- `two`: of a GPT model with 2 tensor-parallel ranks and of its optimizer with two groups;
  `half`: of a bf16 model with 1, and fp32 masters as Float16OptimizerWithFloat16Params names them.
- `truth-two.npz`, `truth-half.npz`: Megatron's key -> whole array, as Megatron itself loads it.
- `ours`: `two`, read and written again by `checkpoint.formats.megatron` for 3 ranks.
- `loaded-N.npz` for N = 1, 2 tensor-parallel ranks: what a model and optimizer of other initial
  values have after they loaded `ours`, as Megatron saves it once more (`again-N`); `facts-N.json`:
  the groups and the rest.

Megatron wants a GPU in two places that a model on CPU does not need; they are stubs here.
"""

import json
import subprocess
import sys
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

STEP = 2


def run(into: Path) -> None:
    """Fill `into`; the processes do not share the caller's interpreter."""
    subprocess.run([sys.executable, __file__, str(into)], check=True, timeout=300)


def _model(seed: int, ranks: int, dtype: Any) -> Any:
    import torch
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    torch.manual_seed(seed)
    config = TransformerConfig(
        num_layers=2, hidden_size=16, num_attention_heads=2, use_cpu_initialization=True,
        tensor_model_parallel_size=ranks, gated_linear_unit=True, params_dtype=dtype,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec()
    model = GPTModel(config, spec, 64, 8, share_embeddings_and_output_weights=True)
    return model.to(dtype)


def _optimizer(model: Any, seed: int) -> Any:
    """AdamW that has made STEP steps: Megatron's own wants a GPU."""
    import torch

    held = [torch.nn.Parameter(p.detach().float()) for p in model.parameters()]
    if model.config.params_dtype == torch.float32:
        held = list(model.parameters())
    groups = [
        {"params": [p for p in held if p.ndim > 1], "weight_decay": 0.1 + seed},
        {"params": [p for p in held if p.ndim == 1], "weight_decay": 0.0, "lr": 1e-4 + seed},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    for _ in range(STEP):
        for p in held:
            p.grad = torch.randn_like(p)
        optimizer.step()
    for p, master in zip(model.parameters(), held, strict=True):
        p.data.copy_(master.data)
    return optimizer


def _state(model: Any, optimizer: Any) -> dict[str, Any]:
    """Sharded state dicts, made as FP32Optimizer and Float16OptimizerWithFloat16Params do."""
    import torch
    from megatron.core.dist_checkpointing.optimizer import (
        get_param_id_to_sharded_param_map,
        make_sharded_optimizer_tensor,
        optim_state_to_sharding_state,
    )

    weights, state = model.sharded_state_dict(), optimizer.state_dict()
    params = list(model.parameters())
    in_order = [p for p in params if p.ndim > 1] + [p for p in params if p.ndim == 1]
    named = get_param_id_to_sharded_param_map(weights, in_order)
    masters = [p for group in optimizer.param_groups for p in group["params"]]
    sharded = {
        i: make_sharded_optimizer_tensor(named[i], master.data, "optimizer.state.fp32_param")
        for i, master in enumerate(masters)
    }
    optim_state_to_sharding_state(state, named, exclude_keys=("step",))
    state["state"]["common_step"] = STEP
    if model.config.params_dtype != torch.float32:
        state = {"optimizer": state, "fp32_from_fp16_params": [list(sharded.values())]}
    return {"model": weights, "optimizer": state}


def _save(model: Any, optimizer: Any, path: Path) -> None:
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    state = _state(model, optimizer)
    rest = {"iteration": STEP, "checkpoint_version": 3.0, "args": Namespace(hidden_size=16)}
    if dist.get_rank() == 0:
        path.mkdir()
    dist.barrier()
    dist_checkpointing.save(state | rest, path)


def _whole(checkpoint: Path, into: Path) -> None:
    """Its tensors as Megatron loads them without a model."""
    import numpy as np
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    tensors = dist_checkpointing.load_plain_tensors(str(checkpoint))
    if dist.get_rank() == 0:
        wide = {k: v.float().numpy() for k, v in tensors.items() if hasattr(v, "float")}
        np.savez(into, **wide)


def _load(into: Path, ranks: int) -> None:
    import torch
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    model = _model(7, ranks, torch.float32)
    optimizer = _optimizer(model, 7)
    got = dist_checkpointing.load(_state(model, optimizer), str(into / "ours"))
    model.load_state_dict(got.pop("model"))
    state = got.pop("optimizer")
    step = state["state"].pop("common_step")
    for held in state["state"].values():
        held["step"] = torch.tensor(float(step))
    optimizer.load_state_dict(state)
    _save(model, optimizer, into / f"again-{ranks}")
    _whole(into / f"again-{ranks}", into / f"loaded-{ranks}.npz")
    if dist.get_rank() == 0:
        groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        told = {"groups": groups, "step": step, "iteration": got["iteration"],
                "hidden_size": got["args"].hidden_size}  # fmt: skip
        (into / f"facts-{ranks}.json").write_text(json.dumps(told))


def convert(source: Path, target: Path) -> None:
    """By the module under test, for 3 ranks."""
    from outlast.checkpoint.formats import megatron
    from outlast.checkpoint.items import Wanted

    target.mkdir()
    for item in megatron.plan(megatron.open(source), target, Wanted(ranks=3)):
        item.make(lambda size: None)


def _rank(rank: int, into: Path) -> None:
    warnings.filterwarnings("ignore")
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    torch.set_num_threads(1)
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.current_device = lambda: "cpu"
    for number, world in enumerate((2, 1, 2)):
        if rank < world:
            store = f"file://{into}/store-{number}"
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
            parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
            if number == 0:
                model = _model(rank, 2, torch.float32)
                _save(model, _optimizer(model, 0), into / "two")
                _whole(into / "two", into / "truth-two.npz")
            else:
                _load(into, world)
            if number == 1:
                model = _model(0, 1, torch.bfloat16)
                _save(model, _optimizer(model, 0), into / "half")
                _whole(into / "half", into / "truth-half.npz")
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
        if number == 0 and rank == 0:  # the other waits for it in the next group but one
            convert(into / "two", into / "ours")


if __name__ == "__main__":
    import torch.multiprocessing

    torch.multiprocessing.start_processes(
        _rank, args=(Path(sys.argv[1]),), nprocs=2, start_method="spawn"
    )
