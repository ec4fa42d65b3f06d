"""What a lost block costs a small GPT, by what is put in its place.

    python benchmarks/average.py --json average.json --plot docs/average.svg

Every arm trains the same model on the same batches and loses the same blocks before the same
iterations (`--losses` of them, seeded); an arm that goes back repeats steps, so it is compared by
iterations, not steps. The averages, weights, rates and moments are the product's
(`checkpoint/average.py`, `runtime/optimizer.py`). Beside the curves, at several points of the
undisturbed run every block in turn is replaced and the validation loss taken, which shows the jump
alone, without the luck of which block is lost when.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from corpus import Windows, standard_library
from gpt import GPT, Block, Config, loss_fn

from outlast.checkpoint.average import RATE, Averager, Averaging, blend, cohorts
from outlast.layout.layout import Layout
from outlast.layout.run import Run
from outlast.layout.space import chains
from outlast.runtime.flat_model import FlatModel
from outlast.runtime.fold import unit_runs
from outlast.runtime.optimizer import Cohort, CohortOptimizer, discover
from outlast.runtime.samples import samples

ARMS = ("random", "copy", "average", "weighted", "checkpoint", "parity")
LABELS = {
    "random": "random re-initialisation",
    "copy": "copy of a neighbour",
    "average": "plain average",
    "weighted": "weighted average (rung `average`)",
    "checkpoint": "roll-back to a checkpoint",
    "parity": "parity (exact)",
}
CPU = torch.device("cpu")
WARMUP = 20


@dataclass(frozen=True)
class Text:
    """Batches by step, and the fixed batch that validates."""

    train: Windows
    validation: Sequence[torch.Tensor]
    batch_size: int
    seed: int

    def batch(self, step: int) -> list[torch.Tensor]:
        """The batch of a step, whoever asks."""
        chosen = samples(self.seed, step, 0, 1, self.batch_size, len(self.train))
        return _stacked([self.train[index] for index in chosen])


def _stacked(items: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    return [torch.stack(column) for column in zip(*items, strict=True)]


class Trainer:
    """One model in training, some of whose blocks get lost."""

    def __init__(self, options: argparse.Namespace, text: Text) -> None:
        torch.manual_seed(options.seed)
        self.config = Config(
            layers=options.layers, width=options.width, heads=4, context=options.context, dropout=0
        )
        self.flat = FlatModel(GPT(self.config))
        self.space, self.text, self.rate = self.flat.space, text, options.lr
        factory = partial(torch.optim.AdamW, lr=options.lr, betas=(0.9, 0.95), weight_decay=0.1)
        state = discover(factory, CPU)
        self.optimizer = CohortOptimizer(factory, state)
        self.moments = {name: torch.zeros_like(self.flat.param) for name in state.roles}
        self.gradient = torch.empty_like(self.flat.param)
        self.norms: list[float] = []
        self.lineage: list[Averaging] = []
        self.scalars: list[dict[str, float]] = [{}]
        self.step = 0
        self._rebuild()

    def _rebuild(self) -> None:
        runs = unit_runs(self.space, [Run.of(0, self.space.numel)])
        self.runs, members = cohorts(runs, tuple(self.lineage))
        rates = [1.0] + [RATE] * len(self.lineage)
        made = [
            Cohort(rate, scalars, bool(scalars))
            for rate, scalars in zip(rates, self.scalars, strict=True)
        ]
        self.optimizer.rebuild([self._part(self.flat.param, r) for r in self.runs], made, members)

    @staticmethod
    def _part(whole: torch.Tensor, run: Run) -> torch.Tensor:
        return whole[run.start : run.stop]

    def train(self) -> float:
        """One step; returns its loss."""
        self.flat.bind_gradients(self.gradient)
        loss = loss_fn(self.flat.module, self.text.batch(self.step))
        loss.backward()
        self.norms = [float(self.gradient[u.start : u.stop].norm()) for u in self.space.units]
        total = math.sqrt(sum(norm * norm for norm in self.norms))
        self.gradient.mul_(min(1.0, 1.0 / (total + 1e-6)))
        self.scalars = self.optimizer.step(
            [self._part(self.flat.param, run) for run in self.runs],
            [{n: self._part(m, run) for n, m in self.moments.items()} for run in self.runs],
            [self._part(self.gradient, run) for run in self.runs],
            self.rate * min(1.0, (self.step + 1) / WARMUP),
        )
        self.step += 1
        return loss.item()

    def validate(self) -> float:
        """Bits per byte of the validation batch."""
        with torch.no_grad():
            return loss_fn(self.flat.module, self.text.validation).item() / math.log(2)

    def replace(self, unit: int, how: str) -> None:
        """Put something in the place of a lost block; only its parameters."""
        lost = self.space.units[unit]
        run = Run.of(lost.start, lost.stop)
        if how == "random":
            self.flat.param[lost.start : lost.stop] = self._fresh(unit)
            return
        norms = self.norms if how in ("weighted", "norms") else []
        kind = "plain" if how == "norms" else "squared"
        layout = Layout.of({0: [Run.of(0, self.space.numel)]})
        averager = Averager(self.space, kind, layout, {0: [run]}, norms)
        for fill in averager.fills:
            sides = fill.sides[:1] if how == "copy" else fill.sides
            values = [self._part(self.flat.param, side.run) for side in sides]
            weights = [1.0] if how == "copy" else [side.weight for side in sides]
            self._part(self.flat.param, fill.run).copy_(blend(values, weights))

    def start_over(self, unit: int) -> None:
        """Empty moments and the higher rate for a block that was replaced."""
        lost = self.space.units[unit]
        run = Run.of(lost.start, lost.stop)
        here = Averaging(self.step, len(self.lineage), "", (), (), (run,), {})
        kept = [entry for entry in self.lineage if entry.runs != here.runs]
        places = [self.lineage.index(entry) for entry in kept]
        self.scalars = [self.scalars[0], *(self.scalars[1 + at] for at in places), {}]
        self.lineage = [*kept, here]
        self._rebuild()

    def _fresh(self, unit: int) -> torch.Tensor:
        """First values of a block, as the model's own constructor draws them."""
        torch.manual_seed(1_000_003 * self.step + unit)
        model = GPT(Config(**{**vars(self.config), "layers": len(chains(self.space)[0])}))
        block: Block = model.blocks[chains(self.space)[0].index(unit)]
        return torch.cat([parameter.data.flatten() for parameter in block.parameters()])

    def save(self) -> Any:
        """All that a checkpoint holds."""
        moments = {name: values.clone() for name, values in self.moments.items()}
        return self.step, self.flat.param.clone(), moments, list(self.scalars)

    def load(self, saved: Any) -> None:
        """Go back to a checkpoint."""
        self.step, param, moments, scalars = saved
        self.flat.param.copy_(param)
        for name, values in self.moments.items():
            values.copy_(moments[name])
        self.scalars, self.lineage = list(scalars), []
        self._rebuild()


def trace(options: argparse.Namespace, blocks: Sequence[int]) -> dict[int, int]:
    """Iteration -> the block that is lost before it; none close to the start or the end."""
    rng = np.random.default_rng(options.seed)
    first, last = options.iterations // 5, options.iterations * 9 // 10
    at = np.linspace(first, last, options.losses).astype(int)
    jitter = rng.integers(-8, 9, options.losses)
    return {int(i): int(rng.choice(blocks)) for i in at + jitter}


def run_arm(
    arm: str, options: argparse.Namespace, text: Text, watch: Callable[[Trainer, int], None]
) -> dict[str, Any]:
    """One training under the trace: validation over iterations, and around every loss."""
    trainer = Trainer(options, text)
    losses = trace(options, chains(trainer.space)[0])
    saved = trainer.save()
    curve: list[tuple[int, float]] = []
    jumps: list[tuple[int, int, float, float]] = []
    for iteration in range(options.iterations):
        unit = losses.get(iteration)
        if unit is not None and arm != "parity":
            before = trainer.validate()
            if arm == "checkpoint":
                trainer.load(saved)
            else:
                trainer.replace(unit, arm)
                trainer.start_over(unit)
            after = trainer.validate()
            jumps.append((iteration, unit, before, after))
            curve += [(iteration, before), (iteration, after)]
        if trainer.step % options.checkpoint_every == 0:
            saved = trainer.save()
        if iteration % options.every == 0:
            curve.append((iteration, trainer.validate()))
        watch(trainer, iteration)
        trainer.train()
    curve.append((options.iterations, trainer.validate()))
    return {"curve": curve, "jumps": jumps, "steps": trainer.step, "final": curve[-1][1]}


def probe(trainer: Trainer) -> Iterator[dict[str, Any]]:
    """The jump of every block under every replacement, at one point of the undisturbed run."""
    before = trainer.validate()
    param = trainer.flat.param.clone()
    for unit in chains(trainer.space)[0]:
        found: dict[str, Any] = {"step": trainer.step, "unit": trainer.space.units[unit].name}
        for how in ("random", "copy", "average", "weighted", "norms"):
            trainer.replace(unit, how)
            found[how] = trainer.validate() - before
            trainer.flat.param.copy_(param)
        yield found


def plot(arms: dict[str, Any], lost: Sequence[int], path: Path) -> None:
    """Validation over iterations, one line per arm, as SVG that is the same for the same data."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "outlast", "font.size": 10}):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        for at in lost:
            axes.axvline(at, color="0.85", linewidth=1, zorder=0)
        for arm, result in arms.items():
            axes.plot(*zip(*result["curve"], strict=True), label=LABELS[arm], linewidth=1.4)
        top = max(bits for at, bits in arms["parity"]["curve"] if at >= lost[0] // 2)
        axes.set_ylim(top=top + 0.3)
        axes.set(xlabel="iterations (grey: a block is lost)", ylabel="validation, bits per byte")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper right")
        figure.savefig(path, metadata={"Date": None})


def show(figures: dict[str, Any]) -> None:
    """The tables, as they stand in docs/recovery.md."""
    whole = figures["arms"]["parity"]["final"]
    print("| what replaces a lost block | validation after all losses | against no loss |")
    print("|---|---:|---:|")
    for arm, result in figures["arms"].items():
        print(f"| {LABELS[arm]} | {result['final']:.4f} | {result['final'] - whole:+.4f} |")
    print()
    print("| jump of the validation loss, median over blocks | inner blocks | first and last |")
    print("|---|---:|---:|")
    names = {unit: place for place, unit in enumerate(figures["blocks"])}
    for how in ("random", "copy", "average", "norms", "weighted"):
        inner, outer = [], []
        for found in figures["probes"]:
            outside = names[found["unit"]] in (0, len(names) - 1)
            (outer if outside else inner).append(found[how])
        label = {"norms": "weighted by norms, not squared"}.get(how) or LABELS[how]
        print(f"| {label} | {statistics.median(inner):+.4f} | {statistics.median(outer):+.4f} |")


def read(options: argparse.Namespace) -> Text:
    """The text of the examples; 64 windows of it validate."""
    corpus = standard_library(options.corpus_mb)
    held_out = Windows(corpus.validation, options.context)
    chosen = [held_out[index * len(held_out) // 64] for index in range(64)]
    train = Windows(corpus.train, options.context)
    return Text(train, _stacked(chosen), options.batch_size, options.seed)


def work(options: argparse.Namespace, arm: str) -> dict[str, Any]:
    """One arm, in a process of its own; the undisturbed one takes the probes."""
    torch.set_num_threads(1)
    began = time.monotonic()
    probes: list[dict[str, Any]] = []
    points = {options.iterations * part // 10 for part in (2, 4, 6, 8)}

    def watch(trainer: Trainer, iteration: int) -> None:
        if arm == "parity" and iteration in points:
            probes.extend(probe(trainer))

    result = run_arm(arm, options, read(options), watch)
    return result | {"probes": probes, "seconds": time.monotonic() - began}


def main() -> None:
    """Runs the arms, prints the tables, and writes figures and plot where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--layers", type=int, default=8)
    add("--width", type=int, default=96)
    add("--context", type=int, default=64)
    add("--batch-size", type=int, default=16)
    add("--iterations", type=int, default=400)
    add("--losses", type=int, default=5)
    add("--checkpoint-every", type=int, default=50)
    add("--every", type=int, default=10, help="iterations between points of a curve")
    add("--lr", type=float, default=1e-3)
    add("--seed", type=int, default=0)
    add("--processes", type=int, default=2, help="arms that run at once, on one thread each")
    add("--corpus-mb", type=float, default=4.0)
    add("--json", type=Path, metavar="FILE", help="write the figures here")
    add("--plot", type=Path, metavar="FILE", help="write the curves here, as SVG")
    options = parser.parse_args()
    probes: list[dict[str, Any]] = []
    arms: dict[str, Any] = {}
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        for arm, result in zip(ARMS, pool.map(partial(work, options), ARMS), strict=True):
            print(f"{LABELS[arm]}: {result['final']:.4f} in {result['seconds']:.0f} s", flush=True)
            probes += result.pop("probes")
            arms[arm] = result
    space = Trainer(options, read(options)).space
    lost = sorted(trace(options, chains(space)[0]))
    blocks = [space.units[unit].name for unit in chains(space)[0]]
    flags = {name: value for name, value in vars(options).items() if name not in ("json", "plot")}
    figures = {"options": flags, "blocks": blocks, "lost": lost, "arms": arms, "probes": probes}
    show(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    if options.plot:
        plot(arms, lost, options.plot)


if __name__ == "__main__":
    main()
