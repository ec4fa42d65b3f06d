"""Bytes of state on every rank against the formulas of ZeRO, to the byte.

    python benchmarks/memory.py [--ranks 1 2 3 4] [--zero 0 1 2] [--dtypes fp32 bf16]

psi is the number of parameters of a GPT whose shape divides evenly by 1 to 4 ranks at the grain of
this run; N is the number of ranks, p the bytes of a working parameter (4, or 2 in bf16), and the
state of the optimizer is 12 bytes per parameter (fp32 parameter or master, and two moments):

    working parameters   p psi
    reduced gradient     4 psi / N, what the update reads; 4 psi in ZeRO 0
    state, two halves    2 * 12 psi / N; 2 * 12 psi in ZeRO 0
    parity, two halves   2 * 12 psi / N / (N - 1); none in ZeRO 0 and for one rank
    leaf gradients kept  0 between steps in ZeRO 2; else 4 psi for each buffer that a step needs

Measured are the tensors and the records in each worker's process after some steps; a line is
`equal` if all ranks equal the formula. Resident memory is for orientation: it contains Python,
torch and the batches; its shared part has the halves, and libraries.
"""

import argparse
import json
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from job import launched, outlast, parser_of, say, table, workspace, write_json

GRAIN, LEAVES, MIB = 64, 8, 2**20
WHAT = ("working parameters", "reduced gradient", "state, two halves", "parity, two halves",
        "leaf gradients kept")  # fmt: skip


def expected(psi: int, ranks: int, zero: int, dtype: str, leaves: list[int]) -> list[int]:
    """The formulas, in the order of WHAT; the rank computed the leaves `leaves`."""
    share = 1 if zero == 0 else ranks
    parity = 0 if zero == 0 or ranks == 1 else 2 * 12 * psi // ranks // (ranks - 1)
    kept = 0 if zero == 2 else 4 * psi * buffers(leaves)
    working = (4 if dtype == "fp32" else 2) * psi
    return [working, 4 * psi // share, 2 * 12 * psi // share, parity, kept]


def buffers(leaves: list[int]) -> int:
    """Buffers a rank needs at once to add `leaves` up in the order of the tree."""
    held: list[tuple[int, int]] = []  # nodes (level, index)
    most = 0
    for leaf in leaves:
        held.append((0, leaf))
        most = max(most, len(held))
        while len(held) > 1 and held[-1][1] % 2 and held[-2] == (held[-1][0], held[-1][1] - 1):
            level, index = held.pop()
            held[-1] = (level + 1, index // 2)
    return most


def worker(args: argparse.Namespace) -> None:
    """Train a little, and write what this rank holds."""
    import psutil
    import torch
    from gpt import GPT, Config

    import outlast
    from outlast.runtime.training import Training

    seen: dict[str, Any] = {"gradient": 0, "leaves": []}
    update = Training._update

    def watched(training: Training, gradient: torch.Tensor, *rest: Any) -> None:
        seen["gradient"] = gradient.nbytes
        update(training, gradient, *rest)

    Training._update = watched  # type: ignore[method-assign]
    run = outlast.init(leaves=LEAVES, grain=GRAIN)
    torch.manual_seed(0)
    config = Config(layers=4, width=192, heads=4, context=130, dropout=0.0)
    model = run.prepare(
        GPT(config), optimizer=partial(torch.optim.AdamW, fused=True), zero=args.zero[0],
        dtype=torch.bfloat16 if args.dtypes[0] == "bf16" else None,
    )  # fmt: skip

    def batch(step: int, leaf: int) -> torch.Tensor:
        seen["leaves"] = [*(one for one in seen["leaves"] if one != leaf), leaf]
        return torch.full((1, 8), leaf)

    for step in run.steps(4):
        with step:
            for tokens in step.batches(batch):
                step.backward(model(tokens).float().mean())
    found = {**seen, **held(run.training), "rss": psutil.Process().memory_info()._asdict()}
    args.result.joinpath(f"rank{run.rank}.json").write_text(json.dumps(found), encoding="utf-8")
    run.close()


def held(training: Any) -> dict[str, int]:
    """Bytes of this rank's tensors and records after a commit."""
    state, memory = training.state, training.state.memory
    halves = [state.host(half, role.name, run).nbytes
              for half in (0, 1) for role in state.roles for run in state.runs]  # fmt: skip
    parity = [memory.parity.record(half) for half in (0, 1)]
    stack = [*training.stack.sums.values(), *training.stack._free]
    return {
        "psi": training.model.space.numel,
        "working": training.model.param.nbytes,
        "state": sum(halves),
        "parity": sum(unit.length for record in parity if record for unit in record.units),
        "kept": sum(gradient.nbytes for gradient in stack),
    }


def measured(out: Path, ranks: int, zero: int, dtype: str) -> list[dict[str, Any]]:
    """What every rank of one job reports."""
    out.mkdir(parents=True)
    command = outlast(
        "launch", "--standalone", "--nnodes", str(ranks), "--log-dir", str(out / "logs"),
        str(Path(__file__).resolve()), f"--result={out}", "--zero", str(zero), "--dtypes", dtype,
    )  # fmt: skip
    if launched(out, command) != 0:
        raise SystemExit(1)
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(ranks)]


def lines(reports: list[dict[str, Any]], zero: int, dtype: str) -> list[list[object]]:
    """Rows of the table for one job."""
    names = ("working", "gradient", "state", "parity", "kept")
    formulas = [expected(r["psi"], len(reports), zero, dtype, r["leaves"]) for r in reports]
    rows: list[list[object]] = []
    for index, what in enumerate(WHAT):
        wanted = [formula[index] for formula in formulas]
        got = [report[names[index]] for report in reports]
        verdict = "equal" if wanted == got else "DIFFERENT"
        shown = [", ".join(f"{v:,}" for v in sorted(set(column))) for column in (wanted, got)]
        rows.append([len(reports), zero, dtype, what, *shown, verdict])
    return rows


def main() -> None:
    """The command line; the exit code is 1 if anything differs from its formula."""
    parser = parser_of(__doc__)
    parser.add_argument("--ranks", nargs="+", type=int, choices=(1, 2, 3, 4), default=[1, 2, 3, 4])
    parser.add_argument("--zero", nargs="+", type=int, choices=(0, 1, 2), default=[0, 1, 2])
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.result:
        worker(args)
        return
    rows: list[list[object]] = []
    resident: list[list[object]] = []
    with workspace(args.out) as out:
        for dtype, zero, ranks in product(args.dtypes, args.zero, args.ranks):
            reports = measured(out / f"{dtype}-zero{zero}-{ranks}", ranks, zero, dtype)
            rows += lines(reports, zero, dtype)
            most = [max(r["rss"][kind] for r in reports) / MIB for kind in ("rss", "shared")]
            resident.append([ranks, zero, dtype, f"{most[0]:.0f}", f"{most[1]:.0f}"])
            say(f"{dtype} ZeRO {zero} on {ranks}: " + ", ".join(str(r[-1]) for r in rows[-5:]))
    print(table(["N", "ZeRO", "dtype", "bytes of", "formula", "measured", ""], rows))
    print("\n" + table(["N", "ZeRO", "dtype", "resident MiB", "shared MiB"], resident))
    different = sum(row[-1] != "equal" for row in rows)
    print(f"\n{len(rows)} values, {different} differ")
    write_json(args.json, {"rows": rows, "resident": resident})
    if different:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
