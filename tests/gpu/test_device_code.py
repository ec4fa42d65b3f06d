"""The erasure code on a GPU gives the bytes of the processor's."""

import numpy as np
import pytest
import torch

from outlast.checkpoint.code import Code
from outlast.runtime import device_code
from outlast.runtime.device_code import DeviceCode

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="not run: no CUDA device"),
]


@pytest.mark.parametrize(("k", "m"), [(3, 1), (2, 2), (8, 3), (6, 5)])
def test_bytes_are_those_of_the_processor(monkeypatch: pytest.MonkeyPatch, k: int, m: int) -> None:
    monkeypatch.setattr(device_code, "_BLOCK", 1 << 16)
    size = 3 * (1 << 16) + 77
    rng = np.random.default_rng(k)
    data = [rng.integers(0, 256, size - 1000 * (j % 2), np.uint8) for j in range(k)]
    expected = [np.empty(size, np.uint8) for _ in range(m)]
    Code(k, m).encode(data, expected)
    units = [torch.from_numpy(unit).cuda() for unit in data]
    parity = [torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(m)]
    DeviceCode(k, m).encode(units, parity)
    assert all(np.array_equal(a.cpu().numpy(), b) for a, b in zip(parity, expected, strict=True))
    lost = {j: torch.empty(size, dtype=torch.uint8, device="cuda") for j in range(min(k, m))}
    left = {j: unit for j, unit in enumerate(units) if j not in lost}
    DeviceCode(k, m).decode(left, dict(enumerate(parity)), lost)
    assert all(torch.equal(lost[j][: len(units[j])], units[j]) for j in lost)
    assert not any(lost[j][len(units[j]) :].any() for j in lost)
