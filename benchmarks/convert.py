"""Converting a DeepSpeed checkpoint to the universal format: outlast beside DeepSpeed's own tool.

    python benchmarks/convert.py [--stages 1 3] [--ranks 2] [--layers 5] [--width 512] [--rounds 3]

Real DeepSpeed trains a GPT for two steps and saves it, once for each stage. Then both convert the
same checkpoint, in turn, every round in another order, and each tool twice: as it comes, and with
one worker. MB are those of the state (12 bytes for each trained parameter) and the time is that of
the whole command, its imports included; memory is the highest sum of the proportional set sizes of
the process and its children, looked at every 50 ms. The table has medians.
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
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {
    "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "examples"),
    "DEEPSPEED_LOG_LEVEL": "error", "TORCHDYNAMO_DISABLE": "1", "PYTHONWARNINGS": "ignore",
}  # fmt: skip


def commands(source: Path, into: Path) -> dict[str, list[str]]:
    """Tool -> its command line."""
    theirs = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    theirs += ["--input_folder", str(source), "--output_folder", str(into / "theirs_universal")]
    ours = [str(Path(sys.executable).parent / "outlast"), "convert", str(source), str(into)]
    ours += ["--to", "universal"]
    return {
        "ds_to_universal": theirs,
        "ds_to_universal, 1 + 1 workers": [
            *theirs, "--num_extract_workers", "1", "--num_merge_workers", "1",
        ],
        "outlast convert": ours,
        "outlast convert, 1 worker": [*ours, "--workers", "1"],
        "outlast convert, unproven": [*ours, "--no-proof"],
    }  # fmt: skip


def measured(command: list[str]) -> tuple[float, float, float]:
    """Wall seconds, processor seconds and MB of the whole tree of one command."""
    began = time.monotonic()
    before = os.times()
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    watched, peak = psutil.Process(process.pid), 0
    while process.poll() is None:
        peak = max(peak, _tree_bytes(watched))
        time.sleep(0.05)
    seconds = time.monotonic() - began
    assert process.stdout is not None
    output = process.stdout.read()
    assert process.returncode == 0, output[-4000:].decode()
    after = os.times()
    used = after.children_user + after.children_system
    return seconds, used - before.children_user - before.children_system, peak / 1e6


def _tree_bytes(root: psutil.Process) -> int:
    total = 0
    try:
        for process in [root, *root.children(recursive=True)]:
            total += process.memory_full_info().pss
    except psutil.Error:
        return 0  # one ended meanwhile: the next look counts
    return total


def train(stage: int, rank: int, args: argparse.Namespace, into: str) -> None:
    """One rank of the run that is saved."""
    import deepspeed
    import torch
    from gpt import GPT, Config, loss_fn
    from torch import distributed

    local = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": args.ranks, "LOCAL_SIZE": args.ranks}
    os.environ.update({key: str(value) for key, value in local.items()})
    store = distributed.FileStore(f"{into}.store", args.ranks)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=args.ranks)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    torch.manual_seed(0)
    heads = args.width // 64
    model = GPT(Config(layers=args.layers, width=args.width, heads=heads, context=64, dropout=0.0))
    model.universal_checkpoint_info = {"universal_checkpoint_version": 0.4}
    engine = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3),
        config={
            "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage},
        },
    )[0]  # fmt: skip
    for _ in range(2):
        tokens = torch.randint(0, 256, (1, 65))
        engine.backward(loss_fn(engine, (tokens[:, :-1], tokens[:, 1:])))
        engine.step()
    engine.save_checkpoint(into)
    if rank == 0:
        count = sum(parameter.ds_numel if stage == 3 else parameter.numel()
                    for parameter in engine.module.parameters())  # fmt: skip
        Path(into, "parameters.json").write_text(json.dumps(count))


def made(stage: int, args: argparse.Namespace, into: Path) -> tuple[Path, float]:
    """A checkpoint, and the MB of its state."""
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--rank", str(rank), str(stage), str(into)],
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
        )
        for rank in range(args.ranks)
    ]
    assert all([process.wait() == 0 for process in ranks]), "DeepSpeed did not save"
    count = json.loads((into / "parameters.json").read_text())
    return into / "global_step2", 12 * count / 1e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 3])
    for name, default in {"ranks": 2, "layers": 5, "width": 512, "rounds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path, help="all single values")
    parser.add_argument("--rank", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        train(int(args.rank[1]), int(args.rank[0]), args, args.rank[2])
        return
    values: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    print("| ZeRO | tool | wall s | processor s | MB/s | peak MB | peak / state |")
    print("|---|---|---|---|---|---|---|")
    for stage in args.stages:
        with tempfile.TemporaryDirectory() as scratch:
            source, size = made(stage, args, Path(scratch, "saved"))
            found = values.setdefault(str(stage), {})
            for round_ in range(args.rounds):
                tools = list(commands(source, Path(scratch, "out")))
                for tool in tools[round_ % len(tools) :] + tools[: round_ % len(tools)]:
                    into = Path(scratch, "out")
                    into.mkdir()
                    found.setdefault(tool, []).append(measured(commands(source, into)[tool]))
                    shutil.rmtree(into)
            for tool in tools:
                wall, used, peak = map(statistics.median, zip(*found[tool], strict=True))
                print(f"| {stage} | {tool} | {wall:.1f} | {used:.1f} | {size / wall:.0f} | "
                      f"{peak:.0f} | {peak / size:.2f} |", flush=True)  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(values))


if __name__ == "__main__":
    main()
