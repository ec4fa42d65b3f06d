"""The reference does what the paper says: the acceptance tests of Streaming DiLoCo on a tiny model.

The runtime is compared with the reference elsewhere; here it is compared with DiLoCo written out
for whole models, with the optimizer alone, and with the closed form of the schedule.
"""

import copy
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from outlast.runtime.islands.codec import codec
from outlast.runtime.islands.settings import Islands

sys.path.insert(0, str(Path(__file__).parent))
from reference import Island, Leaf, Reference

GRAIN, RATE = 64, 0.01
SGD = partial(torch.optim.SGD, lr=RATE, momentum=0.9)


def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1)
    )


def leaf(step: int, island: int) -> Leaf:
    generator = torch.Generator().manual_seed(1000 * step + island)
    given = torch.randn(16, 8, generator=generator)

    def loss(model: nn.Module) -> torch.Tensor:
        return F.mse_loss(model(given)[:, 0], torch.sin(3 * given.sum(1)))

    return loss


def trained(count: int, steps: int, settings: Islands, **more: Any) -> Reference:
    islands = [Island(i, module(), SGD, GRAIN) for i in range(count)]
    exchange = Reference(islands, settings, codec(settings.codec, GRAIN), **more)
    for step in range(steps):
        for island in islands:
            island.train([leaf(step, island.number)], RATE)
        exchange.step(step + 1)
    return exchange


def whole(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.data.flatten() for parameter in model.parameters()])


def test_one_fragment_at_once_in_full_is_diloco() -> None:
    settings = Islands(every=5, fragment=9, delay=0, codec="none", outer_lr=0.7)
    found = trained(2, 20, settings)
    models = [module(), module()]
    inner = [SGD(model.parameters()) for model in models]
    outer, momentum = whole(models[0]), torch.zeros(0)
    for step in range(20):
        for number, (model, optimizer) in enumerate(zip(models, inner, strict=True)):
            optimizer.zero_grad()
            leaf(step, number)(model).backward()
            optimizer.step()
        if (step + 1) % 5 == 0:
            delta = ((outer - whole(models[0])) + (outer - whole(models[1]))) / 2
            momentum = momentum * 0.9 + delta if len(momentum) else delta.clone()
            outer = outer - (delta + momentum * 0.9) * 0.7
            for model in models:
                nn.utils.vector_to_parameters(outer.clone(), model.parameters())
    assert torch.equal(found.islands[0].outer, outer)
    assert torch.equal(found.islands[1].param, outer)


def test_who_never_listens_trains_alone() -> None:
    found = trained(2, 12, Islands(every=3, fragment=1, mixing=1.0))
    model = module()
    optimizer = SGD(model.parameters())
    for step in range(12):
        optimizer.zero_grad()
        leaf(step, 0)(model).backward()
        optimizer.step()
    assert torch.equal(found.islands[0].param, whole(model))


def test_one_island_that_exchanges_every_step_at_full_rate_is_its_optimizer() -> None:
    settings = Islands(every=1, fragment=9, delay=0, codec="none", outer_lr=1, outer_momentum=0)
    found, alone = trained(1, 12, settings), trained(1, 12, Islands(every=100))
    torch.testing.assert_close(found.islands[0].param, alone.islands[0].param)


@pytest.mark.parametrize("fragments", [1, 2, 3])
@pytest.mark.parametrize("delay", [0, 1, 5])
def test_fragments_are_sent_and_applied_when_the_paper_says(fragments: int, delay: int) -> None:
    every, size = 6, -(-3 // fragments)
    log = trained(1, 30, Islands(every=every, fragment=size, delay=delay)).log
    wanted = [
        (what, 0, p, step)
        for step in range(31)
        for what, late in (("sent", 0), ("applied", delay))
        for p in range(fragments)
        if step - late >= every and (step - late - p * every // fragments) % every == 0
    ]
    assert sorted(log) == sorted(wanted)


@pytest.mark.parametrize("name", ["e3m0", "int8", "none", "topk"])
@pytest.mark.parametrize("rule", ["mean", "edit", "trimmed", "median"])
def test_all_islands_have_the_same_outer_copy(name: str, rule: str) -> None:
    settings = Islands(every=12, fragment=1, delay={0: 0, 1: 1, 2: 3}, codec=name, rule=rule)
    islands = trained(3, 23, settings).islands  # sent after 12, 16 and 20
    assert not torch.equal(islands[0].outer, whole(module()))
    assert all(torch.equal(island.outer, islands[0].outer) for island in islands)


def test_what_top_k_leaves_out_is_sent_later() -> None:
    found = trained(2, 4, Islands(every=4, fragment=9, delay=0, codec="topk", feedback=1.0))
    before = [module() for _ in range(2)]
    for island, first in zip(found.islands, before, strict=True):
        kept = copy.deepcopy(island)
        assert int((kept.pseudogradient != 0).sum()) <= len(kept.param) // 64 + 4 * len(kept.runs)
        moved = trained_alone(island.number, 4)
        assert torch.equal(kept.pseudogradient + kept.residual, whole(first) - moved)


def trained_alone(number: int, steps: int) -> torch.Tensor:
    island = Island(number, module(), SGD, GRAIN)
    for step in range(steps):
        island.train([leaf(step, number)], RATE)
    return island.param


def test_an_island_that_does_not_count_is_left_out_and_follows() -> None:
    def present(fragment: int, step: int) -> list[int]:
        return [0, 1] if step == 8 else [0, 1, 2]

    settings = Islands(every=4, fragment=9, delay=0, codec="none")
    found, all_there = trained(3, 8, settings, present=present), trained(3, 8, settings)
    alone = trained(2, 8, settings)
    outers = [each.outer for each in found.islands]
    assert torch.equal(outers[0], outers[2])
    assert not torch.equal(outers[0], all_there.islands[0].outer)
    assert not torch.equal(outers[0], alone.islands[0].outer)


@pytest.mark.parametrize("rule", ["edit", "trimmed", "median"])
def test_the_guards_bear_one_liar_and_the_mean_does_not(rule: str) -> None:
    def lie(island: int, step: int, values: torch.Tensor) -> torch.Tensor:
        return values * -10 if island == 3 else values

    settings = {"every": 4, "fragment": 9, "delay": 0, "codec": "none"}
    honest = trained(4, 40, Islands(**settings)).islands[0]
    guarded = trained(4, 40, Islands(**settings, rule=rule), tamper=lie).islands[0]
    fooled = trained(4, 40, Islands(**settings), tamper=lie).islands[0]

    def apart(island: Island) -> float:
        return float((island.outer - honest.outer).norm() / (honest.outer - whole(module())).norm())

    assert apart(guarded) < 0.7  # the honest ones differ from each other, too
    assert not apart(fooled) < 1
