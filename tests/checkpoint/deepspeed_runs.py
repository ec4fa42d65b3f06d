"""Real runs of DeepSpeed on CPU: checkpoints to read, and DeepSpeed itself to load ours.

`run(jobs)` starts one process that imports DeepSpeed once and forks the ranks of each world size.
A job is one of

- `save(case, into)`: three steps, then `into/global_step3` and `into/latest` as DeepSpeed writes
  them, the truth beside them, three more steps, then `into/global_step6`.
- `resume(case, load, into)`: an engine of other initial values, frozen parameters and buffers loads
  what lies in `load` (its `latest`, or `latest_universal` with `universal=True`), the truth of what
  it has now, then as many steps from there.

- `universal(load, into)`: DeepSpeed's own conversion of a checkpoint to `into/global_step3` of its
  universal format and `into/latest_universal`.

The first two leave in `into`:

- `truth.npz`: `<role>/<name>` -> whole array, of roles param (masters), the optimizer's, frozen and
  buffer (bfloat16 as float32: exact). ZeRO 1 and 2: all shards, cut where the live parameters lie
  in the live flat buffer. ZeRO 3: DeepSpeed's `safe_get_full_*`. Also compared, while saving, with
  AdamW on one unsharded model and the same batches.
- `after.npz`: the same, three steps later.
- `facts.json`: losses (rank 0's, of the steps after), groups (hyper-parameters), step (of each
  group), step_after (three steps later), global_steps, lr_scheduler, client_state (that
  load_checkpoint returned), error (of load_checkpoint; then there is nothing else).

`CASES` are those of the session fixture `deepspeed_saves` (conftest.py): a directory with one
subdirectory for each name.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

STEPS = 3  # before the checkpoint, and again after it
CLIENT = {"epoch": 7, "note": "from the user"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and a configuration.

    Args:
        groups: parameter groups: 2 have other learning rates, betas and weight decays.
        frozen: some parameters take no gradient.
        optimizer: of torch.optim: AdamW or SGD.
        tied: the head is the embedding.
        zero: more of the configuration's "zero_optimization".
        config: more of the configuration.
    """

    name: str
    stage: int
    world: int = 2
    bf16: bool = False
    groups: int = 2
    frozen: bool = True
    tied: bool = True
    optimizer: str = "AdamW"
    zero: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


CASES = {
    case.name: case
    for case in [
        Case(name="z0", stage=0, frozen=False),
        Case(name="z1", stage=1),
        Case(name="z1_w4", stage=1, world=4, frozen=False),
        Case(name="z1_bf16", stage=1, bf16=True),
        Case(
            name="z1_bf16_optimizer",
            stage=1,
            bf16=True,
            config={"data_types": {"grad_accum_dtype": "fp32"}},
        ),
        Case(name="z1_aligned", stage=1, zero={"parameter_alignment": True}),
        Case(name="z1_sgd", stage=1, optimizer="SGD", frozen=False, tied=False),
        Case(name="z2", stage=2),
        Case(name="z2_bf16_w3", stage=2, world=3, bf16=True),
        Case(name="z2_round_robin", stage=2, zero={"round_robin_gradients": True}),
        Case(name="z3", stage=3),
        Case(name="z3_sub_groups", stage=3, zero={"sub_group_size": 1500}),
        Case(name="z3_bf16_w3", stage=3, world=3, bf16=True, zero={"sub_group_size": 1500}),
        Case(name="z3_w4", stage=3, world=4, groups=1, tied=False),
    ]
}


def save(case: Case, into: Path) -> dict[str, Any]:
    """A job: see above."""
    return {"do": "save", "case": asdict(case), "into": str(into)}


def resume(case: Case, load: Path, into: Path, universal: bool = False) -> dict[str, Any]:
    """A job: see above. Only `case.world`, `stage` and what the model needs must fit `load`."""
    job = {"do": "resume", "case": asdict(case), "into": str(into)}
    return job | {"load": str(load), "universal": universal}


def universal(load: Path, into: Path) -> dict[str, Any]:
    """A job: see above."""
    case = asdict(Case(name="universal", stage=0, world=1))
    return {"do": "universal", "case": case, "load": str(load), "into": str(into)}


def run(jobs: list[dict[str, Any]], timeout_s: float = 300) -> None:
    """Do all jobs; AssertionError with what DeepSpeed printed if one cannot be done."""
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "DEEPSPEED_LOG_LEVEL": "error",
        "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore", "TORCHDYNAMO_DISABLE": "1",
    }  # fmt: skip
    command = [sys.executable, __file__]
    done = subprocess.run(
        command, input=json.dumps(jobs), env=environment, timeout=timeout_s, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:]


def truth(directory: Path, name: str = "truth") -> dict[str, Any]:
    """Arrays by role/name."""
    import numpy as np

    with np.load(directory / f"{name}.npz") as arrays:
        return dict(arrays)


def facts(directory: Path) -> dict[str, Any]:
    """What was written beside them."""
    return json.loads((directory / "facts.json").read_text())


# What follows runs in the ranks.


def _model(case: Case, seed: int) -> Any:
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(32)
            self.wide, self.narrow = nn.Linear(32, 45), nn.Linear(45, 32)

        def forward(self, x: Any) -> Any:
            return x + self.narrow(torch.tanh(self.wide(self.norm(x))))

    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(61, 32)
            self.fixed = nn.Linear(32, 32)
            self.blocks = nn.ModuleList([Block(), Block()])
            self.gain = nn.Parameter(torch.ones(1))
            self.head = nn.Linear(32, 61, bias=False)
            self.register_buffer("shift", torch.randn(5))
            self.register_buffer("calls", torch.tensor(seed))
            self.register_buffer("scratch", torch.zeros(3), persistent=False)

        def forward(self, tokens: Any) -> Any:
            self.calls += 1
            x = self.embed(tokens[:, :-1]) + self.shift.sum()
            x = x + self.fixed(x)
            for block in self.blocks:
                x = block(x)
            loss = nn.functional.cross_entropy
            return loss((self.head(x) * self.gain).flatten(0, 1).float(), tokens[:, 1:].flatten())

    torch.manual_seed(seed)
    model = Tiny()
    if case.tied:
        model.head.weight = model.embed.weight
    model.fixed.requires_grad_(not case.frozen)
    model.universal_checkpoint_info = {"universal_checkpoint_version": 0.4}
    return model


def _groups(case: Case, model: Any) -> list[dict[str, Any]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    adam = case.optimizer == "AdamW"
    rest = {"betas": (0.8, 0.95)} if adam else {"momentum": 0.8}
    if case.groups == 1:
        return [{"params": trained, "lr": 1e-3, "weight_decay": 0.1}]
    return [
        {"params": [p for p in trained if p.ndim > 1], "lr": 1e-3, "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim < 2], "lr": 5e-4, "weight_decay": 0.0, **rest},
    ]


def _optimizer(case: Case, groups: list[dict[str, Any]]) -> tuple[Any, Any]:
    import torch

    more = {} if case.optimizer == "AdamW" else {"momentum": 0.9}
    optimizer = getattr(torch.optim, case.optimizer)(groups, **more)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9)


def _engine(case: Case, seed: int, universal: bool = False) -> Any:
    import deepspeed

    model = _model(case, seed)
    optimizer, scheduler = _optimizer(case, _groups(case, model))
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4, "gradient_clipping": 0.0, "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True, "bf16": {"enabled": case.bf16},
        "zero_optimization": {"stage": case.stage, "reduce_bucket_size": 100_000} | case.zero,
        "checkpoint": {"load_universal": universal},
    }  # fmt: skip
    if case.stage == 3:  # so that small parameters are cut, too
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=scheduler, config=config | case.config
    )[0]


def _batch(step: int) -> Any:
    import torch
    from torch import distributed

    seed = 1000 * step + distributed.get_rank()
    return torch.randint(0, 61, (4, 9), generator=torch.Generator().manual_seed(seed))


def _train(engine: Any, first: int) -> list[float]:
    losses = []
    for step in range(first, first + STEPS):
        loss = engine(_batch(step))
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def _twin(case: Case) -> dict[str, Any]:
    """The same run without DeepSpeed: whole float32 tensors, gradients averaged over the ranks."""
    from torch import distributed

    model = _model(case, 0)
    optimizer, scheduler = _optimizer(case, _groups(case, model))
    for step in range(STEPS):
        model(_batch(step)).backward()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad /= distributed.get_world_size()
                distributed.all_reduce(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[f"param/{name}"] = parameter.detach().numpy()
            for role, value in optimizer.state[parameter].items():
                if value.ndim or role != "step":
                    found[f"{role}/{name}"] = value.numpy()
    return found


def _gathered(shard: Any) -> Any:
    import torch
    from torch import distributed

    parts = [torch.empty_like(shard) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, shard.contiguous())
    return torch.cat(parts)


def _flat(engine: Any) -> list[tuple[Any, list[Any], Any, dict[str, Any]]]:
    """For ZeRO 1 and 2, each group: its flat buffer, its parameters, this rank's master, state."""
    zero = engine.optimizer
    if hasattr(zero, "bf16_groups"):  # BF16_Optimizer
        flats, groups, masters = (
            zero.bf16_groups_flat, zero.bf16_groups, zero.fp32_groups_flat_partition,
        )  # fmt: skip
    else:
        flats, groups, masters = (
            zero.bit16_groups_flat, zero.bit16_groups, zero.single_partition_of_fp32_groups,
        )  # fmt: skip
    return [
        (flat, list(group), master, zero.optimizer.state[master])
        for flat, group, master in zip(flats, groups, masters, strict=True)
    ]


def _live(case: Case, engine: Any) -> dict[str, Any]:
    """What the engine has: see `truth.npz` above. On every rank, and the same."""
    import torch
    from deepspeed import zero
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    names = {id(p): name for name, p in engine.module.named_parameters()}
    roles = ["exp_avg", "exp_avg_sq"] if case.optimizer == "AdamW" else ["momentum_buffer"]
    found: dict[str, Any] = {}
    if case.stage in (1, 2):
        for flat, group, master, state in _flat(engine):
            whole = {"param": _gathered(master.data)}
            whole |= {role: _gathered(state[role]) for role in roles}
            for parameter in group:
                start = parameter.data.storage_offset() - flat.storage_offset()
                for role, values in whole.items():
                    part = values[start : start + parameter.numel()].view(parameter.shape)
                    found[f"{role}/{names[id(parameter)]}"] = part
    if case.stage == 0:
        inner = getattr(engine.optimizer, "optimizer", engine.optimizer)  # in bf16 it has masters
        for group, mine in zip(_groups(case, engine.module), inner.param_groups, strict=True):
            for parameter, master in zip(group["params"], mine["params"], strict=True):
                found[f"param/{names[id(parameter)]}"] = master
                for role in roles:
                    found[f"{role}/{names[id(parameter)]}"] = inner.state[master][role]
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            with zero.GatheredParameters([parameter], enabled=case.stage == 3):
                found[f"frozen/{name}"] = parameter.detach().float().clone()
        elif case.stage == 3:
            found[f"param/{name}"] = safe_get_full_fp32_param(parameter)
            for role in roles:
                found[f"{role}/{name}"] = safe_get_full_optimizer_state(parameter, role)
    kept = engine.module.state_dict()
    for name, values in engine.module.named_buffers():
        if name in kept:
            found[f"buffer/{name}"] = values.float() if values.dtype == torch.bfloat16 else values
    return {key: values.detach().numpy().copy() for key, values in found.items()}


def _facts(engine: Any) -> dict[str, Any]:
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for group in engine.optimizer.param_groups
    ]
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    steps = [float(state["step"]) for state in inner.state.values() if "step" in state]
    return {
        "groups": groups, "step": steps, "global_steps": engine.global_steps,
        "lr_scheduler": engine.lr_scheduler.state_dict(),
    }  # fmt: skip


def _do_save(case: Case, into: Path) -> dict[str, Any]:
    import numpy as np

    engine = _engine(case, 0)
    _train(engine, 0)
    engine.save_checkpoint(str(into), client_state=dict(CLIENT))
    found, told = _live(case, engine), _facts(engine)
    for key, expected in _twin(case).items():
        error = np.linalg.norm(found[key] - expected) / np.linalg.norm(expected)
        limit = 0.3 if case.bf16 else 1e-5  # another order would be off by 1 or more
        assert error < limit, f"{case.name}: {key} is off by {error:.2g}"
    told = _finish(case, engine, into, found, told)
    engine.save_checkpoint(str(into), client_state=dict(CLIENT), save_latest=False)
    return told


def _do_resume(case: Case, into: Path, load: str, universal: bool) -> dict[str, Any]:
    engine = _engine(case, 1, universal)
    try:
        path, client = engine.load_checkpoint(load)
    except Exception as error:
        return {"error": repr(error)}
    assert path is not None
    told = _facts(engine) | {"client_state": {key: client.get(key) for key in CLIENT}}
    return _finish(case, engine, into, _live(case, engine), told)


def _finish(
    case: Case, engine: Any, into: Path, found: dict[str, Any], told: dict[str, Any]
) -> dict[str, Any]:
    import numpy as np
    from torch import distributed

    losses = _train(engine, engine.global_steps)
    after = _live(case, engine)
    if distributed.get_rank() == 0:
        np.savez(into / "truth.npz", **found)
        np.savez(into / "after.npz", **after)
    return told | {"losses": losses, "step_after": _facts(engine)["step"]}


def _do_universal(case: Case, into: Path, load: str) -> dict[str, Any]:
    from deepspeed.checkpoint import ds_to_universal

    sys.argv[1:] = ["--input_folder", load, "--output_folder", str(into / Path(load).name)]
    sys.argv += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    ds_to_universal.main(ds_to_universal.parse_arguments())
    return {}


def _rank(rank: int, world: int, port: int, jobs: list[dict[str, Any]]) -> None:
    import deepspeed
    from torch import distributed

    local = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_SIZE": world}
    os.environ.update({key: str(value) for key, value in local.items()})
    store = distributed.TCPStore("127.0.0.1", port)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    tasks: dict[str, Callable[..., dict[str, Any]]] = {
        "save": _do_save, "resume": _do_resume, "universal": _do_universal,
    }  # fmt: skip
    for job in jobs:
        job = dict(job)
        task, case = tasks[job.pop("do")], Case(**job.pop("case"))
        into = Path(job.pop("into"))
        into.mkdir(parents=True, exist_ok=True)
        told = task(case, into, **job)
        if rank == 0:
            (into / "facts.json").write_text(json.dumps(told, indent=1))
        distributed.barrier()
    distributed.destroy_process_group()


def _main() -> None:
    import gc
    import multiprocessing

    import deepspeed.ops
    import torch
    from torch.distributed import TCPStore

    deepspeed.ops.__compatible_ops__ = {}  # what it does not look for it does not compile
    torch.set_num_threads(1)
    gc.freeze()  # DeepSpeed collects garbage all the time
    jobs = json.load(sys.stdin)
    fork = multiprocessing.get_context("fork")
    for world in sorted({job["case"]["world"] for job in jobs}):
        mine = [job for job in jobs if job["case"]["world"] == world]
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        ranks = [
            fork.Process(target=_rank, args=(rank, world, store.port, mine))
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            sys.exit(1)


if __name__ == "__main__":
    _main()
