"""Real runs of FSDP2 on CPU: checkpoints of torch's DCP to read, and FSDP2 itself to load ours.

`run(into)` starts four processes, which form one group after the other. It leaves in `into`:

- `nested`: of 2 ranks after 3 steps, as get_state_dict makes it; `flat`: with
  flatten_optimizer_state_dict; `weights`: the model's state dict alone; `bf16`: of a bf16 model.
- `columns`: of 4 ranks, one tensor cut over two axes of a 2 x 2 mesh.
- `ours`: `nested`, read and written again by `checkpoint.formats.dcp` for 3 ranks.
- `truth.npz`, `truth-bf16.npz`: `<role>/<name>` -> whole array (bfloat16 as float32: exact).
- `loaded-N.npz` for N = 1, 2, 3, 4: what N ranks with other initial values have after they loaded
  `ours`; `facts-N.json`: their groups, and the losses of 3 more steps; `facts.json`: those of the
  run that went on.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

STEPS, EXTRA = 3, {"step": 3, "note": "from the user", "tokens": [1, 2]}


def run(into: Path) -> None:
    """Fill `into`; the processes do not share the caller's interpreter."""
    subprocess.run([sys.executable, __file__, str(into)], check=True, timeout=300)


def _model(seed: int) -> Any:
    import torch

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte = torch.nn.Embedding(131, 16)
            self.up, self.down = torch.nn.Linear(16, 33), torch.nn.Linear(33, 16)
            self.adapter = torch.nn.Linear(16, 16, bias=False).requires_grad_(False)
            self.norm = torch.nn.LayerNorm(16)
            self.head = torch.nn.Linear(16, 131, bias=False)
            self.head.weight = self.wte.weight
            self.register_buffer("scale", torch.rand(5))
            self.register_buffer("factor", torch.tensor(2.5))
            self.register_buffer("calls", torch.tensor(0))

        def forward(self, tokens: Any) -> Any:
            self.calls += 1
            hidden = self.wte(tokens) * self.factor
            hidden = hidden + self.down(self.up(hidden).relu()) + self.adapter(hidden)
            return self.head(self.norm(hidden)) * self.scale.sum()

    torch.manual_seed(seed)
    return Model()


def _sharded(seed: int, world: int, dtype: Any = None) -> tuple[Any, Any]:
    """A model over the ranks of the group, and its optimizer with two groups."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = _model(seed).to(dtype)
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1 + seed},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0, "lr": 2e-3 + seed},
    ]
    return model, torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.97))


def _train(model: Any, optimizer: Any, first: int, rank: int) -> list[float]:
    import torch

    losses = []
    for step in range(first, first + STEPS):
        torch.manual_seed(1000 * step + rank)
        loss = model(torch.randint(0, 131, (8,))).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _truth(model: Any, optimizer: Any, path: Path) -> list[dict[str, Any]]:
    """Save whole arrays by key; the groups."""
    import numpy as np
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, state = get_state_dict(model, optimizer)
    named = {"frozen/adapter.weight": weights.pop("adapter.weight")}
    trained = state["state"].keys()
    for name, value in weights.items():
        named[f"param/{name}" if name in trained or name == "head.weight" else f"buffer/{name}"] = (
            value
        )
    for name, roles in state["state"].items():
        named |= {f"{role}/{name}": value for role, value in roles.items()}
    whole = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in named.items()}
    if dist.get_rank() == 0:
        wide = {k: v.float() if "bfloat16" in str(v.dtype) else v for k, v in whole.items()}
        np.savez(path, **{key: value.numpy() for key, value in wide.items()})
    groups: list[dict[str, Any]] = state["param_groups"]
    return groups


def _save(into: Path, rank: int) -> None:
    """The first group, of two ranks."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    model, optimizer = _sharded(0, 2)
    _train(model, optimizer, 0, rank)
    weights, state = get_state_dict(model, optimizer)
    everything = {"model": weights, "optim": state, "extra": EXTRA | {"rng": torch.get_rng_state()}}
    dcp.save(everything, checkpoint_id=into / "nested")
    dcp.save(weights, checkpoint_id=into / "weights")
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    weights, state = get_state_dict(model, optimizer, options=flat)
    dcp.save(weights | state, checkpoint_id=into / "flat" / "step-3")
    groups = _truth(model, optimizer, into / "truth.npz")
    losses = _train(model, optimizer, STEPS, rank)
    if rank == 0:
        told = {"losses": losses, "groups": groups}
        (into / "facts.json").write_text(json.dumps(told))
    model, optimizer = _sharded(0, 2, torch.bfloat16)
    _train(model, optimizer, 0, rank)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optim": state}, checkpoint_id=into / "bf16")
    _truth(model, optimizer, into / "truth-bf16.npz")


def _save_columns(into: Path) -> None:
    """Of four ranks."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2))
    whole = torch.arange(7 * 5 * 6, dtype=torch.float32).reshape(7, 5, 6)
    cut = {"w": distribute_tensor(whole, mesh, [Shard(0), Shard(1)]),
           "last": distribute_tensor(whole * 2, mesh, [Shard(2), Shard(0)])}  # fmt: skip
    dcp.save({"net": cut}, checkpoint_id=into / "columns")


def _convert(source: Path, target: Path) -> None:
    from outlast.checkpoint.formats import dcp
    from outlast.checkpoint.items import Wanted

    target.mkdir()
    for item in dcp.plan(dcp.open(source), target, Wanted(ranks=3)):
        item.make(lambda size: None)


def _load(into: Path, rank: int, world: int) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, optimizer = _sharded(world, world)
    weights, state = get_state_dict(model, optimizer)
    extra = dict.fromkeys(EXTRA)
    dcp.load({"model": weights, "optim": state, "extra": extra}, checkpoint_id=into / "ours")
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    groups = _truth(model, optimizer, into / f"loaded-{world}.npz")
    losses = _train(model, optimizer, STEPS, rank)
    if rank == 0:
        told = {"losses": losses, "groups": groups, "extra": extra}
        (into / f"facts-{world}.json").write_text(json.dumps(told))


def _rank(rank: int, into: Path) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    for number, world in enumerate((2, 4, 1, 2, 3, 4)):
        if rank < world:
            store = f"file://{into}/store-{number}"
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
            if number == 0:
                _save(into, rank)
            elif number == 1:
                _save_columns(into)
            else:
                _load(into, rank, world)
            dist.barrier()
            dist.destroy_process_group()
        if number == 1 and rank == 0:  # the others wait for it in the next group
            _convert(into / "nested", into / "ours")


if __name__ == "__main__":
    import torch.multiprocessing

    torch.multiprocessing.start_processes(
        _rank, args=(Path(sys.argv[1]),), nprocs=4, start_method="fork"
    )
