"""The training script that every simulated worker runs, and its undisturbed twin."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from outlast.runtime.determinism import seed_all
from outlast.runtime.link import Link, SoloLink
from outlast.runtime.run import Run
from outlast.runtime.training import Settings, Training

LEAVES, GRAIN, SEED, SAMPLES = 4, 64, 7, 40


@dataclass(frozen=True, slots=True)
class Task:
    """What is trained: the bits of every step follow from this alone."""

    steps: int = 6
    adam: bool = True
    clip: float | None = None


@dataclass(frozen=True, slots=True)
class Redundancy:
    """How it is protected: changes no bit."""

    zero: int = 2
    parity: int = 1
    group: int = 16
    spot_check: int = 0


class Model(nn.Module):
    """Units of very different sizes, some below a grain: 500 elements."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(40, 6) * 0.3)
        self.blocks = nn.ModuleList(nn.Linear(6, 12) for _ in range(2))
        self.head = nn.Linear(12, 7)

    def forward(self, index: Tensor) -> Tensor:
        x = self.embedding[index]
        for block in self.blocks:
            x = x + block(x.tanh())[..., :6] * torch.rand(6)
        found: Tensor = self.head(torch.cat([x, x.sin()], -1))
        return found


class Data:
    """Samples are their own indices; `read` is told each."""

    def __init__(self, read: Callable[[int], None]) -> None:
        self._read = read

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Tensor:
        self._read(index)
        return torch.tensor(index)


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """A smooth loss of every parameter, with random numbers in it."""
    out = model(batch)
    aim = batch.float().mean() / 40
    loss: Tensor = (out * out.sin()).mean() + (out.sum(0) - aim).square().mean()
    return loss


def prepare(link: Link, task: Task, how: Redundancy) -> tuple[Run, nn.Module]:
    """What a script does between `init` and the loop."""
    seed_all(SEED)
    run = Run(link, Settings(seed=SEED, leaves=LEAVES, grain=GRAIN))
    optimizer: Any = (
        partial(torch.optim.AdamW, lr=0.02)
        if task.adam
        else partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    )
    safety: Any = {"parity": how.parity, "group": how.group, "spot_check": how.spot_check}
    model = run.prepare(
        Model(),
        optimizer=optimizer,
        zero=how.zero,
        clip=task.clip,
        schedule=lambda step: 1 / (1 + step),
        **safety,
    )
    return run, model


@dataclass(frozen=True, slots=True)
class Truth:
    """After one step: every role over the whole space, and the working parameters."""

    roles: dict[str, Tensor]
    param: Tensor


@lru_cache(maxsize=64)
def twin(task: Task) -> tuple[Truth, ...]:
    """The state after step 0, 1, ... of a run on one rank that nothing disturbs."""
    found = []

    def look(training: Training) -> None:
        whole = {r.name: torch.zeros(training.model.space.numel) for r in training.state.roles}
        for name, values in whole.items():
            for run, part in zip(training.state.runs, training.state.live(name), strict=True):
                values[run.start : run.stop] = part
        found.append(Truth(whole, training.model.param.clone()))

    run, model = prepare(SoloLink(), task, Redundancy(parity=0))
    look(run.training)
    for step in run.steps(task.steps):
        with step:
            for batch in step.batches(Data(lambda index: None), batch_size=2):
                step.backward(loss_of(model, batch))
        look(run.training)
    return tuple(found)


