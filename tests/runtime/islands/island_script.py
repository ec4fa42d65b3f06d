"""What the tests of whole islands train: a tiny stack of residual blocks, on numbers of their own.

A batch follows from the step and the leaf alone, so `reference.py` can train on the same ones."""

import argparse
import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn, optim

import outlast
from outlast import Islands

SEED, LEAVES, GRAIN, RATE, CLIP = 1, 4, 64, 3e-3, 1.0
SYMBOLS, LENGTH, WIDTH, BLOCKS = 32, 12, 16, 4
ADAMW = partial(optim.AdamW, lr=RATE)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, SYMBOLS)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        x = self.embedding(text)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        logits: torch.Tensor = self.head(x)
        return logits


def batch(step: int, leaf: int) -> torch.Tensor:
    """Rows that go on in strides; `leaf` counts through all islands."""
    generator = torch.Generator().manual_seed(1000 * step + leaf)
    start, stride = torch.randint(0, SYMBOLS, (2, 8, 1), generator=generator)
    return (start + (1 + stride % 4) * torch.arange(LENGTH + 1)) % SYMBOLS


def loss(model: nn.Module, text: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


def settings(text: str) -> Islands | None:
    """`Islands` from JSON, whose keys are strings; "" for a job that is no island."""
    fields: dict[str, Any] = json.loads(text) if text else {}
    if isinstance(fields.get("delay"), dict):
        fields["delay"] = {int(island): tau for island, tau in fields["delay"].items()}
    return Islands(**fields) if text else None


def main(*arguments: str) -> outlast.Run:
    parser = argparse.ArgumentParser()
    parser.add_argument("--islands", default="")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds of a leaf")
    parser.add_argument("--until", type=Path, help="no pauses any more once this file exists")
    options = parser.parse_args(arguments or None)
    run = outlast.init(seed=SEED, leaves=LEAVES, grain=GRAIN, islands=settings(options.islands))
    model = run.prepare(Stack(), optimizer=ADAMW, clip=CLIP)
    for step in run.steps(options.steps):
        with step:
            for text in step.batches(batch):
                if options.until is None or not options.until.exists():
                    time.sleep(options.pause)
                step.backward(loss(model, text))
        run.log(loss=step.loss)
    outer = run.digest("outer_param", "outer_momentum") if options.islands else ""
    island = os.environ.get("OUTLAST_ISLAND", "0")
    print(f"island {island}: param {run.digest('param')} outer {outer}", flush=True)
    run.close()
    return run


if __name__ == "__main__":
    main()
