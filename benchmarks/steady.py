"""What protection costs while nothing happens: the step time beside plain DistributedDataParallel.

    python benchmarks/steady.py [--rounds 5] [--steps 8] [--variants double parity slots bare ddp]

Four ranks train the same GPT of about 10 million parameters on the same samples (fused AdamW,
gradient clipping, one thread each), 8 micro-batches a step:

    double  outlast, ZeRO 2: two halves of state and (2, 2) parity of every step, which survives
            the loss of any two of the four
    parity  the same with (3, 1) parity, which survives the loss of one
    slots   the same without parity: two halves of state
    bare    the same, the update in place and no checksums: nothing survives a loss
    ddp     torch's DistributedDataParallel under torchrun, no_sync on all but the last micro-batch

Variants take turns, a fresh job each time; the first two steps of a job are dropped. Step times
are those of rank 0, CPU seconds those of a worker's process, per rank and step; launchers are not
counted. The ratio to `bare` is the price of protection, that to `ddp` the price of everything. The
second table says where rank 0 spends a step: `agree` is mostly waiting for the slowest rank,
`parity` is what is left of the exchange after it ran beside the leaves.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from job import launched, median, outlast, parser_of, say, table, workspace, write_json
from phases import NAMES, Phases

RANKS, LEAVES, DROPPED = 4, 8, 2
VARIANTS = ("double", "parity", "slots", "bare", "ddp")
PARITY = {"double": 2, "parity": 1}  # units per stripe; no other variant has any
CLIP, RATE, BETAS, DECAY = 1.0, 1e-3, (0.9, 0.95), 0.1


def network(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model and the windows of text, the same in all variants."""
    import torch
    from corpus import Windows, standard_library
    from gpt import GPT, Config

    torch.manual_seed(0)
    shape = {name: getattr(args, name) for name in ("layers", "width", "heads", "context")}
    windows = Windows(standard_library(2.0).train, args.context)
    return GPT(Config(**shape, dropout=args.dropout)), windows


def adamw(parameters: Any) -> Any:
    """The optimizer of all variants."""
    import torch

    return torch.optim.AdamW(parameters, lr=RATE, betas=BETAS, weight_decay=DECAY, fused=True)


class Clock:
    """Wall and CPU seconds of every step after the dropped ones, written when the steps end."""

    def __init__(self, phases: Phases) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self._phases, self._steps = phases, 0
        self._since = time.perf_counter(), time.process_time()

    def tick(self) -> None:
        """A step has ended."""
        now = time.perf_counter(), time.process_time()
        self._steps += 1
        if self._steps > DROPPED:
            self.wall.append(now[0] - self._since[0])
            self.cpu.append(now[1] - self._since[1])
        else:
            self._phases.reset()
        self._since = now

    def write(self, args: argparse.Namespace, rank: int, parameters: int) -> None:
        """The result of this rank, as JSON."""
        self._phases.enter("script")
        phases = {k: seconds / len(self.wall) for k, seconds in self._phases.seconds.items()}
        result = {"parameters": parameters, "wall": self.wall, "cpu": self.cpu, "phases": phases}
        args.result.joinpath(f"rank{rank}.json").write_text(json.dumps(result), encoding="utf-8")


def train_outlast(args: argparse.Namespace) -> None:
    """A worker of outlast."""
    from gpt import loss_fn

    import outlast
    from outlast.runtime.shard_state import ShardState

    phases = Phases()
    phases.install()
    if args.worker == "bare":
        ShardState.update = _in_place  # type: ignore[method-assign]
        ShardState.commit = lambda self, record: setattr(self, "step", record.step)  # type: ignore
    run = outlast.init(seed=0, leaves=LEAVES)
    plain, windows = network(args)
    parameters = sum(p.numel() for p in plain.parameters())
    parity = PARITY.get(args.worker, 0)
    model = run.prepare(plain, optimizer=adamw, zero=2, clip=CLIP, parity=parity)
    clock = Clock(phases)
    for step in run.steps(args.steps):
        with step:
            for batch in step.batches(windows, batch_size=args.batch_size):
                step.backward(loss_fn(model, batch))
        run.log(loss=step.loss)
        clock.tick()
    clock.write(args, run.rank, parameters)
    run.close()


def _in_place(state: Any, change: Callable[[dict[str, Any]], None]) -> None:
    """The update without its second half."""
    change({role.name: state.live(role.name) for role in state.roles})


def train_ddp(args: argparse.Namespace) -> None:
    """A worker of torchrun."""
    from contextlib import nullcontext

    import torch
    import torch.distributed as dist
    from gpt import loss_fn
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import default_collate

    from outlast.runtime.samples import samples

    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, count = dist.get_rank(), LEAVES // dist.get_world_size()
    plain, windows = network(args)
    parameters = sum(p.numel() for p in plain.parameters())
    model = DistributedDataParallel(plain, gradient_as_bucket_view=True)
    optimizer, clock = adamw(model.parameters()), Clock(Phases())
    for step in range(args.steps):
        for leaf in range(rank * count, (rank + 1) * count):
            chosen = samples(0, step, leaf, LEAVES, args.batch_size, len(windows))
            batch = default_collate([windows[index] for index in chosen])
            with nullcontext() if leaf == (rank + 1) * count - 1 else model.no_sync():
                (loss_fn(model, batch) / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        clock.tick()
    clock.write(args, rank, parameters)
    dist.destroy_process_group()


def measured(variant: str, args: argparse.Namespace, out: Path) -> list[dict[str, Any]]:
    """One job of a variant; the results of its ranks."""
    out.mkdir(parents=True)
    names = ("steps", "layers", "width", "heads", "context", "batch_size", "dropout")
    flags = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in names]
    worker = [str(Path(__file__).resolve()), f"--worker={variant}", f"--result={out}", *flags]
    if variant == "ddp":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   f"--nproc-per-node={RANKS}", *worker]  # fmt: skip
    else:
        command = outlast("launch", "--standalone", f"--nnodes={RANKS}", "--log-dir",
                          str(out / "logs"), *worker)  # fmt: skip
    if launched(out, command) != 0:
        raise SystemExit(1)
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


def compare(args: argparse.Namespace, out: Path) -> dict[str, list[list[dict[str, Any]]]]:
    """All rounds: variant -> round -> rank -> result."""
    found: dict[str, list[list[dict[str, Any]]]] = {variant: [] for variant in args.variants}
    for index in range(args.rounds):
        for variant in args.variants:
            ranks = measured(variant, args, out / f"round{index}-{variant}")
            found[variant].append(ranks)
            say(f"round {index}: {variant:6} {median(ranks[0]['wall']):.3f} s a step")
    return found


def report(args: argparse.Namespace, found: dict[str, list[list[dict[str, Any]]]]) -> None:
    """Print both tables."""
    walls = {v: [s for ranks in rounds for s in ranks[0]["wall"]] for v, rounds in found.items()}
    cpus = {v: [s for ranks in rounds for rank in ranks for s in rank["cpu"]]
            for v, rounds in found.items()}  # fmt: skip
    wall = {variant: median(seconds) for variant, seconds in walls.items()}
    cpu = {variant: median(seconds) for variant, seconds in cpus.items()}
    measures = [variant for variant in ("bare", "ddp") if variant in found]
    rows: list[list[object]] = []
    for variant in args.variants:
        edges = f"{min(walls[variant]):.2f} to {max(walls[variant]):.2f}"
        row: list[object] = [variant, f"{wall[variant]:.3f}", edges]
        row += [wall[variant] / wall[measure] for measure in measures]
        row.append(f"{cpu[variant]:.3f}")
        rows.append(row + [cpu[variant] / cpu[measure] for measure in measures])
    some = next(iter(found.values()))
    tokens = LEAVES * args.batch_size * args.context
    print(f"{some[0][0]['parameters'] / 1e6:.1f} million parameters, {tokens} tokens a step, "
          f"{RANKS} ranks, {len(next(iter(walls.values())))} steps of each\n")  # fmt: skip
    ratios = [f"to {measure}" for measure in measures]
    head = ["variant", "step, s (median)", "lowest to highest", *ratios]
    print(table([*head, "CPU s per rank and step", *ratios], rows))
    for variant in [variant for variant in args.variants if variant in PARITY]:
        rows = []
        for phase in NAMES:
            ms = 1000 * median([ranks[0]["phases"][phase] for ranks in found[variant]])
            rows.append([phase, f"{ms:.1f}", f"{ms / 10 / wall[variant]:.1f} %"])
        print("\n" + table([f"phase of {variant}", "ms a step", "share"], rows))


def main() -> None:
    """The command line."""
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    add("--rounds", type=int, default=5)
    add("--steps", type=int, default=8, help=f"of a job, {DROPPED} of them dropped")
    add("--layers", type=int, default=6)
    add("--width", type=int, default=384)
    add("--heads", type=int, default=6)
    add("--context", type=int, default=64)
    add("--batch-size", type=int, default=8)
    add("--dropout", type=float, default=0.1)
    add("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    add("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        (train_ddp if args.worker == "ddp" else train_outlast)(args)
        return
    with workspace(args.out) as out:
        found = compare(args, out)
    report(args, found)
    write_json(args.json, found)


if __name__ == "__main__":
    main()
