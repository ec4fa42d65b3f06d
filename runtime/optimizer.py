"""Any element-wise torch optimizer, run on the owned runs only, out of the old half into the new
one.

ZeRO needs an optimizer that treats every element by itself: then it does not matter who owns
which element. Whether a given optimizer is of that kind is found out by experiment, see
`discover`; the same experiment tells which state it keeps per element (these become roles of the
state memory) and which per tensor (these are kept as numbers)."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from outlast.cluster.errors import Misuse

OptimizerFactory = Callable[[Iterable[Tensor]], Optimizer]
ScheduleFactory = Callable[[int], float] | Callable[[Optimizer], LRScheduler]

_PROBE = 256  # elements of the probe, cut in the middle


@dataclass(frozen=True, slots=True)
class OptimizerState:
    """What an optimizer keeps: dtypes of per-element state, samples of per-tensor numbers."""

    roles: dict[str, torch.dtype]
    scalars: dict[str, Any]


def discover(factory: OptimizerFactory, device: torch.device) -> OptimizerState:
    """Run the optimizer on a whole vector and on its two halves, and compare the bits.

    Raises:
        Misuse: it is not element-wise, or needs something that a step does not give.
    """
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(_PROBE, generator=generator)
    gradients = [torch.randn(_PROBE, generator=generator) * 10**i for i in range(-1, 2)]
    whole = [nn.Parameter(values.clone().to(device))]
    halves = [nn.Parameter(part.clone().to(device)) for part in values.chunk(2)]
    try:
        one, two = factory(whole), factory(halves)
        for gradient in gradients:
            whole[0].grad = gradient.clone().to(device)
            for half, part in zip(halves, gradient.chunk(2), strict=True):
                half.grad = part.clone().to(device)
            one.step()
            two.step()
    except (TypeError, ValueError, RuntimeError) as cause:
        raise Misuse(f"the optimizer does not run on flat shards: {cause}") from cause
    if not torch.equal(whole[0].detach(), torch.cat([half.detach() for half in halves])):
        raise Misuse(
            f"{type(one).__name__} is not element-wise: cutting a tensor changes its result, so it "
            "cannot be sharded exactly. Use one that treats every element by itself, such as "
            "AdamW, SGD or Lion"
        )
    state = one.state[whole[0]]
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)}
    roles = {k: v.dtype for k, v in tensors.items() if v.shape == whole[0].shape}
    scalars = {k: v for k, v in state.items() if k not in roles and v is not None}
    odd = [k for k in scalars if isinstance(state[k], Tensor) and state[k].numel() != 1]
    if odd:
        raise Misuse(f"{type(one).__name__} keeps {odd} per tensor, which cannot be sharded")
    return OptimizerState(roles, scalars)


class Schedule:
    """Learning rate as a function of the step alone, from a factor or any torch scheduler.

    Args:
        schedule: step -> factor, or optimizer -> LRScheduler; None keeps the rate constant.
    Raises:
        Misuse: the scheduler looks at a metric.
    """

    def __init__(self, schedule: ScheduleFactory | None, base: float) -> None:
        self._rates: list[float] = []
        self._optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=base)
        self._scheduler = _scheduler(schedule, self._optimizer)

    def rate(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0."""
        while len(self._rates) <= step:
            self._rates.append(float(self._optimizer.param_groups[0]["lr"]))
            self._optimizer.step()
            self._scheduler.step()
        return self._rates[step]


def _scheduler(schedule: ScheduleFactory | None, optimizer: Optimizer) -> LRScheduler:
    if schedule is None:
        return LambdaLR(optimizer, lambda step: 1.0)
    try:
        made: Any = schedule(optimizer)  # type: ignore[arg-type]
    except (TypeError, AttributeError, LookupError):  # it calculates with a step, or looks it up
        return LambdaLR(optimizer, schedule)  # type: ignore[arg-type]
    if isinstance(made, int | float):  # a function of the step that only compares it
        return LambdaLR(optimizer, schedule)  # type: ignore[arg-type]
    if isinstance(made, ReduceLROnPlateau) or not isinstance(made, LRScheduler):
        raise Misuse("schedule must be step -> factor, or optimizer -> a scheduler without metrics")
    return made


@dataclass(frozen=True, slots=True)
class Cohort:
    """Elements that have made the same steps: all that a job began with, or what was averaged.

    Args:
        rate: factor of the learning rate.
        scalars: per-tensor numbers after the step that is held.
        started: whether it has made any step.
    """

    rate: float
    scalars: dict[str, float]
    started: bool


class CohortOptimizer:
    """An optimizer of its own for every cohort, each over the views that belong to it.

    Args:
        factory: parameters -> optimizer.
        state: what `discover` found.
    """

    def __init__(self, factory: OptimizerFactory, state: OptimizerState) -> None:
        self._factory, self.state = factory, state
        self._parts: list[tuple[Cohort, ShardOptimizer, list[int]]] = []
        group = factory([nn.Parameter(torch.zeros(1))]).param_groups[0]
        self.base_rate = float(group["lr"])
        self.hyper = {name: _plain(value) for name, value in group.items() if name != "params"}

    def rebuild(
        self, views: Sequence[Tensor], cohorts: Sequence[Cohort], members: Sequence[int]
    ) -> None:
        """Start over on other runs.

        Args:
            views: the parameters, float vectors; view i belongs to cohort `members[i]`.
        """
        self._parts = []
        for number, cohort in enumerate(cohorts):
            mine = [i for i, member in enumerate(members) if member == number]
            shard = ShardOptimizer(self._factory, self.state)
            chosen = [views[i] for i in mine] or [_probe(view) for view in views[:1]]
            shard.rebuild(chosen, cohort.scalars, cohort.started)
            self._parts.append((cohort, shard, mine))

    def step(
        self,
        views: Sequence[Tensor],
        roles: Sequence[dict[str, Tensor]],
        grads: Sequence[Tensor],
        rate: float,
    ) -> list[dict[str, float]]:
        """Update in place; see `ShardOptimizer.step`. A rank that holds nothing of a cohort steps
        one element in its place: the numbers must not die with those who hold some.

        Returns:
            the per-tensor numbers of every cohort after the step.
        """
        found = []
        for cohort, shard, mine in self._parts:
            chosen = [(views[i], roles[i], grads[i]) for i in mine]
            for view in views[:1] if not mine else ():
                state = {k: _probe(view).to(dtype) for k, dtype in self.state.roles.items()}
                chosen = [(_probe(view), state, _probe(view))]
            columns = [list(column) for column in zip(*chosen, strict=True)] or [[], [], []]
            found.append(shard.step(*columns, rate * cohort.rate))
        return found


def _plain(value: Any) -> Any:
    """A hyper-parameter as JSON knows it."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def _probe(like: Tensor) -> Tensor:
    return torch.zeros(1, dtype=like.dtype, device=like.device)


class ShardOptimizer:
    """The optimizer over the views of the owned runs of one cohort.

    Args:
        factory: parameters -> optimizer.
        state: what `discover` found.
    """

    def __init__(self, factory: OptimizerFactory, state: OptimizerState) -> None:
        self._factory = factory
        self.state = state
        self._parameters: list[nn.Parameter] = []
        self._optimizer: Optimizer | None = None
        self._started = False

    def rebuild(self, views: Sequence[Tensor], scalars: dict[str, float], started: bool) -> None:
        """Start over on other runs.

        Args:
            views: the parameters, float vectors.
            scalars: per-tensor numbers after the step that is held.
            started: whether any step has been made; the first one creates the state.
        """
        self._started = started
        self._parameters = [nn.Parameter(view) for view in views]
        self._optimizer = self._factory(self._parameters) if self._parameters else None
        for parameter in self._parameters if started else ():
            assert self._optimizer is not None
            self._optimizer.state[parameter] = {
                key: sample.clone().fill_(scalars[key])
                if isinstance(sample, Tensor)
                else scalars[key]
                for key, sample in self.state.scalars.items()
            }

    def step(
        self,
        views: Sequence[Tensor],
        roles: Sequence[dict[str, Tensor]],
        grads: Sequence[Tensor],
        rate: float,
    ) -> dict[str, float]:
        """Update in place.

        Args:
            views, grads: the parameter and its gradient, per run.
            roles: per-element state per run; ignored at the first step, then written to.
        Returns:
            the per-tensor numbers after the step, the same for every run.
        """
        optimizer = self._optimizer
        if optimizer is None:
            return {}
        for group in optimizer.param_groups:
            group["lr"] = rate
        for parameter, view, role, grad in zip(self._parameters, views, roles, grads, strict=True):
            parameter.data, parameter.grad = view, grad
            if self._started:
                optimizer.state[parameter].update(role)
        optimizer.step()
        self._started = True
        for parameter, role in zip(self._parameters, roles, strict=True):
            parameter.grad = None
            state = optimizer.state[parameter]
            for key, home in role.items():
                if state[key].data_ptr() != home.data_ptr():
                    home.copy_(state[key])  # the first step made it, or replaced it
                    state[key] = home
        state = optimizer.state[self._parameters[0]]
        return {key: float(state[key]) for key in self.state.scalars}
