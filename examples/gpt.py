"""A byte-level GPT on the sources of Python's standard library.

    python examples/gpt.py                                   # alone: a job of one
    outlast launch --standalone --nproc-per-node 2 examples/gpt.py --layers 6 --width 256

The loss of step s is the same number however many workers compute it, and whatever happened to
them on the way: the script never asks for its rank but to decide who prints.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from corpus import Windows, standard_library
from progress import Progress
from torch import nn

import outlast

BYTES = 256
Batch = Sequence[torch.Tensor]  # (bytes, the byte after each), int64 [batch, context]


@dataclass(frozen=True, kw_only=True)
class Config:
    """The shape of the model; `width` is a multiple of `heads`."""

    layers: int
    width: int
    heads: int
    context: int
    dropout: float


class Block(nn.Module):
    """Attention and a feed-forward layer, each normalised before and added to the stream."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.attention_norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Float [batch, length, width] to the same shape."""
        batch, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(seen.transpose(1, 2).reshape(batch, length, width)))
        fed: torch.Tensor = self.dropout(self.down(F.gelu(self.up(self.feed_norm(x)))))
        return x + fed


class GPT(nn.Module):
    """Bytes to logits of the next byte: int64 [batch, length] -> float [batch, length, 256]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, config.width)
        self.position = nn.Embedding(config.context, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, BYTES, bias=False)
        self.apply(self._initialise)
        for name, weight in self.named_parameters():
            if name.endswith(("out.weight", "down.weight")):  # depth must not swell the stream
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * config.layers))

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """Logits of the byte after each byte of `text`."""
        x = self.embedding(text) + self.position.weight[: text.shape[1]]
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Mean cross entropy of the next byte, in nats, taken in fp32 whatever the model's dtype."""
    device = next(model.parameters()).device
    text, following = (part.to(device, non_blocking=True) for part in batch)
    return F.cross_entropy(model(text).flatten(0, 1).float(), following.flatten())


def schedule(warmup: int, steps: int) -> Callable[[int], float]:
    """Linear warm-up, then a cosine down to a tenth; a pure function of the step."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, steps - warmup)
        return 0.55 + 0.45 * math.cos(math.pi * min(1.0, done))

    return factor


def validate(model: nn.Module, windows: Windows, batches: int, batch_size: int) -> float:
    """Bits per byte over `batches` fixed batches, spread evenly over the validation text.

    Every rank evaluates the same few batches. Splitting them over the ranks would make the number
    depend on the world size; leaving them to rank 0 would let the others wait, and a rank 0 that
    dies would take the number with it. This way all ranks know it, for the same wall time.
    """
    count = min(len(windows), batches * batch_size)
    chosen = [windows[i * len(windows) // count] for i in range(count)]
    total = 0.0
    model.eval()
    with torch.no_grad():
        for start in range(0, count, batch_size):
            part = chosen[start : start + batch_size]
            batch = [torch.stack(column) for column in zip(*part, strict=True)]
            total += loss_fn(model, batch).item() * len(part)
    model.train()
    return total / count / math.log(2)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags; the defaults are a model of 3.3 million parameters."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--layers", type=int, default=4)
    add("--width", type=int, default=256)
    add("--heads", type=int, default=4)
    add("--context", type=int, default=128, help="bytes a prediction can look back")
    add("--dropout", type=float, default=0.1)
    add("--batch-size", type=int, default=4, help="windows in one leaf")
    add("--leaves", type=int, default=8, help="leaves in one step, however many workers there are")
    add("--steps", type=int, default=200)
    add("--lr", type=float, default=1e-3)
    add("--weight-decay", type=float, default=0.1)
    add("--warmup", type=int, default=20, help="steps")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient; 0 for no clipping")
    add("--zero", type=int, choices=(0, 1, 2), default=2)
    add("--parity", type=int, default=1, help="nodes that may be lost at once")
    add("--group", type=int, default=16, help="most members of a parity group")
    add("--spot-check", type=int, default=0, help="steps between two leaves computed twice")
    add("--dtype", choices=("fp32", "bf16"), default="fp32")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    add("--corpus-mb", type=float, default=8.0)
    add("--eval-every", type=int, default=50, help="steps between validations; 0 for none")
    add("--eval-batches", type=int, default=4)
    add("--pace", type=float, default=0.0, help="seconds that a step takes at least, to watch it")
    add("--weights", type=Path, help="write the trained parameters (a state dict) to this file")
    add("--digest-file", type=Path, help="write the sha256 of the trained state to this file")
    return parser.parse_args(arguments)


def prepare(run: outlast.Run, args: argparse.Namespace) -> tuple[nn.Module, int]:
    """The model, taken over by the run, and the number of its parameters."""
    torch.manual_seed(args.seed)  # the same first parameters on every rank
    network = GPT(Config(**{name: getattr(args, name) for name in Config.__dataclass_fields__}))
    network = network.to(args.device)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    adamw = partial(
        torch.optim.AdamW,
        lr=args.lr,
        betas=(0.9, 0.95),
        weight_decay=args.weight_decay,
        fused=True,
    )
    model = run.prepare(
        network,
        optimizer=adamw,
        zero=args.zero,
        parity=args.parity,
        group=args.group,
        spot_check=args.spot_check,
        clip=args.clip or None,
        schedule=schedule(args.warmup, args.steps),
        dtype=torch.bfloat16 if args.dtype == "bf16" else None,
    )
    return model, parameters


def train(args: argparse.Namespace) -> None:
    """Train as the flags say, and tell about it on rank 0."""
    run = outlast.init(seed=args.seed, leaves=args.leaves)
    corpus = standard_library(args.corpus_mb)
    training, validation = (Windows(t, args.context) for t in (corpus.train, corpus.validation))
    model, parameters = prepare(run, args)
    if run.rank == 0:
        sizes = f"{len(corpus.train) / 1e6:.2f} + {len(corpus.validation) / 1e6:.2f} MB"
        print(f"{parameters / 1e6:.2f} million parameters; {sizes} of text {corpus.sha256[:12]}")
    metrics: dict[str, float] = {}
    began = time.monotonic()
    with Progress(args.steps) as progress:
        for step in run.steps(args.steps):
            with step:
                for batch in step.batches(training, batch_size=args.batch_size):
                    step.backward(loss_fn(model, batch))
            done = step.index + 1
            metrics = {"loss": step.loss, "bits_per_byte": step.loss / math.log(2)}
            if args.eval_every and (done == args.steps or done % args.eval_every == 0):
                bits = validate(model, validation, args.eval_batches, args.batch_size)
                metrics["validation_bits_per_byte"] = bits
            run.log(**metrics)
            if run.rank == 0:
                progress.show(done, run.world_size, metrics)
            began = pause(began, args.pace)
    digest = run.digest()
    if run.rank == 0:
        print(f"sha256 of parameters and optimizer state: {digest}")
        if args.digest_file is not None:
            result = {"sha256": digest, "parameters": parameters, **metrics}
            write(args.digest_file, json.dumps(result) + "\n")
        if args.weights is not None:
            args.weights.parent.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), args.weights)
    run.close()


def pause(began: float, pace: float) -> float:
    """Wait until `pace` seconds after `began`; returns when that was, by the monotonic clock."""
    time.sleep(max(0.0, began + pace - time.monotonic()))
    return time.monotonic()


def write(path: Path, text: str) -> None:
    """Write the whole file or none of it: the writer may be killed at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_name(path.name + ".partial")
    partial_path.write_text(text, encoding="utf-8")
    os.replace(partial_path, path)


if __name__ == "__main__":
    train(parse())
