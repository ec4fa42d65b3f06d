"""What islands cost in loss: a small GPT trained by several islands, beside one synchronous job.

    python benchmarks/islands.py --json islands.json
    python benchmarks/islands.py --only "2 islands" "4 islands"

All arms read the same samples in the same order, at the same learning rates: a step of M islands
takes together what a step of the synchronous job takes alone. The arms are emulated in one process
each by the reference of the tests (tests/runtime/islands/reference.py), which the runtime equals
bit for bit; so there is no network here, no clock and no luck. What is validated is the outer copy
of island 0. `bytes` is what one island sends to one other, codes alone.

The text is the standard library of this Python (examples/corpus.py), whole files held out.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Self

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "runtime" / "islands"))

from corpus import Windows, standard_library
from gpt import GPT, Config, loss_fn, schedule, validate
from job import table
from reference import Island, Leaf, Reference

from outlast.runtime.islands.codec import codec
from outlast.runtime.islands.settings import Islands
from outlast.runtime.optimizer import Schedule
from outlast.runtime.samples import samples

GRAIN, ALL = 4096, 1_000_000
UNTOLD = ("json", "only", "processes", "plot")  # flags that change no result
BATCHES, BATCH = 16, 64  # of the validation
Batch = list[torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """`islands` of them with the `settings` that differ from the defaults; `exchange` off leaves
    each by itself, and one island without exchange is the synchronous job."""

    islands: int = 2
    settings: Mapping[str, Any] = field(default_factory=dict)
    exchange: bool = True
    bad: str = ""  # what the last island sends from a third of the training on


def _arms() -> dict[str, Arm]:
    def two(**settings: Any) -> Arm:
        return Arm(settings=settings)

    diloco = {"fragment": ALL, "delay": 0, "codec": "none"}
    arms = {
        "synchronous": Arm(islands=1, exchange=False),
        "2 islands": two(),
        "4 islands": Arm(islands=4),
        "DiLoCo, 2": two(**diloco),
        "DiLoCo, 4": Arm(islands=4, settings=diloco),
        "2 apart": Arm(exchange=False),
        "H = 10": two(every=10),
        "H = 100": two(every=100),
        "tau = 0": two(delay=0),
        "tau = 5": two(delay=5),
        "tau = 10": two(delay=10),
        "tau = 1 and 5": two(delay={0: 1, 1: 5}),
        "alpha = 0.5": two(mixing=0.5),
        "tau = 10, alpha = 0.5": two(delay=10, mixing=0.5),
        "none": two(codec="none"),
        "int8": two(codec="int8"),
        "topk": two(codec="topk", outer_lr=1.0, outer_momentum=0.0),
        "topk, no feedback": two(codec="topk", outer_lr=1.0, outer_momentum=0.0, feedback=0.0),
        "1 fragment": two(fragment=ALL),
        "2 fragments": two(fragment=5),
        "10 fragments": two(fragment=1),
        "sequential": two(order="sequential"),
    }
    for rule in ("edit", "trimmed", "median"):
        arms[f"4 islands, {rule}"] = Arm(islands=4, settings={"rule": rule})
    for bad in ("flipped", "noise"):
        for rule in ("mean", "edit", "trimmed", "median"):
            arms[f"{bad}, {rule}"] = Arm(islands=4, settings={"rule": rule}, bad=bad)
    return arms


ARMS = _arms()


@dataclass(frozen=True)
class Text:
    """The leaves of every step, and what validates."""

    train: Windows
    validation: Windows
    options: argparse.Namespace

    @classmethod
    def of(cls, options: argparse.Namespace) -> Self:
        """As much of the text as the options say."""
        corpus = standard_library(options.corpus_mb)
        parts = (Windows(part, options.context) for part in (corpus.train, corpus.validation))
        return cls(*parts, options)

    def leaves(self, step: int, island: int, islands: int) -> list[Leaf]:
        """An island's share of the leaves of a step."""
        each, seed = self.options.leaves // islands, self.options.seed
        return [
            partial(loss_fn, batch=self._batch(seed, step, leaf))
            for leaf in range(island * each, (island + 1) * each)
        ]

    def _batch(self, seed: int, step: int, leaf: int) -> Batch:
        size = self.options.batch_size
        chosen = samples(seed, step, leaf, self.options.leaves, size, len(self.train))
        columns = zip(*(self.train[index] for index in chosen), strict=True)
        return [torch.stack(column) for column in columns]

    def bits(self, model: torch.nn.Module) -> float:
        """Bits per byte of the validation text."""
        return validate(model, self.validation, BATCHES, BATCH)


def model_of(options: argparse.Namespace) -> GPT:
    """The model as every island begins."""
    torch.manual_seed(options.seed)
    shape = {"layers": options.layers, "width": options.width, "context": options.context}
    return GPT(Config(**shape, heads=4, dropout=0.0))


def schedule_of(options: argparse.Namespace) -> Schedule:
    """The learning rate of every step."""
    return Schedule(schedule(options.warmup, options.steps), options.lr)


def tampered(bad: str, options: argparse.Namespace, island: int, step: int, values: Any) -> Any:
    """What the last of four islands sends."""
    if not bad or island != 3 or step < options.steps / 3:
        return values
    if bad == "flipped":
        return values * -10
    generator = torch.Generator().manual_seed(step)
    return torch.randn(len(values), generator=generator) * values.std() * 10


def train(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Train one arm to the end, in a process of its own."""
    torch.set_num_threads(1)
    arm, began = ARMS[name], time.monotonic()
    text, rates = Text.of(options), schedule_of(options)
    factory = partial(
        torch.optim.AdamW, lr=options.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    islands = [Island(i, model_of(options), factory, GRAIN) for i in range(arm.islands)]
    settings = Islands(**{"outer_lr": options.outer_lr, **arm.settings})
    exchange = Reference(
        islands, settings, codec(settings.codec, GRAIN),
        tamper=partial(tampered, arm.bad, options),
    )  # fmt: skip
    result: dict[str, Any] = {"name": name, "arm": asdict(arm), "train": [], "curve": []}
    for step in range(options.steps):
        losses = [
            each.train(text.leaves(step, each.number, len(islands)), rates.rate(step), 1.0)
            for each in islands
        ]
        if arm.exchange:
            exchange.step(step + 1)
        result["train"].append(sum(losses) / len(losses) / math.log(2))
        if (step + 1) % options.eval_every == 0 or step + 1 == options.steps:
            with islands[0].outside(arm.exchange) as model:
                result["curve"].append((step + 1, text.bits(model)))
    sizes = list(exchange.bytes.values())
    whole = sum(sizes[: len(exchange.fragments)])  # every fragment once
    return result | {
        "final": result["curve"][-1][1],
        "local": text.bits(islands[0].flat.module),
        "parameters": islands[0].flat.space.numel,
        "bytes": sum(sizes),
        "peak": max(sizes, default=0) / whole if whole else 0.0,  # of all that is sent in H steps
        "seconds": time.monotonic() - began,
    }


def show(results: Mapping[str, Mapping[str, Any]], options: argparse.Namespace) -> None:
    """The table: loss beside the synchronous job's, and bytes beside its gradients in bf16."""
    one = results.get("synchronous", {}).get("final", math.nan)
    rows = []
    for name in (name for name in ARMS if name in results):
        found = results[name]
        whole = 2 * found["parameters"] * options.steps  # bf16, one gradient a step
        more = f"{found['final'] / one * 100 - 100:+.2f} %"
        saved = ["", ""]
        if found["bytes"]:
            saved = [f"{whole / found['bytes']:.0f}", f"{1 / found['peak']:.1f}"]
        rows.append([name, f"{found['final']:.4f}", more, f"{found['local']:.4f}", *saved])
    print(table(["arm", "bits per byte", "against synchronous", "local copy", "fewer bytes",
                 "lower peak"], rows))  # fmt: skip


def plot(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Validation over steps, one line per arm, as SVG that is the same for the same data."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "outlast", "font.size": 10}):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        for name, found in results.items():
            axes.plot(*zip(*found["curve"], strict=True), label=name, linewidth=1.4)
        axes.set(xlabel="steps", ylabel="validation of the outer copy, bits per byte")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper right")
        figure.savefig(path, metadata={"Date": None})


def flags(text: str) -> argparse.ArgumentParser:
    """The flags of a training; the defaults are 1.3 million parameters and a million bytes read."""
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, default=2000)
    add("--layers", type=int, default=6)
    add("--width", type=int, default=128)
    add("--context", type=int, default=64)
    add("--leaves", type=int, default=4, help="of all islands together")
    add("--batch-size", type=int, default=2, help="windows in one leaf")
    add("--lr", type=float, default=1e-3)
    add("--outer-lr", type=float, default=0.4)
    add("--warmup", type=int, default=100)
    add("--seed", type=int, default=0)
    add("--corpus-mb", type=float, default=16.0)
    return parser


def parse() -> argparse.Namespace:
    """The command line."""
    parser = flags(__doc__)
    add = parser.add_argument
    add("--only", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
    add("--eval-every", type=int, default=250)
    add("--plot", type=Path, help="draw the curves of these arms here, as SVG")
    add("--processes", type=int, default=2, help="arms that run at once, on one thread each")
    add("--json", type=Path, metavar="FILE", help="keep what is measured here, arm by arm")
    return parser.parse_args()


def main() -> None:
    """Train the arms that FILE does not have yet, and print the table."""
    options = parse()
    told = {n: v for n, v in vars(options).items() if n not in UNTOLD}
    results: dict[str, Any] = {}
    if options.json and options.json.exists():
        results = json.loads(options.json.read_text())["arms"]
    missing = [name for name in options.only if name not in results]
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        running = [pool.submit(train, options, name) for name in missing]
        for done in as_completed(running):
            found = done.result()
            results[found["name"]] = found
            print(f"{found['name']}: {found['final']:.4f} in {found['seconds']:.0f} s", flush=True)
            if options.json:
                options.json.write_text(json.dumps({"options": told, "arms": results}))
    show(results, options)
    if options.plot:
        plot({name: results[name] for name in options.only}, options.plot)


if __name__ == "__main__":
    main()
