"""Models as one flat buffer: what is inside, what stays outside, what is refused."""

import pytest
import torch
from torch import nn

from outlast.cluster.errors import Misuse
from outlast.runtime.flat_model import FlatModel, unit_of


class Tied(nn.Module):
    """An embedding that is the head, too, a frozen layer, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor(2.0))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        x = self.embedding(index)
        for block in self.blocks:
            x = x + block(self.frozen(x)).tanh()
        out: torch.Tensor = self.head(x) * self.scale
        return out


INPUT = torch.arange(8)


def tied() -> Tied:
    torch.manual_seed(0)
    return Tied()


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    for parameter in module.parameters():
        parameter.grad = None
    module(INPUT).square().mean().backward()
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def check_equal_to_plain(flat: FlatModel, plain: nn.Module) -> None:
    """Outputs and every gradient in the flat buffer are those of the plain module."""
    assert torch.equal(flat.module(INPUT), plain(INPUT))
    right = gradients(plain)
    buffer = torch.full((flat.space.numel,), 7.0, dtype=flat.dtype)
    flat.bind_gradients(buffer)
    flat.module(INPUT).square().mean().backward()
    for name in flat.parameters:
        run = flat.space.run(name)
        value = buffer[run.start : run.stop]
        expected = right.get(name, torch.zeros(run.length)).flatten().to(value.dtype)
        assert torch.equal(value, expected), name


def test_the_flat_model_is_the_model() -> None:
    check_equal_to_plain(FlatModel(tied()), tied())


def test_planted_wrong_address_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    view = FlatModel._view

    def shifted(self: FlatModel, flat: torch.Tensor, name: str) -> torch.Tensor:
        right = view(self, flat, name)
        return right.roll(1) if name == "blocks.1.bias" else right

    flat = FlatModel(tied())
    monkeypatch.setattr(FlatModel, "_view", shifted)
    with pytest.raises(AssertionError, match=r"blocks\.1\.bias"):
        check_equal_to_plain(flat, tied())


def test_tied_parameters_count_once_and_stay_tied() -> None:
    model = tied()
    flat = FlatModel(model)
    assert "head.weight" not in flat.parameters
    assert flat.space.numel == 44 + 2 * 20 + 3
    flat.param.fill_(0.5)
    assert model.head.weight.data_ptr() == model.embedding.weight.data_ptr()
    assert (model.head.weight == 0.5).all()


def test_frozen_parameters_and_buffers_stay_outside() -> None:
    model = tied()
    before = model.frozen.weight.clone()
    flat = FlatModel(model)
    flat.param.zero_()
    assert torch.equal(model.frozen.weight, before)
    assert not any(name.startswith(("frozen", "scale")) for name in flat.parameters)


def test_unused_parameters_have_zero_gradients() -> None:
    flat = FlatModel(tied())
    buffer = torch.full((flat.space.numel,), 7.0)
    flat.bind_gradients(buffer)
    flat.module(INPUT).sum().backward()
    run = flat.space.run("unused")
    assert not buffer[run.start : run.stop].any()
    flat.collect_gradients(buffer)
    assert all(parameter.grad is None for parameter in flat.parameters.values())


def test_gradients_that_a_script_replaced_are_taken() -> None:
    flat = FlatModel(tied())
    buffer = torch.empty(flat.space.numel)
    flat.bind_gradients(buffer)
    flat.module.zero_grad(set_to_none=True)
    flat.module(INPUT).square().mean().backward()
    flat.collect_gradients(buffer)
    right = gradients(tied())["embedding.weight"].flatten()
    run = flat.space.run("embedding.weight")
    assert torch.equal(buffer[run.start : run.stop], right)


def test_bf16_converts_all_and_keeps_ties() -> None:
    flat = FlatModel(tied(), torch.bfloat16)
    assert flat.param.dtype == flat.module.frozen.weight.dtype == torch.bfloat16
    assert flat.module.head.weight.data_ptr() == flat.module.embedding.weight.data_ptr()
    check_equal_to_plain(flat, tied().to(torch.bfloat16))
    half = tied()
    half.blocks.to(torch.float16)
    with pytest.raises(Misuse, match="pass dtype="):
        FlatModel(half)


def test_the_fingerprint_sees_every_value() -> None:
    def fingerprint(name: str = "") -> str:
        model = tied()
        if name:
            dict([*model.named_parameters(), *model.named_buffers()])[name].data.view(-1)[0] += 1
        return FlatModel(model).fingerprint()

    same = fingerprint()
    assert fingerprint() == same
    assert len({same, *map(fingerprint, ("unused", "frozen.bias", "scale"))}) == 4


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm1d(4), nn.SyncBatchNorm(4), nn.InstanceNorm1d(4, track_running_stats=True)],
)
def test_statistics_of_the_rank_are_refused(layer: nn.Module) -> None:
    with pytest.raises(Misuse, match=r"1 keeps running statistics .* GroupNorm"):
        FlatModel(nn.Sequential(nn.Linear(4, 4), layer))


def test_normalization_without_statistics_is_taken() -> None:
    layers = (nn.BatchNorm1d(4, track_running_stats=False), nn.LayerNorm(4), nn.InstanceNorm1d(4))
    FlatModel(nn.Sequential(nn.Linear(4, 4), *layers))


def test_a_model_without_training_is_refused() -> None:
    with pytest.raises(Misuse, match="requires_grad"):
        FlatModel(nn.Linear(2, 2).requires_grad_(False))


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("blocks.3.attention.weight", "blocks.3"),
        ("model.layers.12.mlp.up.weight", "model.layers.12"),
        ("encoder.layers.0.experts.5.weight", "encoder.layers.0"),
        ("head.weight", "head"),
        ("0.weight", "0"),
        ("weight", "weight"),
    ],
)
def test_units_are_blocks_or_top_level_modules(name: str, unit: str) -> None:
    assert unit_of(name) == unit
