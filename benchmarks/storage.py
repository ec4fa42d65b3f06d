"""Checkpoints of a run: outlast beside FSDP2 with torch.distributed.checkpoint, the same GPT.

    python benchmarks/storage.py [--ranks 2] [--layers 5] [--width 512] [--rounds 3] [--steps 30]

Each round starts both, one after the other. Each saves the same state (parameters and both moments,
float32) while all ranks wait, then trains on with and without saves beside training, every tenth
step, and is loaded again by 2, 4 and 3 ranks, each saving again for the next. Times are the slowest
rank's. The stall is what a save adds to the steps from one save to the next, and its share is that
of the ten steps. outlast reads back and checks what it writes, and checks what it reads; the peer
has no checksums. Files come from the page cache in both. The table has medians of all rounds.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EVERY, SAVES, RESHARDED = 10, 4, (2, 4, 3)
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "benchmarks")]


class Stopwatch:
    """Seconds by name, and a file of each rank for them."""

    def __init__(self, out: Path) -> None:
        self._out, self.found = out, dict[str, list[float]]()

    def time(self, name: str, work: Any) -> None:
        """Add how long `work` takes."""
        began = time.perf_counter()
        work()
        self.found.setdefault(name, []).append(time.perf_counter() - began)

    def leave(self, rank: int) -> None:
        """Write the file."""
        (self._out / f"{rank}.json").write_text(json.dumps(self.found))


def gpt(args: argparse.Namespace) -> Any:
    """The model of both."""
    from gpt import GPT, Config

    shape = {"layers": args.layers, "width": args.width, "heads": args.width // 64}
    return GPT(Config(**shape, context=64, dropout=0.0))


def ours(args: argparse.Namespace, watch: Stopwatch) -> None:
    """One rank of an outlast job; `args.every` says whether it saves while it runs."""
    import torch
    from gpt import loss_fn

    import outlast

    run = outlast.init(leaves=4)
    model = run.prepare(gpt(args), optimizer=partial(torch.optim.AdamW, lr=1e-3))
    durable, group = run.training.durable, run.training.membership.generation.communicator
    tokens = torch.randint(0, 256, (65,))

    def data(step: int, leaf: int) -> Any:
        return tokens[None, :-1], tokens[None, 1:]

    began, first = time.perf_counter(), run.training.committed
    for step in run.steps(first + args.steps):
        with step:
            for batch in step.batches(data):
                step.backward(loss_fn(model, batch))
        now = time.perf_counter()
        watch.found.setdefault("step", []).append(now - began)
        if not args.every and step.index >= first + args.steps - SAVES:
            watch.time("save", lambda: durable.saving.finish(group))
        began = time.perf_counter()
    owned = run.training.state.owned
    for _ in range(0 if args.every else SAVES):
        group.gather_bytes(b"")
        watch.time("load", lambda: durable.load(group, durable.names(group)[:1], owned))
    watch.leave(run.rank)


def theirs(args: argparse.Namespace, watch: Stopwatch) -> None:
    """One rank of FSDP2; the same."""
    import torch
    import torch.distributed.checkpoint as dcp
    from gpt import loss_fn
    from torch import distributed
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo")
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(0)
    model, mesh = gpt(args), init_device_mesh("cpu", (ranks,))
    for block in [*model.blocks, model]:
        fully_shard(block, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.randint(0, 256, (65,))

    def step() -> None:
        for _ in range(4 // ranks or 1):
            loss_fn(model, (tokens[None, :-1], tokens[None, 1:])).backward()
        optimizer.step()
        optimizer.zero_grad()

    def state() -> dict[str, Any]:
        return dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True))

    def load(found: str) -> None:
        empty = state()
        dcp.load(empty, checkpoint_id=found)
        set_state_dict(
            model, optimizer, model_state_dict=empty["model"], optim_state_dict=empty["optim"]
        )

    side = distributed.new_group(backend="gloo")  # the collectives of a save beside training
    pending, newest = None, args.checkpoints / "newest"
    for index in range(args.steps):
        watch.time("step", step)
        if args.every and not (index + 1) % args.every:
            where = str(args.checkpoints / f"beside{index}")
            began = time.perf_counter()
            if pending is not None:
                pending.result()
            pending = dcp.async_save(state(), checkpoint_id=where, process_group=side)
            watch.found["step"][-1] += time.perf_counter() - began  # the step that is held up
    if pending is not None:
        pending.result()
    for _ in range(0 if args.every else SAVES):
        distributed.barrier()
        if rank == 0:
            shutil.rmtree(newest, ignore_errors=True)
        distributed.barrier()
        watch.time("save", lambda: dcp.save(state(), checkpoint_id=str(newest)))
    for _ in range(0 if args.every else SAVES):
        distributed.barrier()
        watch.time("load", lambda: load(str(newest)))
    watch.leave(rank)
    distributed.barrier()
    distributed.destroy_process_group()


def run(tool: str, ranks: int, every: int, args: argparse.Namespace, into: Path) -> dict[str, Any]:
    """One job; seconds by name, of the slowest rank each time."""
    out = Path(tempfile.mkdtemp(dir=into))
    child = [__file__, "--tool", tool, "--out", str(out), "--checkpoints", str(into / tool)]
    child += ["--every", str(every), "--steps", str(args.steps if every >= 0 else SAVES + 4)]
    child += ["--layers", str(args.layers), "--width", str(args.width)]
    child[child.index("--every") + 1] = str(max(every, 0))
    if tool == "ours":
        command = [str(Path(sys.executable).parent / "outlast"), "launch", "--standalone"]
        command += ["--nproc-per-node", str(ranks), "--log-dir", str(out / "logs")]
        command += ["--checkpoint-dir", str(into / tool), "--checkpoint-every", str(every or 10**6)]
        command[-1] = str(every) if every > 0 else str(10**6)
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*command, *child], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-9000:]
    found = [json.loads(path.read_text()) for path in out.glob("*.json")]
    assert len(found) == ranks, done.stdout[-4000:]
    return {name: [max(values) for values in zip(*(one[name] for one in found), strict=False)]
            for name in found[0]}  # fmt: skip


def stall(steps: list[float], without: float) -> float:
    """Seconds that one save adds, given the steps with saves and the median of those without."""
    windows = [steps[at : at + EVERY] for at in range(EVERY - 1, len(steps) - EVERY, EVERY)]
    return statistics.median(sum(window) - EVERY * without for window in windows)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    defaults = {"ranks": 2, "layers": 5, "width": 512, "rounds": 3, "steps": 50, "every": 0}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tool", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="all single values")
    for name in ("out", "checkpoints"):
        parser.add_argument(f"--{name}", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tool:
        {"ours": ours, "theirs": theirs}[args.tool](args, Stopwatch(args.out))
        return
    size = 12 * sum(p.numel() for p in gpt(args).parameters()) / 1e6
    rows: dict[tuple[str, str], list[float]] = {}
    for _ in range(args.rounds):
        for tool in ("ours", "theirs"):
            with tempfile.TemporaryDirectory() as scratch:
                into = Path(scratch)
                for ranks in RESHARDED:
                    found = run(tool, ranks, -1, args, into)
                    for name in ("save", "load"):
                        rows.setdefault((f"{name}, {ranks} ranks", tool), []).extend(found[name])
                without = statistics.median(run(tool, args.ranks, 0, args, into)["step"][EVERY:])
                beside = run(tool, args.ranks, EVERY, args, into)["step"]
                rows.setdefault(("step without saves", tool), []).append(without)
                rows.setdefault(("stall of one save", tool), []).append(stall(beside, without))
    print(f"State of {size:.0f} MB, {args.ranks} ranks beside training. Seconds (MB/s).\n")
    print("| | outlast | torch DCP | ratio |\n|---|---|---|---|")
    for name, _ in [key for key in rows if key[1] == "ours"]:
        mine, other = (statistics.median(rows[name, tool]) for tool in ("ours", "theirs"))
        rate = name.endswith("ranks")
        shown = [f"{s:.3f} ({size / s:.0f})" if rate else f"{s:.3f}"
                 for s in (mine, other)]  # fmt: skip
        print(f"| {name} | {shown[0]} | {shown[1]} | {mine / other:.2f} |")
    if args.json:
        args.json.write_text(json.dumps({" ".join(key): values for key, values in rows.items()}))


if __name__ == "__main__":
    main()
