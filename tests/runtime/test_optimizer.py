"""Which optimizers are taken, and that a shard of one computes the bits of the whole."""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim import lr_scheduler

from outlast.cluster.errors import Misuse
from outlast.runtime.optimizer import (
    Cohort,
    CohortOptimizer,
    Schedule,
    ShardOptimizer,
    discover,
)

CPU = torch.device("cpu")
GRAIN = 64
Factory = Callable[[Iterable[Tensor]], optim.Optimizer]


class Lion(optim.Optimizer):
    """Element-wise: sign of an interpolation."""

    def __init__(self, parameters: Any, lr: float = 1e-3) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                momentum = state.setdefault("exp_avg", torch.zeros_like(parameter))
                update = (0.9 * momentum + 0.1 * parameter.grad).sign_()
                parameter.sub_(update, alpha=group["lr"])
                momentum.mul_(0.99).add_(parameter.grad, alpha=0.01)


class Lamb(Lion):
    """Scales by the norms of the whole tensor."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                ratio = parameter.norm() / parameter.grad.norm()
                parameter.sub_(parameter.grad, alpha=group["lr"] * float(ratio))


class Rows(Lion):
    """Element-wise updates, but a statistic that is neither per element nor one number."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["table"] = torch.zeros(2, 3)
                parameter.sub_(parameter.grad, alpha=group["lr"])


TAKEN: dict[str, tuple[Factory, set[str]]] = {
    "adamw": (partial(optim.AdamW, lr=1e-2), {"exp_avg", "exp_avg_sq"}),
    "adamw fused": (partial(optim.AdamW, lr=1e-2, fused=True), {"exp_avg", "exp_avg_sq"}),
    "adamw foreach": (partial(optim.AdamW, lr=1e-2, foreach=True), {"exp_avg", "exp_avg_sq"}),
    "amsgrad": (
        partial(optim.Adam, lr=1e-2, amsgrad=True), {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
    ),
    "adam": (partial(optim.Adam, lr=1e-2), {"exp_avg", "exp_avg_sq"}),
    "sgd": (partial(optim.SGD, lr=1e-2, weight_decay=0.1), set()),
    "momentum": (partial(optim.SGD, lr=1e-2, momentum=0.9), {"momentum_buffer"}),
    "nesterov": (partial(optim.SGD, lr=1e-2, momentum=0.9, nesterov=True), {"momentum_buffer"}),
    "lion": (Lion, {"exp_avg"}),
    "adagrad": (partial(optim.Adagrad, lr=1e-2, initial_accumulator_value=0.1), {"sum"}),
    "adadelta": (optim.Adadelta, {"square_avg", "acc_delta"}),
    "adamax": (optim.Adamax, {"exp_avg", "exp_inf"}),
    "rmsprop": (optim.RMSprop, {"square_avg"}),
    "rmsprop centered": (
        partial(optim.RMSprop, centered=True, momentum=0.5),
        {"square_avg", "grad_avg", "momentum_buffer"},
    ),
    "nadam": (optim.NAdam, {"exp_avg", "exp_avg_sq"}),
    "radam": (optim.RAdam, {"exp_avg", "exp_avg_sq"}),
    "rprop": (partial(optim.Rprop, lr=1e-2), {"prev", "step_size"}),
    "asgd": (optim.ASGD, {"ax"}),
}  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
def test_element_wise_optimizers_are_taken(name: str) -> None:
    factory, roles = TAKEN[name]
    assert set(discover(factory, CPU).roles) == roles


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (optim.LBFGS, "does not run on flat shards"),
        (optim.Adafactor, "Adafactor is not element-wise"),
        (Lamb, "Lamb is not element-wise: .* Use one that"),
        (Rows, r"Rows keeps \['table'\] per tensor"),
        (optim.SparseAdam, "does not run on flat shards"),
        (optim.Muon, "does not run on flat shards"),
    ],
)
def test_others_are_refused(factory: Factory, message: str) -> None:
    with pytest.raises(Misuse, match=message):
        discover(factory, CPU)


# A shard computes the bits of the whole.

NUMEL, STEPS = 700, 6
STARTS = torch.randn(NUMEL, generator=torch.Generator().manual_seed(0))
GRADS = [
    torch.randn(NUMEL, generator=torch.Generator().manual_seed(10 + step)) for step in range(STEPS)
]


def rate(step: int) -> float:
    return 0.01 * (step + 1) / STEPS


def whole(factory: Factory) -> Tensor:
    parameter = nn.Parameter(STARTS.clone())
    optimizer = factory([parameter])
    for step, gradient in enumerate(GRADS):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def sharded(factory: Factory, cuts: dict[int, list[int]]) -> Tensor:
    """Steps on two halves in turn, as `ShardState` does; from step s on cut at cuts[s]."""
    state = discover(factory, CPU)
    halves = [
        {name: torch.zeros(NUMEL, dtype=dtype) for name, dtype in state.roles.items()}
        | {"": STARTS.clone()}
        for _ in (0, 1)
    ]
    shards: list[tuple[ShardOptimizer, list[tuple[int, int]]]] = []
    scalars: dict[str, float] = {}
    for step, gradient in enumerate(GRADS):
        old, new = halves[step % 2], halves[1 - step % 2]
        if step in cuts:
            edges = [0, *cuts[step], NUMEL]
            pieces = list(pairwise(edges))
            shards = []
            for mine in (pieces[::2], pieces[1::2]):  # two ranks with several runs each
                shard = ShardOptimizer(factory, state)
                views = [old[""][a:b] for a, b in mine]
                shard.rebuild(views, scalars, started=step > 0)
                shards.append((shard, mine))
        for name, values in new.items():
            values.copy_(old[name])
        for shard, mine in shards:
            roles = [{name: new[name][a:b] for name in state.roles} for a, b in mine]
            grads = [gradient[a:b].clone() for a, b in mine]
            after = shard.step([new[""][a:b] for a, b in mine], roles, grads, rate(step))
            scalars = after or scalars
    return halves[STEPS % 2][""]


@pytest.mark.parametrize("name", TAKEN)
def test_shards_equal_the_whole_bit_for_bit(name: str) -> None:
    factory, _ = TAKEN[name]
    right = whole(factory)
    for cuts in (
        {0: []},
        {0: [GRAIN, 5 * GRAIN]},
        {0: [GRAIN, 5 * GRAIN], 3: [2 * GRAIN, 3 * GRAIN, 10 * GRAIN]},
        {0: [GRAIN], 1: [8 * GRAIN], 5: []},
    ):
        assert torch.equal(sharded(factory, cuts), right), cuts


def test_planted_forgotten_state_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    factory, _ = TAKEN["adamw"]
    rebuild = ShardOptimizer.rebuild

    def forgetful(self: ShardOptimizer, views: Any, scalars: Any, started: bool) -> None:
        rebuild(self, views, dict.fromkeys(scalars, 0.0), started)

    monkeypatch.setattr(ShardOptimizer, "rebuild", forgetful)
    assert not torch.equal(sharded(factory, {0: [], 3: [GRAIN]}), whole(factory))


def test_planted_whole_tensor_rule_is_noticed() -> None:
    state = discover(TAKEN["sgd"][0], CPU)
    shard = ShardOptimizer(Lamb, state)
    shard.rebuild([STARTS[:64].clone(), STARTS[64:].clone()], {}, started=False)
    views = [STARTS[:64].clone(), STARTS[64:].clone()]
    shard.step(views, [{}, {}], [GRADS[0][:64].clone(), GRADS[0][64:].clone()], 0.01)
    parameter = nn.Parameter(STARTS.clone())
    one = Lamb([parameter], lr=0.01)
    parameter.grad = GRADS[0].clone()
    one.step()
    assert not torch.equal(torch.cat(views), parameter.detach())


def test_a_rank_without_runs_steps_along() -> None:
    shard = ShardOptimizer(TAKEN["adamw"][0], discover(TAKEN["adamw"][0], CPU))
    shard.rebuild([], {}, started=False)
    assert shard.step([], [], [], 0.1) == {}


# Schedules.


def test_a_function_is_a_factor_of_the_rate() -> None:
    schedule = Schedule(lambda step: min(1.0, (step + 1) / 4), base=0.2)
    assert [schedule.rate(step) for step in (5, 0, 1)] == [0.2, 0.05, 0.1]
    assert Schedule(None, base=0.3).rate(7) == 0.3


@pytest.mark.parametrize(
    "function",
    [
        lambda step: 1,
        lambda step: 0.5 if step == 3 else 1.0,
        {step: 1.0 for step in range(9)}.__getitem__,
        ([1.0] * 9).__getitem__,
    ],
    ids=["constant", "comparison", "dict", "list"],
)
def test_a_function_need_not_calculate_with_the_step(function: Any) -> None:
    assert Schedule(function, base=0.2).rate(2) == 0.2


@pytest.mark.parametrize(
    "factory",
    [
        partial(lr_scheduler.StepLR, step_size=2, gamma=0.5),
        partial(lr_scheduler.CosineAnnealingLR, T_max=8),
        partial(lr_scheduler.OneCycleLR, max_lr=1.0, total_steps=8),
        lambda optimizer: lr_scheduler.SequentialLR(
            optimizer,
            [
                lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3),
                lr_scheduler.ExponentialLR(optimizer, 0.9),
            ],
            milestones=[3],
        ),
    ],
)
def test_any_torch_scheduler_is_a_function_of_the_step(factory: Any) -> None:
    optimizer = optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler, right = factory(optimizer), []
    for _ in range(8):
        right.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    schedule = Schedule(factory, base=0.1)
    assert [schedule.rate(step) for step in range(8)] == right
    again = Schedule(factory, base=0.1)  # a joiner that asks for a late step first
    assert [again.rate(step) for step in (6, 2, 7)] == [right[6], right[2], right[7]]


@pytest.mark.parametrize("wrong", [lr_scheduler.ReduceLROnPlateau, lambda optimizer: "fast"])
def test_schedulers_that_need_more_than_the_step_are_refused(wrong: Any) -> None:
    with pytest.raises(Misuse, match="schedule must be"):
        Schedule(wrong, base=0.1)


# What a recovery averaged starts over; everything else goes on.

BORN, LOST = 3, slice(2 * GRAIN, 5 * GRAIN)


def cohorts_on(factory: Factory, cuts: list[int], rates: float = 1.1) -> tuple[Tensor, list[Any]]:
    """Steps of two ranks, each with every second piece; from step BORN on, LOST is a cohort of its
    own. The state of LOST is noise then: nobody may read it."""
    state = discover(factory, CPU)
    values = STARTS.clone()
    moments = {name: torch.zeros(NUMEL, dtype=dtype) for name, dtype in state.roles.items()}
    edges = sorted({0, LOST.start, LOST.stop, NUMEL, *cuts})
    pieces = list(pairwise(edges))
    told: list[Any] = [[Cohort(1.0, {}, False)], None]
    ranks = [(CohortOptimizer(factory, state), pieces[i::2]) for i in (0, 1)]
    for step, gradient in enumerate(GRADS):
        if step in (0, BORN):
            cohorts = told[0] if step == 0 else [
                Cohort(1.0, told[1][0], True), Cohort(rates, {}, False)
            ]  # fmt: skip
            if step:
                for moment in moments.values():
                    moment[LOST] = torch.randn(LOST.stop - LOST.start)
            for optimizer, mine in ranks:
                members = [int(step > 0 and LOST.start <= a < LOST.stop) for a, _ in mine]
                optimizer.rebuild([values[a:b] for a, b in mine], cohorts, members)
        answers = []
        for optimizer, mine in ranks:
            roles = [{name: moments[name][a:b] for name in moments} for a, b in mine]
            grads = [gradient[a:b].clone() for a, b in mine]
            views = [values[a:b] for a, b in mine]
            answers.append(optimizer.step(views, roles, grads, rate(step)))
        assert answers[0] == answers[1]  # also of a cohort that a rank has nothing of
        told = [told[0], answers[0]]
    return values, told[1]


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("cuts", [[], [3 * GRAIN, 7 * GRAIN]])
def test_what_was_averaged_starts_over_and_the_rest_is_untouched(
    name: str, cuts: list[int]
) -> None:
    factory, _ = TAKEN[name]
    values, scalars = cohorts_on(factory, cuts)
    right = whole(factory)
    assert torch.equal(values[: LOST.start], right[: LOST.start])
    assert torch.equal(values[LOST.stop :], right[LOST.stop :])
    born = sharded_until(factory, BORN)[LOST]
    fresh = nn.Parameter(born.clone())
    optimizer = factory([fresh])
    for step in range(BORN, STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate(step) * 1.1
        fresh.grad = GRADS[step][LOST].clone()
        optimizer.step()
    assert torch.equal(values[LOST], fresh.detach())
    if "step" in scalars[0]:
        assert (scalars[0]["step"], scalars[1]["step"]) == (STEPS, STEPS - BORN)


def sharded_until(factory: Factory, steps: int) -> Tensor:
    parameter = nn.Parameter(STARTS.clone())
    optimizer = factory([parameter])
    for step, gradient in enumerate(GRADS[:steps]):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def test_planted_rate_of_the_others_is_noticed() -> None:
    factory, _ = TAKEN["adamw"]
    assert not torch.equal(cohorts_on(factory, [], 1.0)[0][LOST], cohorts_on(factory, [])[0][LOST])
