"""What the tests of whole jobs train: a tiny GPT with dropout, clipping and a schedule.

`--flaw NAME` plants a mistake: some make results depend on the rank, others are misuse."""

import argparse
import errno
import os
import re
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import torch
import torch.nn.functional as F
from fsspec.implementations.local import LocalFileSystem
from torch import nn, optim

import outlast

LENGTH, WIDTH, BYTES, LEAVES = 32, 64, 96, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.attention = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.feed = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        heads = self.attention(self.norms[0](x)).view(batch, length, 3, 2, WIDTH // 2)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(seen.transpose(1, 2).reshape(batch, length, WIDTH)))
        return x + self.dropout(self.feed(self.norms[1](x)))


class TinyGPT(nn.Module):
    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, WIDTH)
        self.position = nn.Parameter(torch.randn(LENGTH, WIDTH) * 0.02)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, BYTES, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        x = self.embedding(text) + self.position
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(x)
        return logits


class MoodyStore(LocalFileSystem):
    """moody:///directory: what the file that `--mood` names says: "hangs" or "full", or well."""

    protocol = "moody"
    mood = Path()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(str(path).removeprefix("moody://")))

    def pipe_file(self, path: str, value: bytes, **options: Any) -> None:
        while (mood := self.mood.read_text() if self.mood.is_file() else "") == "hangs":
            time.sleep(0.02)
        if mood == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.makedirs(self._parent(path), exist_ok=True)
        super().pipe_file(path, value, **options)


class Lamb(optim.SGD):
    """Not element-wise."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.sub_(parameter.grad / parameter.grad.norm())


def dataset() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(99)
    start = torch.randint(0, BYTES, (40, 1), generator=generator)
    stride = torch.randint(1, 9, (40, 1), generator=generator)
    return list((start + stride * torch.arange(LENGTH + 1)) % BYTES)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--zero", type=int, default=2)
    parser.add_argument("--dtype", choices=["bfloat16"])
    parser.add_argument("--parity", type=int, default=1)
    parser.add_argument("--average")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds of a leaf")
    parser.add_argument("--pace", type=Path, help="file with the pause, as long as it is there")
    parser.add_argument("--spot-check", type=int, default=0)
    parser.add_argument("--mood", type=Path, help="see MoodyStore")
    parser.add_argument("--flaw", default="")
    return parser.parse_args()


def prepare(run: outlast.Run, options: argparse.Namespace) -> nn.Module:
    flaw = options.flaw
    if flaw == "model by process":
        torch.manual_seed(time.time_ns() % 2**31)
    adamw = partial(optim.AdamW, lr=3e-3, weight_decay=0.1, fused=bool(options.dtype))
    return run.prepare(
        TinyGPT(),
        optimizer=partial(Lamb, lr=1e-3) if flaw == "lamb" else adamw,
        zero=options.zero,
        clip=0.5,
        schedule=lambda step: min(1.0, (step + 1) / 4),
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        parity=options.parity,
        average=options.average,
        spot_check=options.spot_check,
    )


def pause(options: argparse.Namespace) -> None:
    slow = options.pace is not None and options.pace.exists()
    time.sleep(float(options.pace.read_text()) if slow else options.pause)


def go_wrong(flaw: str, step: int, pause: float) -> None:
    """What the worker that was started as rank 1 does in its leaves from step 3 on."""
    if os.environ.get("RANK") != "1" or step < 3:
        return
    if flaw == "slow":
        time.sleep(3 * pause)
    elif flaw == "dies":
        raise RuntimeError("as planted")
    elif flaw == "endless loop":
        while True:
            pass
    elif flaw == "endless call":
        re.match(r"(a+)+$", 60 * "a" + "b")  # burns the processor and never lets go of the GIL


def main() -> None:
    options, data = arguments(), dataset()
    flaw = options.flaw
    if options.mood:
        MoodyStore.mood = options.mood
        fsspec.register_implementation("moody", MoodyStore)
    run = outlast.init(seed=3, leaves=6 if flaw == "six leaves" else LEAVES)
    model = prepare(run, options)
    if flaw == "prepare twice":
        prepare(run, options)
    for step in run.steps(options.steps):
        with step:
            for batch in step.batches(data, batch_size=2):
                if flaw == "break" and step.index == 2:
                    break
                if flaw == "seed by rank":
                    torch.manual_seed(run.rank)
                if flaw == "data by rank":
                    batch = batch.roll(run.rank, 1)
                pause(options)
                go_wrong(flaw, step.index, options.pause)
                logits = model(batch[:, :-1])
                step.backward(F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten()))
        if flaw == "never comes back" and os.environ.get("RANK") == "1" and step.index == 3:
            threading.Event().wait()
        run.log(loss=step.loss, norm=step.norm)
    print(f"digest {run.digest()}", flush=True)
    if options.average:
        remembered = [[each.step, each.scalars["step"]] for each in run.training.lineage]
        print(f"lineage {remembered}", flush=True)
    run.close()


if __name__ == "__main__":
    main()
