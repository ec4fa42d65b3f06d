"""The example trains what it says: causal, deterministic, on bytes."""

import math

import pytest
import torch
from corpus import Windows, standard_library
from gpt import GPT, Config, loss_fn, schedule, validate

CONFIG = Config(layers=2, width=32, heads=2, context=16, dropout=0.1)


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(CONFIG)


def test_the_text_is_the_same_twice_and_split_by_file() -> None:
    text = standard_library(0.5)
    assert text.sha256 == standard_library(0.5).sha256
    assert len(text.train) + len(text.validation) == 500_000
    assert len(text.train) > len(text.validation) > 0


def test_windows_lie_side_by_side() -> None:
    windows = Windows(torch.arange(11, dtype=torch.uint8), context=5)
    assert len(windows) == 2
    given, following = windows[1]
    assert given.tolist() == [5, 6, 7, 8, 9]
    assert following.tolist() == [6, 7, 8, 9, 10]


def test_a_byte_does_not_see_what_follows(model: GPT) -> None:
    model.eval()
    text = torch.randint(0, 256, (1, 16))
    other = text.clone()
    other[0, 10:] = 0
    assert torch.equal(model(text)[0, :10], model(other)[0, :10])


def test_an_untrained_model_knows_nothing(model: GPT) -> None:
    windows = Windows(torch.randint(0, 256, (400,)).byte(), context=16)
    bits = validate(model, windows, batches=2, batch_size=4)
    assert bits == pytest.approx(8.0, abs=0.3)
    assert model.training


def test_it_learns(model: GPT) -> None:
    text = torch.arange(16).repeat(4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        loss = loss_fn(model, (text, text))
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * math.log(256)


def test_the_rate_rises_and_falls() -> None:
    factor = schedule(warmup=4, steps=20)
    factors = [factor(step) for step in range(25)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == pytest.approx(1.0)
    assert factors[20:] == pytest.approx([0.1] * 5)
    assert factors[4:] == sorted(factors[4:], reverse=True)
